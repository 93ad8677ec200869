//! What a rate limiter reports: [`RateEvent`].

use std::fmt;

use super::{Limit, Meter, Scope};
use crate::PacketEvent;

/// A source has exceeded its limit. Reported when it does so for the first time since it was last idle, and when it is
/// banned; at most so many a second as `RateLimiterConfig::events` says.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RateEvent {
    /// The packet that was too much.
    pub packet: PacketEvent,
    /// The traffic that is limited; `None` when that limit is gone already.
    pub scope: Option<Scope>,
    /// What there was too much of.
    pub meter: Meter,
    /// The limit that was exceeded; `None` when it is gone already.
    pub limit: Option<Limit>,
    /// Whether the source was banned.
    pub banned: bool,
}

/// One line, as the packet's.
impl fmt::Display for RateEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.packet)?;
        if let (Some(scope), Some(limit)) = (self.scope, self.limit) {
            write!(f, " (more than {limit} of {scope})")?;
        }
        f.write_str(if self.banned { ", source banned" } else { "" })
    }
}
