//! Health checks against real servers in a namespace.
#![cfg(feature = "health")]

mod common;

use std::{
    io::Write as _,
    net::{IpAddr, SocketAddr, TcpListener},
    sync::mpsc::{self, Receiver},
    thread,
    time::{Duration, Instant},
};

use xdpkit::{Health, HealthChange, HealthCheck, HealthChecks, UnsentReason};
use xdpkit_lab::{
    topology::Pair,
    traffic::{HttpServer, TcpEcho},
};

type Changes = Receiver<HealthChange<&'static str>>;

fn checks() -> (HealthChecks<&'static str>, Changes) {
    let (sender, receiver) = mpsc::channel();
    let sender = std::sync::Mutex::new(sender);
    // The receiver is gone at the end of a test, when that does not matter.
    (HealthChecks::new(move |change| drop(sender.lock().unwrap().send(change))), receiver)
}

fn quick(check: HealthCheck) -> HealthCheck {
    check.interval(Duration::from_millis(20)).timeout(Duration::from_millis(500))
}

/// The next change of a check, at most some seconds away.
fn next(changes: &Changes) -> HealthChange<&'static str> {
    changes.recv_timeout(Duration::from_secs(20)).expect("a change in time")
}

fn ends(lab: &Pair) -> [SocketAddr; 2] {
    lab.server_addr.both().map(|ip: IpAddr| SocketAddr::new(ip, 8080))
}

#[test]
fn a_server_is_up_while_it_listens() {
    let lab = Pair::new().unwrap();
    for target in ends(&lab) {
        let server = TcpEcho::start(&lab.server, target).unwrap();
        let (checks, changes) = checks();
        lab.client.run(|| checks.insert("echo", quick(HealthCheck::tcp(target)))).unwrap();
        let first = next(&changes);
        assert_eq!((first.key, first.health, first.problem), ("echo", Health::Up, None));
        assert_eq!(checks.get(&"echo"), Some(Health::Up));
        drop(server);
        let second = next(&changes);
        assert_eq!(second.health, Health::Down);
        assert!(second.problem.as_ref().unwrap().contains("refused"), "{second:?}");
        let _again = TcpEcho::start(&lab.server, target).unwrap();
        assert_eq!(next(&changes).health, Health::Up);
        assert_eq!(checks.remove(&"echo").unwrap().target, target);
        assert!(checks.is_empty());
    }
}

#[test]
fn http_is_judged_by_its_status() {
    let lab = Pair::new().unwrap();
    let [target, _] = ends(&lab);
    let _server = HttpServer::start(&lab.server, target, |_| "well".into()).unwrap();
    let (checks, changes) = checks();
    lab.client.run(|| checks.insert("page", quick(HealthCheck::http(target, "/")))).unwrap();
    assert_eq!(next(&changes).health, Health::Up);
    // The same key again: another check, from the beginning.
    lab.client.run(|| checks.insert("page", quick(HealthCheck::http(target, "/bytes/none")))).unwrap();
    let change = next(&changes);
    assert_eq!((change.health, change.problem.as_deref()), (Health::Down, Some("status 400")));
}

#[test]
fn a_server_that_says_nothing_or_nonsense_is_down() {
    let lab = Pair::new().unwrap();
    let [silent, talker] = [8080, 8081].map(|port| SocketAddr::new(lab.server_addr.both()[0], port));
    let (silent_listener, listener) =
        lab.server.run(|| (TcpListener::bind(silent).unwrap(), TcpListener::bind(talker).unwrap()));
    let babble = thread::spawn(move || {
        for _ in 0..3 {
            listener.accept().unwrap().0.write_all(b"SSH-2.0-OpenSSH_9.2p1\r\n").unwrap();
        }
    });
    let (checks, changes) = checks();
    let short = |port| quick(HealthCheck::http(port, "/")).timeout(Duration::from_millis(60));
    lab.client.run(|| checks.insert("silent", short(silent))).unwrap();
    let change = next(&changes);
    assert_eq!((change.health, change.problem.as_deref()), (Health::Down, Some("no answer in time")));
    checks.remove(&"silent");
    drop(silent_listener);
    lab.client.run(|| checks.insert("talker", quick(HealthCheck::http(talker, "/")))).unwrap();
    let change = next(&changes);
    assert_eq!((change.health, change.problem.as_deref()), (Health::Down, Some("no HTTP answer")));
    babble.join().unwrap();
}

