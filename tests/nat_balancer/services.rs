//! The NAT balancer's services and backends as they come, change and go. Traps: L16 to L18.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Duration,
};

use crate::common::{
    nat::{Bench, at, ip, service},
    nat_talk::{TCP4, conversations, open, segment, tcp4},
};
use xdpkit::{
    Action, AttachOptions, BackendState, Echo, Error, NatBalancer, NatConfig, NatMode, NatService, NatTimeouts, Reason,
    Scheduler, ServiceProtocol, Stage as _, TestRun, XdpMode,
};
use xdpkit_lab::{
    bpffs::BpfFs,
    frame::{Frame, tcp},
};

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
    // The packet that ends it is one that is also noted as its last: so old is the one before.
    thread::sleep(Duration::from_millis(400));
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
        drop(attached);
        xdpkit::remove_pins(pins.path()).unwrap();
    }
}

/// What the earlier process knew of a service that it has removed is no more in the way than in that process.
#[test]
fn an_adopted_balancer_takes_back_a_service_that_was_removed_before() {
    let pins = BpfFs::new().unwrap();
    for mode in [NatMode::Full, NatMode::Destination] {
        let name = format!("nat-{}", mode == NatMode::Full);
        let mut bench = Bench::with_services(&NatConfig::default().name(&name), mode);
        let options = AttachOptions::new("lo").mode(XdpMode::Generic).pin(pins.path());
        let attached = bench.lab.balancer.run(|| bench.balancer.attach(&options).unwrap());
        let with = bench.balancer.remove(&service(TCP4)).unwrap();
        bench.balancer = NatBalancer::adopt(pins.path(), &name).unwrap();
        bench.balancer.insert(service(TCP4), &with).unwrap();
        open(&bench, &service(TCP4), at("10.0.0.20:4000"));
        drop(attached);
        xdpkit::remove_pins(pins.path()).unwrap();
    }
}

/// While lists of backends replace each other, every new connection finds one of them, and after each change only those
/// of the last list.
#[test]
fn l17_a_list_is_replaced_whole_while_connections_open() {
    const LISTS: [&[(u8, u32)]; 4] = [&[(11, 1), (12, 1)], &[(13, 1), (14, 3)], &[(12, 2), (15, 1)], &[(11, 1)]];
    for scheduler in [Scheduler::Maglev, Scheduler::RoundRobin, Scheduler::LeastConnections, Scheduler::SourceHash] {
        let bench = Bench::new(&NatConfig::default().capacity(1 << 16));
        let name = service(TCP4);
        let address = |last: u8| at(&format!("192.168.178.{last}:8080"));
        let list = |round: usize| -> Vec<_> {
            LISTS[round % 4].iter().map(|(last, weight)| (address(*last), *weight)).collect()
        };
        let mut with = NatService::default().scheduler(scheduler);
        with.backends = list(0);
        bench.balancer.insert(name, &with).unwrap();
        let next = AtomicUsize::new(0);
        let opens = |allowed: &[u8]| {
            let n = next.fetch_add(1, Ordering::SeqCst);
            let client = SocketAddr::new(ip(&format!("10.0.0.{}", 20 + n % 30)), 1024 + (n / 30) as u16);
            let (from, to) = bench.macs_of_clients();
            let frame = Frame::tcp(client, at("10.0.0.100:80")).macs(from, to).build();
            let request = TestRun::new(&frame).ingress(&bench.front, 0);
            let verdict = bench.lab.balancer.run(|| bench.balancer.run(&request)).unwrap();
            assert_eq!(
                verdict.action,
                Action::Redirect,
                "{scheduler:?} {client}: {:?}",
                bench.balancer.stats().unwrap()
            );
            assert!(allowed.contains(&verdict.frame[33]), "{scheduler:?} {client} went to {}", verdict.frame[33]);
        };
        let rounds = crate::common::times(40, 200, 4);
        std::thread::scope(|scope| {
            let changing = scope.spawn(|| {
                for round in 1..=rounds {
                    bench.balancer.set_backends(&name, &list(round)).unwrap();
                    let allowed: Vec<u8> = LISTS[round % 4].iter().map(|(last, _)| *last).collect();
                    (0..10).for_each(|_| opens(&allowed));
                }
            });
            while !changing.is_finished() {
                opens(&[11, 12, 13, 14, 15]);
            }
        });
        assert_eq!(bench.balancer.service_stats(&name).unwrap().no_backend, 0);
        assert!(next.into_inner() >= 11 * rounds);
    }
}

#[test]
fn a_service_that_comes_back_knows_nothing_of_its_old_connections() {
    for mode in [NatMode::Full, NatMode::Destination] {
        let bench = Bench::with_services(&NatConfig::default(), mode);
        let old = open(&bench, &service(TCP4), at("10.0.0.20:4000"));
        let with = bench.balancer.remove(&service(TCP4)).unwrap();
        // Its number goes to the next one.
        let other = service("tcp/10.0.0.100:81");
        bench.balancer.insert(other, &NatService::new([at("192.168.178.12:8080")]).mode(mode)).unwrap();
        bench.balancer.insert(service(TCP4), &with).unwrap();
        for port in [80, 81] {
            let goes_on = Frame::tcp(at("10.0.0.20:4000"), SocketAddr::new(ip("10.0.0.100"), port));
            let outcome = bench.client_sends(&goes_on.flags(tcp::ACK).sequence(2, 1001));
            assert_eq!((outcome.action, outcome.reason), (Action::Drop, Reason::NoConnection), "{mode:?} {port}");
        }
        let late = Frame::tcp(old.backend, old.source).flags(tcp::ACK).sequence(1001, 2);
        assert_eq!(bench.backend_sends(&late).action, Action::Pass, "{mode:?}");
        open(&bench, &service(TCP4), at("10.0.0.20:4000"));
        open(&bench, &other, at("10.0.0.20:4000"));
        assert_eq!(bench.balancer.service_stats(&service(TCP4)).unwrap().opened, 1, "counted from its return on");
    }
}
