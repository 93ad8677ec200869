//! Changing single rules while packets flow.

use super::{Book, Place, RULES_ASKED, RULES_PER_PREFIX, ends};
use crate::{
    Error, Result,
    base::StageCore,
    firewall::{
        Rule, Selector,
        ids::{COUNTER, RECORD},
        rule::{encode, flags_in, leaf, list_flags, rule_of},
    },
};

/// What a change replaced: for answers, and to take it back.
#[derive(Clone, Copy, Debug)]
pub(in crate::firewall) struct Before {
    pub(in crate::firewall) selector: Selector,
    pub(in crate::firewall) rule: Option<Rule>,
}

impl Book {
    /// The list to edit; refused while another waits for its confirmation.
    pub(super) fn editable(&mut self, core: &StageCore) -> Result<usize> {
        self.finish(core)?;
        if self.pending { Err(Error::ListPending { stage: core.shared.name.clone() }) } else { Ok(self.current) }
    }

    pub(in crate::firewall) fn insert(
        &mut self,
        core: &StageCore,
        selector: Selector,
        rule: Rule,
    ) -> Result<Option<Rule>> {
        let list = self.editable(core)?;
        let places = self.places(list, selector.source());
        let at = places.iter().position(|place| place.selector() == selector);
        let Some(at) = at else {
            return self.add(core, list, selector, rule, &places).map(|()| None);
        };
        let before = rule_of(&places[at].record, list);
        if before != rule {
            self.change(core, list, selector, rule, &places, at)?;
        }
        Ok(Some(before))
    }

    fn add(&mut self, core: &StageCore, list: usize, selector: Selector, rule: Rule, places: &[Place]) -> Result<()> {
        if self.lists[list].rules >= self.capacity as usize {
            return Err(self.full(core, &selector));
        }
        if places.len() >= RULES_PER_PREFIX {
            return Err(Error::TooManyRules { selector: selector.to_string(), limit: RULES_PER_PREFIX });
        }
        let at = places.partition_point(|place| place.selector().rank() < selector.rank());
        let plain = rule.is_plain(&selector);
        if !plain {
            self.check_depth(list, &selector, 1)?;
        }
        let id = self.take_id(core, list, RECORD | COUNTER, &selector)?;
        let mut record = encode(&selector, &rule, id);
        record.flags |= flags_in(list, &selector, &rule);
        if !plain {
            record.next = self.leaf_behind(list, &selector, places, at);
        }
        self.records.write(id, &record);
        let place = Place { leaf: leaf(id, &selector, &rule), record };
        if let Err(error) = self.publish(core, list, &selector, places, at, place.leaf) {
            self.give_back(list, &place);
            return Err(error);
        }
        if at == places.len() {
            self.lists[list].set_open(selector.source(), !plain);
        }
        self.lists[list].rules += 1;
        Ok(())
    }

    fn change(
        &mut self,
        core: &StageCore,
        list: usize,
        selector: Selector,
        rule: Rule,
        places: &[Place],
        at: usize,
    ) -> Result<()> {
        let old = places[at];
        let (was_plain, plain) = (ends(old.leaf), rule.is_plain(&selector));
        if was_plain && !plain {
            self.check_depth(
                list,
                &selector,
                1 + self.records_from(self.lists[list].covering_leaf(selector.source())),
            )?;
        }
        let counter = old.counter();
        // A plain rule's record is not read by programs, so one that is the counter's too can stay.
        let stays = plain && old.id() == counter;
        let id = match (plain, stays) {
            (_, true) => counter,
            (true, false) => {
                if !self.ids.has_free_record(counter) {
                    self.wait(core)?;
                }
                self.ids.add(counter, list, RECORD);
                counter
            }
            (false, _) => self.take_id(core, list, RECORD, &selector)?,
        };
        let mut record = encode(&selector, &rule, counter);
        record.flags |= flags_in(list, &selector, &rule);
        record.next = if plain { 0 } else { self.leaf_behind(list, &selector, places, at + 1) };
        if !stays {
            self.records.write(id, &record);
        }
        let new = leaf(id, &selector, &rule);
        if let Err(error) = self.publish(core, list, &selector, places, at, new) {
            if !stays {
                self.give_record_back(list, id);
            }
            return Err(error);
        }
        if stays {
            let flags = self.records.flags(id) & !list_flags(list);
            self.records.set_flags(id, flags | flags_in(list, &selector, &rule));
        } else {
            self.give_record_back(list, old.id());
        }
        if at + 1 == places.len() {
            self.lists[list].set_open(selector.source(), !plain);
        }
        Ok(())
    }

