//! Connections through the NAT balancer that do not open as in the book: both sides at once, with data, with answers that
//! are lost, by clients that have forgotten the last one. Traps: L15, H3.

use std::{net::SocketAddr, time::Duration};

use crate::common::{
    nat::{Bench, PATIENCE, ROUTED_VIPS, at, attach, backends, ip, service},
    nat_talk::{TCP4, conversations, open, state, tcp4},
};
use xdpkit::{
    Action, Connection, ConnectionState, NatBalancer, NatConfig, NatMode, NatService, NatTimeouts, Reason, Scheduler,
    ServiceAddr, ServiceProtocol, Stage as _,
};
use xdpkit_lab::{
    PacketSocket,
    frame::{Frame, tcp},
    topology::Nat,
    traffic::TcpEcho,
};

const CLIENT: &str = "10.0.0.20:4000";
const ANSWER: u8 = tcp::SYN | tcp::ACK;

/// With two backends, so that whoever opens anew gets the other one.
fn two_backends() -> Bench {
    let bench = Bench::new(&NatConfig::default());
    let backends = [at("192.168.178.11:8080"), at("192.168.178.12:8080")];
    bench.balancer.insert(service(TCP4), &NatService::new(backends).scheduler(Scheduler::RoundRobin)).unwrap();
    bench
}

/// The client sends this, and it goes to the backend.
fn client(bench: &Bench, flags: u8, sequence: (u32, u32)) -> Connection {
    let outcome = bench.client_sends(&tcp4(flags).sequence(sequence.0, sequence.1));
    assert_eq!(outcome.reason, Reason::Forwarded, "{flags:#x} {sequence:?}");
    bench.balancer.find(at(CLIENT), &service(TCP4)).unwrap().unwrap()
}

/// The connection's backend sends this, and it goes to the client. Answers the connection's state.
fn backend(bench: &Bench, to: &Connection, flags: u8, sequence: (u32, u32)) -> ConnectionState {
    let frame = Frame::tcp(to.backend, to.source).flags(flags).sequence(sequence.0, sequence.1);
    let wanted = Frame::tcp(at("10.0.0.100:80"), at(CLIENT)).flags(flags).sequence(sequence.0, sequence.1).ttl(63);
    assert_eq!(bench.backend_sends(&frame), bench.to_client(&wanted));
    state(bench, at(CLIENT)).unwrap()
}

fn active(bench: &Bench) -> Vec<u64> {
    bench.balancer.backends(&service(TCP4)).unwrap().iter().map(|backend| backend.stats.active).collect()
}

/// RFC 9293, section 3.5; RFC 5382, REQ-2.
#[test]
fn both_sides_may_open_at_once() {
    for mode in [NatMode::Full, NatMode::Destination] {
        let bench = Bench::with_services(&NatConfig::default(), mode);
        for (name, client, vip, backend) in conversations().filter(|row| row.0.protocol == ServiceProtocol::Tcp) {
            let says = |flags, seq, ack| {
                let outcome = bench.client_sends(&Frame::tcp(client, vip).flags(flags).sequence(seq, ack));
                assert_eq!(outcome.reason, Reason::Forwarded);
                bench.balancer.find(client, &name).unwrap().unwrap()
            };
            let source = says(tcp::SYN, 1, 0).source;
            let answers = |flags, seq, ack| {
                let outcome = bench.backend_sends(&Frame::tcp(backend, source).flags(flags).sequence(seq, ack));
                assert_eq!(outcome.reason, Reason::Answered);
                bench.balancer.find(client, &name).unwrap().unwrap().state
            };
            assert_eq!(answers(tcp::SYN, 1000, 0), ConnectionState::TcpSyn);
            assert_eq!(says(ANSWER, 1, 1001).state, ConnectionState::TcpSyn);
            assert_eq!(answers(ANSWER, 1000, 2), ConnectionState::TcpAnswered);
            assert_eq!(says(tcp::ACK, 2, 1001).state, ConnectionState::TcpEstablished);
        }
        assert_eq!(bench.balancer.counts().unwrap().total(), 2);
    }
}

