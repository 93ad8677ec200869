//! The rate limiter under load: two CPUs on one source, floods, a full table, a model; traps R1 to R4, R6, R8.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    os::fd::BorrowedFd,
    sync::{Barrier, Mutex},
    time::{Duration, Instant},
};

use crate::common::times;
use fastrand::Rng;
use xdpkit::{
    Action, Limit, Rate, RateLimiter, RateLimiterConfig, Reason, Scope, Stage as _, TableFull, Tier, ipnet::IpNet,
};
use xdpkit_lab::{
    bench::{Harness, TokenBucket, random_v4},
    frame::Frame,
};

/// Longest tick of a kernel, HZ=100.
const TICK: f64 = 0.010;

fn udp(source: IpAddr, port: u16, length: usize) -> Vec<u8> {
    let server: IpAddr = if source.is_ipv4() { "10.0.0.1" } else { "2001:db8::1" }.parse().unwrap();
    Frame::udp((source, 4000).into(), (server, port).into()).payload(&vec![0; length]).build()
}

fn v4(number: u32) -> IpAddr {
    number.to_be_bytes().into()
}

/// A harness that runs one frame again and again. Unlike test runs of the stage itself, which take milliseconds to begin, it
/// leaves no gaps.
fn of_one(frame: &[u8], source: IpAddr) -> Harness {
    Harness::new(frame, &[(source, 4000).into()]).unwrap()
}

/// What came of one source's packets.
struct Hammered {
    passed: u64,
    offered: u64,
    /// From before the first to after the last.
    seconds: f64,
}

/// One source's packets from so many threads at once for some time, to a program that leads to the limiter's.
fn hammer(limiter: &RateLimiter, program: BorrowedFd<'_>, threads: usize, time: Duration) -> Hammered {
    let source = v4(0xc000_0201);
    let frame = udp(source, 53, 18);
    let before = limiter.stats().unwrap();
    let barrier = Barrier::new(threads);
    let times: Mutex<Vec<Instant>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let harness = of_one(&frame, source);
                barrier.wait();
                let start = Instant::now();
                while start.elapsed() < time {
                    harness.verdict(program, 100_000).unwrap();
                }
                times.lock().unwrap().extend([start, Instant::now()]);
            });
        }
    });
    let times = times.into_inner().unwrap();
    let seconds = (*times.iter().max().unwrap() - *times.iter().min().unwrap()).as_secs_f64();
    let stats = limiter.stats().unwrap().since(&before);
    Hammered { passed: stats.passed().packets, offered: stats.total().packets, seconds }
}

/// Traps R1 and R4: what two CPUs admit together is what one may, from whatever is offered and whenever: a plain
/// token bucket in front of the limiter sees the same packets at the same moments. And over any time, it is never more than the
/// limit.
#[test]
fn r1_r4_two_cpus_admit_what_one_may() {
    let time = Duration::from_millis(times(1500, 10_000, 1500) as u64);
    for (rate, burst) in
        [(10, 10), (100, 10), (1000, 1), (1000, 100), (100_000, 10_000), (1_000_000, 100), (1_000_000, 100_000)]
    {
        let limit = Rate::per_second(rate).burst(burst);
        let limiter = RateLimiter::load(&RateLimiterConfig::default().limit(Scope::All, limit)).unwrap();
        let interval = Duration::from_nanos(1_000_000_000 / rate);
        let bucket = TokenBucket::before(limiter.program_fd(), interval, burst).unwrap();
        let Hammered { passed, offered, seconds } = hammer(&limiter, bucket.program(), 2, time);
        let count = bucket.count().unwrap();
        println!(
            "{limit}: {passed} of {offered} in {seconds:.2} s, {:+.3} % of the limit; a token bucket admits {}, nobody \
             asked for {:?} in {} gaps",
            (passed as f64 / (rate as f64 * seconds + burst as f64) - 1.0) * 100.0,
            count.admitted,
            count.lost,
            count.overflows
        );
        assert_eq!(count.offered, offered);
        let most = rate as f64 * (seconds + TICK) + burst as f64;
        assert!(passed as f64 <= most, "{limit}: {passed} in {seconds} s, at most {most}");
        // By the coarse clock, the bucket may be full up to a tick later or earlier, each time.
        let coarse = interval * burst as u32 >= 2 * Duration::from_secs_f64(TICK);
        let ticks = if coarse { rate as f64 * TICK * count.overflows as f64 } else { 0.0 };
        // On a busy machine, a CPU stands still between the two clocks: each gap that nobody asked in is longer for one of them.
        let gaps = (count.overflows as f64).sqrt();
        let (wanted, off) = (count.admitted as f64, passed as f64 - count.admitted as f64);
        assert!(off.abs() <= wanted / 100.0 + 1.0 + ticks + gaps, "{limit}: {passed} of {offered}, {count:?}");
    }
}

