//! The DSR balancer, packet by packet: what comes in, what must come out, and why. Traps L1, L3, L6 to L12, L16 to L24.

mod common;

use std::net::{IpAddr, SocketAddr};

use common::dsr::{
    Balancer, GATEWAY, Host, SECOND_LINK, VIP4, VIP6, arriving, client, fix_ipv4, inner_at, mac, neighbour4,
    neighbour6, network_at, one_hop_further, segment, service_text, vip,
};
use xdpkit::{Action, BackendState, DsrConfig, DsrService, Echo, Error, Reason, ServiceAddr};
use xdpkit_lab::frame::{Frame, checksum, extension, tcp};

fn config() -> DsrConfig {
    DsrConfig::default()
        .services(8)
        .table_size(4099)
        .flows(4096)
        .outer_v4("10.200.0.0/16".parse().unwrap())
        .outer_v6("2001:db8:200::/64".parse().unwrap())
}

fn neighbours(family6: bool, numbers: &[u8]) -> Vec<IpAddr> {
    numbers.iter().map(|number| if family6 { neighbour6(*number) } else { neighbour4(*number) }).collect()
}

#[test]
fn l9_l2_changes_nothing_but_macs_and_hop_limit() {
    let host = Host::new();
    let b = host.balancer(&config());
    for family6 in [false, true] {
        b.service(&service_text("tcp", family6, "80"), DsrService::l2(), &neighbours(family6, &[11]));
        b.service(&service_text("udp", family6, "*"), DsrService::l2(), &neighbours(family6, &[12]));
        let udp = |port| {
            let from = SocketAddr::new(client(family6, 0), 4000);
            Frame::udp(from, SocketAddr::new(vip(family6), port)).payload(b"query")
        };
        for (what, frame, number) in [
            ("a SYN", segment(family6, 0, 4000).flags(tcp::SYN), 11),
            ("data", segment(family6, 1, 4001).flags(tcp::ACK), 11),
            ("one tag", segment(family6, 2, 4002).vlan(7), 11),
            ("two tags", segment(family6, 2, 4002).tag(0x88a8, 5).vlan(7), 11),
            (
                "IPv4 options, IPv6 options",
                segment(family6, 3, 1).options(&[1; 8]).extension(extension::DESTINATION, &[]),
                11,
            ),
            ("padding", segment(family6, 4, 2).payload(&[]).trailer(&[0xee; 30]), 11),
            ("any port", udp(53), 12),
            ("another port", udp(9999), 12),
            ("L1: a UDP checksum of 0 stays", udp(53).checksum(0), 12),
            ("L3: a checksum that nobody has finished stays", segment(family6, 4, 2).checksum(0x1234), 11),
        ] {
            let frame = arriving(&host, frame).build();
            let (action, reason, out) = b.run(&frame);
            assert_eq!((action, reason), (Action::Tx, Reason::Forwarded), "{what}");
            assert_eq!(out, one_hop_further(&frame, mac(number), host.mac), "{what}");
        }
    }
}