/// TCP Fast Open (RFC 7413): the backend may send before the handshake is over.
#[test]
fn data_may_come_with_the_syn_and_the_answer_to_it() {
    let bench = two_backends();
    let syn = tcp4(tcp::SYN).sequence(1, 0).payload(b"GET /").tcp_options(&[34, 2]);
    let went = bench.client_sends(&syn);
    let found = bench.balancer.find(at(CLIENT), &service(TCP4)).unwrap().unwrap();
    let wanted = Frame::tcp(found.source, found.backend).sequence(1, 0).payload(b"GET /").tcp_options(&[34, 2]);
    assert_eq!(went, bench.to_backend(&wanted.ttl(63)));
    assert_eq!(backend(&bench, &found, ANSWER, (1000, 7)), ConnectionState::TcpAnswered);
    // Who acknowledges what was never sent has not seen anything.
    assert_eq!(client(&bench, tcp::ACK, (7, 2001)).state, ConnectionState::TcpAnswered);
    let page = Frame::tcp(found.backend, found.source).flags(tcp::ACK).sequence(1001, 7).payload(&[1; 1000]);
    assert_eq!(bench.backend_sends(&page).reason, Reason::Answered);
    assert_eq!(client(&bench, tcp::ACK, (7, 2001)).state, ConnectionState::TcpEstablished);
}

#[test]
fn what_is_sent_again_because_it_was_lost_changes_nothing() {
    let bench = two_backends();
    let first = client(&bench, tcp::SYN, (1, 0));
    for _ in 0..3 {
        let again = client(&bench, tcp::SYN, (1, 0));
        assert_eq!((again.backend, again.source), (first.backend, first.source));
    }
    for _ in 0..3 {
        assert_eq!(backend(&bench, &first, ANSWER, (1000, 2)), ConnectionState::TcpAnswered);
        assert_eq!(client(&bench, tcp::SYN, (1, 0)).state, ConnectionState::TcpAnswered);
    }
    assert_eq!(client(&bench, tcp::ACK, (2, 1001)).state, ConnectionState::TcpEstablished);
    // The acknowledgement was lost behind the balancer.
    assert_eq!(backend(&bench, &first, ANSWER, (1000, 2)), ConnectionState::TcpEstablished);
    assert_eq!(client(&bench, tcp::ACK | tcp::PSH, (2, 1001)).state, ConnectionState::TcpEstablished);
    assert_eq!(bench.balancer.service_stats(&service(TCP4)).unwrap().opened, 1);
}

/// SYN cookies change with time, and a backend whose queue was full has forgotten what it answered first.
#[test]
fn h3_the_last_answer_to_a_syn_is_the_one_to_be_acknowledged() {
    let bench = two_backends();
    let found = client(&bench, tcp::SYN, (1, 0));
    backend(&bench, &found, ANSWER, (1000, 2));
    client(&bench, tcp::SYN, (1, 0));
    assert_eq!(backend(&bench, &found, ANSWER, (900_000, 2)), ConnectionState::TcpAnswered);
    assert_eq!(client(&bench, tcp::ACK, (2, 1001)).state, ConnectionState::TcpAnswered, "that was the first one");
    assert_eq!(client(&bench, tcp::ACK, (2, 900_001)).state, ConnectionState::TcpEstablished);
}