/// The same without anything in between that keeps the CPUs apart, where there is most to win by a lost update.
#[test]
fn r1_two_cpus_at_once_never_admit_more_than_the_limit() {
    let time = Duration::from_millis(times(500, 5000, 500) as u64);
    for (rate, burst) in [(1000, 1), (100_000, 10_000), (1_000_000, 100)] {
        let limit = Rate::per_second(rate).burst(burst);
        let limiter = RateLimiter::load(&RateLimiterConfig::default().limit(Scope::All, limit)).unwrap();
        let Hammered { passed, offered, seconds } = hammer(&limiter, limiter.program_fd(), 2, time);
        let most = rate as f64 * (seconds + TICK) + burst as f64;
        println!("{limit}: {passed} of {offered} in {seconds:.2} s, at most {most:.0}");
        assert!(passed as f64 <= most, "{limit}: {passed} in {seconds} s, at most {most}");
        assert!(passed >= burst);
    }
}

#[test]
fn huge_and_tiny_rates_are_what_they_say() {
    let time = Duration::from_millis(times(500, 3000, 500) as u64);
    for (limit, least, most) in [
        // As fast as any packets can come: never in the way.
        (Rate::per_second(1_000_000_000), 1.0, 1.0),
        (Rate::per_hour(1), 0.0, 0.0),
        (Rate::per_minute(1).burst(3), 0.0, 0.0),
    ] {
        let limiter = RateLimiter::load(&RateLimiterConfig::default().limit(Scope::All, limit)).unwrap();
        let Hammered { passed, offered, .. } = hammer(&limiter, limiter.program_fd(), 2, time);
        let offered = offered as f64;
        let (least, most) = (least * offered, if most > 0.0 { offered } else { limit.burst_size() as f64 });
        assert!((least.max(1.0)..=most).contains(&(passed as f64)), "{limit}: {passed} of {offered}");
    }
}

/// Trap R2: two CPUs that see a source for the first time at the same moment make one bucket.
#[test]
fn r2_a_new_source_on_two_cpus_has_one_bucket() {
    let limit = Rate::per_hour(1).burst(3);
    let rounds = times(2000, 50_000, 100) as u32;
    let limiter =
        RateLimiter::load(&RateLimiterConfig::default().sources(4 * rounds).limit(Scope::All, limit)).unwrap();
    let barrier = Barrier::new(2);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for round in 0..rounds {
                    let frame = udp(v4(0x0b00_0000 + round), 53, 18);
                    barrier.wait();
                    for _ in 0..4 {
                        limiter.test_run(&frame).unwrap();
                    }
                }
            });
        }
    });
    let stats = limiter.stats().unwrap();
    // Who lost every race is told apart; with two CPUs, it hardly happens.
    let contended = stats.reason(Reason::Contended).packets;
    assert!(contended * 1000 <= stats.total().packets, "{stats:?}");
    assert!(
        stats.passed().packets <= u64::from(rounds) * 3 && stats.passed().packets + contended >= u64::from(rounds) * 3,
        "{stats:?}"
    );
    assert_eq!(limiter.tracked(), rounds as usize);
}

