//! The NAT balancer on the wire, packet by packet: what comes in, what has to go out. Traps: L1 to L3, L6, L11, L12, L19 to L23.

mod changes;
mod churn;
#[path = "../common/mod.rs"]
mod common;
mod flood;
mod flows;
mod handshakes;
mod icmp;
mod services;
mod silence;
mod sources;
mod states;
mod traffic;

use std::net::SocketAddr;

use common::{
    nat::{BACKEND_MAC, Bench, Outcome, Side, VIP4, VIP6, at, ip, service},
    nat_talk::{TCP4, conversations, open, segment, tcp4},
};
use xdpkit::{Action, Echo, Interface, NatConfig, NatMode, NatService, Reason, ServiceProtocol, preflight};
use xdpkit_lab::{
    frame::{
        Frame,
        extension::{DESTINATION, HOP_BY_HOP},
        tcp,
    },
    veth,
};

#[test]
fn packets_are_translated_both_ways_with_every_checksum_right() {
    for mode in [NatMode::Full, NatMode::Destination] {
        let bench = Bench::with_services(&NatConfig::default(), mode);
        for (service, client, vip, backend) in conversations() {
            let there = segment(&service, client, vip);
            let went = bench.client_sends(&there);
            let connection = bench.balancer.find(client, &service).unwrap().expect("there is a connection");
            match mode {
                NatMode::Full => assert_eq!(connection.source.ip(), vip.ip()),
                _ => assert_eq!(connection.source, client),
            }
            assert_eq!((connection.client, connection.backend), (client, backend));
            let wanted = segment(&service, connection.source, backend).ttl(63);
            assert_eq!(went, bench.to_backend(&wanted), "{mode:?} {service}");

            let back = segment(&service, backend, connection.source);
            let back = if service.protocol == ServiceProtocol::Tcp { back.flags(tcp::SYN | tcp::ACK) } else { back };
            let came = bench.backend_sends(&back);
            let wanted = segment(&service, vip, client).ttl(63);
            let wanted =
                if service.protocol == ServiceProtocol::Tcp { wanted.flags(tcp::SYN | tcp::ACK) } else { wanted };
            assert_eq!(came, bench.to_client(&wanted), "{mode:?} {service}");
        }
    }
}

#[test]
fn l1_udp_without_a_checksum_stays_without_and_a_computed_zero_is_sent_as_ones() {
    let bench = Bench::with_services(&NatConfig::default(), NatMode::Full);
    let (client, vip) = (at("10.0.0.20:4000"), at("10.0.0.100:53"));
    let checksum = |frame: &[u8]| u16::from_be_bytes([frame[40], frame[41]]);
    let went = bench.client_sends(&Frame::udp(client, vip).payload(b"no checksum").checksum(0));
    assert_eq!((went.reason, checksum(&went.frame)), (Reason::Forwarded, 0));
    // Among all values of two bytes of payload there is one whose checksum comes out as zero.
    let source = bench.balancer.find(client, &service("udp/10.0.0.100:53")).unwrap().unwrap().source;
    let zero = (0..=u16::MAX).find(|value| {
        let wanted = Frame::udp(source, at("192.168.178.11:5353")).payload(&value.to_be_bytes()).build();
        checksum(&wanted) == 0xffff
    });
    let went = bench.client_sends(&Frame::udp(client, vip).payload(&zero.unwrap().to_be_bytes()));
    assert_eq!(checksum(&went.frame), 0xffff);
    // Over IPv6 none is a mistake, which stays for the backend to see.
    let (client, vip) = (at("[2001:db8:a::20]:4000"), at("[2001:db8:a::100]:53"));
    let went = bench.client_sends(&Frame::udp(client, vip).payload(b"no checksum").checksum(0));
    assert_eq!((went.reason, &went.frame[60..62]), (Reason::Forwarded, &[0, 0][..]));
}

#[test]
fn l2_checksums_have_their_end_around_carry_whatever_the_payload() {
    let bench = Bench::with_services(&NatConfig::default(), NatMode::Full);
    for (service, client, vip, backend) in conversations() {
        let connection = open(&bench, &service, client);
        for value in (0..common::times(300, 65_536, 50) as u64).map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15)) {
            let payload = value.to_be_bytes();
            let with = |from, to| {
                let frame = segment(&service, from, to).payload(&payload);
                if service.protocol == ServiceProtocol::Tcp { frame.flags(tcp::ACK).sequence(2, 1001) } else { frame }
            };
            let wanted = bench.to_backend(&with(connection.source, backend).ttl(63));
            assert_eq!(bench.client_sends(&with(client, vip)), wanted);
        }
    }
}

