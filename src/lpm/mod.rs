//! The compiled longest-prefix-match table: a multibit trie in memory that BPF programs read while it is changed.
//!
//! The first 16 bits of an address pick a slot of the *root*; each further byte picks one of a node's 256 slots. A
//! slot holds a *leaf*, which decides, or leads to the next node. Every slot says what the longest prefix
//! that covers it says, so a look-up only goes down: two steps at most for IPv4 behind the root, 14 for IPv6. A
//! node with many different slots is flat, a word a slot; the others are compressed to a word for each run of equal
//! slots, behind a bitmap. `bpf/layout/lpm_table.h` has the other reader.
//!
//! Nothing that a packet may be reading is reused: freed lines stay in quarantine until the caller has
//! waited for a grace period and says so by [`Table::release`].
//!
//! The memory is shared with other processes, and what one wrote that was at it at the same time, or was killed, is not
//! believed: each node is checked as it is read, and against what is known to be in use. An edit that meets anything else
//! is [`Error::Corrupt`] and changes nothing; [`Table::adopt_what_is_whole`] takes such a table over, to be replaced.

mod adopt;
mod build;
#[cfg(test)]
mod damage_tests;
mod edit;
#[cfg(test)]
mod kernel_tests;
mod lines;
#[cfg(test)]
mod model;
mod node;
#[cfg(test)]
mod tests;

use std::{
    fmt,
    marker::PhantomData,
    net::{Ipv4Addr, Ipv6Addr},
    sync::atomic::AtomicU32,
};

use ipnet::{Ipv4Net, Ipv6Net};
use lines::{Block, Lines};
use node::{Node, Path, Slots, Words};

/// Words in a line, the unit of allocation: a cache line.
pub(crate) const LINE_WORDS: usize = 16;
/// Lines of a root.
pub(crate) const ROOT_LINES: u32 = 1 << ROOT_ORDER;
const ROOT_ORDER: u8 = 12;
const ROOT_SLOTS: usize = 1 << 16;
/// Leaves are below, and 0 says that there is no prefix.
pub(crate) const LEAF_END: u32 = node::NODE;

/// A prefix of one of the two families.
pub(crate) trait Prefix: Copy {
    /// Bytes of an address behind those that the root decides by.
    const STEPS: usize;
    /// Whether steps that only one way goes on from are put together; worth the test where there are many.
    const PATHS: bool;
    type Address: Copy;

    /// The address in network byte order, host bits clear, zeroes behind.
    fn octets(self) -> [u8; 16];
    fn length(self) -> u8;
    fn address_octets(address: Self::Address) -> [u8; 16];
}

impl Prefix for Ipv4Net {
    const STEPS: usize = 2;
    const PATHS: bool = false;
    type Address = Ipv4Addr;

    fn octets(self) -> [u8; 16] {
        Self::address_octets(self.network())
    }

    fn length(self) -> u8 {
        self.prefix_len()
    }

    fn address_octets(address: Ipv4Addr) -> [u8; 16] {
        let mut octets = [0; 16];
        octets[..4].copy_from_slice(&address.octets());
        octets
    }
}

impl Prefix for Ipv6Net {
    const STEPS: usize = 14;
    const PATHS: bool = true;
    type Address = Ipv6Addr;

    fn octets(self) -> [u8; 16] {
        self.network().octets()
    }

    fn length(self) -> u8 {
        self.prefix_len()
    }

    fn address_octets(address: Ipv6Addr) -> [u8; 16] {
        address.octets()
    }
}

/// Where a table for prefixes of type `P` starts: what a program is told.
pub(crate) struct Root<P> {
    line: u32,
    family: PhantomData<P>,
}

impl<P> Root<P> {
    /// The root that an earlier [`Root::line`] told of, in the same memory.
    pub(crate) fn at(line: u32) -> Self {
        Self { line, family: PhantomData }
    }

    pub(crate) fn line(self) -> u32 {
        self.line
    }
}

impl<P> Clone for Root<P> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<P> Copy for Root<P> {}

impl<P> PartialEq for Root<P> {
    fn eq(&self, other: &Self) -> bool {
        self.line == other.line
    }
}

impl<P> fmt::Debug for Root<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Root({})", self.line)
    }
}