/// Trap R7, in numbers.
#[test]
fn r7_a_million_addresses_in_one_prefix_share_its_limit() {
    let count = times(1 << 16, 1 << 20, 1 << 10);
    let base = u128::from("2001:db8:5:6::".parse::<Ipv6Addr>().unwrap());
    let mut random = Rng::with_seed(7);
    let flows: Vec<SocketAddr> =
        (0..count).map(|_| (Ipv6Addr::from(base | u128::from(random.u64(..))), 99).into()).collect();
    let harness = Harness::new(&udp(flows[0].ip(), 53, 18), &flows).unwrap();
    let (rate, burst) = (1000, 1000);
    let limit = Rate::per_second(rate).burst(burst);
    let limiter = RateLimiter::load(&RateLimiterConfig::default().limit(Scope::All, limit)).unwrap();
    let start = Instant::now();
    let mut sent = 0;
    while sent < count || start.elapsed() < Duration::from_secs(1) {
        sent += count.min(1 << 16);
        harness.verdict(limiter.program_fd(), count.min(1 << 16) as u32).unwrap();
    }
    let seconds = start.elapsed().as_secs_f64();
    let stats = limiter.stats().unwrap();
    let most = (rate as f64 * (seconds + TICK) + burst as f64) * 1.01;
    assert!(stats.total().packets >= count as u64 && (stats.passed().packets as f64) <= most, "{stats:?}, {most}");
    assert_eq!(limiter.tracked(), 1);
}

/// Trap R8: a flood of spoofed sources, many times what the table holds. And R5: bans are untouched.
#[test]
fn r8_a_spoofed_flood_takes_nothing_from_who_is_known() {
    let spoofed = times(2_000_000, 10_000_000, 100_000) as u64;
    let limit = Rate::per_second(10).burst(10);
    let config = RateLimiterConfig::default().sources(65_536).full(TableFull::Share(Rate::per_second(1000)));
    let limiter = RateLimiter::load(&config.limit(Scope::All, limit)).unwrap();
    let offender = of_one(&udp(v4(0xc000_0202), 53, 18), v4(0xc000_0202));
    let v6 = |n: u16| IpAddr::from(Ipv6Addr::new(0x2001, 0xdb8, 7, n, 0, 0, 0, 1));
    let clients: Vec<_> = (0..20).flat_map(|n| [v4(0xc000_0300 + n), v6(n as u16)]).map(|ip| udp(ip, 53, 18)).collect();
    limiter.bans().insert(v4(0xc000_0203), None).unwrap();
    let banned = udp(v4(0xc000_0203), 53, 18);
    let flows = random_v4((spoofed as usize).next_power_of_two().min(1 << 23));
    let flood = Harness::new(&udp(flows[0].ip(), 53, 18), &flows).unwrap();

    // Known before the flood.
    for frame in clients.iter().chain(&clients) {
        assert_eq!(limiter.test_run(frame).unwrap().action, Action::Pass);
    }
    offender.verdict(limiter.program_fd(), 1000).unwrap();
    let (mut sent, mut lost, mut excess, mut excess_passed, mut out) = (0, 0, 0, 0, 0_u64);
    let start = Instant::now();
    let mut due = Duration::ZERO;
    while out < spoofed {
        flood.verdict(limiter.program_fd(), 20_000).unwrap();
        out += 20_000;
        // Half of what they may send, and nothing is made up for when the machine was slow.
        if start.elapsed() >= due {
            due = start.elapsed() + Duration::from_millis(200);
            for frame in &clients {
                sent += 1;
                lost += u32::from(limiter.test_run(frame).unwrap().action != Action::Pass);
            }
        }
        let before = limiter.stats().unwrap().passed().packets;
        offender.verdict(limiter.program_fd(), 1000).unwrap();
        excess += 1000;
        excess_passed += limiter.stats().unwrap().passed().packets - before;
        assert_eq!(limiter.test_run(&banned).unwrap().action, Action::Drop);
    }
    let seconds = start.elapsed().as_secs_f64();
    let stats = limiter.stats().unwrap();
    let unknown = stats.reasons.iter().filter(|line| line.reason == Reason::UnknownSource);
    let of = |action| unknown.clone().filter(|line| line.action == action).map(|line| line.count.packets).sum::<u64>();
    println!(
        "{out} spoofed in {seconds:.1} s, {} without a place, of which {} passed; {lost} of {sent} lost; {excess_passed} of {excess} passed",
        of(Action::Drop) + of(Action::Pass),
        of(Action::Pass)
    );
    assert!(lost * 100 <= sent, "{lost} of {sent} packets in profile were lost");
    assert!(excess_passed as f64 <= 10.0 * (seconds + TICK) + 1.0, "the offender gets its rate, and no burst again");
    assert!(of(Action::Pass) as f64 <= 1000.0 * (seconds + TICK) + 1000.0, "the shared allowance is one");
    // Whether the table was ever full depends on the machine's pace, as buckets are idle after 100 ms: r6 fills one.
}