#[test]
fn l7_l8_every_outer_field_is_set_in_all_mixes_of_families() {
    let host = Host::new();
    let b = host.balancer(&config());
    for (family6, backend, number) in [
        (false, neighbour4(11), 11),
        (true, neighbour6(12), 12),
        (false, neighbour6(13), 13),
        (true, neighbour4(14), 14),
        // Through the gateway: anywhere.
        (false, "203.0.113.5".parse().unwrap(), GATEWAY),
        (true, "2001:db8:ffff::5".parse().unwrap(), GATEWAY),
    ] {
        let service = b.service(&service_text("tcp", family6, "80"), DsrService::ipip(), &[backend]);
        let mut sources = std::collections::HashSet::new();
        for (what, frame) in [
            ("plain", segment(family6, 0, 4000)),
            ("a SYN", segment(family6, 1, 4001).flags(tcp::SYN)),
            ("don't fragment", segment(family6, 2, 4002).dont_fragment().identification(7)),
            ("DSCP and ECN", segment(family6, 3, 4003).tos(0xb9).identification(0x1234)),
            ("one tag", segment(family6, 4, 4004).vlan(7)),
            ("two tags", segment(family6, 5, 4005).tag(0x88a8, 5).vlan(7)),
            ("padding is not counted", segment(family6, 6, 4006).payload(&[]).trailer(&[0xee; 9])),
            ("options", segment(family6, 7, 4007).options(&[1; 4]).extension(extension::DESTINATION, &[])),
        ] {
            let frame = arriving(&host, frame).build();
            let (action, reason, out) = b.run(&frame);
            assert_eq!((action, reason), (Action::Tx, Reason::Forwarded), "{backend} {what}");
            let at = network_at(&frame);
            let moved = one_hop_further(&frame, mac(number), host.mac);
            let outer = &out[at..inner_at(&out)];
            assert_eq!(out[..at - 2], moved[..at - 2], "{backend} {what}: MACs and tags");
            assert_eq!(out[inner_at(&out)..], moved[at..], "{backend} {what}: what is inside");
            let (length, tos) = match family6 {
                false => (u16::from_be_bytes([frame[at + 2], frame[at + 3]]), frame[at + 1]),
                true => (u16::from_be_bytes([frame[at + 4], frame[at + 5]]) + 40, frame[at] << 4 | frame[at + 1] >> 4),
            };
            let protocol = if family6 { 41 } else { 4 };
            match backend {
                IpAddr::V4(to) => {
                    assert_eq!(out[at - 2..at], [8, 0]);
                    let mut wanted = vec![0x45, tos];
                    wanted.extend((length + 20).to_be_bytes());
                    if family6 {
                        wanted.extend([0, 0, 0x40, 0]);
                    } else {
                        wanted.extend(&frame[at + 4..at + 6]);
                        wanted.extend([frame[at + 6] & 0x40, 0]);
                    }
                    wanted.extend([64, protocol, 0, 0, 10, 200, outer[14], outer[15]]);
                    wanted.extend(to.octets());
                    let sum = checksum(&wanted).to_be_bytes();
                    wanted[10..12].copy_from_slice(&sum);
                    assert_eq!(outer, wanted, "{backend} {what}");
                    sources.insert(outer[12..16].to_vec());
                }
                IpAddr::V6(to) => {
                    assert_eq!(out[at - 2..at], [0x86, 0xdd]);
                    assert_eq!((outer[0], outer[1] & 0xf0), (0x60 | tos >> 4, tos << 4), "{backend} {what}");
                    assert_eq!(outer[4..8], [&length.to_be_bytes()[..], &[protocol, 64]].concat(), "{backend} {what}");
                    assert_eq!(outer[8..16], [0x20, 1, 0xd, 0xb8, 2, 0, 0, 0]);
                    assert_eq!(outer[24..], to.octets());
                    sources.insert(outer[8..24].to_vec());
                }
            }
        }
        assert!(sources.len() >= 7, "the outer source varies by flow: {sources:?}");
        host.ns.run(|| b.balancer.remove_service(service)).unwrap();
    }
}

