//! What a rate limiter's decision costs, by sources and by what is configured, and what it costs with the kernel's
//! LRU_HASH in the place of the flow table. Random sources within their limit, the coarse clock.

mod common;

use std::{net::SocketAddr, time::Duration};

use xdpkit::{
    BanPolicy, Limit, Rate, RateLimiter, RateLimiterConfig, Reason, Scope, Stage as _, Tier,
    ipnet::{IpNet, Ipv4Net},
};
use xdpkit_lab::{
    bench::{Harness, LruLimiter, Random, Table, random_v4, random_v6},
    frame::Frame,
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// So much that nobody is over it.
const RATE: Rate = Rate::per_second(976).burst(1 << 20);
/// The same in units of 1,024 ns.
const COST: u64 = 1000;

fn main() -> Result<()> {
    let mut criterion = common::criterion();
    let mut table = Table::default();
    for (name, sources) in [("1k", 1 << 10), ("64k", 1 << 16), ("1M", 1 << 20)] {
        for family in ["ipv4", "ipv6"] {
            let flows = if family == "ipv4" { random_v4(sources) } else { random_v6(sources) };
            let harness = Harness::new(&template(flows[0])?, &flows)?;
            // The sources come first in another order than later: an LRU_HASH takes its elements one after the other, and
            // would find them so again.
            let mut others = flows.clone();
            Random::new(9).shuffle(&mut others);
            let before = Harness::new(&template(flows[0])?, &others)?;
            let group = format!("rate_limiter/{family}/{name}");
            let config = || RateLimiterConfig::default().sources(2 * sources as u32).limit(Scope::All, RATE);
            let mut row = |row: &str, limiter: &RateLimiter| -> Result<()> {
                // All have a bucket then, and every path that is measured was taken.
                before.verdict(limiter.program_fd(), sources as u32)?;
                harness.verdict(limiter.program_fd(), sources as u32)?;
                let programs = [(row, limiter.program_fd())];
                table.extend(&group, common::measure(&mut criterion, &group, &harness, &programs, 100));
                let stats = limiter.stats()?;
                let within = stats.reason(Reason::WithinLimit).packets + stats.reason(Reason::Exempt).packets;
                assert_eq!(within, stats.total().packets, "{group}/{row}: {stats:?}");
                Ok(())
            };
            row("packets", &RateLimiter::load(&config())?)?;
            let both = Limit::packets(RATE).and_bytes(Rate::per_second(100_000_000).burst(1 << 30));
            row(
                "packets and bytes",
                &RateLimiter::load(&config().sources(4 * sources as u32).limit(Scope::All, both))?,
            )?;
            let scopes = config().sources(4 * sources as u32).limit(Scope::Udp, RATE);
            row("two scopes", &RateLimiter::load(&scopes)?)?;

            let tiers = RateLimiter::load(&config())?;
            tiers.tiers().replace_all(some_tiers())?;
            row("1000 tiers", &tiers)?;
            let bans = RateLimiter::load(&config().ban(BanPolicy::of(Duration::from_secs(60))))?;
            for n in 0..1000_u32 {
                bans.bans().insert((0xf000_0000 + n).to_be_bytes().into(), None)?;
            }
            row("1000 bans", &bans)?;

            let lru = LruLimiter::load(2 * sources as u32, COST, 1 << 20)?;
            before.verdict(lru.program(), sources as u32)?;
            harness.verdict(lru.program(), sources as u32)?;
            let programs = [("lru_hash", lru.program())];
            table.extend(&group, common::measure(&mut criterion, &group, &harness, &programs, 100));
        }
    }
    criterion.final_summary();
    if !table.rows.is_empty() {
        println!("\n{table}");
    }
    Ok(())
}

fn some_tiers() -> Vec<(IpNet, Tier)> {
    let mut random = Random::new(3);
    let tier = Tier::Limited(RATE.into());
    let prefix = |random: &mut Random| Ipv4Net::new_assert(random.ipv4(), 16 + random.below(9) as u8).trunc();
    let mut tiers: Vec<_> = (0..1000).map(|_| (prefix(&mut random).into(), tier)).collect();
    tiers.sort_unstable_by_key(|(prefix, _): &(IpNet, Tier)| *prefix);
    tiers.dedup_by_key(|(prefix, _)| *prefix);
    tiers
}

fn template(source: SocketAddr) -> Result<Vec<u8>> {
    let destination = if source.is_ipv4() { "198.51.100.1:53" } else { "[2001:db8::1]:53" };
    Ok(Frame::udp(source, destination.parse()?).payload(&[0; 18]).build())
}
