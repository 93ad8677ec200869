//! The rate limiter's verdicts: scopes, tiers, bans, bursts, what is charged; traps R2, R4, R5 and R7, P1 to P7.

mod common;

use std::{net::IpAddr, time::Duration};

use common::judge;
use xdpkit::{
    Action, BanPolicy, Decision, Error, Limit, Meter, Rate, RateLimiter, RateLimiterConfig, Reason, Scope, Stage as _,
    TestRun, Tier, ipnet::IpNet,
};
use xdpkit_lab::frame::Frame;

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

/// So slow that nothing comes back while a test runs: a burst is all there is.
fn just(burst: u64) -> Rate {
    Rate::per_hour(1).burst(burst)
}

fn limiter(limits: &[(Scope, u64)]) -> RateLimiter {
    let config =
        limits.iter().fold(RateLimiterConfig::default(), |config, (scope, burst)| config.limit(*scope, just(*burst)));
    RateLimiter::load(&config).unwrap()
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn server(source: IpAddr) -> IpAddr {
    address(if source.is_ipv4() { "10.0.0.1" } else { "2001:db8::1" })
}

fn udp(source: &str, port: u16) -> Frame {
    let source = address(source);
    Frame::udp((source, 4000).into(), (server(source), port).into())
}

fn tcp(source: &str, port: u16, flags: u8) -> Frame {
    let source = address(source);
    Frame::tcp((source, 4000).into(), (server(source), port).into()).flags(flags)
}

fn echo(source: &str) -> Frame {
    Frame::echo(address(source), server(address(source)), 1, 1)
}

/// How many of so many frames pass, one after the other.
fn passed(limiter: &RateLimiter, frame: &Frame, count: usize) -> usize {
    let frame = frame.build();
    (0..count).filter(|_| limiter.test_run(&frame).unwrap().action == Action::Pass).count()
}

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

/// What is in which scope, by both families.
#[test]
fn every_scope_is_about_its_own_packets() {
    let (v4, v6) = ("192.0.2.1", "2001:db8:1::1");
    for source in [v4, v6] {
        let kind = if source == v4 { (8, 0) } else { (128, 129) };
        let icmp = |kind| Frame::icmp(address(source), server(address(source)), kind, 0, [0; 4]);
        let frames: [(&str, Frame, &[Scope]); 12] = [
            ("SYN to 80", tcp(source, 80, SYN), &[Scope::All, Scope::Tcp, Scope::TcpSyn, Scope::TcpPort(80)]),
            ("SYN+ACK to 80", tcp(source, 80, SYN | ACK), &[Scope::All, Scope::Tcp, Scope::TcpPort(80)]),
            ("ACK to 81", tcp(source, 81, ACK), &[Scope::All, Scope::Tcp]),
            ("SYN+ECE+CWR to 81", tcp(source, 81, SYN | 0xc0), &[Scope::All, Scope::Tcp, Scope::TcpSyn]),
            ("UDP to 80", udp(source, 80), &[Scope::All, Scope::Udp]),
            ("UDP to 53", udp(source, 53), &[Scope::All, Scope::Udp, Scope::UdpPort(53)]),
            ("echo request", icmp(kind.0), &[Scope::All, Scope::IcmpEcho]),
            ("echo reply", icmp(kind.1), &[Scope::All]),
            ("GRE", Frame::ip(address(source), server(address(source)), 47).payload(&[0; 24]), &[Scope::All]),
            (
                "first fragment to 53",
                udp(source, 53).payload(&[0; 64]).fragment(0, true),
                &[Scope::All, Scope::Udp, Scope::UdpPort(53)],
            ),
            ("later fragment of UDP", udp(source, 53).payload(&[0; 64]).fragment(64, true), &[Scope::All, Scope::Udp]),
            (
                "tagged SYN to 80",
                tcp(source, 80, SYN).vlan(7),
                &[Scope::All, Scope::Tcp, Scope::TcpSyn, Scope::TcpPort(80)],
            ),
        ];
        let all = [
            Scope::All,
            Scope::Tcp,
            Scope::TcpSyn,
            Scope::Udp,
            Scope::TcpPort(80),
            Scope::UdpPort(53),
            Scope::IcmpEcho,
        ];
        for scope in all {
            let limiter = limiter(&[(scope, 1)]);
            for (name, frame, scopes) in &frames {
                limiter.reset(address(source)).unwrap();
                let frame = frame.build();
                let first = judge(&limiter, &frame);
                let expected = if scopes.contains(&scope) { Reason::WithinLimit } else { Reason::NoLimit };
                assert_eq!(first, (Action::Pass, expected), "{scope}: {name} from {source}");
                let second = judge(&limiter, &frame).0;
                assert_eq!(second == Action::Drop, scopes.contains(&scope), "{scope}: {name} from {source}");
            }
        }
    }
}

#[test]
fn neighbours_and_what_is_not_ip_are_not_limited() {
    let limiter = limiter(&[(Scope::All, 1)]);
    let mac = [2, 0, 0, 0, 0, 1];
    let arp = Frame::arp_request(mac, "10.0.0.9".parse().unwrap(), "10.0.0.1".parse().unwrap()).build();
    let solicitation =
        Frame::neighbour_solicitation(mac, "2001:db8::9".parse().unwrap(), "2001:db8::1".parse().unwrap());
    for _ in 0..5 {
        assert_eq!(judge(&limiter, &arp), (Action::Pass, Reason::Arp));
        assert_eq!(judge(&limiter, &solicitation.build()), (Action::Pass, Reason::NeighbourDiscovery));
        assert_eq!(judge(&limiter, &Frame::ethernet(0x88cc).payload(&[0; 46]).build()), (Action::Pass, Reason::NotIp));
    }
    // From behind a router, it is ICMPv6 as any other.
    let forged = solicitation.clone().ttl(64).build();
    assert_eq!(judge(&limiter, &forged).1, Reason::WithinLimit);
    assert_eq!(judge(&limiter, &forged).1, Reason::OverPackets);
    let strict = RateLimiterConfig::default().pass_neighbours(false).limit(Scope::All, just(1));
    let strict = RateLimiter::load(&strict).unwrap();
    assert_eq!(judge(&strict, &solicitation.build()).1, Reason::WithinLimit);
    assert_eq!(judge(&strict, &solicitation.build()).1, Reason::OverPackets);
}

#[test]
fn malformed_packets_are_dropped_and_unsupported_ones_go_by_their_policy() {
    let short = udp("192.0.2.1", 53).udp_length(4).build();
    let deep = udp("192.0.2.1", 53).vlan(1).vlan(2).vlan(3).build();
    for (decision, action) in [(Decision::Deny, Action::Drop), (Decision::Allow, Action::Pass)] {
        let config = RateLimiterConfig::default().unsupported(decision).limit(Scope::All, just(1));
        let limiter = RateLimiter::load(&config).unwrap();
        for _ in 0..3 {
            assert_eq!(judge(&limiter, &short), (Action::Drop, Reason::UdpLength));
            assert_eq!(judge(&limiter, &deep), (action, Reason::VlanTooDeep));
        }
        assert_eq!(limiter.tracked(), 0, "neither has cost its source anything");
    }
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
fn bans_are_set_listed_and_lifted_and_end_by_themselves() {
    let limiter = limiter(&[(Scope::All, 100)]);
    let (bans, v4, v6) = (limiter.bans(), address("192.0.2.1"), address("2001:db8:1::1"));
    limiter.tiers().insert(net("192.0.2.1/32"), Tier::Exempt).unwrap();
    assert!(bans.is_empty().unwrap());
    assert_eq!(bans.insert(v4, None).unwrap(), None);
    assert_eq!(bans.insert(v6, Some(Duration::from_millis(200))).unwrap(), None);
    assert_eq!(judge(&limiter, &udp("192.0.2.1", 1).build()), (Action::Drop, Reason::Banned));
    assert_eq!(
        judge(&limiter, &tcp("2001:db8:1::9", 1, SYN).build()),
        (Action::Drop, Reason::Banned),
        "all of its /64"
    );
    assert_eq!(judge(&limiter, &udp("192.0.2.2", 1).build()).1, Reason::WithinLimit);
    let listed: Vec<_> = bans.iter().unwrap().map(|ban| (ban.source, ban.until.is_some())).collect();
    assert_eq!(listed, [(net("192.0.2.1/32"), false), (net("2001:db8:1::/64"), true)]);
    assert!(bans.get(v6).unwrap().unwrap().remaining().unwrap() <= Duration::from_millis(200));

    std::thread::sleep(Duration::from_millis(250));
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
        let first = events.try_next().unwrap();
        assert!(
            !first.banned && first.scope == Some(Scope::All) && first.packet.reason == Reason::OverPackets,
            "{first}"
        );
        assert!(events.try_next().is_none(), "told once");
        run(200);
        let ban = limiter.bans().get(address(source)).unwrap().unwrap();
        assert!(ban.remaining().unwrap() > Duration::from_secs(590));
        assert!(events.try_next().unwrap().banned && events.try_next().is_none());
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
