//! Rules with qualifiers, ends and counters, lists swapped whole: trap F9, the precedence, and an independent model.

mod common;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use common::judge;
use fastrand::Rng;
use xdpkit::{
    Action, AttachOptions, Decision, Engine, Error, Firewall, FirewallConfig, Reason, Rule, Selector, Stage as _,
    ipnet::IpNet,
};
use xdpkit_lab::{bpffs::BpfFs, frame::Frame, topology::Pair};

const ENGINES: [Engine; 2] = [Engine::Trie, Engine::Compiled];
const DENIED: (Action, Reason) = (Action::Drop, Reason::Denied);
const ALLOWED: (Action, Reason) = (Action::Pass, Reason::Allowed);
const DEFAULT: (Action, Reason) = (Action::Pass, Reason::DefaultAction);

fn load(engine: Engine) -> Firewall {
    Firewall::load(&FirewallConfig::default().capacity(4000).engine(engine)).unwrap()
}

/// A rule that ended long ago: programs may take up to 10 ms to notice.
fn expired(mut rule: Rule) -> Rule {
    rule.expires_at = Some(Duration::from_nanos(1));
    rule
}

fn on(text: &str) -> Selector {
    text.parse().unwrap()
}

/// A packet: source, destination, and `tcp/80`, `udp/53`, or a protocol number.
fn packet(source: &str, destination: &str, what: &str) -> Vec<u8> {
    let (source, destination): (IpAddr, IpAddr) = (source.parse().unwrap(), destination.parse().unwrap());
    match what.split_once('/') {
        Some(("tcp", port)) => Frame::tcp((source, 999).into(), (destination, port.parse().unwrap()).into()).build(),
        Some((_, port)) => Frame::udp((source, 999).into(), (destination, port.parse().unwrap()).into()).build(),
        None => Frame::ip(source, destination, what.parse().unwrap()).payload(&[0; 24]).build(),
    }
}

#[test]
fn f9_a_rule_that_does_not_apply_leaves_it_to_the_next_shorter_prefix() {
    let long_ago = expired(Rule::deny());
    for engine in ENGINES {
        for (a, b, c, host, other) in [
            ("10.0.0.0/8", "10.1.0.0/16", "10.1.1.0/24", "10.1.1.9", "192.0.2.1"),
            ("2001:db8::/32", "2001:db8:1::/48", "2001:db8:1:1::/64", "2001:db8:1:1::9", "2001:db8:ffff::1"),
        ] {
            for (described, rules, what, verdict) in [
                ("expired, nothing shorter", vec![(c, "", long_ago)], "tcp/80", DEFAULT),
                (
                    "expired, shorter denies",
                    vec![(a, "", Rule::deny()), (c, "", expired(Rule::allow()))],
                    "tcp/80",
                    DENIED,
                ),
                (
                    "expired, expired, allowed",
                    vec![(a, "", Rule::allow()), (b, "", long_ago), (c, "", long_ago)],
                    "tcp/80",
                    ALLOWED,
                ),
                ("another protocol", vec![(a, "", Rule::deny()), (c, " udp", Rule::allow())], "tcp/80", DENIED),
                ("the protocol", vec![(a, "", Rule::deny()), (c, " tcp", Rule::allow())], "tcp/80", ALLOWED),
                ("another port", vec![(a, "", Rule::deny()), (c, " tcp/81-90", Rule::allow())], "tcp/80", DENIED),
                ("the last port", vec![(a, "", Rule::deny()), (c, " tcp/70-80", Rule::allow())], "tcp/80", ALLOWED),
                ("the first port", vec![(a, "", Rule::deny()), (c, " udp/80-90", Rule::allow())], "udp/80", ALLOWED),
                ("no ports", vec![(a, "", Rule::deny()), (c, " tcp/0-65535", Rule::allow())], "47", DENIED),
                ("a protocol by number", vec![(a, "", Rule::allow()), (c, " 47", Rule::deny())], "47", DENIED),
                ("counts only", vec![(a, "", Rule::allow()), (c, "", Rule::deny().count_only())], "tcp/80", ALLOWED),
                (
                    "a rule between",
                    vec![(a, "", Rule::deny()), (c, " udp", Rule::deny()), (b, "", Rule::allow())],
                    "tcp/80",
                    ALLOWED,
                ),
            ] {
                // Whatever the order in which they come.
                for reversed in [false, true] {
                    let firewall = load(engine);
                    let mut rules: Vec<_> =
                        rules.iter().map(|(net, what, rule)| (on(&format!("{net}{what}")), *rule)).collect();
                    if reversed {
                        rules.reverse();
                    }
                    for (selector, rule) in &rules {
                        firewall.insert(*selector, *rule).unwrap();
                    }
                    let frame = packet(host, other, what);
                    assert_eq!(judge(&firewall, &frame), verdict, "{engine:?} {host}: {described}");
                    let listed: Vec<_> = firewall.iter().unwrap().map(|entry| (entry.selector, entry.rule)).collect();
                    firewall.replace_all(listed).unwrap();
                    assert_eq!(judge(&firewall, &frame), verdict, "{engine:?} {host}: {described}, replaced");
                    for (selector, _) in &rules {
                        firewall.remove(*selector).unwrap().unwrap();
                    }
                    assert_eq!(judge(&firewall, &frame), DEFAULT, "{engine:?} {host}: {described}, removed");
                }
            }
        }
    }
}

