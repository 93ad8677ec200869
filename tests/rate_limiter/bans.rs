//! The rate limiter's bans: set by hand and by the program, listed, lifted, over; trap R5.

use std::{
    net::Ipv4Addr,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use crate::common::{
    judge,
    rate::{SYN, address, limiter, net, tcp, udp},
    times,
};
use xdpkit::{
    Action, BanPolicy, Error, Rate, RateLimiter, RateLimiterConfig, Reason, Scope, Stage as _, TestRun, Tier,
};
use xdpkit_lab::bench::Harness;

#[test]
fn bans_are_set_listed_and_lifted_and_end_by_themselves() {
    let limiter = limiter(&[(Scope::All, 100)]);
    let (bans, v4, v6) = (limiter.bans(), address("192.0.2.1"), address("2001:db8:1::1"));
    limiter.tiers().insert(net("192.0.2.1/32"), Tier::Exempt).unwrap();
    assert!(bans.is_empty().unwrap());
    assert_eq!(bans.insert(v4, None).unwrap(), None);
    assert_eq!(bans.insert(v6, Some(Duration::from_secs(2))).unwrap(), None);
    assert_eq!(judge(&limiter, &udp("192.0.2.1", 1).build()), (Action::Drop, Reason::Banned));
    assert_eq!(
        judge(&limiter, &tcp("2001:db8:1::9", 1, SYN).build()),
        (Action::Drop, Reason::Banned),
        "all of its /64"
    );
    assert_eq!(judge(&limiter, &udp("192.0.2.2", 1).build()).1, Reason::WithinLimit);
    let listed: Vec<_> = bans.iter().unwrap().map(|ban| (ban.source, ban.until.is_some())).collect();
    assert_eq!(listed, [(net("192.0.2.1/32"), false), (net("2001:db8:1::/64"), true)]);
    assert!(bans.get(v6).unwrap().unwrap().remaining().unwrap() <= Duration::from_secs(2));

    std::thread::sleep(Duration::from_millis(2050));
    assert_eq!(bans.get(v6).unwrap(), None);
    assert_eq!(judge(&limiter, &udp("2001:db8:1::9", 1).build()).1, Reason::WithinLimit, "it has ended");
    assert_eq!(judge(&limiter, &udp("192.0.2.1", 1).build()).1, Reason::Banned, "until it is lifted");
    assert!(bans.insert(v4, Some(Duration::from_secs(9))).unwrap().unwrap().until.is_none());
    assert!(bans.lift(v4).unwrap().unwrap().until.is_some() && bans.lift(v4).unwrap().is_none());
    assert_eq!(judge(&limiter, &udp("192.0.2.1", 1).build()).1, Reason::Exempt);
    for n in 0..50 {
        bans.insert(address(&format!("10.0.0.{n}")), None).unwrap();
    }
    assert_eq!((bans.len().unwrap(), bans.clear().unwrap(), bans.len().unwrap()), (50, 50, 0));
}

/// Trap R5: a ban outlives the bucket.
#[test]
fn r5_who_exceeds_its_limit_by_far_is_cut_off() {
    let config = RateLimiterConfig::default()
        .limit(Scope::All, Rate::per_second(100).burst(10))
        .ban(BanPolicy::of(Duration::from_secs(600)));
    for source in ["192.0.2.1", "2001:db8:1::1"] {
        let limiter = RateLimiter::load(&config).unwrap();
        let mut events = limiter.events().unwrap();
        let frame = udp(source, 53).build();
        let run = |count| limiter.run(&TestRun::new(&frame).repeat(count)).unwrap();
        // Over its limit, but not by so much.
        run(60);
        assert_eq!(limiter.bans().len().unwrap(), 0);
        let first: Vec<_> = std::iter::from_fn(|| events.try_next()).collect();
        for event in &first {
            let (scope, reason) = (event.scope, event.packet.reason);
            assert_eq!((event.banned, scope, reason), (false, Some(Scope::All), Reason::OverPackets), "{event}");
        }
        // Once, and again only where the machine was so slow that the source was within its limit in between.
        assert!((1..10).contains(&first.len()), "{} events of 50 packets", first.len());
        run(1000);
        let ban = limiter.bans().get(address(source)).unwrap().unwrap();
        assert!(ban.remaining().unwrap() > Duration::from_secs(590));
        let banned = std::iter::from_fn(|| events.try_next()).filter(|event| event.banned).count();
        assert_eq!(banned, 1);
        assert_eq!(limiter.counts().unwrap().bans, 1);
        assert!(limiter.reset(address(source)).unwrap());
        assert_eq!(judge(&limiter, &frame), (Action::Drop, Reason::Banned), "its bucket is new");
        limiter.bans().lift(address(source)).unwrap();
        assert_eq!(judge(&limiter, &frame), (Action::Pass, Reason::WithinLimit));
        // Not any more.
        limiter.set_ban(None).unwrap();
        run(1000);
        assert!(limiter.bans().is_empty().unwrap());
    }
}

#[test]
fn a_full_table_of_bans_is_told_of() {
    let config = RateLimiterConfig::default()
        .limit(Scope::All, Rate::per_second(1).burst(1))
        .ban(BanPolicy::of(Duration::from_secs(600)))
        .bans(16);
    let limiter = RateLimiter::load(&config).unwrap();
    let mut refused = 0;
    for n in 0..600_u32 {
        match limiter.bans().insert(std::net::Ipv4Addr::from(0x0a00_0000 + n).into(), None) {
            Ok(None) => {}
            Err(Error::Full { .. }) => refused += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(limiter.bans().len().unwrap() + refused, 600);
    assert!(refused > 400);
    // The program's own bans find no place either: the source is limited as before.
    for n in 1..=50 {
        let frame = udp(&format!("192.0.2.{n}"), 1).build();
        for _ in 0..9 {
            limiter.test_run(&frame).unwrap();
        }
    }
    assert!(limiter.counts().unwrap().bans_refused > 50);
    assert!(limiter.stats().unwrap().reason(Reason::OverPackets).packets >= 50);
}

/// While two CPUs send as fast as they can, a ban holds from the moment that it is set, and no longer than until it is
/// lifted, also when another thread changes other bans.
#[test]
fn a_ban_holds_from_when_it_is_set_until_it_is_lifted_under_load() {
    let endless = Rate::per_second(1_000_000_000);
    let limiter = RateLimiter::load(&RateLimiterConfig::default().limit(Scope::All, endless)).unwrap();
    let (bans, stop) = (limiter.bans(), AtomicBool::new(false));
    let sources = ["192.0.2.1", "2001:db8:1::1"];
    thread::scope(|scope| {
        for source in sources {
            let (limiter, stop) = (&limiter, &stop);
            scope.spawn(move || {
                let frame = udp(source, 53).payload(&[0; 18]).build();
                let harness = Harness::new(&frame, &[(address(source), 4000).into()]).unwrap();
                while !stop.load(Ordering::Relaxed) {
                    harness.verdict(limiter.program_fd(), 1000).unwrap();
                }
            });
        }
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for n in 0..20 {
                    bans.insert(Ipv4Addr::new(10, 0, 0, n).into(), Some(Duration::from_millis(20))).unwrap();
                }
                for n in 0..20 {
                    bans.lift(Ipv4Addr::new(10, 0, 0, n).into()).unwrap();
                }
            }
        });
        for _ in 0..times(50, 500, 10) {
            for source in sources {
                let frame = udp(source, 53).build();
                bans.insert(address(source), None).unwrap();
                let verdicts = [0; 50].map(|_| limiter.test_run(&frame).unwrap().action);
                assert!(verdicts.iter().all(|action| *action == Action::Drop), "{source} is banned: {verdicts:?}");
                assert!(bans.iter().unwrap().any(|ban| ban.source.contains(&address(source)) && ban.until.is_none()));
                assert!(bans.lift(address(source)).unwrap().is_some());
                let action = limiter.test_run(&frame).unwrap().action;
                assert_eq!(action, Action::Pass, "{source} is not banned any more");
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    let stats = limiter.stats().unwrap();
    let known = stats.reason(Reason::Banned).packets + stats.reason(Reason::WithinLimit).packets;
    assert_eq!(known + stats.reason(Reason::Contended).packets, stats.total().packets, "{stats:?}");
}
