//! Bans: sources that are cut off for a time.

use std::{collections::BTreeMap, net::IpAddr, sync::atomic::Ordering, time::Duration};

use ipnet::IpNet;

use super::{BANNED_UNTIL, RateLimiter, book::Book, source::Source};
use crate::{
    Error, Result,
    abi::rate_limiter::{BAN_IPV6, BAN_TIME},
    flow_table::{Entry, FlowTable, Inserted, KEEP, STALE},
    sys::{self, mmap::LongMapping},
};

/// A source that is cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Ban {
    /// The source: an address, or a prefix where the configuration says so.
    pub source: IpNet,
    /// When it ends, time since boot without suspend (`CLOCK_MONOTONIC`); `None`: when it is lifted.
    pub until: Option<Duration>,
}

impl Ban {
    /// How long it still lasts; `None`: until it is lifted.
    #[must_use]
    pub fn remaining(&self) -> Option<Duration> {
        self.until.map(|until| until.saturating_sub(sys::monotonic()))
    }
}

/// The bans of a [`RateLimiter`]. They end in the kernel, whether a process lives or not.
#[derive(Debug)]
pub struct Bans<'l> {
    limiter: &'l RateLimiter,
}

impl<'l> Bans<'l> {
    pub(super) fn of(limiter: &'l RateLimiter) -> Self {
        Self { limiter }
    }

    /// Bans the source that this address belongs to, for so long or, with `None`, until it is lifted; answers the
    /// ban that there was. It takes the place of that one, also when it ends earlier. Packets of that source are dropped
    /// whatever its tier is.
    ///
    /// # Errors
    /// [`Error::Full`] when there are as many bans as the table can hold there; [`Error::Superseded`].
    pub fn insert(&self, address: IpAddr, time: Option<Duration>) -> Result<Option<Ban>> {
        let limiter = self.limiter;
        // Nobody may be counting anew in between what bans there are, see settle().
        let book = limiter.edit()?;
        let policy = book.plan.policy;
        let source = Source::of(address, &policy);
        let now = nanoseconds(sys::monotonic());
        let until = time.map_or(BAN_TIME, |time| now.saturating_add(nanoseconds(time)).min(BAN_TIME - 1));
        let value = until | if source.is_ipv6() { BAN_IPV6 } else { 0 };
        // First: a ban that nobody looks for is none.
        limiter.announce_ban(Duration::from_nanos(until));
        match put(&limiter.bans, &limiter.ban_addresses, source, value, now) {
            Inserted::New => Ok(None),
            Inserted::Changed(before) => Ok(ban(source.prefix(&policy), before, now)),
            Inserted::Full => Err(Error::Full {
                map: "bans_lines".into(),
                capacity: limiter.bans.shape().capacity(),
                entry: source.prefix(&policy).to_string(),
            }),
        }
    }

