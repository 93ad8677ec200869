//! How a firewall is made: [`FirewallConfig`].

use super::{Decision, Rule};
use crate::{
    Error, Result,
    abi::firewall::{ENGINE_COMPILED, ENGINE_TRIE, FOLLOW_DEFAULT, Record, Settings},
    sys,
};

#[allow(unused_imports, reason = "for links in the documentation")]
use super::Firewall;

/// What finds the rules of an address. Both give the same answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
pub enum Engine {
    /// [`Engine::Trie`] for a capacity of up to 64 rules, to save memory; else [`Engine::Compiled`]. By number of IPv4
    /// rules, counters off, on an Intel Xeon guest with Linux 6.18:
    ///
    /// | rules | a packet, trie / compiled | an edit, 99th percentile | memory in maps |
    /// |---|---|---|---|
    /// | 10 | 56 / 16 ns | 20 / 1.4 µs | 1 / 3 MB |
    /// | 100 | 75 / 17 ns | 20 / 1.9 µs | 2 / 3 MB |
    /// | 1,000 | 105 / 17 ns | 20 / 2.7 µs | 2 / 3 MB |
    /// | 10,000 | 158 / 19 ns | 21 / 3.6 µs | 4 / 8 MB |
    #[default]
    Auto,
    /// The kernel's longest-prefix-match trie: memory as rules come, slower with every bit that they share.
    Trie,
    /// Tables in array maps, indexed by the address: as fast with a million rules as with ten, but for cache misses.
    /// Memory is taken at once.
    Compiled,
}

/// A table is faster at any size, but its roots take a megabyte: of so few rules, somebody may have many lists.
const TRIE_MOST: u32 = 64;
/// Lines for the roots of both lists; and what a rule takes in both on average, in the worst lists that we know: hosts
/// scattered over all addresses take two each, and as much again in an entirely different list beside.
const LINES_OF_ROOTS: u32 = 16_384;
const LINES_A_RULE: u32 = 5;
/// Bytes that counters may take for every CPU to have a set of its own.
const OWN_COUNTERS_MOST: u64 = 256 << 20;
/// Sets of counters where they would take more.
const SHARED_SETS: u32 = 8;
/// Numbers that rules may have: so many that a list can be replaced by an entirely different one.
const SPARE_NUMBERS: u32 = 1024;

/// How a [`Firewall`] is made.
#[derive(Clone, Debug)]
#[non_exhaustive]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default, deny_unknown_fields))]
pub struct FirewallConfig {
    /// The value's name; `firewall` by default.
    pub name: String,
    /// What happens to IP packets that no rule decides over; allow by default.
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
    /// Rules that there can be, of both families together; 65,536 by default, at most 2^26. 128 bytes each are taken at
    /// once; more with [`Engine::Compiled`] and [`FirewallConfig::rule_counters`].
    pub capacity: u32,
    /// What finds the rules of an address; by capacity by default.
    pub engine: Engine,
    /// Lines of 64 bytes for [`Engine::Compiled`]; `None`, the default: 16,384, and five a rule, which is enough for two
    /// lists of scattered hosts. A list takes as much as its prefixes need, and a new one stands beside the old one
    /// while it is built: a full Internet table takes 0.13 lines a prefix (IPv6: 0.34), so that half a line a rule would do.
    pub table_lines: Option<u32>,
    /// Whether packets are counted by rule; true by default. It costs a cache miss a packet in a big list, and 32 bytes
    /// a rule for each CPU; where that would be more than 256 MiB, CPUs share eight sets of counters, by locked
    /// instructions that take longer.
    pub rule_counters: bool,
    /// Whether the rules and the default drop nothing, and packets that they would drop are counted as
    /// [`Reason::WouldDrop`](crate::Reason::WouldDrop); false by default. Can be changed later.
    pub count_only: bool,
    /// Every n-th dropped packet of each CPU becomes an event, 1 for all; 0, the default, for none. Can be changed later.
    pub sample: u32,
    /// Bytes of the ring buffer for events, a power of two of at least 4096; 1 MiB by default. An event takes 232.
    pub ring_bytes: u32,
}

impl Default for FirewallConfig {
    fn default() -> Self {
        Self {
            name: "firewall".into(),
            default: Decision::Allow,
            not_ip: None,
            unsupported: Decision::Deny,
            pass_neighbours: true,
            capacity: 1 << 16,
            engine: Engine::Auto,
            table_lines: None,
            rule_counters: true,
            count_only: false,
            sample: 0,
            ring_bytes: 1 << 20,
        }
    }
}

macro_rules! setters {
    ($($field:ident($($argument:tt)+);)+) => {
        $(setters!(@one $field($($argument)+));)+
    };
    (@one $method:ident($argument:ident: $kind:ty => $field:ident)) => {
        #[doc = concat!("Sets [`FirewallConfig::", stringify!($field), "`].")]
        #[must_use]
        pub fn $method(mut self, $argument: $kind) -> Self {
            self.$field = $argument.into();
            self
        }
    };
}

