//! Events: the way to a backend has changed.

use std::{fmt, net::IpAddr, time::Duration};

use crate::{abi::dsr_balancer::Event, balancer::ServiceAddr};

/// How a backend can be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Way {
    /// By the MAC of the next hop, on an interface.
    Found {
        /// The backend's, or that of the router before it.
        mac: [u8; 6],
        /// The index of the interface that leads there.
        interface: u32,
    },
    /// The next hop is known but not its MAC: the host's stack is asked to find it out.
    Unresolved {
        /// The index of the interface that leads there.
        interface: u32,
    },
    /// Only through a router, which L2 forwarding cannot use: its packets are dropped.
    OffLink,
    /// Not at all: its packets are dropped.
    NoRoute,
    /// By an interface that only the host's stack can send by, such as a macvlan or a tunnel. The stack sends what is
    /// encapsulated; packets of L2 services are dropped.
    ByStack {
        /// The index of the interface that leads there.
        interface: u32,
    },
    /// By a link that is down: its packets are dropped.
    Down {
        /// The index of the interface that leads there.
        interface: u32,
    },
}

/// The next hop to a backend has changed, as the next packet for the backend has found. The first packet finds one, too. Where a
/// route has several next hops, one of them is told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DsrEvent {
    /// Since boot, without suspend (`CLOCK_MONOTONIC`).
    pub timestamp: Duration,
    /// The service and the backend's address; `None` when it is gone by now.
    pub backend: Option<(ServiceAddr, IpAddr)>,
    /// How it is reached from now on.
    pub way: Way,
    /// The CPU that has noticed.
    pub cpu: u32,
}

impl DsrEvent {
    pub(super) fn decode(event: &Event, backend: Option<(ServiceAddr, IpAddr)>) -> Option<Self> {
        let interface = event.interface;
        let way = match event.state {
            1 => Way::Found { mac: event.mac, interface },
            2 => Way::Unresolved { interface },
            3 => Way::OffLink,
            4 => Way::NoRoute,
            5 => Way::ByStack { interface },
            6 => Way::Down { interface },
            _ => return None,
        };
        Some(Self { timestamp: Duration::from_nanos(event.timestamp), backend, way, cpu: event.cpu })
    }
}

impl fmt::Display for DsrEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.backend {
            Some((service, backend)) => write!(f, "{backend} of {service}: ")?,
            None => f.write_str("a backend that is gone: ")?,
        }
        match self.way {
            Way::Found { mac: [a, b, c, d, e, g], interface } => {
                write!(f, "at {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x} on interface {interface}")
            }
            Way::Unresolved { interface } => write!(f, "being looked for on interface {interface}"),
            Way::OffLink => f.write_str("behind a router, where L2 forwarding does not reach"),
            Way::NoRoute => f.write_str("no route"),
            Way::ByStack { interface } => write!(f, "by the host's stack on interface {interface}"),
            Way::Down { interface } => write!(f, "behind interface {interface}, which is down"),
        }
    }
}
