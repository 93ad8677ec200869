//! The NAT balancer, packet by packet: what comes in, what has to go out. Traps: L1 to L6, L10 to L16, L18 to L23, H3.

mod common;

use std::net::{IpAddr, SocketAddr};

use common::nat::{BACKEND_MAC, Bench, Outcome, SERVICES, Side, VIP4, VIP6, at, ip, service};
use xdpkit::{
    Action, AttachOptions, BackendState, ConnectionState, Echo, Error, NatBalancer, NatConfig, NatEventKind, NatMode,
    NatService, NatTimeouts, Reason, Scheduler, ServiceAddr, ServiceProtocol, Stage as _, XdpMode,
};
use xdpkit_lab::{
    bpffs::BpfFs,
    frame::{Frame, tcp},
};

/// A client's and a service's ends of each protocol and family, with a client of the same family.
fn conversations() -> impl Iterator<Item = (ServiceAddr, SocketAddr, SocketAddr, SocketAddr)> {
    SERVICES.into_iter().map(|(name, backend)| {
        let name = service(name);
        let client = if name.address.is_ipv4() { "10.0.0.20:4000" } else { "[2001:db8:a::20]:4000" };
        (name, at(client), (name.address, name.port.unwrap()).into(), at(backend))
    })
}

fn segment(service: &ServiceAddr, from: SocketAddr, to: SocketAddr) -> Frame {
    match service.protocol {
        ServiceProtocol::Tcp => Frame::tcp(from, to),
        _ => Frame::udp(from, to),
    }
    .payload(&[7; 33])
}

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

/// Opens a connection as a client and a backend do, and answers it. UDP: one datagram each way and one more.
fn open(bench: &Bench, service: &ServiceAddr, client: SocketAddr) -> xdpkit::Connection {
    let vip = SocketAddr::new(service.address, service.port.unwrap());
    let first = bench.client_sends(&segment(service, client, vip));
    assert_eq!(first.reason, Reason::Forwarded, "{service}");
    let found = bench.balancer.find(client, service).unwrap().unwrap();
    let answer = segment(service, found.backend, found.source);
    let confirm = segment(service, client, vip);
    if service.protocol == ServiceProtocol::Tcp {
        assert_eq!(found.state, ConnectionState::TcpSyn);
        let answer = answer.flags(tcp::SYN | tcp::ACK).sequence(1000, 2);
        assert_eq!(bench.backend_sends(&answer).reason, Reason::Answered);
        let confirm = confirm.flags(tcp::ACK).sequence(2, 1001);
        assert_eq!(bench.client_sends(&confirm).reason, Reason::Forwarded);
    } else {
        assert_eq!(found.state, ConnectionState::UdpNew);
        assert_eq!(bench.backend_sends(&answer).reason, Reason::Answered);
        assert_eq!(bench.client_sends(&confirm).reason, Reason::Forwarded);
    }
    let found = bench.balancer.find(client, service).unwrap().unwrap();
    let open = [ConnectionState::TcpEstablished, ConnectionState::UdpAnswered];
    assert!(open.contains(&found.state), "{found}");
    found
}

const TCP4: &str = "tcp/10.0.0.100:80";

fn state(bench: &Bench, client: SocketAddr) -> Option<ConnectionState> {
    bench.balancer.find(client, &service(TCP4)).unwrap().map(|found| found.state)
}

