//! Rules with qualifiers, ends and counters: traps F3 and F9, the precedence, and an independent model.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

use crate::common::{
    judge,
    rules::{ALLOWED, DEFAULT, DENIED, ENGINES, Model, agree, expired, load, on, packet, rule, selector},
};
use fastrand::Rng;
use xdpkit::{Action, Decision, Error, Firewall, FirewallConfig, Reason, Rule, Selector, Stage as _};

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
fn a_rule_ends_by_itself_and_not_before_its_end() {
    for engine in ENGINES {
        let firewall = load(engine);
        let frame = packet("10.1.1.9", "192.0.2.1", "tcp/80");
        // How late it may end is a row of `./x bench --check`; here, the machine may be slow.
        let started = Instant::now();
        let lifetime = Duration::from_millis(80);
        firewall.insert(on("10.0.0.0/8"), Rule::deny().expires_in(lifetime)).unwrap();
        while firewall.test_run(&frame).unwrap().action == Action::Drop {
            assert!(started.elapsed() < Duration::from_secs(60), "it never ends");
        }
        let over = started.elapsed();
        assert!(over > lifetime - Duration::from_millis(10), "passed after {over:?}");
        assert!(firewall.get(on("10.0.0.0/8")).unwrap().unwrap().rule.is_expired() || over < lifetime);
    }
}

#[test]
fn f3_counters_go_on_through_edits_and_replacements() {
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
        for n in 0..20_000_u32.min(crate::common::times(3_000, 20_000, 1_000) as u32) {
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
fn random_edits_agree_with_the_model() {
    for engine in ENGINES {
        for seed in 0..crate::common::times(4, 40, 1) as u64 {
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
                agree(&firewall, &model, &mut random, crate::common::times(300, 1000, 50));
            }
        }
    }
}
