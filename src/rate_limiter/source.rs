//! Sources: which key one has, what its buckets hold, and who has used up most.

use std::{
    collections::HashSet,
    net::IpAddr,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use ipnet::IpNet;

use super::{
    Meter, RateLimiter, Scope, Tier,
    book::{self, Book},
    rate::shifts,
};
use crate::{
    Result,
    abi::rate_limiter::{IPV6, LEAD_END, Limit as Encoded, METERS, Policy, SCOPES, TAG_SHIFT, TIME_MASK, UNIT_SHIFT},
    address::Unmapped as _,
    flow_table::{Entry, FlowTable, KEY_MIN},
    sys::{self, mmap::LongMapping},
};

/// What a source has used up of a limit.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Bucket {
    /// The source: an address, or a prefix where the configuration says so.
    pub source: IpNet,
    /// The traffic that is limited.
    pub scope: Scope,
    /// What is measured.
    pub meter: Meter,
    /// The part of the burst that is used up, from 0 to 1; 1 for who sends as much as it may or more.
    pub level: f64,
    /// The time after which the source may send a whole burst again, if it is silent.
    pub refills_in: Duration,
}

impl RateLimiter {
    /// What a source has used up, by limit: the source that this address belongs to. Empty when the limiter has not heard
    /// of it for a while.
    ///
    /// # Errors
    /// None at present.
    pub fn source(&self, address: IpAddr) -> Result<Vec<Bucket>> {
        let (source, tags) = self.keys(address);
        let found = tags.filter_map(|key| self.buckets.get(key)).filter_map(|entry| self.found(&entry));
        Ok(self.describe(found.filter(|found| found.source.prefix(&self.policy()) == source)))
    }

    /// Forgets what a source has used up: it may send a whole burst again. Answers whether anything was known of it. A ban
    /// stays, see [`Bans::lift`](crate::Bans::lift).
    ///
    /// # Errors
    /// [`Error::Superseded`](crate::Error::Superseded).
    pub fn reset(&self, address: IpAddr) -> Result<bool> {
        let keys: Vec<u64> = self.keys(address).1.collect();
        let _edit = self.edit()?;
        let mut known = false;
        for key in keys {
            while let Some(entry) = self.buckets.get(key) {
                // A packet may have come in between: once more.
                if self.buckets.remove(&entry) {
                    known = true;
                    break;
                }
            }
        }
        Ok(known)
    }

    /// Removes the buckets of a scope's place that is not in use.
    pub(super) fn forget_scope(&self, slot: usize) {
        let of_scope = |entry: &Entry| (entry.value() >> TAG_SHIFT) as usize % SCOPES == slot;
        for entry in self.buckets.iter().filter(of_scope) {
            // Nobody charges it any more, so it is as it was read; a new key may have taken its way, and stays.
            self.buckets.remove(&entry);
        }
    }

    /// The sources that have used up most of a limit, each with its fullest bucket, at most so many. Reads the
    /// whole table: milliseconds for a hundred thousand sources.
    ///
    /// # Errors
    /// None at present.
    pub fn top(&self, count: usize) -> Result<Vec<Bucket>> {
        let mut buckets = self.describe(self.buckets.iter().filter_map(|entry| self.found(&entry)));
        buckets.sort_by(|a, b| {
            b.level.total_cmp(&a.level).then(b.refills_in.cmp(&a.refills_in)).then(a.source.cmp(&b.source))
        });
        let mut seen = HashSet::new();
        buckets.retain(|bucket| bucket.level > 0.0 && seen.insert(bucket.source));
        buckets.truncate(count);
        Ok(buckets)
    }

    /// Buckets in the table, those among them that are idle. Reads the whole table.
    #[must_use]
    pub fn tracked(&self) -> usize {
        self.buckets.len()
    }

    /// The prefix that an address belongs to, and the keys of all buckets that it may have.
    fn keys(&self, address: IpAddr) -> (IpNet, impl Iterator<Item = u64> + '_) {
        let policy = self.policy();
        let source = Source::of(address, &policy);
        let tags = (0..SCOPES * METERS).map(|at| tag(at % SCOPES, at / SCOPES));
        (source.prefix(&policy), tags.map(move |tag| source.key(&self.buckets, tag)))
    }

    fn found(&self, entry: &Entry) -> Option<Found> {
        let beside: &[AtomicU64] = self.bucket_addresses.as_ref();
        let wide = self.policy().wide6 != 0;
        let found = Found::of(entry, &self.buckets, wide.then_some(beside));
        self.buckets.is_unchanged(entry).then_some(found)
    }

    fn describe(&self, found: impl Iterator<Item = Found>) -> Vec<Bucket> {
        let now = sys::monotonic();
        let plan_of = |found: &Found, book: &Book| {
            let (scope, _) = book.plan.scopes[found.scope]?;
            let meter = *Meter::ALL.get(found.meter)?;
            let source = found.source.prefix(&book.plan.policy);
            let class = book.covering(source, true).map(|(_, tier)| tier);
            let limit = match class {
                Some(Tier::Limited(limit)) => limit,
                Some(_) => return None,
                None => book.plan.limit(book::NO_TIER, found.scope)?,
            };
            let encoded = limit.encode(meter, book.plan.policy.tick).ok()??;
            let (level, refills_in) = (found.level(&encoded, now), found.lead(&encoded, now));
            Some(Bucket { source, scope, meter, level, refills_in })
        };
        let found: Vec<_> = found.collect();
        let book = self.book();
        found.iter().filter_map(|found| plan_of(found, &book)).collect()
    }
}

