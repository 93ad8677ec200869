//! The next-hop table of a balancer and what is known of links, as the resolver and programs share them: mirror of
//! `bpf/abi/next_hop.h`.
//!
//! Entries change word by word, each word at once. The key is written by the side that claimed the entry, and does not change until
//! the entry has left: see [`NextHops::leave`].

use std::{
    fmt,
    net::IpAddr,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use super::mix64;
use crate::{
    Result,
    abi::next_hop::{
        LinkInfo, LinkKey, NEXT_HOP_BY_TIME, NEXT_HOP_CLAIMED, NEXT_HOP_FREE, NEXT_HOP_LEAVING, NEXT_HOP_PROBES,
        NEXT_HOP_USED, NEXT_HOPS, NextHop, NextHopHead, NextHopKey,
    },
    sys::{
        map::{Map, TypedMap},
        mmap::LongMapping,
    },
};

/// Words of 64 bits in an entry.
const WORDS: usize = size_of::<NextHop>() / size_of::<u64>();
/// The fields of an entry that change, as words.
const STATE: usize = 3;
const TO: usize = 4;
const FROM: usize = 5;
const EGRESS: usize = 6;
/// Of the head: the lease, then generation and `wanted`.
const LEASE: usize = 0;
const GENERATION: usize = 1;

const _: () = assert!(std::mem::offset_of!(NextHopHead, lease) == LEASE * 8);
const _: () = assert!(std::mem::offset_of!(NextHopHead, generation) == GENERATION * 8);
const _: () = assert!(std::mem::offset_of!(NextHopHead, wanted) == GENERATION * 8 + 4);
const _: () = assert!(std::mem::offset_of!(NextHop, state) == STATE * 8);
const _: () = assert!(std::mem::offset_of!(NextHop, to) == TO * 8);
const _: () = assert!(std::mem::offset_of!(NextHop, from) == FROM * 8);
const _: () = assert!(std::mem::offset_of!(NextHop, egress) == EGRESS * 8);

/// The next-hop table of a value, and its map of links.
pub(crate) struct NextHops {
    words: LongMapping,
    links: Map,
    wanted: Mutex<Option<ReadWanted>>,
    version: AtomicU64,
    pinned: AtomicBool,
    generic: AtomicBool,
}

impl fmt::Debug for NextHops {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NextHops").field("version", &self.version).field("pinned", &self.pinned).finish_non_exhaustive()
    }
}

/// Addresses whose next hops are resolved before a packet asks for them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wanted {
    pub(crate) addresses: Vec<IpAddr>,
    /// Another with each change.
    pub(crate) version: u64,
}

type ReadWanted = Box<dyn Fn() -> Vec<IpAddr> + Send + Sync>;

/// What an entry leads to at present.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Hop {
    pub(crate) to: u64,
    pub(crate) from: u64,
    pub(crate) egress: u64,
}

impl NextHops {
    /// # Panics
    /// When the maps are not those of `bpf/abi/next_hop.h`: a mistake in this crate.
    pub(crate) fn of(next_hops: &Map, links: &Map) -> Result<Self> {
        let words = LongMapping::new(next_hops)?;
        assert_eq!(words.as_ref().len(), NEXT_HOPS as usize * WORDS, "map {}: size", next_hops.name());
        let links = links.duplicate()?;
        TypedMap::<LinkKey, LinkInfo>::new(&links);
        Ok(Self {
            words,
            links,
            wanted: Mutex::default(),
            version: AtomicU64::new(0),
            pinned: AtomicBool::new(false),
            generic: AtomicBool::new(false),
        })
    }

