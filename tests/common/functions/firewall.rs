//! A firewall with random rules, and one with a long list.

use std::{net::IpAddr, path::Path, time::Duration};

use fastrand::Rng;
use xdpkit::{Action, Decision, Engine, Error, Firewall, FirewallConfig, Result, Rule, Selector, Stage, ipnet::IpNet};

use super::{
    super::{
        rules::{self, Model, packet},
        traffic::DENIED,
    },
    Owned, Place,
};

/// Hosts of the lockstep stream have rules that stay.
fn is_fixed(v6: bool, source: IpNet) -> bool {
    !v6 && source.prefix_len() == 32 && source.addr().to_string().starts_with("10.0.0.")
}

/// What every list of rules has, so that the lockstep stream gets what it expects.
pub(super) fn fixed_rules() -> Vec<(Selector, Rule)> {
    let on = |text: &str| text.parse::<Selector>().unwrap();
    let denied = DENIED.into_iter().map(|source| (on(source), Rule::deny()));
    denied.chain([(on("10.0.0.0/27"), Rule::allow()), (on("fd00::/122"), Rule::allow())]).collect()
}

fn random_rules(random: &mut Rng, count: usize) -> Vec<(Selector, Rule)> {
    let mut rules: Vec<(Selector, Rule)> = fixed_rules();
    while rules.len() < count {
        let (selector, rule) = random_rule(random);
        if rules.iter().all(|(other, _)| *other != selector) {
            rules.push((selector, rule));
        }
    }
    rules
}

fn random_rule(random: &mut Rng) -> (Selector, Rule) {
    loop {
        let v6 = random.bool();
        let selector = rules::selector(random, v6);
        if !is_fixed(v6, selector.source()) {
            return (selector, rules::rule(random));
        }
    }
}

pub(super) struct Guard(Firewall);

impl Guard {
    pub(super) fn start(place: &Place, engine: Engine) -> Result<Self> {
        let config = FirewallConfig::default().capacity(4000 + place.more.get()).engine(engine);
        let firewall = Firewall::load_or_adopt(&place.directory, &config)?;
        if firewall.is_empty()? {
            firewall.insert_many(fixed_rules())?;
        }
        if let Some(pending) = firewall.pending()? {
            pending.roll_back()?;
        }
        Ok(Self(firewall))
    }
}

impl Owned for Guard {
    fn stage(&self) -> &dyn Stage {
        &self.0
    }

    fn edit(&self, random: &mut Rng) -> Result<()> {
        match self.change(random) {
            // An upgrade has left it that died before it was ready.
            Err(Error::ListPending { .. }) => self.0.pending()?.expect("a list waits").roll_back(),
            done => done,
        }
    }

    fn list(&self) {
        assert!(self.0.iter().unwrap().count() >= 4);
    }

    fn agrees(&self, random: &mut Rng, probes: usize) {
        let model = Model(self.0.iter().unwrap().map(|entry| (entry.selector, entry.rule)).collect());
        rules::agree(&self.0, &model, random, probes);
        for source in DENIED {
            let to = if source.contains(':') { "fd00::1" } else { "10.0.0.1" };
            assert_eq!(self.0.test_run(&packet(source, to, "udp/9000")).unwrap().action, Action::Drop, "{source}");
        }
    }
}

impl Guard {
    fn change(&self, random: &mut Rng) -> Result<()> {
        match random.u8(..8) {
            0 => {
                let rules = random_rules(random, 120);
                self.0.replace_all(rules).map(drop)
            }
            1 => {
                let rules = random_rules(random, 60);
                let pending = self.0.replace_all_unless_confirmed(rules, Duration::from_secs(3600))?;
                if random.bool() { pending.confirm() } else { pending.roll_back() }
            }
            2 => {
                let rules: Vec<_> = (0..10).map(|_| random_rule(random)).collect();
                // The same selector twice, with different rules, is a mistake.
                let mut once: Vec<(Selector, Rule)> = Vec::new();
                for (selector, rule) in rules {
                    if once.iter().all(|(other, _)| *other != selector) {
                        once.push((selector, rule));
                    }
                }
                self.0.insert_many(once).map(drop)
            }
            3 | 4 => self.0.remove(random_rule(random).0).map(drop),
            5 if random.u8(..4) == 0 => self.0.remove_expired().map(drop),
            _ => {
                let (selector, rule) = random_rule(random);
                self.0.insert(selector, rule).map(drop)
            }
        }
    }
}

pub(super) struct Scrubber(Firewall);

/// Lines of a long list.
fn lines_of_list() -> u32 {
    crate::common::times(10_000, 60_000, 5_000) as u32
}

impl Scrubber {
    pub(super) fn start(place: &Place, engine: Engine) -> Result<Self> {
        let config = FirewallConfig::default().capacity(70_000).engine(engine);
        let firewall = Firewall::load_or_adopt(&place.directory, &config)?;
        if firewall.is_empty()? {
            firewall.insert_many(fixed_rules())?;
        }
        Ok(Self(firewall))
    }
}

impl Owned for Scrubber {
    fn stage(&self) -> &dyn Stage {
        &self.0
    }

    fn edit(&self, random: &mut Rng) -> Result<()> {
        // Hosts and networks all over the room, most of them there before.
        let shift = random.u32(..64);
        let lines = (0..lines_of_list()).map(|n| {
            let n = n + if n % 8 == 0 { shift } else { 0 };
            let bits = 0x1400_0000_u32 + n.wrapping_mul(0x9e37_79b1) % 0x5000_0000;
            let net = IpNet::new(IpAddr::from(bits.to_be_bytes()), if n % 5 == 0 { 28 } else { 32 }).unwrap().trunc();
            (Selector::new(net), Rule::deny())
        });
        self.0.replace_all(lines.chain(fixed_rules())).map(drop)
    }

    fn list(&self) {
        assert!(self.0.len().unwrap() >= 4);
    }

    fn agrees(&self, random: &mut Rng, probes: usize) {
        let rules: Vec<_> = self.0.iter().unwrap().collect();
        for _ in 0..probes {
            let source = match random.bool() {
                true => random.choice(&rules).unwrap().selector.source().addr(),
                false => IpAddr::from(random.u32(0x1400_0000..0x6400_0000).to_be_bytes()),
            };
            let wanted = match self.0.matching(source).unwrap() {
                Some(entry) if entry.rule.decision == Decision::Deny => Action::Drop,
                _ => Action::Pass,
            };
            let to = if source.is_ipv6() { "fd00::1" } else { "192.0.2.1" };
            let frame = packet(&source.to_string(), to, "udp/9000");
            assert_eq!(self.0.test_run(&frame).unwrap().action, wanted, "{source}");
        }
    }
}
