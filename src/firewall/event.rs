//! What a firewall reports: [`FirewallEvent`].

use std::fmt;

use super::Selector;
use crate::PacketEvent;

/// A packet that was dropped, or would have been.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FirewallEvent {
    /// The packet.
    pub packet: PacketEvent,
    /// What the rule that decided is about; `None` when the default or another reason did, and when the rule
    /// is in no list any more.
    pub rule: Option<Selector>,
}

/// One line, as the packet's.
impl fmt::Display for FirewallEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.packet)?;
        self.rule.map_or(Ok(()), |rule| write!(f, " (rule {rule})"))
    }
}
