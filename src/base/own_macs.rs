//! The MAC addresses of this host where an instance runs: mirror of `bpf/abi/own_macs.h`.

use std::{
    os::fd::{AsFd as _, BorrowedFd},
    sync::{
        PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
};

use super::TEST_MAC;
use crate::{
    Result,
    sys::{map::Map, mmap::LongMapping},
};

/// The name of the map, of which every instance of some programs has one.
pub(crate) const OWN_MACS: &str = "own_macs";
/// As many as there may be.
const OWN_MACS_MAX: usize = 63;

/// What programs compare destination addresses with.
#[derive(Debug)]
pub(crate) struct OwnMacs {
    map: Map,
    words: LongMapping,
    /// The one of test runs; these exclude each other only where they differ.
    test: RwLock<[u8; 6]>,
}

const _: () = assert!((1 + OWN_MACS_MAX) * size_of::<u64>() == 512);

impl OwnMacs {
    pub(crate) fn of(map: Map) -> Result<Self> {
        Ok(Self { words: LongMapping::new(&map)?, map, test: RwLock::new(TEST_MAC) })
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.map.as_fd()
    }

    /// From now on, those that another instance goes by.
    pub(crate) fn copy(&self, other: &Self) {
        let (to, from) = (self.words.as_ref(), other.words.as_ref());
        // The count comes last: what is behind it is not looked at.
        for at in (1..to.len()).chain([0]) {
            to[at].store(from[at].load(Ordering::Acquire), Ordering::Release);
        }
    }

    /// As it was before it was attached, or ran anything.
    pub(crate) fn reset(&self) {
        let mut now = self.test.write().unwrap_or_else(PoisonError::into_inner);
        self.set(&[TEST_MAC]);
        *now = TEST_MAC;
    }

    /// Runs something, by which frames to this one are for this host. For instances that no interface runs.
    pub(crate) fn while_it_is<T>(&self, mac: [u8; 6], run: impl FnOnce() -> T) -> T {
        loop {
            let now = self.test.read().unwrap_or_else(PoisonError::into_inner);
            if *now == mac {
                return run();
            }
            drop(now);
            let mut now = self.test.write().unwrap_or_else(PoisonError::into_inner);
            self.set(&[mac]);
            *now = mac;
        }
    }

    /// From now on, frames to these are for this host: the first [`OWN_MACS_MAX`] of them. One at a time: a program that reads
    /// meanwhile may miss one that moves.
    pub(crate) fn set(&self, macs: &[[u8; 6]]) {
        let words: &[AtomicU64] = self.words.as_ref();
        let macs = &macs[..macs.len().min(OWN_MACS_MAX)];
        // What goes is not looked at before its word is another's.
        let count = words[0].load(Ordering::Acquire).min(macs.len() as u64);
        words[0].store(count, Ordering::Release);
        for (word, mac) in words[1..].iter().zip(macs) {
            let mut octets = [0; 8];
            octets[..6].copy_from_slice(mac);
            word.store(u64::from_ne_bytes(octets), Ordering::Release);
        }
        words[0].store(macs.len() as u64, Ordering::Release);
    }
}
