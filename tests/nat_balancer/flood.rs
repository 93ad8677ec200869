//! The NAT balancer in a flood of SYNs that nobody means: what is established stays, and the flood is seen. Traps: L14, H2.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use crate::common::{
    busy::Busy,
    nat::{Bench, PATIENCE, ROUTED_VIPS as VIPS, SERVICES, attach, backends, ip, service},
};
use xdpkit::{ConnectionState, NatBalancer, NatConfig, NatMode, NatService, Reason, ServiceAddr, Stage as _};
use xdpkit_lab::{
    PacketSocket,
    frame::{Frame, tcp},
    topology::Nat,
    traffic::TcpEcho,
};

/// A client that nobody has ever heard of, out of many millions.
fn stranger(ipv6: bool, number: u32) -> SocketAddr {
    let address: IpAddr = if ipv6 {
        [0x2001, 0xdb8, 0xf, 0, 0, 0, (number >> 16) as u16, number as u16].into()
    } else {
        (0x0b00_0000 + number).to_be_bytes().into()
    };
    SocketAddr::new(address, 1024 + (number % 60_000) as u16)
}

fn establish(bench: &Bench, name: &ServiceAddr, client: SocketAddr) {
    let vip = SocketAddr::new(name.address, name.port.unwrap());
    assert_eq!(bench.client_sends(&Frame::tcp(client, vip)).reason, Reason::Forwarded);
    let found = bench.balancer.find(client, name).unwrap().unwrap();
    let answer = Frame::tcp(found.backend, found.source).flags(tcp::SYN | tcp::ACK).sequence(1000, 2);
    assert_eq!(bench.backend_sends(&answer).reason, Reason::Answered);
    let confirm = Frame::tcp(client, vip).flags(tcp::ACK).sequence(2, 1001);
    assert_eq!(bench.client_sends(&confirm).reason, Reason::Forwarded);
}

#[test]
fn h2_a_flood_of_ten_times_the_table_breaks_no_established_connection() {
    for ipv6 in [false, true] {
        // Half of the table's capacity is established: that much is promised.
        let established = crate::common::times(200, 1000, 30) as u16;
        let capacity = 2 * u32::from(established);
        let bench = Bench::with_services(&NatConfig::default().capacity(capacity), NatMode::Full);
        let name = service(SERVICES[if ipv6 { 2 } else { 0 }].0);
        let vip = SocketAddr::new(name.address, 80);
        let client = |n: u16| {
            let address = if ipv6 { format!("2001:db8:a::{}", 20 + n % 30) } else { format!("10.0.0.{}", 20 + n % 30) };
            SocketAddr::new(ip(&address), 2000 + n / 30)
        };
        for n in 0..established {
            establish(&bench, &name, client(n));
        }
        let before = bench.balancer.stats().unwrap();
        for number in 0..10 * capacity {
            let outcome = bench.client_sends(&Frame::tcp(stranger(ipv6, number), vip));
            assert!(matches!(outcome.reason, Reason::Forwarded | Reason::ConnectionsFull), "{:?}", outcome.reason);
        }
        let flooded = bench.balancer.stats().unwrap().since(&before);
        for n in 0..established {
            let frame = Frame::tcp(client(n), vip).flags(tcp::ACK).sequence(2, 1001);
            assert_eq!(bench.client_sends(&frame).reason, Reason::Forwarded, "connection {n}");
        }
        let counts = bench.balancer.counts().unwrap();
        assert_eq!(counts.state(ConnectionState::TcpEstablished), established.into());
        let evicted = bench.balancer.evicted().unwrap();
        let opened = flooded.reason(Reason::Forwarded).packets;
        let refused = flooded.reason(Reason::ConnectionsFull).packets;
        assert_eq!(opened + refused, u64::from(10 * capacity));
        assert_eq!(opened, evicted + counts.state(ConnectionState::TcpSyn), "each went or is there: {refused} refused");
        assert!(evicted > u64::from(5 * capacity), "{evicted} of the flood's own went");
        assert_eq!(bench.balancer.service_stats(&name).unwrap().refused, refused);
        println!(
            "ipv6 {ipv6}: {established} established; of {} SYNs {evicted} evicted, {refused} refused",
            10 * capacity
        );
        // A client that is serious is served in the middle of it.
        establish(&bench, &name, SocketAddr::new(client(0).ip(), 9999));
    }
}