#[test]
fn a_host_that_does_not_answer_is_down_after_as_many_timeouts_as_it_takes() {
    let lab = Pair::new().unwrap();
    let [target, _] = ends(&lab);
    // Nobody answers for it, so the connection hangs until the time is up.
    let nobody = SocketAddr::new("10.0.0.99".parse().unwrap(), target.port());
    lab.client.add_neighbour("eth0", nobody.ip(), [2, 0, 0, 0, 0, 99]).unwrap();
    let (checks, changes) = checks();
    let check = quick(HealthCheck::tcp(nobody)).timeout(Duration::from_millis(100)).thresholds(1, 3);
    let start = Instant::now();
    lab.client.run(|| checks.insert("nobody", check)).unwrap();
    assert_eq!(next(&changes).health, Health::Down);
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(300), "three probes, not {took:?}");
}

#[test]
fn nothing_is_heard_of_a_check_that_was_removed() {
    let lab = Pair::new().unwrap();
    let [target, _] = ends(&lab);
    for _ in 0..common::times(20, 200, 5) {
        let (checks, changes) = checks();
        lab.client.run(|| checks.insert("gone", quick(HealthCheck::tcp(target)).thresholds(1, 1))).unwrap();
        checks.remove(&"gone");
        while changes.try_recv().is_ok() {}
        thread::sleep(Duration::from_millis(2));
        assert!(changes.try_recv().is_err());
        assert_eq!(checks.get(&"gone"), None);
    }
}

#[test]
fn a_callback_may_end_its_own_check_and_all_end_with_the_value() {
    let lab = Pair::new().unwrap();
    let [target, _] = ends(&lab);
    let (sender, receiver) = mpsc::channel();
    let sender = std::sync::Mutex::new(sender);
    let checks = std::sync::Arc::new_cyclic(|weak: &std::sync::Weak<HealthChecks<u32>>| {
        let weak = weak.clone();
        HealthChecks::new(move |change: HealthChange<u32>| {
            if let Some(checks) = weak.upgrade() {
                checks.remove(&change.key);
            }
            sender.lock().unwrap().send(change.key).unwrap();
        })
    });
    lab.client.run(|| checks.insert(7, quick(HealthCheck::tcp(target)).thresholds(1, 1))).unwrap();
    assert_eq!(receiver.recv_timeout(Duration::from_secs(20)).unwrap(), 7);
    assert_eq!(checks.len(), 0);
}

