//! A node's bytes: 256 slots, flat or compressed. The mirror of `bpf/layout/lpm_table.h`.

use std::sync::atomic::{AtomicU32, Ordering};

use super::{Error, LINE_WORDS, Prefix, lines::Block};

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

/// Where a path is.
pub(super) fn path_block(word: u32) -> Block {
    Block { line: word & LINE_MASK, order: Shape::Path.order() }
}

/// The byte of an address that no node decides by, because there is none left.
pub(super) fn end_of<P: Prefix>() -> usize {
    2 + P::STEPS
}

impl Path {
    /// The byte behind a path that starts with byte `at`, if a path may be there.
    pub(super) fn end<P: Prefix>(&self, at: usize) -> Option<usize> {
        let end = at + self.count;
        let across = at < 8 && end > 8;
        (P::PATHS && end <= end_of::<P>() && !across).then_some(end)
    }

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

/// A node that is no path, or a leaf. What the words here are later is another matter: others may write them, too.
pub(super) struct Node {
    /// Of a leaf: that leaf.
    pub(super) slots: Slots,
    home: Home,
}

/// Where a node's words are.
#[derive(Clone, Copy)]
enum Home {
    Nowhere,
    Flat {
        line: u32,
    },
    /// With the slots that runs start at.
    Compressed {
        line: u32,
        starts: [u64; 4],
    },
}

impl Node {
    /// A node that is in no memory.
    pub(super) fn of(slots: Slots) -> Self {
        Self { slots, home: Home::Nowhere }
    }

    fn shape(&self) -> Option<Shape> {
        match self.home {
            Home::Nowhere => None,
            Home::Flat { .. } => Some(Shape::Flat),
            Home::Compressed { starts, .. } => Some(Shape::Compressed { runs: runs_in(&starts) }),
        }
    }

    pub(super) fn block(&self) -> Option<Block> {
        let order = self.shape()?.order();
        match self.home {
            Home::Nowhere => None,
            Home::Flat { line } | Home::Compressed { line, .. } => Some(Block { line, order }),
        }
    }

    pub(super) fn is_flat(&self) -> bool {
        matches!(self.home, Home::Flat { .. })
    }

    /// Where the word of a slot is, unless that is the word of the slot before too.
    pub(super) fn own_word(&self, slot: usize) -> Option<usize> {
        match self.home {
            Home::Nowhere => None,
            Home::Flat { line } => Some(Words::flat_at(line, slot)),
            Home::Compressed { line, starts } => {
                let (group, bit) = (slot / 64, slot % 64);
                let before = runs_in(&starts[..group]) + (starts[group] & ((1 << bit) - 1)).count_ones() as usize;
                (starts[group] >> bit & 1 == 1).then(|| Words::start(line) + RUNS_AT + before)
            }
        }
    }
}

fn runs_in(starts: &[u64]) -> usize {
    starts.iter().map(|group| group.count_ones() as usize).sum()
}

/// The words of a table, read and written one at a time while packets read them.
///
/// Nothing that stands in them is believed: who else writes to the memory is not known here.
#[derive(Clone, Copy)]
pub(super) struct Words<'a>(pub(super) &'a [AtomicU32]);

impl Words<'_> {
    /// Nothing is beyond the memory, as for a program.
    pub(super) fn load(self, at: usize) -> u32 {
        self.0.get(at).map_or(0, |word| word.load(Ordering::Relaxed))
    }

    /// What was written before is there for whoever finds it by this word.
    pub(super) fn store(self, at: usize, word: u32) {
        if let Some(to) = self.0.get(at) {
            to.store(word, Ordering::Release);
        }
    }

    fn start(node: u32) -> usize {
        (node & LINE_MASK) as usize * LINE_WORDS
    }

    /// Where a flat node, or a root, keeps the word of a slot.
    pub(super) fn flat_at(node: u32, slot: usize) -> usize {
        Self::start(node) + slot
    }

    /// So many words from the start of a node on, if all of them are there.
    fn some<const COUNT: usize>(self, node: u32) -> Result<[u32; COUNT], Error> {
        let start = Self::start(node);
        let words = self.0.get(start..start + COUNT).ok_or(Error::Corrupt(node & LINE_MASK))?;
        Ok(std::array::from_fn(|at| words[at].load(Ordering::Relaxed)))
    }

    /// What a node says to an address of which byte `at` is next, and how many bytes that took.
    pub(super) fn step(self, word: u32, octets: &[u8; 16], at: usize) -> Result<(u32, usize), Error> {
        let bytes = octets.get(at..).ok_or(Error::Corrupt(word & LINE_MASK))?;
        if is_path(word) {
            let path = self.path(word)?;
            let bytes = bytes.get(..path.count).ok_or(Error::Corrupt(word & LINE_MASK))?;
            let found = bytes.iter().enumerate().all(|(step, byte)| *byte == path.byte(step));
            return Ok((if found { path.next } else { path.other }, path.count));
        }
        let byte = *bytes.first().ok_or(Error::Corrupt(word & LINE_MASK))?;
        Ok((self.node(word)?.slots[usize::from(byte)], 1))
    }

    pub(super) fn path(self, node: u32) -> Result<Path, Error> {
        let [low, high, count, next, other] = self.some(node)?;
        if !(1..=8).contains(&count) || is_node(other) {
            return Err(Error::Corrupt(node & LINE_MASK));
        }
        Ok(Path { bytes: u64::from(low) | u64::from(high) << 32, count: count as usize, next, other })
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

    /// Reads a node that is no path, or a leaf.
    pub(super) fn node(self, word: u32) -> Result<Node, Error> {
        if !is_node(word) {
            return Ok(Node::of([word; 256]));
        }
        let line = word & LINE_MASK;
        if is_path(word) {
            return Err(Error::Corrupt(line));
        }
        if is_flat(word) {
            return Ok(Node { slots: self.some(line)?, home: Home::Flat { line } });
        }
        let head: [u32; RUNS_AT] = self.some(line)?;
        let starts: [u64; 4] =
            std::array::from_fn(|group| u64::from(head[2 * group]) | u64::from(head[2 * group + 1]) << 32);
        // A program goes by both, the bits and the counts.
        let counts = (0..4).fold(0, |counts, group| counts | (runs_in(&starts[..group]) as u32 & 0xff) << (8 * group));
        if starts[0] & 1 == 0 || head[COUNTS_AT] != counts || runs_in(&starts) > COMPRESSED_RUNS {
            return Err(Error::Corrupt(line));
        }
        let first = Self::start(line) + RUNS_AT;
        let runs = self.0.get(first..first + runs_in(&starts)).ok_or(Error::Corrupt(line))?;
        let (mut runs, mut slots, mut current) = (runs.iter(), [0; 256], 0);
        for (slot, word) in slots.iter_mut().enumerate() {
            if starts[slot / 64] >> (slot % 64) & 1 == 1 {
                current = runs.next().map_or(0, |run| run.load(Ordering::Relaxed));
            }
            *word = current;
        }
        Ok(Node { slots, home: Home::Compressed { line, starts } })
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
