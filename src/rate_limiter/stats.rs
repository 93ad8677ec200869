//! What a rate limiter has counted: by scope and tier, and besides packets.

use super::{Limit, RateLimiter, Scope, book};
use crate::{
    Count, Result,
    abi::rate_limiter::{CLASSES, OWN_BANS, OWN_BANS_REFUSED, OWN_EVENTS_HELD, SCOPES},
};

/// What was decided about the traffic of one scope, for the sources of one tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ScopeStats {
    /// The traffic.
    pub scope: Scope,
    /// The limit of these sources.
    pub limit: Limit,
    /// Whether that is the limit of a tier.
    pub tier: bool,
    /// What was within all limits that it was under.
    pub admitted: Count,
    /// What this limit refused, also when the limiter only counts.
    pub refused: Count,
}

/// What happened besides packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RateLimiterCounts {
    /// Bans that the program has set.
    pub bans: u64,
    /// Packets that should have led to a ban, had its table not been full.
    pub bans_refused: u64,
    /// Events that were not reported because there were too many in that second.
    pub events_held: u64,
    /// Events that were not reported because the ring buffer was full.
    pub events_lost: u64,
}

impl RateLimiter {
    /// What was decided, by scope and tier, since the limit of that scope was first set, or a tier first had that limit.
    ///
    /// # Errors
    /// [`Error::Map`](crate::Error::Map).
    pub fn scope_stats(&self) -> Result<Vec<ScopeStats>> {
        let book = self.book();
        let mut stats = Vec::new();
        for class in 0..CLASSES {
            for slot in 0..SCOPES {
                let (Some((scope, _)), Some(limit)) = (book.plan.scopes[slot], book.plan.limit(class, slot)) else {
                    continue;
                };
                let [admitted, refused] = book::counts::of(&self.core, class, slot)?;
                stats.push(ScopeStats { scope, limit, tier: class != book::NO_TIER, admitted, refused });
            }
        }
        Ok(stats)
    }

    /// What happened besides packets, since the tables were created.
    ///
    /// # Errors
    /// [`Error::Map`](crate::Error::Map).
    pub fn counts(&self) -> Result<RateLimiterCounts> {
        let cpus = self.core.counters()?;
        let sum = |own: usize| cpus.iter().map(|cpu| cpu.own[own].packets).sum();
        Ok(RateLimiterCounts {
            bans: sum(OWN_BANS),
            bans_refused: sum(OWN_BANS_REFUSED),
            events_held: sum(OWN_EVENTS_HELD),
            events_lost: self.core.events_lost()?,
        })
    }
}
