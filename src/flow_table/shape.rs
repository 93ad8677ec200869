//! How many lines a table has, and which of them a key may be in.

use super::WAYS;

/// One stash line for so many others. In a table that is half full with fresh entries, one key in 7,000 finds both
/// its lines taken; see `tests.rs`.
const LINES_A_STASH_LINE: u32 = 32;
const STASH_MIN: u32 = 16;

/// Sizes of a table, in lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Those that a key has two of.
    pub(crate) lines: u32,
    /// Those behind them.
    pub(crate) stash: u32,
}

impl Shape {
    /// The most flows that a capacity may be stated in.
    pub(crate) const CAPACITY_MAX: u32 = 1 << 28;

    /// For a capacity in flows, at most [`Shape::CAPACITY_MAX`]: a way for each, and the stash.
    pub(crate) fn of_capacity(flows: u32) -> Self {
        let lines = flows.min(Self::CAPACITY_MAX).div_ceil(WAYS as u32).max(4);
        Self { lines, stash: (lines / LINES_A_STASH_LINE).max(STASH_MIN) }
    }

    /// The capacity in flows that it was made for, rounded up to whole lines.
    pub(crate) fn capacity(self) -> u32 {
        self.lines * WAYS as u32
    }

    /// The capacity in flows of a table of so many lines in all.
    pub(crate) fn capacity_of(total: u32) -> u32 {
        let stash = (total / (LINES_A_STASH_LINE + 1)).max(STASH_MIN);
        total.saturating_sub(stash) * WAYS as u32
    }

    /// Lines in all: entries of the map of lines.
    pub(crate) fn total(self) -> u32 {
        self.lines + self.stash
    }

    /// Ways in all: what an array beside the table, by slot, needs.
    pub(crate) fn slots(self) -> u32 {
        self.total() * WAYS as u32
    }

    /// As `flow_line_at`.
    pub(super) fn line_at(self, key: u64, candidate: u32) -> u32 {
        let scaled = |half: u64, lines: u32| (((half & 0xffff_ffff) * u64::from(lines)) >> 32) as u32;
        match candidate {
            0 => scaled(key >> 32, self.lines),
            1 => scaled(key, self.lines),
            _ => self.lines + scaled(key >> 16, self.stash),
        }
    }
}
