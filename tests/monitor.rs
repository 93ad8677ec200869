//! The monitor: events, sampling, losses, counters and actions.

mod common;

use std::{os::fd::AsFd as _, os::fd::AsRawFd as _, time::Duration};

use common::judge;
use xdpkit::{
    Action, AttachOptions, Error, Fragment, MonitorConfig, Network, PacketMonitor, Protocol, Reason, Stage as _,
    TestRun, Transport,
};
use xdpkit_lab::{
    PacketSocket,
    frame::{Frame, tcp},
    topology::Pair,
    traffic::{TcpEcho, ping, tcp_echo},
};

fn monitor(sample: u32) -> PacketMonitor {
    PacketMonitor::load(&MonitorConfig::default().sample(sample)).unwrap()
}

fn udp4() -> Frame {
    Frame::udp("10.0.0.2:4000".parse().unwrap(), "10.0.0.1:53".parse().unwrap())
}

fn tcp6() -> Frame {
    Frame::tcp("[2001:db8::2]:4000".parse().unwrap(), "[2001:db8::1]:443".parse().unwrap())
}

#[test]
fn an_event_tells_all_of_a_packet() {
    let monitor = monitor(1);
    let mut events = monitor.events().unwrap();
    let frame = tcp6().macs([2, 0, 0, 0, 0, 9], [2, 0, 0, 0, 0, 8]).vlan(42).ttl(7).flags(tcp::SYN | tcp::ACK).build();
    monitor.test_run(&frame).unwrap();
    let event = events.try_next().unwrap();
    assert!(event.timestamp > Duration::ZERO);
    assert_eq!(event.bytes as usize, frame.len());
    assert_eq!((event.source_mac, event.destination_mac), ([2, 0, 0, 0, 0, 9], [2, 0, 0, 0, 0, 8]));
    assert_eq!(event.vlans.iter().map(|tag| tag.id()).collect::<Vec<_>>(), [42]);
    assert_eq!(event.ether_type, 0x86dd);
    let Network::Ip { source, destination, hop_limit, protocol, fragment } = event.network else {
        panic!("{event:?}");
    };
    assert_eq!((source.to_string().as_str(), destination.to_string().as_str()), ("2001:db8::2", "2001:db8::1"));
    assert_eq!((hop_limit, protocol, fragment), (7, 6, Fragment::No));
    assert_eq!(event.transport, Some(Transport::Tcp { source: 4000, destination: 443, flags: tcp::SYN | tcp::ACK }));
    assert_eq!((event.reason, event.action), (Reason::None, Action::Pass));
    assert_eq!(event.to_string(), "vlan 42 [2001:db8::2]:4000 > [2001:db8::1]:443 tcp [S.], 78 bytes");
    assert_eq!(events.try_next(), None);
}

#[test]
fn an_event_carries_the_beginning_of_the_frame() {
    let monitor = monitor(1);
    let mut events = monitor.events().unwrap();
    let mut captured = |frame: &[u8], linear: Option<u32>| {
        let run = TestRun::new(frame);
        monitor.run(&linear.map_or(run, |bytes| run.linear(bytes))).unwrap();
        let event = events.try_next().unwrap();
        assert_eq!(event.bytes as usize, frame.len());
        event.frame
    };
    for payload in [0, 1, 85, 86, 87, 1400] {
        let frame = udp4().payload(&vec![0x5a; payload]).build();
        assert_eq!(captured(&frame, None), frame[..frame.len().min(128)], "{payload} bytes of payload");
    }
    let jumbo: Vec<u8> = udp4().payload(&(0..6000).map(|n| n as u8).collect::<Vec<_>>()).build();
    assert_eq!(captured(&jumbo, Some(100)), jumbo[..128], "out of two buffers");
    let stub = [0xff; 14];
    assert_eq!(captured(&stub, None), stub, "a frame of only a header");
}

#[test]
fn what_is_sent_back_is_captured_as_it_came() {
    let monitor = monitor(1);
    monitor.set_action(Protocol::Udp, Some(Action::Tx)).unwrap();
    let mut events = monitor.events().unwrap();
    let frame = udp4().macs([2, 0, 0, 0, 0, 9], TestRun::OWN_MAC).build();
    assert_ne!(monitor.test_run(&frame).unwrap().frame, frame);
    assert_eq!(events.try_next().unwrap().frame, frame);
}