#[test]
fn l23_what_is_not_for_a_service_goes_on_untouched() {
    let host = Host::new();
    let b = host.balancer(&config());
    b.service(&service_text("tcp", false, "80"), DsrService::l2(), &[neighbour4(11)]);
    b.service(&service_text("tcp", true, "80"), DsrService::l2(), &[neighbour6(11)]);
    let [vip4, vip6]: [IpAddr; 2] = [vip(false), vip(true)];
    let from4 = |port| SocketAddr::new(client(false, 0), port);
    let from6 = |port| SocketAddr::new(client(true, 0), port);
    let ssh: SocketAddr = "192.168.178.10:22".parse().unwrap();
    let near: SocketAddr = "[2001:db8:b::101]:80".parse().unwrap();
    for (what, frame, reason) in [
        ("ARP", Frame::arp_request(mac(1), "192.168.178.1".parse().unwrap(), VIP4.parse().unwrap()), Reason::NotForVip),
        (
            "neighbour discovery",
            Frame::neighbour_solicitation(mac(1), "2001:db8:b::1".parse().unwrap(), VIP6.parse().unwrap()),
            Reason::NotForVip,
        ),
        ("LLDP", Frame::ethernet(0x88cc).payload(&[0; 46]), Reason::NotForVip),
        ("SSH to the host", Frame::tcp(from4(5), ssh), Reason::NotForVip),
        ("an address beside", Frame::tcp(from6(5), near), Reason::NotForVip),
        ("three tags", Frame::tcp(from4(5), SocketAddr::new(vip4, 80)).vlan(1).vlan(2).vlan(3), Reason::VlanTooDeep),
        ("malformed, for others", Frame::tcp(from4(5), ssh).data_offset(3), Reason::TcpDataOffset),
        ("another port", Frame::tcp(from4(5), SocketAddr::new(vip4, 81)), Reason::NoService),
        ("another protocol", Frame::udp(from6(5), SocketAddr::new(vip6, 80)), Reason::NoService),
        ("GRE", Frame::ip(client(false, 0), vip4, 47).payload(&[0; 8]), Reason::NoService),
        (
            "IPv6 of the VIP's bits",
            Frame::tcp("[::5]:5".parse().unwrap(), "[::c0a8:b264]:80".parse().unwrap()),
            Reason::NotForVip,
        ),
        ("a reply to an echo", Frame::icmp(client(false, 0), vip4, 0, 0, [0; 4]), Reason::NoService),
    ] {
        let frame = arriving(&host, frame).build();
        let (action, counted, out) = b.run(&frame);
        assert_eq!((action, counted), (Action::Pass, reason), "{what}");
        assert_eq!(out, frame, "{what}");
    }
    // For a service, what is malformed is dropped: no backend wants it.
    for (frame, reason) in [
        (segment(false, 0, 1).data_offset(3), Reason::TcpDataOffset),
        (segment(true, 0, 1).data_offset(15), Reason::TcpDataOffset),
    ] {
        assert_eq!(b.run(&arriving(&host, frame).build()).1, reason);
    }
}

#[test]
fn l18_no_backends_no_weights_and_port_0_are_defined() {
    let host = Host::new();
    let b = host.balancer(&config());
    let service = b.service(&service_text("tcp", false, "*"), DsrService::l2(), &[]);
    let to = |port| {
        let frame = Frame::tcp(SocketAddr::new(client(false, 0), 5), SocketAddr::new(vip(false), port));
        let (action, reason, _) = b.run(&arriving(&host, frame.flags(tcp::SYN)).build());
        (action, reason)
    };
    assert_eq!(to(80), (Action::Drop, Reason::NoBackend));
    assert_eq!(to(0), (Action::Drop, Reason::PortZero));
    host.ns.run(|| {
        assert_eq!(b.balancer.set_backend(service, neighbour4(11), 0).unwrap(), None);
    });
    assert_eq!(to(80), (Action::Drop, Reason::NoBackend));
    host.ns.run(|| {
        assert_eq!(b.balancer.set_backend(service, neighbour4(11), 5).unwrap(), Some(0));
    });
    assert_eq!(to(80), (Action::Tx, Reason::Forwarded));
    assert_eq!(to(0), (Action::Drop, Reason::PortZero));
    let stats = b.balancer.service(service).unwrap().stats;
    assert_eq!((stats.no_backend, stats.received.packets, stats.new_flows), (2, 3, 3));
    let refused = "tcp/192.168.178.100:0".parse::<ServiceAddr>().unwrap_err();
    assert!(matches!(refused, Error::Invalid { what: "service", .. }), "{refused}");
}

#[test]
fn l19_one_hop_is_not_forwarded() {
    let host = Host::new();
    let b = host.balancer(&config());
    for family6 in [false, true] {
        b.service(&service_text("tcp", family6, "80"), DsrService::ipip(), &neighbours(family6, &[11]));
        for (ttl, wanted) in [
            (0, (Action::Pass, Reason::HopLimit)),
            (1, (Action::Pass, Reason::HopLimit)),
            (2, (Action::Tx, Reason::Forwarded)),
            (255, (Action::Tx, Reason::Forwarded)),
        ] {
            let frame = arriving(&host, segment(family6, 0, 1).ttl(ttl)).build();
            let (action, reason, out) = b.run(&frame);
            assert_eq!((action, reason), wanted, "{ttl}");
            assert!(action == Action::Tx || out == frame, "untouched");
        }
    }
}