/// Trap R6.
#[test]
fn r6_a_full_table_does_as_it_was_told() {
    let limit = Rate::per_hour(1).burst(1);
    for (full, passing) in
        [(TableFull::Drop, 0), (TableFull::Pass, u64::MAX), (TableFull::Share(Rate::per_hour(1).burst(7)), 7)]
    {
        let limiter =
            RateLimiter::load(&RateLimiterConfig::default().sources(64).full(full).limit(Scope::All, limit)).unwrap();
        assert_eq!(limiter.table_full(), full);
        for n in 0..1000 {
            limiter.test_run(&udp(v4(0x0a00_0000 + n), 53, 18)).unwrap();
        }
        let stats = limiter.stats().unwrap();
        let unknown = stats.reason(Reason::UnknownSource).packets;
        let placed = stats.reason(Reason::WithinLimit).packets;
        assert_eq!((placed, placed + unknown), (limiter.tracked() as u64, 1000));
        assert!((32..=128).contains(&placed), "{placed}");
        assert_eq!(stats.passed().packets, placed + unknown.min(passing));
        // Those that have a place keep it, and their limit.
        let before = limiter.stats().unwrap();
        for n in 0..1000 {
            limiter.test_run(&udp(v4(0x0a00_0000 + n), 53, 18)).unwrap();
        }
        assert_eq!(limiter.stats().unwrap().since(&before).reason(Reason::OverPackets).packets, placed);
    }
}

