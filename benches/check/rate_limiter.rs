//! What a decision costs for sources in the table, against the same limiter on the kernel's LRU_HASH, in one run; and what a
//! tier leaves behind.

use xdpkit::{Limit, Rate, RateLimiter, RateLimiterConfig, Reason, Scope, Stage as _, Tier};
use xdpkit_lab::{
    bench::{Checks, Harness, LruLimiter, Random, Yardstick, random_v4},
    frame::Frame,
};

/// Fixed: to go on until the bound holds would be to wait for luck.
const ROUNDS: u32 = 100;

/// Windows are good to about this, in nanoseconds.
const NOISE: f64 = 2.0;

/// So much that nobody is over it.
const ENDLESS: Rate = Rate::per_second(976).burst(1 << 20);

pub(crate) fn check(checks: &mut Checks) {
    checks.group("rate_limiter/known", |checks| {
        // While all of it is in the caches, parsing and counting are more than half of either; beyond, half is allowed.
        for (sources, count, limit) in [(1_usize << 10, "1k", 25.0), (1 << 16, "64k", 90.0), (1 << 20, "1M", 130.0)] {
            let (limiter, lru, harness) = known(sources);
            let here = Yardstick::measure(sources, ROUNDS).unwrap();
            println!("{here}");
            let costs = harness.costs_above_empty(&[limiter.program_fd(), lru.program()], ROUNDS).unwrap();
            let [own, lru] = [0, 1].map(|row| costs[row].minimum);
            checks.at_most(&format!("rate_limiter/known/{count}"), "ns", own, here.scale(limit) + NOISE);
            if count != "1k" {
                checks.at_most(&format!("rate_limiter/known/{count}/against-half-an-lru"), "ns", own, lru * 0.5);
            }
        }
    });
    checks.group("rate_limiter/tier-gone", |checks| {
        // A limit of bytes that only tiers have makes everybody's packets take the longer way. When it goes, so does that.
        let limiter = RateLimiter::load(&RateLimiterConfig::default().limit(Scope::All, ENDLESS)).unwrap();
        let net = "203.0.113.0/24".parse().unwrap();
        let flows = random_v4(1 << 8);
        let frame = Frame::udp(flows[0], "10.0.0.1:53".parse().unwrap());
        let harness = Harness::new(&frame.payload(&[0; 18]).build(), &flows).unwrap();
        let cost = || {
            harness.verdict(limiter.program_fd(), 1 << 10).unwrap();
            harness.cost_above_empty(limiter.program_fd(), 50).unwrap().minimum
        };
        let before = cost();
        limiter.tiers().insert(net, Tier::Limited(Limit::bytes(Rate::per_second(1_000_000)))).unwrap();
        let with = cost();
        limiter.tiers().remove(net).unwrap();
        println!("ns above an empty program: {before:.1}, with the tier {with:.1}");
        checks.at_most("rate_limiter/tier-gone", "ns", cost(), (before + with) / 2.0);
    });
}

/// One scope, no tiers, no bans, the coarse clock; the library's limiter and the one on an LRU_HASH, with twice the room that
/// the sources need. All sources are known to both, and within their limit.
pub(crate) fn known(sources: usize) -> (RateLimiter, LruLimiter, Harness) {
    let flows = random_v4(sources);
    let mut others = flows.clone();
    Random::new(9).shuffle(&mut others);
    let frame = Frame::udp(flows[0], "198.51.100.1:53".parse().unwrap()).payload(&[0; 18]).build();
    let [before, harness] = [&others, &flows].map(|flows| Harness::new(&frame, flows).unwrap());
    let config = RateLimiterConfig::default().sources(2 * sources as u32).limit(Scope::All, ENDLESS);
    let limiter = RateLimiter::load(&config).unwrap();
    let lru = LruLimiter::load(2 * sources as u32, 1000, 1 << 20).unwrap();
    // In one order first, in another one then: an LRU_HASH would find its elements one behind the other.
    for program in [limiter.program_fd(), lru.program()] {
        before.verdict(program, sources as u32).unwrap();
        harness.verdict(program, sources as u32).unwrap();
    }
    let stats = limiter.stats().unwrap();
    assert_eq!(stats.reason(Reason::WithinLimit), stats.total());
    (limiter, lru, harness)
}
