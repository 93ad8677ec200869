//! What a packet costs in a firewall of a whole routing table: against the kernel's trie, a small list, and limits in
//! nanoseconds, which are scaled by what memory costs here.

mod common;

use std::net::SocketAddr;

use xdpkit::{Action, Engine, Firewall, FirewallConfig, Reason, Rule, Stage as _, ipnet::IpNet};
use xdpkit_lab::{
    bench::{Harness, Random, Yardstick},
    frame::Frame,
    prefixes::{Prefixes, inside},
};

/// Windows of about a millisecond: usually, in full, emulated. Fixed: to go on until a bound holds would be to wait for luck.
const ROUNDS: [usize; 3] = [30, 200, 1];

/// Sources: more than caches hold of a big table.
const SOURCES: usize = 1 << 20;

/// One cache miss and one page walk, in nanoseconds, for each level of a table: two of IPv4 are behind the root, which
/// every list has.
const LEVEL: f64 = 45.0;

/// What a branch costs that is guessed wrong every other time, and that nothing waits for but the processor.
const MISPREDICTED: f64 = 20.0;

/// What the list says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdicts {
    Denied,
    /// Every other prefix is allowed: no processor foresees it.
    Mixed,
}

/// What a packet costs above an empty program, in nanoseconds: from random addresses in random prefixes.
fn cost(nets: &[IpNet], engine: Engine, counters: bool, verdicts: Verdicts) -> f64 {
    let config = FirewallConfig::default().capacity(nets.len() as u32 + 1000).engine(engine).rule_counters(counters);
    let firewall = Firewall::load(&config).unwrap();
    let rule = |at: usize| if verdicts == Verdicts::Mixed && at % 2 == 1 { Rule::allow() } else { Rule::deny() };
    firewall.replace_all(nets.iter().enumerate().map(|(at, net)| ((*net).into(), rule(at)))).unwrap();
    let mut random = Random::new(3);
    let source = |_| SocketAddr::new(inside(nets[random.below(nets.len() as u64) as usize], &mut random), 1024);
    let sources: Vec<_> = (0..common::times(SOURCES, SOURCES, 1 << 10)).map(source).collect();
    let destination = if sources[0].is_ipv4() { "198.51.100.1:53" } else { "[2001:db8::1]:53" };
    let template = Frame::udp(sources[0], destination.parse().unwrap()).payload(&[0; 18]).build();
    let harness = Harness::new(&template, &sources).unwrap();

    // What is measured does its work, and every packet is in the rules' counters, noted or added.
    let packets = 1000;
    let (action, frame) = harness.verdict(firewall.program_fd(), packets).unwrap();
    let stats = firewall.stats().unwrap();
    let [denied, allowed] = [Reason::Denied, Reason::Allowed].map(|reason| stats.reason(reason));
    let judged = denied + allowed;
    assert_eq!((judged.packets, judged.bytes), (packets.into(), u64::from(packets) * frame.len() as u64));
    match verdicts {
        Verdicts::Denied => assert_eq!((action, allowed.packets), (Action::Drop as u32, 0)),
        Verdicts::Mixed => {
            assert!(denied.packets.min(allowed.packets) > u64::from(packets) / 4, "{denied:?} {allowed:?}")
        }
    }
    if counters {
        let rules = firewall.iter().unwrap().map(|entry| entry.count).reduce(|sum, count| sum + count);
        assert_eq!(rules, Some(judged));
    }
    if common::is_emulated() {
        return 0.0;
    }
    let rounds = common::times(ROUNDS[0], ROUNDS[1], ROUNDS[2]);
    let cost = harness.cost_above_empty(firewall.program_fd(), rounds as u32).unwrap().minimum;
    let counted = if counters { "counted" } else { "not counted" };
    println!("{engine:?}, {} prefixes, {verdicts:?}, {counted}: {cost:.1} ns above an empty program", nets.len());
    cost
}

#[test]
fn a_big_list_costs_little_more_than_a_small_one_and_far_less_than_in_the_trie() {
    let Prefixes { v4, v6, .. } = Prefixes::read().unwrap();
    let most = common::times(usize::MAX, usize::MAX, 1_000);
    let v4: Vec<IpNet> = v4.into_iter().take(most).map(Into::into).collect();
    let v6: Vec<IpNet> = v6.into_iter().take(most).map(Into::into).collect();

    let denied = |nets: &[IpNet], engine, counters| cost(nets, engine, counters, Verdicts::Denied);
    let mixed = |nets: &[IpNet]| cost(nets, Engine::Compiled, false, Verdicts::Mixed);
    let some = &v4[..v4.len().min(10_000)];

    let trie4 = denied(&v4, Engine::Trie, false);
    let small4 = denied(&v4[..100], Engine::Compiled, false);
    let [some4, some4_mixed] = [denied(some, Engine::Compiled, false), mixed(some)];
    let [all4, all4_mixed] = [denied(&v4, Engine::Compiled, false), mixed(&v4)];
    let counted4 = denied(&v4, Engine::Compiled, true);
    let trie6 = denied(&v6, Engine::Trie, false);
    let all6 = denied(&v6, Engine::Compiled, false);
    if common::is_emulated() {
        println!("the machine is emulated: only verdicts and counters were compared, not times");
        return;
    }
    let here = Yardstick::measure(SOURCES, common::times(ROUNDS[0], ROUNDS[1], ROUNDS[2]) as u32).unwrap();
    println!("here: {here}");
    let at_most = |what: &str, cost: f64, most: f64| {
        println!("{what}: {cost:.1} ns, allowed are {most:.1}");
        assert!(cost <= most, "{what}: {cost:.1} ns, allowed are {most:.1}");
    };
    at_most("the whole table against the trie", all4, trie4 / 10.0);
    at_most("the whole IPv6 table against the trie", all6, trie6 / 5.0);
    at_most("growing from 100 prefixes to all", all4 - small4, here.scale(2.0 * LEVEL));
    at_most("verdicts mixed at 10,000 prefixes", some4_mixed - some4, MISPREDICTED);
    // What is behind the wrong guess no longer overlaps with the look-up before.
    at_most("verdicts mixed in the whole table", all4_mixed - all4, MISPREDICTED + here.scale(LEVEL));
    // How the processor does when nobody else is there.
    if common::times(0, 1, 0) == 1 {
        at_most("10,000 prefixes", some4, 20.0);
        at_most("the whole table", all4, here.scale(65.0));
        at_most("the whole table, counted", counted4, here.scale(165.0));
    }
}