/// Generated packets against a model without time: limits so slow that nothing comes back.
#[test]
fn every_verdict_is_the_models() {
    for seed in 0..times(3, 30, 1) as u64 {
        let mut random = Rng::with_seed(seed);
        let slow = |burst: u64| Rate::per_hour(1).burst(burst);
        let bytes = |burst: u64| Rate::per_hour(60).burst(burst);
        let scopes = [Scope::UdpPort(53), Scope::All, Scope::Udp, Scope::UdpPort(54)];
        let any = |random: &mut Rng| match random.u8(..3) {
            0 => Limit::packets(slow(random.u64(1..30))),
            1 => Limit::bytes(bytes(random.u64(1514..9000))),
            _ => Limit::packets(slow(random.u64(1..30))).and_bytes(bytes(random.u64(1514..9000))),
        };
        let limits: Vec<_> = scopes[..1 + random.usize(..4)].iter().map(|scope| (*scope, any(&mut random))).collect();
        let config =
            limits.iter().fold(RateLimiterConfig::default(), |config, (scope, limit)| config.limit(*scope, *limit));
        let limiter = RateLimiter::load(&config).unwrap();
        let mut tiers: Vec<(IpNet, Tier)> = Vec::new();
        for n in 0..random.u8(..6) {
            let net =
                format!("10.{}.0.0/{}", n % 3, random.choice([14, 16, 20]).unwrap()).parse::<IpNet>().unwrap().trunc();
            let tier = match random.u8(..4) {
                0 => Tier::Exempt,
                1 => Tier::Blocked,
                _ => Tier::Limited(any(&mut random)),
            };
            if tiers.iter().all(|(other, _)| *other != net) {
                tiers.push((net, tier));
            }
        }
        limiter.tiers().replace_all(tiers.iter().copied()).unwrap();

        // What is left of each limit, by source, scope and meter.
        let mut left: HashMap<(IpAddr, Scope, usize), u64> = HashMap::new();
        for at in 0..times(2000, 20_000, 300) {
            let source = IpAddr::from([10, random.u8(..4), random.u8(..2) * 32, random.u8(..3)]);
            let (port, length) = (random.u16(53..56), random.usize(18..1500));
            let frame = udp(source, port, length);
            let tier = tiers.iter().filter(|(net, _)| net.contains(&source)).max_by_key(|(net, _)| net.prefix_len());
            let wanted = match tier.map(|(_, tier)| *tier) {
                Some(Tier::Exempt) => Reason::Exempt,
                Some(Tier::Blocked) => Reason::Blocked,
                tier => {
                    let matches = |scope: Scope| !matches!(scope, Scope::UdpPort(own) if own != port);
                    let mut asked = Vec::new();
                    for (scope, own) in limits.iter().filter(|(scope, _)| matches(*scope)) {
                        let limit = if let Some(Tier::Limited(limit)) = tier { limit } else { *own };
                        for (meter, amount) in [(xdpkit::Meter::Packets, 1), (xdpkit::Meter::Bytes, frame.len() as u64)]
                        {
                            if let Some(rate) = limit.rate(meter) {
                                asked.push(((source, *scope, meter as usize), rate.burst_size(), amount));
                            }
                        }
                    }
                    let refuses = asked.iter().find(|(key, burst, amount)| left.get(key).unwrap_or(burst) < amount);
                    match refuses {
                        Some(((.., meter), ..)) if *meter == 0 => Reason::OverPackets,
                        Some(_) => Reason::OverBytes,
                        None if asked.is_empty() => Reason::NoLimit,
                        None => {
                            for (key, burst, amount) in asked {
                                *left.entry(key).or_insert(burst) -= amount;
                            }
                            Reason::WithinLimit
                        }
                    }
                }
            };
            let before = limiter.stats().unwrap();
            limiter.test_run(&frame).unwrap();
            let counted = limiter.stats().unwrap().since(&before);
            assert_eq!(
                counted.reasons[0].reason, wanted,
                "seed {seed}, packet {at} from {source} to {port}, {length} bytes"
            );
        }
    }
}

#[test]
fn what_a_source_has_used_up_comes_back_at_the_rate() {
    let limit = Rate::per_second(50).burst(10);
    let limiter = RateLimiter::load(&RateLimiterConfig::default().limit(Scope::All, limit)).unwrap();
    let frame = udp(v4(0xc000_0201), 53, 18);
    // Until one is refused: all that there was is used up.
    let drain = || (0..).take_while(|_| limiter.test_run(&frame).unwrap().action == Action::Pass).count();
    let start = Instant::now();
    let mut total = drain();
    assert!(total >= 10);
    let mut least = 10.0;
    for _ in 0..5 {
        let refused = Instant::now();
        std::thread::sleep(Duration::from_millis(100));
        // What comes back in longer than 200 ms has no room.
        least += 50.0 * (refused.elapsed().as_secs_f64() - TICK).min(0.2) - 1.0;
        total += drain();
    }
    let most = 50.0 * (start.elapsed().as_secs_f64() + TICK) + 10.0;
    assert!((least..=most).contains(&(total as f64)), "{total}, {least} to {most} expected");
}