#[test]
fn l20_a_backend_may_be_a_client_but_not_the_service() {
    let host = Host::new();
    let b = host.balancer(&config());
    let service = b.service(&service_text("tcp", false, "80"), DsrService::l2(), &[neighbour4(11), neighbour4(12)]);
    let hairpin = Frame::tcp(SocketAddr::new(neighbour4(11), 5), SocketAddr::new(vip(false), 80));
    assert_eq!(b.run(&arriving(&host, hairpin).build()).1, Reason::Forwarded);
    let error = host.ns.run(|| b.balancer.set_backend(service, vip(false), 1)).unwrap_err();
    assert!(error.to_string().contains("backend `192.168.178.100`: expected another"), "{error}");
}

#[test]
fn l10_a_backend_off_link_is_refused_and_noticed() {
    let host = Host::new();
    let b = host.balancer(&config());
    for (family6, far, own) in [(false, "203.0.113.5", "192.168.178.10"), (true, "2001:db8:ffff::5", "2001:db8:b::10")]
    {
        let text = service_text("tcp", family6, "80");
        let service: ServiceAddr = text.parse().unwrap();
        for (address, expected) in [(far, "a neighbour on a link"), (own, "another host")] {
            let list = [(address.parse().unwrap(), 1)];
            let error = host.ns.run(|| b.balancer.insert_service(service, DsrService::l2(), list)).unwrap_err();
            assert!(error.to_string().contains(&format!("backend `{address}`: expected {expected}")), "{error}");
            assert!(b.balancer.services().unwrap().iter().all(|entry| entry.address != service));
        }
        let other_family = [(neighbours(!family6, &[11])[0], 1)];
        let error = host.ns.run(|| b.balancer.insert_service(service, DsrService::l2(), other_family)).unwrap_err();
        assert!(error.to_string().contains("the service's family"), "{error}");
    }
    drop(b);
    let blind = host.balancer(&config().check_on_link(false));
    blind.service(&service_text("tcp", false, "80"), DsrService::l2(), &["203.0.113.5".parse().unwrap()]);
    blind.service(&service_text("tcp", true, "80"), DsrService::l2(), &["2001:db8:ffff::5".parse().unwrap()]);
    for family6 in [false, true] {
        let (action, reason, _) = blind.run(&arriving(&host, segment(family6, 0, 1)).build());
        assert_eq!((action, reason), (Action::Drop, Reason::OffLink));
    }
}

#[test]
fn l12_a_backend_on_another_interface_is_redirected_to() {
    let host = Host::new();
    let b = host.balancer(&config());
    for (family6, backend) in [(false, "172.31.0.77"), (true, "2001:db8:d::77")] {
        b.service(&service_text("tcp", family6, "80"), DsrService::l2(), &[backend.parse().unwrap()]);
        let frame = arriving(&host, segment(family6, 0, 1)).build();
        let (action, reason, out) = b.run(&frame);
        assert_eq!((action, reason), (Action::Redirect, Reason::Forwarded));
        assert_eq!(out, one_hop_further(&frame, mac(SECOND_LINK), host.ns.mac("eth1").unwrap()));
    }
}

#[test]
fn no_route_is_counted() {
    let host = Host::new();
    let b = host.balancer(&config());
    b.service(&service_text("tcp", false, "80"), DsrService::ipip(), &["203.0.113.5".parse().unwrap()]);
    host.ns.sysctl("net.ipv4.conf.eth0.forwarding", "0").unwrap();
    let frame = arriving(&host, segment(false, 0, 1)).build();
    let (action, reason, _) = b.run(&frame);
    assert_eq!((action, reason), (Action::Drop, Reason::NoRoute));
    host.ns.sysctl("net.ipv4.conf.eth0.forwarding", "1").unwrap();
    // The answer was kept for one tick of the kernel's clock only.
    std::thread::sleep(std::time::Duration::from_millis(30));
    assert_eq!(b.run(&frame).1, Reason::Forwarded);
}

