//! The rule book: the control plane's mirror of both lists, and every change to them.
//!
//! A prefix leads, by the index, to the first of its rules; each record that is not plain leads to the next rule of
//! its prefix, the last one to the first rule of the nearest covering prefix. So a packet that a rule says nothing
//! about goes on without another look-up. Rules are written before what leads to them; what is in use is
//! changed one word at a time; what was in use is written again only after a grace period.

mod adopt;
mod edit;
mod prefixes;
mod replace;

use std::{io, mem::offset_of, sync::Arc, time::Duration};

pub(super) use edit::Before;
use ipnet::IpNet;
use prefixes::{Prefixes, ends};
pub use replace::Replaced;

use super::{
    RuleEntry, Selector,
    ids::{COUNTER, Ids, RECORD},
    index::{Index, Refusal},
    rule::{rule_of, selector_of},
    store::{Counts, Rules, SettingsView},
};
use crate::{
    Error, Result,
    abi::firewall::{ENGINE_COMPILED, LEAF_PLAIN, LEAF_RULE, PENDING, Record, Settings},
    base::StageCore,
    sys::{self, grace::GracePeriod},
};

/// The most rules that one source prefix may have.
pub(super) const RULES_PER_PREFIX: usize = 32;
/// The most records that a packet may be compared with: one less than `RULES_ASKED_MAX` in the program, which needs a
/// step for the plain rule at the end.
const RULES_ASKED: usize = 63;

#[derive(Debug)]
pub(super) struct Book {
    pub(super) settings: SettingsView,
    records: Arc<Rules>,
    counts: Counts,
    index: Index,
    ids: Ids,
    lists: [Prefixes; 2],
    /// The list that is in force, or will be again if the other is not confirmed.
    current: usize,
    pending: bool,
    /// The list that was dropped last and its prefixes, until it has been emptied.
    leftover: Option<(usize, Prefixes)>,
    capacity: u32,
    grace: GracePeriod,
}

/// A rule where it stands.
#[derive(Clone, Copy, Debug)]
struct Place {
    leaf: u32,
    record: Record,
}

impl Place {
    fn id(&self) -> u32 {
        self.leaf & LEAF_RULE
    }

    fn counter(&self) -> u32 {
        if self.leaf & LEAF_PLAIN == 0 { self.record.counter } else { self.id() }
    }

    fn selector(&self) -> Selector {
        selector_of(&self.record).expect("the book holds rules that it wrote or has read")
    }
}

impl Book {
    /// Over new tables.
    pub(super) fn new(core: &StageCore, capacity: u32) -> Result<Self> {
        let mut book = Self::open(core, capacity)?;
        let roots = book.index.build(core, 0, &[]).map_err(Refusal::into_error)?;
        book.settings.set_roots(0, roots);
        Ok(book)
    }

    fn open(core: &StageCore, capacity: u32) -> Result<Self> {
        let settings = SettingsView::of(core)?;
        let now = settings.read();
        let records = Arc::new(Rules::of(core)?);
        let index = if now.engine == ENGINE_COMPILED { Index::compiled(core)? } else { Index::Trie };
        Ok(Self {
            counts: Counts::of(core, now.counters)?,
            ids: Ids::new(core.map("rules").capacity()),
            settings,
            records,
            index,
            lists: Default::default(),
            current: 0,
            pending: false,
            leftover: None,
            capacity,
            grace: GracePeriod::new().map_err(|error| no_grace(core, error))?,
        })
    }

    /// The list that packets are judged by at this moment.
    fn in_force(&self) -> usize {
        if self.pending && sys::monotonic() < self.deadline() { self.current ^ 1 } else { self.current }
    }

    /// Finishes a roll-back whose time has come.
    fn finish(&mut self, core: &StageCore) -> Result<()> {
        if self.pending && self.in_force() == self.current { self.roll_back(core) } else { Ok(()) }
    }

    fn deadline(&self) -> Duration {
        Duration::from_nanos(self.settings.read().deadline)
    }

    /// The rules of a prefix in the order in which they are asked.
    fn places(&self, list: usize, prefix: IpNet) -> Vec<Place> {
        let mut places = Vec::new();
        let mut leaf = self.lists[list].leaf(prefix);
        // Of a superseded value, the records are another process's by now.
        while leaf != 0 && leaf & LEAF_RULE < self.records.len() && places.len() < RULES_PER_PREFIX {
            let record = self.records.read(leaf & LEAF_RULE);
            if selector_of(&record).is_none_or(|selector| selector.source() != prefix) {
                break;
            }
            places.push(Place { leaf, record });
            leaf = if leaf & LEAF_PLAIN == 0 { record.next } else { 0 };
        }
        places
    }

