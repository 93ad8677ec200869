//! [`Firewall`]: allow and deny by source prefix, and by destination, protocol and port where wanted.

mod book;
mod config;
mod edit;
mod event;
mod ids;
mod index;
mod list;
mod pending;
mod replace;
mod rule;
mod selector;
mod store;

use std::{mem::offset_of, net::IpAddr, path::Path, sync::MutexGuard};

use book::Book;
pub use book::Replaced;
pub use config::{Engine, FirewallConfig};
pub use edit::Inserted;
pub use event::FirewallEvent;
use ipnet::IpNet;
pub use list::{Progress, parse_prefix, read_prefix_list, read_prefix_list_with_progress};
pub use pending::PendingList;
pub use rule::{Decision, Rule, RuleEntry};
pub use selector::Selector;

#[allow(unused_imports, reason = "for links in the documentation")]
use crate::Error;
use crate::{
    Events, PacketEvent, Result, Stage,
    abi::{
        event::Event,
        firewall::{ENGINE_COMPILED, Settings},
    },
    address::Unmapped as _,
    base::{self, COPIED, Carry, Edit, Growth, Sets, StageCore, StageKind, State},
    stage::sealed::Sealed,
    sys::{self, object::Plan},
};

static KIND: StageKind = StageKind {
    name: "firewall",
    abi: crate::abi::fingerprint(env!("XDPKIT_ABI_FIREWALL")),
    sized_by: &[
        ("capacity", &["rules", "rule_counts", "trie_v4_a", "trie_v4_b", "trie_v6_a", "trie_v6_b"]),
        ("rule_counters", &["uncounted"]),
        ("capacity` or `table_lines", &["lpm_lines"]),
        ("ring_bytes", &["events"]),
    ],
    carried: &[&[
        ("settings", COPIED),
        ("rules", COPIED),
        ("rule_counts", Carry::Rebuilt),
        ("uncounted", Carry::Rebuilt),
        ("lpm_lines", Carry::Rebuilt),
        ("trie_v4_a", Carry::Rebuilt),
        ("trie_v4_b", Carry::Rebuilt),
        ("trie_v6_a", Carry::Rebuilt),
        ("trie_v6_b", Carry::Rebuilt),
    ]],
    load: |plan: &Plan<'_>| {
        let mut storage = std::mem::MaybeUninit::uninit();
        sys::object::load(sys::skel::firewall::FirewallSkelBuilder::default(), &mut storage, "firewall", plan)
    },
};

/// Judges packets by their source address, and by destination, protocol and port where a rule asks for them.
///
/// Of all prefixes that cover the source and have a rule that applies, the longest decides; where there is none, the
/// default does. A rule that has expired, or whose destination, protocol or ports are not the packet's, says nothing:
/// the next rule is asked, and then those of the next shorter prefix. Among rules of one source prefix, the
/// one with the longest destination prefix is asked first; then those with ports before those with a protocol only
/// before those with neither; then the narrower range of ports; then the lower one. Rules with the same [`Selector`] are
/// the same rule: a list has it once.
///
/// ```text
///  packet ─┬ malformed ─────────────────────────────► drop
///          ├ deeper than the parser looks ──────────► FirewallConfig::unsupported
///          ├ ARP, neighbour discovery ──────────────► pass, if FirewallConfig::pass_neighbours
///          ├ neither ARP nor IP ────────────────────► FirewallConfig::not_ip, else the default
///          └ IP: longest prefix of the source that has rules
///                    │
///                    ▼
///            next of its rules ◄──────────────────────────────────┐
///                    ├ has expired ───────────────────────────────┤
///                    ├ other destination, protocol or ports ──────┤
///                    ├ only counts: counted ──────────────────────┤
///                    ├ applies: counted ────────────────► allow or deny
///                    └ none is left: next shorter prefix ─────────┘
///                                      none is left ────► the default
/// ```
///
/// The rules hold for every IP packet, also for fragments and protocols without ports, behind up to two VLAN
/// tags. Malformed packets are dropped, each under its own [`Reason`](crate::Reason). A rule about
/// an IPv4 address mapped into IPv6 (`::ffff:192.0.2.7`), or about a prefix of such (`::ffff:192.0.2.0/120`, `/96` at the
/// shortest), is one about IPv4; an IPv6 packet that carries such an address has the IPv6 address.
///
/// ```no_run
/// use xdpkit::{AttachOptions, Firewall, FirewallConfig, Rule, Stage as _};
///
/// # fn main() -> xdpkit::Result<()> {
/// let firewall = Firewall::load(&FirewallConfig::default())?;
/// firewall.insert("203.0.113.0/24".parse()?, Rule::deny())?;
/// firewall.insert("203.0.113.7".parse()?, Rule::allow())?;
/// firewall.insert("198.51.100.0/24 tcp/22".parse()?, Rule::deny().expires_in(std::time::Duration::from_secs(3600)))?;
/// let _attachment = firewall.attach(&AttachOptions::new("eth0"))?;
/// println!("{} packets dropped", firewall.stats()?.dropped().packets);
/// for entry in firewall.iter()? {
///     println!("{}: {}: {} packets", entry.selector, entry.rule, entry.count.packets);
/// }
/// # Ok(())
/// # }
/// ```
///
/// A change takes effect with the next packet. The value keeps a mirror of the rules, some 100 bytes each. When
/// another process adopts them, edits by this one return [`Error::Superseded`].
///
/// Needs Linux 5.18 or newer (tested from 6.1 on), `CAP_BPF`, `CAP_PERFMON` and `CAP_NET_ADMIN`.
#[derive(Debug)]
pub struct Firewall {
    core: StageCore,
    state: State<Book>,
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
    /// [`Error::Invalid`], [`Error::MissingCapability`],
    /// [`Error::Forbidden`], [`Error::KernelTooOld`], [`Error::NoMemory`], [`Error::Verifier`],
    /// [`Error::Load`].
    pub fn load(config: &FirewallConfig) -> Result<Self> {
        let sizes = config.sizes()?;
        let core = StageCore::load(&KIND, &config.name, &sizes.maps)?;
        core.change_settings("settings", |settings: &mut Settings| *settings = sizes.settings)?;
        let book = Book::new(&core, config.capacity)?;
        Ok(Self::of(core, book))
    }

