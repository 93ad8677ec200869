//! A routing table in the firewall, edited: every verdict against a model.

use std::{collections::HashMap, net::IpAddr, time::Duration};

use fastrand::Rng;
use xdpkit::{Action, Decision, Engine, Firewall, FirewallConfig, Rule, Selector, Stage as _, ipnet::IpNet};
use xdpkit_lab::{
    bench::Random,
    frame::Frame,
    prefixes::{Prefixes, inside},
};

/// The table; a part of it in a short run.
fn prefixes() -> Vec<IpNet> {
    let Prefixes { mut v4, mut v6, origin } = Prefixes::for_tests().unwrap();
    println!("prefixes: {origin}");
    v4.truncate(crate::common::times(15_000, usize::MAX, 800));
    v6.truncate(crate::common::times(5_000, usize::MAX, 200));
    v4.into_iter().map(IpNet::from).chain(v6.into_iter().map(IpNet::from)).collect()
}

fn random_prefix(random: &mut Rng) -> IpNet {
    let v6 = random.bool();
    let length = if v6 { random.u8(20..=64) } else { random.u8(8..=28) };
    IpNet::new(random_address(random, v6), length).unwrap().trunc()
}

fn random_address(random: &mut Rng, v6: bool) -> IpAddr {
    match v6 {
        false => IpAddr::from(random.u32(..).to_be_bytes()),
        true => IpAddr::from((random.u128(..) >> 3 | 1 << 125).to_be_bytes()),
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

/// So many packets of each family: most of them from inside a prefix, half of them to the port that some rules are about.
fn agree(firewall: &Firewall, model: &Model, table: &[IpNet], random: &mut Rng, probes: usize) {
    let split = table.partition_point(|net| matches!(net, IpNet::V4(_)));
    let mut hosts = Random::new(random.u64(..));
    let mut verdicts = HashMap::<Action, usize>::new();
    for (v6, known) in [(false, &table[..split]), (true, &table[split..])] {
        for _ in 0..probes {
            let source = match random.u8(..4) {
                0 => random_address(random, v6),
                _ => inside(*random.choice(known).unwrap(), &mut hosts),
            };
            let port = if random.bool() { 53 } else { 80 };
            let to: IpAddr = if v6 { 1_u128.to_be_bytes().into() } else { [192, 0, 2, 1].into() };
            let frame = Frame::udp((source, 999).into(), (to, port).into()).build();
            let action = firewall.test_run(&frame).unwrap().action;
            assert_eq!(action, model.action(source, port), "{source}, port {port}");
            *verdicts.entry(action).or_default() += 1;
        }
    }
    println!("{}: {probes} packets of each family as the model says: {verdicts:?}", firewall.name());
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
        let capacity = rules.len() as u32 + 100_000;
        let config =
            FirewallConfig::default().capacity(capacity).engine(engine).name(format!("{engine:?}").to_lowercase());
        let firewall = Firewall::load(&config).unwrap();
        firewall.replace_all(rules).unwrap();
        let probes = crate::common::times(20_000, 1_000_000, 500);
        agree(&firewall, &model, &table, &mut random, probes);

        for _ in 0..crate::common::times(5_000, 100_000, 200) {
            let net = if random.u8(..3) == 0 { random_prefix(&mut random) } else { *random.choice(&table).unwrap() };
            let mut selector = Selector::new(net);
            if random.u8(..20) == 0 {
                selector = selector.protocol(17).unwrap().ports(53..=53).unwrap();
            }
            let rule = (random.u8(..3) > 0).then(|| rule(&mut random));
            match rule {
                Some(rule) => drop(firewall.insert(selector, rule).unwrap()),
                None => drop(firewall.remove(selector).unwrap()),
            }
            model.set(selector, rule);
        }
        agree(&firewall, &model, &table, &mut random, probes);
    }
}
