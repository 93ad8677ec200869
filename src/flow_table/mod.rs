//! The flow table: entries of a 64-bit key and a state in mapped cache lines, which BPF programs change at the same
//! time. `bpf/include/flow_table.h` has the other side, and says how entries change hands.
//!
//! A function states its capacity in flows. Up to half of it, nothing is refused and nothing fresh goes; beyond, more
//! and more keys find all the ways taken that they may stand in.

mod entry;
#[cfg(test)]
mod kernel_tests;
mod key;
mod shape;
#[cfg(test)]
mod tests;

use std::{
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::Duration,
};

use entry::{BEATEN, CLAIMED, FREE, GENERATION, HEALED, KEY_GONE, MARK_WAY};
pub(crate) use entry::{Entry, Inserted, VALUE_MASK, live_word, value_of};
pub(crate) use key::{KEY_MIN, SECRET_WORDS, Secret};
pub(crate) use shape::Shape;

/// Ways in a line.
pub(crate) const WAYS: usize = 4;
/// Words in a line: keys, then states.
pub(crate) const LINE_WORDS: usize = 2 * WAYS;
/// Where `stashed` stands in the header, in 64-bit words; its low half.
const STASHED_AT: usize = 1;
/// Words of the header: two with sizes, then the secret.
pub(crate) const HEADER_WORDS: usize = 2 + SECRET_WORDS;

/// What a rank says of an entry that has to stay.
pub(crate) const KEEP: u64 = 0;
/// From here on, a rank says that the entry is as good as gone.
pub(crate) const STALE: u64 = 1 << 63;

/// A table in mapped memory: its lines, and its header.
#[derive(Debug)]
pub(crate) struct FlowTable<M> {
    lines: M,
    header: M,
    shape: Shape,
    secret: Secret,
}

impl<M: AsRef<[AtomicU64]>> FlowTable<M> {
    /// A new table over zeroed memory that no program reads yet.
    pub(crate) fn create(lines: M, header: M, shape: Shape, secret: Secret) -> Self {
        let words = header.as_ref();
        words[0].store(u64::from(shape.lines) | u64::from(shape.stash) << 32, Ordering::Relaxed);
        for (word, secret) in words[2..].iter().zip(secret.words()) {
            word.store(secret, Ordering::Relaxed);
        }
        Self { lines, header, shape, secret }
    }

    /// One that was created before; `None` when that is not what the memory holds.
    pub(crate) fn open(lines: M, header: M) -> Option<Self> {
        let words = header.as_ref();
        let sizes = words[0].load(Ordering::Relaxed);
        let shape = Shape { lines: sizes as u32, stash: (sizes >> 32) as u32 };
        if shape.lines == 0 || shape.stash == 0 || lines.as_ref().len() != shape.total() as usize * LINE_WORDS {
            return None;
        }
        let secret = Secret::of_words(std::array::from_fn(|at| words[2 + at].load(Ordering::Relaxed)))?;
        Some(Self { lines, header, shape, secret })
    }

    pub(crate) fn secret(&self) -> &Secret {
        &self.secret
    }

    pub(crate) fn shape(&self) -> Shape {
        self.shape
    }

    /// The entry of a key.
    pub(crate) fn get(&self, key: u64) -> Option<Entry> {
        self.candidates(key).find(|slot| self.key_at(*slot).load(Ordering::Acquire) == key).and_then(|slot| {
            // The common case is one way; a claim beside it is rare.
            self.read(slot)
                .filter(|entry| entry.key == key)
                .or_else(|| self.candidates(key).find_map(|slot| self.read(slot).filter(|entry| entry.key == key)))
        })
    }

