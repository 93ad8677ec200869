//! What a packet costs in a firewall of a whole routing table: against the kernel's trie, a small list, and limits in
//! nanoseconds, which are scaled by what memory costs here. What loading and editing such a table take, and how late a
//! rule ends.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use xdpkit::{Action, Engine, Firewall, FirewallConfig, Reason, Rule, Selector, Stage as _, ipnet::IpNet};
use xdpkit_lab::{
    bench::{Checks, Harness, Random, Yardstick},
    frame::Frame,
    prefixes::{Prefixes, inside},
};

/// Windows of about a millisecond. Fixed: to go on until a bound holds would be to wait for luck.
const ROUNDS: u32 = 200;

/// Sources: more than caches hold of a big table.
const SOURCES: usize = 1 << 20;

/// One cache miss and one page walk, in nanoseconds, for each level of a table: two of IPv4 are behind the root, which
/// every list has.
const LEVEL: f64 = 45.0;

/// What a branch costs that is guessed wrong every other time, and that nothing waits for but the processor.
const MISPREDICTED: f64 = 20.0;

/// Edits of a whole table.
const EDITS: usize = 20_000;

/// What the list says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdicts {
    Denied,
    /// Every other prefix is allowed: no processor foresees it.
    Mixed,
}

pub(crate) fn check(checks: &mut Checks) {
    checks.group("firewall/packets", packets);
    checks.group("firewall/edits", edits);
    checks.group("firewall/expiry", expiry);
}

fn packets(checks: &mut Checks) {
    let Prefixes { v4, v6, origin } = Prefixes::read().unwrap();
    println!("prefixes: {origin}");
    let v4: Vec<IpNet> = v4.into_iter().map(Into::into).collect();
    let v6: Vec<IpNet> = v6.into_iter().map(Into::into).collect();
    let denied = |nets: &[IpNet], engine, counters| cost(nets, engine, counters, Verdicts::Denied);
    let mixed = |nets: &[IpNet]| cost(nets, Engine::Compiled, false, Verdicts::Mixed);
    let some = &v4[..10_000];

    let trie4 = denied(&v4, Engine::Trie, false);
    let small4 = denied(&v4[..100], Engine::Compiled, false);
    let [some4, some4_mixed] = [denied(some, Engine::Compiled, false), mixed(some)];
    let [all4, all4_mixed] = [denied(&v4, Engine::Compiled, false), mixed(&v4)];
    let counted4 = denied(&v4, Engine::Compiled, true);
    let trie6 = denied(&v6, Engine::Trie, false);
    let all6 = denied(&v6, Engine::Compiled, false);
    let here = Yardstick::measure(SOURCES, ROUNDS).unwrap();
    println!("{here}");
    let mut row =
        |name: &str, cost: f64, most: f64| checks.at_most(&format!("firewall/packets/{name}"), "ns", cost, most);
    row("ipv4/all-against-trie", all4, trie4 / 10.0);
    row("ipv6/all-against-trie", all6, trie6 / 5.0);
    row("ipv4/all-above-100", all4 - small4, here.scale(2.0 * LEVEL));
    row("ipv4/10k-mixed-above-denied", some4_mixed - some4, MISPREDICTED);
    // What is behind the wrong guess no longer overlaps with the look-up before.
    row("ipv4/all-mixed-above-denied", all4_mixed - all4, MISPREDICTED + here.scale(LEVEL));
    row("ipv4/10k", some4, 20.0);
    row("ipv4/all", all4, here.scale(65.0));
    row("ipv4/all-counted", counted4, here.scale(165.0));
}