    /// Adopts what is pinned there under the configuration's name, else loads: what a process does at its start when
    /// it wants to go on where the last one ended. An adopted firewall keeps its rules and counters, and follows the
    /// configuration as by [`Firewall::configure`].
    ///
    /// A configuration with a larger capacity or another engine makes larger tables with the same in them. They
    /// are put into every pinned chain at the first attachment, or by [`Stage::ready`]; from then on the earlier process is superseded.
    ///
    /// # Errors
    /// As [`Firewall::load`], [`Firewall::adopt`] and [`Firewall::configure`].
    pub fn load_or_adopt(directory: impl AsRef<Path>, config: &FirewallConfig) -> Result<Self> {
        base::load_or_adopt(
            directory.as_ref(),
            &config.name,
            |directory, name| {
                let sizes = config.sizes()?;
                let fit = |sets: &Sets<'_>, core: &StageCore| store::fit(sets, core, &sizes.settings);
                Self::take_over(directory, name, Some(&Growth { wanted: &sizes.maps, fit: &fit }))
            },
            || Self::load(config),
            |adopted| adopted.configure(config),
        )
    }

    /// From now on, follows this configuration, whose name is passed over.
    ///
    /// # Errors
    /// [`Error::Invalid`]; [`Error::PinnedSetting`] for another value of what cannot change while the tables live: capacity,
    /// engine, `table_lines`, `rule_counters` (of these, an adoption makes more), `ring_bytes`; [`Error::Superseded`]. Nothing
    /// was changed then.
    pub fn configure(&self, config: &FirewallConfig) -> Result<()> {
        let (core, sizes) = (&self.core, config.sizes()?);
        let book = self.edit()?;
        let (found, wanted) = (book.settings.read(), sizes.settings);
        core.is_fixed("capacity", config::capacity_of(core.entries("rules")), config.capacity)?;
        let name = |engine| if engine == ENGINE_COMPILED { "compiled" } else { "trie" };
        core.is_fixed("engine", name(found.engine), name(wanted.engine))?;
        core.is_fixed("rule_counters", found.counters != 0, wanted.counters != 0)?;
        let lines = sizes.maps.iter().find(|(map, _)| *map == "lpm_lines").map_or(0, |(_, lines)| *lines);
        core.is_fixed("table_lines", core.entries("lpm_lines"), lines)?;
        core.is_fixed("ring_bytes", core.entries("events"), config.ring_bytes)?;
        for (offset, word) in [
            (offset_of!(Settings, default_action), wanted.default_action),
            (offset_of!(Settings, not_ip), wanted.not_ip),
            (offset_of!(Settings, unsupported), wanted.unsupported),
            (offset_of!(Settings, neighbours), wanted.neighbours),
            (offset_of!(Settings, count_only), wanted.count_only),
            (offset_of!(Settings, sample), wanted.sample),
        ] {
            book.settings.set(offset, word);
        }
        Ok(())
    }