#[test]
fn f9_a_prefix_between_catches_what_falls_through_as_soon_as_it_comes() {
    for engine in ENGINES {
        let firewall = load(engine);
        let frame = packet("10.1.1.9", "192.0.2.1", "tcp/80");
        firewall.insert(on("10.1.1.0/24 udp"), Rule::deny()).unwrap();
        assert_eq!(judge(&firewall, &frame), DEFAULT);
        firewall.insert(on("10.0.0.0/8"), Rule::deny()).unwrap();
        assert_eq!(judge(&firewall, &frame), DENIED);
        firewall.insert(on("10.1.0.0/16"), Rule::allow()).unwrap();
        assert_eq!(judge(&firewall, &frame), ALLOWED);
        firewall.insert(on("10.1.0.0/16"), Rule::deny()).unwrap();
        assert_eq!(judge(&firewall, &frame), DENIED);
        firewall.insert(on("10.1.0.0/16"), expired(Rule::allow())).unwrap();
        assert_eq!(judge(&firewall, &frame), DENIED);
        firewall.insert(on("10.0.0.0/8"), Rule::allow()).unwrap();
        assert_eq!(judge(&firewall, &frame), ALLOWED);
        assert_eq!(firewall.remove_expired().unwrap(), 1);
        firewall.remove(on("10.0.0.0/8")).unwrap();
        assert_eq!(judge(&firewall, &frame), DEFAULT);
    }
}

#[test]
fn among_rules_of_one_source_the_order_is_defined() {
    let order = [
        "10.0.0.0/8 to 192.0.2.1 tcp/80",
        "10.0.0.0/8 to 192.0.2.1 tcp/80-81",
        "10.0.0.0/8 to 192.0.2.1 tcp",
        "10.0.0.0/8 to 192.0.2.1",
        "10.0.0.0/8 to 192.0.2.0/24 tcp/80",
        "10.0.0.0/8 to 192.0.2.0/24",
        "10.0.0.0/8 tcp/80",
        "10.0.0.0/8 tcp/79-80",
        "10.0.0.0/8 tcp/80-81",
        "10.0.0.0/8 tcp/1-1000",
        "10.0.0.0/8 tcp",
        "10.0.0.0/8",
    ];
    for engine in ENGINES {
        let firewall = load(engine);
        let mut shuffled = order;
        Rng::with_seed(1).shuffle(&mut shuffled);
        for selector in shuffled {
            firewall.insert(on(selector), Rule::deny()).unwrap();
        }
        assert!(firewall.iter().unwrap().map(|entry| entry.selector).eq(order.map(on)), "listed in that order");
        // Each in turn decides, until it is removed.
        let frame = packet("10.9.9.9", "192.0.2.1", "tcp/80");
        for selector in order {
            assert_eq!(judge(&firewall, &frame), DENIED);
            let entry = firewall.get(on(selector)).unwrap().unwrap();
            assert_eq!(entry.count.packets, 1, "{engine:?}: {selector} decided");
            let asked = |text: &str| text.parse::<IpAddr>().unwrap();
            let explained = firewall.explain(asked("10.9.9.9"), asked("192.0.2.1"), 6, Some(80)).unwrap();
            assert_eq!(explained, Some(entry));
            firewall.remove(on(selector)).unwrap().unwrap();
        }
        assert_eq!(judge(&firewall, &frame), DEFAULT);
    }
}

