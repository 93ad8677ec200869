//! The limits and tiers of a rate limiter as collections.

use std::{fmt, net::IpAddr};

use ipnet::IpNet;

use super::{Limit, RateLimiter, Scope};
use crate::{Result, address::Unmapped as _};

/// The limits by scope of a [`RateLimiter`], at most eight. A change is seen by the next packet and takes some 10 ms to
/// return, twice that where a scope had no limit before. Sources keep what they have used up; but who had used up more
/// than lasts for the new burst and a second begins anew.
#[derive(Debug)]
pub struct Limits<'l> {
    limiter: &'l RateLimiter,
}

impl<'l> Limits<'l> {
    pub(super) fn of(limiter: &'l RateLimiter) -> Self {
        Self { limiter }
    }

    /// Limits a scope, and answers the limit that it had.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) for a rate that cannot be counted or a port of 0;
    /// [`Error::Full`](crate::Error::Full) for a ninth scope; [`Error::Map`](crate::Error::Map). Nothing was
    /// changed then.
    pub fn insert(&self, scope: Scope, limit: impl Into<Limit>) -> Result<Option<Limit>> {
        let limiter = self.limiter;
        limiter.edit()?.set_limit(&limiter.core, scope, limit.into(), |slot| limiter.forget_scope(slot))
    }

    /// Limits a scope no longer, and answers the limit that it had.
    ///
    /// # Errors
    /// [`Error::Map`](crate::Error::Map).
    pub fn remove(&self, scope: Scope) -> Result<Option<Limit>> {
        self.limiter.edit()?.remove_limit(&self.limiter.core, scope)
    }

    /// The limit of a scope.
    #[must_use]
    pub fn get(&self, scope: Scope) -> Option<Limit> {
        self.iter().find(|(limited, _)| *limited == scope).map(|(_, limit)| limit)
    }

    /// The scopes that are limited.
    pub fn iter(&self) -> impl Iterator<Item = (Scope, Limit)> + use<> {
        self.limiter.book().plan.scopes.into_iter().flatten()
    }

    /// How many scopes are limited.
    #[must_use]
    pub fn len(&self) -> usize {
        self.iter().count()
    }

    /// Whether nothing is limited.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What the sources in a prefix may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Tier {
    /// This limit, in the place of that of each scope.
    Limited(Limit),
    /// Everything.
    Exempt,
    /// Nothing.
    Blocked,
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Limited(limit) => limit.fmt(f),
            Self::Exempt => f.write_str("exempt"),
            Self::Blocked => f.write_str("blocked"),
        }
    }
}

/// What [`Tiers::replace_all`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TiersReplaced {
    /// Prefixes that had no tier.
    pub added: usize,
    /// Prefixes that had another one.
    pub changed: usize,
    /// Prefixes that had the same.
    pub kept: usize,
    /// Prefixes that have none any more.
    pub removed: usize,
}

/// The tiers of a [`RateLimiter`]: the longest prefix that covers a source decides. At most 61 different limits. Here and
/// in [`Bans`](crate::Bans), what is mapped into IPv6 (`::ffff:192.0.2.7`, `::ffff:192.0.2.0/120`) is IPv4.
#[derive(Debug)]
pub struct Tiers<'l> {
    limiter: &'l RateLimiter,
}

impl<'l> Tiers<'l> {
    pub(super) fn of(limiter: &'l RateLimiter) -> Self {
        Self { limiter }
    }

    /// Gives the sources in a prefix a tier, and answers the one that the prefix had. Host bits are cleared.
    ///
    /// # Errors
    /// [`Error::Full`](crate::Error::Full) when there is no room for another prefix, or another limit;
    /// [`Error::Invalid`](crate::Error::Invalid) for a rate that cannot be counted; [`Error::Map`](crate::Error::Map).
    /// Nothing was changed then.
    pub fn insert(&self, prefix: IpNet, tier: Tier) -> Result<Option<Tier>> {
        self.limiter.edit()?.insert_tier(&self.limiter.core, prefix.unmapped(), tier)
    }

    /// Removes a prefix, and answers the tier that it had.
    ///
    /// # Errors
    /// As [`Tiers::insert`].
    pub fn remove(&self, prefix: IpNet) -> Result<Option<Tier>> {
        self.limiter.edit()?.remove_tier(&self.limiter.core, prefix.unmapped())
    }

    /// The tier of exactly this prefix.
    #[must_use]
    pub fn get(&self, prefix: IpNet) -> Option<Tier> {
        self.limiter.book().tier(prefix.unmapped())
    }

    /// The prefix that decides over packets from this address, and its tier.
    #[must_use]
    pub fn matching(&self, source: IpAddr) -> Option<(IpNet, Tier)> {
        self.limiter.book().covering(source.unmapped().into(), true)
    }

    /// All prefixes, in order.
    pub fn iter(&self) -> impl Iterator<Item = (IpNet, Tier)> + use<> {
        let tiers: Vec<_> = self.limiter.book().tiers().collect();
        tiers.into_iter()
    }

    /// How many prefixes have a tier.
    #[must_use]
    pub fn len(&self) -> usize {
        self.iter().count()
    }

    /// Whether no prefix has one.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Puts these prefixes in the place of all others, at once: the new list is built aside, and each packet is judged by
    /// the old one or the new one.
    ///
    /// # Errors
    /// [`Error::Conflict`](crate::Error::Conflict) when a prefix stands twice with different tiers; else as
    /// [`Tiers::insert`]. The old list is in force then, unchanged.
    pub fn replace_all(&self, tiers: impl IntoIterator<Item = (IpNet, Tier)>) -> Result<TiersReplaced> {
        let tiers = tiers.into_iter().map(|(net, tier)| (net.unmapped(), tier));
        let done = self.limiter.edit()?.replace_tiers(&self.limiter.core, tiers)?;
        Ok(TiersReplaced { added: done.added, changed: done.changed, kept: done.kept, removed: done.removed })
    }
}
