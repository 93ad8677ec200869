//! [`Firewall`]: allow and deny CIDRs by longest-prefix match.

mod list;

use std::{fmt, io, net::IpAddr, path::Path};

use ipnet::IpNet;
pub use list::{parse_prefix, read_prefix_list};

use crate::{
    Action, Error, Result, Stage,
    abi::firewall::{FOLLOW_DEFAULT, Key4, Key6, Rule as RawRule, Settings},
    stage::{StageCore, StageKind, sealed::Sealed},
    sys::{
        self,
        map::{Map, TypedMap},
        object::Plan,
    },
};

static KIND: StageKind = StageKind {
    name: "firewall",
    abi: crate::abi::fingerprint(env!("XDPKIT_ABI_FIREWALL")),
    load: |plan: &Plan<'_>| {
        let mut storage = std::mem::MaybeUninit::uninit();
        sys::object::load(sys::skel::firewall::FirewallSkelBuilder::default(), &mut storage, "firewall", plan)
    },
};

/// What a firewall does with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Decision {
    /// The packet goes on.
    Allow,
    /// The packet is dropped.
    Deny,
}

impl Decision {
    fn action(self) -> u32 {
        match self {
            Self::Allow => Action::Pass as u32,
            Self::Deny => Action::Drop as u32,
        }
    }

    fn from_action(action: u32) -> Self {
        if action == Action::Pass as u32 { Self::Allow } else { Self::Deny }
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

/// What is done with packets from a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Rule {
    /// Allow or deny.
    pub decision: Decision,
}

impl Rule {
    /// Lets packets go on.
    #[must_use]
    pub const fn allow() -> Self {
        Self { decision: Decision::Allow }
    }

    /// Drops packets.
    #[must_use]
    pub const fn deny() -> Self {
        Self { decision: Decision::Deny }
    }

    fn to_raw(self, prefix: IpNet) -> RawRule {
        RawRule { action: self.decision.action(), prefix_length: prefix.prefix_len().into() }
    }

    fn from_raw(raw: RawRule) -> Self {
        Self { decision: Decision::from_action(raw.action) }
    }
}

/// How a [`Firewall`] is made.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct FirewallConfig {
    /// The value's name; `firewall` by default.
    pub name: String,
    /// What happens to IP packets from a source that no rule covers; allow by default.
    pub default: Decision,
    /// What happens to Ethernet frames that are neither ARP nor IP (LLDP, MPLS, PPPoE, ...). `None`, the
    /// default: the same as `default`.
    pub not_ip: Option<Decision>,
    /// What happens to packets deeper than the parser looks: more than two VLAN tags or eight IPv6 extension
    /// headers, or headers that a driver put into a second buffer. Deny by default, so that no rule can be passed by
    /// that way.
    pub unsupported: Decision,
    /// Whether ARP and IPv6 neighbour discovery from the link always pass; true by default. Without them the
    /// host cannot be reached at all. If false, `default` decides over ARP, and the rules over neighbour discovery.
    pub pass_neighbours: bool,
    /// Rules that each family can hold; 2^20 by default. Memory is taken as rules come: about 100 bytes each.
    pub capacity: u32,
}

impl Default for FirewallConfig {
    fn default() -> Self {
        Self {
            name: "firewall".into(),
            default: Decision::Allow,
            not_ip: None,
            unsupported: Decision::Deny,
            pass_neighbours: true,
            capacity: 1 << 20,
        }
    }
}

impl FirewallConfig {
    /// Sets [`FirewallConfig::name`].
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// Sets [`FirewallConfig::default`].
    #[must_use]
    pub fn default_decision(mut self, decision: Decision) -> Self {
        self.default = decision;
        self
    }

    /// Sets [`FirewallConfig::not_ip`].
    #[must_use]
    pub fn not_ip(mut self, decision: Decision) -> Self {
        self.not_ip = Some(decision);
        self
    }

    /// Sets [`FirewallConfig::unsupported`].
    #[must_use]
    pub fn unsupported(mut self, decision: Decision) -> Self {
        self.unsupported = decision;
        self
    }

    /// Sets [`FirewallConfig::pass_neighbours`].
    #[must_use]
    pub fn pass_neighbours(mut self, pass: bool) -> Self {
        self.pass_neighbours = pass;
        self
    }

    /// Sets [`FirewallConfig::capacity`].
    #[must_use]
    pub fn capacity(mut self, rules: u32) -> Self {
        self.capacity = rules;
        self
    }
}

