//! What is done with packets: [`Rule`]; and how a rule is kept in a record.

use std::{fmt, net::IpAddr, time::Duration};

use ipnet::IpNet;

use super::Selector;
use crate::{
    Action, Count,
    abi::firewall::{COUNT_ONLY, DENY, DESTINATION, IPV6, LEAF_DENY, LEAF_PLAIN, LIST, PLAIN, PORTS, PROTOCOL, Record},
    sys,
};

/// What a firewall does with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
pub enum Decision {
    /// The packet goes on.
    Allow,
    /// The packet is dropped.
    Deny,
}

impl Decision {
    pub(crate) fn action(self) -> u32 {
        match self {
            Self::Allow => Action::Pass as u32,
            Self::Deny => Action::Drop as u32,
        }
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        })
    }
}

/// What is done with the packets that a [`Selector`] is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Rule {
    /// Allow or deny.
    pub decision: Decision,
    /// When the rule ends: time since boot without suspend, `CLOCK_MONOTONIC`. From then on it decides nothing; it
    /// stays in the list until it is removed.
    pub expires_at: Option<Duration>,
    /// Whether the rule only counts packets, and leaves the decision to the next one.
    pub count_only: bool,
}

impl Rule {
    /// Lets packets go on.
    #[must_use]
    pub const fn allow() -> Self {
        Self { decision: Decision::Allow, expires_at: None, count_only: false }
    }

    /// Drops packets.
    #[must_use]
    pub const fn deny() -> Self {
        Self { decision: Decision::Deny, expires_at: None, count_only: false }
    }

    /// Ends the rule after a time that begins now. The program sees to it, to 10 ms, whether a process lives or not.
    #[must_use]
    pub fn expires_in(mut self, lifetime: Duration) -> Self {
        self.expires_at = Some(sys::monotonic().saturating_add(lifetime));
        self
    }

    /// Makes it count what it would decide, and decide nothing.
    #[must_use]
    pub const fn count_only(mut self) -> Self {
        self.count_only = true;
        self
    }

    /// The time that is left: zero when the rule has expired, `None` when it never will.
    #[must_use]
    pub fn remaining(&self) -> Option<Duration> {
        self.expires_at.map(|end| end.saturating_sub(sys::monotonic()))
    }

    /// Whether it has ended.
    #[must_use]
    pub fn is_expired(&self) -> bool {
        self.remaining().is_some_and(|left| left.is_zero())
    }

    /// Whether its decision can stand in the leaf.
    pub(super) fn is_plain(&self, selector: &Selector) -> bool {
        self.expires_at.is_none() && !self.count_only && !selector.is_qualified()
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.decision)?;
        if self.count_only {
            write!(f, ", count only")?;
        }
        match self.remaining() {
            None => Ok(()),
            Some(left) if left.is_zero() => write!(f, ", expired"),
            Some(left) => write!(f, ", for {:.1} s", left.as_secs_f64()),
        }
    }
}

/// A rule in a list, with what it has counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RuleEntry {
    /// What it is about.
    pub selector: Selector,
    /// What it does.
    pub rule: Rule,
    /// The packets that it decided over, or counted: since it was inserted, whatever else was changed meanwhile.
    /// Zero without [`FirewallConfig::rule_counters`](crate::FirewallConfig::rule_counters).
    pub count: Count,
}

/// A record with no list in its flags.
pub(super) fn encode(selector: &Selector, rule: &Rule, counter: u32) -> Record {
    let mut record = Record {
        expires: rule.expires_at.map_or(0, |end| u64::try_from(end.as_nanos()).unwrap_or(u64::MAX).max(1)),
        counter,
        source_length: selector.source().prefix_len(),
        source: octets(selector.source().addr()),
        ..bytemuck::Zeroable::zeroed()
    };
    if selector.source().addr().is_ipv6() {
        record.flags |= IPV6;
    }
    if rule.count_only {
        record.flags |= COUNT_ONLY;
    }
    if let Some(net) = selector.destination() {
        record.flags |= DESTINATION;
        (record.destination, record.destination_length) = (octets(net.addr()), net.prefix_len());
    }
    if let Some(protocol) = selector.ip_protocol() {
        record.flags |= PROTOCOL;
        record.protocol = protocol;
    }
    if let Some(ports) = selector.port_range() {
        record.flags |= PORTS;
        (record.first_port, record.last_port) = ports.into_inner();
    }
    record
}

/// `None` for a record that no rule of ours makes.
pub(super) fn selector_of(record: &Record) -> Option<Selector> {
    let prefix = |octets: [u8; 16], length: u8| {
        let address = match record.flags & IPV6 {
            0 => IpAddr::from(*octets.first_chunk::<4>().expect("16 bytes hold 4")),
            _ => IpAddr::from(octets),
        };
        IpNet::new(address, length).ok()
    };
    let mut selector = Selector::new(prefix(record.source, record.source_length)?);
    if record.flags & DESTINATION != 0 {
        selector = selector.to(prefix(record.destination, record.destination_length)?).ok()?;
    }
    if record.flags & PROTOCOL != 0 {
        selector = selector.protocol(record.protocol).ok()?;
    }
    if record.flags & PORTS != 0 {
        selector = selector.ports(record.first_port..=record.last_port).ok()?;
    }
    Some(selector)
}

/// What the rule of a record does in a list.
pub(super) fn rule_of(record: &Record, list: usize) -> Rule {
    let rule = if record.flags & DENY << list == 0 { Rule::allow() } else { Rule::deny() };
    if record.flags & PLAIN << list != 0 {
        return rule;
    }
    Rule {
        expires_at: (record.expires != 0).then(|| Duration::from_nanos(record.expires)),
        count_only: record.flags & COUNT_ONLY != 0,
        ..rule
    }
}

/// The flags of a rule that say what it is in a list.
pub(super) fn flags_in(list: usize, selector: &Selector, rule: &Rule) -> u32 {
    let mut flags = LIST;
    if rule.decision == Decision::Deny {
        flags |= DENY;
    }
    if rule.is_plain(selector) {
        flags |= PLAIN;
    }
    flags << list
}

/// All flags that are about a list.
pub(super) fn list_flags(list: usize) -> u32 {
    (LIST | DENY | PLAIN) << list
}

/// The leaf that leads to a rule.
pub(super) fn leaf(id: u32, selector: &Selector, rule: &Rule) -> u32 {
    match (rule.is_plain(selector), rule.decision) {
        (false, _) => id,
        (true, Decision::Allow) => id | LEAF_PLAIN,
        (true, Decision::Deny) => id | LEAF_PLAIN | LEAF_DENY,
    }
}

fn octets(address: IpAddr) -> [u8; 16] {
    let mut octets = [0; 16];
    match address {
        IpAddr::V4(v4) => octets[..4].copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => octets = v6.octets(),
    }
    octets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_say_what_the_rule_says() {
        for text in ["10.0.0.0/8", "10.0.0.0/8 to 192.0.2.1 tcp/80-90", "2001:db8::/32 to ::1 58", "::/0 udp/53"] {
            let selector: Selector = text.parse().unwrap();
            for rule in [Rule::allow(), Rule::deny().count_only(), Rule::deny().expires_in(Duration::from_secs(5))] {
                for list in 0..2 {
                    let mut record = encode(&selector, &rule, 7);
                    record.flags |= flags_in(list, &selector, &rule);
                    assert_eq!((selector_of(&record), rule_of(&record, list)), (Some(selector), rule));
                }
            }
        }
    }
}