#[test]
fn l11_an_unknown_neighbour_is_asked_for_by_the_stack() {
    let host = Host::new();
    let b = host.balancer(&config());
    for (family6, unknown) in [(false, neighbour4(200)), (true, neighbour6(200))] {
        let tcp80 = b.service(&service_text("tcp", family6, "80"), DsrService::l2(), &[unknown]);
        let frame = arriving(&host, segment(family6, 0, 1)).build();
        let (action, reason, out) = b.run(&frame);
        assert_eq!((action, reason), (Action::Pass, Reason::Unresolved), "{unknown}");
        // Something for the neighbour itself, that it will throw away.
        match unknown {
            IpAddr::V4(ip) => {
                assert_eq!((&out[30..34], out[23], out[34]), (&ip.octets()[..], 1, 0xfd));
                assert_eq!((checksum(&out[14..34]), checksum(&out[34..42])), (0, 0));
            }
            IpAddr::V6(ip) => assert_eq!((&out[38..54], &out[18..21]), (&ip.octets()[..], &[0, 0, 59][..])),
        }
        host.ns.run(|| b.balancer.remove_service(tcp80)).unwrap();

        // In a tunnel, the stack forwards the packet itself.
        b.service(&service_text("tcp", family6, "80"), DsrService::ipip(), &[unknown]);
        let (action, reason, out) = b.run(&frame);
        assert_eq!((action, reason), (Action::Pass, Reason::Unresolved), "{unknown}");
        assert_eq!(out[..12], frame[..12]);
        assert_eq!(out[inner_at(&out)..], one_hop_further(&frame, mac(0), mac(0))[14..]);
    }
}

#[test]
fn l22_echo_requests_are_answered_forwarded_or_left_alone() {
    let host = Host::new();
    let b = host.balancer(&config());
    for family6 in [false, true] {
        b.service(&service_text("tcp", family6, "80"), DsrService::l2(), &neighbours(family6, &[11]));
        for payload in [&b""[..], b"0", b"01234567", &[0xff; 1400]] {
            let request = arriving(&host, Frame::echo(client(family6, 3), vip(family6), 77, 5).payload(payload).ttl(9));
            let frame = request.build();
            b.balancer.set_echo(Echo::Answer);
            let (action, reason, out) = b.run(&frame);
            assert_eq!((action, reason), (Action::Tx, Reason::EchoAnswered));
            let kind = if family6 { 129 } else { 0 };
            let reply = Frame::icmp(vip(family6), client(family6, 3), kind, 0, [0, 77, 0, 5]).payload(payload);
            assert_eq!(out, reply.macs(host.mac, mac(GATEWAY)).build());

            b.balancer.set_echo(Echo::Backend);
            let (action, reason, out) = b.run(&frame);
            assert_eq!((action, reason), (Action::Tx, Reason::Forwarded));
            assert_eq!(out, one_hop_further(&frame, mac(11), host.mac));

            b.balancer.set_echo(Echo::Pass);
            assert_eq!(b.run(&frame), (Action::Pass, Reason::NoService, frame));
        }
        b.balancer.set_echo(Echo::Answer);
        let other = arriving(&host, Frame::echo(client(family6, 3), client(family6, 9), 77, 5)).build();
        assert_eq!(b.run(&other), (Action::Pass, Reason::NotForVip, other), "only virtual addresses answer");
    }
}

#[test]
fn l11_the_stack_is_given_no_packet_from_its_own_address() {
    // Without a prefix for outer sources they are the host's own, which its stack would not forward.
    let host = Host::new();
    let b = host.balancer(&DsrConfig::default().services(8).table_size(4099));
    for (backend, action, source) in
        [(neighbour4(200), Action::Pass, [192, 0, 0, 8]), (neighbour4(11), Action::Tx, [192, 168, 178, 10])]
    {
        let service = b.service(&service_text("tcp", true, "80"), DsrService::ipip(), &[backend]);
        let (went, _, out) = b.run(&arriving(&host, segment(true, 0, 1)).build());
        assert_eq!((went, &out[26..30]), (action, &source[..]), "{backend}");
        host.ns.run(|| b.balancer.remove_service(service)).unwrap();
    }
}