/// Why nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Error {
    /// The memory is too small.
    #[error("the table is full")]
    Full,
    /// There may be room after a grace period and [`Table::release`].
    #[error("the table is full until a grace period has passed")]
    Quarantined,
    /// Something is in the memory that this module has not written, or not where it is.
    #[error("line {0} is no part of a table")]
    Corrupt(u32),
}

/// Memory with tables in it: any number of roots of both families.
///
/// One writer, any number of readers. `M` is a mapped BPF array, or a vector.
#[derive(Debug)]
pub(crate) struct Table<M> {
    memory: M,
    lines: Lines,
    /// Roots that were adopted damaged, and the blocks that are kept for what they lead to.
    damaged: Vec<(u32, Vec<Block>)>,
}

/// Lines of a table's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) total: u32,
    pub(crate) used: u32,
    /// Not in use, but not free before [`Table::release`].
    pub(crate) quarantined: u32,
}

impl<M: AsRef<[AtomicU32]>> Table<M> {
    /// Over memory in which nothing is kept that matters.
    pub(crate) fn new(memory: M) -> Self {
        Self::with_roots(memory, 0)
    }

    /// The same, with room for so many roots at any time, as far as the memory has it: nodes that come and go would leave
    /// none as large as a root.
    pub(crate) fn with_roots(memory: M, roots: u32) -> Self {
        let lines = memory.as_ref().len() / LINE_WORDS;
        let lines = u32::try_from(lines).unwrap_or(u32::MAX).min(node::LINE_MASK);
        Self { memory, lines: Lines::new(lines, roots), damaged: Vec::new() }
    }

    pub(crate) fn usage(&self) -> Usage {
        let (total, quarantined) = (self.lines.total(), self.lines.in_quarantine());
        Usage { total, used: total - self.lines.free() - quarantined, quarantined }
    }

    /// To be called after a grace period that began after the last call that freed something: the quarantine's
    /// lines may be used again.
    pub(crate) fn release(&mut self) {
        self.lines.release();
    }

    /// What a program finds: the leaf of the longest prefix that covers the address, 0 for none.
    pub(crate) fn lookup<P: Prefix>(&self, root: Root<P>, address: P::Address) -> u32 {
        let octets = P::address_octets(address);
        let words = self.words();
        let mut word = words.load(Words::flat_at(root.line, root_slot(&octets)));
        let mut at = 2;
        while node::is_node(word) {
            // As a program does: nothing is found in what is no table.
            let Ok((next, steps)) = words.step(word, &octets, at) else { return 0 };
            (word, at) = (next, at + steps);
        }
        word
    }

    fn words(&self) -> Words<'_> {
        Words(self.memory.as_ref())
    }

    /// The node, or leaf, that byte `at` of an address decides in, as this process has built or adopted it.
    fn node<P: Prefix>(&self, word: u32, at: usize) -> Result<Node, Error> {
        let node = self.words().node(word)?;
        match node.block() {
            Some(block) if at >= node::end_of::<P>() || !self.lines.owns(block) => Err(Error::Corrupt(block.line)),
            _ => Ok(node),
        }
    }

    /// The same for a path, with the byte behind it.
    fn path<P: Prefix>(&self, word: u32, at: usize) -> Result<(Path, usize), Error> {
        let (path, block) = (self.words().path(word)?, node::path_block(word));
        let end = path.end::<P>(at).filter(|_| self.lines.owns(block));
        Ok((path, end.ok_or(Error::Corrupt(block.line))?))
    }
}

/// The slot of the root that decides for an address.
fn root_slot(octets: &[u8; 16]) -> usize {
    usize::from(u16::from_be_bytes([octets[0], octets[1]]))
}

/// Of a node that byte `at` of the address decides in: the slots that a prefix covers, all its bits in or before
/// that byte.
fn covered(octets: &[u8; 16], length: u8, at: usize) -> std::ops::RangeInclusive<usize> {
    let first = usize::from(octets[at]);
    first..=first | 0xff >> (usize::from(length) - 8 * at).min(8)
}

/// The same for the root, which decides by the first two bytes.
fn covered_by_root(octets: &[u8; 16], length: u8) -> std::ops::RangeInclusive<usize> {
    let first = root_slot(octets);
    first..=first | 0xffff >> length.min(16)
}