fn tcp4(flags: u8) -> Frame {
    Frame::tcp(at("10.0.0.20:4000"), at("10.0.0.100:80")).flags(flags)
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

#[test]
fn tags_options_and_padding_stay() {
    let bench = Bench::with_services(&NatConfig::default(), NatMode::Full);
    for (service, client, vip, backend) in conversations() {
        let source = open(&bench, &service, client).source;
        let with = |from, to| {
            let frame = segment(&service, from, to).tag(0x88a8, 5).vlan(7).options(&[1, 1, 1]).trailer(&[9; 6]);
            if service.protocol == ServiceProtocol::Tcp { frame.flags(tcp::ACK).sequence(2, 1001) } else { frame }
        };
        assert_eq!(bench.client_sends(&with(client, vip)), bench.to_backend(&with(source, backend).ttl(63)));
        assert_eq!(bench.backend_sends(&with(backend, source)), bench.to_client(&with(vip, client).ttl(63)));
    }
}

/// ICMP's "fragmentation needed" and "packet too big" about this packet.
fn too_big(from: IpAddr, to: IpAddr, about: &Frame, cut: usize) -> Frame {
    let mut quoted = about.packet();
    quoted.truncate(cut);
    match from {
        IpAddr::V4(_) => Frame::icmp(from, to, 3, 4, [0, 0, 5, 120]).payload(&quoted),
        IpAddr::V6(_) => Frame::icmp(from, to, 2, 0, [0, 0, 5, 120]).payload(&quoted),
    }
}

#[test]
fn l4_and_l5_icmp_errors_are_translated_outside_and_inside_in_both_directions() {
    for mode in [NatMode::Full, NatMode::Destination] {
        let bench = Bench::with_services(&NatConfig::default(), mode);
        for (service, client, vip, backend) in conversations() {
            let ipv4 = client.is_ipv4();
            let source = open(&bench, &service, client).source;
            let router = ip(if ipv4 { "10.0.0.1" } else { "2001:db8:a::1" });
            let inner_router = ip(if ipv4 { "192.168.178.1" } else { "2001:db8:b::1" });
            let full = mode == NatMode::Full;
            let header = if ipv4 { 20 } else { 40 };
            // All of the packet, TCP's checksum just there or not, and no more than the ports and what follows.
            for cut in [2000, header + 18, header + 16, header + 8] {
                // A router before the balancer, about what the backend has sent.
                let sent = segment(&service, backend, source);
                let seen = segment(&service, vip, client);
                let error = too_big(router, vip.ip(), &seen, cut);
                let wanted = too_big(if full { source.ip() } else { router }, backend.ip(), &sent, cut).ttl(63);
                let wanted = Outcome { reason: Reason::ErrorForwarded, ..bench.to_backend(&wanted) };
                assert_eq!(bench.client_sends(&error), wanted, "{mode:?} {service} {cut}");

                // One behind it, and the backend itself, about what the client has sent.
                let sent = segment(&service, client, vip);
                let seen = segment(&service, source, backend);
                for reporter in [inner_router, backend.ip()] {
                    let error = too_big(reporter, source.ip(), &seen, cut);
                    let shown = if full || reporter == backend.ip() { vip.ip() } else { reporter };
                    let wanted = too_big(shown, client.ip(), &sent, cut).ttl(63);
                    let wanted = Outcome { reason: Reason::ErrorForwarded, ..bench.to_client(&wanted) };
                    assert_eq!(bench.backend_sends(&error), wanted, "{mode:?} {service} {cut} {reporter}");
                }
            }
        }
    }
}

#[test]
fn l4_an_error_about_nothing_of_ours_goes_on_and_opens_nothing() {
    let bench = Bench::with_services(&NatConfig::default(), NatMode::Full);
    for (service, client, vip, _) in conversations() {
        let router = ip(if client.is_ipv4() { "10.0.0.1" } else { "2001:db8:a::1" });
        let error = too_big(router, vip.ip(), &segment(&service, vip, client), 2000);
        let outcome = bench.client_sends(&error);
        assert_eq!((outcome.action, outcome.reason), (Action::Pass, Reason::ErrorUnknown));
        // Less than eight bytes of the transport header say nothing.
        open(&bench, &service, client);
        let header = if client.is_ipv4() { 20 } else { 40 };
        let error = too_big(router, vip.ip(), &segment(&service, vip, client), header + 7);
        assert_eq!(bench.client_sends(&error).reason, Reason::ErrorUnknown);
    }
    assert_eq!(bench.balancer.counts().unwrap().total(), 4);
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
    let bench = Bench::with_services(&NatConfig::default(), NatMode::Full);
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
            // Before its first one, a fragment is nobody's.
            let early = bench.run(side, &sent[1]);
            assert_eq!((early.action, early.reason), (Action::Drop, Reason::FragmentUnknown), "{service}");
            for (sent, wanted) in sent.iter().zip(&wanted) {
                let outcome = bench.run(side, sent);
                assert_eq!((outcome.action, &outcome.frame), (Action::Redirect, wanted), "{service} {side:?}");
            }
            let other = cut(from, to, 64, 78).macs(mac_in.0, mac_in.1).fragments(48);
            assert_eq!(bench.run(side, &other[1]).reason, Reason::FragmentUnknown, "another datagram's");
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
            ("malformed", Side::Clients, Frame::tcp(client, at("10.0.0.100:80")).data_offset(4), Reason::TcpDataOffset),
        ] {
            let sent = frame.macs([2, 0, 0, 0, 0, 7], [2, 0, 0, 0, 0, 8]).build();
            let wanted = Outcome { action: Action::Pass, reason, frame: sent.clone() };
            assert_eq!(bench.run(side, &sent), wanted, "{what}");
        }
    }
}

