//! What tests of the firewall's rules share: packets in short, and a model that says what the rules say.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use fastrand::Rng;
use xdpkit::{Action, Decision, Engine, Firewall, FirewallConfig, Reason, Rule, Selector, Stage as _, ipnet::IpNet};
use xdpkit_lab::frame::Frame;

pub(crate) const ENGINES: [Engine; 2] = [Engine::Trie, Engine::Compiled];
pub(crate) const DENIED: (Action, Reason) = (Action::Drop, Reason::Denied);
pub(crate) const ALLOWED: (Action, Reason) = (Action::Pass, Reason::Allowed);
pub(crate) const DEFAULT: (Action, Reason) = (Action::Pass, Reason::DefaultAction);

pub(crate) fn load(engine: Engine) -> Firewall {
    Firewall::load(&FirewallConfig::default().capacity(4000).engine(engine)).unwrap()
}

/// A rule that ended long ago: programs may take up to 10 ms to notice.
pub(crate) fn expired(mut rule: Rule) -> Rule {
    rule.expires_at = Some(Duration::from_nanos(1));
    rule
}

pub(crate) fn on(text: &str) -> Selector {
    text.parse().unwrap()
}

/// A packet: source, destination, and `tcp/80`, `udp/53`, or a protocol number.
pub(crate) fn packet(source: &str, destination: &str, what: &str) -> Vec<u8> {
    let (source, destination): (IpAddr, IpAddr) = (source.parse().unwrap(), destination.parse().unwrap());
    match what.split_once('/') {
        Some(("tcp", port)) => Frame::tcp((source, 999).into(), (destination, port.parse().unwrap()).into()).build(),
        Some((_, port)) => Frame::udp((source, 999).into(), (destination, port.parse().unwrap()).into()).build(),
        None => Frame::ip(source, destination, what.parse().unwrap()).payload(&[0; 24]).build(),
    }
}

/// Says what the rules say, by comparing all of them.
#[derive(Default)]
pub(crate) struct Model(pub(crate) Vec<(Selector, Rule)>);

impl Model {
    pub(crate) fn set(&mut self, selector: Selector, rule: Rule) {
        self.remove(selector);
        self.0.push((selector, rule));
    }

    pub(crate) fn remove(&mut self, selector: Selector) {
        self.0.retain(|(other, _)| *other != selector);
    }

    pub(crate) fn verdict(
        &self,
        source: IpAddr,
        destination: IpAddr,
        protocol: u8,
        port: Option<u16>,
    ) -> (Action, Reason) {
        let applies = |(selector, rule): &&(Selector, Rule)| {
            !rule.count_only
                && !rule.is_expired()
                && selector.source().contains(&source)
                && selector.destination().is_none_or(|net| net.contains(&destination))
                && selector.ip_protocol().is_none_or(|wanted| wanted == protocol)
                && selector.port_range().is_none_or(|range| port.is_some_and(|port| range.contains(&port)))
        };
        let weight = |(selector, _): &&(Selector, Rule)| {
            let ports = selector.port_range().map_or((0, 0), |range| {
                (1_000_000 - i32::from(*range.end() - *range.start()), 1_000_000 - i32::from(*range.start()))
            });
            let destination = selector.destination().map_or(0, |net| net.prefix_len());
            (selector.source().prefix_len(), destination, ports.0, ports.1, selector.ip_protocol().is_some())
        };
        match self.0.iter().filter(applies).max_by_key(weight) {
            None => DEFAULT,
            Some((_, rule)) if rule.decision == Decision::Deny => DENIED,
            Some(_) => ALLOWED,
        }
    }
}

/// Few addresses, so that prefixes nest and packets hit.
pub(crate) fn address(random: &mut Rng, v6: bool) -> IpAddr {
    let bits = u128::from(random.u32(..) & 0xc0c0_c003 | 0x0a00_0000) << 96;
    if v6 {
        Ipv6Addr::from(bits | u128::from(random.bool())).into()
    } else {
        Ipv4Addr::from((bits >> 96) as u32).into()
    }
}

pub(crate) fn selector(random: &mut Rng, v6: bool) -> Selector {
    let net = |random: &mut Rng| {
        let length = *random
            .choice(if v6 { &[0_u8, 8, 10, 17, 18, 32, 33, 128] } else { &[0, 4, 8, 10, 17, 18, 25, 32] })
            .unwrap();
        IpNet::new(address(random, v6), length).unwrap()
    };
    let mut selector = Selector::new(net(random));
    if random.u8(..4) == 0 {
        selector = selector.to(net(random)).unwrap();
    }
    match random.u8(..6) {
        0 => selector = selector.protocol(if random.bool() { 6 } else { 47 }).unwrap(),
        1 => {
            let first = random.u16(78..82);
            selector = selector.protocol(17).unwrap().ports(first..=first + random.u16(..3)).unwrap();
        }
        _ => {}
    }
    selector
}

pub(crate) fn rule(random: &mut Rng) -> Rule {
    let rule = if random.bool() { Rule::allow() } else { Rule::deny() };
    match random.u8(..8) {
        0 => expired(rule),
        1 => rule.expires_in(Duration::from_secs(9999)),
        2 => rule.count_only(),
        _ => rule,
    }
}

pub(crate) fn agree(firewall: &Firewall, model: &Model, random: &mut Rng, probes: usize) {
    for _ in 0..probes {
        let v6 = random.bool();
        let (source, destination) = (address(random, v6), address(random, v6));
        let (protocol, what) = match random.u8(..3) {
            0 => (6, format!("tcp/{}", random.u16(78..84))),
            1 => (17, format!("udp/{}", random.u16(78..84))),
            _ => (47, "47".to_owned()),
        };
        let port = what.split_once('/').map(|(_, port)| port.parse().unwrap());
        let frame = packet(&source.to_string(), &destination.to_string(), &what);
        let wanted = model.verdict(source, destination, protocol, port);
        assert_eq!(firewall.test_run(&frame).unwrap().action, wanted.0, "{source} > {destination} {what}");
        let explained = firewall.explain(source, destination, protocol, port).unwrap().map(|entry| entry.rule.decision);
        let decision = match wanted {
            DENIED => Some(Decision::Deny),
            ALLOWED => Some(Decision::Allow),
            _ => None,
        };
        assert_eq!(explained, decision, "{source} > {destination} {what}");
    }
}