/// A sender that leaves the sum to its device hands over one that covers the addresses alone. It stays as wrong as it was,
/// never right by chance and never silently mended: the check of the host says what to turn off.
#[test]
fn l3_an_unfinished_checksum_stays_as_wrong_as_it_was_and_the_check_of_its_sender_tells() {
    let bench = Bench::with_services(&NatConfig::default(), NatMode::Full);
    for (service, client, vip, backend) in conversations() {
        let source = open(&bench, &service, client).source;
        let is_tcp = service.protocol == ServiceProtocol::Tcp;
        let at = if client.is_ipv4() { 34 } else { 54 } + if is_tcp { 16 } else { 6 };
        let field = |frame: &[u8]| u16::from_be_bytes([frame[at], frame[at + 1]]);
        let with = |from, to| {
            let frame = segment(&service, from, to);
            if is_tcp { frame.flags(tcp::ACK).sequence(2, 1001) } else { frame }
        };
        for wrong in [1, 0x1234, 0x7fff, 0xfffe] {
            let right = field(&with(client, vip).build());
            let went = bench.client_sends(&with(client, vip).checksum(wrong));
            assert_eq!(went.reason, Reason::Forwarded);
            // One's-complement differences: 0 and 0xffff are the same number.
            let error = |is: u16, should: u16| (u32::from(is) + 0xffff - u32::from(should)) % 0xffff;
            let wanted = field(&with(source, backend).build());
            assert_eq!(error(field(&went.frame), wanted), error(wrong, right), "{service} {wrong:#x}");
        }
    }
    let sender = &bench.lab.clients[0];
    veth((sender, "eth1"), (&bench.lab.switch, "beside")).unwrap();
    let advice = || {
        let findings = sender.run(|| preflight::interface(&Interface::by_name("eth1").unwrap())).unwrap();
        findings.into_iter().filter(|finding| finding.remedy.as_deref() == Some("ethtool -K eth1 tx off")).count()
    };
    assert_eq!(advice(), 0);
    sender.set_offload("eth1", true).unwrap();
    assert_eq!(advice(), 1);
}

#[test]
fn tags_options_and_padding_stay() {
    let bench = Bench::with_services(&NatConfig::default(), NatMode::Full);
    for (service, client, vip, backend) in conversations() {
        let source = open(&bench, &service, client).source;
        let with = |from, to| {
            let frame = segment(&service, from, to).tag(0x88a8, 5).vlan(7).options(&[1, 1, 1]).trailer(&[9; 6]);
            let frame = frame.extension(HOP_BY_HOP, &[1; 6]).extension(DESTINATION, &[1; 14]);
            if service.protocol == ServiceProtocol::Tcp { frame.flags(tcp::ACK).sequence(2, 1001) } else { frame }
        };
        assert_eq!(bench.client_sends(&with(client, vip)), bench.to_backend(&with(source, backend).ttl(63)));
        assert_eq!(bench.backend_sends(&with(backend, source)), bench.to_client(&with(vip, client).ttl(63)));
    }
}

#[test]
fn l19_what_may_not_be_forwarded_goes_to_the_stack_untouched() {
    let bench = Bench::with_services(&NatConfig::default(), NatMode::Full);
    for (service, client, vip, _) in conversations() {
        for ttl in [0, 1] {
            let outcome = bench.client_sends(&segment(&service, client, vip).ttl(ttl));
            assert_eq!((outcome.action, outcome.reason), (Action::Pass, Reason::HopLimit));
        }
        assert!(bench.balancer.find(client, &service).unwrap().is_none(), "and opens nothing");
    }
    // An address of the host's own: its stack would answer with RST.
    for (own, backend) in [("10.0.0.10:80", "192.168.178.11:8080"), ("[2001:db8:a::10]:80", "[2001:db8:b::11]:8080")] {
        bench.balancer.insert(service(&format!("tcp/{own}")), &NatService::new([at(backend)])).unwrap();
        let client = at(if at(own).is_ipv4() { "10.0.0.20:4000" } else { "[2001:db8:a::20]:4000" });
        let outcome = bench.client_sends(&Frame::tcp(client, at(own)).ttl(1));
        assert_eq!((outcome.action, outcome.reason), (Action::Drop, Reason::HopLimit), "{own}");
    }
}

