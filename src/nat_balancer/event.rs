//! What happened to connections: [`NatEvent`].

use std::{fmt, net::SocketAddr, time::Duration};

use crate::{
    Reason,
    abi::{
        nat_balancer::{EVENT_CLOSED, EVENT_NEW, EVENT_REFUSED, Event, IPV6},
        packet::{NETWORK_IPV4, NETWORK_IPV6},
    },
    balancer::ServiceAddr,
};

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum NatEventKind {
    /// A connection was opened.
    New,
    /// Both sides, or a RST, ended one. Silence is not reported.
    Closed,
    /// One was refused, for this reason.
    Refused(Reason),
}

/// Something that happened to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct NatEvent {
    /// Since boot, without suspend (`CLOCK_MONOTONIC`).
    pub time: Duration,
    /// What happened.
    pub kind: NatEventKind,
    /// What the client talks to; `None` when it has been removed meanwhile.
    pub service: Option<ServiceAddr>,
    /// The client.
    pub client: SocketAddr,
    /// The port that the backend sees as the client's; 0 for one that was refused.
    pub port: u16,
    /// The backend; `None` for one that was refused, or when it has gone meanwhile.
    pub backend: Option<SocketAddr>,
}

impl NatEvent {
    pub(super) fn decode(event: &Event, service: Option<ServiceAddr>, backend: Option<SocketAddr>) -> Option<Self> {
        let family = if event.flags & IPV6 != 0 { NETWORK_IPV6 } else { NETWORK_IPV4 };
        let kind = match event.kind {
            EVENT_NEW => NatEventKind::New,
            EVENT_CLOSED => NatEventKind::Closed,
            EVENT_REFUSED => NatEventKind::Refused(Reason::from_code(u8::try_from(event.reason).ok()?)?),
            _ => return None,
        };
        Some(Self {
            time: Duration::from_nanos(event.timestamp),
            kind,
            service,
            client: SocketAddr::new(event.client.get(family.into())?, u16::from_be(event.client_port)),
            port: u16::from_be(event.port),
            backend,
        })
    }
}

impl fmt::Display for NatEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            NatEventKind::New => write!(f, "new: {}", self.client)?,
            NatEventKind::Closed => write!(f, "closed: {}", self.client)?,
            NatEventKind::Refused(reason) => write!(f, "refused ({reason}): {}", self.client)?,
        }
        if let Some(service) = self.service {
            write!(f, " -> {service}")?;
        }
        if let Some(backend) = self.backend {
            write!(f, ": {backend}")?;
        }
        Ok(())
    }
}
