//! Limits and tiers of a rate limiter, and changes to them while packets flow.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use crate::common::{
    judge,
    rate::{SYN, address, just, limiter, net, passed, tcp, udp},
    times,
};
use xdpkit::{
    Action, AttachOptions, BanPolicy, Decision, Error, Limit, Rate, RateLimiter, RateLimiterConfig, Reason, Scope,
    Stage as _, TableFull, Tier,
};
use xdpkit_lab::{
    bench::{Harness, random_v4},
    bpffs::BpfFs,
    frame::Frame,
    topology::Pair,
};

#[test]
fn tiers_limit_exempt_and_block_by_the_longest_prefix() {
    let limiter = limiter(&[(Scope::All, 1)]);
    let partner = Tier::Limited(just(3).into());
    let tiers = [
        ("198.51.0.0/16", partner),
        ("198.51.100.0/24", Tier::Blocked),
        ("198.51.100.7/32", Tier::Exempt),
        ("2001:db8:a::/48", partner),
        ("2001:db8:a:1::/64", Tier::Exempt),
        ("2001:db8:b::/48", Tier::Blocked),
        ("2001:db8:b::7/128", Tier::Limited(just(2).into())),
    ];
    let check = || {
        for (source, wanted, reason) in [
            ("198.51.1.1", 3, Reason::OverPackets),
            ("198.51.100.1", 0, Reason::Blocked),
            ("198.51.100.7", 9, Reason::Exempt),
            ("198.52.0.1", 1, Reason::OverPackets),
            ("2001:db8:a:2::1", 3, Reason::OverPackets),
            ("2001:db8:a:1::1", 9, Reason::Exempt),
            ("2001:db8:b:2::1", 0, Reason::Blocked),
            ("2001:db8:b::7", 2, Reason::OverPackets),
            ("2001:db8:c::7", 1, Reason::OverPackets),
        ] {
            limiter.reset(address(source)).unwrap();
            assert_eq!(passed(&limiter, &udp(source, 53), 9), wanted, "{source}");
            assert_eq!(judge(&limiter, &udp(source, 53).build()).1, reason, "{source}");
        }
    };
    for (prefix, tier) in tiers {
        assert_eq!(limiter.tiers().insert(net(prefix), tier).unwrap(), None);
        assert_eq!(limiter.tiers().get(net(prefix)), Some(tier));
    }
    check();
    assert!(limiter.tiers().iter().eq(tiers.map(|(prefix, tier)| (net(prefix), tier))), "in order");
    assert_eq!(limiter.tiers().matching(address("198.51.100.9")), Some((net("198.51.100.0/24"), Tier::Blocked)));
    let mut stats = limiter.scope_stats().unwrap();
    stats.retain(|stats| stats.tier && stats.limit == just(3).into());
    assert_eq!((stats[0].admitted.packets, stats[0].refused.packets), (6, 14));

    // The list as a whole, and without what was there.
    let done = limiter.tiers().replace_all([(net("203.0.113.0/24"), Tier::Blocked), (net("198.51.0.0/16"), partner)]);
    let done = done.unwrap();
    assert_eq!((done.added, done.changed, done.kept, done.removed), (1, 0, 1, 6));
    assert_eq!(judge(&limiter, &udp("198.51.100.1", 53).build()).1, Reason::WithinLimit);
    assert_eq!(judge(&limiter, &udp("203.0.113.1", 53).build()).1, Reason::Blocked);
    let done = limiter.tiers().replace_all(tiers.map(|(prefix, tier)| (net(prefix), tier))).unwrap();
    assert_eq!((done.added, done.removed), (6, 1));
    check();
    // One after the other goes; the covering one decides then.
    assert_eq!(limiter.tiers().remove(net("198.51.100.7/32")).unwrap(), Some(Tier::Exempt));
    assert_eq!(judge(&limiter, &udp("198.51.100.7", 53).build()).1, Reason::Blocked);
    assert_eq!(limiter.tiers().remove(net("198.51.100.7/32")).unwrap(), None);
    for (prefix, _) in tiers {
        limiter.tiers().remove(net(prefix)).unwrap();
    }
    assert!(limiter.tiers().is_empty());
    assert_eq!(passed(&limiter, &udp("2001:db8:b:9::1", 53), 9), 1);
}