    pub(in crate::firewall) fn remove(&mut self, core: &StageCore, selector: &Selector) -> Result<Option<Rule>> {
        let list = self.editable(core)?;
        let places = self.places(list, selector.source());
        let Some(at) = places.iter().position(|place| place.selector() == *selector) else { return Ok(None) };
        let old = places[at];
        if ends(old.leaf) && at > 0 {
            // The rules before it fall through from now on.
            let more = self.records_from(self.lists[list].covering_leaf(selector.source()));
            self.check_depth(list, selector, more)?;
        }
        let alone = places.len() == 1;
        let next = if alone { 0 } else { self.leaf_behind(list, selector, &places, at + 1) };
        self.publish(core, list, selector, &places, at, next)?;
        if at + 1 == places.len() {
            self.lists[list].set_open(selector.source(), !alone);
        }
        self.give_back(list, &old);
        self.lists[list].rules -= 1;
        Ok(Some(rule_of(&old.record, list)))
    }

    /// Where a packet goes on from the rule before position `at`.
    fn leaf_behind(&self, list: usize, selector: &Selector, places: &[Place], at: usize) -> u32 {
        places.get(at).map_or_else(|| self.lists[list].covering_leaf(selector.source()), |place| place.leaf)
    }

    /// Lets what led to position `at` of a prefix lead to `leaf`: one word for the packets of that prefix, and one
    /// for each longer prefix that falls through to it. 0: the prefix has no rule any more.
    fn publish(
        &mut self,
        core: &StageCore,
        list: usize,
        selector: &Selector,
        places: &[Place],
        at: usize,
        leaf: u32,
    ) -> Result<()> {
        let prefix = selector.source();
        if at > 0 {
            self.records.set_next(places[at - 1].id(), leaf);
            return Ok(());
        }
        let covering = self.lists[list].covering_leaf(prefix);
        self.with_index(core, |index, records| match leaf {
            0 => index.remove(core, records, list, prefix, covering),
            leaf => index.set(core, records, list, prefix, leaf),
        })?;
        let new = self.lists[list].leaf(prefix) == 0;
        let inner: Vec<_> = if new { Vec::new() } else { self.falling_to(list, selector) };
        self.lists[list].set_leaf(prefix, leaf);
        // A new prefix catches those that fell through to its covering one.
        let inner = if new { self.falling_to(list, selector) } else { inner };
        let target = if leaf == 0 { covering } else { leaf };
        for last in inner {
            self.records.set_next(last, target);
        }
        Ok(())
    }

    /// The last records of the open prefixes that fall through to this one.
    fn falling_to(&self, list: usize, selector: &Selector) -> Vec<u32> {
        let prefix = selector.source();
        let to_here = |inner: &_| self.lists[list].covering(*inner).is_some_and(|(covering, _)| covering == prefix);
        let inner = self.lists[list].open_inside(prefix).filter(to_here);
        inner.filter_map(|inner| self.places(list, inner).last().map(Place::id)).collect()
    }

    /// Refuses what would let a packet from this prefix, or from one that falls through to it, ask `more` records
    /// than before and too many.
    fn check_depth(&self, list: usize, selector: &Selector, more: usize) -> Result<()> {
        let prefix = selector.source();
        let lists = &self.lists[list];
        let own = if lists.leaf(prefix) == 0 { lists.covering_leaf(prefix) } else { lists.leaf(prefix) };
        let inner = lists.open_inside(prefix).map(|inner| lists.leaf(inner));
        let deepest = std::iter::once(own).chain(inner).map(|leaf| self.records_from(leaf)).max();
        if deepest.unwrap_or(0) + more > RULES_ASKED {
            return Err(Error::TooManyRules { selector: selector.to_string(), limit: RULES_ASKED });
        }
        Ok(())
    }
}
