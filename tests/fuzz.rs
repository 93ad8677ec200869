//! Every program against generated and mutated frames: what it says is what a model says, each frame is counted once, none
//! comes out that is broken where it was right. `./x fuzz` does it for a time of your choice.

mod common;
#[allow(dead_code, reason = "another test uses the rest")]
mod parser_oracle {
    pub(crate) mod difference;
    pub(crate) mod generate;
    pub(crate) mod oracle;
}

use std::{collections::BTreeMap, net::SocketAddr};

use common::Cases;
use fastrand::Rng;
use parser_oracle::{
    generate,
    oracle::{self, Reading},
};
use xdpkit::{
    Action, Decision, Engine, Firewall, FirewallConfig, MonitorConfig, Network, PacketMonitor, Protocol, Reason, Rule,
    Selector, Stage, Transport,
};

/// Frames between two looks at the counters, which are 16 kB for each CPU.
const BATCH: usize = 512;

/// Frame number n is made of this and n.
const SEED: u64 = 0x0f0f_5eed_0000_0000;

/// What one frame should become, and why.
type Verdict = (Action, Reason);

/// Runs frames through a stage and compares verdicts and counters with a model; both see each frame once. `flows` are
/// what most packets belong to.
fn agree(stage: &dyn Stage, flows: &[(SocketAddr, SocketAddr)], model: impl Fn(&[u8], &Reading) -> Verdict) {
    let mut cases = Cases::new(30_000, 1_500_000, 3_000).peekable();
    let mut seen = BTreeMap::new();
    while cases.peek().is_some() {
        let before = stage.stats().unwrap();
        let mut expected: BTreeMap<(Reason, Action), (u64, u64)> = BTreeMap::new();
        let mut numbers = Vec::new();
        for number in cases.by_ref().take(BATCH) {
            let frame = generate::small_of(&mut Rng::with_seed(SEED ^ number), flows);
            let (action, reason) = model(&frame, &oracle::read(&frame).reading);
            let verdict = stage.test_run(&frame).unwrap();
            assert_eq!(verdict.action, action, "frame {number}, for {reason}: {frame:02x?}");
            if action != Action::Tx {
                assert_eq!(verdict.frame, frame, "frame {number}: what is not sent back is left alone");
            }
            let count = expected.entry((reason, action)).or_default();
            *count = (count.0 + 1, count.1 + frame.len() as u64);
            numbers.push(number);
        }
        let counted = stage.stats().unwrap().since(&before);
        let counted: BTreeMap<_, _> =
            counted.reasons.iter().map(|l| ((l.reason, l.action), (l.count.packets, l.count.bytes))).collect();
        assert_eq!(counted, expected, "frames {:?} to {:?}", numbers.first(), numbers.last());
        for (line, (packets, _)) in expected {
            *seen.entry(line).or_insert(0_u64) += packets;
        }
    }
    println!("{}: {seen:?}", stage.name());
}

fn flows() -> Vec<(SocketAddr, SocketAddr)> {
    [
        ("10.1.2.3:4000", "192.0.2.1:53"),
        ("10.1.2.4:4000", "192.0.2.2:443"),
        ("10.9.9.9:1", "198.51.100.7:22"),
        ("203.0.113.7:9", "192.0.2.1:80"),
        ("[2001:db8:1::3]:4000", "[2001:db8::1]:53"),
        ("[2001:db8:1:2::4]:4000", "[2001:db8::2]:443"),
        ("[fe80::1]:1", "[2001:db8::1]:80"),
    ]
    .map(|(from, to)| (from.parse().unwrap(), to.parse().unwrap()))
    .into()
}

#[test]
fn the_monitor_agrees_with_its_model() {
    let monitor = PacketMonitor::load(&MonitorConfig::default()).unwrap();
    monitor.set_action(Protocol::Udp, Some(Action::Drop)).unwrap();
    monitor.set_action(Protocol::Ipv6, Some(Action::Pass)).unwrap();
    agree(&monitor, &flows(), |_, reading| match (reading.reason, reading.network) {
        (Reason::None, Network::Ip { protocol: 17, .. }) => (Action::Drop, Reason::ProtocolAction),
        (Reason::None, Network::Ip { source, .. }) if source.is_ipv6() => (Action::Pass, Reason::ProtocolAction),
        (reason, _) => (Action::Pass, reason),
    });
}

/// Rules with one qualified rule a source prefix at most, so that the order among them does not matter here.
fn rules() -> Vec<(Selector, Rule)> {
    [
        ("10.0.0.0/8", Rule::deny()),
        ("10.1.0.0/16", Rule::allow()),
        ("10.1.2.0/24 to 192.0.2.0/24 udp/53", Rule::deny()),
        ("10.1.2.4 tcp", Rule::deny()),
        ("10.9.9.9 to 198.51.100.7", Rule::allow()),
        ("203.0.113.0/24 icmp", Rule::deny()),
        ("2001:db8:1::/48", Rule::deny()),
        ("2001:db8:1:2::/64 tcp/443-444", Rule::allow()),
        ("2001:db8:1::3 icmpv6", Rule::allow()),
        ("fe80::/10 to 2001:db8::1", Rule::deny()),
        ("::/0 47", Rule::deny()),
        ("0.0.0.0/0 50", Rule::deny()),
    ]
    .map(|(selector, rule)| (selector.parse().unwrap(), rule))
    .into()
}

fn firewall_agrees(engine: Engine, default: Decision) {
    let rules = rules();
    let config = FirewallConfig::default().engine(engine).default_decision(default).capacity(1000_u32);
    let firewall = Firewall::load(&config).unwrap();
    firewall.replace_all(rules.clone()).unwrap();
    let action = |decision| if decision == Decision::Allow { Action::Pass } else { Action::Drop };
    agree(&firewall, &flows(), |_, reading| {
        if reading.reason.is_malformed() || reading.reason.is_unsupported() {
            return (Action::Drop, reading.reason);
        }
        match reading.network {
            Network::Arp => (Action::Pass, Reason::Arp),
            Network::Ip { source, destination, hop_limit, protocol, .. } => {
                if let Some(Transport::Icmpv6 { kind: 133..=137, code: 0 }) = reading.transport
                    && hop_limit == 255
                {
                    return (Action::Pass, Reason::NeighbourDiscovery);
                }
                let port = match reading.transport {
                    Some(Transport::Tcp { destination, .. } | Transport::Udp { destination, .. }) => Some(destination),
                    _ => None,
                };
                let matching = rules.iter().filter(|(s, _)| s.matches(source, destination, protocol, port));
                match matching.max_by_key(|(selector, _)| selector.source().prefix_len()) {
                    Some((_, rule)) if rule.decision == Decision::Allow => (Action::Pass, Reason::Allowed),
                    Some(_) => (Action::Drop, Reason::Denied),
                    None => (action(default), Reason::DefaultAction),
                }
            }
            _ => (action(default), Reason::NotIp),
        }
    });
}

#[test]
fn the_firewall_agrees_with_its_model_with_tries() {
    firewall_agrees(Engine::Trie, Decision::Allow);
}

#[test]
fn the_firewall_agrees_with_its_model_with_compiled_tables() {
    firewall_agrees(Engine::Compiled, Decision::Deny);
}