#[test]
fn a_rule_ends_within_10_ms_by_itself() {
    for engine in ENGINES {
        let firewall = load(engine);
        let frame = packet("10.1.1.9", "192.0.2.1", "tcp/80");
        let started = Instant::now();
        let lifetime = Duration::from_millis(80);
        firewall.insert(on("10.0.0.0/8"), Rule::deny().expires_in(lifetime)).unwrap();
        let mut denied_at = Duration::ZERO;
        let over = loop {
            let before = started.elapsed();
            match firewall.test_run(&frame).unwrap().action {
                Action::Drop => denied_at = before,
                _ => break started.elapsed(),
            }
        };
        assert!(firewall.get(on("10.0.0.0/8")).unwrap().unwrap().rule.is_expired() || over < lifetime);
        if !common::is_emulated() {
            assert!(denied_at < lifetime + Duration::from_millis(10), "denied after {denied_at:?}");
            assert!(over > lifetime - Duration::from_millis(10), "passed after {over:?}");
        }
    }
}

#[test]
fn counters_go_on_through_edits_and_replacements() {
    for engine in ENGINES {
        let firewall = load(engine);
        let frame = packet("10.1.1.9", "192.0.2.1", "tcp/80");
        let key = on("10.1.1.0/24");
        let count = || firewall.get(key).unwrap().unwrap().count.packets;
        firewall.insert(key, Rule::deny()).unwrap();
        let mut wanted = 0;
        let forms =
            [Rule::allow(), Rule::deny().expires_in(Duration::from_secs(999)), Rule::deny().count_only(), Rule::deny()];
        for round in 0..40 {
            judge(&firewall, &frame);
            wanted += 1;
            assert_eq!(count(), wanted, "{engine:?} round {round}");
            let rule = forms[round % 4];
            match round % 3 {
                0 => drop(firewall.insert(key, rule).unwrap()),
                1 => {
                    let done =
                        firewall.replace_all([(key, rule), (on(&format!("11.{round}.0.0/16")), Rule::deny())]).unwrap();
                    assert_eq!((done.added, done.kept + done.changed), (1, 1));
                }
                _ => {
                    firewall.insert_many((0..50).map(|n| (on(&format!("10.2.{n}.0/24")), Rule::deny()))).unwrap();
                    firewall.remove_many((0..50).map(|n| on(&format!("10.2.{n}.0/24")))).unwrap();
                }
            }
        }
        // Once removed, it is gone: the same selector begins anew, and so does who gets its number.
        firewall.remove(key).unwrap();
        firewall.insert(key, Rule::deny()).unwrap();
        assert_eq!(count(), 0);
        for n in 0..20_000_u32.min(common::times(20_000, 20_000, 1_000) as u32) {
            let other = Selector::from(IpAddr::from(Ipv4Addr::from(0x0b00_0000 + n)));
            firewall.insert(other, Rule::deny()).unwrap();
            if n % 1000 == 0 {
                assert_eq!(firewall.get(other).unwrap().unwrap().count.packets, 0);
                judge(&firewall, &packet(&other.source().addr().to_string(), "192.0.2.1", "47"));
                assert_eq!(firewall.get(other).unwrap().unwrap().count.packets, 1);
            }
            firewall.remove(other).unwrap();
        }
    }
}

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
fn too_many_rules_to_ask_are_refused() {
    for engine in ENGINES {
        let firewall = load(engine);
        let rule = |prefix: &str, port: u32| (on(&format!("{prefix} tcp/{port}")), Rule::deny());
        firewall.insert_many((0..32).map(|port| rule("10.0.0.0/8", port))).unwrap();
        assert!(matches!(firewall.insert(on("10.0.0.0/8"), Rule::deny()), Err(Error::TooManyRules { limit: 32, .. })));
        firewall.insert_many((0..31).map(|port| rule("10.1.0.0/16", port))).unwrap();
        assert!(matches!(
            firewall.insert(on("10.1.0.0/16 udp"), Rule::deny()),
            Err(Error::TooManyRules { limit: 63, .. })
        ));
        // All 63 are asked, and the plain rule behind them.
        firewall.insert(on("0.0.0.0/0"), Rule::deny()).unwrap();
        assert_eq!(judge(&firewall, &packet("10.1.1.1", "192.0.2.1", "tcp/99")), DENIED);
        let all: Vec<_> = firewall.iter().unwrap().map(|entry| (entry.selector, entry.rule)).collect();
        let more = (31..33).map(|port| rule("10.1.0.0/16", port));
        assert!(matches!(firewall.replace_all(all.into_iter().chain(more)), Err(Error::TooManyRules { .. })));
        assert_eq!(firewall.len().unwrap(), 64);
    }
}

