//! What a look-up costs in the compiled longest-prefix-match table and in the kernel's trie, by number of prefixes,
//! for random addresses; how long it takes to build the table and to change one prefix.
//!
//! The prefixes are those of a real routing table: see [`Prefixes::read`].

mod common;
#[path = "../src/lpm/mod.rs"]
#[allow(dead_code, unused_imports, reason = "it is private to the library, which uses all of it")]
mod lpm;

use std::{
    error::Error,
    net::{IpAddr, SocketAddr},
    sync::atomic::AtomicU32,
    time::{Duration, Instant},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use lpm::{LEAF_END, Prefix, Root, Table};
use xdpkit_lab::{
    bench::{LpmProbe, Random},
    frame::Frame,
    prefixes::Prefixes,
};

/// Flows: more than the caches hold of the table.
const FLOWS: usize = 1 << 20;
const LINES: u32 = 1 << 20;
const EDITS: usize = 100_000;

type Any<T> = Result<T, Box<dyn Error>>;

fn main() -> Any<()> {
    let mut criterion = common::criterion();
    let mut random = Random::new(7);
    let Prefixes { v4, v6, .. } = Prefixes::read()?;
    let mut report = String::new();
    for count in [10, 1000, 10_000, 100_000, v4.len()] {
        family::<Ipv4Net>(&mut criterion, &v4[..count.min(v4.len())], &mut random, &mut report)?;
    }
    for count in [1000, 100_000, v6.len()] {
        family::<Ipv6Net>(&mut criterion, &v6[..count.min(v6.len())], &mut random, &mut report)?;
    }
    criterion.final_summary();
    println!("\n{report}");
    Ok(())
}

/// A prefix that random flows and the probe's programs can be made for.
trait Family: Prefix + Into<IpNet> + Ord + Default {
    /// An address of which the prefix says the first bits, and `host` the rest.
    fn address(self, host: u128) -> Self::Address;
    /// An address near it, whether inside or not.
    fn near(self, host: u128) -> Self::Address;
}

impl Family for Ipv4Net {
    fn address(self, host: u128) -> Self::Address {
        (u32::from(self.network()) | host as u32 & u32::from(self.hostmask())).into()
    }

    fn near(self, host: u128) -> Self::Address {
        (u32::from(self.network()) & 0xff00_0000 | host as u32 >> 8).into()
    }
}

impl Family for Ipv6Net {
    fn address(self, host: u128) -> Self::Address {
        (u128::from(self.network()) | host & u128::from(self.hostmask())).into()
    }

    fn near(self, host: u128) -> Self::Address {
        (u128::from(self.network()) >> 100 << 100 | host >> 28).into()
    }
}

/// One family's rows for so many prefixes: hits and misses, table and trie.
fn family<P: Family>(
    criterion: &mut criterion::Criterion,
    prefixes: &[P],
    random: &mut Random,
    report: &mut String,
) -> Any<()>
where
    P::Address: Into<IpAddr>,
{
    let ipv6 = P::STEPS > 2;
    let title = format!("{}/{}", if ipv6 { "ipv6" } else { "ipv4" }, prefixes.len());
    let mut probe = LpmProbe::load(LINES, prefixes.len() as u32)?;
    let mut table = Table::new(probe.memory()?);
    // The leaf tells the length, for edits.
    let leaf = |at: usize, prefix: P| ((at as u32) << 8 | u32::from(prefix.length())) + (1 << 30);
    let mut sorted: Vec<(P, u32)> =
        prefixes.iter().enumerate().map(|(at, prefix)| (*prefix, leaf(at, *prefix))).collect();
    sorted.sort_unstable_by_key(|(prefix, _)| (prefix.octets(), prefix.length()));
    let began = Instant::now();
    let root = table.build(&sorted)?;
    let built = began.elapsed();
    probe.set_roots(root.line(), root.line())?;
    let routes: Vec<_> = sorted.iter().map(|(prefix, leaf)| ((*prefix).into(), *leaf)).collect();
    probe.fill_trie(ipv6, &routes)?;
    let used = table.usage().used;
    report.push_str(&format!("{title}: built in {built:.1?}, {used} lines, {:.1} MB\n", f64::from(used) * 64e-6));

    for hit in [true, false] {
        let flows: Vec<SocketAddr> =
            (0..FLOWS).map(|_| (flow(&table, root, prefixes, hit, random), 1024).into()).collect();
        let destination = if ipv6 { "[2001:db8::1]:53" } else { "198.51.100.1:53" };
        let template = Frame::udp(flows[0], destination.parse()?).payload(&[0; 18]).build();
        let harness = xdpkit_lab::bench::Harness::new(&template, &flows)?;
        let group = format!("{title}/{}", if hit { "hit" } else { "miss" });
        // One after the other: interleaved, the trie's hundred megabytes would empty the caches for the table.
        for row in [("table", probe.table(ipv6)), ("trie", probe.trie(ipv6))] {
            let costs = common::measure(criterion, &group, &harness, &[row], 100);
            for (name, cost) in &costs.rows {
                let (minimum, median) = (cost.minimum, cost.median);
                report.push_str(&format!("{group}/{name}: {minimum:.1} ns above empty, median {median:.1}\n"));
            }
        }
    }
    report.push_str(&format!("{title}: an edit took {}\n", edits(&mut table, root, prefixes, leaf, random)?));
    Ok(())
}

/// An address inside a random prefix, or one that none covers (where there is hardly any, any address).
fn flow<P: Family>(
    table: &Table<impl AsRef<[AtomicU32]>>,
    root: Root<P>,
    prefixes: &[P],
    hit: bool,
    random: &mut Random,
) -> IpAddr
where
    P::Address: Into<IpAddr>,
{
    let mut host = || u128::from(random.bits()) << 64 | u128::from(random.bits());
    if hit {
        let at = host() as usize % prefixes.len();
        return prefixes[at].address(host()).into();
    }
    loop {
        // Near prefixes: the first bits decide nothing.
        let near = prefixes[host() as usize % prefixes.len()].near(host());
        if table.lookup(root, near) == 0 {
            return near.into();
        }
    }
}

/// Removes and adds random prefixes; the median, the 99th percentile and the longest time of one change. And that of
/// the worst one, a prefix that covers all others.
fn edits<P: Family>(
    table: &mut Table<impl AsRef<[AtomicU32]>>,
    root: Root<P>,
    prefixes: &[P],
    leaf: impl Fn(usize, P) -> u32,
    random: &mut Random,
) -> Any<String> {
    let length = |leaf: u32| leaf as u8;
    let mut times: Vec<Duration> = Vec::with_capacity(EDITS);
    for _ in 0..EDITS / 2 {
        let at = random.below(prefixes.len() as u64) as usize;
        let prefix = prefixes[at];
        for insert in [false, true] {
            let began = Instant::now();
            if insert {
                table.insert(root, prefix, leaf(at, prefix), length)?;
            } else {
                table.remove(root, prefix, 0, length)?;
            }
            times.push(began.elapsed());
            // Nobody reads it meanwhile.
            table.release();
        }
    }
    times.sort_unstable();
    let [median, most] = [50, 99].map(|percent| times[times.len() * percent / 100]);
    let began = Instant::now();
    table.insert(root, P::default(), LEAF_END - 256, length)?;
    let all = began.elapsed();
    Ok(format!("{median:.1?}, 99 % at most {most:.1?}, the longest {:.1?}; of /0 {all:.1?}", times[times.len() - 1]))
}