/// A source as the program has it: masked, network byte order in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Source {
    high: u64,
    low: u64,
    ipv6: bool,
    wide: bool,
}

impl Source {
    pub(super) fn of(address: IpAddr, policy: &Policy) -> Self {
        let mask = |bytes: [u8; 16]| -> [u8; 16] { std::array::from_fn(|at| bytes[at] & policy.mask6[at]) };
        match address.unmapped() {
            IpAddr::V4(v4) => {
                let masked = u32::from_ne_bytes(v4.octets()) & u32::from_ne_bytes(policy.mask4);
                Self { high: masked.into(), low: 0, ipv6: false, wide: false }
            }
            IpAddr::V6(v6) => {
                let [high, low]: [u64; 2] = bytemuck::cast(mask(v6.octets()));
                let wide = policy.wide6 != 0;
                Self { high, low: if wide { low } else { 0 }, ipv6: true, wide }
            }
        }
    }

    /// `wide` does not matter for a source that is told to somebody.
    pub(super) fn from_words(words: [u64; 2], ipv6: bool) -> Self {
        Self { high: words[0], low: words[1], ipv6, wide: false }
    }

    pub(super) fn words(&self) -> [u64; 2] {
        [self.high, self.low]
    }

    pub(super) fn is_ipv6(&self) -> bool {
        self.ipv6
    }

    pub(super) fn prefix(&self, policy: &Policy) -> IpNet {
        let (address, length) = if self.ipv6 {
            let octets: [u8; 16] = bytemuck::cast([self.high, self.low]);
            (IpAddr::from(octets), u128::from_be_bytes(policy.mask6).count_ones())
        } else {
            (IpAddr::from((self.high as u32).to_ne_bytes()), u32::from_be_bytes(policy.mask4).count_ones())
        };
        IpNet::new(address, length as u8).unwrap_or_else(|_| address.into()).trunc()
    }

    fn hash(&self, table: &FlowTable<LongMapping>, last: u64) -> u64 {
        let halves = |word: u64| [word as u32, (word >> 32) as u32];
        let ([a, b], [c, d]) = (halves(self.high), halves(self.low));
        table.secret().hash(&[a, b, c, d, last as u32])
    }

    /// As `rate_key`.
    pub(super) fn key(&self, table: &FlowTable<LongMapping>, tag: u64) -> u64 {
        let secret = table.secret();
        match (self.ipv6, self.wide) {
            (false, _) => secret.key(self.high | tag << 32),
            (true, true) => self.hash(table, tag),
            (true, false) => {
                let key = secret.key(self.high ^ spread(table, tag));
                if key < KEY_MIN { key + KEY_MIN } else { key }
            }
        }
    }

    /// As `ban_key`.
    pub(super) fn ban_key(&self, table: &FlowTable<LongMapping>) -> u64 {
        self.hash(table, self.ipv6.into())
    }
}

fn spread(table: &FlowTable<LongMapping>, tag: u64) -> u64 {
    (tag + 1).wrapping_mul(table.secret().words()[4])
}

pub(super) fn tag(scope: usize, meter: usize) -> u64 {
    scope as u64 | (meter as u64) << 3
}

/// A bucket as it is found in the table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    pub(super) source: Source,
    pub(super) scope: usize,
    pub(super) meter: usize,
    value: u64,
}

impl Found {
    /// `addresses`: by slot, where sources are wider than a key.
    pub(super) fn of(entry: &Entry, table: &FlowTable<LongMapping>, addresses: Option<&[AtomicU64]>) -> Self {
        let value = entry.value();
        let tag = value >> TAG_SHIFT;
        let source = match (value & IPV6 != 0, addresses) {
            (false, _) => {
                let number = table.secret().number(entry.key).unwrap_or(0);
                Source::from_words([number & 0xffff_ffff, 0], false)
            }
            (true, None) => {
                let high = table.secret().scrambled_from(entry.key) ^ spread(table, tag);
                Source::from_words([high, 0], true)
            }
            (true, Some(addresses)) => {
                let at = entry.slot as usize * 2;
                let word = |at: usize| addresses[at].load(Ordering::Acquire);
                Source::from_words([word(at), word(at + 1)], true)
            }
        };
        Self { source, scope: tag as usize % SCOPES, meter: (tag >> 3) as usize % METERS, value }
    }

    /// How far the arrival time is ahead; zero when idle, as `gcra_lead` has it: what is beyond any lead of that limit is the
    /// time of a bucket that was idle for long.
    fn lead(&self, limit: &Encoded, now: Duration) -> Duration {
        let lead = u64::try_from(lead_ns(self.value, now.as_nanos() as u64)).unwrap_or(0);
        let most = (u128::from(limit.most) << limit.right) >> limit.left;
        Duration::from_nanos(if u128::from(lead) > most { 0 } else { lead })
    }

    /// The part of a limit's burst that is used up.
    fn level(&self, limit: &Encoded, now: Duration) -> f64 {
        let depth = (u128::from(limit.depth) << limit.right) >> limit.left;
        (self.lead(limit, now).as_nanos() as f64 / depth.max(1) as f64).min(1.0)
    }
}

/// As `gcra_lead_ns`.
fn lead_ns(bucket: u64, now: u64) -> i64 {
    let (left, right) = shifts((bucket >> UNIT_SHIFT) as u32);
    let lead = bucket.wrapping_sub((now << left) >> right);
    let lead = (lead.wrapping_sub(LEAD_END + 1) & TIME_MASK) as i64 + LEAD_END as i64 - TIME_MASK as i64;
    (lead << right) >> left
}