#[test]
fn l14_what_is_evicted_goes_in_both_directions_and_what_stays_stays_in_both() {
    for mode in [NatMode::Full, NatMode::Destination] {
        let bench = Bench::with_services(&NatConfig::default().capacity(200), mode);
        let name = service(SERVICES[0].0);
        let vip = SocketAddr::new(name.address, 80);
        // Not confirmed, so any may go for another.
        let opened: Vec<_> = (0..1000)
            .filter_map(|n| {
                let client = SocketAddr::new(ip(&format!("10.0.0.{}", 20 + n % 30)), 2000 + n / 30);
                let outcome = bench.client_sends(&Frame::tcp(client, vip)).reason;
                let found = bench.balancer.find(client, &name).unwrap();
                let is_there = if found.is_some() { Reason::Forwarded } else { Reason::ConnectionsFull };
                assert_eq!(outcome, is_there, "{mode:?} {client}");
                found
            })
            .collect();
        let refused = 1000 - opened.len();
        assert!(refused < 50, "{mode:?}: {refused}");
        let mut gone = 0;
        for was in &opened {
            let there = bench.balancer.find(was.client, &name).unwrap().is_some();
            gone += usize::from(!there);
            let acknowledges = Frame::tcp(was.client, vip).flags(tcp::ACK).sequence(2, 1);
            let answers = Frame::tcp(was.backend, was.source).flags(tcp::ACK).sequence(1, 2);
            let found = bench.client_sends(&acknowledges).reason == Reason::Forwarded;
            let back = bench.backend_sends(&answers);
            assert_eq!(found, there, "{mode:?} {was}");
            // A port may have been given to another client since.
            let others = bench.balancer.find_by_backend(was.backend, was.source).unwrap();
            assert_eq!(back.reason == Reason::Answered, !others.is_empty(), "{mode:?} {was}");
            assert_eq!(others.iter().any(|other| other.client == was.client), there);
        }
        assert!((300..1000).contains(&gone), "{gone} of 1000 went");
        let evicted = bench.balancer.evicted().unwrap();
        assert!((gone..=gone + refused).contains(&(evicted as usize)), "{evicted} and {gone}, {refused} refused");
        println!("{mode:?}: {gone} went, {refused} were refused");
    }
}

#[test]
fn h2_real_connections_go_on_in_a_flood_and_new_ones_come_about() {
    let established = crate::common::times(200, 1000, 20);
    let capacity = 2 * established as u32;
    let lab = Nat::new(2, 4).unwrap();
    let balancer = NatBalancer::load(&NatConfig::default().capacity(capacity)).unwrap();
    let _attached = attach(&lab, &balancer);
    // Answers to strangers go to the second client, who throws them away.
    for (to, via) in ["11.0.0.0/8", "2001:db8:f::/48"].into_iter().zip(lab.client_addrs[1].both()) {
        lab.balancer.add_route(to.parse().unwrap(), via).unwrap();
    }
    let mut echoes = Vec::new();
    for ipv6 in [false, true] {
        let at = backends(&lab, ipv6, 8080);
        echoes.extend(lab.backends.iter().zip(&at).map(|(ns, at)| TcpEcho::start(ns, *at).unwrap()));
        balancer.insert(ServiceAddr::tcp(ip(VIPS[usize::from(ipv6)]), 80), &NatService::new(at)).unwrap();
    }
    let services = VIPS.map(|vip| SocketAddr::new(ip(vip), 80));
    let busy = Busy::start(&lab.clients[0], &services, established);
    busy.all_go_on();
    let before = balancer.stats().unwrap();

    // Both families by turns, until ten times the table has come of each.
    let socket = PacketSocket::open(&lab.clients[1], "eth0").unwrap();
    socket.set_qdisc_bypass(true).unwrap();
    let [from, to] = [&lab.clients[1], &lab.balancer].map(|host| host.mac("eth0").unwrap());
    let stop = AtomicBool::new(false);
    let strangers = || balancer.services().iter().map(|name| balancer.service_stats(name).unwrap()).collect::<Vec<_>>();
    let wanted = 10 * u64::from(capacity);
    let mut visits = 0;
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut number = 0;
            while !stop.load(Ordering::SeqCst) {
                let frames: Vec<Vec<u8>> = (0..64)
                    .map(|n| {
                        let ipv6 = n % 2 == 1;
                        let vip = services[usize::from(ipv6)];
                        Frame::tcp(stranger(ipv6, number + n / 2), vip).macs(from, to).build()
                    })
                    .collect();
                number += 32;
                socket.send_many(&frames.iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap();
                thread::sleep(Duration::from_micros(500));
            }
        });
        let end = Instant::now() + 6 * PATIENCE;
        while Instant::now() < end && strangers().iter().any(|stats| stats.opened + stats.refused < wanted) {
            // Who is serious repeats a SYN that found no room.
            for vip in services {
                visits += 1;
                let back = xdpkit_lab::traffic::tcp_echo(&lab.clients[0], vip, b"serious", PATIENCE);
                assert_eq!(back.unwrap_or_else(|error| panic!("visit {visits}: {error}")), b"serious");
            }
        }
        busy.all_go_on();
        stop.store(true, Ordering::SeqCst);
    });
    let stats = strangers();
    assert!(stats.iter().all(|stats| stats.opened + stats.refused >= wanted), "{stats:?}");
    busy.all_go_on();
    assert_eq!(busy.broken(), BTreeMap::new());
    let evicted = balancer.evicted().unwrap();
    assert!(evicted > wanted, "the flood is seen: {evicted} evicted, {stats:?}");
    let flooded = balancer.stats().unwrap().since(&before);
    println!("{established} established, {visits} visits; {evicted} evicted, {stats:?}, {:?}", flooded.reasons);
    let known = balancer.connections().unwrap();
    for client in &busy.clients {
        let found = known.iter().find(|found| found.client == *client).expect("it is there");
        assert_eq!(found.state, ConnectionState::TcpEstablished);
    }
}
