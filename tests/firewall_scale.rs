//! A real routing table in the firewall: answers against a model, and what loading and editing take.

mod common;

use std::{
    collections::HashMap,
    fs::File,
    io::{BufRead as _, BufReader},
    net::IpAddr,
    path::Path,
    time::{Duration, Instant},
};

use fastrand::Rng;
use flate2::read::GzDecoder;
use xdpkit::{Action, Decision, Engine, Firewall, FirewallConfig, Rule, Selector, Stage as _, ipnet::IpNet};
use xdpkit_lab::frame::Frame;

/// The table of `XDPKIT_PREFIXES` or beside the checkout; without it, or in a short run, random prefixes.
fn prefixes() -> Vec<IpNet> {
    let count = common::times(20_000, usize::MAX, 1_000);
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data/bgp-prefixes.txt.gz");
    let path = std::env::var_os("XDPKIT_PREFIXES").map_or(beside, Into::into);
    let mut random = Rng::with_seed(11);
    let mut all: Vec<IpNet> = match File::open(path) {
        Ok(file) => {
            let lines = BufReader::new(GzDecoder::new(file)).lines();
            lines.map(|line| line.unwrap().parse::<IpNet>().expect("a prefix a line").trunc()).collect()
        }
        Err(_) => (0..count.min(1_000_000)).map(|_| random_prefix(&mut random)).collect(),
    };
    all.sort_unstable();
    all.dedup();
    random.shuffle(&mut all);
    all.truncate(count);
    all
}

fn random_prefix(random: &mut Rng) -> IpNet {
    let address = random_address(random);
    let length = if address.is_ipv4() { random.u8(8..=28) } else { random.u8(20..=64) };
    IpNet::new(address, length).unwrap().trunc()
}

fn random_address(random: &mut Rng) -> IpAddr {
    match random.bool() {
        true => IpAddr::from(random.u32(..).to_be_bytes()),
        false => IpAddr::from((random.u128(..) >> 3 | 1 << 125).to_be_bytes()),
    }
}

/// A map a length, asked from the longest down; each prefix may have a plain rule and one for a UDP port.
#[derive(Default)]
struct Model(HashMap<IpNet, [Option<Rule>; 2]>);

impl Model {
    fn set(&mut self, selector: Selector, rule: Option<Rule>) {
        let rules = self.0.entry(selector.source()).or_default();
        rules[usize::from(selector.port_range().is_none())] = rule;
    }

    fn action(&self, source: IpAddr, port: u16) -> Action {
        let lengths = (0..=IpNet::from(source).prefix_len()).rev();
        let rules = lengths
            .filter_map(|length| self.0.get(&IpNet::new(source, length).unwrap().trunc()))
            .flat_map(|[narrow, plain]| [narrow.filter(|_| port == 53), *plain]);
        let decides = |rule: &Rule| rule.expires_at.is_none();
        match rules.flatten().find(decides).map(|rule| rule.decision) {
            Some(Decision::Deny) => Action::Drop,
            _ => Action::Pass,
        }
    }
}

fn rule(random: &mut Rng) -> Rule {
    let mut rule = if random.bool() { Rule::allow() } else { Rule::deny() };
    if random.u8(..50) == 0 {
        rule.expires_at = Some(Duration::from_nanos(1));
    }
    rule
}

fn agree(firewall: &Firewall, model: &Model, known: &[IpNet], random: &mut Rng, probes: usize) {
    for _ in 0..probes {
        let mut source = random_address(random);
        if let (true, Some(net)) = (random.u8(..4) > 0, random.choice(known)) {
            source = match (net.network(), source) {
                (IpAddr::V4(base), IpAddr::V4(host)) => {
                    (u32::from(base) | u32::from(host) & hostmask4(net)).to_be_bytes().into()
                }
                (IpAddr::V6(base), IpAddr::V6(host)) => {
                    (u128::from(base) | u128::from(host) & hostmask6(net)).to_be_bytes().into()
                }
                (base, _) => base,
            };
        }
        let port = if random.bool() { 53 } else { 80 };
        let to: IpAddr = if source.is_ipv4() { [192, 0, 2, 1].into() } else { 1_u128.to_be_bytes().into() };
        let frame = Frame::udp((source, 999).into(), (to, port).into()).build();
        let action = firewall.test_run(&frame).unwrap().action;
        assert_eq!(action, model.action(source, port), "{source}, port {port}");
    }
}

fn hostmask4(net: &IpNet) -> u32 {
    u32::MAX.checked_shr(net.prefix_len().into()).unwrap_or(0)
}

fn hostmask6(net: &IpNet) -> u128 {
    u128::MAX.checked_shr(net.prefix_len().into()).unwrap_or(0)
}

fn percentile(times: &mut [Duration], part: usize) -> Duration {
    times.sort_unstable();
    times[(times.len() * part / 100).min(times.len() - 1)]
}

#[test]
fn a_routing_table_is_judged_as_the_model_says_and_after_edits_too() {
    let table = prefixes();
    for engine in [Engine::Compiled, Engine::Trie] {
        let mut random = Rng::with_seed(2);
        let mut model = Model::default();
        let mut rules: Vec<(Selector, Rule)> = Vec::new();
        for net in &table {
            rules.push((Selector::new(*net), rule(&mut random)));
            if random.u8(..100) == 0 {
                rules.push((Selector::new(*net).protocol(17).unwrap().ports(53..=53).unwrap(), rule(&mut random)));
            }
        }
        rules.iter().for_each(|(selector, rule)| model.set(*selector, Some(*rule)));
        let capacity = rules.len() as u32 + 10_000;
        let firewall = Firewall::load(&FirewallConfig::default().capacity(capacity).engine(engine)).unwrap();
        let start = Instant::now();
        let done = firewall.replace_all(rules).unwrap();
        println!("{engine:?}: {} rules loaded and published in {:?}", done.added, start.elapsed());
        let probes = common::times(50_000, 1_000_000, 1_000);
        agree(&firewall, &model, &table, &mut random, probes);

        let mut times = Vec::new();
        for _ in 0..common::times(5_000, 100_000, 200) {
            let net = if random.u8(..3) == 0 { random_prefix(&mut random) } else { *random.choice(&table).unwrap() };
            let mut selector = Selector::new(net);
            if random.u8(..20) == 0 {
                selector = selector.protocol(17).unwrap().ports(53..=53).unwrap();
            }
            let rule = (random.u8(..3) > 0).then(|| rule(&mut random));
            let start = Instant::now();
            match rule {
                Some(rule) => drop(firewall.insert(selector, rule).unwrap()),
                None => drop(firewall.remove(selector).unwrap()),
            }
            times.push(start.elapsed());
            model.set(selector, rule);
        }
        let half = percentile(&mut times, 50);
        println!("{engine:?}: an edit takes {half:?}, at the 99th percentile {:?}", percentile(&mut times, 99));
        agree(&firewall, &model, &table, &mut random, probes);
    }
}