#[test]
fn malformed_packets_are_reported_with_their_reason_and_go_on() {
    let monitor = monitor(1);
    let mut events = monitor.events().unwrap();
    let frame = udp4().udp_length(3).build();
    assert_eq!(judge(&monitor, &frame), (Action::Pass, Reason::UdpLength));
    let event = events.try_next().unwrap();
    assert_eq!((event.reason, event.transport), (Reason::UdpLength, None));
    assert!(event.reason.is_malformed() && !event.reason.is_unsupported());
    assert_eq!(event.to_string(), "10.0.0.2 > 10.0.0.1 protocol 17, 42 bytes, udp_length");
    assert_eq!(monitor.protocols().unwrap().udp.packets, 0, "only well-formed packets count by protocol");
}

#[test]
fn every_nth_packet_is_sampled_and_the_rate_can_be_changed() {
    let monitor = monitor(10);
    let mut events = monitor.events().unwrap();
    let mut count = || std::iter::from_fn(|| events.try_next()).count();
    let send = |n: u32| (0..n).for_each(|_| drop(monitor.test_run(&udp4().build()).unwrap()));
    send(100);
    // The test may move between CPUs, and each of them counts for itself.
    let sampled = count();
    assert!((5..=10 + 2 * 2).contains(&sampled), "{sampled} of 100");
    monitor.set_sample(0).unwrap();
    send(100);
    assert_eq!(count(), 0);
    monitor.set_sample(1).unwrap();
    send(100);
    assert_eq!(count(), 100);
    assert_eq!(monitor.protocols().unwrap().udp.packets, 300, "all are counted");
}

#[test]
fn what_does_not_fit_the_ring_is_counted_as_lost() {
    let monitor = PacketMonitor::load(&MonitorConfig::default().sample(1).ring_bytes(4096)).unwrap();
    let mut events = monitor.events().unwrap();
    for _ in 0..100 {
        monitor.test_run(&udp4().build()).unwrap();
    }
    let read = std::iter::from_fn(|| events.try_next()).count() as u64;
    // Each record takes 224 bytes and a header of 8.
    assert_eq!(read, 4096 / 232);
    assert_eq!(monitor.events_lost().unwrap(), 100 - read);
    monitor.test_run(&udp4().build()).unwrap();
    assert!(events.try_next().is_some(), "once read, there is room again");
}

#[test]
fn events_have_one_reader_at_a_time_and_can_be_waited_for() {
    let monitor = monitor(1);
    let mut events = monitor.events().unwrap();
    assert!(matches!(monitor.events(), Err(Error::EventsTaken { .. })));
    assert!(events.as_fd().as_raw_fd() >= 0);
    assert_eq!(events.next_within(Duration::from_millis(20)).unwrap(), None);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(50));
            monitor.test_run(&udp4().build()).unwrap();
        });
        assert!(events.next_within(Duration::from_secs(20)).unwrap().is_some());
    });
    // Without end is a time, too, and the descriptor tells of every single event that is left.
    (0..3).for_each(|_| drop(monitor.test_run(&udp4().build()).unwrap()));
    assert!(events.next_within(Duration::MAX).unwrap().is_some());
    assert!(events.next_within(Duration::MAX).unwrap().is_some());
    assert!(events.next_within(Duration::from_secs(60)).unwrap().is_some());
    drop(events);
    monitor.test_run(&udp4().build()).unwrap();
    assert!(monitor.events().unwrap().try_next().is_some());
}

#[test]
fn the_ring_size_must_be_a_power_of_two() {
    for bytes in [0, 1000, 2048, 5000] {
        let error = PacketMonitor::load(&MonitorConfig::default().ring_bytes(bytes)).unwrap_err();
        assert_eq!(error.to_string(), format!("ring_bytes `{bytes}`: expected a power of two of at least 4096"));
    }
}

#[test]
fn actions_by_protocol_and_the_transports_goes_first() {
    let monitor = monitor(0);
    let [udp, syn] = [udp4().build(), tcp6().build()];
    let later = udp4().fragment(800, false).build();
    let set = |protocol, action| monitor.set_action(protocol, action).unwrap();
    set(Protocol::Udp, Some(Action::Drop));
    assert_eq!(judge(&monitor, &udp), (Action::Drop, Reason::ProtocolAction));
    assert_eq!(judge(&monitor, &later), (Action::Drop, Reason::ProtocolAction), "a later fragment is UDP, too");
    assert_eq!(judge(&monitor, &syn), (Action::Pass, Reason::None));
    set(Protocol::Ipv6, Some(Action::Aborted));
    assert_eq!(judge(&monitor, &syn), (Action::Aborted, Reason::ProtocolAction));
    set(Protocol::Tcp, Some(Action::Pass));
    assert_eq!(judge(&monitor, &syn), (Action::Pass, Reason::ProtocolAction));
    set(Protocol::Udp, None);
    assert_eq!(judge(&monitor, &udp), (Action::Pass, Reason::None));
    let error = monitor.set_action(Protocol::Arp, Some(Action::Redirect)).unwrap_err();
    assert_eq!(error.to_string(), "action `redirect`: expected pass, drop, aborted or tx");
}

