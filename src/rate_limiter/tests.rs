//! What can only be tried from inside: another CPU's clock, and buckets idle for longer than any test runs. These need
//! root.

use std::{
    net::IpAddr,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use super::{RateLimiter, RateLimiterConfig, Tier, book::Book, rate::shifts, source::Source, source::tag};
use crate::{
    Action, Rate, Scope, Stage as _,
    abi::rate_limiter::{TIME_MASK, UNIT_SHIFT},
    base::Records,
    lpm::LINE_WORDS,
    sys::{self, mmap::Mapping},
};

/// An IPv4 UDP packet: Ethernet, IP, UDP, ten bytes; from 192.0.2.1.
fn frame() -> [u8; 60] {
    let mut frame = [0; 60];
    frame[12..14].copy_from_slice(&[8, 0]);
    frame[14..34].copy_from_slice(&[0x45, 0, 0, 38, 0, 0, 0, 0, 64, 17, 0, 0, 192, 0, 2, 1, 10, 0, 0, 1]);
    frame[34..42].copy_from_slice(&[4, 0, 0, 53, 0, 18, 0, 0]);
    frame
}

const SOURCE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

fn limiter(rate: Rate) -> RateLimiter {
    RateLimiter::load(&RateLimiterConfig::default().limit(Scope::All, rate)).unwrap()
}

fn passes(limiter: &RateLimiter, count: usize) -> usize {
    (0..count).filter(|_| limiter.test_run(&frame()).unwrap().action == Action::Pass).count()
}

/// Sets the arrival time of the source's bucket, in ns from now.
fn set_lead(limiter: &RateLimiter, lead: i64) {
    let key = Source::of(SOURCE, &limiter.policy()).key(&limiter.buckets, tag(0, 0));
    let entry = limiter.buckets.get(key).unwrap();
    let (left, right) = shifts((entry.value() >> UNIT_SHIFT) as u32);
    let at = (sys::monotonic().as_nanos() as u64).wrapping_add_signed(lead);
    let value = entry.value() & !TIME_MASK | ((at << left) >> right) & TIME_MASK;
    assert!(limiter.buckets.update(&entry, value));
}

/// Trap R3: another CPU's clock was ahead when it wrote the bucket. For this one, time went back: no packet is given
/// away, and none is lost for longer than the clocks differ.
#[test]
fn r3_a_clock_that_went_back_gives_nothing_away() {
    for rate in
        [Rate::per_second(100).burst(50), Rate::per_second(10_000).burst(5), Rate::per_second(1_000_000).burst(100)]
    {
        let limiter = limiter(rate);
        assert_eq!(passes(&limiter, 1), 1);
        // The burst lasts for some time; the other clock is that much and more ahead.
        let burst = rate.burst_size() * 1_000_000_000 / rate.amount();
        for ahead in [1, 20_000_000, 400_000_000] {
            let set = Instant::now();
            set_lead(&limiter, (burst + ahead) as i64);
            // Unless this machine was so slow that the time has come; the coarse clock is a tick early at most.
            let came = || set.elapsed() + Duration::from_millis(10) >= Duration::from_nanos(ahead);
            assert!(passes(&limiter, 1) == 0 || came(), "{rate}: {ahead} ns ahead");
        }
        set_lead(&limiter, (burst + 30_000_000) as i64);
        std::thread::sleep(Duration::from_nanos(burst + 60_000_000));
        assert_eq!(passes(&limiter, 1), 1, "{rate}");
    }
}

#[test]
fn a_bucket_that_was_idle_for_any_time_is_empty() {
    for rate in [Rate::per_hour(1).burst(5), Rate::per_second(1000).burst(5), Rate::per_second(20_000_000).burst(5)] {
        let limiter = limiter(rate);
        assert_eq!(passes(&limiter, 1), 1);
        // The coarse clock is a tick late at most.
        for idle in [20_000_000_u64, 1_000_000_000, 60_000_000_000, 1_000_000_000_000, 3_200_000_000_000] {
            // What this machine was up for, at most.
            let idle = idle.min(sys::monotonic().as_nanos() as u64 - 1);
            set_lead(&limiter, -(idle as i64));
            assert_eq!(limiter.source(SOURCE).unwrap()[0].level, 0.0, "{rate}: idle for {idle} ns");
            assert!(limiter.top(9).unwrap().is_empty());
            assert!(passes(&limiter, 5) == 5, "{rate}: idle for {idle} ns");
            let level = limiter.source(SOURCE).unwrap()[0].level;
            assert!((0.0..=1.0).contains(&level));
        }
    }
}

/// A source that was seen twice keeps its idle bucket for as long as was asked for, and no longer than a second more, however
/// many others want its place. One that was idle for longest goes, however finely its time is counted.
#[test]
fn an_idle_bucket_is_protected_for_a_time() {
    for rate in [Rate::per_second(100).burst(5), Rate::per_second(20_000_000).burst(5)] {
        for (idle, stays) in [(2000, true), (5300, false), (3_200_000, false)] {
            let config =
                RateLimiterConfig::default().sources(64).protect(Duration::from_secs(4)).limit(Scope::All, rate);
            let limiter = RateLimiter::load(&config).unwrap();
            assert_eq!(passes(&limiter, 2), 2);
            let idle = (idle * 1_000_000).min(sys::monotonic().as_nanos() as i64 - 1);
            set_lead(&limiter, -idle);
            for n in 0..2000_u16 {
                let mut other = frame();
                other[26..30].copy_from_slice(&[10, 0, (n >> 8) as u8, n as u8]);
                // However long this takes.
                if stays {
                    set_lead(&limiter, -idle);
                }
                limiter.test_run(&other).unwrap();
            }
            let known = !limiter.source(SOURCE).unwrap().is_empty();
            assert_eq!(known, stays, "{rate}: idle for {idle} ns");
        }
    }
}

/// What a process leaves that was killed, or that edited beside another one.
#[test]
fn damaged_tiers_are_dropped_or_built_again_with_an_account() {
    let limiter = limiter(Rate::per_second(1_000_000));
    for third in 0..40 {
        limiter.tiers().insert(format!("192.0.{third}.0/25").parse().unwrap(), Tier::Blocked).unwrap();
    }
    assert_eq!(passes(&limiter, 1), 0);
    let core = &limiter.core;
    // The node of 192.0.0.0/16 leads back to itself.
    let memory = Mapping::new(core.map("lpm_lines")).unwrap();
    let words = memory.as_ref();
    let node = words[limiter.policy().roots[0] as usize * LINE_WORDS + 0xc000].load(Ordering::SeqCst);
    let first = (node & 0x1fff_ffff) as usize * LINE_WORDS;
    words[first..first + 2 * LINE_WORDS].iter().for_each(|word| word.store(node, Ordering::SeqCst));
    // A record is of a class that there is not.
    let records = Records::<crate::abi::rate_limiter::Tier>::of(core, "tiers").unwrap();
    let third = (0..records.len()).find(|at| records.read(*at).address[..3] == [192, 0, 3]).unwrap();
    let mut record = records.read(third);
    record.class = 200;
    records.write(third, &record);
    let book = Book::adopt(core).unwrap();
    let account = core.recovery();
    assert_eq!((account.dropped.len(), account.rebuilt.len()), (1, 1), "{account:?}");
    assert_eq!(book.tiers().count(), 39);
    assert_eq!(passes(&limiter, 1), 0, "192.0.2.1 is blocked");
    let mut other = frame();
    other[28] = 3;
    assert_eq!(limiter.test_run(&other).unwrap().action, Action::Pass);
}
