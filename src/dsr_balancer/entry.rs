//! What a balancer tells of its services, backends and flows.

use std::net::IpAddr;

use crate::balancer::{BackendState, BackendStats, ServiceAddr, ServiceStats};

/// How packets get to the backends of a service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "lowercase"))]
pub enum Forwarding {
    /// As they are, with the backend's MAC: it has to be on a link of this host. It holds the virtual address, silently
    /// (`preflight::dsr_backend`).
    #[default]
    L2,
    /// Inside an outer IPv4 or IPv6 header, by the backend's address: anywhere. The backend takes it off, by a tunnel
    /// device (`ipip`, `ip6tnl`, `sit`) or [`TunnelDecap`](crate::TunnelDecap).
    IpIp,
}

/// A service without its address and backends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DsrService {
    /// How packets get to its backends.
    pub forwarding: Forwarding,
    /// Whether all flows of one client address go to the same backend; false by default.
    pub by_source: bool,
    /// With [`Forwarding::IpIp`] and backends with IPv4 addresses: whether outer packets around IPv4 packets that may be
    /// fragmented may be fragmented, too, by this host's stack and on the way. Only for backends whose kernel's tunnel device
    /// takes the outer header off: [`TunnelDecap`](crate::TunnelDecap) cannot put fragments together. False by default: clients
    /// are told by Fragmentation Needed to send less at once.
    pub outer_fragments: bool,
}

impl DsrService {
    /// Backends on this host's links.
    #[must_use]
    pub fn l2() -> Self {
        Self { forwarding: Forwarding::L2, ..Self::default() }
    }

    /// Backends anywhere.
    #[must_use]
    pub fn ipip() -> Self {
        Self { forwarding: Forwarding::IpIp, ..Self::default() }
    }

    /// Sets [`DsrService::by_source`].
    #[must_use]
    pub fn by_source(mut self, by_source: bool) -> Self {
        self.by_source = by_source;
        self
    }

    /// Sets [`DsrService::outer_fragments`].
    #[must_use]
    pub fn outer_fragments(mut self, outer_fragments: bool) -> Self {
        self.outer_fragments = outer_fragments;
        self
    }
}

/// A service as it is listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DsrServiceEntry {
    /// Where clients find it.
    pub address: ServiceAddr,
    /// How it is balanced.
    pub service: DsrService,
    /// Slots of its table.
    pub slots: u32,
    /// Slots that still remember an earlier backend.
    pub slots_in_transition: u32,
    /// What became of its packets.
    pub stats: ServiceStats,
    /// Packets to slots in transition.
    pub packets_in_transition: u64,
    /// Flows that were recorded because their slots were in transition.
    pub recorded: u64,
    /// New flows that went to the earlier backend because they could not be recorded.
    pub unrecorded: u64,
}

/// A backend as it is listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DsrBackendEntry {
    /// Its address.
    pub address: IpAddr,
    /// Its part of new flows, by the sum of weights.
    pub weight: u32,
    /// What it may be given.
    pub state: BackendState,
    /// Tells it from another backend of the same address, before or after.
    pub identity: u32,
    /// Slots whose new flows it gets.
    pub slots: u32,
    /// Slots whose earlier flows it may have.
    pub slots_leaving: u32,
    /// What it was given.
    pub stats: BackendStats,
}

/// Why a flow goes where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PlacementReason {
    /// The table says so.
    Table,
    /// Its slot is in transition, and the flow is recorded.
    Recorded,
    /// Its slot is in transition, and the flow is not known: if it is not new, it is the earlier backend's.
    Previous,
    /// Its slot is in transition, and it is new.
    New,
}

/// The answer to a flow look-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Placement {
    /// The service that it belongs to.
    pub service: ServiceAddr,
    /// The backend; `None`: there is none for it.
    pub backend: Option<IpAddr>,
    /// Why.
    pub reason: PlacementReason,
}

/// A flow, to be looked up, as its packets come from the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DsrFlow {
    /// The protocol.
    pub protocol: crate::balancer::ServiceProtocol,
    /// The client.
    pub client: std::net::SocketAddr,
    /// What it asks for.
    pub destination: std::net::SocketAddr,
    /// Whether it is about a TCP SYN.
    pub opens: bool,
}
