//! What a firewall's look-up costs, by engine and rules, hit and miss, on 64k random sources.

mod common;

use std::net::{IpAddr, SocketAddr};

use xdpkit::{
    Decision, Engine, Firewall, FirewallConfig, Rule, Stage as _,
    ipnet::{IpNet, Ipv4Net, Ipv6Net},
};
use xdpkit_lab::{
    bench::{Harness, Random, Table},
    frame::Frame,
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const SOURCES: usize = 1 << 16;

fn main() -> Result<()> {
    let mut criterion = common::criterion();
    let mut table = Table::default();
    for family in ["ipv4", "ipv6"] {
        for (count, rules) in [("10", 10), ("1k", 1_000), ("10k", 10_000), ("100k", 100_000), ("1M", 1_000_000)] {
            for (name, engine, counters) in [
                ("trie", Engine::Trie, true),
                ("compiled", Engine::Compiled, true),
                ("compiled-uncounted", Engine::Compiled, false),
            ] {
                let group = format!("firewall/{name}/{family}/{count}");
                if is_filtered_out(&group) {
                    continue;
                }
                let (firewall, hits, misses) = firewall(family, rules, engine, counters)?;
                for (row, sources) in [("hit", hits), ("miss", misses)] {
                    let harness = Harness::new(&template(sources[0])?, &sources)?;
                    let programs = [(row, firewall.program_fd())];
                    table.extend(&group, common::measure(&mut criterion, &group, &harness, &programs, 100));
                }
            }
        }
    }
    criterion.final_summary();
    if !table.rows.is_empty() {
        println!("\n{table}");
    }
    Ok(())
}

/// A firewall that denies random prefixes, sources inside some of them, and sources inside none.
fn firewall(
    family: &str,
    rules: usize,
    engine: Engine,
    counters: bool,
) -> Result<(Firewall, Vec<SocketAddr>, Vec<SocketAddr>)> {
    let mut random = Random::new(rules as u64);
    let prefixes: Vec<IpNet> = (0..rules).map(|_| prefix(family, &mut random)).collect();
    let config = FirewallConfig::default().capacity(rules as u32).engine(engine).rule_counters(counters);
    let firewall = Firewall::load(&config)?;
    firewall.replace_all(prefixes.iter().map(|prefix| ((*prefix).into(), Rule::deny())))?;

    let hit = |_| {
        let prefix = prefixes[random.below(rules as u64) as usize];
        SocketAddr::new(inside(prefix, &mut random), 1024)
    };
    let hits: Vec<_> = (0..SOURCES).map(hit).collect();
    let mut misses = Vec::with_capacity(SOURCES);
    while misses.len() < SOURCES {
        let source = address(family, &mut random);
        if firewall.matching(source)?.is_none() {
            misses.push(SocketAddr::new(source, 1024));
        }
    }
    let decided = firewall.matching(hits[0].ip())?.map(|entry| entry.rule.decision);
    assert_eq!(decided, Some(Decision::Deny), "a hit is one");
    Ok((firewall, hits, misses))
}

fn address(family: &str, random: &mut Random) -> IpAddr {
    match family {
        "ipv4" => random.ipv4().into(),
        _ => random.ipv6().into(),
    }
}

/// Lengths as in lists of networks to block: /16 to /32, and /32 to /64.
fn prefix(family: &str, random: &mut Random) -> IpNet {
    let length = match family {
        "ipv4" => 16 + random.below(17) as u8,
        _ => 32 + random.below(33) as u8,
    };
    IpNet::new_assert(address(family, random), length).trunc()
}

fn inside(prefix: IpNet, random: &mut Random) -> IpAddr {
    match prefix {
        IpNet::V4(net) => {
            let host = u32::from(random.ipv4()) & u32::from(Ipv4Net::hostmask(&net));
            (u32::from(net.addr()) | host).to_be_bytes().into()
        }
        IpNet::V6(net) => {
            let host = u128::from(random.ipv6()) & u128::from(Ipv6Net::hostmask(&net));
            (u128::from(net.addr()) | host).to_be_bytes().into()
        }
    }
}

fn template(source: SocketAddr) -> Result<Vec<u8>> {
    let destination = if source.is_ipv4() { "198.51.100.1:53" } else { "[2001:db8::1]:53" };
    Ok(Frame::udp(source, destination.parse()?).payload(&[0; 18]).build())
}

/// Whether the command line names rows, and none of this group's: what takes long to set up can be left out.
fn is_filtered_out(group: &str) -> bool {
    let mut names = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).peekable();
    names.peek().is_some() && !names.any(|name| group.contains(&name))
}
