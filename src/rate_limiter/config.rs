//! How a rate limiter is made: [`RateLimiterConfig`].

use std::time::Duration;

use super::{Limit, Rate, Scope};
use crate::{
    Decision, Error, Result,
    abi::rate_limiter::{FULL_DROP, FULL_PASS, FULL_SHARE, Policy, SCOPES},
    flow_table::Shape,
    sys,
};

#[allow(unused_imports, reason = "for links in the documentation")]
use super::RateLimiter;

/// Lines for the roots of the tiers in force and of those that are built aside; and what a prefix takes in both on
/// average, in the worst lists that we know: hosts scattered over all addresses take two each, and as much again in the
/// other list.
const LINES_OF_ROOTS: u32 = 16_384;
const LINES_A_TIER: u32 = 5;
/// What the program can count, 2^30 ns a step.
const PROTECT_MAX: Duration = Duration::from_secs(1000);

/// What becomes of packets whose source finds no place in the table, because all that are there are in use. Each is counted as
/// [`Reason::UnknownSource`](crate::Reason::UnknownSource).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TableFull {
    /// They are dropped: closed.
    Drop,
    /// They pass: open.
    Pass,
    /// They share this rate, in packets, all of them together; the rest is dropped.
    Share(Rate),
}

/// When a source is cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub struct BanPolicy {
    /// A source is banned when it sends more than so many times its limit for a second; at least 2.
    #[cfg_attr(feature = "serde", serde(default = "twice"))]
    pub factor: u32,
    /// For so long; in files, in seconds.
    #[cfg_attr(feature = "serde", serde(with = "crate::text::seconds"))]
    pub duration: Duration,
}

#[cfg(feature = "serde")]
fn twice() -> u32 {
    2
}

impl BanPolicy {
    /// Who sends more than twice its limit for a second is banned for so long.
    #[must_use]
    pub const fn of(duration: Duration) -> Self {
        Self { factor: 2, duration }
    }
}

/// How a [`RateLimiter`] is made.
#[derive(Clone, Debug)]
#[non_exhaustive]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default, deny_unknown_fields))]
pub struct RateLimiterConfig {
    /// The value's name; `rate_limiter` by default.
    pub name: String,
    /// The limits of sources that no tier is about, at most eight; none by default. Can be changed later.
    #[cfg_attr(feature = "serde", serde(with = "super::text::limits"))]
    pub limits: Vec<(Scope, Limit)>,
    /// Bits of an IPv4 address that make a source, 1 to 32; 32 by default.
    pub prefix_v4: u8,
    /// Bits of an IPv6 address that make a source, 1 to 128; 64 by default, since who has a /64 has all addresses in it.
    pub prefix_v6: u8,
    /// Sources that are remembered at once, each counted once for every limit that it is under; 131,072 by default, at most
    /// 2^26. 16 bytes each are taken at once (32 when `prefix_v6` is more than 64). Up to half of them, every one
    /// finds a place.
    pub sources: u32,
    /// What becomes of packets whose source finds no place; they share 10,000 a second by default.
    pub full: TableFull,
    /// For so long after its last packet, a source that was seen twice keeps its place against new ones; 60 s by default,
    /// at most 1000 s. One that has not used up what it may send at once always keeps it.
    #[cfg_attr(feature = "serde", serde(with = "crate::text::seconds"))]
    pub protect: Duration,
    /// When a source is cut off for exceeding a limit; never by default.
    pub ban: Option<BanPolicy>,
    /// Bans that there can be, whoever has set them; 65,536 by default, at most 2^24. 32 bytes each are taken at once. A
    /// ban that finds no place is not set, and counted: the source is limited as before.
    pub bans: u32,
    /// Prefixes with a tier that there can be, of both families together; 1,024 by default, at most 2^24. 368 bytes each
    /// are taken at once.
    pub tiers: u32,
    /// What happens to packets deeper than the parser looks: more than two VLAN tags or eight IPv6 extension headers, or
    /// headers that a driver put into a second buffer. Deny by default, so that no limit can be passed by that way.
    pub unsupported: Decision,
    /// Whether IPv6 neighbour discovery from the link is exempt; true by default. Without it the host cannot be reached
    /// at all. ARP, and other frames that are not IP, are never limited.
    pub pass_neighbours: bool,
    /// Whether nothing is dropped, and packets that would be are counted as
    /// [`Reason::WouldDrop`](crate::Reason::WouldDrop); false by default. Malformed packets are dropped in any case. Can
    /// be changed later.
    pub count_only: bool,
    /// Events a second at most, over all sources; 100 by default, 0 for none.
    pub events: u32,
    /// Bytes of the ring buffer for events, a power of two of at least 4096; 256 KiB by default. An event takes 104.
    pub ring_bytes: u32,
}

