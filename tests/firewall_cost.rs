//! What a packet costs in a firewall of a whole routing table: against the kernel's trie, a small list, and the clock.

mod common;

use std::net::SocketAddr;

use xdpkit::{Action, Engine, Firewall, FirewallConfig, Reason, Rule, Stage as _, ipnet::IpNet};
use xdpkit_lab::{
    bench::{Harness, Random},
    frame::Frame,
    prefixes::{Prefixes, inside},
};

/// Windows of about a millisecond: usually, in full, emulated. Fixed: to go on until a bound holds would be to wait for luck.
const ROUNDS: [usize; 3] = [60, 200, 1];

/// Sources: more than caches hold of a big table.
const SOURCES: usize = 1 << 20;

/// One cache miss and one page walk, in nanoseconds, for each level of a table: two of IPv4 are behind the root, which
/// every list has.
const LEVEL: f64 = 45.0;

/// What a packet costs above an empty program, in nanoseconds: from random addresses in random prefixes, all denied.
fn cost(nets: &[IpNet], engine: Engine, counters: bool) -> f64 {
    let config = FirewallConfig::default().capacity(nets.len() as u32 + 1000).engine(engine).rule_counters(counters);
    let firewall = Firewall::load(&config).unwrap();
    firewall.replace_all(nets.iter().map(|net| ((*net).into(), Rule::deny()))).unwrap();
    let mut random = Random::new(3);
    let source = |_| SocketAddr::new(inside(nets[random.below(nets.len() as u64) as usize], &mut random), 1024);
    let sources: Vec<_> = (0..common::times(SOURCES, SOURCES, 1 << 10)).map(source).collect();
    let destination = if sources[0].is_ipv4() { "198.51.100.1:53" } else { "[2001:db8::1]:53" };
    let template = Frame::udp(sources[0], destination.parse().unwrap()).payload(&[0; 18]).build();
    let harness = Harness::new(&template, &sources).unwrap();

    // What is measured does its work, and every packet is in the rules' counters, noted or added.
    let packets = 1000;
    let (action, frame) = harness.verdict(firewall.program_fd(), packets).unwrap();
    assert_eq!(action, Action::Drop as u32);
    let denied = firewall.stats().unwrap().reason(Reason::Denied);
    assert_eq!((denied.packets, denied.bytes), (packets.into(), u64::from(packets) * frame.len() as u64));
    if counters {
        let rules = firewall.iter().unwrap().map(|entry| entry.count).reduce(|sum, count| sum + count);
        assert_eq!(rules, Some(denied));
    }
    if common::is_emulated() {
        return 0.0;
    }
    let rounds = common::times(ROUNDS[0], ROUNDS[1], ROUNDS[2]);
    let cost = harness.cost_above_empty(firewall.program_fd(), rounds as u32).unwrap().minimum;
    let counted = if counters { "counted" } else { "not counted" };
    println!("{engine:?}, {} prefixes, {counted}: {cost:.1} ns above an empty program", nets.len());
    cost
}

#[test]
fn a_big_list_costs_little_more_than_a_small_one_and_far_less_than_in_the_trie() {
    let Prefixes { v4, v6, .. } = Prefixes::read().unwrap();
    let most = common::times(usize::MAX, usize::MAX, 1_000);
    let v4: Vec<IpNet> = v4.into_iter().take(most).map(Into::into).collect();
    let v6: Vec<IpNet> = v6.into_iter().take(most).map(Into::into).collect();

    let trie4 = cost(&v4, Engine::Trie, false);
    let [small4, some4, all4] =
        [100, 10_000, v4.len()].map(|rules| cost(&v4[..rules.min(v4.len())], Engine::Compiled, false));
    let counted4 = cost(&v4, Engine::Compiled, true);
    let trie6 = cost(&v6, Engine::Trie, false);
    let all6 = cost(&v6, Engine::Compiled, false);
    if common::is_emulated() {
        println!("the machine is emulated: only verdicts and counters were compared, not times");
        return;
    }
    let at_most =
        |what: &str, cost: f64, most: f64| assert!(cost <= most, "{what}: {cost:.1} ns, allowed are {most:.1}");
    at_most("the whole table against the trie", all4, trie4 / 10.0);
    at_most("the whole IPv6 table against the trie", all6, trie6 / 5.0);
    at_most("growing from 100 prefixes to all", all4 - small4, 2.0 * LEVEL);
    // What the caches of one machine hold, and how long memory takes, differs too much for others to be judged by it.
    if common::times(0, 1, 0) == 1 {
        at_most("10,000 prefixes", some4, 20.0);
        at_most("the whole table", all4, 65.0);
        at_most("the whole table, counted", counted4, 165.0);
    }
}
