//! Every program against generated and mutated frames: what it says is what a model says, each frame is counted once, none
//! comes out otherwise than the model has it, and the kernel has nothing to say. `./x fuzz` does it for a time of your choice.
//!
//! With the full counts, twelve million frames go through all programs together.

use std::net::SocketAddr;

use crate::common::{Cases, dsr::Host, kernel_log::KernelLog, times};
use crate::fuzzing::{
    dsr_balancer, nat_balancer, rate_limiter,
    tally::{Tally, Verdict},
    tunnel_decap,
};
use crate::parser_oracle::{
    generate,
    oracle::{self, Oracle},
};
use fastrand::Rng;
use xdpkit::{
    Action, Decision, Engine, Firewall, FirewallConfig, MonitorConfig, NatMode, Network, PacketMonitor, Protocol,
    Reason, Rule, Selector, Stage, Transport,
};

/// Frames between two looks at the counters, which are 16 kB for each CPU.
const BATCH: usize = 512;

/// Frame number n is made of this and n; so is world number n, see [`worlds`].
const SEED: u64 = 0x0f0f_5eed_0000_0000;

/// Runs frames through a stage and compares actions, bytes and counters with a model; both see each frame once.
fn agree(
    stage: &dyn Stage,
    generate: impl Fn(&mut Rng) -> Vec<u8>,
    model: impl Fn(&[u8], &Oracle<'_>) -> (Verdict, Vec<u8>),
) {
    let log = KernelLog::from_now();
    let mut cases = Cases::new(30_000, 1_500_000, 3_000).peekable();
    let (mut tally, mut all) = (Tally::default(), Tally::default());
    while cases.peek().is_some() {
        let before = stage.stats().unwrap();
        let mut numbers = Vec::new();
        for number in cases.by_ref().take(BATCH) {
            let frame = generate(&mut Rng::with_seed(SEED ^ number));
            let (verdict, wanted) = model(&frame, &oracle::read(&frame));
            let outcome = stage.test_run(&frame).unwrap();
            assert_eq!(outcome.action, verdict.0, "frame {number}, for {}: {frame:02x?}", verdict.1);
            if verdict.0 != Action::Drop {
                assert_eq!(outcome.frame, wanted, "frame {number}, {}: {frame:02x?}", verdict.1);
            }
            tally.add(verdict, &frame);
            numbers.push(number);
        }
        tally.compare(stage, &before, &mut all, &format!("frames {:?} to {:?}", numbers.first(), numbers.last()));
    }
    all.print(stage.name());
    log.assert_quiet();
}

/// The same for functions that remember: each world begins with empty tables, and is made of its number. `run` is told how
/// many frames to run, adds them up, and says which world it was when something is wrong.
fn worlds(name: &str, mut run: impl FnMut(&mut Rng, usize, &mut Tally, &str)) {
    let log = KernelLog::from_now();
    let mut all = Tally::default();
    let frames = times(15_000, 50_000, 1_000);
    for number in Cases::long(1, 30, 1) {
        let about = format!("world {number} (XDPKIT_CASE={number} runs it alone)");
        run(&mut Rng::with_seed(SEED ^ number), frames, &mut all, &about);
    }
    all.print(name);
    log.assert_quiet();
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
    let flows = flows();
    agree(
        &monitor,
        |random| generate::small_of(random, &flows),
        |frame, oracle| {
            let verdict = match (oracle.reading.reason, oracle.reading.network) {
                (Reason::None, Network::Ip { protocol: 17, .. }) => (Action::Drop, Reason::ProtocolAction),
                (Reason::None, Network::Ip { source, .. }) if source.is_ipv6() => {
                    (Action::Pass, Reason::ProtocolAction)
                }
                (reason, _) => (Action::Pass, reason),
            };
            (verdict, frame.to_vec())
        },
    );
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
    let flows = flows();
    agree(
        &firewall,
        |random| generate::small_of(random, &flows),
        |frame, oracle| (judge(&rules, default, &oracle.reading), frame.to_vec()),
    );
}

fn judge(rules: &[(Selector, Rule)], default: Decision, reading: &oracle::Reading) -> Verdict {
    let action = |decision| if decision == Decision::Allow { Action::Pass } else { Action::Drop };
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
}

#[test]
fn the_firewall_agrees_with_its_model_with_tries() {
    firewall_agrees(Engine::Trie, Decision::Allow);
}

#[test]
fn the_firewall_agrees_with_its_model_with_compiled_tables() {
    firewall_agrees(Engine::Compiled, Decision::Deny);
}

#[test]
fn the_decapsulator_agrees_with_its_model() {
    agree(&tunnel_decap::load(), tunnel_decap::frame, tunnel_decap::model);
}

#[test]
fn the_rate_limiter_agrees_with_its_model() {
    let flows = flows();
    worlds("rate_limiter", |random, frames, all, about| {
        let limiter = rate_limiter::load(1 << 19);
        let mut model = rate_limiter::Model::default();
        let mut tally = Tally::default();
        let before = limiter.stats().unwrap();
        for number in 0..frames {
            let frame = generate::small_of(random, &flows);
            let verdict = model.judge(&oracle::read(&frame).reading);
            let outcome = limiter.test_run(&frame).unwrap();
            assert_eq!(outcome.action, verdict.0, "{about}, frame {number}, for {}: {frame:02x?}", verdict.1);
            assert_eq!(outcome.frame, frame, "{about}, frame {number}: a limiter changes nothing");
            tally.add(verdict, &frame);
        }
        tally.compare(&limiter, &before, all, about);
        assert!(all.packets((Action::Drop, Reason::OverPackets)) > 0, "some limits are exhausted");
    });
}

#[test]
fn the_dsr_balancer_agrees_with_its_model() {
    let host = Host::new();
    let flows = dsr_balancer::flows();
    worlds("dsr_balancer", |random, frames, all, about| {
        let mut world = crate::dsr_model::world::World::new(&host);
        for round in 0..frames / BATCH {
            for _ in 0..if round == 0 { 40 } else { random.usize(..3) } {
                world.change(random);
            }
            let window = (round / 25) as u32;
            let frame = |random: &mut Rng| match random.bool() {
                true => dsr_balancer::mutated(random, &host, &flows, window),
                false => crate::dsr_model::frames::generate(random, &host, window),
            };
            let generated: Vec<_> = (0..BATCH).map(|_| frame(random)).collect();
            world.compare(&generated, &format!("{about}, round {round}"));
        }
        for ((reason, action), packets) in world.compare_counters(about) {
            all.add_sum((*action, *reason), *packets);
        }
    });
}

fn nat_balancer_agrees(mode: NatMode) {
    worlds(&format!("nat_balancer, {mode:?}"), |random, frames, all, about| {
        nat_balancer::World::new(mode).run(random, frames, all, about);
    });
}

#[test]
fn the_nat_balancer_agrees_with_its_model_with_full_translation() {
    nat_balancer_agrees(NatMode::Full);
}

#[test]
fn the_nat_balancer_agrees_with_its_model_with_clients_addresses_kept() {
    nat_balancer_agrees(NatMode::Destination);
}
