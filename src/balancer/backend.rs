//! Backends as both balancers list them.

use crate::Count;

/// What a backend may be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BackendState {
    /// New flows, by its weight.
    Active,
    /// No new flows; those that it has stay. Setting its weight brings it back.
    Draining,
    /// As draining; it goes when it can have no flows any more. Adding its address again makes a new backend.
    Leaving,
    /// Nothing. It is listed for as long as its number may still be remembered somewhere.
    Killed,
}

impl BackendState {
    /// Lower-case name: `active`, `draining`, `leaving`, `killed`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Draining => "draining",
            Self::Leaving => "leaving",
            Self::Killed => "killed",
        }
    }
}

impl std::fmt::Display for BackendState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// What a backend was given since it was added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BackendStats {
    /// Packets, and the bytes of their frames as they came in.
    pub forwarded: Count,
    /// TCP: SYNs among them, repeated ones too.
    pub new_flows: u64,
}

/// What became of a service's packets since it was added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServiceStats {
    /// Packets that were for the service, whatever became of them, and the bytes of their frames.
    pub received: Count,
    /// TCP: SYNs among them, repeated ones too.
    pub new_flows: u64,
    /// Packets that did not fit the way to the backend and were answered with Fragmentation Needed or Packet Too Big.
    pub too_big: u64,
    /// Packets for which there was no backend.
    pub no_backend: u64,
}