#[test]
fn counting_only_drops_nothing_and_tells() {
    for engine in ENGINES {
        let firewall = Firewall::load(&FirewallConfig::default().engine(engine).count_only(true).sample(1)).unwrap();
        firewall.insert(on("10.0.0.0/8 tcp/80"), Rule::deny()).unwrap();
        let frame = packet("10.1.1.1", "192.0.2.1", "tcp/80");
        assert_eq!(judge(&firewall, &frame), (Action::Pass, Reason::WouldDrop));
        firewall.set_count_only(false).unwrap();
        assert_eq!(judge(&firewall, &frame), DENIED);
        assert_eq!(firewall.get(on("10.0.0.0/8 tcp/80")).unwrap().unwrap().count.packets, 2);
        firewall.set_default(Decision::Deny).unwrap();
        assert_eq!(judge(&firewall, &packet("11.1.1.1", "192.0.2.1", "tcp/80")).0, Action::Drop);
        let mut events = firewall.events().unwrap();
        let told: Vec<_> =
            std::iter::from_fn(|| events.try_next()).map(|e| (e.packet.reason, e.packet.action, e.rule)).collect();
        let rule = Some(on("10.0.0.0/8 tcp/80"));
        assert_eq!(
            told,
            [
                (Reason::WouldDrop, Action::Pass, rule),
                (Reason::Denied, Action::Drop, rule),
                (Reason::DefaultAction, Action::Drop, None)
            ]
        );
        assert_eq!(firewall.events_lost().unwrap(), 0);
    }
}

#[test]
fn f8_a_list_returns_unless_the_new_one_is_confirmed() {
    for engine in ENGINES {
        let firewall = load(engine);
        let frame = packet("10.1.1.9", "192.0.2.1", "tcp/80");
        let new = || [(on("10.0.0.0/8"), Rule::deny()), (on("10.1.1.9"), Rule::deny())];
        firewall.insert(on("10.1.1.9"), Rule::allow()).unwrap();
        // Not confirmed: the program itself returns to the old list.
        let pending = firewall.replace_all_unless_confirmed(new(), Duration::from_millis(300)).unwrap();
        assert_eq!(judge(&firewall, &frame), DENIED);
        let refused =
            [firewall.insert(on("10.2.0.0/16"), Rule::deny()).unwrap_err(), firewall.replace_all(new()).unwrap_err()];
        assert!(refused.iter().all(|error| matches!(error, Error::ListPending { .. })), "{refused:?}");
        assert_eq!(firewall.len().unwrap(), 2);
        thread::sleep(Duration::from_millis(320));
        assert_eq!(judge(&firewall, &frame), ALLOWED);
        assert_eq!(pending.remaining().unwrap(), Duration::ZERO);
        assert!(matches!(pending.confirm(), Err(Error::NotConfirmed { .. })));
        assert_eq!(firewall.len().unwrap(), 1);
        // Taken back by hand.
        firewall.replace_all_unless_confirmed(new(), Duration::from_secs(60)).unwrap().roll_back().unwrap();
        assert_eq!(judge(&firewall, &frame), ALLOWED);
        // Confirmed: it stays.
        let pending = firewall.replace_all_unless_confirmed(new(), Duration::from_millis(300)).unwrap();
        assert_eq!(pending.replaced().unwrap().added, 1);
        pending.confirm().unwrap();
        thread::sleep(Duration::from_millis(320));
        assert_eq!(judge(&firewall, &frame), DENIED);
        assert!(firewall.pending().unwrap().is_none());
        assert_eq!(firewall.get(on("10.1.1.9")).unwrap().unwrap().count.packets, 4, "counted in both lists");
    }
}