impl FirewallConfig {
    setters! {
        name(name: impl Into<String> => name);
        default_decision(decision: Decision => default);
        not_ip(decision: Decision => not_ip);
        unsupported(decision: Decision => unsupported);
        pass_neighbours(pass: bool => pass_neighbours);
        capacity(rules: u32 => capacity);
        engine(engine: Engine => engine);
        table_lines(lines: u32 => table_lines);
        rule_counters(count: bool => rule_counters);
        count_only(only: bool => count_only);
        sample(every: u32 => sample);
        ring_bytes(bytes: u32 => ring_bytes);
    }
}

/// Entries of the maps, and the settings to begin with.
pub(super) struct Sizes {
    pub(super) maps: [(&'static str, u32); 9],
    pub(super) settings: Settings,
}

impl FirewallConfig {
    pub(super) fn sizes(&self) -> Result<Sizes> {
        let wrong = |what, value: u32, expected| Err(Error::Invalid { what, value: value.to_string(), expected });
        if !(1..=1 << 26).contains(&self.capacity) {
            return wrong("capacity", self.capacity, "1 to 67108864 rules");
        }
        if !self.ring_bytes.is_power_of_two() || self.ring_bytes < 4096 {
            return wrong("ring_bytes", self.ring_bytes, "a power of two of at least 4096");
        }
        if self.table_lines.is_some_and(|lines| lines < LINES_OF_ROOTS) {
            return wrong("table_lines", self.table_lines.unwrap_or(0), "at least 16384");
        }
        let numbers = numbers_for(self.capacity);
        let compiled = match self.engine {
            Engine::Auto => self.capacity > TRIE_MOST,
            Engine::Trie => false,
            Engine::Compiled => true,
        };
        let lines = self.table_lines.unwrap_or(LINES_OF_ROOTS + LINES_A_RULE * self.capacity);
        let (trie, lines) = if compiled { (1, lines) } else { (self.capacity, 1) };
        let (sets, own) = counter_sets(sys::cpus(), numbers);
        // One more set, of what each counter had counted for earlier rules.
        let counts = if self.rule_counters { (sets + 1) * numbers } else { 1 };
        Ok(Sizes {
            maps: [
                ("rules", numbers),
                ("rule_counts", counts),
                ("uncounted", sets),
                ("lpm_lines", lines),
                ("trie_v4_a", trie),
                ("trie_v4_b", trie),
                ("trie_v6_a", trie),
                ("trie_v6_b", trie),
                ("events", self.ring_bytes),
            ],
            settings: Settings {
                default_action: self.default.action(),
                not_ip: self.not_ip.map_or(FOLLOW_DEFAULT, Decision::action),
                unsupported: self.unsupported.action(),
                neighbours: if self.pass_neighbours { Decision::Allow } else { Decision::Deny }.action(),
                engine: if compiled { ENGINE_COMPILED } else { ENGINE_TRIE },
                list: 0,
                deadline: 0,
                roots: [[0; 2]; 2],
                count_only: self.count_only.into(),
                sample: self.sample,
                counters: if self.rule_counters { numbers } else { 0 },
                counters_mask: sets - 1,
                counters_shared: (!own).into(),
                reserved: 0,
            },
        })
    }
}

fn numbers_for(capacity: u32) -> u32 {
    2 * capacity + SPARE_NUMBERS
}

/// How many sets of counters there are, a power of two, and whether each CPU has one for itself: such are counted in
/// without the locked instructions that a shared one takes.
fn counter_sets(cpus: usize, numbers: u32) -> (u32, bool) {
    let all = cpus.next_power_of_two();
    let bytes = all as u64 * u64::from(numbers) * size_of::<crate::Count>() as u64;
    match bytes <= OWN_COUNTERS_MOST {
        true => (all as u32, true),
        false => (SHARED_SETS.min(all as u32), all <= SHARED_SETS as usize),
    }
}

/// The capacity that a table of so many rules was made for.
pub(super) fn capacity_of(numbers: u32) -> u32 {
    numbers.saturating_sub(SPARE_NUMBERS) / 2
}

const _: () = assert!(size_of::<Record>() == 64 && size_of::<Rule>() <= 32);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_takes_the_trie_for_few_rules_only() {
        for (engine, capacity, wanted) in [
            (Engine::Auto, 64, ENGINE_TRIE),
            (Engine::Auto, 65, ENGINE_COMPILED),
            (Engine::Trie, 65, ENGINE_TRIE),
            (Engine::Compiled, 64, ENGINE_COMPILED),
        ] {
            let sizes = FirewallConfig::default().engine(engine).capacity(capacity).sizes().unwrap();
            assert_eq!(sizes.settings.engine, wanted, "{engine:?} with {capacity} rules");
        }
    }

    #[test]
    fn cpus_have_counters_of_their_own_while_those_are_small() {
        for (cpus, numbers, wanted) in [
            (1, 100, (1, true)),
            (2, 1 << 25, (2, true)),
            (3, 1 << 10, (4, true)),
            (8, 1 << 25, (8, true)),
            (128, 1 << 17, (128, true)),
            (128, 1 << 18, (8, false)),
        ] {
            assert_eq!(counter_sets(cpus, numbers), wanted, "{cpus} CPUs, {numbers} numbers");
        }
    }
}