#[test]
fn l11_the_stack_is_given_no_packet_that_it_takes_for_forged() {
    let bench = Bench::new(&NatConfig::default());
    for (vip, own) in [("10.0.0.100:80", false), ("10.0.0.10:80", true)] {
        // One after the other, so that each is the first that is not known.
        for backend in ["192.168.178.98:8080", "192.168.178.99:8080"] {
            let name = service(&format!("tcp/{vip}"));
            bench.balancer.insert(name, &NatService::new([at(backend)])).unwrap();
            let outcome = bench.client_sends(&Frame::tcp(at("10.0.0.20:4000"), at(vip)));
            assert_eq!((outcome.action, outcome.reason), (Action::Pass, Reason::Unresolved));
            let source = if own { ip("10.0.0.20") } else { ip("10.0.0.100") };
            let (from, to) = (&outcome.frame[26..30], &outcome.frame[30..34]);
            assert_eq!(std::net::IpAddr::from([from[0], from[1], from[2], from[3]]), source, "{vip}");
            assert_eq!(std::net::IpAddr::from([to[0], to[1], to[2], to[3]]), at(backend).ip(), "{vip}");
            bench.balancer.remove(&name).unwrap();
        }
    }
}

#[test]
fn l21_fragments_follow_their_first_one_in_both_directions() {
    for mode in [NatMode::Full, NatMode::Destination] {
        let bench = Bench::with_services(&NatConfig::default(), mode);
        for (service, client, vip, backend) in conversations().filter(|row| row.0.protocol == ServiceProtocol::Udp) {
            let source = open(&bench, &service, client).source;
            let cut = |from, to, ttl, id| Frame::udp(from, to).payload(&[3; 100]).identification(id).ttl(ttl);
            let directions: [(Side, _, _); 2] =
                [(Side::Clients, (client, vip), (source, backend)), (Side::Backends, (backend, source), (vip, client))];
            for (side, (from, to), (new_from, new_to)) in directions {
                let (mac_in, mac_out) = match side {
                    Side::Clients => (bench.macs_of_clients(), bench.macs_to_backends()),
                    Side::Backends => (bench.macs_of_backends(), bench.macs_to_clients()),
                };
                let sent = cut(from, to, 64, 77).macs(mac_in.0, mac_in.1).fragments(48);
                let wanted = cut(new_from, new_to, 63, 77).macs(mac_out.0, mac_out.1).fragments(48);
                // What goes to a client by its own address may be anybody's.
                let unknown = if side == Side::Backends && mode == NatMode::Destination {
                    (Action::Pass, Reason::NotForVip)
                } else {
                    (Action::Drop, Reason::FragmentUnknown)
                };
                // Before its first one, a fragment is nobody's.
                let early = bench.run(side, &sent[1]);
                assert_eq!((early.action, early.reason), unknown, "{mode:?} {service}");
                for (sent, wanted) in sent.iter().zip(&wanted) {
                    let outcome = bench.run(side, sent);
                    assert_eq!(
                        (outcome.action, &outcome.frame),
                        (Action::Redirect, wanted),
                        "{mode:?} {service} {side:?}"
                    );
                }
                let other = cut(from, to, 64, 78).macs(mac_in.0, mac_in.1).fragments(48);
                assert_eq!(bench.run(side, &other[1]).reason, unknown.1, "another datagram's");
            }
        }
    }
}

