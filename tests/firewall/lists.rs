//! Lists replaced whole: all or nothing, on trial (trap F8), while packets flow.

use std::{
    net::IpAddr,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use crate::common::{
    judge,
    rules::{ALLOWED, DENIED, ENGINES, expired, load, on, packet},
};
use xdpkit::{Action, AttachOptions, Engine, Error, Firewall, FirewallConfig, Reason, Rule, Selector, Stage as _};
use xdpkit_lab::{PacketSocket, frame::Frame, topology::Pair};

#[test]
fn a_list_says_each_thing_once() {
    let firewall = load(Engine::Trie);
    let rules = [("10.0.0.0/8", Rule::deny()), ("10.9.9.9/8", Rule::deny()), ("11.0.0.0/8", Rule::allow())];
    let done = firewall.replace_all(rules.map(|(text, rule)| (on(text), rule))).unwrap();
    assert_eq!((done.added, done.duplicates), (2, 1));
    let error =
        firewall.replace_all([(on("10.0.0.0/8"), Rule::deny()), (on("10.1.1.1/8"), Rule::allow())]).unwrap_err();
    assert_eq!(error.to_string(), "`10.0.0.0/8` has two rules in one list: deny and allow");
    assert_eq!(firewall.len().unwrap(), 2);
}

#[test]
fn f8_a_list_returns_unless_the_new_one_is_confirmed() {
    for engine in ENGINES {
        let firewall = load(engine);
        let frame = packet("10.1.1.9", "192.0.2.1", "tcp/80");
        let new = || [(on("10.0.0.0/8"), Rule::deny()), (on("10.1.1.9"), Rule::deny())];
        // Long enough for a slow machine to do in it what it has to.
        let trial = Duration::from_secs(2);
        firewall.insert(on("10.1.1.9"), Rule::allow()).unwrap();
        // Not confirmed: the program itself returns to the old list.
        let pending = firewall.replace_all_unless_confirmed(new(), trial).unwrap();
        assert_eq!(judge(&firewall, &frame), DENIED);
        let refused =
            [firewall.insert(on("10.2.0.0/16"), Rule::deny()).unwrap_err(), firewall.replace_all(new()).unwrap_err()];
        assert!(refused.iter().all(|error| matches!(error, Error::ListPending { .. })), "{refused:?}");
        assert_eq!(firewall.len().unwrap(), 2);
        thread::sleep(trial + Duration::from_millis(20));
        assert_eq!(judge(&firewall, &frame), ALLOWED);
        assert_eq!(pending.remaining().unwrap(), Duration::ZERO);
        assert!(matches!(pending.confirm(), Err(Error::NotConfirmed { .. })));
        assert_eq!(firewall.len().unwrap(), 1);
        // Taken back by hand.
        firewall.replace_all_unless_confirmed(new(), Duration::from_secs(60)).unwrap().roll_back().unwrap();
        assert_eq!(judge(&firewall, &frame), ALLOWED);
        // Confirmed: it stays.
        let pending = firewall.replace_all_unless_confirmed(new(), trial).unwrap();
        assert_eq!(pending.replaced().unwrap().added, 1);
        pending.confirm().unwrap();
        thread::sleep(trial + Duration::from_millis(20));
        assert_eq!(judge(&firewall, &frame), DENIED);
        assert!(firewall.pending().unwrap().is_none());
        assert_eq!(firewall.get(on("10.1.1.9")).unwrap().unwrap().count.packets, 4, "counted in both lists");
    }
}

#[test]
fn each_packet_is_judged_by_one_list_or_the_other() {
    // Both lists deny all of these packets, each by rules that the other has not or has the other way round: what is
    // judged by parts of both passes.
    let lists: [&[(&str, Rule)]; 2] = [
        &[("10.0.0.0/8", Rule::deny()), ("10.1.1.0/24 udp", Rule::deny())],
        &[
            ("10.0.0.0/8", Rule::allow()),
            ("10.1.0.0/16", Rule::allow()),
            ("10.1.1.0/24 udp", Rule::allow()),
            ("10.1.1.9", Rule::deny()),
        ],
    ];
    let frames = ["tcp/80", "udp/80", "47"].map(|what| packet("10.1.1.9", "192.0.2.1", what));
    for engine in ENGINES {
        let firewall = load(engine);
        let list = |at: usize| lists[at].iter().map(|(text, rule)| (on(text), *rule)).collect::<Vec<_>>();
        firewall.replace_all(list(0)).unwrap();
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        for frame in &frames {
                            assert_eq!(firewall.test_run(frame).unwrap().action, Action::Drop, "both lists deny it");
                        }
                    }
                });
            }
            for round in 1..crate::common::times(100, 10_000, 5) {
                firewall.replace_all(list(round % 2)).unwrap();
            }
            over.store(true, Ordering::Relaxed);
        });
        assert_eq!(firewall.stats().unwrap().passed().packets, 0);
    }
}