#[test]
fn a_full_list_of_tiers_refuses_by_name_and_keeps_what_it_had() {
    let config = RateLimiterConfig::default().tiers(2).limit(Scope::All, just(1));
    let limiter = RateLimiter::load(&config).unwrap();
    let tiers = limiter.tiers();
    for prefix in ["10.0.0.0/8", "11.0.0.0/8"] {
        tiers.insert(net(prefix), Tier::Blocked).unwrap();
    }
    let error = tiers.insert(net("12.0.0.0/8"), Tier::Blocked).unwrap_err();
    assert!(matches!(&error, Error::Full { entry, .. } if entry == "12.0.0.0/8"), "{error}");
    tiers.insert(net("11.1.1.1/8"), Tier::Exempt).unwrap();
    let three = ["1.0.0.0/8", "2.0.0.0/8", "3.0.0.0/8"].map(|prefix| (net(prefix), Tier::Blocked));
    assert!(matches!(tiers.replace_all(three).unwrap_err(), Error::Full { .. }));
    let error = tiers.replace_all([(net("1.0.0.0/8"), Tier::Blocked), (net("1.0.0.0/8"), Tier::Exempt)]).unwrap_err();
    assert_eq!(error.to_string(), "`1.0.0.0/8` has two rules in one list: blocked and exempt");
    assert!(tiers.iter().eq([(net("10.0.0.0/8"), Tier::Blocked), (net("11.0.0.0/8"), Tier::Exempt)]));
    assert_eq!(judge(&limiter, &udp("10.0.0.1", 1).build()).1, Reason::Blocked);

    // As many different limits as there may be, and one more.
    let config = RateLimiterConfig::default().limit(Scope::All, just(1));
    let limiter = RateLimiter::load(&config).unwrap();
    let many = |count: u8| (1..=count).map(|n| (net(&format!("{n}.0.0.0/8")), Tier::Limited(just(n.into()).into())));
    limiter.tiers().replace_all(many(61)).unwrap();
    assert_eq!(passed(&limiter, &udp("61.0.0.1", 1), 99), 61);
    let error = limiter.tiers().insert(net("70.0.0.0/8"), Tier::Limited(just(99).into())).unwrap_err();
    assert!(error.to_string().contains("70.0.0.0/8"), "{error}");
    assert!(limiter.tiers().replace_all(many(62)).is_err());
    assert_eq!(limiter.tiers().len(), 61);
}

#[test]
fn as_many_tiers_as_there_may_be_are_replaced_and_adopted() {
    // Scattered, so that each takes as much room as a prefix can.
    let mut random = fastrand::Rng::with_seed(11);
    let hosts4 = (0..1024_u32).map(|n| net(&format!("{}/32", std::net::Ipv4Addr::from(n << 22 | 0x2a_55aa)))).collect();
    let hosts6 = (0..1024).map(|_| net(&format!("{}/128", std::net::Ipv6Addr::from(random.u128(..))))).collect();
    let near6 = (0..1024).map(|_| net(&format!("2001:db8::{:x}:{:x}/128", random.u16(..), random.u16(..)))).collect();
    let bpffs = BpfFs::new().unwrap();
    let lists: [(&str, Vec<_>); 3] = [("v4", hosts4), ("v6", hosts6), ("near6", near6)];
    for (name, prefixes) in lists {
        let pair = Pair::new().unwrap();
        let config = RateLimiterConfig::default().name(name).tiers(1024).limit(Scope::All, just(1));
        let limiter = RateLimiter::load(&config).unwrap();
        drop(pair.server.run(|| limiter.attach(&AttachOptions::new("eth0").pin(bpffs.path()))).unwrap());
        for prefix in &prefixes {
            limiter.tiers().insert(*prefix, Tier::Blocked).unwrap();
        }
        let list = || prefixes.iter().map(|prefix| (*prefix, Tier::Blocked));
        drop(limiter);
        let limiter = RateLimiter::adopt(bpffs.path(), name).unwrap();
        assert_eq!(limiter.tiers().replace_all(list()).unwrap().changed, 0);
        assert_eq!(limiter.tiers().replace_all(list()).unwrap().changed, 0);
        for prefix in prefixes.iter().step_by(50) {
            let frame = udp(&prefix.addr().to_string(), 53).build();
            assert_eq!(judge(&limiter, &frame), (Action::Drop, Reason::Blocked), "{prefix}");
        }
    }
}