/// What comes to a virtual address but not to a service is the host's, whether it comes in pieces or not.
#[test]
fn l21_and_l23_fragments_of_no_service_go_on_together() {
    for mode in [NatMode::Full, NatMode::Destination] {
        let bench = Bench::with_services(&NatConfig::default(), mode);
        for (client, vip) in [("10.0.0.20", VIP4), ("2001:db8:a::20", VIP6)].map(|(client, vip)| (ip(client), ip(vip)))
        {
            let (from, to) = bench.macs_of_clients();
            let datagram = Frame::udp(SocketAddr::new(client, 4500), SocketAddr::new(vip, 4500));
            let echo = Frame::echo(client, vip, 1, 1);
            for (id, whole) in [datagram, echo].into_iter().enumerate() {
                for piece in whole.payload(&[3; 100]).identification(90 + id as u32).macs(from, to).fragments(48) {
                    let outcome = bench.run(Side::Clients, &piece);
                    let wanted = Outcome { action: Action::Pass, reason: Reason::NoService, frame: piece };
                    assert_eq!(outcome, wanted, "{mode:?} {vip} {id}");
                }
            }
        }
    }
}

#[test]
fn l22_echo_requests_are_answered_for_virtual_addresses_only() {
    let bench = Bench::with_services(&NatConfig::default(), NatMode::Full);
    for (client, vip, other) in [("10.0.0.20", VIP4, "10.0.0.10"), ("2001:db8:a::20", VIP6, "2001:db8:a::10")]
        .map(|row| (ip(row.0), ip(row.1), ip(row.2)))
    {
        let (request, reply) = if client.is_ipv4() { (8, 0) } else { (128, 129) };
        for rest in [[0; 4], [0xff; 4], [0, 0, 0xff, 0xf7]] {
            let asked = Frame::icmp(client, vip, request, 0, rest).ttl(3).payload(&[0xff; 57]);
            let wanted = Frame::icmp(vip, client, reply, 0, rest).ttl(64).payload(&[0xff; 57]);
            let (from, to) = bench.macs_of_clients();
            let frame = wanted.macs(to, from).build();
            let wanted = Outcome { action: Action::Tx, reason: Reason::EchoAnswered, frame };
            assert_eq!(bench.client_sends(&asked), wanted);
        }
        let outcome = bench.client_sends(&Frame::echo(client, other, 1, 1));
        assert_eq!((outcome.action, outcome.reason), (Action::Pass, Reason::NotForVip));
    }
    let silent = Bench::with_services(&NatConfig::default().echo(Echo::Pass), NatMode::Full);
    assert_eq!(silent.client_sends(&Frame::echo(ip("10.0.0.20"), ip(VIP4), 1, 1)).reason, Reason::NoService);
}

#[test]
fn l23_everything_else_is_untouched() {
    for mode in [NatMode::Full, NatMode::Destination] {
        let bench = Bench::with_services(&NatConfig::default(), mode);
        let (client, backend) = (at("10.0.0.20:4000"), at("192.168.178.11:8080"));
        for (what, side, frame, reason) in [
            (
                "ARP",
                Side::Clients,
                Frame::arp_request([2; 6], "10.0.0.20".parse().unwrap(), VIP4.parse().unwrap()),
                Reason::NotForVip,
            ),
            ("LLDP", Side::Clients, Frame::ethernet(0x88cc).payload(&[0; 46]), Reason::NotForVip),
            ("SSH to the host", Side::Clients, Frame::tcp(client, at("10.0.0.10:22")), Reason::NotForVip),
            ("routed through", Side::Clients, Frame::tcp(client, backend), Reason::NotForVip),
            ("and back", Side::Backends, Frame::tcp(backend, client).flags(tcp::ACK), Reason::NotForVip),
            ("a port without service", Side::Clients, Frame::tcp(client, at("10.0.0.100:22")), Reason::NoService),
            ("the other protocol", Side::Clients, Frame::udp(client, at("10.0.0.100:80")), Reason::NoService),
            ("GRE", Side::Clients, Frame::ip(client.ip(), ip(VIP4), 47).payload(&[0; 20]), Reason::NoService),
            ("malformed", Side::Clients, Frame::tcp(client, backend).data_offset(4), Reason::TcpDataOffset),
        ] {
            let own = if side == Side::Clients { bench.macs_of_clients().1 } else { bench.macs_of_backends().1 };
            let sent = frame.macs([2, 0, 0, 0, 0, 7], own).build();
            let wanted = Outcome { action: Action::Pass, reason, frame: sent.clone() };
            assert_eq!(bench.run(side, &sent), wanted, "{what}");
        }
    }
}

