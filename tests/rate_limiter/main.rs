//! What the rate limiter charges to whom: bursts, prefixes, packets and bytes, several limits at once; traps R4 and R7.

mod bans;
mod changes;
#[path = "../common/mod.rs"]
mod common;
mod load;
mod scopes;
mod traffic;

use std::time::Duration;

use common::rate::passed;
use common::{
    judge,
    rate::{address, echo, just, limiter, net, udp},
};
use xdpkit::{
    Action, BanPolicy, Limit, Meter, Rate, RateLimiter, RateLimiterConfig, Reason, Scope, TableFull, Tier, ipnet::IpNet,
};

#[test]
fn a_burst_is_exact_for_each_source_and_family() {
    let limiter = limiter(&[(Scope::All, 5)]);
    for source in ["192.0.2.1", "192.0.2.2", "2001:db8:1::1", "2001:db8:2::1"] {
        let frame = udp(source, 53).build();
        for _ in 0..5 {
            assert_eq!(judge(&limiter, &frame), (Action::Pass, Reason::WithinLimit), "{source}");
        }
        for _ in 0..5 {
            assert_eq!(judge(&limiter, &frame), (Action::Drop, Reason::OverPackets), "{source}");
        }
    }
    let stats = limiter.scope_stats().unwrap();
    assert_eq!(stats.len(), 1);
    assert_eq!((stats[0].scope, stats[0].tier, stats[0].limit), (Scope::All, false, just(5).into()));
    assert_eq!((stats[0].admitted.packets, stats[0].refused.packets), (20, 20));
}