#[test]
fn l15_only_a_syn_opens_a_tcp_connection() {
    let bench = Bench::with_services(&NatConfig::default(), NatMode::Full);
    for flags in [
        tcp::ACK,
        tcp::RST,
        tcp::FIN,
        tcp::FIN | tcp::ACK,
        tcp::SYN | tcp::ACK,
        tcp::RST | tcp::ACK,
        0,
        tcp::SYN | tcp::FIN,
    ] {
        let outcome = bench.client_sends(&tcp4(flags));
        assert_eq!((outcome.action, outcome.reason), (Action::Drop, Reason::NoConnection), "{flags:#x}");
    }
    assert!(bench.balancer.is_empty().unwrap());
}

#[test]
fn h3_a_blind_acknowledgement_establishes_nothing() {
    let bench = Bench::with_services(&NatConfig::default(), NatMode::Full);
    let client = at("10.0.0.20:4000");
    bench.client_sends(&tcp4(tcp::SYN));
    // Before there was an answer.
    bench.client_sends(&tcp4(tcp::ACK).sequence(2, 1));
    assert_eq!(state(&bench, client), Some(ConnectionState::TcpSyn));
    let source = bench.balancer.find(client, &service(TCP4)).unwrap().unwrap().source;
    let answer = Frame::tcp(at("192.168.178.11:8080"), source).flags(tcp::SYN | tcp::ACK).sequence(1_000_000, 2);
    assert_eq!(bench.backend_sends(&answer).reason, Reason::Answered);
    // After it, by who has not seen it.
    for guess in [0, 1, 1_000_000, 1_000_002, 1_016_000, u32::MAX] {
        bench.client_sends(&tcp4(tcp::ACK).sequence(2, guess));
        assert_eq!(state(&bench, client), Some(ConnectionState::TcpAnswered), "{guess}");
    }
    bench.client_sends(&tcp4(tcp::ACK).sequence(2, 1_000_001));
    assert_eq!(state(&bench, client), Some(ConnectionState::TcpEstablished));
}

#[test]
fn l15_a_syn_does_not_move_a_live_connection_and_a_rst_can_be_forged() {
    let bench = Bench::new(&NatConfig::default());
    let backends = [at("192.168.178.11:8080"), at("192.168.178.12:8080")];
    let with = NatService::new(backends).scheduler(Scheduler::RoundRobin);
    bench.balancer.insert(service(TCP4), &with).unwrap();
    let client = at("10.0.0.20:4000");
    let open = open(&bench, &service(TCP4), client);
    for flags in [tcp::SYN, tcp::RST, tcp::SYN] {
        bench.client_sends(&tcp4(flags));
        let now = bench.balancer.find(client, &service(TCP4)).unwrap().unwrap();
        assert_eq!((now.backend, now.source), (open.backend, open.source));
    }
    // The client goes on: the RST was not its own.
    bench.client_sends(&tcp4(tcp::RST));
    assert_eq!(state(&bench, client), Some(ConnectionState::TcpReset));
    bench.client_sends(&tcp4(tcp::ACK).sequence(2, 1001));
    assert_eq!(state(&bench, client), Some(ConnectionState::TcpEstablished));
}

#[test]
fn l15_a_blind_rst_or_fin_leaves_an_established_connection_as_it_is() {
    const AHEAD: u32 = 1 << 24;
    const BEHIND: u32 = 1 << 20;
    let client = at("10.0.0.20:4000");
    for (flags, heard, now_at) in [
        (tcp::RST, ConnectionState::TcpReset, 2_u32),
        // Also where sequence numbers begin again.
        (tcp::FIN | tcp::ACK, ConnectionState::TcpClosing, 0xffff_ff00),
    ] {
        let bench = Bench::with_services(&NatConfig::default(), NatMode::Full);
        let source = open(&bench, &service(TCP4), client).source;
        let a_sample_later = || std::thread::sleep(std::time::Duration::from_millis(300));
        a_sample_later();
        let answer = Frame::tcp(at("192.168.178.11:8080"), source).flags(tcp::ACK).sequence(1001, now_at);
        assert_eq!(bench.backend_sends(&answer).reason, Reason::Answered);
        let says = |flags, sequence: u32| {
            // The backend judges for itself.
            assert_eq!(bench.client_sends(&tcp4(flags).sequence(sequence, 1001)).reason, Reason::Forwarded);
            state(&bench, client).unwrap()
        };
        for beyond in [AHEAD, 1 << 31, (BEHIND + 1).wrapping_neg(), 1 << 28] {
            let blind = now_at.wrapping_add(beyond);
            assert_eq!(says(flags, blind), ConnectionState::TcpEstablished, "{flags:#x} {beyond:#x}");
        }
        // What else is forged does not make it believable.
        a_sample_later();
        assert_eq!(says(tcp::ACK, now_at.wrapping_add(1 << 28)), ConnectionState::TcpEstablished);
        assert_eq!(says(flags, now_at.wrapping_add(1 << 28)), ConnectionState::TcpEstablished);
        for near in [0, AHEAD - 1, BEHIND.wrapping_neg()] {
            assert_eq!(says(flags, now_at.wrapping_add(near)), heard, "{flags:#x} {near:#x}");
            let went_on = says(tcp::ACK, now_at);
            assert!(went_on == ConnectionState::TcpEstablished || flags & tcp::FIN != 0, "{went_on}");
        }
    }
}