    /// Takes over the tables (rules, settings, counters) that an earlier process pinned under this name. To
    /// take over its attachments too, attach with the same [`AttachOptions::pin`](crate::AttachOptions::pin).
    ///
    /// The earlier process may have died at any moment: what it had begun to change is finished or undone. A list
    /// that it did not confirm in time is rolled back; one whose time is not over is [`Firewall::pending`].
    ///
    /// # Errors
    /// [`Error::PinMissing`]; [`Error::PinMismatch`] when this build
    /// cannot understand the tables.
    pub fn adopt(directory: impl AsRef<Path>, name: &str) -> Result<Self> {
        Self::take_over(directory.as_ref(), name, None)
    }

    fn take_over(directory: &Path, name: &str, growth: Option<&Growth<'_>>) -> Result<Self> {
        let (core, book) = StageCore::adopt(&KIND, directory, name, growth, Book::adopt)?;
        Ok(Self::of(core, book))
    }

    fn of(core: StageCore, book: Book) -> Self {
        Self { core, state: State::new(book, Book::adopt) }
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.state.look()
    }

    fn edit(&self) -> Result<Edit<'_, Book>> {
        self.state.edit(&self.core)
    }

    /// What finds the rules: never [`Engine::Auto`].
    #[must_use]
    pub fn engine(&self) -> Engine {
        if self.book().settings.read().engine == ENGINE_COMPILED { Engine::Compiled } else { Engine::Trie }
    }

    /// From now on, decides so over IP packets that no rule decides over, and over what is not IP unless
    /// [`FirewallConfig::not_ip`] says otherwise.
    ///
    /// # Errors
    /// [`Error::Superseded`].
    pub fn set_default(&self, decision: Decision) -> Result<()> {
        self.set(offset_of!(Settings, default_action), decision.action())
    }

    /// From now on, the rules and the default drop nothing (true), or what they say (false). Malformed packets are
    /// dropped in any case.
    ///
    /// # Errors
    /// [`Error::Superseded`].
    pub fn set_count_only(&self, only: bool) -> Result<()> {
        self.set(offset_of!(Settings, count_only), only.into())
    }

    /// From now on, every n-th dropped packet of each CPU becomes an event; 0 for none.
    ///
    /// # Errors
    /// [`Error::Superseded`].
    pub fn set_sample(&self, every: u32) -> Result<()> {
        self.set(offset_of!(Settings, sample), every)
    }

    fn set(&self, offset: usize, word: u32) -> Result<()> {
        self.edit()?.settings.set(offset, word);
        Ok(())
    }

    /// The rule with exactly this selector, and what it has counted.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn get(&self, selector: Selector) -> Result<Option<RuleEntry>> {
        Ok(self.book().get(&selector))
    }

    /// The rule that decides over packets from this address that no rule with a destination, protocol or ports is about;
    /// `None` when the default does.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn matching(&self, source: IpAddr) -> Result<Option<RuleEntry>> {
        self.first(source, |selector| !selector.is_qualified())
    }

    /// The rule that decides over such packets; `None` when the default does. `port` is that of the destination, `None`
    /// where there is none.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn explain(
        &self,
        source: IpAddr,
        destination: IpAddr,
        protocol: u8,
        port: Option<u16>,
    ) -> Result<Option<RuleEntry>> {
        self.first(source, |selector| selector.matches(source, destination, protocol, port))
    }

    fn first(&self, source: IpAddr, is_about: impl Fn(&Selector) -> bool) -> Result<Option<RuleEntry>> {
        let asked = self.book().asked(IpNet::from(source).unmapped());
        let decides =
            |entry: &RuleEntry| !entry.rule.count_only && !entry.rule.is_expired() && is_about(&entry.selector);
        Ok(asked.into_iter().find(decides))
    }

    /// All rules with their counters: a snapshot, sorted by source prefix, IPv4 first, and within one in the order in
    /// which they are asked.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn iter(&self) -> Result<impl Iterator<Item = RuleEntry> + use<>> {
        Ok(self.book().entries().into_iter())
    }

    /// How many rules there are, expired ones included.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn len(&self) -> Result<usize> {
        Ok(self.book().len())
    }

    /// Whether there is no rule.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// The reader of the dropped packets that were sampled.
    ///
    /// # Errors
    /// [`Error::EventsTaken`] while another reader of these events lives in this process.
    pub fn events(&self) -> Result<Events<FirewallEvent>> {
        // Not the book: a reader need not wait for a long list to be replaced.
        let records = self.book().records();
        let decode = move |record: &[u8]| {
            let event = bytemuck::try_pod_read_unaligned::<Event>(record).ok()?;
            let rule = records.in_use(event.detail).as_ref().and_then(rule::selector_of);
            Some(FirewallEvent { packet: PacketEvent::decode(event)?, rule })
        };
        Events::open(self.name(), self.core.map("events"), Box::new(decode))
    }

    /// Sampled packets that were not reported because the ring buffer was full.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn events_lost(&self) -> Result<u64> {
        self.core.events_lost()
    }
}