#[test]
fn an_edit_shows_packets_the_old_rule_or_the_new_one() {
    // The rule changes, goes and comes; whatever it is at a moment, the packet is denied by it or by the one behind it.
    let end = |seconds| Rule::deny().expires_in(Duration::from_secs(seconds));
    for engine in ENGINES {
        let firewall = load(engine);
        firewall.insert(on("10.0.0.0/8"), end(1000)).unwrap();
        let frame = packet("10.1.1.9", "192.0.2.1", "tcp/80");
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        assert_eq!(firewall.test_run(&frame).unwrap().action, Action::Drop);
                    }
                });
            }
            for round in 0..crate::common::times(100_000, 2_000_000, 1_000) as u64 {
                match round % 4 {
                    0 | 1 => drop(firewall.insert(on("10.1.1.0/24"), end(1000 + round)).unwrap()),
                    2 => drop(firewall.insert(on("10.1.1.0/24 tcp"), Rule::deny()).unwrap()),
                    _ => drop(firewall.remove(on("10.1.1.0/24 tcp")).unwrap()),
                }
                if round % 7 == 0 {
                    firewall.remove(on("10.1.1.0/24")).unwrap();
                }
            }
            over.store(true, Ordering::Relaxed);
        });
        assert_eq!(firewall.stats().unwrap().passed().packets, 0);
    }
}

#[test]
fn packets_on_the_wire_are_judged_by_one_list_or_the_other() {
    // By one list the network denies this host, whose own rule has expired; by the other its own rule does, and the network
    // is allowed. By parts of both it would pass. The rules are in both lists, so that their counters go on.
    let lists = [
        [(on("10.0.0.0/8"), Rule::deny()), (on("10.1.1.9"), expired(Rule::deny()))],
        [(on("10.0.0.0/8"), Rule::allow()), (on("10.1.1.9"), Rule::deny())],
    ];
    for engine in ENGINES {
        let pairs = [Pair::new().unwrap(), Pair::new().unwrap()];
        let firewall = load(engine);
        firewall.replace_all(lists[0]).unwrap();
        let attach = |pair: &Pair| pair.server.run(|| firewall.attach(&AttachOptions::new("eth0"))).unwrap();
        let _attachments = pairs.each_ref().map(attach);
        let (over, sent) = (AtomicBool::new(false), AtomicU64::new(0));
        thread::scope(|scope| {
            for Pair { client, server, .. } in &pairs {
                let (over, sent) = (&over, &sent);
                scope.spawn(move || {
                    let socket = PacketSocket::open(client, "eth0").unwrap();
                    let server = server.mac("eth0").unwrap();
                    let from = (IpAddr::from([10, 1, 1, 9]), 999).into();
                    let frame = Frame::udp(from, ([10, 0, 0, 1], 80).into());
                    let frame = frame.macs(client.mac("eth0").unwrap(), server).payload(&[0; 30]).build();
                    while !over.load(Ordering::Relaxed) {
                        socket.send_many(&[&frame[..]; 8]).unwrap();
                        sent.fetch_add(8, Ordering::Relaxed);
                    }
                });
            }
            for round in 1..crate::common::times(200, 10_000, 5) {
                firewall.replace_all(lists[round % 2]).unwrap();
            }
            over.store(true, Ordering::Relaxed);
        });
        let sent = sent.into_inner();
        // What veth itself lost on the way never met the program.
        let lost = || pairs.iter().map(|pair| pair.server.run(crate::common::received_drops)).sum::<u64>();
        let counted = || firewall.stats().unwrap().reason(Reason::Denied).packets + lost();
        crate::common::wait_for(|| counted() == sent);
        assert_eq!(firewall.stats().unwrap().reason(Reason::Allowed).packets, 0, "{engine:?}");
        assert_eq!(counted(), sent, "{engine:?}: all that came was denied");
        let rules = firewall.iter().unwrap().map(|entry| entry.count).reduce(|sum, count| sum + count);
        assert_eq!(rules, Some(firewall.stats().unwrap().reason(Reason::Denied)), "each by one rule of one list");
        println!("{engine:?}: {sent} packets sent, {} lost by veth", lost());
    }
}