#[test]
fn l15_a_port_used_again_after_the_close_is_a_new_connection() {
    for last in [tcp::FIN | tcp::ACK, tcp::RST | tcp::ACK] {
        let bench = Bench::new(&NatConfig::default());
        let backends = [at("192.168.178.11:8080"), at("192.168.178.12:8080")];
        let with = NatService::new(backends).scheduler(Scheduler::RoundRobin);
        bench.balancer.insert(service(TCP4), &with).unwrap();
        let client = at("10.0.0.20:4000");
        let first = open(&bench, &service(TCP4), client);
        bench.client_sends(&tcp4(tcp::FIN | tcp::ACK).sequence(2, 1001));
        assert_eq!(state(&bench, client), Some(ConnectionState::TcpClosing));
        bench.backend_sends(&Frame::tcp(first.backend, first.source).flags(last));
        let closed = if last & tcp::RST != 0 { ConnectionState::TcpReset } else { ConnectionState::TcpTimeWait };
        assert_eq!(state(&bench, client), Some(closed));
        // Its last acknowledgement still finds its way.
        assert_eq!(bench.client_sends(&tcp4(tcp::ACK).sequence(3, 1002)).reason, Reason::Forwarded);
        let active: u64 = bench.balancer.backends(&service(TCP4)).unwrap().iter().map(|b| b.stats.active).sum();
        assert_eq!(active, 0, "it is closed");
        bench.client_sends(&tcp4(tcp::SYN).sequence(90_000, 0));
        let second = bench.balancer.find(client, &service(TCP4)).unwrap().unwrap();
        assert_eq!(second.state, ConnectionState::TcpSyn);
        assert_ne!(second.backend, first.backend, "it was the other one's turn");
        assert_eq!(bench.balancer.counts().unwrap().total(), 1);
    }
}

#[test]
fn l13_clients_with_the_same_port_get_ports_of_their_own() {
    let bench = Bench::with_services(&NatConfig::default(), NatMode::Full);
    let mut sources = std::collections::BTreeSet::new();
    for last in 20..50 {
        for family in ["10.0.0.", "2001:db8:a::"] {
            for port in [4000, 4001] {
                let client: SocketAddr = (ip(&format!("{family}{last}")), port).into();
                let name = if client.is_ipv4() { TCP4 } else { "tcp/[2001:db8:a::100]:80" };
                let connection = open(&bench, &service(name), client);
                assert!(sources.insert(connection.source), "{connection} shares its port");
                let found = bench.balancer.find_by_backend(connection.backend, connection.source).unwrap();
                assert_eq!(found.iter().map(|found| found.client).collect::<Vec<_>>(), [client]);
            }
        }
    }
}

#[test]
fn l16_draining_keeps_connections_killing_ends_them_and_the_same_address_again_is_another_backend() {
    let bench = Bench::new(&NatConfig::default());
    let [first, second] = [at("192.168.178.11:8080"), at("192.168.178.12:8080")];
    let name = service(TCP4);
    bench.balancer.insert(name, &NatService::new([first])).unwrap();
    let old = open(&bench, &name, at("10.0.0.20:4000"));
    let acknowledge = |port: u16| {
        let client = SocketAddr::new(ip("10.0.0.20"), port);
        bench.client_sends(&Frame::tcp(client, at("10.0.0.100:80")).flags(tcp::ACK).sequence(2, 1001)).reason
    };
    bench.balancer.set_backend(&name, second, 1).unwrap();
    bench.balancer.drain(&name, first).unwrap();
    assert_eq!(acknowledge(4000), Reason::Forwarded);
    for port in 5000..5020 {
        assert_eq!(open(&bench, &name, SocketAddr::new(ip("10.0.0.20"), port)).backend, second);
    }
    assert_eq!(acknowledge(4000), Reason::Forwarded);

    // Removed, it stays for its connection; added again, it is another one, and that connection ends.
    bench.balancer.remove_backend(&name, first).unwrap();
    assert_eq!(acknowledge(4000), Reason::Forwarded);
    assert_eq!(bench.balancer.backends(&name).unwrap()[0].state, BackendState::Leaving);
    bench.balancer.set_backend(&name, first, 1).unwrap();
    assert_eq!(acknowledge(4000), Reason::BackendKilled);
    let answer = Frame::tcp(first, old.source).flags(tcp::ACK);
    assert_eq!(bench.backend_sends(&answer).action, Action::Pass, "no old flow reaches a new host, nor the other way");

    // Killed: all at once.
    let reasons = |wanted: Reason| (5000..5020).filter(|port| acknowledge(*port) == wanted).count();
    assert_eq!(reasons(Reason::Forwarded), 20);
    bench.balancer.kill(&name, second).unwrap();
    assert_eq!(reasons(Reason::NoConnection), 20);
    let listed = bench.balancer.backends(&name).unwrap();
    assert_eq!(listed.iter().map(|backend| backend.address).collect::<Vec<_>>(), [first]);
    assert_eq!(open(&bench, &name, at("10.0.0.20:4000")).backend, first);
}

