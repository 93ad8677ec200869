//! Changing whole lists: built aside, put in force by one store; and taking that back.

use std::time::Duration;

use ipnet::IpNet;

use super::{Book, Place, Prefixes, RULES_ASKED, RULES_PER_PREFIX, ends};
use crate::{
    Error, Result,
    base::StageCore,
    firewall::{
        Progress, Rule, Selector,
        ids::{COUNTER, RECORD},
        list::PROGRESS_STEP,
        rule::{encode, flags_in, leaf, list_flags, rule_of},
    },
    sys,
};

/// What [`Firewall::replace_all`](crate::Firewall::replace_all) did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Replaced {
    /// Rules with a selector that the earlier list did not have.
    pub added: usize,
    /// Rules with a selector that the earlier list had with another rule. Their counters go on.
    pub changed: usize,
    /// Rules that stayed the same. Their counters go on.
    pub kept: usize,
    /// Rules of the earlier list whose selector the new one does not have.
    pub removed: usize,
    /// Elements that said what another one said already.
    pub duplicates: usize,
}

impl Book {
    pub(in crate::firewall) fn replace(
        &mut self,
        core: &StageCore,
        rules: Vec<(Selector, Rule)>,
        timeout: Option<Duration>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Replaced> {
        let old = self.editable(core)?;
        self.clear_leftover(core)?;
        let new = old ^ 1;
        let (rules, mut report) = checked(rules)?;
        if let Some((selector, _)) = rules.get(self.capacity as usize) {
            return Err(self.full(core, selector));
        }
        // All of it may wait for a grace period, but the list in force stays as it is until the end.
        let built = self.build_aside(core, old, new, &rules, &mut report, progress);
        let roots = match built {
            Ok(roots) => roots,
            Err(error) => {
                self.give_list_back(new);
                return Err(error);
            }
        };
        report.removed = self.lists[old].rules - report.kept - report.changed;
        self.settings.set_roots(new, roots);
        match timeout {
            None => {
                self.settings.publish(new);
                self.current = new;
                self.drop_list(core, old);
            }
            Some(timeout) => {
                self.settings.publish_until(new, sys::monotonic().saturating_add(timeout));
                self.pending = true;
            }
        }
        Ok(report)
    }

    /// Puts a pending list in force for good.
    pub(in crate::firewall) fn confirm(&mut self, core: &StageCore) -> Result<()> {
        self.finish(core)?;
        let new = self.current ^ 1;
        if !self.pending {
            return Err(Error::NotConfirmed { stage: core.shared.name.clone() });
        }
        self.settings.publish(new);
        (self.pending, self.current) = (false, new);
        self.drop_list(core, new ^ 1);
        Ok(())
    }

    /// Puts the list before a pending one in force again.
    pub(in crate::firewall) fn roll_back(&mut self, core: &StageCore) -> Result<()> {
        if !self.pending {
            return Ok(());
        }
        self.settings.publish(self.current);
        self.pending = false;
        self.drop_list(core, self.current ^ 1);
        Ok(())
    }

    /// When the pending list ends, if there is one.
    pub(in crate::firewall) fn pending_until(&self) -> Option<Duration> {
        (self.in_force() != self.current).then(|| self.deadline())
    }

    fn build_aside(
        &mut self,
        core: &StageCore,
        old: usize,
        new: usize,
        rules: &[(Selector, Rule)],
        report: &mut Replaced,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<[u32; 2]> {
        let (mut next_report, total) = (PROGRESS_STEP, rules.len() as u64);
        self.lists[new] = Prefixes::with_capacity(rules.len());
        let mut leaves: Vec<(IpNet, u32)> = Vec::with_capacity(rules.len());
        for group in rules.chunk_by(|a, b| a.0.source() == b.0.source()) {
            let prefix = group[0].0.source();
            if let Some((selector, _)) = group.get(RULES_PER_PREFIX) {
                return Err(Error::TooManyRules { selector: selector.to_string(), limit: RULES_PER_PREFIX });
            }
            let before = self.places(old, prefix);
            // From the last rule to the first, so that each knows what comes behind it.
            let mut next = 0;
            for (at, (selector, rule)) in group.iter().enumerate().rev() {
                let last = at + 1 == group.len();
                let plain = rule.is_plain(selector);
                if last && !plain {
                    next = self.lists[new].covering_leaf(prefix);
                }
                let same = before.iter().find(|place| place.selector() == *selector);
                match same {
                    None => report.added += 1,
                    Some(place) if rule_of(&place.record, old) == *rule => report.kept += 1,
                    Some(_) => report.changed += 1,
                }
                next = self.put(core, new, selector, rule, same, next)?;
                self.lists[new].rules += 1;
                // What is written so far can be given back by this.
                self.lists[new].set_leaf(prefix, next);
                self.lists[new].set_open(prefix, (last && !plain) || (!last && self.is_open(new, prefix)));
            }
            if !ends(next) && self.records_from(next) > RULES_ASKED {
                let selector = group[0].0.to_string();
                return Err(Error::TooManyRules { selector, limit: RULES_ASKED });
            }
            leaves.push((prefix, next));
            if self.lists[new].rules >= next_report {
                progress(Progress { done: self.lists[new].rules as u64, total });
                next_report = self.lists[new].rules + PROGRESS_STEP;
            }
        }
        progress(Progress { done: total, total });
        self.with_index(core, |index, _| index.build(core, new, &leaves))
    }

    fn is_open(&self, list: usize, prefix: IpNet) -> bool {
        self.lists[list].is_open(prefix)
    }

    /// A rule of a list that is not in force; the leaf that leads to it.
    fn put(
        &mut self,
        core: &StageCore,
        list: usize,
        selector: &Selector,
        rule: &Rule,
        same: Option<&Place>,
        next: u32,
    ) -> Result<u32> {
        let plain = rule.is_plain(selector);
        let counter = same.map(Place::counter);
        let id = match counter {
            // Programs do not read a plain rule's record: it may be one that the other list uses.
            Some(counter) if plain && same.is_some_and(|place| place.id() == counter) => {
                self.ids.add(counter, list, RECORD | COUNTER);
                let flags = self.records.flags(counter) & !list_flags(list);
                self.records.set_flags(counter, flags | flags_in(list, selector, rule));
                return Ok(leaf(counter, selector, rule));
            }
            Some(counter) if plain => {
                if !self.ids.has_free_record(counter) {
                    self.wait(core)?;
                }
                self.ids.add(counter, list, RECORD);
                counter
            }
            _ => self.take_id(core, list, RECORD, selector)?,
        };
        let counter = counter.unwrap_or(id);
        self.ids.add(counter, list, COUNTER);
        let mut record = encode(selector, rule, counter);
        record.flags |= flags_in(list, selector, rule);
        record.next = if plain { 0 } else { next };
        self.records.write(id, &record);
        Ok(leaf(id, selector, rule))
    }

    /// Lets go of a list that was in force. Should that fail, the list that is in force now is none the worse: what is
    /// left is done, or complained of, when the room is needed.
    fn drop_list(&mut self, core: &StageCore, list: usize) {
        let prefixes = self.give_list_back(list);
        self.index.retire(list);
        self.leftover = Some((list, prefixes));
        let _ = self.clear_leftover(core);
    }

    /// Empties the list that was dropped last, when no packet can be in it any more.
    fn clear_leftover(&mut self, core: &StageCore) -> Result<()> {
        let Some((list, prefixes)) = self.leftover.take() else { return Ok(()) };
        let cleared = self.wait(core).and_then(|()| {
            // The room that it had goes to others now.
            self.settings.set_roots(list, [0; 2]);
            let prefixes = prefixes.iter().map(|(prefix, _)| prefix);
            self.index.clear(core, list, prefixes).map_err(super::Refusal::into_error)
        });
        if cleared.is_err() {
            self.leftover = Some((list, prefixes));
        }
        cleared
    }

    /// Forgets a list and marks its records and counters as free after the next grace period.
    fn give_list_back(&mut self, list: usize) -> Prefixes {
        let prefixes: Vec<IpNet> = self.lists[list].iter().map(|(prefix, _)| prefix).collect();
        for prefix in prefixes {
            for place in self.places(list, prefix) {
                self.give_back(list, &place);
            }
        }
        std::mem::take(&mut self.lists[list])
    }
}

/// The rules in order, each once.
fn checked(mut rules: Vec<(Selector, Rule)>) -> Result<(Vec<(Selector, Rule)>, Replaced)> {
    rules.sort_by(|(a, _), (b, _)| a.source().cmp(&b.source()).then_with(|| a.rank().cmp(&b.rank())));
    let twice = rules.windows(2).find(|pair| pair[0].0 == pair[1].0 && pair[0].1 != pair[1].1);
    if let Some([(selector, first), (_, second)]) = twice {
        return Err(Error::Conflict {
            selector: selector.to_string(),
            first: first.to_string(),
            second: second.to_string(),
        });
    }
    let elements = rules.len();
    rules.dedup_by_key(|(selector, _)| *selector);
    let report = Replaced { duplicates: elements - rules.len(), ..Replaced::default() };
    Ok((rules, report))
}
