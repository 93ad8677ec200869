//! What a firewall costs: a packet by engine and number of rules, hit and miss; loading, editing and replacing lists; memory.
//!
//! The prefixes are those of a real routing table (see [`Prefixes::read`]). Each firewall is measured by itself: beside
//! another one, the tables of that one would empty the caches.

mod common;

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use xdpkit::{Engine, Firewall, FirewallConfig, Rule, Selector, Stage as _, ipnet::IpNet};
use xdpkit_lab::{
    bench::{Harness, Random, Table, VerdictProbe, random_v4},
    frame::Frame,
    prefixes::{Prefixes, inside, near},
    usage::Memory,
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Sources: more than the caches hold of the table.
const SOURCES: usize = 1 << 20;
const EDITS: usize = 20_000;

fn main() -> Result<()> {
    let mut criterion = common::criterion();
    let mut table = Table::default();
    let mut report = String::new();
    let group = "firewall/control";
    if !is_filtered_out(group) {
        table.extend(group, control(&mut criterion, group)?);
    }
    let prefixes = Prefixes::read()?;
    let families: [(&str, Vec<IpNet>); 2] = [
        ("ipv4", prefixes.v4.iter().copied().map(Into::into).collect()),
        ("ipv6", prefixes.v6.iter().copied().map(Into::into).collect()),
    ];
    for (family, nets) in &families {
        for rules in [10, 100, 1_000, 10_000, 100_000, nets.len()] {
            for (engine, counters) in
                [(Engine::Trie, true), (Engine::Trie, false), (Engine::Compiled, true), (Engine::Compiled, false)]
            {
                let name = format!("{engine:?}{}", if counters { "" } else { "-uncounted" }).to_lowercase();
                let group = format!("firewall/{family}/{rules}/{name}");
                if !is_filtered_out(&group) {
                    let costs = packets(&mut criterion, &group, &nets[..rules], engine, counters)?;
                    table.extend(&group, costs);
                }
            }
        }
    }
    for engine in [Engine::Trie, Engine::Compiled] {
        for rules in [10, 100, 1_000, 10_000, 100_000, prefixes.v4.len() + prefixes.v6.len()] {
            let group = format!("firewall/lists/{rules}/{engine:?}").to_lowercase();
            if !is_filtered_out(&group) {
                report.push_str(&format!("{group}: {}\n", lists(&part(&prefixes, rules), engine)?));
            }
        }
    }
    criterion.final_summary();
    if !table.rows.is_empty() {
        println!("\n{table}");
    }
    println!("{report}prefixes: {}", prefixes.origin);
    Ok(())
}

fn load(nets: &[IpNet], engine: Engine, counters: bool) -> Result<Firewall> {
    let config = FirewallConfig::default().capacity(nets.len() as u32 + 1000).engine(engine).rule_counters(counters);
    Ok(Firewall::load(&config)?)
}

/// So many prefixes, as much of either family as the whole table has.
fn part(prefixes: &Prefixes, rules: usize) -> Vec<IpNet> {
    let Prefixes { v4, v6, .. } = prefixes;
    let v4_most = rules * v4.len() / (v4.len() + v6.len());
    let v4 = v4[..v4_most].iter().copied().map(IpNet::from);
    v4.chain(v6[..rules - v4_most].iter().copied().map(IpNet::from)).collect()
}

/// A list of networks to block.
fn denied(nets: &[IpNet]) -> impl Iterator<Item = (Selector, Rule)> {
    nets.iter().map(|net| ((*net).into(), Rule::deny()))
}

/// Every other one is denied.
fn mixed(nets: &[IpNet]) -> impl Iterator<Item = (Selector, Rule)> {
    let rules = [Rule::deny(), Rule::allow()].into_iter().cycle();
    nets.iter().map(|net| (*net).into()).zip(rules)
}

/// Packets from random addresses inside random prefixes that are all denied, and from addresses near them that none covers;
/// and those inside again when half of the prefixes are allowed, so that the processor cannot foresee the verdict.
fn packets(
    criterion: &mut criterion::Criterion,
    group: &str,
    nets: &[IpNet],
    engine: Engine,
    counters: bool,
) -> Result<Table> {
    let firewall = load(nets, engine, counters)?;
    firewall.replace_all(denied(nets))?;
    let mut random = Random::new(3);
    let any = |random: &mut Random| nets[random.below(nets.len() as u64) as usize];
    let hits: Vec<IpAddr> = (0..SOURCES).map(|_| inside(any(&mut random), &mut random)).collect();
    let mut misses = Vec::with_capacity(SOURCES);
    while misses.len() < SOURCES {
        let source = near(any(&mut random), &mut random);
        if firewall.matching(source)?.is_none() {
            misses.push(source);
        }
    }
    let mut costs = Table::default();
    for (row, sources) in [("hit", hits.clone()), ("miss", misses), ("mixed", hits)] {
        if row == "mixed" {
            firewall.replace_all(mixed(nets))?;
        }
        let flows: Vec<_> = sources.into_iter().map(|source| SocketAddr::new(source, 1024)).collect();
        let destination = if flows[0].is_ipv4() { "198.51.100.1:53" } else { "[2001:db8::1]:53" };
        let template = Frame::udp(flows[0], destination.parse()?).payload(&[0; 18]).build();
        let harness = Harness::new(&template, &flows)?;
        let programs = [(row, firewall.program_fd())];
        costs.rows.extend(common::measure(criterion, group, &harness, &programs, 100).rows);
    }
    Ok(costs)
}

/// What a filter that does nothing but follow words through memory pays for verdicts that cannot be foreseen: the least
/// that any filter does.
fn control(criterion: &mut criterion::Criterion, group: &str) -> Result<Table> {
    let flows = random_v4(SOURCES);
    let template = Frame::udp(flows[0], "198.51.100.1:53".parse()?).payload(&[0; 18]).build();
    let harness = Harness::new(&template, &flows)?;
    let mut costs = Table::default();
    for (row, lines, loads) in
        [("256k", 1 << 12, 1), ("8M", 1 << 17, 1), ("8M-8M", 1 << 17, 2), ("8M-8M-8M", 1 << 17, 3)]
    {
        let probe = VerdictProbe::load(lines, loads)?;
        let programs = [("no-branch", probe.never_branches()), ("branch", probe.ends_as_a_stage())];
        for verdicts in ["one", "mixed"] {
            probe.set_verdicts(verdicts == "mixed");
            let row = format!("{row}/{verdicts}");
            costs.extend(&row, common::measure(criterion, &format!("{group}/{row}"), &harness, &programs, 100));
        }
    }
    Ok(costs)
}

/// Loading a list into an empty firewall, single edits in it, replacing it by one that shares half of its rules, and
/// what all of that takes of memory.
fn lists(nets: &[IpNet], engine: Engine) -> Result<String> {
    let firewall = load(nets, engine, true)?;
    let timed = |work: &mut dyn FnMut() -> xdpkit::Result<()>| {
        let began = Instant::now();
        work().map(|()| began.elapsed())
    };
    let load = timed(&mut || firewall.replace_all(mixed(nets)).map(drop))?;
    let mut random = Random::new(5);
    let mut edits: Vec<Duration> = Vec::with_capacity(EDITS);
    for _ in 0..EDITS / 2 {
        let selector = nets[random.below(nets.len() as u64) as usize].into();
        edits.push(timed(&mut || firewall.remove(selector).map(drop))?);
        edits.push(timed(&mut || firewall.insert(selector, Rule::deny()).map(drop))?);
    }
    edits.sort_unstable();
    let [half, most] = [50, 99].map(|percent| edits[edits.len() * percent / 100]);
    let (one, other) = (&nets[..nets.len() * 3 / 4], &nets[nets.len() / 4..]);
    firewall.replace_all(mixed(one))?;
    let replace = timed(&mut || firewall.replace_all(mixed(other)).map(drop))?;
    Ok(format!(
        "load {load:.1?}, edit {half:.1?} (99 %: {most:.1?}, longest {:.1?}), replace {replace:.1?}; {}",
        edits[EDITS - 1],
        Memory::now()?
    ))
}

/// Whether the command line names rows, and none of this group's: what takes long to set up can be left out.
fn is_filtered_out(group: &str) -> bool {
    let name = std::env::args().skip(1).find(|argument| argument.contains('/'));
    name.is_some_and(|name| !group.contains(&name) && !name.starts_with(group))
}