#[test]
fn tx_swaps_addresses_and_ports_and_keeps_checksums_right() {
    let monitor = monitor(0);
    for protocol in [Protocol::Ipv4, Protocol::Ipv6] {
        monitor.set_action(protocol, Some(Action::Tx)).unwrap();
    }
    let (a, b) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let pairs = |one: &str, two: &str| (one.parse().unwrap(), two.parse().unwrap());
    for (one, two) in [pairs("10.0.0.2:4000", "10.0.0.1:53"), pairs("[2001:db8::2]:4000", "[2001:db8::1]:53")] {
        // Built the other way round, checksums included, is what must come back.
        for (there, back) in [
            (Frame::udp(one, two).payload(b"odd"), Frame::udp(two, one).payload(b"odd")),
            (Frame::tcp(one, two), Frame::tcp(two, one)),
            (Frame::udp(one, two).vlan(5).options(&[1; 4]), Frame::udp(two, one).vlan(5).options(&[1; 4])),
        ] {
            let verdict = monitor.test_run(&there.macs(a, b).build()).unwrap();
            assert_eq!(verdict.action, Action::Tx);
            assert_eq!(verdict.frame, back.macs(b, a).build());
        }
        let multicast = Frame::udp(one, two).macs(a, [0x33, 0x33, 0, 0, 0, 1]).build();
        let verdict = monitor.test_run(&multicast).unwrap();
        assert_eq!((verdict.action, verdict.frame), (Action::Pass, multicast), "no frame comes from a group address");
        // Nor goes to one because its sender says it is one.
        let verdict = monitor.test_run(&Frame::udp(one, two).macs([0xff; 6], b).build()).unwrap();
        assert_eq!(verdict.action, Action::Pass);
    }
    assert_eq!(monitor.stats().unwrap().reason(Reason::TxGroupAddress).packets, 4);
}

#[test]
fn real_actions_on_real_traffic() {
    let pair = Pair::new().unwrap();
    let monitor = monitor(0);
    let _attachment = pair.server.run(|| monitor.attach(&AttachOptions::new("eth0"))).unwrap();
    // For what comes, and for what does not.
    let (long, short) = (Duration::from_secs(60), Duration::from_millis(700));
    for address in pair.server_addr.both() {
        let echo = TcpEcho::start(&pair.server, (address, 7).into()).unwrap();
        let works = |patience| tcp_echo(&pair.client, echo.addr(), b"hello", patience).is_ok();
        let pinged = || ping(&pair.client, address, 1, Duration::ZERO, long).unwrap().received == 1;
        assert!(works(long) && pinged());
        for action in [Action::Drop, Action::Aborted] {
            monitor.set_action(Protocol::Tcp, Some(action)).unwrap();
            assert!(!works(short) && pinged(), "{action}: TCP only");
        }
        monitor.set_action(Protocol::Tcp, None).unwrap();
        assert!(works(long));
        // Sent back, the client's own echo request comes home.
        let (client, server) = (pair.client.mac("eth0").unwrap(), pair.server.mac("eth0").unwrap());
        let from = if address.is_ipv4() { pair.client_addr.both()[0] } else { pair.client_addr.both()[1] };
        let protocol = if address.is_ipv4() { Protocol::Icmp } else { Protocol::Icmpv6 };
        monitor.set_action(protocol, Some(Action::Tx)).unwrap();
        let socket = PacketSocket::open(&pair.client, "eth0").unwrap();
        let request = Frame::echo(from, address, 0x7777, 1);
        socket.send(&request.macs(client, server).build()).unwrap();
        let expected = Frame::echo(address, from, 0x7777, 1).macs(server, client).build();
        let home = socket.recv_matching(long, |frame| frame == expected).unwrap();
        assert!(home.is_some(), "{address}");
        monitor.set_action(protocol, None).unwrap();
    }
}

#[test]
fn settings_changed_by_two_threads_are_both_kept() {
    let monitor = monitor(0);
    let rounds = common::times(2_000, 20_000, 200);
    std::thread::scope(|scope| {
        scope.spawn(|| (0..rounds).for_each(|n| monitor.set_sample(1_000_000 + n as u32).unwrap()));
        for _ in 0..rounds {
            monitor.set_action(Protocol::Udp, Some(Action::Drop)).unwrap();
            assert_eq!(monitor.test_run(&udp4().build()).unwrap().action, Action::Drop);
            monitor.set_action(Protocol::Udp, None).unwrap();
            assert_eq!(monitor.test_run(&udp4().build()).unwrap().action, Action::Pass);
        }
    });
}
