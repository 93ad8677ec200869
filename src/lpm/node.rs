//! A node's bytes: 256 slots, flat or compressed. The mirror of `bpf/layout/lpm_table.h`.

use std::sync::atomic::{AtomicU32, Ordering};

use super::{LINE_WORDS, lines::Block};

pub(super) const NODE: u32 = 1 << 31;
pub(super) const COMPRESSED: u32 = 1 << 30;
pub(super) const PATH: u32 = 1 << 29;
pub(super) const LINE_MASK: u32 = PATH - 1;

const COUNTS_AT: usize = 8;
const RUNS_AT: usize = 9;
const FLAT_ORDER: u8 = 4;
/// More runs make a node flat: half its size is the most that a compressed one may have. Small is fast: what a
/// second line of a node costs is less than what it saves the caches.
pub(super) const COMPRESSED_RUNS: usize = 119;

const PATH_COUNT_AT: usize = 2;
const PATH_NEXT_AT: usize = 3;
const PATH_OTHER_AT: usize = 4;

/// What the slots of a node say.
pub(super) type Slots = [u32; 256];

pub(super) fn is_node(word: u32) -> bool {
    word & NODE != 0
}

pub(super) fn is_path(word: u32) -> bool {
    word & (NODE | PATH) == NODE | PATH
}

fn is_flat(node: u32) -> bool {
    node & (COMPRESSED | PATH) == 0
}

/// Several steps in one line: where an address has exactly these bytes it goes on, for all others one leaf decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Path {
    /// From the highest byte down; zeroes behind.
    pub(super) bytes: u64,
    /// How many bytes.
    pub(super) count: usize,
    pub(super) next: u32,
    pub(super) other: u32,
}

/// Whether byte `at` of an address starts one of its halves: C holds one at a time, so no path leads across.
fn starts_half(at: usize) -> bool {
    at.is_multiple_of(8)
}

impl Path {
    /// One step, if all slots but one hold the same leaf.
    pub(super) fn of(slots: &Slots) -> Option<Self> {
        let other = if slots[0] == slots[1] { slots[0] } else { slots[2] };
        let mut ways = (0..slots.len()).filter(|slot| slots[*slot] != other);
        match (ways.next(), ways.next()) {
            (Some(slot), None) if !is_node(other) => {
                Some(Self { bytes: (slot as u64) << 56, count: 1, next: slots[slot], other })
            }
            _ => None,
        }
    }

    pub(super) fn byte(&self, step: usize) -> u8 {
        self.bytes.to_be_bytes()[step]
    }

    /// The first `count` steps, to go on with `next`.
    pub(super) fn head(&self, count: usize, next: u32) -> Self {
        Self { bytes: self.bytes & !(u64::MAX >> (8 * count)), count, next, ..*self }
    }

    /// What is behind the first steps; at least one is.
    pub(super) fn tail(&self, steps: usize) -> Self {
        Self { bytes: self.bytes << (8 * steps), count: self.count - steps, ..*self }
    }

    /// Both as one; `at` is the byte that the second one starts with.
    pub(super) fn joined(&self, second: &Self, at: usize) -> Option<Self> {
        let fits = self.other == second.other && !starts_half(at);
        let bytes = self.bytes | second.bytes >> (8 * self.count);
        fits.then(|| Self { bytes, count: self.count + second.count, ..*second })
    }
}

/// Runs of slots with equal words.
pub(super) fn runs_of(slots: &Slots) -> usize {
    1 + slots.windows(2).filter(|pair| pair[0] != pair[1]).count()
}

/// How a node is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    Flat,
    Compressed { runs: usize },
    Path,
}

impl Shape {
    /// For a node of so many runs.
    pub(super) fn of(runs: usize) -> Self {
        if runs > COMPRESSED_RUNS { Self::Flat } else { Self::Compressed { runs } }
    }

    /// The power of two of its lines.
    pub(super) fn order(self) -> u8 {
        match self {
            Self::Flat => FLAT_ORDER,
            Self::Path => 0,
            Self::Compressed { runs } => (RUNS_AT + runs).div_ceil(LINE_WORDS).next_power_of_two().ilog2() as u8,
        }
    }
}

/// The words of a table, read and written one at a time while packets read them.
#[derive(Clone, Copy)]
pub(super) struct Words<'a>(pub(super) &'a [AtomicU32]);

