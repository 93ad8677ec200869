//! Connections as the user sees them.

use std::{fmt, net::SocketAddr, time::Duration};

use crate::{
    Count,
    balancer::{ServiceAddr, ServiceProtocol},
};

/// What a connection's packets have come to so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
#[repr(u8)]
pub enum ConnectionState {
    /// UDP that the backend has not answered.
    UdpNew = 0,
    /// UDP in both directions.
    UdpAnswered = 1,
    /// TCP: the client's SYN.
    TcpSyn = 2,
    /// TCP: the backend's SYN-ACK. Not yet established: whoever forges SYNs gets that far.
    TcpAnswered = 3,
    /// TCP: and the client's acknowledgement of it.
    TcpEstablished = 4,
    /// TCP: one side has sent its FIN.
    TcpClosing = 5,
    /// TCP: both have.
    TcpTimeWait = 6,
    /// TCP: one side has sent a RST.
    TcpReset = 7,
}

impl ConnectionState {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::UdpNew,
        Self::UdpAnswered,
        Self::TcpSyn,
        Self::TcpAnswered,
        Self::TcpEstablished,
        Self::TcpClosing,
        Self::TcpTimeWait,
        Self::TcpReset,
    ];

    /// Name in snake case.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::UdpNew => "udp_new",
            Self::UdpAnswered => "udp_answered",
            Self::TcpSyn => "tcp_syn",
            Self::TcpAnswered => "tcp_answered",
            Self::TcpEstablished => "tcp_established",
            Self::TcpClosing => "tcp_closing",
            Self::TcpTimeWait => "tcp_time_wait",
            Self::TcpReset => "tcp_reset",
        }
    }
}

impl fmt::Display for ConnectionState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A connection, as it was at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Connection {
    /// What the client talks to.
    pub service: ServiceAddr,
    /// The client.
    pub client: SocketAddr,
    /// What the backend sees as the client.
    pub source: SocketAddr,
    /// The backend.
    pub backend: SocketAddr,
    /// How far it is.
    pub state: ConnectionState,
    /// Time since its last packet, exact to a quarter of a second.
    pub idle: Duration,
    pub(super) record: u32,
    pub(super) raw: crate::abi::nat_balancer::Connection,
}

impl Connection {
    /// The protocol.
    #[must_use]
    pub fn protocol(&self) -> ServiceProtocol {
        self.service.protocol
    }
}

impl fmt::Display for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { service, client, source, backend, state, .. } = self;
        write!(f, "{client} -> {service}: {source} -> {backend} {state}")
    }
}

/// Connections by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConnectionCounts(pub(super) [u64; 8]);

impl ConnectionCounts {
    /// Those in this state.
    #[must_use]
    pub fn state(&self, state: ConnectionState) -> u64 {
        self.0[state as usize]
    }

    /// All of them.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }
}

/// What became of a NAT service's packets since it was added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct NatServiceStats {
    /// Packets of clients that went to backends, and the bytes of their frames as they came in.
    pub forwarded: Count,
    /// Packets of backends that went to clients.
    pub answered: Count,
    /// Connections that were opened.
    pub opened: u64,
    /// Connections that found no backend.
    pub no_backend: u64,
    /// Connections that were refused for other reasons: no room, no port, a source that is not one host.
    pub refused: u64,
    /// Packets that did not fit the way on and were answered with Fragmentation Needed or Packet Too Big.
    pub too_big: u64,
}

/// What a backend was given since it was added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct NatBackendStats {
    /// Packets of clients, and the bytes of their frames as they came in.
    pub forwarded: Count,
    /// Packets of the backend to clients.
    pub answers: u64,
    /// Connections that it was given.
    pub opened: u64,
    /// Connections that it has and that are neither closed nor gone. Those that have been silent for too long count until
    /// their place is needed or [`NatBalancer::collect`](super::NatBalancer::collect) finds them.
    pub active: u64,
}