/// What it refuses: another value of each setting that the tables were made with, a smaller one of those that grow. All others are brought to the configuration.
#[test]
fn a_configuration_that_wants_other_tables_is_refused_by_the_settings_name() {
    let (pair, bpffs) = (Pair::new().unwrap(), BpfFs::new().unwrap());
    let made = || RateLimiterConfig::default().limit(Scope::All, just(1));
    let limiter = RateLimiter::load(&made()).unwrap();
    drop(pair.server.run(|| limiter.attach(&AttachOptions::new("eth0").pin(bpffs.path()))).unwrap());
    drop(limiter);
    let others = [
        ("prefix_v4", made().prefix_v4(24)),
        ("prefix_v6", made().prefix_v6(56)),
        ("sources", made().sources(1 << 18)),
        ("bans", made().bans(1 << 8)),
        ("tiers", made().tiers(100)),
        ("ring_bytes", made().ring_bytes(1 << 19)),
    ];
    for (wanted, config) in others {
        match RateLimiter::load_or_adopt(bpffs.path(), &config) {
            Err(Error::PinnedSetting { stage, setting, .. }) => {
                assert_eq!((stage.as_str(), setting), ("rate_limiter", wanted));
            }
            other => panic!("{wanted}: {other:?}"),
        }
    }
    let other = made()
        .limit(Scope::Tcp, just(2))
        .count_only(true)
        .ban(BanPolicy::of(Duration::from_secs(9)))
        .protect(Duration::from_secs(61))
        .full(TableFull::Share(Rate::per_second(10_001)))
        .unsupported(Decision::Allow)
        .pass_neighbours(false)
        .events(101);
    let adopted = RateLimiter::load_or_adopt(bpffs.path(), &other).unwrap();
    assert_eq!(adopted.limits().iter().collect::<Vec<_>>(), other.limits);
    assert_eq!(adopted.table_full(), other.full);
    let frame = udp("192.0.2.7", 53);
    assert_eq!(passed(&adopted, &frame, 3), 3, "it only counts");
    assert_eq!(adopted.stats().unwrap().reason(Reason::WouldDrop).packets, 2);
    // Without limits of its own, a configuration leaves those that there are.
    drop(adopted);
    let adopted = RateLimiter::load_or_adopt(bpffs.path(), &RateLimiterConfig::default()).unwrap();
    assert_eq!(adopted.limits().len(), 2);
    assert_eq!(passed(&adopted, &frame, 3), 0, "and drops again");
    drop(adopted);
    let again = made().name("another");
    assert!(RateLimiter::load_or_adopt(bpffs.path(), &again).is_ok(), "nothing is pinned under this name");
}