impl Words<'_> {
    pub(super) fn load(self, at: usize) -> u32 {
        self.0[at].load(Ordering::Relaxed)
    }

    /// What was written before is there for whoever finds it by this word.
    pub(super) fn store(self, at: usize, word: u32) {
        self.0[at].store(word, Ordering::Release);
    }

    fn start(node: u32) -> usize {
        (node & LINE_MASK) as usize * LINE_WORDS
    }

    /// Where a flat node, or a root, keeps the word of a slot.
    pub(super) fn flat_at(node: u32, slot: usize) -> usize {
        Self::start(node) + slot
    }

    fn starts(self, node: u32, group: usize) -> u64 {
        let at = Self::start(node) + 2 * group;
        u64::from(self.load(at)) | u64::from(self.load(at + 1)) << 32
    }

    /// What a node says to an address of which byte `at` is next, and how many bytes that took.
    pub(super) fn step(self, node: u32, octets: &[u8; 16], at: usize) -> (u32, usize) {
        if is_path(node) {
            let path = self.path(node);
            let found = (0..path.count).all(|step| octets[at + step] == path.byte(step));
            return (if found { path.next } else { path.other }, path.count);
        }
        let slot = usize::from(octets[at]);
        let word = if is_flat(node) { Self::flat_at(node, slot) } else { self.run_at(node, slot) };
        (self.load(word), 1)
    }

    pub(super) fn path(self, node: u32) -> Path {
        let start = Self::start(node);
        Path {
            bytes: u64::from(self.load(start)) | u64::from(self.load(start + 1)) << 32,
            count: self.load(start + PATH_COUNT_AT) as usize,
            next: self.load(Self::path_next_at(node)),
            other: self.load(Self::path_other_at(node)),
        }
    }

    pub(super) fn path_next_at(node: u32) -> usize {
        Self::start(node) + PATH_NEXT_AT
    }

    pub(super) fn path_other_at(node: u32) -> usize {
        Self::start(node) + PATH_OTHER_AT
    }

    /// Writes a path into a block of its own; answers the word that leads to it.
    pub(super) fn write_path(self, block: Block, path: &Path) -> u32 {
        let start = block.line as usize * LINE_WORDS;
        let words = [path.bytes as u32, (path.bytes >> 32) as u32, path.count as u32, path.next, path.other];
        words.into_iter().enumerate().for_each(|(at, word)| self.store(start + at, word));
        NODE | PATH | block.line
    }

    fn run_at(self, node: u32, slot: usize) -> usize {
        let group = slot / 64;
        let before = self.load(Self::start(node) + COUNTS_AT) >> (8 * group) & 0xff;
        let run = before + (self.starts(node, group) << (63 - slot % 64)).count_ones() - 1;
        Self::start(node) + RUNS_AT + run as usize
    }

    /// Where a node keeps the word of a slot, unless that is the word of the slot before too.
    pub(super) fn own_word(self, node: u32, slot: usize) -> Option<usize> {
        if is_flat(node) {
            return Some(Self::flat_at(node, slot));
        }
        (self.starts(node, slot / 64) >> (slot % 64) & 1 == 1).then(|| self.run_at(node, slot))
    }

    pub(super) fn shape(self, node: u32) -> Shape {
        if is_path(node) {
            return Shape::Path;
        }
        if is_flat(node) {
            return Shape::Flat;
        }
        Shape::Compressed { runs: (0..4).map(|group| self.starts(node, group).count_ones() as usize).sum() }
    }

    pub(super) fn block(self, node: u32) -> Block {
        Block { line: node & LINE_MASK, order: self.shape(node).order() }
    }

    /// All slots of a node that is no path, or of a leaf: that leaf.
    pub(super) fn expand(self, word: u32) -> Slots {
        let mut slots = [word; 256];
        if !is_node(word) {
            return slots;
        }
        debug_assert!(!is_path(word));
        let start = Self::start(word);
        if is_flat(word) {
            slots.iter_mut().zip(&self.0[start..]).for_each(|(slot, word)| *slot = word.load(Ordering::Relaxed));
            return slots;
        }
        let (mut at, mut current) = (start + RUNS_AT, 0);
        for (group, slots) in slots.chunks_exact_mut(64).enumerate() {
            let starts = self.starts(word, group);
            for (bit, slot) in slots.iter_mut().enumerate() {
                if starts >> bit & 1 == 1 {
                    current = self.load(at);
                    at += 1;
                }
                *slot = current;
            }
        }
        slots
    }

    /// Writes a node into a block of its own; answers the word that leads to it.
    pub(super) fn write(self, block: Block, shape: Shape, slots: &Slots) -> u32 {
        let start = block.line as usize * LINE_WORDS;
        if shape == Shape::Flat {
            slots.iter().enumerate().for_each(|(slot, word)| self.store(start + slot, *word));
            return NODE | block.line;
        }
        let (mut run, mut counts) = (0, 0);
        for group in 0..4 {
            counts |= (run as u32) << (8 * group);
            let mut starts = 0_u64;
            for bit in 0..64 {
                let slot = 64 * group + bit;
                if slot == 0 || slots[slot] != slots[slot - 1] {
                    starts |= 1 << bit;
                    self.store(start + RUNS_AT + run, slots[slot]);
                    run += 1;
                }
            }
            self.store(start + 2 * group, starts as u32);
            self.store(start + 2 * group + 1, (starts >> 32) as u32);
        }
        self.store(start + COUNTS_AT, counts);
        NODE | COMPRESSED | block.line
    }
}
