//! The model that the table is compared with, which shares nothing with it: a hash map a prefix length, asked from
//! the longest down; and random prefixes for both.

use std::{collections::HashMap, fmt::Debug};

use fastrand::Rng;
use ipnet::{Ipv4Net, Ipv6Net};

use super::Prefix;

/// What tests need of a family besides.
pub(super) trait Family: Prefix + Ord + Debug {
    const BITS: u8;
    /// Host bits are cleared.
    fn new(bits: u128, length: u8) -> Self;
    /// The address's bits are the highest ones.
    fn address(bits: u128) -> Self::Address;
    fn parse(text: &str) -> Self;
}

impl Family for Ipv4Net {
    const BITS: u8 = 32;

    fn new(bits: u128, length: u8) -> Self {
        Self::new_assert(Self::address(bits), length).trunc()
    }

    fn address(bits: u128) -> Self::Address {
        ((bits >> 96) as u32).into()
    }

    fn parse(text: &str) -> Self {
        text.parse().unwrap()
    }
}

impl Family for Ipv6Net {
    const BITS: u8 = 128;

    fn new(bits: u128, length: u8) -> Self {
        Self::new_assert(bits.into(), length).trunc()
    }

    fn address(bits: u128) -> Self::Address {
        bits.into()
    }

    fn parse(text: &str) -> Self {
        text.parse().unwrap()
    }
}

pub(super) fn bits_of(prefix: impl Prefix) -> u128 {
    u128::from_be_bytes(prefix.octets())
}

/// Leaves are `LENGTHS` apart, so that a leaf tells its prefix's length.
pub(super) const LENGTHS: u32 = 256;

pub(super) fn owner_length(leaf: u32) -> u8 {
    (leaf % LENGTHS) as u8
}

/// The model.
pub(super) struct Model {
    by_length: Vec<HashMap<u128, u32>>,
    next: u32,
}

fn mask(length: u8) -> u128 {
    u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0)
}

impl Model {
    pub(super) fn new() -> Self {
        Self { by_length: vec![HashMap::new(); 129], next: 0 }
    }

    pub(super) fn insert(&mut self, prefix: impl Prefix) -> u32 {
        self.next += 1;
        let leaf = self.next * LENGTHS + u32::from(prefix.length());
        self.by_length[usize::from(prefix.length())].insert(bits_of(prefix), leaf);
        leaf
    }

    /// With the prefixes of another.
    pub(super) fn continuing(other: &Self) -> Self {
        Self { by_length: other.by_length.clone(), next: other.next }
    }

    pub(super) fn get(&self, prefix: impl Prefix) -> Option<u32> {
        self.by_length[usize::from(prefix.length())].get(&bits_of(prefix)).copied()
    }

    pub(super) fn set(&mut self, prefix: impl Prefix, leaf: u32) {
        self.by_length[usize::from(prefix.length())].insert(bits_of(prefix), leaf);
    }

    /// The leaves of all prefixes that cover an address and are at least as long as that of `shortest`.
    pub(super) fn all_from(&self, bits: u128, shortest: u32) -> Vec<u32> {
        let lengths = (usize::from(owner_length(shortest))..).zip(&self.by_length[owner_length(shortest).into()..]);
        let longer = lengths.filter_map(|(n, leaves)| leaves.get(&(bits & mask(n as u8))).copied());
        longer.chain([shortest]).collect()
    }

    pub(super) fn remove(&mut self, prefix: impl Prefix) -> bool {
        self.by_length[usize::from(prefix.length())].remove(&bits_of(prefix)).is_some()
    }

    /// The leaf for an address, of prefixes up to a length.
    pub(super) fn lookup(&self, bits: u128, longest: u8) -> u32 {
        let found = (0..=longest).rev().find_map(|n| self.by_length[usize::from(n)].get(&(bits & mask(n))));
        found.copied().unwrap_or(0)
    }

    pub(super) fn covering(&self, prefix: impl Prefix) -> u32 {
        prefix.length().checked_sub(1).map_or(0, |length| self.lookup(bits_of(prefix), length))
    }

    pub(super) fn sorted<P: Family>(&self) -> Vec<(P, u32)> {
        let of_length =
            |length: usize| self.by_length[length].iter().map(move |(bits, leaf)| (P::new(*bits, length as u8), *leaf));
        let mut all: Vec<_> = (0..=P::BITS.into()).flat_map(of_length).collect();
        all.sort_unstable_by_key(|(prefix, _)| (prefix.octets(), prefix.length()));
        all
    }
}

/// Where random prefixes lie: anywhere, or crowded below a few nodes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Spread {
    Sparse,
    Dense,
}

pub(super) fn random_prefix<P: Family>(random: &mut Rng, spread: Spread) -> P {
    let bits = random_bits(random, spread);
    match (spread, random.u8(..8)) {
        (_, 0) => P::new(bits, random.u8(0..=P::BITS)),
        (_, 1) => P::new(bits, P::BITS),
        (Spread::Dense, _) => P::new(bits, random.u8(12..=P::BITS.min(40))),
        (Spread::Sparse, _) => P::new(bits, random.u8(8..=P::BITS.min(64))),
    }
}

pub(super) fn random_bits(random: &mut Rng, spread: Spread) -> u128 {
    let bits = random.u128(..);
    match spread {
        Spread::Sparse => bits,
        // 4 x 16 x 16 x any /32, and few ways on from there.
        Spread::Dense => bits & 0x0003_0f0f_ff00_0000_0101_0000_0000_0003 | 0x0a00_u128 << 112,
    }
}

/// An address near a prefix of the list, or anywhere.
pub(super) fn probe<P: Family>(random: &mut Rng, prefixes: &[P], spread: Spread) -> u128 {
    match (random.u8(..4), random.choice(prefixes)) {
        (0, _) | (_, None) => random_bits(random, spread),
        // The last address, and the one behind.
        (1, Some(prefix)) => {
            (bits_of(*prefix) | !mask(prefix.length())).wrapping_add(random.u128(0..=1) << (128 - P::BITS))
        }
        (_, Some(prefix)) => bits_of(*prefix) | random.u128(..) & !mask(prefix.length()),
    }
}