/// The client's host was switched off and on: it begins with the port and the tuple that it had. The backend, which knows
/// of a connection, sends an acknowledgement instead of an answer (RFC 5961, section 4), and the client resets that.
#[test]
fn l15_a_client_that_has_forgotten_its_connection_can_begin_anew() {
    const NEW: u32 = 0x5000_0000;
    // What the old one had come to, on either side.
    for before in [None, Some(CLIENT), Some("backend")] {
        let bench = two_backends();
        let old = open(&bench, &service(TCP4), at(CLIENT));
        match before {
            None => assert_eq!(state(&bench, at(CLIENT)), Some(ConnectionState::TcpEstablished)),
            Some(CLIENT) => {
                let state = client(&bench, tcp::FIN | tcp::ACK, (2, 1001)).state;
                assert_eq!(state, ConnectionState::TcpClosing);
            }
            Some(_) => {
                let state = backend(&bench, &old, tcp::FIN | tcp::ACK, (1001, 2));
                assert_eq!(state, ConnectionState::TcpClosing);
            }
        }
        let syn = client(&bench, tcp::SYN, (NEW, 0));
        assert_eq!((syn.backend, syn.source), (old.backend, old.source), "nobody else's SYN could move it");
        backend(&bench, &old, tcp::ACK, (1001, 2));
        assert_eq!(client(&bench, tcp::RST, (2, 0)).state, ConnectionState::TcpReset);
        // A second later.
        client(&bench, tcp::SYN, (NEW, 0));
        let now = backend(&bench, &old, ANSWER, (70_000, NEW + 1));
        assert_eq!(now, ConnectionState::TcpEstablished, "{before:?}: what was closed was the old one");
        client(&bench, tcp::ACK, (NEW + 1, 70_001));
        assert_eq!(active(&bench).iter().sum::<u64>(), 1);
        // Its end is believed where the new one is.
        let closing = client(&bench, tcp::FIN | tcp::ACK, (NEW + 1, 70_001)).state;
        assert_eq!(closing, ConnectionState::TcpClosing, "{before:?}");
        let closed = backend(&bench, &old, tcp::FIN | tcp::ACK, (70_001, NEW + 2));
        assert_eq!(closed, ConnectionState::TcpTimeWait, "{before:?}");
        assert_eq!(active(&bench).iter().sum::<u64>(), 0);
    }
}

/// Clients that end every connection by RST, as health checks do, and soon come back from the same port.
#[test]
fn l15_a_port_used_again_after_the_clients_rst_ends_by_rst_again() {
    let bench = two_backends();
    open(&bench, &service(TCP4), at(CLIENT));
    let mut sequence = 2_u32;
    for round in 1..20_u32 {
        assert_eq!(client(&bench, tcp::RST | tcp::ACK, (sequence, 1001)).state, ConnectionState::TcpReset, "{round}");
        // Sequence numbers go on as clocks do: by two seconds here.
        sequence = sequence.wrapping_add(31_250_000);
        let found = client(&bench, tcp::SYN, (sequence.wrapping_sub(1), 0));
        backend(&bench, &found, ANSWER, (1000 * round, sequence));
        assert_eq!(client(&bench, tcp::ACK, (sequence, 1000 * round + 1)).state, ConnectionState::TcpEstablished);
    }
}

#[test]
fn packets_of_what_was_silent_for_too_long_are_nobodys_until_a_syn() {
    for mode in [NatMode::Full, NatMode::Destination] {
        let mut timeouts = NatTimeouts::default();
        (timeouts.established, timeouts.udp) = (Duration::from_secs(1), Duration::from_secs(1));
        let bench = Bench::with_services(&NatConfig::default().timeouts(timeouts), mode);
        let old: Vec<_> = conversations().map(|(name, client, ..)| open(&bench, &name, client)).collect();
        std::thread::sleep(Duration::from_millis(1500));
        for (was, (name, client, vip, backend)) in old.iter().zip(conversations()) {
            let talk = |from: SocketAddr, to| match name.protocol {
                ServiceProtocol::Tcp => Frame::tcp(from, to).flags(tcp::ACK).sequence(2, 1001),
                ServiceProtocol::Udp => Frame::udp(from, to),
            };
            assert_eq!(bench.backend_sends(&talk(backend, was.source)).action, Action::Pass, "{mode:?} {name}");
            if name.protocol == ServiceProtocol::Tcp {
                let outcome = bench.client_sends(&talk(client, vip));
                assert_eq!((outcome.action, outcome.reason), (Action::Drop, Reason::NoConnection), "{mode:?} {name}");
            }
            assert!(bench.balancer.find(client, &name).unwrap().is_none());
            open(&bench, &name, client);
            assert_eq!(bench.balancer.service_stats(&name).unwrap().opened, 2);
        }
        let active = |name| bench.balancer.backends(name).unwrap()[0].stats.active;
        assert!(bench.balancer.services().iter().all(|name| active(name) == 1), "each has one");
    }
}

/// A client without a host behind it, to say what no host would: frames from an address that nobody has.
struct Ghost {
    socket: PacketSocket,
    macs: [[u8; 6]; 2],
    at: SocketAddr,
    vip: SocketAddr,
}

