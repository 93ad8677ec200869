//! Building the book from what an earlier process left in the tables.

use std::collections::HashMap;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::{Book, Place, Prefixes, ends, is_pending};
use crate::{
    Error, Result,
    abi::firewall::{LEAF_DENY, LEAF_PLAIN, LIST, PLAIN, Record},
    base::StageCore,
    firewall::{
        Decision, Selector,
        config::capacity_of,
        ids::{COUNTER, RECORD},
        index::Refusal,
        rule::{rule_of, selector_of},
    },
};

impl Book {
    /// Reads the records, and makes everything else agree with them: the earlier process may have ended between any
    /// two of its stores.
    pub(in crate::firewall) fn adopt(core: &StageCore) -> Result<Self> {
        let mut book = Self::open(core, capacity_of(core.entries("rules")))?;
        let now = book.settings.read();
        let in_force = (now.list & 1) as usize;
        book.pending = is_pending(&now);
        book.current = if book.pending { in_force ^ 1 } else { in_force };
        let other = in_force ^ 1;
        let mut damaged = [0; 2];
        damaged[in_force] = book.index.adopt(in_force, now.roots[in_force]);
        if book.pending {
            damaged[other] = book.index.adopt(other, now.roots[other]);
        } else {
            // What it had may have been given to the list in force since, or be about to be: nothing there counts, as
            // soon as the last packet has left it.
            book.wait(core)?;
            book.settings.set_roots(other, [0; 2]);
        }
        // The list in force first: the other one may share its records and counters.
        let found = book.read_list(core, in_force);
        book.adopt_list(core, in_force, found, damaged[in_force])?;
        let found = book.read_list(core, other);
        match book.pending {
            true => book.adopt_list(core, other, found, damaged[other])?,
            false => book.abandon_list(core, other, found)?,
        }
        book.begin_counters_anew();
        Ok(book)
    }

    /// Numbers that had rules once go by way of the quarantine: the earlier process may not have come to that, and what
    /// their counters say is not the next rule's.
    fn begin_counters_anew(&mut self) {
        for id in 1..self.records.len() {
            if self.records.was_used(id) {
                self.ids.retire(id);
            }
        }
    }

    /// The rules of a list, in the order in which they are asked.
    fn read_list(&mut self, core: &StageCore, list: usize) -> Vec<(Selector, u32, Record)> {
        let mut found: Vec<(Selector, u32, Record)> = Vec::new();
        for id in (1..self.records.len()).filter(|id| self.records.flags(*id) & LIST << list != 0) {
            let record = self.records.read(id);
            let whole = (1..self.records.len()).contains(&record.counter);
            match selector_of(&record).filter(|_| whole) {
                Some(selector) => found.push((selector, id, record)),
                None => {
                    core.dropped(format!("rule {id}: its record is not whole"));
                    self.records.forget(id, list);
                }
            }
        }
        found.sort_by(|(a, ..), (b, ..)| a.source().cmp(&b.source()).then_with(|| a.rank().cmp(&b.rank())));
        // A change that was cut short may have left the old record beside the new one: one of them is kept.
        let mut kept: Vec<(Selector, u32, Record)> = Vec::with_capacity(found.len());
        for rule in found {
            match kept.last() {
                Some(last) if last.0 == rule.0 => self.records.forget(rule.1, list),
                _ => kept.push(rule),
            }
        }
        kept
    }

    fn adopt_list(
        &mut self,
        core: &StageCore,
        list: usize,
        found: Vec<(Selector, u32, Record)>,
        damaged: usize,
    ) -> Result<()> {
        self.lists[list] = Prefixes::with_capacity(found.len());
        self.lists[list].rules = found.len();
        let mut leaves: Vec<(IpNet, u32)> = Vec::new();
        for group in found.chunk_by(|a, b| a.0.source() == b.0.source()) {
            let prefix = group[0].0.source();
            let mut next = 0;
            for (at, (selector, id, record)) in group.iter().enumerate().rev() {
                let place = Place { leaf: leaf_of(record, *id, list), record: *record };
                self.ids.add(*id, list, RECORD);
                self.ids.add(place.counter(), list, COUNTER);
                if !ends(place.leaf) {
                    if at + 1 == group.len() {
                        next = self.lists[list].covering_leaf(selector.source());
                        self.lists[list].set_open(prefix, true);
                    }
                    self.records.set_next(*id, next);
                }
                next = place.leaf;
            }
            self.lists[list].set_leaf(prefix, next);
            leaves.push((prefix, next));
        }
        self.repair_index(core, list, &leaves, damaged)
    }

    fn repair_index(&mut self, core: &StageCore, list: usize, leaves: &[(IpNet, u32)], damaged: usize) -> Result<()> {
        if self.index.is_compiled() {
            if damaged > 0 {
                core.rebuilt(format!("the index of the rules, of which {damaged} nodes were damaged"));
            }
            return match self.replace_index(core, list, leaves) {
                // Larger tables have none yet.
                Err(error) if core.is_grown() => Err(error),
                // Without room for both, the old one is right but for a change that was cut short.
                Err(Error::Full { .. }) if damaged == 0 => Ok(()),
                Err(Error::Full { .. }) => {
                    // Nothing passes until there is room: a root needs none of what nodes have.
                    let closed = LEAF_PLAIN | LEAF_DENY;
                    let all = [(Ipv4Net::default().into(), closed), (Ipv6Net::default().into(), closed)];
                    self.replace_index(core, list, &all)?;
                    self.replace_index(core, list, leaves)
                }
                done => done,
            };
        }
        let wanted: HashMap<IpNet, u32> = leaves.iter().copied().collect();
        let mut held: HashMap<IpNet, u32> = self.index.entries(core, list)?.into_iter().collect();
        // First what is of no rule: there may be no room beside it.
        for prefix in held.extract_if(|prefix, _| !wanted.contains_key(prefix)).map(|(prefix, _)| prefix) {
            self.with_index(core, |index, records| index.remove(core, records, list, prefix, 0))?;
        }
        for (prefix, leaf) in wanted {
            if held.get(&prefix) != Some(&leaf) {
                self.with_index(core, |index, records| index.set(core, records, list, prefix, leaf))?;
            }
        }
        Ok(())
    }