#[test]
fn a_callback_may_look_at_the_checks_while_one_is_replaced() {
    let lab = Pair::new().unwrap();
    let [target, _] = ends(&lab);
    let checks = std::sync::Arc::new_cyclic(|weak: &std::sync::Weak<HealthChecks<u32>>| {
        let weak = weak.clone();
        HealthChecks::new(move |_| {
            thread::sleep(Duration::from_millis(5));
            let _ = weak.upgrade().map(|checks| checks.len());
        })
    });
    for _ in 0..20 {
        let check = quick(HealthCheck::tcp(target)).thresholds(1, 1);
        lab.client.run(|| checks.insert(7, check)).unwrap();
        thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(checks.len(), 1);
}

#[test]
fn probes_come_from_the_address_and_port_that_was_asked_for_again_and_again() {
    let lab = Pair::new().unwrap();
    let [target, _] = ends(&lab);
    let server = TcpEcho::start(&lab.server, target).unwrap();
    let source = SocketAddr::new(lab.client_addr.both()[0], 41_000);
    let (checks, changes) = checks();
    lab.client.run(|| checks.insert("bound", quick(HealthCheck::tcp(target)).source(source).mark(7))).unwrap();
    assert_eq!(next(&changes).health, Health::Up);
    let end = Instant::now() + Duration::from_secs(20);
    while server.connections() < 5 {
        assert!(Instant::now() < end, "{} connections", server.connections());
        thread::sleep(Duration::from_millis(5));
    }
    assert!(server.peers().iter().all(|peer| *peer == source), "{:?}", server.peers());
    assert!(changes.try_recv().is_err(), "no probe failed");
}

#[test]
fn a_source_that_is_not_this_hosts_takes_no_backend_down() {
    let lab = Pair::new().unwrap();
    let [target, _] = ends(&lab);
    let _server = TcpEcho::start(&lab.server, target).unwrap();
    let (checks, changes) = checks();
    let check = quick(HealthCheck::tcp(target)).source("10.0.0.77:0".parse().unwrap()).thresholds(1, 1);
    lab.client.run(|| checks.insert("late", check)).unwrap();
    let end = Instant::now() + Duration::from_secs(60);
    while checks.stats().unsent < 3 {
        assert!(Instant::now() < end, "{:?}", checks.stats());
        thread::sleep(Duration::from_millis(5));
    }
    let unsent = checks.stats().last_unsent.unwrap();
    assert_eq!((unsent.target, unsent.reason), (target, UnsentReason::Source));
    assert_eq!((checks.get(&"late"), checks.stats().failed), (Some(Health::Unknown), 0));
    lab.client.add_address("eth0", "10.0.0.77/24".parse().unwrap()).unwrap();
    assert_eq!(next(&changes).health, Health::Up);
    lab.client.remove_address("eth0", "10.0.0.77/24".parse().unwrap()).unwrap();
    let before = checks.stats().unsent;
    while checks.stats().unsent < before + 3 {
        assert!(Instant::now() < end, "{:?}", checks.stats());
        thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(checks.get(&"late"), Some(Health::Up));
}

#[test]
fn each_check_is_in_the_namespace_of_the_thread_that_inserted_it() {
    let lab = Pair::new().unwrap();
    let target: SocketAddr = "127.0.0.1:8080".parse().unwrap();
    let _server = TcpEcho::start(&lab.server, target).unwrap();
    let (checks, changes) = checks();
    let check = quick(HealthCheck::tcp(target)).thresholds(1, 1);
    lab.server.run(|| checks.insert("there", check.clone())).unwrap();
    let change = next(&changes);
    assert_eq!((change.key, change.health), ("there", Health::Up));
    lab.client.run(|| checks.insert("here", check.clone())).unwrap();
    let change = next(&changes);
    assert_eq!((change.key, change.health), ("here", Health::Down));
    // Taken to the other one.
    lab.server.run(|| checks.insert("here", check.clone())).unwrap();
    let change = next(&changes);
    assert_eq!((change.key, change.health), ("here", Health::Up));
    checks.remove(&"here");
    checks.remove(&"there");
    assert!(checks.stats().succeeded >= 2 && checks.stats().failed >= 1, "{:?}", checks.stats());
    assert_eq!((checks.stats().in_flight, checks.stats().waiting), (0, 0));
}

#[test]
fn a_slow_callback_delays_no_probe_and_hears_of_what_is_new() {
    let lab = Pair::new().unwrap();
    let [target, _] = ends(&lab);
    let server = TcpEcho::start(&lab.server, target).unwrap();
    let (told, hears) = mpsc::channel();
    let (go_on, gate) = mpsc::channel::<()>();
    let (told, gate) = (std::sync::Mutex::new(told), std::sync::Mutex::new(gate));
    let checks = HealthChecks::new(move |change: HealthChange<&'static str>| {
        let _ = told.lock().unwrap().send((change.key, change.health));
        let _ = gate.lock().unwrap().recv();
    });
    let wait = |key, wanted| {
        let end = Instant::now() + Duration::from_secs(60);
        while checks.get(&key) != Some(wanted) {
            assert!(Instant::now() < end, "{key} is not {wanted}");
            thread::sleep(Duration::from_millis(5));
        }
    };
    let check = quick(HealthCheck::tcp(target)).thresholds(1, 1);
    lab.client.run(|| checks.insert("first", check.clone())).unwrap();
    let patience = Duration::from_secs(60);
    assert_eq!(hears.recv_timeout(patience).unwrap(), ("first", Health::Up));
    // The callback is held here. Others are probed, and the first one goes on, too.
    lab.client.run(|| checks.insert("second", check.clone())).unwrap();
    wait("second", Health::Up);
    drop(server);
    wait("first", Health::Down);
    wait("second", Health::Down);
    let _server = TcpEcho::start(&lab.server, target).unwrap();
    wait("first", Health::Up);
    wait("second", Health::Up);
    go_on.send(()).unwrap();
    // The first one is what was told last; the second one is told as it is.
    assert_eq!(hears.recv_timeout(patience).unwrap(), ("second", Health::Up));
    go_on.send(()).unwrap();
    drop(go_on);
    drop(_server);
    let mut downs = [hears.recv_timeout(patience).unwrap(), hears.recv_timeout(patience).unwrap()];
    downs.sort_by_key(|(key, _)| *key);
    assert_eq!(downs, [("first", Health::Down), ("second", Health::Down)]);
}

#[test]
fn a_callback_that_panics_ends_no_check() {
    let lab = Pair::new().unwrap();
    let [target, _] = ends(&lab);
    let server = TcpEcho::start(&lab.server, target).unwrap();
    let (sender, changes) = mpsc::channel();
    let sender = std::sync::Mutex::new(sender);
    let checks = HealthChecks::new(move |change: HealthChange<u32>| {
        assert_ne!(change.health, Health::Up, "this panic is part of a test");
        let _ = sender.lock().unwrap().send(change.health);
    });
    lab.client.run(|| checks.insert(1, quick(HealthCheck::tcp(target)))).unwrap();
    let end = Instant::now() + Duration::from_secs(60);
    while checks.get(&1) != Some(Health::Up) {
        assert!(Instant::now() < end);
        thread::sleep(Duration::from_millis(5));
    }
    drop(server);
    assert_eq!(changes.recv_timeout(Duration::from_secs(60)).unwrap(), Health::Down);
}