#[test]
fn limits_change_while_packets_flow() {
    let limiter = limiter(&[(Scope::All, 5)]);
    let limits = limiter.limits();
    let frame = udp("192.0.2.1", 53);
    assert_eq!(passed(&limiter, &frame, 9), 5);
    // A greater burst: what was used up stays used up.
    assert_eq!(limits.insert(Scope::All, just(8)).unwrap(), Some(just(5).into()));
    assert_eq!(passed(&limiter, &frame, 9), 3);
    assert_eq!(limits.insert(Scope::UdpPort(53), just(1)).unwrap(), None);
    assert_eq!(limits.insert(Scope::All, just(10)).unwrap(), Some(just(8).into()));
    assert_eq!(passed(&limiter, &frame, 9), 1);
    assert_eq!(limits.remove(Scope::UdpPort(53)).unwrap(), Some(just(1).into()));
    assert_eq!(passed(&limiter, &frame, 9), 1);
    assert_eq!((limits.len(), limits.get(Scope::All)), (1, Some(just(10).into())));
    // From one an hour to many a second, which are counted in other units: what was used up is soon back.
    limits.insert(Scope::All, Rate::per_second(1_000_000).burst(1000)).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(passed(&limiter, &frame, 500), 500);
    // And back: the bucket is as full as it was, in the new limit's terms.
    limits.insert(Scope::All, just(4)).unwrap();
    let after = passed(&limiter, &frame, 9);
    assert!((3..=4).contains(&after), "{after}");
    assert_eq!(limits.remove(Scope::All).unwrap(), Some(just(4).into()));
    assert_eq!(judge(&limiter, &frame.build()), (Action::Pass, Reason::NoLimit));
    for port in 1..=8 {
        limits.insert(Scope::TcpPort(port), just(1)).unwrap();
    }
    let error = limits.insert(Scope::TcpPort(9), just(1)).unwrap_err();
    assert!(matches!(&error, Error::Full { entry, .. } if entry == "tcp-port=9"), "{error}");
    assert!(limits.insert(Scope::TcpPort(8), Rate::per_second(0)).is_err());
    assert_eq!(limits.get(Scope::TcpPort(8)), Some(just(1).into()), "nothing has changed");
    assert_eq!(passed(&limiter, &tcp("192.0.2.1", 8, SYN), 3), 1);
}

/// What a scope had is not that of the next one in its place: neither what sources have used up, nor what was counted.
#[test]
fn a_scope_that_takes_the_place_of_another_begins_anew() {
    let limiter = limiter(&[(Scope::All, 100), (Scope::UdpPort(53), 2)]);
    let limits = limiter.limits();
    limiter.tiers().insert(net("198.51.100.0/24"), Tier::Limited(just(70).into())).unwrap();
    for (source, most) in [("192.0.2.1", 2), ("2001:db8:1::1", 2), ("198.51.100.1", 70)] {
        assert_eq!(passed(&limiter, &udp(source, 53), 80), most);
    }
    assert_eq!(limits.remove(Scope::UdpPort(53)).unwrap(), Some(just(2).into()));
    assert_eq!(limits.insert(Scope::TcpSyn, just(3)).unwrap(), None);
    let of = |tier: bool| {
        let stats = limiter.scope_stats().unwrap();
        let own = stats.iter().find(|stats| stats.scope == Scope::TcpSyn && stats.tier == tier).unwrap();
        (own.admitted.packets, own.refused.packets, own.admitted.bytes)
    };
    assert_eq!((of(false), of(true)), ((0, 0, 0), (0, 0, 0)));
    assert!(limiter.source(address("192.0.2.1")).unwrap().iter().all(|bucket| bucket.scope == Scope::All));
    for source in ["192.0.2.1", "2001:db8:1::1"] {
        assert_eq!(passed(&limiter, &tcp(source, 80, SYN), 5), 3, "{source}");
    }
    assert_eq!((of(false).0, of(false).1), (6, 4));
    // The same for a limit of tiers, in the place of one that no tier has any more.
    let tiers = limiter.tiers();
    for n in 1..=61_u8 {
        tiers.replace_all([(net("203.0.113.0/24"), Tier::Limited(just(n.into()).into()))]).unwrap();
        assert_eq!(passed(&limiter, &tcp(&format!("203.0.113.{n}"), 80, SYN), 90), usize::from(n));
        let stats = limiter.scope_stats().unwrap();
        let own = |stats: &&xdpkit::ScopeStats| stats.tier && stats.limit == just(n.into()).into();
        let own = stats.iter().filter(own).find(|stats| stats.scope == Scope::All).unwrap();
        assert_eq!((own.admitted.packets, own.refused.packets), (u64::from(n), 90 - u64::from(n)));
    }
}