    /// Lifts the ban of the source that this address belongs to, and answers it.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn lift(&self, address: IpAddr) -> Result<Option<Ban>> {
        let limiter = self.limiter;
        let mut book = limiter.edit()?;
        let policy = book.plan.policy;
        let source = Source::of(address, &policy);
        let now = nanoseconds(sys::monotonic());
        let mut lifted = None;
        while let Some(entry) = limiter.bans.get(source.ban_key(&limiter.bans)) {
            if limiter.bans.remove(&entry) {
                lifted = ban(source.prefix(&policy), entry.value(), now);
                break;
            }
        }
        if lifted.is_some() {
            self.settle(&mut book)?;
        }
        Ok(lifted)
    }

    /// Lifts all bans, and answers how many were in force.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn clear(&self) -> Result<usize> {
        let limiter = self.limiter;
        let mut book = limiter.edit()?;
        let now = nanoseconds(sys::monotonic());
        let lifted = limiter.bans.iter().filter(|entry| limiter.bans.remove(entry));
        let count = lifted.filter(|entry| entry.value() & BAN_TIME > now).count();
        self.settle(&mut book)?;
        Ok(count)
    }

    /// Without bans, packets should not be asked for them. A program may be about to set one meanwhile, so after a grace
    /// period what there is counts again.
    fn settle(&self, book: &mut Book) -> Result<()> {
        let limiter = self.limiter;
        let last = || limiter.bans.iter().map(|entry| entry.value() & BAN_TIME).max().unwrap_or(0);
        let word = &limiter.shared.as_ref()[BANNED_UNTIL];
        let before = word.load(Ordering::SeqCst);
        let now = last();
        if now < before && word.compare_exchange(before, now, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            book.wait(&limiter.core)?;
            limiter.announce_ban(Duration::from_nanos(last()));
        }
        Ok(())
    }

    /// The ban of the source that this address belongs to, if one is in force.
    ///
    /// # Errors
    /// None at present.
    pub fn get(&self, address: IpAddr) -> Result<Option<Ban>> {
        let policy = self.limiter.policy();
        let source = Source::of(address, &policy);
        let entry = self.limiter.bans.get(source.ban_key(&self.limiter.bans));
        let now = nanoseconds(sys::monotonic());
        Ok(entry.and_then(|entry| ban(source.prefix(&policy), entry.value(), now)))
    }

    /// The bans in force, by source.
    ///
    /// # Errors
    /// None at present.
    pub fn iter(&self) -> Result<impl Iterator<Item = Ban> + use<>> {
        let limiter = self.limiter;
        let policy = limiter.policy();
        let now = nanoseconds(sys::monotonic());
        let bans = all(&limiter.bans, &limiter.ban_addresses);
        let mut bans: Vec<_> = bans.filter_map(|(source, value)| ban(source.prefix(&policy), value, now)).collect();
        bans.sort_by_key(|ban| ban.source);
        Ok(bans.into_iter())
    }

    /// How many there are in force.
    ///
    /// # Errors
    /// None at present.
    pub fn len(&self) -> Result<usize> {
        Ok(self.iter()?.count())
    }

    /// Whether none is in force.
    ///
    /// # Errors
    /// None at present.
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Sets a ban, in a table and the addresses beside it.
fn put(table: &FlowTable<LongMapping>, addresses: &LongMapping, source: Source, value: u64, now: u64) -> Inserted {
    let rank = |value: u64| match value & BAN_TIME {
        until if until <= now => STALE | (now - until),
        _ => KEEP,
    };
    let beside = |slot: u32| {
        let words = &addresses.as_ref()[slot as usize * 2..];
        words.iter().zip(source.words()).for_each(|(to, word)| to.store(word, Ordering::Release));
    };
    table.insert(source.ban_key(table), value, rank, |_, _| {}, beside)
}

/// All bans of a table, those that are over too.
fn all(table: &FlowTable<LongMapping>, addresses: &LongMapping) -> impl Iterator<Item = (Source, u64)> {
    let read = |entry: Entry| {
        let at = entry.slot as usize * 2;
        let words = [at, at + 1].map(|at| addresses.as_ref()[at].load(Ordering::Acquire));
        let source = Source::from_words(words, entry.value() & BAN_IPV6 != 0);
        table.is_unchanged(&entry).then(|| (source, entry.value()))
    };
    table.iter().filter_map(read)
}

/// Bans of a smaller table that go into a larger one.
pub(super) struct Carried {
    old: (FlowTable<LongMapping>, LongMapping),
    new: (FlowTable<LongMapping>, LongMapping),
    /// What is there already, by source.
    known: BTreeMap<([u64; 2], bool), u64>,
}

impl Carried {
    pub(super) fn of(old: (FlowTable<LongMapping>, LongMapping), new: (FlowTable<LongMapping>, LongMapping)) -> Self {
        Self { old, new, known: BTreeMap::new() }
    }

    /// Brings over what has come or changed since the last time: what was lifted in the larger table stays lifted.
    pub(super) fn carry(&mut self) {
        let now = nanoseconds(sys::monotonic());
        for (source, value) in all(&self.old.0, &self.old.1).filter(|(_, value)| value & BAN_TIME > now) {
            if self.known.insert((source.words(), source.is_ipv6()), value) != Some(value) {
                // A larger table has room for them.
                let _ = put(&self.new.0, &self.new.1, source, value, now);
            }
        }
    }
}

/// `None` when it is over.
fn ban(source: IpNet, value: u64, now: u64) -> Option<Ban> {
    let until = match value & BAN_TIME {
        BAN_TIME => None,
        until if until <= now => return None,
        until => Some(Duration::from_nanos(until)),
    };
    Some(Ban { source, until })
}