// ---- the model ------------------------------------------------------------------------------------

/// Says what the rules say, by comparing all of them.
#[derive(Default)]
struct Model(Vec<(Selector, Rule)>);

impl Model {
    fn set(&mut self, selector: Selector, rule: Rule) {
        self.remove(selector);
        self.0.push((selector, rule));
    }

    fn remove(&mut self, selector: Selector) {
        self.0.retain(|(other, _)| *other != selector);
    }

    fn verdict(&self, source: IpAddr, destination: IpAddr, protocol: u8, port: Option<u16>) -> (Action, Reason) {
        let applies = |(selector, rule): &&(Selector, Rule)| {
            !rule.count_only
                && !rule.is_expired()
                && selector.source().contains(&source)
                && selector.destination().is_none_or(|net| net.contains(&destination))
                && selector.ip_protocol().is_none_or(|wanted| wanted == protocol)
                && selector.port_range().is_none_or(|range| port.is_some_and(|port| range.contains(&port)))
        };
        let weight = |(selector, _): &&(Selector, Rule)| {
            let ports = selector.port_range().map_or((0, 0), |range| {
                (1_000_000 - i32::from(*range.end() - *range.start()), 1_000_000 - i32::from(*range.start()))
            });
            let destination = selector.destination().map_or(0, |net| net.prefix_len());
            (selector.source().prefix_len(), destination, ports.0, ports.1, selector.ip_protocol().is_some())
        };
        match self.0.iter().filter(applies).max_by_key(weight) {
            None => DEFAULT,
            Some((_, rule)) if rule.decision == Decision::Deny => DENIED,
            Some(_) => ALLOWED,
        }
    }
}

/// Few addresses, so that prefixes nest and packets hit.
fn address(random: &mut Rng, v6: bool) -> IpAddr {
    let bits = u128::from(random.u32(..) & 0xc0c0_c003 | 0x0a00_0000) << 96;
    if v6 {
        Ipv6Addr::from(bits | u128::from(random.bool())).into()
    } else {
        Ipv4Addr::from((bits >> 96) as u32).into()
    }
}

fn selector(random: &mut Rng, v6: bool) -> Selector {
    let net = |random: &mut Rng| {
        let length = *random
            .choice(if v6 { &[0_u8, 8, 10, 17, 18, 32, 33, 128] } else { &[0, 4, 8, 10, 17, 18, 25, 32] })
            .unwrap();
        IpNet::new(address(random, v6), length).unwrap()
    };
    let mut selector = Selector::new(net(random));
    if random.u8(..4) == 0 {
        selector = selector.to(net(random)).unwrap();
    }
    match random.u8(..6) {
        0 => selector = selector.protocol(if random.bool() { 6 } else { 47 }).unwrap(),
        1 => {
            let first = random.u16(78..82);
            selector = selector.protocol(17).unwrap().ports(first..=first + random.u16(..3)).unwrap();
        }
        _ => {}
    }
    selector
}

fn rule(random: &mut Rng) -> Rule {
    let rule = if random.bool() { Rule::allow() } else { Rule::deny() };
    match random.u8(..8) {
        0 => expired(rule),
        1 => rule.expires_in(Duration::from_secs(9999)),
        2 => rule.count_only(),
        _ => rule,
    }
}