impl Default for RateLimiterConfig {
    fn default() -> Self {
        Self {
            name: "rate_limiter".into(),
            limits: Vec::new(),
            prefix_v4: 32,
            prefix_v6: 64,
            sources: 1 << 17,
            full: TableFull::Share(Rate::per_second(10_000)),
            protect: Duration::from_secs(60),
            ban: None,
            bans: 1 << 16,
            tiers: 1024,
            unsupported: Decision::Deny,
            pass_neighbours: true,
            count_only: false,
            events: 100,
            ring_bytes: 1 << 18,
        }
    }
}

macro_rules! setters {
    ($($method:ident($argument:ident: $kind:ty);)+) => {
        $(
            #[doc = concat!("Sets [`RateLimiterConfig::", stringify!($method), "`].")]
            #[must_use]
            pub fn $method(mut self, $argument: $kind) -> Self {
                self.$method = $argument.into();
                self
            }
        )+
    };
}

impl RateLimiterConfig {
    setters! {
        name(name: impl Into<String>);
        prefix_v4(bits: u8);
        prefix_v6(bits: u8);
        sources(sources: u32);
        full(policy: TableFull);
        protect(time: Duration);
        ban(policy: impl Into<Option<BanPolicy>>);
        bans(bans: u32);
        tiers(prefixes: u32);
        unsupported(decision: Decision);
        pass_neighbours(pass: bool);
        count_only(only: bool);
        events(a_second: u32);
        ring_bytes(bytes: u32);
    }

    /// Adds to [`RateLimiterConfig::limits`].
    #[must_use]
    pub fn limit(mut self, scope: Scope, limit: impl Into<Limit>) -> Self {
        self.limits.push((scope, limit.into()));
        self
    }
}

/// Entries of the maps, the shapes of the flow tables, and the policy to begin with.
pub(super) struct Sizes {
    pub(super) maps: [(&'static str, u32); 7],
    pub(super) buckets: Shape,
    pub(super) bans: Shape,
    pub(super) policy: Policy,
}

impl RateLimiterConfig {
    pub(super) fn sizes(&self) -> Result<Sizes> {
        let wrong = |what, value: String, expected| Err(Error::Invalid { what, value, expected });
        for (what, value, most, expected) in [
            ("sources", self.sources, 1 << 26, "1 to 67108864"),
            ("bans", self.bans, 1 << 24, "1 to 16777216"),
            ("tiers", self.tiers, 1 << 24, "1 to 16777216 prefixes"),
            ("prefix_v4", self.prefix_v4.into(), 32, "1 to 32 bits"),
            ("prefix_v6", self.prefix_v6.into(), 128, "1 to 128 bits"),
        ] {
            if !(1..=most).contains(&value) {
                return wrong(what, value.to_string(), expected);
            }
        }
        if !self.ring_bytes.is_power_of_two() || self.ring_bytes < 4096 {
            return wrong("ring_bytes", self.ring_bytes.to_string(), "a power of two of at least 4096");
        }
        if self.limits.len() > SCOPES {
            return wrong("limits", format!("{} scopes", self.limits.len()), "at most 8");
        }
        if self.protect > PROTECT_MAX {
            return wrong("protect", format!("{:?}", self.protect), "at most 1000 s");
        }
        if let Some(ban) = self.ban.filter(|ban| ban.factor < 2 || ban.duration.is_zero()) {
            return wrong("ban", format!("{ban:?}"), "a factor of at least 2 and some time");
        }
        let (buckets, bans) = (Shape::of_capacity(self.sources), Shape::of_capacity(self.bans));
        let wide = self.prefix_v6 > 64;
        let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        Ok(Sizes {
            maps: [
                ("buckets_lines", buckets.total()),
                ("bucket_addresses", if wide { buckets.slots() } else { 1 }),
                ("bans_lines", bans.total()),
                ("ban_addresses", bans.slots()),
                ("tiers", 2 * self.tiers),
                ("lpm_lines", LINES_OF_ROOTS + LINES_A_TIER * self.tiers),
                ("events", self.ring_bytes),
            ],
            buckets,
            bans,
            policy: Policy {
                count_only: self.count_only.into(),
                unsupported: self.unsupported.action(),
                neighbours: if self.pass_neighbours { Decision::Allow } else { Decision::Deny }.action(),
                full: match self.full {
                    TableFull::Drop => FULL_DROP,
                    TableFull::Pass => FULL_PASS,
                    TableFull::Share(_) => FULL_SHARE,
                },
                events: u32::from(self.events > 0),
                mask4: u32::MAX.checked_shl(32 - u32::from(self.prefix_v4)).unwrap_or(0).to_be_bytes(),
                wide6: wide.into(),
                mask6: u128::MAX.checked_shl(128 - u32::from(self.prefix_v6)).unwrap_or(0).to_be_bytes(),
                protect: nanoseconds(self.protect),
                ban: self.ban.map_or(0, |ban| nanoseconds(ban.duration).min(1 << 58)),
                ban_factor: self.ban.map_or(0, |ban| ban.factor),
                tick: sys::tick(),
                ..bytemuck::Zeroable::zeroed()
            },
        })
    }
}