/// Judges packets by their source address: of all prefixes that have a rule and cover the address, the longest
/// decides; where there is none, the default does. One prefix has one rule.
///
/// The rules hold for every IP packet, also for fragments and protocols without ports, behind up to two VLAN
/// tags. Malformed packets are dropped, each under its own [`Reason`](crate::Reason). IPv4 addresses mapped
/// into IPv6 (`::ffff:0:0/96`) are IPv6 addresses.
///
/// ```no_run
/// use xdpkit::{AttachOptions, Firewall, FirewallConfig, Rule, Stage as _};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let firewall = Firewall::load(&FirewallConfig::default())?;
/// firewall.insert("203.0.113.0/24".parse()?, Rule::deny())?;
/// firewall.insert("203.0.113.7/32".parse()?, Rule::allow())?;
/// let _attachment = firewall.attach(&AttachOptions::new("eth0"))?;
/// println!("{} packets dropped", firewall.stats()?.dropped().packets);
/// # Ok(())
/// # }
/// ```
///
/// Rules live in the kernel's longest-prefix-match tries, with keys in network byte order; a change takes
/// effect with the next packet.
///
/// Needs Linux 5.18 or newer (tested from 6.1 on), `CAP_BPF`, `CAP_PERFMON` and `CAP_NET_ADMIN`.
#[derive(Debug)]
pub struct Firewall {
    core: StageCore,
}

impl Sealed for Firewall {
    fn core(&self) -> &StageCore {
        &self.core
    }
}

impl Stage for Firewall {}

impl Firewall {
    /// Loads the program and creates its tables.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::MissingCapability`], [`Error::KernelTooOld`], [`Error::Verifier`], [`Error::Load`].
    pub fn load(config: &FirewallConfig) -> Result<Self> {
        if config.capacity == 0 {
            return Err(Error::Invalid { what: "capacity", value: "0".into(), expected: "at least 1 rule" });
        }
        let capacities = [("rules_v4", config.capacity), ("rules_v6", config.capacity)];
        let core = StageCore::load(&KIND, &config.name, &capacities)?;
        let firewall = Self { core };
        firewall.configure(config)?;
        Ok(firewall)
    }

    /// Adopts what is pinned there under the configuration's name, else loads: what a process does at its start when
    /// it wants to go on where the last one ended. An adopted firewall keeps its rules and policies.
    ///
    /// # Errors
    /// As [`Firewall::load`] and [`Firewall::adopt`], but for [`Error::PinMissing`].
    pub fn load_or_adopt(directory: impl AsRef<Path>, config: &FirewallConfig) -> Result<Self> {
        match Self::adopt(directory, &config.name) {
            Err(Error::PinMissing { .. }) => Self::load(config),
            answer => answer,
        }
    }