fn agree(firewall: &Firewall, model: &Model, random: &mut Rng, probes: usize) {
    for _ in 0..probes {
        let v6 = random.bool();
        let (source, destination) = (address(random, v6), address(random, v6));
        let (protocol, what) = match random.u8(..3) {
            0 => (6, format!("tcp/{}", random.u16(78..84))),
            1 => (17, format!("udp/{}", random.u16(78..84))),
            _ => (47, "47".to_owned()),
        };
        let port = what.split_once('/').map(|(_, port)| port.parse().unwrap());
        let frame = packet(&source.to_string(), &destination.to_string(), &what);
        let wanted = model.verdict(source, destination, protocol, port);
        assert_eq!(firewall.test_run(&frame).unwrap().action, wanted.0, "{source} > {destination} {what}");
        let explained = firewall.explain(source, destination, protocol, port).unwrap().map(|entry| entry.rule.decision);
        let decision = match wanted {
            DENIED => Some(Decision::Deny),
            ALLOWED => Some(Decision::Allow),
            _ => None,
        };
        assert_eq!(explained, decision, "{source} > {destination} {what}");
    }
}

#[test]
fn random_edits_agree_with_the_model() {
    for engine in ENGINES {
        for seed in 0..common::times(4, 40, 1) as u64 {
            let mut random = Rng::with_seed(seed);
            let (firewall, mut model) = (load(engine), Model::default());
            for round in 0..40 {
                if random.u8(..6) == 0 {
                    model.0.clear();
                    for _ in 0..random.usize(..200) {
                        let v6 = random.bool();
                        model.set(selector(&mut random, v6), rule(&mut random));
                    }
                    if let Err(error) = firewall.replace_all(model.0.iter().copied()) {
                        panic!("{engine:?} {seed} {round}: {error}");
                    }
                }
                for _ in 0..20 {
                    let v6 = random.bool();
                    let selector = match random.choice(&model.0) {
                        Some((selector, _)) if random.bool() => *selector,
                        _ => selector(&mut random, v6),
                    };
                    if random.u8(..3) == 0 {
                        firewall.remove(selector).unwrap();
                        model.remove(selector);
                    } else {
                        let rule = rule(&mut random);
                        firewall.insert(selector, rule).unwrap();
                        model.set(selector, rule);
                    }
                }
                assert_eq!(firewall.len().unwrap(), model.0.len());
                agree(&firewall, &model, &mut random, common::times(300, 1000, 50));
            }
        }
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
            for round in 1..common::times(100, 10_000, 5) {
                firewall.replace_all(list(round % 2)).unwrap();
            }
            over.store(true, Ordering::Relaxed);
        });
        assert_eq!(firewall.stats().unwrap().passed().packets, 0);
    }
}

// ---- another process ------------------------------------------------------------------------------

#[test]
fn another_process_goes_on_with_all_of_it() {
    let bpffs = BpfFs::new().unwrap();
    for engine in ENGINES {
        let pair = Pair::new().unwrap();
        let directory = bpffs.path().join(format!("{engine:?}"));
        let mut random = Rng::with_seed(5);
        let mut model = Model::default();
        let firewall = load(engine);
        for _ in 0..300 {
            let v6 = random.bool();
            let (selector, rule) = (selector(&mut random, v6), rule(&mut random));
            if firewall.insert(selector, rule).is_ok() {
                model.set(selector, rule);
            }
        }
        let frame = packet("10.192.192.3", "10.0.0.1", "tcp/80");
        firewall.insert(on("10.192.192.3"), Rule::deny()).unwrap();
        model.set(on("10.192.192.3"), Rule::deny());
        judge(&firewall, &frame);
        let options = AttachOptions::new("eth0").pin(&directory);
        drop(pair.server.run(|| firewall.attach(&options)).unwrap());
        // The pair's hosts have something to say, so counters may go on.
        let rules =
            |firewall: &Firewall| -> Vec<_> { firewall.iter().unwrap().map(|e| (e.selector, e.rule)).collect() };
        let before = rules(&firewall);
        drop(firewall);

        let firewall = Firewall::adopt(&directory, "firewall").unwrap();
        assert_eq!(firewall.engine(), engine);
        assert_eq!(rules(&firewall), before);
        assert_eq!(firewall.get(on("10.192.192.3")).unwrap().unwrap().count.packets, 1);
        agree(&firewall, &model, &mut random, 300);
        for _ in 0..300 {
            let v6 = random.bool();
            let (selector, rule) = (selector(&mut random, v6), rule(&mut random));
            if firewall.insert(selector, rule).is_ok() {
                model.set(selector, rule);
            }
        }
        agree(&firewall, &model, &mut random, 300);

        // A list that nobody confirmed, because the process is gone.
        let new = [(on("0.0.0.0/0"), Rule::deny()), (on("::/0"), Rule::deny())];
        // Loading a program takes seconds in an emulated machine.
        let trial = Duration::from_millis(if common::is_emulated() { 10_000 } else { 1_000 });
        let _ = firewall.replace_all_unless_confirmed(new, trial).unwrap();
        drop(firewall);
        let firewall = Firewall::adopt(&directory, "firewall").unwrap();
        assert_eq!(firewall.len().unwrap(), 2);
        assert!(firewall.pending().unwrap().unwrap().remaining().unwrap() > Duration::ZERO);
        drop(firewall);
        thread::sleep(trial + Duration::from_millis(50));
        let firewall = Firewall::adopt(&directory, "firewall").unwrap();
        assert_eq!(firewall.len().unwrap(), model.0.len());
        agree(&firewall, &model, &mut random, 300);
        firewall.replace_all(new).unwrap();
        assert_eq!(judge(&firewall, &packet("2001:db8::1", "2001:db8::2", "47")), DENIED);
        xdpkit::remove_pins(&directory).unwrap();
    }
}

