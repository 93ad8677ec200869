//! Tables that grow while packets flow: a larger set is made beside the one that is pinned, filled from it, and put in its
//! place when packets are to meet it.
//!
//! ```text
//! DIR/stages/NAME     the set in force
//! DIR/stages/NAME+    the one that takes its place, then the one that it has taken the place of, until no packet meets it
//! ```
//!
//! What is large and changes with every packet (buckets, connections, counters of the stage) belongs to both sets. Until the
//! larger set is in its place, the earlier one is untouched: if the adopter ends before, nothing has happened.

use std::{fmt, path::PathBuf, sync::atomic::Ordering};

use super::StageCore;
use crate::{
    Result,
    sys::{
        map::{Map, PerCpu},
        mmap::LongMapping,
    },
};

/// How a map comes into the larger set. Maps that a kind does not list are of both sets.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Carry {
    /// An array of so many equal banks; its entries stay where they are in each.
    Banks(u32),
    /// What CPUs count, see [`Counted`].
    Counted,
    /// Empty: it is built again from records.
    Rebuilt,
    /// As [`Carry::Rebuilt`] when this map grows; else it is of both sets.
    RebuiltWith(&'static str),
}

/// An array whose entries stay where they are.
pub(crate) const COPIED: Carry = Carry::Banks(1);

/// What is to be done when no packet meets the earlier set any more: brings over what was counted there meanwhile.
pub(crate) type Settle = Box<dyn FnOnce(&Sets<'_>) -> Result<()> + Send + Sync>;

/// What a configuration asks for at adoption.
pub(crate) struct Growth<'g> {
    /// Entries by map, as for a new stage.
    pub(crate) wanted: &'g [(&'static str, u32)],
    /// Brings the filled set to its sizes: masks, roots, what is neither copied nor built again from records.
    pub(crate) fit: &'g dyn Fn(&Sets<'_>, &StageCore) -> Result<Vec<Settle>>,
}

/// Maps that were replaced, and those in their places.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sets<'s> {
    pub(super) old: &'s [Map],
    pub(super) new: &'s [Map],
}

impl<'s> Sets<'s> {
    pub(crate) fn smaller(&self, name: &str) -> Option<&'s Map> {
        self.old.iter().find(|map| map.name() == name)
    }

    pub(crate) fn larger(&self, name: &str) -> &'s Map {
        self.new.iter().find(|map| map.name() == name).expect("the skeleton has this map")
    }
}

/// A larger set that is not in its place yet.
pub(crate) struct Grown {
    /// Where the earlier set is pinned.
    pub(crate) directory: PathBuf,
    pub(super) old: Vec<Map>,
    pub(super) settles: Vec<Settle>,
}

impl fmt::Debug for Grown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grown").field("directory", &self.directory).field("old", &self.old).finish_non_exhaustive()
    }
}

impl Grown {
    /// When no packet meets the earlier set any more.
    pub(crate) fn settle(self, new: &[Map]) -> Result<()> {
        let sets = Sets { old: &self.old, new };
        self.settles.into_iter().try_for_each(|settle| settle(&sets))
    }
}