    /// All entries that stay where they are meanwhile. Others may be among them.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Entry> + '_ {
        (0..self.shape.slots()).filter_map(|slot| self.read(slot))
    }

    /// Entries, as [`FlowTable::iter`] counts them: reads the whole table.
    pub(crate) fn len(&self) -> usize {
        self.iter().count()
    }

    /// Gives an entry another value, unless it was changed since it was read.
    pub(crate) fn update(&self, entry: &Entry, value: u64) -> bool {
        self.swap(entry.slot, entry.word, live_word(value, entry.word)).is_ok()
    }

    /// Removes an entry, unless it was changed since it was read.
    pub(crate) fn remove(&self, entry: &Entry) -> bool {
        let generation = entry.word & GENERATION;
        if self.swap(entry.slot, entry.word, CLAIMED | generation).is_err() {
            return false;
        }
        self.give_back(entry.slot, generation);
        true
    }

    /// Sets the value of a key: of a new entry, or of the one that there is. `gone` is told key and value of what had to
    /// go, which may happen whatever the answer is: another CPU may come first after all.
    pub(crate) fn insert(
        &self,
        key: u64,
        value: u64,
        rank: impl Fn(u64) -> u64,
        mut gone: impl FnMut(u64, u64),
    ) -> Inserted {
        loop {
            if let Some(entry) = self.get(key) {
                if self.update(&entry, value) {
                    return Inserted::Changed(entry.value());
                }
                continue;
            }
            let Some((at, slot, word)) = self.room_for(key, &rank) else { return Inserted::Full };
            let generation = word & GENERATION;
            if self.swap(slot, word, CLAIMED | generation).is_err() {
                continue;
            }
            if entry::is_live(word) {
                gone(self.key_at(slot).load(Ordering::Relaxed), value_of(word));
            }
            self.tell_where(key, at);
            self.key_at(slot).swap(key, Ordering::SeqCst);
            if self.settle(key, at, slot)
                && self.swap(slot, CLAIMED | generation, live_word(value, generation + 1)).is_ok()
            {
                return Inserted::New;
            }
            self.give_back(slot, generation);
            thread::yield_now();
        }
    }

    /// Frees what a process that died was writing. Programs do not die, and take no longer than this waits.
    pub(crate) fn heal(&self) {
        let claimed = |slot: &u32| !entry::is_live(self.state(*slot)) && self.state(*slot) & !GENERATION != FREE;
        let seen: Vec<_> = (0..self.shape.slots()).filter(claimed).map(|slot| (slot, self.state(slot))).collect();
        if seen.is_empty() {
            return;
        }
        thread::sleep(Duration::from_millis(20));
        for (slot, word) in seen {
            // Under a state that nobody leaves behind: no other process heals the same way.
            if self.swap(slot, word, HEALED | word & GENERATION).is_ok() {
                self.give_back(slot, word & GENERATION);
            }
        }
    }

    /// Where a key may be, in search order, by way.
    fn candidates(&self, key: u64) -> impl Iterator<Item = u32> + '_ {
        let lines = if self.header.as_ref()[STASHED_AT].load(Ordering::Acquire) as u32 != 0 { 3 } else { 2 };
        (0..lines * WAYS as u32).map(move |at| self.slot_at(key, at))
    }

    fn slot_at(&self, key: u64, at: u32) -> u32 {
        self.shape.line_at(key, at / WAYS as u32) * WAYS as u32 + at % WAYS as u32
    }

    fn key_at(&self, slot: u32) -> &AtomicU64 {
        let slot = slot as usize;
        &self.lines.as_ref()[slot / WAYS * LINE_WORDS + slot % WAYS]
    }

    fn state_at(&self, slot: u32) -> &AtomicU64 {
        let slot = slot as usize;
        &self.lines.as_ref()[slot / WAYS * LINE_WORDS + WAYS + slot % WAYS]
    }

    fn state(&self, slot: u32) -> u64 {
        self.state_at(slot).load(Ordering::Acquire)
    }

    fn swap(&self, slot: u32, from: u64, to: u64) -> Result<u64, u64> {
        self.state_at(slot).compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst)
    }

    /// A live entry, whole.
    fn read(&self, slot: u32) -> Option<Entry> {
        loop {
            let key = self.key_at(slot).load(Ordering::Acquire);
            let word = self.state(slot);
            if !entry::is_live(word) {
                return None;
            }
            if self.key_at(slot).load(Ordering::Acquire) == key {
                return Some(Entry { slot, key, word });
            }
        }
    }

    fn give_back(&self, slot: u32, generation: u64) {
        self.key_at(slot).swap(KEY_GONE, Ordering::SeqCst);
        self.state_at(slot).swap(FREE | generation, Ordering::SeqCst);
    }

    /// The way that a new entry takes: its place in search order, its slot, its state.
    fn room_for(&self, key: u64, rank: impl Fn(u64) -> u64) -> Option<(u32, u32, u64)> {
        let survey = |candidate: u32| {
            let mut room = 0;
            let mut best: Option<(u64, u32, u32, u64)> = None;
            for at in candidate * WAYS as u32..(candidate + 1) * WAYS as u32 {
                let slot = self.slot_at(key, at);
                let word = self.state(slot);
                let found = entry::rank_of(word, &rank) & !3;
                room += u32::from(found >= STALE);
                if found != KEEP && best.is_none_or(|(best, ..)| found > best) {
                    best = Some((found, at, slot, word));
                }
            }
            (room, best)
        };
        let (first, second) = (survey(0), survey(1));
        let rank_in = |best: &Option<(u64, u32, u32, u64)>| best.map_or(KEEP, |(rank, ..)| rank);
        let best = match (first.0, second.0) {
            (0, 0) => {
                let (room, stash) = survey(2);
                match room {
                    0 if rank_in(&second.1) > rank_in(&first.1) => second.1,
                    0 => first.1,
                    _ => stash,
                }
            }
            (0 | 1, more) if more > first.0 => second.1,
            _ => first.1,
        };
        best.map(|(_, at, slot, word)| (at, slot, word))
    }

    /// Lets those who look for a key know that it may be elsewhere than in its first line.
    fn tell_where(&self, key: u64, at: u32) {
        let mark = |candidate: u32| {
            let word = self.key_at(self.slot_at(key, candidate * WAYS as u32 + MARK_WAY));
            let _ = word.compare_exchange(0, KEY_GONE, Ordering::SeqCst, Ordering::SeqCst);
        };
        if at >= WAYS as u32 {
            mark(0);
        }
        if at >= 2 * WAYS as u32 {
            mark(1);
            self.header.as_ref()[STASHED_AT].fetch_or(1, Ordering::SeqCst);
        }
    }

    /// Whether a claimed way with this key, `own` in search order, may go live.
    fn settle(&self, key: u64, own: u32, slot: u32) -> bool {
        (0..3 * WAYS as u32).all(|at| {
            let other = self.slot_at(key, at);
            if other == slot || self.key_at(other).load(Ordering::SeqCst) != key {
                return true;
            }
            let mut word = self.state(other);
            if word & !GENERATION == CLAIMED {
                if at < own {
                    return false;
                }
                match self.swap(other, word, BEATEN | word & GENERATION) {
                    Ok(_) => return true,
                    Err(now) => word = now,
                }
            }
            !(entry::is_live(word) && self.key_at(other).load(Ordering::Acquire) == key)
        })
    }
}
