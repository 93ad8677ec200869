//! The firewall's mapped tables: settings, records of rules, counters.

use std::{
    mem::offset_of,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use crate::{
    Count, Result,
    abi::firewall::{LIST, PENDING, Record, Settings, Uncounted},
    base::{Records, Sets, Settle, StageCore},
    sys::{map::Map, mmap::Mapping},
};

/// Packets and bytes, 64 bits each.
const COUNT_WORDS: usize = 4;
const LOG_WORDS: usize = size_of::<Uncounted>() / 4;

/// The one entry of `settings`.
#[derive(Debug)]
pub(super) struct SettingsView(Records<Settings>);

impl SettingsView {
    pub(super) fn of(core: &StageCore) -> Result<Self> {
        Records::of(core, "settings").map(Self)
    }

    pub(super) fn read(&self) -> Settings {
        self.0.read(0)
    }

    /// Sets the field of 32 bits at this offset.
    pub(super) fn set(&self, offset: usize, word: u32) {
        self.0.set(0, offset, word);
    }

    pub(super) fn set_roots(&self, list: usize, roots: [u32; 2]) {
        for (family, root) in roots.into_iter().enumerate() {
            self.set(offset_of!(Settings, roots) + 8 * list + 4 * family, root);
        }
    }

    /// Puts a list in force.
    pub(super) fn publish(&self, list: usize) {
        self.set(offset_of!(Settings, list), list as u32);
    }

    /// Puts a list in force until a time of `CLOCK_MONOTONIC`.
    pub(super) fn publish_until(&self, list: usize, deadline: Duration) {
        let deadline = u64::try_from(deadline.as_nanos()).unwrap_or(u64::MAX);
        // Nobody looks at the deadline while no list is pending.
        self.set(offset_of!(Settings, deadline), deadline as u32);
        self.set(offset_of!(Settings, deadline) + 4, (deadline >> 32) as u32);
        self.set(offset_of!(Settings, list), list as u32 | PENDING);
    }
}

/// `rules`.
#[derive(Debug)]
pub(super) struct Rules(Records<Record>);

impl Rules {
    pub(super) fn of(core: &StageCore) -> Result<Self> {
        Records::of(core, "rules").map(Self)
    }

    pub(super) fn len(&self) -> u32 {
        self.0.len()
    }

    pub(super) fn read(&self, id: u32) -> Record {
        self.0.read(id)
    }

    /// The record that an event names, if a list holds it: read without the state's lock, and so until it stands still.
    pub(super) fn in_use(&self, id: u32) -> Option<Record> {
        if id == 0 || id >= self.len() {
            return None;
        }
        loop {
            let record = self.read(id);
            if record.flags & (LIST | LIST << 1) == 0 {
                return None;
            }
            if self.read(id) == record {
                return Some(record);
            }
        }
    }

    /// Writes a record that no program reads. Its flags come last: they say that it counts.
    pub(super) fn write(&self, id: u32, record: &Record) {
        self.0.write_with_last(id, record, offset_of!(Record, flags));
    }

    pub(super) fn set_next(&self, id: u32, leaf: u32) {
        self.0.set(id, offset_of!(Record, next), leaf);
    }

    pub(super) fn flags(&self, id: u32) -> u32 {
        self.0.get(id, offset_of!(Record, flags))
    }

    pub(super) fn set_flags(&self, id: u32, flags: u32) {
        self.0.set(id, offset_of!(Record, flags), flags);
    }

    /// Says that a list does not hold a record any more. What the record does there stays: a packet may be reading it.
    pub(super) fn forget(&self, id: u32, list: usize) {
        self.set_flags(id, self.flags(id) & !(LIST << list));
    }

    /// Whether the record was ever written: every rule has a counter.
    pub(super) fn was_used(&self, id: u32) -> bool {
        self.0.get(id, offset_of!(Record, counter)) != 0
    }

    pub(super) fn source_length(&self, id: u32) -> u8 {
        let word = self.0.get(id, offset_of!(Record, source_length) & !3);
        word.to_le_bytes()[offset_of!(Record, source_length) % 4]
    }
}

/// `rule_counts`: for each set of CPUs, a counter a rule, and a last set of what counters had counted for earlier rules;
/// and `uncounted`, what CPUs have yet to add.
#[derive(Debug)]
pub(super) struct Counts {
    words: Mapping,
    uncounted: Mapping,
    rules: usize,
}

impl Counts {
    /// `rules`: counters in a set; 0 when rules are not counted.
    pub(super) fn of(core: &StageCore, rules: u32) -> Result<Self> {
        Self::over(core.map("rule_counts"), core.map("uncounted"), rules)
    }

    fn over(words: &Map, uncounted: &Map, rules: u32) -> Result<Self> {
        Ok(Self { words: Mapping::new(words)?, uncounted: Mapping::new(uncounted)?, rules: rules as usize })
    }

    /// What a rule has counted.
    pub(super) fn read(&self, counter: u32) -> Count {
        let Some((earlier, _)) = self.sets(counter).last() else { return Count::default() };
        let (all, earlier) = (self.counted(counter), count_at(earlier));
        // Each number by itself only grows.
        Count { packets: all.packets.wrapping_sub(earlier.packets), bytes: all.bytes.wrapping_sub(earlier.bytes) }
    }

    /// Begins anew with a counter that no program adds to. Its words are left alone: a CPU may yet have something
    /// for them.
    pub(super) fn reset(&self, counter: u32) {
        self.set_earlier(counter, self.counted(counter));
    }

    fn set_earlier(&self, counter: u32, count: Count) {
        let Some((earlier, _)) = self.sets(counter).last() else { return };
        for (at, number) in [count.packets, count.bytes].into_iter().enumerate() {
            earlier[2 * at].store(number as u32, Ordering::Relaxed);
            earlier[2 * at + 1].store((number >> 32) as u32, Ordering::Relaxed);
        }
    }

    /// What every rule has counted, by counter.
    fn all(&self) -> Vec<Count> {
        (0..self.rules as u32).map(|counter| self.read(counter)).collect()
    }

    /// Has each rule begin with what it had counted elsewhere: what it counts by itself is more than nothing by so much. Of a
    /// rule that `before` is not true of any more, the number has been given to another.
    fn carry(&self, counts: &[Count], before: &[Count]) {
        for (counter, (count, before)) in (0..self.rules as u32).zip(counts.iter().zip(before)) {
            let carried = self.sets(counter).last().map(|(earlier, _)| count_at(earlier));
            if count != before && carried == Some(negative(*before)) {
                self.set_earlier(counter, negative(*count));
            }
        }
    }

    /// A counter's words in each set, with what that set's CPU has yet to add to any.
    fn sets(&self, counter: u32) -> impl Iterator<Item = (&[AtomicU32], Option<&[AtomicU32]>)> {
        let size = (self.rules * COUNT_WORDS).max(1);
        let start = counter as usize * COUNT_WORDS;
        let sets = if self.rules == 0 { &[] } else { self.words.as_ref() };
        let logs = self.uncounted.as_ref().chunks_exact(LOG_WORDS).map(Some).chain([None]);
        let words = sets.chunks_exact(size).map(move |set| &set[start..start + COUNT_WORDS]);
        words.zip(logs)
    }

    fn counted(&self, counter: u32) -> Count {
        let by_cpu = self.sets(counter).filter_map(|(words, log)| Some(counted_by(counter, words, log?)));
        by_cpu.fold(Count::default(), |sum, count| sum + count)
    }
}

fn negative(count: Count) -> Count {
    Count { packets: count.packets.wrapping_neg(), bytes: count.bytes.wrapping_neg() }
}

/// Brings larger tables to their sizes. The index is built again from the records, so there is none yet.
pub(super) fn fit(sets: &Sets<'_>, core: &StageCore, wanted: &Settings) -> Result<Vec<Settle>> {
    let settings = Records::<Settings>::of(core, "settings")?;
    let found = settings.read(0);
    settings.write(0, &Settings { list: found.list, deadline: found.deadline, roots: [[0; 2]; 2], ..*wanted });
    let (Some(words), Some(uncounted)) = (sets.smaller("rule_counts"), sets.smaller("uncounted")) else {
        return Ok(Vec::new());
    };
    let (old, new) = (Counts::over(words, uncounted, found.counters)?, Counts::of(core, wanted.counters)?);
    let before = old.all();
    new.carry(&before, &vec![Count::default(); before.len()]);
    Ok(vec![Box::new(move |_| {
        new.carry(&old.all(), &before);
        Ok(())
    })])
}

/// What a CPU, or some that share a set, has counted.
fn counted_by(counter: u32, words: &[AtomicU32], log: &[AtomicU32]) -> Count {
    let turns = || log[offset_of!(Uncounted, turns) / 4].load(Ordering::Acquire);
    loop {
        let before = turns();
        if before % 2 == 0 {
            let mut sum = count_at(words);
            for entry in log[offset_of!(Uncounted, entry) / 4..].chunks_exact(2) {
                // An entry is there from its upper half on, and is whole then.
                if entry[1].load(Ordering::Acquire) == counter {
                    sum += Count { packets: 1, bytes: entry[0].load(Ordering::Acquire).into() };
                }
            }
            if turns() == before {
                return sum;
            }
        }
        // A CPU adds some dozens of entries, unless the machine under it has other things to do.
        std::thread::yield_now();
    }
}

fn count_at(words: &[AtomicU32]) -> Count {
    let number = |halves: &[AtomicU32]| loop {
        // The program stores all 64 bits at once: the upper half must not have moved between.
        let high = halves[1].load(Ordering::Acquire);
        let low = halves[0].load(Ordering::Acquire);
        if halves[1].load(Ordering::Acquire) == high {
            return u64::from(high) << 32 | u64::from(low);
        }
    };
    Count { packets: number(&words[..2]), bytes: number(&words[2..]) }
}