    /// Builds the compiled index of a list beside the old one, and lets packets go by it.
    fn replace_index(&mut self, core: &StageCore, list: usize, leaves: &[(IpNet, u32)]) -> Result<()> {
        let old = self.index.take_roots(list);
        match self.with_index(core, |index, _| index.build(core, list, leaves)) {
            Ok(new) => {
                self.settings.set_roots(list, new);
                self.index.free_roots(old);
                self.wait(core)
            }
            Err(error) => {
                self.index.put_roots(list, old);
                Err(error)
            }
        }
    }

    /// Clears what is left of a list that is not in force: one that was being built, or dropped.
    fn abandon_list(&mut self, core: &StageCore, list: usize, found: Vec<(Selector, u32, Record)>) -> Result<()> {
        for (_, id, record) in found {
            let place = Place { leaf: leaf_of(&record, id, list), record };
            self.give_back(list, &place);
        }
        let held = self.index.entries(core, list)?;
        self.wait(core)?;
        self.index.clear(core, list, held.into_iter().map(|(prefix, _)| prefix)).map_err(Refusal::into_error)
    }
}

fn leaf_of(record: &Record, id: u32, list: usize) -> u32 {
    if record.flags & PLAIN << list == 0 {
        return id;
    }
    match rule_of(record, list).decision {
        Decision::Allow => id | LEAF_PLAIN,
        Decision::Deny => id | LEAF_PLAIN | LEAF_DENY,
    }
}

#[cfg(test)]
mod tests {
    //! These need root.

    use std::sync::atomic::Ordering;

    use xdpkit_lab::frame::Frame;

    use super::*;
    use crate::firewall::store::{Rules, SettingsView};
    use crate::{
        Action, Engine, Firewall, FirewallConfig, Rule, Stage as _, abi::firewall::Record, lpm::LINE_WORDS,
        stage::sealed::Sealed as _, sys::mmap::Mapping,
    };

    /// What a process leaves that was killed, or that edited beside another one.
    #[test]
    fn what_is_not_whole_is_dropped_or_built_again_with_an_account() {
        for lines in [None, Some(16_384 + 72)] {
            let mut config = FirewallConfig::default().engine(Engine::Compiled).capacity(1000);
            config.table_lines = lines;
            let firewall = Firewall::load(&config).expect("needs root");
            for third in 0..40 {
                firewall.insert(format!("10.7.{third}.0/25").parse().unwrap(), Rule::deny()).unwrap();
                firewall.insert(format!("10.8.{third}.0/24 tcp").parse().unwrap(), Rule::deny()).unwrap();
            }
            let core = firewall.core();
            let denies = |address: &str| {
                let frame = Frame::tcp(format!("{address}:1").parse().unwrap(), "192.0.2.1:2".parse().unwrap()).build();
                firewall.test_run(&frame).unwrap().action == Action::Drop
            };
            assert!(denies("10.7.5.1") && denies("10.8.5.1") && !denies("10.7.5.200"));
            // The node of 10.7.0.0/16 leads back to itself.
            let settings = SettingsView::of(core).unwrap().read();
            let memory = Mapping::new(core.map("lpm_lines")).unwrap();
            let words = memory.as_ref();
            let node = words[settings.roots[0][0] as usize * LINE_WORDS + 0x0a07].load(Ordering::SeqCst);
            let first = (node & 0x1fff_ffff) as usize * LINE_WORDS;
            words[first..first + 2 * LINE_WORDS].iter().for_each(|word| word.store(node, Ordering::SeqCst));
            // One record has a prefix that no address has, another a counter that is none.
            let rules = Rules::of(core).unwrap();
            let whole = |id: &u32| selector_of(&rules.read(*id)).map(|selector| selector.to_string());
            let id_of = |text: &str| (1..rules.len()).find(|id| whole(id).as_deref() == Some(text)).unwrap();
            for (text, damage) in [
                ("10.7.3.0/25", (|record| record.source_length = 77) as fn(&mut Record)),
                ("10.8.4.0/24 tcp", |record| record.counter = u32::MAX),
            ] {
                let id = id_of(text);
                let mut record = rules.read(id);
                damage(&mut record);
                rules.write(id, &record);
            }
            let book = Book::adopt(core).unwrap();
            let account = core.recovery();
            assert_eq!((account.dropped.len(), account.rebuilt.len()), (2, 1), "{account:?}");
            assert_eq!(book.len(), 78);
            for third in 0..40 {
                assert_eq!(denies(&format!("10.7.{third}.1")), third != 3, "{third}");
                assert_eq!(denies(&format!("10.8.{third}.1")), third != 4, "{third}");
                assert!(!denies(&format!("10.7.{third}.200")));
            }
        }
    }
}