#[test]
fn l20_a_backend_may_be_a_client_of_its_own_service() {
    let bench = Bench::with_services(&NatConfig::default(), NatMode::Full);
    // It comes in by the interface that it goes out by, and is sent back there.
    let (client, backend) = (at("192.168.178.11:4000"), at("192.168.178.11:8080"));
    let there = bench.backend_sends(&Frame::tcp(client, at("10.0.0.100:80")));
    let source = bench.balancer.find(client, &service(TCP4)).unwrap().unwrap().source;
    let wanted = Outcome { action: Action::Tx, ..bench.to_backend(&Frame::tcp(source, backend).ttl(63)) };
    assert_eq!(there, wanted);
    let back = bench.backend_sends(&Frame::tcp(backend, source).flags(tcp::SYN | tcp::ACK));
    let wanted = Frame::tcp(at("10.0.0.100:80"), client).flags(tcp::SYN | tcp::ACK).ttl(63);
    assert_eq!(back, Outcome { reason: Reason::Answered, action: Action::Tx, ..bench.to_backend(&wanted) });

    // Where it would see itself, it is refused.
    let bench = Bench::with_services(&NatConfig::default(), NatMode::Destination);
    let outcome = bench.backend_sends(&Frame::tcp(client, at("10.0.0.100:80")));
    assert_eq!((outcome.action, outcome.reason), (Action::Drop, Reason::BackendIsClient));
}

#[test]
fn l11_an_unknown_neighbour_is_left_to_the_stack_to_find() {
    let bench = Bench::new(&NatConfig::default());
    bench.balancer.insert(service(TCP4), &NatService::new([at("192.168.178.99:8080")])).unwrap();
    let outcome = bench.client_sends(&tcp4(tcp::SYN));
    assert_eq!((outcome.action, outcome.reason), (Action::Pass, Reason::Unresolved));
    // It is known a moment later: within the next tick.
    bench.lab.balancer.add_neighbour("eth1", ip("192.168.178.99"), BACKEND_MAC).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(30));
    assert_eq!(bench.client_sends(&tcp4(tcp::SYN)).reason, Reason::Forwarded);
    // Where there is no way at all, the host cannot help.
    bench.balancer.insert(service("udp/10.0.0.100:53"), &NatService::new([at("203.0.113.1:53")])).unwrap();
    let outcome = bench.client_sends(&Frame::udp(at("10.0.0.20:4000"), at("10.0.0.100:53")));
    assert_eq!((outcome.action, outcome.reason), (Action::Drop, Reason::NoRoute));
}

#[test]
fn l6_what_does_not_fit_the_way_on_is_answered() {
    let bench = Bench::with_services(&NatConfig::default(), NatMode::Full);
    bench.lab.balancer.set_mtu("eth1", 1400).unwrap();
    for (name, client, vip, _) in conversations() {
        open(&bench, &name, client);
        let long = segment(&name, client, vip).payload(&[1; 1420]).dont_fragment();
        let long = if name.protocol == ServiceProtocol::Tcp { long.flags(tcp::ACK).sequence(2, 1001) } else { long };
        // What is known of the way is asked for again in time.
        std::thread::sleep(std::time::Duration::from_millis(if client.is_ipv4() { 1100 } else { 0 }));
        let outcome = bench.client_sends(&long);
        assert_eq!((outcome.action, outcome.reason), (Action::Tx, Reason::TooBigAnswered), "{name}");
        let (from, to) = bench.macs_of_clients();
        let cut = if client.is_ipv4() { 504 } else { 1184 };
        let wanted = match client {
            SocketAddr::V4(_) => Frame::icmp(vip.ip(), client.ip(), 3, 4, [0, 0, 5, 120]).dont_fragment(),
            SocketAddr::V6(_) => Frame::icmp(vip.ip(), client.ip(), 2, 0, [0, 0, 5, 120]),
        };
        assert_eq!(outcome.frame, wanted.payload(&long.packet()[..cut]).macs(to, from).build(), "{name}");
        assert!(bench.balancer.service_stats(&name).unwrap().too_big > 0);
    }
    // May it be fragmented, the stack does so.
    let (client, vip) = (at("10.0.0.20:4000"), at("10.0.0.100:53"));
    let outcome = bench.client_sends(&Frame::udp(client, vip).payload(&[1; 1420]));
    assert_eq!((outcome.action, outcome.reason), (Action::Pass, Reason::TooBig));
}
