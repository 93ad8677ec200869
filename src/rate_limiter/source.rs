//! Sources: which key one has, and what its buckets hold.

use std::{
    net::IpAddr,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use ipnet::IpNet;

use super::{Meter, Scope, rate::shifts};
use crate::{
    abi::rate_limiter::{IPV6, Limit as Encoded, METERS, Policy, SCOPES, TAG_SHIFT, TIME_BITS, TIME_MASK, UNIT_SHIFT},
    flow_table::{Entry, FlowTable, KEY_MIN},
    sys::mmap::LongMapping,
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
        match address {
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

    /// How far the arrival time is ahead; zero when idle.
    pub(super) fn lead(&self, now: Duration) -> Duration {
        Duration::from_nanos(lead_ns(self.value, now.as_nanos() as u64).max(0).unsigned_abs())
    }

    /// The part of a limit's burst that is used up.
    pub(super) fn level(&self, limit: &Encoded, now: Duration) -> f64 {
        let depth = (u128::from(limit.depth) << limit.right) >> limit.left;
        (self.lead(now).as_nanos() as f64 / depth.max(1) as f64).min(1.0)
    }
}

/// As `gcra_lead_ns`.
fn lead_ns(bucket: u64, now: u64) -> i64 {
    let (left, right) = shifts((bucket >> UNIT_SHIFT) as u32);
    let units = ((now << left) >> right) & TIME_MASK;
    let lead = (bucket & TIME_MASK).wrapping_sub(units) << (64 - TIME_BITS);
    ((lead as i64 >> (64 - TIME_BITS)) << right) >> left
}