impl Ghost {
    fn new(lab: &Nat, at: SocketAddr, vip: SocketAddr) -> Self {
        let macs = [&lab.clients[0], &lab.balancer].map(|host| host.mac("eth0").unwrap());
        lab.balancer.add_neighbour("eth0", at.ip(), macs[0]).unwrap();
        Self { socket: PacketSocket::open(&lab.clients[0], "eth0").unwrap(), macs, at, vip }
    }

    fn say(&self, flags: u8, seq: u32, ack: u32, payload: &[u8]) {
        let frame = Frame::tcp(self.at, self.vip).flags(flags).sequence(seq, ack).payload(payload);
        self.socket.send(&frame.macs(self.macs[0], self.macs[1]).build()).unwrap();
    }

    /// The next segment with these flags, PSH aside, this acknowledgement and so many bytes; says its sequence number.
    fn hear(&self, flags: u8, ack: u32, length: usize) -> u32 {
        let header = if self.at.is_ipv4() { 34 } else { 54 };
        let word = |frame: &[u8], at: usize| u32::from_be_bytes(frame[header + at..][..4].try_into().unwrap());
        let is_wanted = |frame: &[u8]| {
            frame.len() >= header + 20
                && frame[header + 2..][..2] == self.at.port().to_be_bytes()
                && frame[header + 13] & !tcp::PSH == flags
                && word(frame, 8) == ack
                && frame.len() == header + usize::from(frame[header + 12] >> 4) * 4 + length
        };
        let frame = self.socket.recv_matching(PATIENCE, is_wanted).unwrap();
        word(&frame.unwrap_or_else(|| panic!("{}: nothing with {flags:#x} and {ack}", self.at)), 4)
    }
}

#[test]
fn l15_a_real_backend_lets_a_client_begin_anew() {
    const FIRST: u32 = 1000;
    const SECOND: u32 = 0x5000_0000;
    let lab = Nat::new(1, 1).unwrap();
    for mode in [NatMode::Full, NatMode::Destination] {
        let balancer = NatBalancer::load(&NatConfig::default()).unwrap();
        let _attached = attach(&lab, &balancer);
        for (n, address) in ["10.0.0.77", "2001:db8:a::77"].into_iter().enumerate() {
            let to = backends(&lab, n == 1, 8080)[0];
            let _echo = TcpEcho::start(&lab.backends[0], to).unwrap();
            let name = ServiceAddr::tcp(ip(ROUTED_VIPS[n]), 80);
            balancer.insert(name, &NatService::new([to]).mode(mode)).unwrap();
            let client = SocketAddr::new(ip(address), 4000 + mode as u16);
            let ghost = Ghost::new(&lab, client, (name.address, 80).into());
            let state = || balancer.find(client, &name).unwrap().unwrap().state;
            let converse = |start: u32, text: &[u8]| {
                let next = ghost.hear(ANSWER, start + 1, 0) + 1;
                ghost.say(tcp::ACK | tcp::PSH, start + 1, next, text);
                let end = start + 1 + text.len() as u32;
                assert_eq!(ghost.hear(tcp::ACK, end, text.len()), next, "it comes back");
                assert_eq!(state(), ConnectionState::TcpEstablished, "{mode:?} {client}");
                (end, next + text.len() as u32)
            };
            ghost.say(tcp::SYN, FIRST, 0, b"");
            let (end, next) = converse(FIRST, b"before");
            ghost.say(tcp::ACK, end, next, b"");
            // What it knew is gone. The backend asks whether that is so.
            ghost.say(tcp::SYN, SECOND, 0, b"");
            while ghost.hear(tcp::ACK, end, 0) != next {}
            ghost.say(tcp::RST, end, 0, b"");
            ghost.say(tcp::SYN, SECOND, 0, b"");
            let (end, next) = converse(SECOND, b"and after");
            ghost.say(tcp::FIN | tcp::ACK, end, next, b"");
            let last = ghost.hear(tcp::FIN | tcp::ACK, end + 1, 0);
            ghost.say(tcp::ACK, end + 1, last + 1, b"");
            assert_eq!(state(), ConnectionState::TcpTimeWait, "{mode:?} {client}");
            let stats = balancer.service_stats(&name).unwrap();
            assert_eq!((stats.opened, balancer.backends(&name).unwrap()[0].stats.active), (1, 0));
        }
        assert_eq!(balancer.stats().unwrap().dropped().packets, 0);
    }
}
