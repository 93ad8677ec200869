//! What a decision costs for sources in the table, against the same limiter on the kernel's LRU_HASH, in one run.

mod common;

use common::is_emulated;
use xdpkit::{Limit, Rate, RateLimiter, RateLimiterConfig, Reason, Scope, Stage as _, Tier};
use xdpkit_lab::{
    bench::{Harness, LruLimiter, Random, Yardstick, random_v4},
    frame::Frame,
};

/// Fixed: to go on until the bound holds would be to wait for luck.
const ROUNDS: u32 = 100;

/// Windows are good to about this, in nanoseconds.
const NOISE: f64 = 2.0;

/// One scope, no tiers, no bans, the coarse clock.
#[test]
fn a_known_source_costs_less_than_in_an_lru_hash() {
    let _undisturbed = common::undisturbed();
    // While all of it is in the caches, parsing and counting are more than half of either; beyond, half is allowed.
    let most = common::times(1 << 16, 1 << 20, 1 << 10);
    let cases = [(1_usize << 10, 25.0, None), (1 << 16, 90.0, Some(0.5)), (1 << 20, 130.0, Some(0.5))];
    for (sources, limit, part) in cases.into_iter().filter(|(sources, ..)| *sources <= most) {
        let flows = random_v4(sources);
        let mut others = flows.clone();
        Random::new(9).shuffle(&mut others);
        let frame = Frame::udp(flows[0], "198.51.100.1:53".parse().unwrap()).payload(&[0; 18]).build();
        let [before, harness] = [&others, &flows].map(|flows| Harness::new(&frame, flows).unwrap());
        let rate = Rate::per_second(976).burst(1 << 20);
        // With twice the room that the sources need; nobody is over its limit.
        let config = RateLimiterConfig::default().sources(2 * sources as u32).limit(Scope::All, rate);
        let limiter = RateLimiter::load(&config).unwrap();
        let lru = LruLimiter::load(2 * sources as u32, 1000, 1 << 20).unwrap();
        let programs = [limiter.program_fd(), lru.program()];
        // In one order first, in another one then: an LRU_HASH would find its elements one behind the other.
        for program in programs {
            before.verdict(program, sources as u32).unwrap();
            harness.verdict(program, sources as u32).unwrap();
        }
        let stats = limiter.stats().unwrap();
        assert_eq!(stats.reason(Reason::WithinLimit), stats.total());
        if is_emulated() {
            println!("the machine is emulated: only verdicts were compared, not times");
            return;
        }
        let yardstick = Yardstick::measure(sources, ROUNDS).unwrap();
        let costs = harness.costs_above_empty(&programs, ROUNDS).unwrap();
        let [own, lru] = [0, 1].map(|row| costs[row].minimum);
        let limit = yardstick.scale(limit) + NOISE;
        println!("{sources} sources: {own:.1} ns above an empty program, with an LRU_HASH {lru:.1}; {yardstick}");
        assert!(own <= limit, "{own:.1} ns, at most {limit:.1} are allowed ({yardstick})");
        if let Some(part) = part {
            assert!(own <= lru * part, "{own:.1} ns, with an LRU_HASH {lru:.1}");
        }
    }
}

/// A limit of bytes that only tiers have makes everybody's packets take the longer way. When it goes, so does that.
#[test]
fn a_tier_that_is_gone_costs_nothing() {
    let _undisturbed = common::undisturbed();
    let endless = Rate::per_second(976).burst(1 << 20);
    let limiter = RateLimiter::load(&RateLimiterConfig::default().limit(Scope::All, endless)).unwrap();
    let net = "203.0.113.0/24".parse().unwrap();
    let tier = Tier::Limited(Limit::bytes(Rate::per_second(1_000_000)));
    let flows = random_v4(1 << 8);
    let frame = Frame::udp(flows[0], "10.0.0.1:53".parse().unwrap());
    let harness = Harness::new(&frame.payload(&[0; 18]).build(), &flows).unwrap();
    let cost = || harness.cost_above_empty(limiter.program_fd(), 50).unwrap().minimum;
    harness.verdict(limiter.program_fd(), 1 << 10).unwrap();
    let before = cost();
    limiter.tiers().insert(net, tier).unwrap();
    harness.verdict(limiter.program_fd(), 1 << 10).unwrap();
    let with = cost();
    limiter.tiers().remove(net).unwrap();
    let after = cost();
    println!("{before:.1} ns above an empty program, {with:.1} with that tier, {after:.1} without it again");
    assert!(is_emulated() || (with > before + 5.0 && after < (before + with) / 2.0));
}
