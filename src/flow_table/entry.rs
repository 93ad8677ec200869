//! State words, and what is read of an entry: mirror of `bpf/abi/flow_table.h`.

use super::KEEP;

pub(super) const KEY_GONE: u64 = 1;
pub(super) const MARK_WAY: u32 = 2;

const LIVE: u64 = 1 << 63;
pub(super) const GENERATION: u64 = 7;
const VALUE_SHIFT: u32 = 3;
/// What a function may keep in a state.
pub(crate) const VALUE_MASK: u64 = (1 << 60) - 1;

pub(super) const FREE: u64 = 0;
pub(super) const CLAIMED: u64 = 1 << VALUE_SHIFT;
pub(super) const BEATEN: u64 = 2 << VALUE_SHIFT;
/// Only `FlowTable::heal` knows it.
pub(super) const HEALED: u64 = 3 << VALUE_SHIFT;

pub(super) fn is_live(word: u64) -> bool {
    word & LIVE != 0
}

/// The function's bits of a state word.
pub(crate) fn value_of(word: u64) -> u64 {
    word >> VALUE_SHIFT & VALUE_MASK
}

/// The state word of a live entry; only the lowest bits of `generation` count.
pub(crate) fn live_word(value: u64, generation: u64) -> u64 {
    LIVE | (value & VALUE_MASK) << VALUE_SHIFT | generation & GENERATION
}

/// Free above all, claimed below all.
pub(super) fn rank_of(word: u64, rank: impl Fn(u64) -> u64) -> u64 {
    match word & !GENERATION {
        FREE => u64::MAX,
        _ if is_live(word) => rank(value_of(word)),
        _ => KEEP,
    }
}

/// An entry as it was at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) slot: u32,
    pub(crate) key: u64,
    pub(super) word: u64,
}

impl Entry {
    pub(crate) fn value(&self) -> u64 {
        value_of(self.word)
    }
}

/// What an insertion did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Inserted {
    /// There is a new entry.
    New,
    /// The entry had this value before.
    Changed(u64),
    /// Every way must be kept.
    Full,
}