#[test]
fn progress_is_told_up_to_the_end() {
    for engine in ENGINES {
        let firewall = load(engine);
        let hosts = |count: u32| (0..count).map(|n| (Selector::from(IpAddr::from(n.to_be_bytes())), Rule::deny()));
        let mut told = Vec::new();
        firewall.replace_all_with_progress(hosts(4000), |now| told.push((now.done, now.total))).unwrap();
        assert_eq!(told, [(4000, 4000)]);
        let firewall = Firewall::load(&FirewallConfig::default().capacity(10_000).engine(engine)).unwrap();
        told.clear();
        firewall.replace_all_with_progress(hosts(10_000), |now| told.push((now.done, now.total))).unwrap();
        assert_eq!(told, [4096, 8192, 10_000].map(|done| (done, 10_000)));
    }
}

#[test]
fn lists_of_the_same_size_fit_after_any_number_of_edits() {
    // Scattered hosts: what takes most room. Between two lists, edits leave holes.
    let config = FirewallConfig::default().capacity(2000).engine(Engine::Compiled);
    let firewall = Firewall::load(&config).unwrap();
    let mut random = fastrand::Rng::with_seed(3);
    let mut host = || -> Selector {
        match random.bool() {
            true => IpAddr::from(random.u32(..).to_be_bytes()).into(),
            false => IpAddr::from((random.u128(..) >> 3 | 1 << 125).to_be_bytes()).into(),
        }
    };
    for round in 0..crate::common::times(10, 200, 2) {
        let mut hosts: Vec<Selector> = (0..2000).map(|_| host()).collect();
        let done = firewall.replace_all(hosts.iter().map(|host| (*host, Rule::deny())));
        assert_eq!(done.unwrap().added, 2000, "round {round}");
        for old in &mut hosts {
            firewall.remove(*old).unwrap().unwrap();
            *old = host();
            firewall.insert(*old, Rule::allow()).unwrap();
        }
        for host in hosts.iter().step_by(20) {
            let source = host.source().addr();
            let to = if source.is_ipv4() { "192.0.2.1" } else { "2001:db8::1" };
            assert_eq!(judge(&firewall, &packet(&source.to_string(), to, "udp/53")), ALLOWED, "{host}");
        }
    }
}

#[test]
fn times_without_end_are_taken() {
    let firewall = load(Engine::Trie);
    let frame = packet("10.0.0.1", "192.0.2.1", "udp/53");
    firewall.insert(on("10.0.0.0/8"), Rule::deny().expires_in(Duration::MAX)).unwrap();
    assert_eq!(judge(&firewall, &frame), DENIED);
    let pending = firewall.replace_all_unless_confirmed([(on("10.0.0.1"), Rule::allow())], Duration::MAX).unwrap();
    assert_eq!(judge(&firewall, &frame), ALLOWED);
    assert!(pending.remaining().unwrap() > Duration::from_secs(60));
    pending.roll_back().unwrap();
    assert_eq!(judge(&firewall, &frame), DENIED);
}
