//! The account of all probes: how many there were, and which of them this host could not send.

use std::{fmt, io, net::SocketAddr};

/// What came of all probes so far: [`HealthChecks::stats`](super::HealthChecks::stats).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct HealthStats {
    /// Probes that succeeded.
    pub succeeded: u64,
    /// Probes that failed: the target refused, did not reply in time, or replied with another status.
    pub failed: u64,
    /// Attempts at a probe that this host could not send. They count neither for nor against the target, and are
    /// repeated.
    pub unsent: u64,
    /// The last of them.
    pub last_unsent: Option<Unsent>,
    /// Probes under way.
    pub in_flight: usize,
    /// Probes that are due and wait until others are over.
    pub waiting: usize,
}

impl HealthStats {
    pub(super) fn add(&mut self, other: &Self) {
        self.succeeded += other.succeeded;
        self.failed += other.failed;
        self.unsent += other.unsent;
        if other.last_unsent.is_some() {
            self.last_unsent.clone_from(&other.last_unsent);
        }
        self.in_flight += other.in_flight;
        self.waiting += other.waiting;
    }
}

/// A probe that this host could not send.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Unsent {
    /// Whom it was for.
    pub target: SocketAddr,
    /// What is lacking.
    pub reason: UnsentReason,
    /// The kernel's answer.
    pub cause: String,
}

impl fmt::Display for Unsent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { target, reason, cause } = self;
        write!(f, "the probe of {target} could not be sent: {cause}: {}", reason.remedy())
    }
}

/// Why this host could not send a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum UnsentReason {
    /// The process or the host has no file descriptor left (`RLIMIT_NOFILE`, `fs.file-max`).
    Descriptors,
    /// The kernel has no memory for a socket.
    Memory,
    /// No source port is left, or the one that was asked for is in use.
    Port,
    /// The address to connect from is not this host's ([`HealthCheck::source`](super::HealthCheck::source)).
    Source,
    /// The process may not do this ([`HealthCheck::mark`](super::HealthCheck::mark) needs `CAP_NET_ADMIN`, source ports
    /// below 1024 `CAP_NET_BIND_SERVICE`), or this host's packet filter refuses it.
    Permission,
    /// Something else, which the cause tells.
    Other,
}

impl UnsentReason {
    /// Whatever fails before the target is asked is this host's fault.
    pub(super) fn before_connect(error: &io::Error) -> Self {
        Self::of_host(error).unwrap_or(match error.raw_os_error() {
            Some(libc::EADDRINUSE) => Self::Port,
            Some(libc::EADDRNOTAVAIL) => Self::Source,
            Some(libc::EPERM | libc::EACCES) => Self::Permission,
            _ => Self::Other,
        })
    }

    /// Of the errors of connect(2) only some are: no route is a failure, since packets for the target have none either.
    pub(super) fn of_connect(error: &io::Error) -> Option<Self> {
        Self::of_host(error).or(match error.raw_os_error() {
            Some(libc::EADDRINUSE | libc::EADDRNOTAVAIL | libc::EAGAIN) => Some(Self::Port),
            // So netfilter refuses what leaves this host.
            Some(libc::EPERM) => Some(Self::Permission),
            _ => None,
        })
    }

    /// What no target can cause, whatever was tried.
    pub(super) fn of_host(error: &io::Error) -> Option<Self> {
        match error.raw_os_error()? {
            libc::EMFILE | libc::ENFILE => Some(Self::Descriptors),
            // ENOSPC: epoll's `fs.epoll.max_user_watches`.
            libc::ENOMEM | libc::ENOBUFS | libc::ENOSPC => Some(Self::Memory),
            _ => None,
        }
    }

    /// Whether other checks lack it, too.
    pub(super) fn is_everybodys(self) -> bool {
        matches!(self, Self::Descriptors | Self::Memory)
    }

    fn remedy(self) -> &'static str {
        match self {
            Self::Descriptors => "raise the process's limit of open files (RLIMIT_NOFILE)",
            Self::Memory => "the host is out of memory for sockets",
            Self::Port => "no source port is free: widen net.ipv4.ip_local_port_range, or ask for another port",
            Self::Source => "the address to connect from has to be one of this host's",
            Self::Permission => {
                "a mark needs CAP_NET_ADMIN, a source port below 1024 CAP_NET_BIND_SERVICE, or nftables refuses it"
            }
            Self::Other => "it is repeated",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_host_lacks_is_told_from_what_the_target_does() {
        for (errno, before, connect) in [
            (libc::EMFILE, UnsentReason::Descriptors, Some(UnsentReason::Descriptors)),
            (libc::ENFILE, UnsentReason::Descriptors, Some(UnsentReason::Descriptors)),
            (libc::ENOBUFS, UnsentReason::Memory, Some(UnsentReason::Memory)),
            (libc::ENOMEM, UnsentReason::Memory, Some(UnsentReason::Memory)),
            (libc::EADDRINUSE, UnsentReason::Port, Some(UnsentReason::Port)),
            (libc::EADDRNOTAVAIL, UnsentReason::Source, Some(UnsentReason::Port)),
            (libc::EAGAIN, UnsentReason::Other, Some(UnsentReason::Port)),
            (libc::EPERM, UnsentReason::Permission, Some(UnsentReason::Permission)),
            (libc::EACCES, UnsentReason::Permission, None),
            (libc::ECONNREFUSED, UnsentReason::Other, None),
            (libc::ENETUNREACH, UnsentReason::Other, None),
            (libc::EHOSTUNREACH, UnsentReason::Other, None),
            (libc::ETIMEDOUT, UnsentReason::Other, None),
        ] {
            let error = io::Error::from_raw_os_error(errno);
            assert_eq!(UnsentReason::before_connect(&error), before, "{error}");
            assert_eq!(UnsentReason::of_connect(&error), connect, "{error}");
        }
    }
}
