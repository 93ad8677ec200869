//! The DSR balancer, packet by packet: what comes in, what must come out, and why. Traps L1, L3, L7 to L9, L16, L18 to L20,
//! L23; what does not fit and ICMP are in `icmp.rs`, ways to backends in `next_hop.rs`.

mod adopt;
mod changes;
#[path = "../common/mod.rs"]
mod common;
mod events;
mod health;
mod icmp;
mod links;
mod next_hop;
mod probe;
mod traffic;
mod transition;

use std::net::{IpAddr, SocketAddr};

use common::dsr::{
    GATEWAY, Host, VIP4, VIP6, arriving, client, config, fix_ipv4, inner_at, mac, neighbour4, neighbour6, neighbours,
    network_at, one_hop_further, segment, service_text, vip,
};
use xdpkit::{Action, BackendState, DsrService, Error, Reason, ServiceAddr};
use xdpkit_lab::frame::{Frame, checksum, extension, tcp};

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
                        // Whatever stands inside: the far end cannot put fragments together.
                        wanted.extend([0x40, 0]);
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
        // An address of the host's own: its stack would answer with RST.
        let own = if family6 { "2001:db8:b::10" } else { "192.168.178.10" };
        let at: SocketAddr = if family6 { format!("[{own}]:80") } else { format!("{own}:80") }.parse().unwrap();
        b.service(&format!("tcp/{at}"), DsrService::l2(), &neighbours(family6, &[11]));
        let frame = Frame::tcp(SocketAddr::new(client(family6, 0), 1), at);
        let (action, reason, _) = b.run(&arriving(&host, frame.ttl(1)).build());
        assert_eq!((action, reason), (Action::Drop, Reason::HopLimit), "{own}");
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
fn l16_names_of_states_and_backends_are_kept() {
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
    let error = b.balancer.insert_service(service, DsrService::l2(), []).unwrap_err();
    assert!(matches!(error, Error::ServiceExists { .. }), "{error}");
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