    fn find(&self, list: usize, selector: &Selector) -> Option<Place> {
        self.places(list, selector.source()).into_iter().find(|place| place.selector() == *selector)
    }

    fn entry(&self, list: usize, place: &Place) -> RuleEntry {
        let rule = rule_of(&place.record, list);
        RuleEntry { selector: place.selector(), rule, count: self.counts.read(place.counter()) }
    }

    pub(super) fn get(&self, selector: &Selector) -> Option<RuleEntry> {
        let list = self.in_force();
        self.find(list, selector).map(|place| self.entry(list, &place))
    }

    /// All rules, in the order of prefixes and then in that in which they are asked.
    pub(super) fn entries(&self) -> Vec<RuleEntry> {
        let list = self.in_force();
        let mut prefixes: Vec<IpNet> = self.lists[list].iter().map(|(prefix, _)| prefix).collect();
        prefixes.sort_unstable();
        let places = prefixes.into_iter().flat_map(|prefix| self.places(list, prefix));
        places.map(|place| self.entry(list, &place)).collect()
    }

    pub(super) fn len(&self) -> usize {
        self.lists[self.in_force()].rules
    }

    /// The rules that a packet from an address would be compared with, until a plain one.
    pub(super) fn asked(&self, address: IpNet) -> Vec<RuleEntry> {
        let list = self.in_force();
        let mut entries = Vec::new();
        let mut next = self.lists[list].longest(address, address.max_prefix_len());
        while let Some((prefix, _)) = next {
            let places = self.places(list, prefix);
            entries.extend(places.iter().map(|place| self.entry(list, place)));
            let ended = places.last().is_some_and(|place| ends(place.leaf));
            next = if ended { None } else { self.lists[list].covering(prefix) };
        }
        entries
    }

    /// For readers that do not lock the book.
    pub(super) fn records(&self) -> Arc<Rules> {
        Arc::clone(&self.records)
    }

    /// Waits until no packet is judged by what was in force before, and makes use of what that frees.
    fn wait(&mut self, core: &StageCore) -> Result<()> {
        self.grace.wait().map_err(|error| no_grace(core, error))?;
        let Self { ids, counts, index, .. } = self;
        ids.release(|id| counts.reset(id));
        index.release();
        Ok(())
    }

    /// A number for a rule of a list. May wait for a grace period.
    fn take_id(&mut self, core: &StageCore, list: usize, what: u8, selector: &Selector) -> Result<u32> {
        if let Some(id) = self.ids.take(list, what) {
            return Ok(id);
        }
        if self.ids.has_quarantine() {
            self.wait(core)?;
        }
        self.ids.take(list, what).ok_or_else(|| self.full(core, selector))
    }

    fn full(&self, core: &StageCore, selector: &Selector) -> Error {
        Error::Full { map: core.map("rules").name().to_owned(), capacity: self.capacity, entry: selector.to_string() }
    }

    /// Does something to the index; once more after a grace period where that makes room.
    fn with_index<T>(
        &mut self,
        core: &StageCore,
        mut change: impl FnMut(&mut Index, &Rules) -> Result<T, Refusal>,
    ) -> Result<T> {
        match change(&mut self.index, &self.records) {
            Err(Refusal::Later) => {
                self.wait(core)?;
                change(&mut self.index, &self.records).map_err(Refusal::into_error)
            }
            other => other.map_err(Refusal::into_error),
        }
    }

    /// How many records a packet asks from a leaf on, before a plain rule or the end.
    fn records_from(&self, mut leaf: u32) -> usize {
        let mut count = 0;
        while !ends(leaf) && count <= RULES_ASKED {
            count += 1;
            leaf = self.records.read(leaf & LEAF_RULE).next;
        }
        count
    }

    /// Lets go of what a list holds of a rule.
    fn give_back(&mut self, list: usize, place: &Place) {
        self.give_record_back(list, place.id());
        self.ids.remove(place.counter(), list, COUNTER);
    }

    fn give_record_back(&mut self, list: usize, id: u32) {
        self.records.forget(id, list);
        self.ids.remove(id, list, RECORD);
    }
}

impl Refusal {
    /// For what has waited already.
    fn into_error(self) -> Error {
        match self {
            Self::Error(error) => error,
            Self::Later => Error::Map {
                map: "lpm_lines".into(),
                operation: "set a rule",
                cause: io::ErrorKind::StorageFull.into(),
            },
        }
    }
}

fn no_grace(core: &StageCore, error: io::Error) -> Error {
    core.map("rules").error("wait for a grace period", error)
}

/// Whether the settings wait for a confirmation.
fn is_pending(settings: &Settings) -> bool {
    settings.list & PENDING != 0
}

const _: () = assert!(offset_of!(Settings, deadline) % 8 == 0);