    /// From now on, follows the policies of this configuration; its name and capacity are passed over. For an adopted
    /// firewall, whose policies are those that it was pinned with.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn configure(&self, config: &FirewallConfig) -> Result<()> {
        let neighbours = if config.pass_neighbours { Decision::Allow } else { Decision::Deny };
        self.core.change_settings("settings", |settings: &mut Settings| {
            *settings = Settings {
                default_action: config.default.action(),
                not_ip: config.not_ip.map_or(FOLLOW_DEFAULT, Decision::action),
                unsupported: config.unsupported.action(),
                neighbours: neighbours.action(),
            };
        })
    }

    /// Takes over the tables (rules, settings, counters) that an earlier process pinned under this name. To
    /// take over its attachments too, attach with the same [`AttachOptions::pin`](crate::AttachOptions::pin).
    ///
    /// # Errors
    /// [`Error::PinMissing`]; [`Error::PinMismatch`] when this build cannot understand the tables.
    pub fn adopt(directory: impl AsRef<Path>, name: &str) -> Result<Self> {
        Ok(Self { core: StageCore::adopt(&KIND, directory.as_ref(), name)? })
    }

    /// From now on, decides so over IP packets from sources that no rule covers, and over what is not IP unless
    /// [`FirewallConfig::not_ip`] says otherwise.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn set_default(&self, decision: Decision) -> Result<()> {
        self.core.change_settings("settings", |settings: &mut Settings| settings.default_action = decision.action())
    }

    /// Sets the rule of a prefix, and answers the one that it had. Host bits are cleared: `10.9.9.9/8` is
    /// `10.0.0.0/8`.
    ///
    /// # Errors
    /// [`Error::Full`] when the family holds as many rules as it can; [`Error::Map`].
    pub fn insert(&self, prefix: IpNet, rule: Rule) -> Result<Option<Rule>> {
        let before = self.get(prefix)?;
        let raw = rule.to_raw(prefix);
        let (done, map) = match prefix {
            IpNet::V4(net) => (self.v4().set(&net.into(), &raw), self.map(prefix)),
            IpNet::V6(net) => (self.v6().set(&net.into(), &raw), self.map(prefix)),
        };
        done.map_err(|error| refused(map, prefix, error))?;
        Ok(before)
    }

    /// Sets many rules, each as [`Firewall::insert`] does; far faster than one by one. A prefix that stands
    /// twice gets the later rule.
    ///
    /// Not atomic: on an error, the rules before the one that it names may be in force.
    ///
    /// # Errors
    /// [`Error::Full`] naming the first prefix that did not fit; [`Error::Map`].
    pub fn insert_many(&self, rules: impl IntoIterator<Item = (IpNet, Rule)>) -> Result<()> {
        let (mut v4, mut v6) = ((Vec::new(), Vec::new()), (Vec::new(), Vec::new()));
        for (prefix, rule) in rules {
            match prefix {
                IpNet::V4(net) => {
                    v4.0.push(Key4::from(net));
                    v4.1.push(rule.to_raw(prefix));
                }
                IpNet::V6(net) => {
                    v6.0.push(Key6::from(net));
                    v6.1.push(rule.to_raw(prefix));
                }
            }
        }
        let key = |net: Option<IpNet>| net.expect("the key was made from a prefix");
        self.v4().set_many(&v4.0, &v4.1).map_err(|(at, error)| {
            let prefix = key(v4.0.get(at).and_then(Key4::net));
            refused(self.map(prefix), prefix, error)
        })?;
        self.v6().set_many(&v6.0, &v6.1).map_err(|(at, error)| {
            let prefix = key(v6.0.get(at).and_then(Key6::net));
            refused(self.map(prefix), prefix, error)
        })
    }

    /// Removes the rule of exactly this prefix, and answers it.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn remove(&self, prefix: IpNet) -> Result<Option<Rule>> {
        let before = self.get(prefix)?;
        let removed = match prefix {
            IpNet::V4(net) => self.v4().remove(&net.into())?,
            IpNet::V6(net) => self.v6().remove(&net.into())?,
        };
        Ok(before.filter(|_| removed))
    }

    /// The rule of exactly this prefix.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn get(&self, prefix: IpNet) -> Result<Option<Rule>> {
        // A trie answers with the longest match up to the key's length, which may be a shorter prefix.
        let exact = self.longest(prefix)?.filter(|raw| raw.prefix_length == u32::from(prefix.prefix_len()));
        Ok(exact.map(Rule::from_raw))
    }

    /// The prefix and rule that decide over packets from this address; `None` when the default does.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn matching(&self, source: IpAddr) -> Result<Option<(IpNet, Rule)>> {
        let Some(raw) = self.longest(source.into())? else { return Ok(None) };
        let length = u8::try_from(raw.prefix_length).unwrap_or(u8::MAX);
        let prefix = IpNet::new(source, length).map_err(|_| Error::Invalid {
            what: "prefix length in the rules",
            value: raw.prefix_length.to_string(),
            expected: "at most the address's length",
        })?;
        Ok(Some((prefix.trunc(), Rule::from_raw(raw))))
    }

    /// All rules: a snapshot, sorted by prefix, IPv4 first. Rules that others change meanwhile may or may not
    /// be in it.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn iter(&self) -> Result<impl Iterator<Item = (IpNet, Rule)> + use<>> {
        // The kernel reads a batch by longest match: a prefix that has just been removed would come with the rule of
        // one that covers it.
        let own = |prefix: Option<IpNet>, raw: RawRule| {
            prefix.filter(|prefix| u32::from(prefix.prefix_len()) == raw.prefix_length).zip(Some(Rule::from_raw(raw)))
        };
        let v4 = self.v4().entries()?.into_iter().filter_map(|(key, raw)| own(key.net(), raw));
        let v6 = self.v6().entries()?.into_iter().filter_map(|(key, raw)| own(key.net(), raw));
        let mut rules: Vec<(IpNet, Rule)> = v4.chain(v6).collect();
        rules.sort_by_key(|(prefix, _)| *prefix);
        rules.dedup_by_key(|(prefix, _)| *prefix);
        Ok(rules.into_iter())
    }

    /// How many rules there are. Counts them, so it takes as long as [`Firewall::iter`].
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn len(&self) -> Result<usize> {
        Ok(self.iter()?.count())
    }

    /// Whether there is no rule.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    fn longest(&self, prefix: IpNet) -> Result<Option<RawRule>> {
        match prefix {
            IpNet::V4(net) => self.v4().get(&net.into()),
            IpNet::V6(net) => self.v6().get(&net.into()),
        }
    }

    fn v4(&self) -> TypedMap<'_, Key4, RawRule> {
        self.core.table("rules_v4")
    }

    fn v6(&self) -> TypedMap<'_, Key6, RawRule> {
        self.core.table("rules_v6")
    }

    fn map(&self, prefix: IpNet) -> &Map {
        self.core.map(match prefix {
            IpNet::V4(_) => "rules_v4",
            IpNet::V6(_) => "rules_v6",
        })
    }
}

fn refused(map: &Map, prefix: IpNet, error: io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::ENOSPC) => {
            Error::Full { map: map.name().to_owned(), capacity: map.capacity(), entry: prefix.trunc().to_string() }
        }
        _ => map.error("set a rule", error),
    }
}