    /// From now on, the next hops of the addresses that this tells are resolved without a packet that asks for them.
    pub(crate) fn want(&self, read: impl Fn() -> Vec<IpAddr> + Send + Sync + 'static) {
        *self.wanted.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(read));
        self.wanted_changed();
    }

    /// These are others than before.
    pub(crate) fn wanted_changed(&self) {
        self.version.fetch_add(1, Ordering::SeqCst);
    }

    /// The addresses, when they are others than in this version.
    pub(crate) fn wanted_since(&self, version: u64) -> Option<Wanted> {
        let now = self.version.load(Ordering::SeqCst);
        let read = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        (now != version).then(|| Wanted { addresses: read.as_ref().map_or_else(Vec::new, |read| read()), version: now })
    }

    /// Whether they are others than in this version.
    pub(crate) fn is_wanted_since(&self, version: u64) -> bool {
        self.version.load(Ordering::SeqCst) != version
    }

    /// Programs go on with the table when this process has ended: the kernel is to see to its neighbours until then and after.
    pub(crate) fn set_pinned(&self) {
        self.pinned.store(true, Ordering::Relaxed);
    }

    /// Whether the programs run in generic mode, where every Ethernet device transmits what is redirected to it.
    pub(crate) fn set_generic(&self, generic: bool) {
        self.generic.store(generic, Ordering::Relaxed);
    }

    pub(crate) fn is_generic(&self) -> bool {
        self.generic.load(Ordering::Relaxed)
    }

    pub(crate) fn is_pinned(&self) -> bool {
        self.pinned.load(Ordering::Relaxed)
    }

    /// What is known of links.
    pub(crate) fn links(&self) -> TypedMap<'_, LinkKey, LinkInfo> {
        TypedMap::new(&self.links)
    }

    fn entry(&self, number: u32) -> &[AtomicU64] {
        &self.words.as_ref()[number as usize * WORDS..][..WORDS]
    }

    fn head(&self) -> &[AtomicU64] {
        self.entry(0)
    }

    pub(crate) fn generation(&self) -> u32 {
        self.head()[GENERATION].load(Ordering::SeqCst) as u32
    }

    /// Makes flows and backends choose again. What was written before is visible to those that do.
    pub(crate) fn raise_generation(&self) {
        let next = |word: u64| {
            let generation = (word as u32 + 1) % NEXT_HOP_BY_TIME;
            Some(word & !u64::from(u32::MAX) | u64::from(generation.max(1)))
        };
        let _ = self.head()[GENERATION].fetch_update(Ordering::SeqCst, Ordering::SeqCst, next);
    }

    /// Until when the table is vouched for, in jiffies; 0: it never was.
    pub(crate) fn lease(&self) -> u64 {
        self.head()[LEASE].load(Ordering::SeqCst)
    }

    /// Vouches for the table until then.
    pub(crate) fn renew_lease(&self, until: u64) {
        self.head()[LEASE].store(until, Ordering::SeqCst);
    }

    /// Another when programs have made entries.
    pub(crate) fn made_by_programs(&self) -> u32 {
        (self.head()[GENERATION].load(Ordering::SeqCst) >> 32) as u32
    }

    /// The state of an entry (`enum next_hop_use`), and when it was used last.
    pub(crate) fn state(&self, number: u32) -> (u32, u32) {
        let word = self.entry(number)[STATE].load(Ordering::SeqCst);
        (word as u32, (word >> 32) as u32)
    }

    /// What an entry in use is about.
    pub(crate) fn key(&self, number: u32) -> Option<NextHopKey> {
        let entry = self.entry(number);
        NextHopKey::of([0, 1, 2].map(|at: usize| entry[at].load(Ordering::Acquire)))
    }

    pub(crate) fn hop(&self, number: u32) -> Hop {
        let word = |at: usize| self.entry(number)[at].load(Ordering::Acquire);
        Hop { to: word(TO), from: word(FROM), egress: word(EGRESS) }
    }

    /// Writes what differs, each word at once.
    pub(crate) fn set_hop(&self, number: u32, hop: Hop) {
        let before = self.hop(number);
        let set = |at: usize, old: u64, new: u64| {
            if old != new {
                self.entry(number)[at].store(new, Ordering::SeqCst);
            }
        };
        // An entry that could not be used becomes usable with its last word, and one that may not be used any more with
        // its first.
        set(FROM, before.from, hop.from);
        if hop.egress == 0 || hop.to == 0 {
            set(EGRESS, before.egress, hop.egress);
            set(TO, before.to, hop.to);
        } else {
            set(TO, before.to, hop.to);
            set(EGRESS, before.egress, hop.egress);
        }
    }

    /// The entry of a key, which is made where there is none; `None` when there is no room.
    pub(crate) fn find_or_make(&self, key: &NextHopKey, now: u32) -> Option<u32> {
        let words = key.words();
        let is = |number: u32| {
            let entry = self.entry(number);
            entry[STATE].load(Ordering::SeqCst) as u32 == NEXT_HOP_USED
                && (0..3).all(|at| entry[at].load(Ordering::Acquire) == words[at])
        };
        if let Some(found) = slots(words).find(|number| is(*number)) {
            return Some(found);
        }
        let made = slots(words).find(|number| self.change_state(*number, NEXT_HOP_FREE, NEXT_HOP_CLAIMED))?;
        let entry = self.entry(made);
        for (at, word) in words.into_iter().enumerate() {
            entry[at].store(word, Ordering::Release);
        }
        for word in &entry[TO..] {
            word.store(0, Ordering::Release);
        }
        entry[STATE].store(u64::from(now) << 32 | u64::from(NEXT_HOP_USED), Ordering::SeqCst);
        Some(made)
    }

    /// Has an entry found no more. It may be freed once the generation was raised and every program that runs has ended.
    /// False when it is in another state.
    pub(crate) fn leave(&self, number: u32) -> bool {
        [NEXT_HOP_USED, NEXT_HOP_CLAIMED].into_iter().any(|from| self.change_state(number, from, NEXT_HOP_LEAVING))
    }

    /// Makes room of an entry that has left. Nothing is done to one that another process has freed meanwhile.
    pub(crate) fn free(&self, number: u32) {
        if !self.change_state(number, NEXT_HOP_LEAVING, NEXT_HOP_CLAIMED) {
            return;
        }
        let entry = self.entry(number);
        for at in (0..WORDS).filter(|at| *at != STATE).chain([STATE]) {
            entry[at].store(0, Ordering::SeqCst);
        }
    }

    /// False when it is in another state than the first. Programs write beside it when they last used the entry.
    fn change_state(&self, number: u32, from: u32, to: u32) -> bool {
        let next = |word: u64| (word as u32 == from).then_some(word & !u64::from(u32::MAX) | u64::from(to));
        self.entry(number)[STATE].fetch_update(Ordering::SeqCst, Ordering::SeqCst, next).is_ok()
    }
}

