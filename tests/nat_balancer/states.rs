//! What packets make of a connection's state in the NAT balancer: how it opens, closes, and is used again. Traps: L15, H3.

use std::{net::SocketAddr, time::Duration};

use crate::common::{
    nat::{Bench, Outcome, at, ip, service},
    nat_talk::{TCP4, conversations, open, segment, state, tcp4},
};
use xdpkit::{
    Action, ConnectionState, NatConfig, NatEventKind, NatMode, NatService, NatTimeouts, Reason, Scheduler, ServiceAddr,
    ServiceProtocol,
};
use xdpkit_lab::frame::{Frame, tcp};

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
        let a_sample_later = || std::thread::sleep(Duration::from_millis(300));
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
fn connections_end_after_silence_and_are_collected() {
    let bench = Bench::with_services(&NatConfig::default(), NatMode::Full);
    let stays = open(&bench, &service(TCP4), at("10.0.0.20:4000"));
    for port in 5000..5050 {
        bench.client_sends(&Frame::tcp(SocketAddr::new(ip("10.0.0.21"), port), at("10.0.0.100:80")));
    }
    assert_eq!(bench.balancer.counts().unwrap().total(), 51);
    assert_eq!(bench.balancer.collect().unwrap(), 0);
    let mut timeouts = NatTimeouts::default();
    timeouts.syn = Duration::from_secs(1);
    bench.balancer.set_timeouts(&timeouts).unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(bench.balancer.counts().unwrap().total(), 1, "dead ones are not listed");
    assert_eq!(bench.balancer.collect().unwrap(), 50);
    assert_eq!(bench.balancer.backends(&service(TCP4)).unwrap()[0].stats.active, 1);
    assert!(bench.balancer.find(stays.client, &stays.service).unwrap().is_some());
    // From now on, established ones end as fast.
    let mut timeouts = NatTimeouts::default();
    timeouts.established = Duration::from_secs(1);
    bench.balancer.set_timeouts(&timeouts).unwrap();
    std::thread::sleep(Duration::from_millis(300));
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

/// A connection of each state, in the order of [`ConnectionState::ALL`]: the client's port says which.
fn one_of_each(bench: &Bench) -> Vec<(ServiceAddr, SocketAddr)> {
    let udp = service("udp/10.0.0.100:53");
    let clients =
        (0..8_u16).map(|n| (if n < 2 { udp } else { service(TCP4) }, SocketAddr::new(ip("10.0.0.20"), 7000 + n)));
    let clients: Vec<_> = clients.collect();
    for (n, (name, client)) in clients.iter().enumerate() {
        let vip = SocketAddr::new(name.address, name.port.unwrap());
        if ![0, 2, 3].contains(&n) {
            let found = open(bench, name, *client);
            let ends = |flags| {
                bench.client_sends(&Frame::tcp(*client, vip).flags(flags).sequence(2, 1001));
            };
            match n {
                5 => ends(tcp::FIN | tcp::ACK),
                6 => {
                    ends(tcp::FIN | tcp::ACK);
                    bench.backend_sends(&Frame::tcp(found.backend, found.source).flags(tcp::FIN | tcp::ACK));
                }
                7 => ends(tcp::RST),
                _ => {}
            }
            continue;
        }
        bench.client_sends(&segment(name, *client, vip));
        if n == 3 {
            let found = bench.balancer.find(*client, name).unwrap().unwrap();
            bench.backend_sends(&Frame::tcp(found.backend, found.source).flags(tcp::SYN | tcp::ACK).sequence(1000, 2));
        }
    }
    clients
}

#[test]
fn each_state_has_a_timeout_of_its_own() {
    let bench = Bench::with_services(&NatConfig::default(), NatMode::Full);
    let clients = one_of_each(&bench);
    let states = || -> Vec<_> {
        let found = |(name, client): &(_, _)| bench.balancer.find(*client, name).unwrap().map(|found| found.state);
        clients.iter().map(found).collect()
    };
    let all: Vec<_> = ConnectionState::ALL.into_iter().map(Some).collect();
    assert_eq!(states(), all);
    std::thread::sleep(Duration::from_millis(1300));
    for state in ConnectionState::ALL {
        let mut timeouts = NatTimeouts::default();
        let which = match state {
            ConnectionState::UdpNew => &mut timeouts.udp_new,
            ConnectionState::UdpAnswered => &mut timeouts.udp,
            ConnectionState::TcpSyn => &mut timeouts.syn,
            ConnectionState::TcpAnswered => &mut timeouts.answered,
            ConnectionState::TcpEstablished => &mut timeouts.established,
            ConnectionState::TcpClosing => &mut timeouts.closing,
            ConnectionState::TcpTimeWait => &mut timeouts.time_wait,
            _ => &mut timeouts.reset,
        };
        *which = Duration::from_secs(1);
        bench.balancer.set_timeouts(&timeouts).unwrap();
        let wanted: Vec<_> = all.iter().map(|known| known.filter(|known| *known != state)).collect();
        assert_eq!(states(), wanted, "only {state} was silent for too long");
    }
    // So says the data path, too: packets of the dead are nobody's.
    bench.balancer.set_timeouts(&NatTimeouts::default()).unwrap();
    let acknowledges = |port| {
        let frame = Frame::tcp(SocketAddr::new(ip("10.0.0.20"), port), at("10.0.0.100:80"));
        bench.client_sends(&frame.flags(tcp::ACK).sequence(2, 1001)).reason
    };
    assert_eq!(acknowledges(7005), Reason::Forwarded);
    std::thread::sleep(Duration::from_millis(1300));
    let mut timeouts = NatTimeouts::default();
    timeouts.closing = Duration::from_secs(1);
    bench.balancer.set_timeouts(&timeouts).unwrap();
    assert_eq!((acknowledges(7005), acknowledges(7004)), (Reason::NoConnection, Reason::Forwarded));
}

/// A download that goes on long after the client has said all that it had to.
#[test]
fn a_connection_that_one_side_has_closed_lives_as_long_as_the_other_sends() {
    for closed_by_client in [true, false] {
        let mut timeouts = NatTimeouts::default();
        timeouts.closing = Duration::from_secs(3);
        let bench = Bench::with_services(&NatConfig::default().timeouts(timeouts), NatMode::Full);
        let client = at("10.0.0.20:4000");
        let found = open(&bench, &service(TCP4), client);
        let by_client = |flags| bench.client_sends(&tcp4(flags).sequence(2, 1001)).reason;
        let by_backend = |flags| {
            let frame = Frame::tcp(found.backend, found.source).flags(flags).sequence(1001, 3);
            bench.backend_sends(&frame.payload(&[1; 100])).reason
        };
        if closed_by_client {
            assert_eq!(by_client(tcp::FIN | tcp::ACK), Reason::Forwarded);
        } else {
            assert_eq!(by_backend(tcp::FIN | tcp::ACK), Reason::Answered);
        }
        for _ in 0..10 {
            std::thread::sleep(Duration::from_millis(400));
            if closed_by_client {
                assert_eq!(by_backend(tcp::ACK), Reason::Answered);
            } else {
                assert_eq!(by_client(tcp::ACK), Reason::Forwarded);
            }
            assert_eq!(state(&bench, client), Some(ConnectionState::TcpClosing));
        }
        std::thread::sleep(Duration::from_millis(3500));
        assert_eq!(state(&bench, client), None);
    }
}

/// Anybody can make a backend send a RST that ends nothing: by an acknowledgement of what it has not sent.
#[test]
fn a_connection_that_goes_on_after_its_backends_rst_is_counted_again() {
    let bench = Bench::with_services(&NatConfig::default(), NatMode::Full);
    let found = open(&bench, &service(TCP4), at("10.0.0.20:4000"));
    let active = || bench.balancer.backends(&service(TCP4)).unwrap()[0].stats.active;
    for (flags, state_then, active_then) in [
        (tcp::ACK, ConnectionState::TcpEstablished, 1),
        (tcp::RST, ConnectionState::TcpReset, 0),
        (tcp::ACK, ConnectionState::TcpEstablished, 1),
        (tcp::RST, ConnectionState::TcpReset, 0),
    ] {
        bench.backend_sends(&Frame::tcp(found.backend, found.source).flags(flags).sequence(1001, 2));
        assert_eq!((state(&bench, found.client), active()), (Some(state_then), active_then), "{flags:#x}");
    }
    assert!(bench.balancer.end(&found).unwrap());
    assert_eq!(active(), 0);
}