/// Trap R7, and that other lengths of prefixes are possible.
#[test]
fn r7_a_source_is_a_prefix() {
    for (v4, v6, together, apart) in [
        (
            32,
            64,
            [("192.0.2.1", "192.0.2.1"), ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9")],
            [("192.0.2.2", "192.0.2.3"), ("2001:db8:1:3::1", "2001:db8:1:4::1")],
        ),
        (
            24,
            48,
            [("192.0.2.1", "192.0.2.255"), ("2001:db8:1:2::1", "2001:db8:1:ffff::9")],
            [("192.0.3.2", "192.0.4.2"), ("2001:db8:2::1", "2001:db8:3::1")],
        ),
        (
            1,
            128,
            [("0.0.0.1", "127.0.0.1"), ("2001:db8:1:2::1", "2001:db8:1:2::1")],
            [("192.0.2.2", "1.0.2.2"), ("2001:db8:1:3::1", "2001:db8:1:3::2")],
        ),
        (
            32,
            65,
            [("192.0.2.1", "192.0.2.1"), ("2001:db8::1", "2001:db8::7fff:0:0:1")],
            [("192.0.2.2", "192.0.2.3"), ("2001:db8:0:1::", "2001:db8:0:1:8000::")],
        ),
    ] {
        let config = RateLimiterConfig::default().prefix_v4(v4).prefix_v6(v6).limit(Scope::All, just(1));
        for (first, second) in together {
            let limiter = RateLimiter::load(&config).unwrap();
            assert_eq!((passed(&limiter, &udp(first, 1), 1), passed(&limiter, &udp(second, 1), 1)), (1, 0), "{second}");
            let length = if first.contains(':') { v6 } else { v4 };
            let source = IpNet::new(address(first), length).unwrap().trunc();
            let top = limiter.top(9).unwrap();
            assert_eq!(top.iter().map(|bucket| bucket.source).collect::<Vec<_>>(), [source]);
            assert_eq!(limiter.source(address(second)).unwrap().len(), 1);
            assert!(limiter.reset(address(second)).unwrap() && !limiter.reset(address(second)).unwrap());
            assert_eq!(passed(&limiter, &udp(first, 1), 2), 1);
        }
        let limiter = RateLimiter::load(&config).unwrap();
        for (first, second) in apart {
            assert_eq!((passed(&limiter, &udp(first, 1), 2), passed(&limiter, &udp(second, 1), 2)), (1, 1), "{second}");
        }
    }
}

#[test]
fn a_packet_is_charged_to_every_limit_or_to_none() {
    let limiter = limiter(&[(Scope::All, 10), (Scope::UdpPort(53), 3)]);
    let (dns, other) = (udp("192.0.2.1", 53), udp("192.0.2.1", 99));
    assert_eq!(passed(&limiter, &dns, 100), 3, "the narrower limit");
    // What that refused has cost the wider one nothing.
    assert_eq!(passed(&limiter, &other, 100), 7);
    assert_eq!(judge(&limiter, &dns.build()), (Action::Drop, Reason::OverPackets));
    let stats = limiter.scope_stats().unwrap();
    let of = |scope| {
        stats.iter().find(|stats| stats.scope == scope).map(|stats| (stats.admitted.packets, stats.refused.packets))
    };
    // Limits are asked in order: in the end, the wider one refused what both would have.
    assert_eq!((of(Scope::All), of(Scope::UdpPort(53))), (Some((10, 94)), Some((3, 97))));
}

#[test]
fn packets_and_bytes_are_limited_together() {
    let frame = udp("192.0.2.1", 53).payload(&[0; 958]);
    assert_eq!(frame.build().len(), 1000);
    let load = |limit: Limit| RateLimiter::load(&RateLimiterConfig::default().limit(Scope::All, limit)).unwrap();
    let bytes = |burst| Rate::per_hour(3600).burst(burst);
    for (limit, wanted, reason) in [
        (Limit::bytes(bytes(5000)), 5, Reason::OverBytes),
        (Limit::bytes(bytes(5999)), 5, Reason::OverBytes),
        (Limit::bytes(bytes(6000)), 6, Reason::OverBytes),
        (Limit::packets(just(4)).and_bytes(bytes(5000)), 4, Reason::OverPackets),
        (Limit::packets(just(9)).and_bytes(bytes(5000)), 5, Reason::OverBytes),
    ] {
        let limiter = load(limit);
        assert_eq!(passed(&limiter, &frame, 20), wanted, "{limit}");
        assert_eq!(judge(&limiter, &frame.build()).1, reason, "{limit}");
    }
    // The bytes are used up, but for the smallest packets; their refusal has cost no packet.
    let limiter = load(Limit::packets(just(9)).and_bytes(bytes(2060)));
    assert_eq!(passed(&limiter, &frame, 20), 2);
    assert_eq!(passed(&limiter, &udp("192.0.2.1", 53).payload(&[0; 18]), 20), 1);
    let level = |meter| {
        let buckets = limiter.source(address("192.0.2.1")).unwrap();
        buckets.into_iter().find(|bucket| bucket.meter == meter).unwrap().level
    };
    assert!((level(Meter::Packets) - 3.0 / 9.0).abs() < 0.01 && level(Meter::Bytes) > 0.99);
    // A frame beyond the burst never passes, and takes no place.
    let limiter = load(Limit::bytes(bytes(1514)));
    assert_eq!(judge(&limiter, &udp("192.0.2.1", 53).payload(&[0; 1473]).build()).1, Reason::OverBytes);
    assert_eq!(limiter.tracked(), 0);
}

#[test]
fn counting_only_drops_nothing_that_is_well_formed() {
    let config = RateLimiterConfig::default().count_only(true).limit(Scope::All, just(2));
    let limiter = RateLimiter::load(&config).unwrap();
    limiter.tiers().insert(net("10.0.0.0/8"), Tier::Blocked).unwrap();
    limiter.bans().insert(address("192.0.2.9"), None).unwrap();
    let would = (Action::Pass, Reason::WouldDrop);
    assert_eq!(passed(&limiter, &udp("192.0.2.1", 1), 9), 9);
    assert_eq!(judge(&limiter, &udp("192.0.2.1", 1).build()), would);
    assert_eq!(judge(&limiter, &udp("10.0.0.1", 1).build()), would);
    assert_eq!(judge(&limiter, &udp("192.0.2.9", 1).build()), would);
    assert_eq!(judge(&limiter, &udp("192.0.2.1", 1).udp_length(3).build()).0, Action::Drop);
    assert_eq!(limiter.scope_stats().unwrap()[0].refused.packets, 8);
    limiter.set_count_only(false).unwrap();
    assert_eq!(judge(&limiter, &udp("192.0.2.1", 1).build()), (Action::Drop, Reason::OverPackets));
}

#[test]
fn heavy_sources_are_listed_first() {
    let limiter = limiter(&[(Scope::All, 10), (Scope::IcmpEcho, 4)]);
    for (source, packets) in [("192.0.2.1", 3), ("192.0.2.2", 10), ("2001:db8:1::1", 7)] {
        assert_eq!(passed(&limiter, &udp(source, 1), packets), packets);
    }
    assert_eq!(passed(&limiter, &echo("2001:db8:2::1"), 3), 3);
    let top = limiter.top(3).unwrap();
    let listed: Vec<_> =
        top.iter().map(|b| (b.source.to_string(), b.scope, (b.level * 100.0).round() as u32)).collect();
    let row = |source: &str, scope, level| (source.to_owned(), scope, level);
    assert_eq!(
        listed,
        [
            row("192.0.2.2/32", Scope::All, 100),
            row("2001:db8:2::/64", Scope::IcmpEcho, 75),
            row("2001:db8:1::/64", Scope::All, 70),
        ]
    );
    assert_eq!(limiter.top(99).unwrap().len(), 4);
    let hours = |bucket: &xdpkit::Bucket| bucket.refills_in.as_secs_f64() / 3600.0;
    assert!((hours(&top[0]) - 10.0).abs() < 0.1, "{:?}", top[0]);
    assert!(limiter.source(address("203.0.113.1")).unwrap().is_empty());
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let refused = |config: RateLimiterConfig| RateLimiter::load(&config).unwrap_err().to_string();
    let config = RateLimiterConfig::default;
    for (config, what) in [
        (config().sources(0), "sources `0`"),
        (config().prefix_v4(0), "prefix_v4 `0`"),
        (config().prefix_v4(33), "prefix_v4 `33`"),
        (config().prefix_v6(129), "prefix_v6 `129`"),
        (config().ring_bytes(5000), "ring_bytes `5000`"),
        (config().limit(Scope::All, Rate::per_second(0)), "rate `0/s`"),
        (config().limit(Scope::All, Rate::per_second(2_000_000_000)), "10^9"),
        (config().limit(Scope::UdpPort(0), Rate::per_second(1)), "udp-port=0"),
        (config().limit(Scope::All, Limit::bytes(Rate::per_second(1000))), "1514"),
        (config().ban(BanPolicy { factor: 1, duration: Duration::from_secs(1) }), "factor"),
        (config().protect(Duration::from_secs(1001)), "protect"),
    ] {
        let error = refused(config);
        assert!(error.contains(what), "{error}");
    }
}

/// A packet that is dropped because its source has no place under one limit has cost it nothing under the others.
#[test]
fn who_has_no_place_under_one_limit_pays_nothing_under_another() {
    let mut seen = 0;
    for full in [TableFull::Drop, TableFull::Share(Rate::per_hour(1).burst(1))] {
        let config = RateLimiterConfig::default().sources(64).full(full);
        let config = config.limit(Scope::All, just(5)).limit(Scope::UdpPort(53), just(5));
        let limiter = RateLimiter::load(&config).unwrap();
        let known = |n: u8| format!("192.0.2.{n}");
        for n in 0..8 {
            assert_eq!(passed(&limiter, &udp(&known(n), 99), 1), 1);
        }
        for n in 0..2000_u16 {
            passed(&limiter, &udp(&format!("10.1.{}.{}", n >> 8, n & 255), 99), 1);
        }
        for n in 0..8 {
            let dns = udp(&known(n), 53).build();
            if judge(&limiter, &dns) != (Action::Drop, Reason::UnknownSource) {
                continue;
            }
            seen += 1;
            for _ in 0..20 {
                assert_eq!(judge(&limiter, &dns), (Action::Drop, Reason::UnknownSource));
            }
            assert_eq!(passed(&limiter, &udp(&known(n), 99), 9), 4, "{full:?}: four of five are left");
        }
    }
    assert!(seen >= 8, "the table was full for {seen} of 16");
}

#[test]
fn counting_only_bans_as_it_would_and_says_so() {
    let ban = BanPolicy::of(Duration::from_secs(600));
    let config =
        RateLimiterConfig::default().count_only(true).ban(ban).limit(Scope::All, Rate::per_second(10).burst(5));
    let limiter = RateLimiter::load(&config).unwrap();
    let mut events = limiter.events().unwrap();
    let frame = udp("192.0.2.1", 1);
    assert_eq!(passed(&limiter, &frame, 100), 100);
    assert!(limiter.bans().get(address("192.0.2.1")).unwrap().is_some());
    let told: Vec<_> = std::iter::from_fn(|| events.try_next()).collect();
    assert!(told.iter().all(|event| event.packet.reason == Reason::WouldDrop && event.packet.action == Action::Pass));
    assert_eq!(told.iter().filter(|event| event.banned).count(), 1);
    assert_eq!(judge(&limiter, &frame.build()), (Action::Pass, Reason::WouldDrop));
    // The ban is real: from now on, it is obeyed.
    limiter.set_count_only(false).unwrap();
    assert_eq!(judge(&limiter, &frame.build()), (Action::Drop, Reason::Banned));
}