#[test]
fn a_service_that_goes_takes_its_connections_along() {
    let bench = Bench::with_services(&NatConfig::default(), NatMode::Full);
    for (name, client, ..) in conversations() {
        open(&bench, &name, client);
    }
    let was = bench.balancer.remove(&service(TCP4)).unwrap();
    assert_eq!(was, NatService::new([at("192.168.178.11:8080")]));
    assert_eq!(bench.balancer.counts().unwrap().total(), 3);
    assert_eq!(bench.client_sends(&tcp4(tcp::ACK)).reason, Reason::NoService);
    assert!(matches!(bench.balancer.remove(&service(TCP4)), Err(Error::UnknownService { .. })));
    for name in bench.balancer.services() {
        bench.balancer.remove(&name).unwrap();
    }
    assert!(bench.balancer.is_empty().unwrap());
    assert_eq!(bench.client_sends(&tcp4(tcp::ACK)).reason, Reason::NotForVip);
}

#[test]
fn l18_without_backends_nothing_is_opened() {
    let bench = Bench::new(&NatConfig::default());
    let backend = at("192.168.178.11:8080");
    for scheduler in [Scheduler::Maglev, Scheduler::RoundRobin, Scheduler::LeastConnections, Scheduler::SourceHash] {
        let name = service(TCP4);
        bench.balancer.insert(name, &NatService::default().scheduler(scheduler)).unwrap();
        let outcome = bench.client_sends(&tcp4(tcp::SYN));
        assert_eq!((outcome.action, outcome.reason), (Action::Drop, Reason::NoBackend), "{scheduler:?}, none");
        bench.balancer.set_backend(&name, backend, 0).unwrap();
        assert_eq!(bench.client_sends(&tcp4(tcp::SYN)).reason, Reason::NoBackend, "{scheduler:?}, weight 0");
        bench.balancer.set_backend(&name, backend, 1).unwrap();
        assert_eq!(bench.client_sends(&tcp4(tcp::SYN)).reason, Reason::Forwarded);
        let stats = bench.balancer.service_stats(&name).unwrap();
        assert_eq!((stats.no_backend, stats.opened, stats.forwarded.packets), (2, 1, 1));
        bench.balancer.remove(&name).unwrap();
    }
}

