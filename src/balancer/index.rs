//! Writing `vip_index` and `service_index`: open hash tables of 64-bit words, which programs read at any time.

use std::{net::IpAddr, sync::atomic::Ordering};

use super::{
    hash::{index_hash, index_hash6, raw4},
    service::ServiceAddr,
};
use crate::{
    Result,
    abi::service::{INDEX_IPV4, INDEX_IPV6, INDEX_NUMBER, INDEX_PROBES, INDEX_REMOVED, INDEX_SERVICE},
    base::StageCore,
    sys::mmap::LongMapping,
};

/// Entries a thing to find: runs of taken entries stay so short that [`INDEX_PROBES`] are always enough.
const SPREAD: u32 = 16;

/// Entries of an index for so many things.
pub(super) fn size_for(things: u32) -> u32 {
    (things * SPREAD).next_power_of_two().max(64)
}

#[derive(Debug)]
pub(super) struct Index(LongMapping);

/// An entry without its number, and where the search for it starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Key {
    word: u64,
    at: u64,
}

impl Key {
    pub(super) fn vip(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(ip) => {
                let raw = u64::from(raw4(ip));
                Self { word: raw << 32 | INDEX_IPV4, at: index_hash(raw) >> 40 }
            }
            IpAddr::V6(ip) => {
                let hash = index_hash6(ip);
                Self { word: hash >> 32 << 32 | INDEX_IPV6, at: hash & 0xffff_ffff }
            }
        }
    }

    pub(super) fn service(vip: u16, service: &ServiceAddr) -> Self {
        let port = u64::from(service.port.unwrap_or(0).to_be());
        let word = u64::from(vip) << 48 | port << 32 | u64::from(service.protocol as u8) << 24 | INDEX_SERVICE;
        Self { word, at: index_hash(word) >> 40 }
    }
}

impl Index {
    pub(super) fn of(core: &StageCore, name: &str) -> Result<Self> {
        LongMapping::new(core.map(name)).map(Self)
    }

    fn probes(&self, key: Key) -> impl Iterator<Item = usize> {
        let mask = self.0.as_ref().len() as u64 - 1;
        (0..u64::from(INDEX_PROBES)).map(move |probe| ((key.at + probe) & mask) as usize)
    }

    fn word(&self, at: usize) -> u64 {
        self.0.as_ref()[at].load(Ordering::Acquire)
    }

    pub(super) fn find(&self, key: Key) -> Option<u16> {
        let words = self.probes(key).map(|at| self.word(at)).take_while(|word| *word != 0);
        words.into_iter().find(|word| word & !INDEX_NUMBER == key.word).map(|word| word as u16)
    }

    /// Puts an entry that is not there. False when there is no room near its place.
    #[must_use]
    pub(super) fn insert(&self, key: Key, number: u16) -> bool {
        let free = self.probes(key).find(|at| matches!(self.word(*at), 0 | INDEX_REMOVED));
        if let Some(at) = free {
            self.0.as_ref()[at].store(key.word | u64::from(number), Ordering::Release);
        }
        free.is_some()
    }

    pub(super) fn remove(&self, key: Key) {
        let place = self.probes(key).take_while(|at| self.word(*at) != 0);
        let Some(at) = { place }.find(|at| self.word(*at) & !INDEX_NUMBER == key.word) else { return };
        self.clear(at);
    }

    /// Removes all entries but these.
    pub(super) fn retain(&self, keep: impl Fn(u64) -> bool) {
        for at in 0..self.0.as_ref().len() {
            let word = self.word(at);
            if word != 0 && word != INDEX_REMOVED && !keep(word) {
                self.clear(at);
            }
        }
    }

    /// Others may have been put behind it: their searches must go on. Where none follows, they end.
    fn clear(&self, at: usize) {
        let words = self.0.as_ref();
        words[at].store(INDEX_REMOVED, Ordering::Release);
        let mut at = at;
        while self.word((at + 1) & (words.len() - 1)) == 0 && self.word(at) == INDEX_REMOVED {
            words[at].store(0, Ordering::Release);
            at = at.wrapping_sub(1) & (words.len() - 1);
        }
    }
}

impl Key {
    /// Whether a word is this entry, of this number.
    pub(super) fn is(self, word: u64, number: u16) -> bool {
        word == self.word | u64::from(number)
    }
}