/// Entries that a map has to have in a larger set.
#[derive(Debug)]
pub(super) struct Sizes {
    pub(super) replaced: Vec<&'static str>,
    pub(super) capacities: Vec<(&'static str, u32)>,
}

/// What is to be made anew; `None` where nothing grows, or something of what stays at its place would have to shrink.
pub(super) fn sizes(
    carried: &[&[(&'static str, Carry)]],
    pinned: &[Map],
    wanted: &[(&'static str, u32)],
) -> Option<Sizes> {
    let found = |name: &str| pinned.iter().find(|map| map.name() == name).map_or(0, Map::capacity);
    let asked = |name: &str| wanted.iter().find(|(map, _)| *map == name).map(|(_, entries)| *entries);
    let grows = |name: &str| asked(name).is_some_and(|entries| entries > found(name));
    let all = || carried.iter().copied().flatten().copied();
    if !all().any(|(name, _)| grows(name)) {
        return None;
    }
    let mut sizes = Sizes { replaced: Vec::new(), capacities: Vec::new() };
    for (name, carry) in all() {
        let entries = match carry {
            Carry::Banks(_) | Carry::Counted if asked(name).is_some_and(|asked| asked < found(name)) => return None,
            Carry::Banks(_) | Carry::Counted => Some(asked(name).unwrap_or_else(|| found(name))),
            Carry::RebuiltWith(other) if !grows(other) => continue,
            Carry::Rebuilt | Carry::RebuiltWith(_) => asked(name),
        };
        sizes.replaced.push(name);
        sizes.capacities.extend(entries.map(|entries| (name, entries)));
    }
    Some(sizes)
}

/// Fills a larger set.
pub(super) fn fill(carried: &[&[(&'static str, Carry)]], sets: &Sets<'_>, core: &StageCore) -> Result<Vec<Settle>> {
    let mut settles: Vec<Settle> = Vec::new();
    for (name, carry) in carried.iter().copied().flatten().copied() {
        let Some(old) = sets.smaller(name) else { continue };
        match carry {
            Carry::Banks(banks) => copy(old, sets.larger(name), banks)?,
            Carry::Counted => {
                let counted = Counted::<Words>::of(core, name);
                let before = sums(old)?;
                before.iter().enumerate().try_for_each(|(index, sum)| counted.carry(index as u32, sum))?;
                settles.push(Box::new(move |sets| settle_counts(name, &before, sets)));
            }
            Carry::Rebuilt | Carry::RebuiltWith(_) => {}
        }
    }
    Ok(settles)
}

fn copy(old: &Map, new: &Map, banks: u32) -> Result<()> {
    let (from, to) = (LongMapping::new(old)?, LongMapping::new(new)?);
    let bank = |mapping: &LongMapping| mapping.as_ref().len() / banks as usize;
    let pairs = from.as_ref().chunks_exact(bank(&from)).zip(to.as_ref().chunks_exact(bank(&to)));
    for (from, to) in pairs.flat_map(|(from, to)| from.iter().zip(to)) {
        to.store(from.load(Ordering::Acquire), Ordering::Release);
    }
    Ok(())
}

/// Of a map of counts, whatever they are: all are of 64 bits.
type Words = [u64; 8];

/// What CPUs count, by number: the first half of a map's entries. The second half is what an earlier, smaller map had counted;
/// no program touches it.
#[derive(Debug)]
pub(crate) struct Counted<'m, V> {
    values: PerCpu<'m, V>,
    map: &'m Map,
}

/// Entries of a map that counts for so many.
pub(crate) fn counted_entries(things: u32) -> u32 {
    2 * things
}

impl<'m, V: bytemuck::Pod> Counted<'m, V> {
    pub(crate) fn of(core: &'m StageCore, name: &str) -> Self {
        Self::over(core.map(name))
    }

    fn over(map: &'m Map) -> Self {
        Self { values: PerCpu::new(map), map }
    }

    fn carried_at(&self, index: u32) -> u32 {
        self.map.capacity() / 2 + index
    }

    /// What has been counted, in parts to be summed.
    pub(crate) fn get(&self, index: u32) -> Result<Vec<V>> {
        let mut parts = self.values.get(index)?;
        parts.extend(self.values.get(self.carried_at(index))?);
        Ok(parts)
    }

    /// Begins at zero.
    pub(crate) fn reset(&self, index: u32) -> Result<()> {
        let fail = |error| self.map.error("reset an entry", error);
        self.values.reset(self.carried_at(index)).and_then(|()| self.values.reset(index)).map_err(fail)
    }
}

impl Counted<'_, Words> {
    fn carry(&self, index: u32, sum: &Words) -> Result<()> {
        // A new map has nothing but zeroes.
        if *sum == [0; 8] {
            return Ok(());
        }
        let carried = self.values.set_sum(self.carried_at(index), sum);
        carried.map_err(|error| self.map.error("carry over what was counted", error))
    }

    fn sum(&self, index: u32) -> Result<Words> {
        Ok(add_up(&self.get(index)?))
    }
}

fn add_up(parts: &[Words]) -> Words {
    std::array::from_fn(|at| parts.iter().fold(0, |sum: u64, part| sum.wrapping_add(part[at])))
}

fn sums(map: &Map) -> Result<Vec<Words>> {
    let counted = Counted::<Words>::over(map);
    (0..map.capacity() / 2).map(|index| counted.sum(index)).collect()
}

/// Carries over what was counted since `before`, of what has not begun at zero meanwhile.
fn settle_counts(name: &str, before: &[Words], sets: &Sets<'_>) -> Result<()> {
    let Some(old) = sets.smaller(name) else { return Ok(()) };
    let counted = Counted::<Words>::over(sets.larger(name));
    for (index, (now, before)) in sums(old)?.iter().zip(before).enumerate().filter(|(_, (now, before))| now != before) {
        let carried = add_up(&counted.values.get(counted.carried_at(index as u32))?);
        if carried == *before {
            counted.carry(index as u32, now)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    //! These need root.

    use super::*;
    use crate::{DsrBalancer, DsrConfig, abi::service::BackendCpu, stage::sealed::Sealed as _};

    #[test]
    fn what_was_counted_meanwhile_is_carried_over_unless_the_number_was_given_anew() {
        let stage = |backends| DsrBalancer::load(&DsrConfig::default().backends(backends)).expect("needs root");
        let (small, large) = (stage(4), stage(9));
        let (old, new) = (&small.core().shared.maps, &large.core().shared.maps);
        let (from, to) = (
            Counted::<Words>::of(small.core(), "backend_states"),
            Counted::<Words>::of(large.core(), "backend_states"),
        );
        let count = |index: u32, packets: u64| {
            from.values.set_sum(index, &[packets, 10 * packets, 0, 0, 0, 0, 0, 0]).unwrap();
        };
        (1..=3).for_each(|index| count(index, index.into()));
        let sets = Sets { old, new };
        let kinds: &[(&str, Carry)] = &[("backend_states", Carry::Counted)];
        let settles = fill(&[kinds], &sets, large.core()).unwrap();
        let packets = |index| {
            let cpus = Counted::<BackendCpu>::of(large.core(), "backend_states").get(index).unwrap();
            cpus.iter().map(|cpu| cpu.packets).sum::<u64>()
        };
        assert_eq!([1, 2, 3, 4].map(packets), [1, 2, 3, 0]);
        // Packets still come in by the earlier set, and by the new one; number 3 is another backend's by now.
        [(1, 101), (2, 2), (3, 103), (4, 104)].into_iter().for_each(|(index, packets)| count(index, packets));
        to.values.set_sum(1, &[1000, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        to.reset(3).unwrap();
        settles.into_iter().for_each(|settle| settle(&sets).unwrap());
        assert_eq!([1, 2, 3, 4].map(packets), [1101, 2, 0, 104]);
    }

    #[test]
    fn a_set_grows_where_nothing_shrinks() {
        let balancer = DsrBalancer::load(&DsrConfig::default()).expect("needs root");
        let pinned = &balancer.core().shared.maps;
        let kinds: &[(&str, Carry)] =
            &[("services", COPIED), ("backends", COPIED), ("balancer", COPIED), ("vip_index", Carry::Rebuilt)];
        let asked = |wanted: &[(&'static str, u32)]| sizes(&[kinds], pinned, wanted);
        let (services, backends) = (33, 1025);
        assert!(asked(&[("services", services), ("backends", backends)]).is_none());
        assert!(asked(&[("services", services + 1), ("backends", backends - 1)]).is_none());
        let sizes = asked(&[("services", services + 1), ("backends", backends), ("vip_index", 64)]).unwrap();
        assert_eq!(sizes.replaced, ["services", "backends", "balancer", "vip_index"]);
        assert_eq!(sizes.capacities, [("services", 34), ("backends", 1025), ("balancer", 1), ("vip_index", 64)]);
    }
}
