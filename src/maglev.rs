//! Maglev hashing (Eisenbud et al., NSDI 2016, section 3.4) with weights: which backend answers for each slot of a table.
//!
//! A table is decided by the backends' names and weights and by a seed, not by the order in which they are given nor by
//! what was there before, so that any number of balancers build the same one. When the list changes, few slots of the
//! backends that stay change hands.

use crate::{Error, Result};

/// Slots of a table unless asked otherwise: about a hundred for each of several hundred backends.
pub const DEFAULT_SIZE: u32 = 65_537;

/// The largest table. Slots take four bytes each in the kernel.
pub const MAX_SIZE: u32 = 5_000_011;

/// A backend as the table sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Share<'a> {
    /// What tells it from the others; the same on every balancer.
    pub name: &'a [u8],
    /// Its part of the slots is its part of the sum of weights. 0: no slots.
    pub weight: u32,
}

/// For each slot, the index of its backend in `shares`; empty when no backend has a weight.
///
/// Each backend has its part of the slots, rounded, give or take one. Takes milliseconds for hundreds of backends. Names
/// should differ: of equal ones, each gets its part, in the order given.
///
/// # Errors
/// [`Error::Invalid`] when `size` is not a prime up to [`MAX_SIZE`], or there are more weighted backends than slots.
pub fn table(shares: &[Share<'_>], size: u32, seed: u64) -> Result<Vec<u32>> {
    check_size(size)?;
    let mut order: Vec<usize> = (0..shares.len()).filter(|index| shares[*index].weight > 0).collect();
    if order.len() > size as usize {
        let expected = "a prime of at least the number of backends";
        return Err(Error::Invalid { what: "table_size", value: size.to_string(), expected });
    }
    order.sort_by_key(|index| shares[*index].name);
    let mut turns: Vec<Turns> = order.iter().map(|index| Turns::new(&shares[*index], *index, size, seed)).collect();
    let Some(most) = turns.iter().map(|turn| turn.weight).max() else { return Ok(Vec::new()) };

    const FREE: u32 = u32::MAX;
    let mut slots = vec![FREE; size as usize];
    let mut left = size;
    loop {
        // The heaviest backend takes a slot in every round, the others in their part of the rounds.
        for turn in &mut turns {
            turn.credit += turn.weight;
            if turn.credit < most {
                continue;
            }
            turn.credit -= most;
            while slots[turn.slot as usize] != FREE {
                turn.advance(size);
            }
            slots[turn.slot as usize] = turn.index;
            left -= 1;
            if left == 0 {
                return Ok(slots);
            }
        }
    }
}

pub(crate) fn check_size(size: u32) -> Result<()> {
    let prime = size > 2 && size <= MAX_SIZE && (2..).take_while(|n| n * n <= size).all(|n| !size.is_multiple_of(n));
    if prime {
        return Ok(());
    }
    let expected = "a prime from 3 to 5000011, such as 65537";
    Err(Error::Invalid { what: "table_size", value: size.to_string(), expected })
}

/// One backend's walk over all slots, in an order of its own.
struct Turns {
    index: u32,
    weight: u64,
    credit: u64,
    slot: u32,
    skip: u32,
}

impl Turns {
    fn new(share: &Share<'_>, index: usize, size: u32, seed: u64) -> Self {
        let below = |hash: u64, end: u32| (hash % u64::from(end)) as u32;
        Self {
            index: index as u32,
            weight: share.weight.into(),
            credit: 0,
            slot: below(hash(share.name, seed), size),
            // Any step but 0 visits all slots of a prime number of them.
            skip: below(hash(share.name, !seed), size - 1) + 1,
        }
    }

    fn advance(&mut self, size: u32) {
        // Below 2^24: the sum fits.
        self.slot += self.skip;
        if self.slot >= size {
            self.slot -= size;
        }
    }
}

/// A hash that never changes, unlike the standard library's.
fn hash(name: &[u8], seed: u64) -> u64 {
    let start = crate::balancer::hash::mix64(seed ^ name.len() as u64);
    name.chunks(8).fold(start, |state, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        crate::balancer::hash::mix64(state ^ u64::from_le_bytes(word)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(count: u32) -> Vec<[u8; 4]> {
        (0..count).map(|n| (0xc0a8_0000 + n).to_be_bytes()).collect()
    }

    fn built(backends: &[([u8; 4], u32)], size: u32, seed: u64) -> Vec<[u8; 4]> {
        let shares: Vec<_> = backends.iter().map(|(name, weight)| Share { name, weight: *weight }).collect();
        table(&shares, size, seed).unwrap().into_iter().map(|index| backends[index as usize].0).collect()
    }

    fn counts(slots: &[[u8; 4]], name: [u8; 4]) -> f64 {
        slots.iter().filter(|slot| **slot == name).count() as f64
    }

    #[test]
    fn slots_are_within_one_percent_of_the_weights() {
        for weights in
            [vec![1; 3], vec![1; 100], vec![1, 2, 3, 4, 5], vec![10, 1, 1], vec![65_535, 13_107, 655], vec![7]]
        {
            let backends: Vec<_> = names(weights.len() as u32).into_iter().zip(weights.clone()).collect();
            let slots = built(&backends, DEFAULT_SIZE, 0);
            let sum: u32 = weights.iter().sum();
            for (name, weight) in &backends {
                let wanted = f64::from(DEFAULT_SIZE) * f64::from(*weight) / f64::from(sum);
                let off = (counts(&slots, *name) - wanted).abs();
                assert!(off <= 1.0 + wanted / 1000.0, "{name:?} of weight {weight} has {off} slots too many or few");
            }
        }
    }

    #[test]
    fn order_and_repetition_do_not_matter_but_seed_and_names_do() {
        let mut backends: Vec<_> = names(50).into_iter().zip((1..=5).cycle()).collect();
        let slots = built(&backends, 4099, 7);
        assert_eq!(slots, built(&backends, 4099, 7));
        backends.reverse();
        assert_eq!(slots, built(&backends, 4099, 7));
        backends.swap(3, 30);
        backends.push(([1; 4], 0));
        assert_eq!(slots, built(&backends, 4099, 7), "weight 0 is as good as absent");
        assert_ne!(slots, built(&backends, 4099, 8));
        // The same table in every version of this crate: two boxes may differ in it.
        assert_eq!(slots[..4], [[192, 168, 0, 24], [192, 168, 0, 23], [192, 168, 0, 43], [192, 168, 0, 18]]);
    }

    #[test]
    fn few_slots_of_survivors_change_hands() {
        for count in [2, 10, 100] {
            let backends: Vec<_> = names(count).into_iter().map(|name| (name, 1)).collect();
            let before = built(&backends, DEFAULT_SIZE, 0);
            let after = built(&backends[1..], DEFAULT_SIZE, 0);
            let gone = backends[0].0;
            let moved = before.iter().zip(&after).filter(|(a, b)| **a != gone && a != b).count() as f64;
            let part = moved / f64::from(DEFAULT_SIZE);
            // The paper has 1 % and less for tables a hundred times the number of backends.
            assert!(part < 0.04, "{count} backends less one: {:.2} % of the survivors' slots moved", part * 100.0);
        }
    }

    #[test]
    fn a_changed_weight_moves_little_more_than_it_must() {
        let mut backends: Vec<_> = names(10).into_iter().map(|name| (name, 10)).collect();
        let before = built(&backends, DEFAULT_SIZE, 0);
        backends[4].1 = 5;
        let after = built(&backends, DEFAULT_SIZE, 0);
        let moved = before.iter().zip(&after).filter(|(a, b)| a != b).count() as f64 / f64::from(DEFAULT_SIZE);
        let must = 0.1 - 5.0 / 95.0;
        assert!(moved < must + 0.12, "{moved} of the slots moved, {must} had to");
    }

    #[test]
    fn what_cannot_be_built_is_refused_or_empty() {
        assert_eq!(table(&[], 7, 0).unwrap(), [0_u32; 0]);
        assert_eq!(table(&[Share { name: b"a", weight: 0 }], 7, 0).unwrap(), [0_u32; 0]);
        assert_eq!(table(&[Share { name: b"a", weight: u32::MAX }], 3, 0).unwrap(), [0; 3]);
        for size in [0, 1, 2, 4, 65_536, 65_538, 5_000_013] {
            let error = table(&[], size, 0).unwrap_err().to_string();
            assert!(error.contains(&format!("table_size `{size}`")), "{error}");
        }
        let shares = [Share { name: b"a", weight: 1 }; 8];
        assert!(table(&shares, 7, 0).unwrap_err().to_string().contains("at least the number of backends"));
    }
}