/// Which neighbour a frame goes to.
fn taken_by(b: &Balancer<'_>, frame: Frame) -> (Reason, u8) {
    let frame = arriving(b.host, frame).build();
    let (action, reason, out) = b.run(&frame);
    if action != Action::Tx {
        return (reason, 0);
    }
    assert_eq!(out, one_hop_further(&frame, [&out[..6]].concat().try_into().unwrap(), b.host.mac));
    (reason, out[5])
}

#[test]
fn l4_icmp_errors_go_to_the_backend_of_the_flow_that_they_quote() {
    let host = Host::new();
    let b = host.balancer(&config());
    for family6 in [false, true] {
        let backends = neighbours(family6, &[11, 12, 13, 14]);
        b.service(&service_text("tcp", family6, "80"), DsrService::l2(), &backends);
        b.service(&service_text("udp", family6, "*"), DsrService::l2(), &backends);
        let router: IpAddr = if family6 { "2001:db8:ee::1" } else { "10.99.0.1" }.parse().unwrap();
        let errors: &[(u8, u8)] =
            if family6 { &[(1, 4), (2, 0), (3, 0), (4, 1)] } else { &[(3, 4), (3, 1), (11, 0), (12, 0)] };
        let mut met = std::collections::HashSet::new();
        for number in 0..40 {
            let (_, backend) = taken_by(&b, segment(family6, number, 5000));
            met.insert(backend);
            let to = SocketAddr::new(client(family6, number), 5000);
            for (kind, code) in errors {
                // As the backend's answer looked: the other way round. Eight bytes of TCP are enough.
                let answer = Frame::tcp(SocketAddr::new(vip(family6), 80), to).payload(&[1; 600]).packet();
                let header = if family6 { 40 } else { 20 };
                for length in [header + 8, header + 20, 500] {
                    let error =
                        Frame::icmp(router, vip(family6), *kind, *code, [0, 0, 5, 0x78]).payload(&answer[..length]);
                    assert_eq!(taken_by(&b, error), (Reason::ErrorForwarded, backend), "{kind} {code} {length}");
                }
            }
            let (_, backend) = {
                let query = Frame::udp(to, SocketAddr::new(vip(family6), 53));
                taken_by(&b, query)
            };
            let answer = Frame::udp(SocketAddr::new(vip(family6), 53), to).packet();
            let error = Frame::icmp(router, vip(family6), errors[0].0, errors[0].1, [0; 4]).payload(&answer);
            assert_eq!(taken_by(&b, error), (Reason::ErrorForwarded, backend));
        }
        assert_eq!(met.len(), 4);
        // Errors about nothing of ours go on.
        let to = SocketAddr::new(client(family6, 1), 5000);
        let own = SocketAddr::new(vip(family6), 80);
        for (what, quoted) in [
            ("the request", Frame::tcp(to, own)),
            ("another port", Frame::tcp(SocketAddr::new(vip(family6), 22), to)),
            ("a later fragment", Frame::tcp(own, to).fragment(800, false).payload(&[0; 80])),
            ("another protocol", Frame::ip(vip(family6), to.ip(), 47).payload(&[0; 40])),
        ] {
            let error = Frame::icmp(router, vip(family6), errors[0].0, errors[0].1, [0; 4]).payload(&quoted.packet());
            assert_eq!(taken_by(&b, error), (Reason::ErrorUnknown, 0), "{what}");
        }
        let cut = Frame::icmp(router, vip(family6), errors[0].0, errors[0].1, [0; 4]).payload(&[0x45; 10]);
        assert_eq!(taken_by(&b, cut), (Reason::ErrorUnknown, 0));
        let nested = Frame::tcp(own, to).extension(extension::DESTINATION, &[]).packet();
        let error = Frame::icmp(router, vip(family6), errors[0].0, errors[0].1, [0; 4]).payload(&nested);
        assert_eq!(taken_by(&b, error), (Reason::ErrorForwarded, taken_by(&b, segment(family6, 1, 5000)).1));
    }
}