#[test]
fn what_cannot_work_is_refused_by_name() {
    let bench = Bench::with_services(&NatConfig::default(), NatMode::Full);
    let insert = |name: &str, backends: &[&str]| {
        let with = NatService::new(backends.iter().map(|backend| at(backend)));
        bench.balancer.insert(service(name), &with).unwrap_err().to_string()
    };
    for (name, backends, said) in [
        (TCP4, &["192.168.178.11:80"][..], "exists already"),
        ("tcp/10.0.0.101:*", &[], "expected one port"),
        ("tcp/0.0.0.0:80", &[], "unicast"),
        ("tcp/10.0.0.101:80", &["[2001:db8:b::11]:80"], "family"),
        ("tcp/10.0.0.101:80", &["192.168.178.11:0"], "port from 1"),
        ("tcp/10.0.0.101:80", &["10.0.0.101:80"], "another address"),
        ("tcp/10.0.0.101:80", &["10.0.0.100:80"], "balancer's own"),
        ("tcp/10.0.0.101:80", &["192.168.178.11:80", "192.168.178.11:80"], "once"),
    ] {
        let error = insert(name, backends);
        assert!(error.contains(said), "{name} {backends:?}: {error}");
    }
    for config in [
        NatConfig::default().capacity(0),
        NatConfig::default().ports(0..=9),
        NatConfig::default().ports(std::ops::RangeInclusive::new(9, 8)),
        NatConfig::default().echo(Echo::Backend),
        NatConfig::default().table_size(4),
        NatConfig::default().ring_bytes(5000),
        NatConfig::default().addresses(vec![ip("127.0.0.1")]),
        NatConfig::default().addresses((0..17).map(|n| ip(&format!("10.1.0.{n}"))).collect()),
        NatConfig::default().timeouts({
            let mut timeouts = NatTimeouts::default();
            timeouts.reset = std::time::Duration::ZERO;
            timeouts
        }),
    ] {
        let error = NatBalancer::load(&config).unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{error}");
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

#[test]
fn segments_of_no_connection_may_be_answered_with_rst() {
    let bench = Bench::with_services(&NatConfig::default().reset_unknown(true), NatMode::Full);
    for (_, client, vip, _) in conversations().filter(|row| row.0.protocol == ServiceProtocol::Tcp) {
        let (from, to) = bench.macs_of_clients();
        let segment = |flags| Frame::tcp(client, vip).flags(flags).sequence(100, 7).payload(&[1; 10]);
        let reset = |seq, ack, flags| {
            let frame = Frame::tcp(vip, client).flags(flags).sequence(seq, ack).window(0).macs(to, from);
            Outcome { action: Action::Tx, reason: Reason::ResetSent, frame: frame.build() }
        };
        assert_eq!(bench.client_sends(&segment(tcp::ACK)), reset(7, 0, tcp::RST));
        assert_eq!(bench.client_sends(&segment(tcp::FIN)), reset(0, 111, tcp::RST | tcp::ACK));
        // Never a RST for a RST.
        let outcome = bench.client_sends(&segment(tcp::RST));
        assert_eq!((outcome.action, outcome.reason), (Action::Drop, Reason::NoConnection));
    }
}

#[test]
fn schedulers_share_out_as_they_say() {
    let bench = Bench::new(&NatConfig::default());
    let backends = [at("192.168.178.11:80"), at("192.168.178.12:80"), at("192.168.178.13:80")];
    let weights = [1, 2, 1];
    let list: Vec<_> = backends.into_iter().zip(weights).collect();
    let given = |scheduler| {
        let name = service(TCP4);
        let mut with = NatService::default().scheduler(scheduler);
        with.backends = list.clone();
        bench.balancer.insert(name, &with).unwrap();
        assert_eq!(bench.balancer.get(&name).unwrap(), with);
        for port in 0..1200 {
            let client = SocketAddr::new(ip(&format!("10.0.0.{}", 20 + port % 30)), 1024 + port);
            assert_eq!(bench.client_sends(&Frame::tcp(client, at("10.0.0.100:80"))).reason, Reason::Forwarded);
        }
        let given = backends.map(|backend| {
            bench.balancer.connections().unwrap().iter().filter(|found| found.backend == backend).count()
        });
        let of_one = |last: u8| {
            let mut all = bench.balancer.connections().unwrap();
            all.retain(|found| found.client.ip() == ip(&format!("10.0.0.{last}")));
            all.iter().map(|found| found.backend).collect::<std::collections::BTreeSet<_>>().len()
        };
        let loyal = (20..50).filter(|last| of_one(*last) == 1).count();
        bench.balancer.remove(&name).unwrap();
        (given, loyal)
    };
    assert_eq!(given(Scheduler::RoundRobin).0, [300, 600, 300]);
    assert_eq!(given(Scheduler::LeastConnections).0, [300, 600, 300]);
    let (maglev, _) = given(Scheduler::Maglev);
    assert!(maglev.iter().zip([300, 600, 300]).all(|(got, wanted)| got.abs_diff(wanted) < 100), "{maglev:?}");
    assert_eq!(given(Scheduler::SourceHash).1, 30, "each client stays with one backend");
}

#[test]
fn least_connections_follow_those_that_close() {
    let bench = Bench::new(&NatConfig::default());
    let backends = [at("192.168.178.11:80"), at("192.168.178.12:80")];
    let with = NatService::new(backends).scheduler(Scheduler::LeastConnections);
    bench.balancer.insert(service(TCP4), &with).unwrap();
    let opened: Vec<_> =
        (0..20).map(|n| open(&bench, &service(TCP4), SocketAddr::new(ip("10.0.0.20"), 4000 + n))).collect();
    let closing: Vec<_> = opened.iter().filter(|connection| connection.backend == backends[0]).collect();
    assert_eq!(closing.len(), 10);
    for connection in &closing {
        assert!(bench.balancer.end(connection).unwrap());
        assert!(!bench.balancer.end(connection).unwrap(), "it has ended already");
    }
    for n in 0..10 {
        let next = open(&bench, &service(TCP4), SocketAddr::new(ip("10.0.0.20"), 5000 + n));
        assert_eq!(next.backend, backends[0]);
    }
}

#[test]
fn a_pool_of_addresses_is_the_source_of_connections() {
    let pool = ["10.0.0.101", "10.0.0.102", "2001:db8:a::101"];
    let bench = Bench::with_services(&NatConfig::default().addresses(pool.map(ip).to_vec()), NatMode::Full);
    let mut seen = std::collections::BTreeSet::new();
    for port in 4000..4050 {
        for (name, client, vip, _) in conversations() {
            let client = SocketAddr::new(client.ip(), port);
            let connection = open(&bench, &name, client);
            seen.insert(connection.source.ip());
            assert!(connection.source.ip() != vip.ip());
        }
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), pool.map(ip));
    assert_eq!(bench.client_sends(&Frame::echo(ip("10.0.0.20"), ip("10.0.0.101"), 1, 1)).reason, Reason::EchoAnswered);
}

#[test]
fn nothing_is_refused_up_to_half_of_the_capacity() {
    for (mode, capacity) in [(NatMode::Full, 2048), (NatMode::Destination, 2048), (NatMode::Full, 100)] {
        let bench = Bench::with_services(&NatConfig::default().capacity(capacity), mode);
        for n in 0..capacity / 2 {
            let client = SocketAddr::new(ip(&format!("10.0.0.{}", 20 + n % 30)), 2000 + (n / 30) as u16);
            assert_eq!(bench.client_sends(&Frame::tcp(client, at("10.0.0.100:80"))).reason, Reason::Forwarded);
        }
        assert_eq!(bench.balancer.counts().unwrap().total(), u64::from(capacity / 2));
        assert_eq!(bench.balancer.evicted().unwrap(), 0, "and nothing went");
    }
}

#[test]
fn l13_ports_can_run_out_and_that_is_counted() {
    let bench = Bench::with_services(&NatConfig::default().ports(40_000..=40_007), NatMode::Full);
    let mut opened = Vec::new();
    for port in 4000..4100 {
        let client = SocketAddr::new(ip("10.0.0.20"), port);
        let outcome = bench.client_sends(&Frame::tcp(client, at("10.0.0.100:80")));
        if outcome.reason == Reason::Forwarded {
            // Established: it may not go for the next one.
            opened.push(open_again(&bench, client));
        } else {
            assert_eq!((outcome.action, outcome.reason), (Action::Drop, Reason::PortsExhausted));
        }
    }
    let ports: std::collections::BTreeSet<u16> = opened.iter().map(|connection| connection.source.port()).collect();
    assert_eq!((opened.len(), ports.len()), (8, 8), "each port was given once");
    // One that ends makes room for one. A client tries 32 ports at random, and may miss it.
    bench.balancer.end(&opened[0]).unwrap();
    let clients = (4000..4100).map(|port| SocketAddr::new(ip("10.0.0.21"), port));
    let next = clients
        .filter(|client| bench.client_sends(&Frame::tcp(*client, at("10.0.0.100:80"))).reason == Reason::Forwarded)
        .map(|client| open_again(&bench, client));
    assert_eq!(next.map(|next| next.source).collect::<Vec<_>>(), [opened[0].source]);
}

/// As `open`, for a connection whose SYN was sent.
fn open_again(bench: &Bench, client: SocketAddr) -> xdpkit::Connection {
    open(bench, &service(TCP4), client)
}

#[test]
fn connections_end_after_silence_and_are_collected() {
    let mut timeouts = NatTimeouts::default();
    timeouts.syn = std::time::Duration::from_secs(1);
    let bench = Bench::with_services(&NatConfig::default().timeouts(timeouts), NatMode::Full);
    let stays = open(&bench, &service(TCP4), at("10.0.0.20:4000"));
    for port in 5000..5050 {
        bench.client_sends(&Frame::tcp(SocketAddr::new(ip("10.0.0.21"), port), at("10.0.0.100:80")));
    }
    assert_eq!(bench.balancer.counts().unwrap().total(), 51);
    assert_eq!(bench.balancer.collect().unwrap(), 0);
    std::thread::sleep(std::time::Duration::from_millis(1500));
    assert_eq!(bench.balancer.counts().unwrap().total(), 1, "dead ones are not listed");
    assert_eq!(bench.balancer.collect().unwrap(), 50);
    assert_eq!(bench.balancer.backends(&service(TCP4)).unwrap()[0].stats.active, 1);
    assert!(bench.balancer.find(stays.client, &stays.service).unwrap().is_some());
    // From now on, established ones end as fast.
    let mut timeouts = NatTimeouts::default();
    timeouts.established = std::time::Duration::from_secs(1);
    bench.balancer.set_timeouts(&timeouts).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!((bench.balancer.collect().unwrap(), bench.balancer.is_empty().unwrap()), (1, true));
}

#[test]
fn events_tell_what_opened_closed_and_was_refused() {
    let bench = Bench::with_services(&NatConfig::default().sample(1), NatMode::Full);
    let mut events = bench.balancer.events().unwrap();
    let client = at("10.0.0.20:4000");
    let connection = open(&bench, &service(TCP4), client);
    bench.client_sends(&tcp4(tcp::FIN | tcp::ACK).sequence(2, 1001));
    bench.backend_sends(&Frame::tcp(connection.backend, connection.source).flags(tcp::FIN | tcp::ACK));
    bench.balancer.drain(&service(TCP4), connection.backend).unwrap();
    bench.client_sends(&Frame::tcp(at("10.0.0.21:4000"), at("10.0.0.100:80")));
    let seen: Vec<_> = std::iter::from_fn(|| events.try_next()).collect();
    let kinds: Vec<_> = seen.iter().map(|event| event.kind).collect();
    assert_eq!(kinds, [NatEventKind::New, NatEventKind::Closed, NatEventKind::Refused(Reason::NoBackend)]);
    assert!(seen.iter().all(|event| event.service == Some(service(TCP4))));
    assert_eq!(
        (seen[0].client, seen[0].backend, seen[0].port),
        (client, Some(connection.backend), connection.source.port())
    );
    assert_eq!((seen[2].client, seen[2].backend, seen[2].port), (at("10.0.0.21:4000"), None, 0));
    bench.balancer.set_sample(0).unwrap();
    open(&bench, &service("udp/10.0.0.100:53"), client);
    assert_eq!(events.try_next(), None);
    assert_eq!(bench.balancer.events_lost().unwrap(), 0);
}

#[test]
fn two_services_with_one_backend_never_mix_up_a_client_whose_address_is_kept() {
    let bench = Bench::with_services(&NatConfig::default(), NatMode::Destination);
    let other = service("tcp/10.0.0.101:80");
    let backend = at("192.168.178.11:8080");
    bench.balancer.insert(other, &NatService::new([backend]).mode(NatMode::Destination)).unwrap();
    let client = at("10.0.0.20:4000");
    let first = open(&bench, &service(TCP4), client);
    // The backend could not tell it from the first.
    let outcome = bench.client_sends(&Frame::tcp(client, at("10.0.0.101:80")));
    assert_eq!((outcome.action, outcome.reason), (Action::Drop, Reason::PortsExhausted));
    assert_eq!(bench.client_sends(&tcp4(tcp::ACK).sequence(2, 1001)).reason, Reason::Forwarded);
    bench.balancer.end(&first).unwrap();
    open(&bench, &other, client);
}

#[test]
fn an_adopted_balancer_goes_on_with_every_connection() {
    let pins = BpfFs::new().unwrap();
    for mode in [NatMode::Full, NatMode::Destination] {
        let name = format!("nat-{}", mode == NatMode::Full);
        let config = NatConfig::default().name(&name).addresses(vec![ip("10.0.0.101")]);
        let mut bench = Bench::with_services(&config, mode);
        let options = AttachOptions::new("lo").mode(XdpMode::Generic).pin(pins.path());
        let attached = bench.lab.balancer.run(|| bench.balancer.attach(&options).unwrap());
        let opened: Vec<_> = conversations().map(|(name, client, ..)| open(&bench, &name, client)).collect();
        bench.balancer.drain(&service(TCP4), at("192.168.178.11:8080")).unwrap();
        let twin = NatBalancer::adopt(pins.path(), &name).unwrap();
        assert_eq!(twin.services(), bench.balancer.services());
        assert_eq!(twin.capacity(), bench.balancer.capacity());
        bench.balancer = twin;
        assert_eq!(bench.balancer.get(&service(TCP4)).unwrap().mode, mode);
        for connection in &opened {
            let found = bench.balancer.find(connection.client, &connection.service).unwrap().unwrap();
            assert_eq!((found.source, found.backend), (connection.source, connection.backend));
            let answer = segment(&connection.service, connection.backend, connection.source);
            let tcp = connection.service.protocol == ServiceProtocol::Tcp;
            let answer = if tcp { answer.flags(tcp::ACK) } else { answer };
            assert_eq!(bench.backend_sends(&answer).reason, Reason::Answered);
        }
        let drained = &bench.balancer.backends(&service(TCP4)).unwrap()[0];
        assert_eq!((drained.state, drained.stats.active), (BackendState::Draining, 1));
        open(&bench, &service("udp/10.0.0.100:53"), at("10.0.0.25:4000"));
        attached.detach().unwrap();
    }
}