/// Not a test of its own: the process that the next one kills.
#[test]
fn child_that_edits_until_it_is_killed() {
    let Some(directory) = std::env::var_os("XDPKIT_TEST_CHILD_PINS") else { return };
    let firewall = Firewall::adopt(directory, "firewall").unwrap();
    let mut random = Rng::with_seed(std::process::id().into());
    println!("editing");
    loop {
        let list: Vec<_> =
            (0..random.u8(1..200)).map(|n| (on(&format!("10.{n}.0.0/16 tcp")), rule(&mut random))).collect();
        firewall.replace_all(list).unwrap();
        for n in 0..random.u8(..100) {
            firewall.insert(on(&format!("10.{n}.{n}.0/24")), rule(&mut random)).unwrap();
            firewall.remove(on(&format!("10.{}.0.0/16 tcp", random.u8(..)))).unwrap();
        }
    }
}

#[test]
fn a_process_killed_in_the_middle_leaves_nothing_half_done() {
    use std::io::{BufRead as _, BufReader};
    let bpffs = BpfFs::new().unwrap();
    for engine in ENGINES {
        let pair = Pair::new().unwrap();
        let directory = bpffs.path().join(format!("{engine:?}"));
        drop(pair.server.run(|| load(engine).attach(&AttachOptions::new("eth0").pin(&directory))).unwrap());
        for round in 0..common::times(5, 50, 1) as u64 {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "child_that_edits_until_it_is_killed", "--nocapture"])
                .env("XDPKIT_TEST_CHILD_PINS", &directory)
                .stdout(std::process::Stdio::piped())
                .spawn()
                .unwrap();
            let lines = BufReader::new(child.stdout.take().unwrap()).lines();
            assert!(lines.map_while(Result::ok).any(|line| line.contains("editing")));
            thread::sleep(Duration::from_millis(20 + 7 * round));
            child.kill().unwrap();
            child.wait().unwrap();
            let firewall = Firewall::adopt(&directory, "firewall").unwrap();
            let model = Model(firewall.iter().unwrap().map(|entry| (entry.selector, entry.rule)).collect());
            let mut random = Rng::with_seed(round);
            for _ in 0..200 {
                let source = IpAddr::from([10, random.u8(..210), random.u8(..110), 1]);
                let frame = packet(&source.to_string(), "192.0.2.1", "tcp/80");
                let wanted = model.verdict(source, [192, 0, 2, 1].into(), 6, Some(80));
                let action = firewall.test_run(&frame).unwrap().action;
                assert_eq!(action, wanted.0, "{engine:?} round {round}: {source}");
            }
        }
        xdpkit::remove_pins(&directory).unwrap();
    }
}