#[test]
fn l21_fragments_follow_the_first_one() {
    let host = Host::new();
    let b = host.balancer(&config());
    for family6 in [false, true] {
        b.service(&service_text("udp", family6, "53"), DsrService::l2(), &neighbours(family6, &[11, 12, 13, 14]));
        let mut met = std::collections::HashSet::new();
        for number in 0..40 {
            let from = SocketAddr::new(client(family6, number), 6000);
            let datagram =
                Frame::udp(from, SocketAddr::new(vip(family6), 53)).payload(&[9; 3000]).identification(number + 1);
            let whole = Frame::udp(from, SocketAddr::new(vip(family6), 53)).payload(&[9; 30]);
            let (_, backend) = taken_by(&b, whole);
            met.insert(backend);
            let parts = arriving(&host, datagram).fragments(1000);
            let go = |part: &Vec<u8>| {
                let (_, reason, out) = b.run(part);
                (reason, if reason == Reason::Forwarded { out[5] } else { 0 })
            };
            assert_eq!(go(&parts[1]), (Reason::FragmentUnknown, 0), "before the first one");
            for part in [&parts[0], &parts[2], &parts[1], &parts[3]] {
                assert_eq!(go(part), (Reason::Forwarded, backend));
            }
            let other = Frame::udp(from, SocketAddr::new(vip(family6), 53)).payload(&[9; 3000]).identification(99_999);
            assert_eq!(go(&arriving(&host, other).fragments(1000)[1]), (Reason::FragmentUnknown, 0));
        }
        assert_eq!(met.len(), 4);
    }
}

#[test]
fn l6_what_does_not_fit_the_tunnel_is_answered_with_the_size_that_does() {
    let host = Host::new();
    let b = host.balancer(&config().answers_per_tick(1000));
    for (family6, backend, overhead) in [
        (false, neighbour4(11), 20),
        (false, neighbour6(11), 40),
        (true, neighbour4(11), 20),
        (true, neighbour6(11), 40),
    ] {
        let service = b.service(&service_text("tcp", family6, "80"), DsrService::ipip(), &[backend]);
        let headers = if family6 { 60 } else { 40 };
        let of = |length: usize| {
            let payload: Vec<u8> = (0..length - headers).map(|n| n as u8).collect();
            segment(family6, 7, 7000).payload(&payload).dont_fragment()
        };
        for tags in 0..=2 {
            let tagged = |mut frame: Frame| {
                for tag in 0..tags {
                    frame = frame.vlan(5 + tag);
                }
                arriving(&host, frame)
            };
            let fits = tagged(of(1500 - overhead)).build();
            let (action, reason, out) = b.run(&fits);
            assert_eq!((action, reason, out.len()), (Action::Tx, Reason::Forwarded, fits.len() + overhead));

            for length in [1501 - overhead, 1500] {
                let frame = tagged(of(length)).build();
                let (action, reason, out) = b.run(&frame);
                assert_eq!((action, reason), (Action::Tx, Reason::TooBigAnswered), "{length}");
                let at = network_at(&frame);
                let mtu = (1500 - overhead as u16).to_be_bytes();
                let (quote, answer) = match family6 {
                    false => {
                        (504, Frame::icmp(vip(false), client(false, 7), 3, 4, [0, 0, mtu[0], mtu[1]]).dont_fragment())
                    }
                    true => (1184, Frame::icmp(vip(true), client(true, 7), 2, 0, [0, 0, mtu[0], mtu[1]])),
                };
                let wanted = tagged(answer.payload(&frame[at..at + quote])).macs(host.mac, mac(GATEWAY)).build();
                assert_eq!(out, wanted, "{length}, {tags} tags");
            }
        }
        if !family6 {
            let frame = arriving(&host, segment(false, 7, 7000).payload(&[0; 1460])).build();
            let (action, reason, _) = b.run(&frame);
            assert_eq!((action, reason), (Action::Drop, Reason::TooBig), "it may be fragmented: counted");
        }
        let stats = b.balancer.service(service).unwrap().stats;
        assert_eq!(stats.too_big, 6);
        host.ns.run(|| b.balancer.remove_service(service)).unwrap();
    }
}

