//! What the shared book asks the NAT balancer: who has which slot, and what else is known of a backend.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
};

use super::table::Connections;
use crate::{
    Error, Result,
    abi::{
        nat_balancer::{BY_SLOT, DESTINATION_ONLY, NUMBER_MAX, ROUND_ROBIN},
        service::{Address, Backend, INDEX_PROBES, INDEX_REMOVED, Service},
    },
    balancer::{ServiceProtocol, SlotRule, Target, hash::mix64},
    maglev::{self, Share},
    sys::mmap::LongMapping,
};

/// A backend as its packets show it.
pub(super) type Tuple = (ServiceProtocol, IpAddr, u16);

#[derive(Debug)]
pub(super) struct NatRule {
    connections: Arc<Connections>,
    tuples: Mutex<Tuples>,
}

impl NatRule {
    pub(super) fn new(connections: Arc<Connections>, index: LongMapping) -> Self {
        Self { connections, tuples: Mutex::new(Tuples { index, numbers: BTreeMap::new() }) }
    }

    /// The backends whose clients keep their addresses, and their numbers.
    pub(super) fn tuples(&self) -> MutexGuard<'_, Tuples> {
        self.tuples.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SlotRule for NatRule {
    /// Connections remember their backends: a slot changes at once.
    fn change(&self, _slot: u32, _word: u32, wanted: u16, _is_killed: &dyn Fn(u16) -> bool) -> u32 {
        wanted.into()
    }

    fn now(&self) -> u64 {
        // Connections say how long a backend has to stay.
        0
    }

    fn holds(&self, id: u16, record: &Backend, _slots: &mut dyn Iterator<Item = (u32, u32)>) -> bool {
        self.connections.any_of(id, record.identity)
    }

    fn table(&self, service: &Service, shares: &[Share<'_>], size: u32, seed: u64) -> Result<Vec<u32>> {
        match service.scheduler {
            BY_SLOT => maglev::table(shares, size, seed),
            ROUND_ROBIN => Ok(in_turn(shares, size)),
            _ => Ok(listed(shares, size)),
        }
    }

    fn service_words(&self, vip: u16, service: &Service) -> [u64; 5] {
        let mut words = service.function;
        if words[0] == 0 {
            words[0] = vip.into();
        }
        words
    }

    fn backend_words(&self, protocol: ServiceProtocol, target: Target, service: &Service) -> [u64; 3] {
        let kept = service.flags & DESTINATION_ONLY != 0;
        let number = if kept { self.tuples().number(&(protocol, target.address, target.port)) } else { None };
        [0, number.unwrap_or(0).into(), self.connections.start(protocol, target.address, target.port)]
    }
}

/// Weighted round robin that spreads the turns of the heavy: each gains its weight in each turn, and who has the most
/// pays the sum.
fn in_turn(shares: &[Share<'_>], size: u32) -> Vec<u32> {
    let sum: i64 = shares.iter().map(|share| i64::from(share.weight)).sum();
    if sum == 0 {
        return Vec::new();
    }
    let mut credit: Vec<i64> = vec![0; shares.len()];
    let turn = |_| {
        credit.iter_mut().zip(shares).for_each(|(credit, share)| *credit += i64::from(share.weight));
        // The first of equals.
        let next = (0..shares.len()).rev().max_by_key(|index| credit[*index]).unwrap_or(0);
        credit[next] -= sum;
        next as u32
    };
    (0..size).map(turn).collect()
}

/// Each by turns, whatever its weight, unless that is 0.
fn listed(shares: &[Share<'_>], size: u32) -> Vec<u32> {
    let some: Vec<u32> = (0..shares.len() as u32).filter(|index| shares[*index as usize].weight > 0).collect();
    if some.is_empty() { some } else { some.iter().copied().cycle().take(size as usize).collect() }
}

/// `backend_index`: by address, port and protocol, a number from 1 on.
#[derive(Debug)]
pub(super) struct Tuples {
    index: LongMapping,
    numbers: BTreeMap<Tuple, u16>,
}

/// As `nat_backend_hash`.
fn hash((protocol, address, port): &Tuple) -> u64 {
    let [high, low] = Address::from(*address).0;
    let rest = u64::from(port.to_be()) << 16 | u64::from(*protocol as u8);
    mix64(mix64(high.wrapping_add(0x9e37_79b9_7f4a_7c15)) ^ low ^ rest)
}

/// The word of a backend.
fn entry(tuple: &Tuple, number: u16) -> u64 {
    hash(tuple) >> 32 << 32 | u64::from(number)
}

impl Tuples {
    fn number(&self, tuple: &Tuple) -> Option<u16> {
        self.numbers.get(tuple).copied()
    }

    /// Takes over one that an earlier process has numbered.
    pub(super) fn adopt(&mut self, tuple: Tuple, number: u16) {
        self.numbers.insert(tuple, number);
    }

    /// Removes what an earlier process left, of backends that it was adding or that have no service any more; adds what is
    /// missing.
    pub(super) fn repair(&mut self) {
        let words = self.index.as_ref();
        let known = |word| self.numbers.iter().any(|(tuple, number)| word == entry(tuple, *number));
        for place in words {
            let word = place.load(Ordering::Acquire);
            if word != 0 && word != INDEX_REMOVED && !known(word) {
                place.store(INDEX_REMOVED, Ordering::Release);
            }
        }
        for (tuple, number) in &self.numbers {
            let (hash, entry) = (hash(tuple), entry(tuple, *number));
            let places = || probes(hash, words.len()).map(|at| &words[at]);
            if places().all(|place| place.load(Ordering::Acquire) != entry) {
                // There was room for it when it was added, in a table that was not larger.
                let free = places().find(|place| matches!(place.load(Ordering::Acquire), 0 | INDEX_REMOVED));
                free.into_iter().for_each(|place| place.store(entry, Ordering::Release));
            }
        }
    }

    /// Sees to it that a backend has a number and is found by it.
    pub(super) fn add(&mut self, tuple: Tuple) -> Result<()> {
        if self.numbers.contains_key(&tuple) {
            return Ok(());
        }
        let full = |capacity: u32| Error::Full {
            map: "backend_index".into(),
            capacity,
            entry: std::net::SocketAddr::new(tuple.1, tuple.2).to_string(),
        };
        let taken = |number: &u16| self.numbers.values().any(|other| other == number);
        let number = (1..=NUMBER_MAX).find(|number| !taken(number)).ok_or_else(|| full(NUMBER_MAX.into()))?;
        let words = self.index.as_ref();
        let hash = hash(&tuple);
        let places: Vec<usize> = probes(hash, words.len()).collect();
        let same = |at: &usize| {
            let word = words[*at].load(Ordering::Acquire);
            word != INDEX_REMOVED && word >> 32 == hash >> 32 && word != 0
        };
        let free = places.iter().find(|at| matches!(words[**at].load(Ordering::Acquire), 0 | INDEX_REMOVED));
        match free {
            Some(at) if !places.iter().any(same) => {
                words[*at].store(entry(&tuple, number), Ordering::Release);
            }
            _ => return Err(full(words.len() as u32)),
        }
        self.numbers.insert(tuple, number);
        Ok(())
    }

    /// Forgets all but these.
    pub(super) fn retain(&mut self, keep: impl Fn(&Tuple) -> bool) {
        let words = self.index.as_ref();
        self.numbers.retain(|tuple, number| {
            let kept = keep(tuple);
            if !kept {
                let entry = entry(tuple, *number);
                let found = probes(hash(tuple), words.len()).find(|at| words[*at].load(Ordering::Acquire) == entry);
                if let Some(at) = found {
                    words[at].store(INDEX_REMOVED, Ordering::Release);
                }
            }
            kept
        });
    }
}

fn probes(hash: u64, entries: usize) -> impl Iterator<Item = usize> {
    (0..u64::from(INDEX_PROBES)).map(move |probe| (hash.wrapping_add(probe) & (entries as u64 - 1)) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(weights: &[u32]) -> Vec<Share<'static>> {
        weights.iter().map(|weight| Share { name: b"", weight: *weight }).collect()
    }

    #[test]
    fn turns_are_by_weight_and_spread() {
        assert_eq!(in_turn(&shares(&[1, 1, 1]), 7), [0, 1, 2, 0, 1, 2, 0]);
        assert_eq!(in_turn(&shares(&[5, 1, 1]), 7), [0, 0, 1, 0, 2, 0, 0]);
        assert_eq!(in_turn(&shares(&[0, 2]), 3), [1, 1, 1]);
        assert!(in_turn(&shares(&[0, 0]), 3).is_empty());
        assert!(in_turn(&[], 3).is_empty());
    }

    #[test]
    fn lists_name_each_once_a_round() {
        assert_eq!(listed(&shares(&[9, 0, 1]), 5), [0, 2, 0, 2, 0]);
        assert!(listed(&shares(&[0]), 5).is_empty());
    }
}