/// A firewall with these prefixes, and packets from random addresses in random ones: all are judged as the list says, and
/// each is in the counters of stage and rules, noted or added.
pub(crate) fn listed(
    nets: &[IpNet],
    engine: Engine,
    counters: bool,
    verdicts: Verdicts,
    sources: usize,
) -> (Firewall, Harness) {
    let config = FirewallConfig::default().capacity(nets.len() as u32 + 1000).engine(engine).rule_counters(counters);
    let firewall = Firewall::load(&config).unwrap();
    let rule = |at: usize| if verdicts == Verdicts::Mixed && at % 2 == 1 { Rule::allow() } else { Rule::deny() };
    firewall.replace_all(nets.iter().enumerate().map(|(at, net)| ((*net).into(), rule(at)))).unwrap();
    let mut random = Random::new(3);
    let source = |_| SocketAddr::new(inside(nets[random.below(nets.len() as u64) as usize], &mut random), 1024);
    let sources: Vec<_> = (0..sources).map(source).collect();
    let destination = if sources[0].is_ipv4() { "198.51.100.1:53" } else { "[2001:db8::1]:53" };
    let template = Frame::udp(sources[0], destination.parse().unwrap()).payload(&[0; 18]).build();
    let harness = Harness::new(&template, &sources).unwrap();

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
    (firewall, harness)
}

/// What a packet costs above an empty program, in nanoseconds.
fn cost(nets: &[IpNet], engine: Engine, counters: bool, verdicts: Verdicts) -> f64 {
    let (firewall, harness) = listed(nets, engine, counters, verdicts, SOURCES);
    harness.cost_above_empty(firewall.program_fd(), ROUNDS).unwrap().minimum
}

/// The whole table loaded and published, and 99 of 100 edits in it.
fn edits(checks: &mut Checks) {
    let nets: Vec<IpNet> = Prefixes::read().unwrap().all().collect();
    for engine in [Engine::Compiled, Engine::Trie] {
        let name = |what: &str| format!("firewall/edits/{}/{what}", format!("{engine:?}").to_lowercase());
        let config = FirewallConfig::default().capacity(nets.len() as u32 + 1000).engine(engine);
        let firewall = Firewall::load(&config).unwrap();
        let start = Instant::now();
        firewall.replace_all(nets.iter().map(|net| ((*net).into(), Rule::deny()))).unwrap();
        let load = start.elapsed();
        if engine == Engine::Compiled {
            checks.at_most(&name("load"), "s", load.as_secs_f64(), 3.0);
        }
        let mut random = Random::new(5);
        let mut times = Vec::with_capacity(EDITS);
        for at in 0..EDITS {
            let selector = Selector::new(nets[random.below(nets.len() as u64) as usize]);
            let start = Instant::now();
            match at % 2 {
                0 => drop(firewall.remove(selector).unwrap()),
                _ => drop(firewall.insert(selector, Rule::allow()).unwrap()),
            }
            times.push(start.elapsed());
        }
        times.sort_unstable();
        checks.at_most(&name("99-percent"), "us", times[EDITS * 99 / 100].as_secs_f64() * 1e6, 200.0);
    }
}

/// How long after its end a rule still denies.
fn expiry(checks: &mut Checks) {
    for engine in [Engine::Compiled, Engine::Trie] {
        let firewall = Firewall::load(&FirewallConfig::default().engine(engine)).unwrap();
        let frame = Frame::tcp("10.1.1.9:1".parse().unwrap(), "192.0.2.1:80".parse().unwrap()).build();
        let lifetime = Duration::from_millis(80);
        let started = Instant::now();
        firewall.insert("10.0.0.0/8".parse().unwrap(), Rule::deny().expires_in(lifetime)).unwrap();
        let mut denied_at = Duration::ZERO;
        loop {
            let before = started.elapsed();
            if firewall.test_run(&frame).unwrap().action != Action::Drop {
                break;
            }
            denied_at = before;
        }
        let late = denied_at.saturating_sub(lifetime).as_secs_f64() * 1e3;
        checks.at_most(&format!("firewall/expiry/{}/late", format!("{engine:?}").to_lowercase()), "ms", late, 10.0);
    }
}