#[test]
fn l6_answers_are_rationed() {
    let host = Host::new();
    let b = host.balancer(&config().answers_per_tick(1));
    b.service(&service_text("tcp", false, "80"), DsrService::ipip(), &[neighbour4(11)]);
    let frame = arriving(&host, segment(false, 7, 7000).payload(&[0; 1460]).dont_fragment()).build();
    let start = std::time::Instant::now();
    let frames = vec![frame; 2000];
    let answered = b.run_all(&frames).iter().filter(|(action, _)| *action == Action::Tx).count();
    // One a tick and CPU; ticks are 1 to 10 ms.
    let most = (start.elapsed().as_millis() as usize + 2) * xdpkit_lab_cpus();
    assert!(answered >= 1 && answered <= most && answered < 2000, "{answered} of 2000 in {:?}", start.elapsed());
}

fn xdpkit_lab_cpus() -> usize {
    std::thread::available_parallelism().unwrap().get()
}

#[test]
fn l16_l24_names_of_states_and_backends_are_kept() {
    let host = Host::new();
    let b = host.balancer(&config());
    let service = b.service(&service_text("tcp", false, "80"), DsrService::l2(), &[neighbour4(11), neighbour4(12)]);
    let list = || {
        let list = b.balancer.backends(service).unwrap();
        list.iter().map(|entry| (entry.address, entry.state, entry.identity)).collect::<Vec<_>>()
    };
    let first = list();
    assert_eq!(first.iter().map(|entry| entry.1).collect::<Vec<_>>(), [BackendState::Active; 2]);
    b.balancer.drain(service, neighbour4(11)).unwrap();
    assert_eq!(list()[0], (neighbour4(11), BackendState::Draining, first[0].2));
    host.ns.run(|| b.balancer.set_backend(service, neighbour4(11), 1)).unwrap();
    assert_eq!(list(), first, "drained and back is the same backend");
    b.balancer.remove_backend(service, neighbour4(11)).unwrap();
    assert_eq!(list()[0].1, BackendState::Leaving);
    let error = b.balancer.drain(service, neighbour4(11)).unwrap_err();
    assert!(matches!(error, Error::UnknownBackend { .. }), "{error}");
    host.ns.run(|| b.balancer.set_backend(service, neighbour4(11), 1)).unwrap();
    let now = list();
    assert!(now.iter().any(|entry| *entry == (neighbour4(11), BackendState::Killed, first[0].2)), "{now:?}");
    assert!(
        now.iter().any(|entry| entry.0 == neighbour4(11) && entry.1 == BackendState::Active && entry.2 > first[1].2)
    );
    let error = b.balancer.insert_service_again(service).unwrap_err();
    assert!(matches!(error, Error::ServiceExists { .. }), "{error}");
}

trait Again {
    fn insert_service_again(&self, service: ServiceAddr) -> xdpkit::Result<()>;
}

impl Again for xdpkit::DsrBalancer {
    fn insert_service_again(&self, service: ServiceAddr) -> xdpkit::Result<()> {
        self.insert_service(service, DsrService::l2(), [])
    }
}

#[test]
fn an_ipv4_checksum_of_any_value_is_right_after_a_hop() {
    let host = Host::new();
    let b = host.balancer(&config());
    b.service(&service_text("tcp", false, "80"), DsrService::l2(), &[neighbour4(11)]);
    // Every value of the identification gives another sum, the edges of one's complement among them.
    let frames: Vec<_> = (0..=u16::MAX)
        .step_by(if common::is_emulated() { 997 } else { 7 })
        .map(|id| arriving(&host, segment(false, 1, 1).identification(id.into())).build())
        .collect();
    for (frame, (_, out)) in frames.iter().zip(b.run_all(&frames)) {
        let mut right = out.clone();
        fix_ipv4(&mut right, 14);
        assert_eq!(out, right, "{frame:02x?}");
    }
}