/// Where the entry of a key may be, in the order of preference.
fn slots(key: [u64; 3]) -> impl Iterator<Item = u32> {
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    let hash = mix64(mix64(key[0].wrapping_add(GOLDEN)) ^ key[1] ^ key[2].rotate_left(29));
    let first = (hash >> 20) % u64::from(NEXT_HOPS - 1);
    (0..NEXT_HOP_PROBES).map(move |probe| 1 + ((first + u64::from(probe)) % u64::from(NEXT_HOPS - 1)) as u32)
}

#[cfg(test)]
pub(crate) mod tests {
    //! These need root.

    use super::*;

    /// Tables that no program has.
    pub(crate) fn next_hops() -> NextHops {
        let (next_hops, links) = (Map::test_next_hops(NEXT_HOPS), Map::test_links());
        NextHops::of(&next_hops, &links).unwrap()
    }

    impl NextHops {
        /// As a resolver leaves an entry that has left when it ends in the middle of freeing it.
        pub(crate) fn claim_as_if_to_free(&self, number: u32) {
            assert!(self.change_state(number, NEXT_HOP_LEAVING, NEXT_HOP_CLAIMED));
        }
    }

    fn key(last: u8) -> NextHopKey {
        NextHopKey { interface: 7, address: IpAddr::from([192, 0, 2, last]), mtu: 1500 }
    }

    #[test]
    fn an_entry_is_made_once_and_leaves() {
        let table = next_hops();
        let number = table.find_or_make(&key(1), 5).unwrap();
        assert!((1..NEXT_HOPS).contains(&number));
        assert_eq!(table.find_or_make(&key(1), 6), Some(number));
        assert_eq!((table.state(number), table.key(number)), ((NEXT_HOP_USED, 5), Some(key(1))));
        let hop = Hop { to: 1, from: 2, egress: 3 };
        table.set_hop(number, hop);
        assert_eq!(table.hop(number), hop);
        table.free(number);
        assert_eq!(table.state(number).0, NEXT_HOP_USED, "it has not left");
        assert!(table.leave(number));
        assert_ne!(table.find_or_make(&key(1), 6), Some(number), "what leaves is not found");
        table.free(number);
        assert_eq!((table.state(number), table.key(number), table.hop(number)), ((0, 0), None, Hop::default()));
        assert!(!table.leave(number));
    }

    #[test]
    fn a_full_neighbourhood_has_no_room() {
        let table = next_hops();
        let room: Vec<u32> = slots(key(1).words()).collect();
        assert_eq!(room.len(), NEXT_HOP_PROBES as usize);
        for number in &room {
            assert!(table.change_state(*number, NEXT_HOP_FREE, NEXT_HOP_CLAIMED));
        }
        assert_eq!(table.find_or_make(&key(1), 0), None);
        assert!(table.leave(room[9]));
        table.free(room[9]);
        assert_eq!(table.find_or_make(&key(1), 0), Some(room[9]));
    }

    #[test]
    fn a_generation_changes_nothing_beside_it() {
        let table = next_hops();
        assert_eq!((table.generation(), table.lease(), table.made_by_programs()), (0, 0, 0));
        table.renew_lease(1 << 40 | 5);
        table.raise_generation();
        // A program has made an entry.
        table.head()[GENERATION].fetch_add(1 << 32, Ordering::SeqCst);
        table.raise_generation();
        assert_eq!((table.generation(), table.lease(), table.made_by_programs()), (2, 1 << 40 | 5, 1));
        table.head()[GENERATION].store(1 << 32 | u64::from(NEXT_HOP_BY_TIME - 1), Ordering::SeqCst);
        table.raise_generation();
        assert_eq!((table.generation(), table.made_by_programs()), (1, 1));
    }
}