/// Limits go from packets to bytes and back, and tiers are replaced, while two CPUs send: each change is in force for the
/// next packet after it, every packet is counted once, and none is judged by what never was.
#[test]
fn limits_and_tiers_change_under_load() {
    let limiter = limiter(&[(Scope::All, 3)]);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let flows = random_v4(1 << 10);
                let frame = Frame::udp(flows[0], "10.0.0.1:53".parse().unwrap());
                let harness = Harness::new(&frame.payload(&[0; 400]).build(), &flows).unwrap();
                while !stop.load(Ordering::Relaxed) {
                    harness.verdict(limiter.program_fd(), 1000).unwrap();
                }
            });
        }
        let bytes = Limit::bytes(Rate::per_hour(3600).burst(1600));
        let mut fresh = 0_u32;
        // How many of so many packets of 400 bytes a source that was never there may send.
        let mut admitted = |first: u8| {
            fresh += 1;
            let source = format!("{first}.{}.{}.{}", fresh >> 16 & 255, fresh >> 8 & 255, fresh & 255);
            passed(&limiter, &udp(&source, 53).payload(&[0; 400 - 42]), 9)
        };
        for _ in 0..times(20, 200, 5) {
            limiter.limits().insert(Scope::All, bytes).unwrap();
            assert_eq!(admitted(240), 4, "1600 bytes");
            limiter.tiers().replace_all([(net("241.0.0.0/8"), Tier::Limited(just(7).into()))]).unwrap();
            assert_eq!([admitted(240), admitted(241)], [4, 7]);
            limiter
                .limits()
                .insert(Scope::All, Limit::packets(just(2)).and_bytes(Rate::per_hour(3600).burst(8000)))
                .unwrap();
            assert_eq!([admitted(240), admitted(241)], [2, 7]);
            limiter
                .tiers()
                .replace_all([(net("241.0.0.0/8"), Tier::Blocked), (net("0.0.0.0/1"), Tier::Exempt)])
                .unwrap();
            assert_eq!([admitted(240), admitted(241), admitted(99)], [2, 0, 9]);
            limiter.tiers().insert(net("241.0.0.0/8"), Tier::Exempt).unwrap();
            limiter.tiers().remove(net("0.0.0.0/1")).unwrap();
            limiter.limits().insert(Scope::All, just(3)).unwrap();
            assert_eq!([admitted(240), admitted(241)], [3, 9]);
            limiter.tiers().replace_all([]).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    let stats = limiter.stats().unwrap();
    let known = [
        Reason::WithinLimit,
        Reason::OverPackets,
        Reason::OverBytes,
        Reason::Blocked,
        Reason::Exempt,
        Reason::Contended,
    ];
    let known: u64 = known.iter().map(|reason| stats.reason(*reason).packets).sum();
    assert_eq!(known, stats.total().packets, "{stats:?}");
    assert_eq!(
        stats.passed().packets,
        stats.reason(Reason::WithinLimit).packets + stats.reason(Reason::Exempt).packets
    );
}

/// While sources come and go, what is listed is always something that is there.
#[test]
fn the_heaviest_sources_are_listed_while_others_come_and_go() {
    let config = RateLimiterConfig::default().sources(1 << 12).limit(Scope::All, Rate::per_second(1000).burst(100));
    let limiter = RateLimiter::load(&config).unwrap();
    limiter.tiers().insert(net("192.0.2.0/24"), Tier::Limited(just(50).into())).unwrap();
    let heavy = ["192.0.2.1", "192.0.2.2"];
    for source in heavy {
        assert_eq!(passed(&limiter, &udp(source, 53), 60), 50);
    }
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let flows = random_v4(1 << 16);
            let frame = Frame::udp(flows[0], "10.0.0.1:53".parse().unwrap());
            let harness = Harness::new(&frame.payload(&[0; 18]).build(), &flows).unwrap();
            while !stop.load(Ordering::Relaxed) {
                harness.verdict(limiter.program_fd(), 1000).unwrap();
            }
        });
        for _ in 0..times(200, 3000, 20) {
            let top = limiter.top(20).unwrap();
            assert!(top.len() >= 2 && top.len() <= 20);
            let mut first: Vec<_> = top[..2].iter().map(|bucket| bucket.source.addr().to_string()).collect();
            first.sort();
            assert_eq!(first, heavy, "{top:?}");
            for bucket in &top {
                assert!((0.0..=1.0).contains(&bucket.level) && bucket.scope == Scope::All, "{bucket:?}");
                let burst = if heavy.contains(&bucket.source.addr().to_string().as_str()) { 50 * 3600 } else { 1 };
                assert!(bucket.refills_in <= Duration::from_secs(burst), "{bucket:?}");
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
}
