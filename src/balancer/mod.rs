//! What both balancers have in common: services, backends, the tables that lead from a packet to its backend, and every
//! change to them while packets flow.

pub(crate) mod backend;
pub(crate) mod book;
pub(crate) mod hash;
mod index;
pub(crate) mod service;
pub(crate) mod store;

pub use backend::{BackendState, BackendStats, ServiceStats};
pub(crate) use book::{Book, BookConfig, SlotRule, Target};
pub use service::{ServiceAddr, ServiceProtocol};

/// What happens to ICMP echo requests for a virtual address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "lowercase"))]
pub enum Echo {
    /// The balancer answers them.
    #[default]
    Answer,
    /// They go to a backend of the address's first service.
    Backend,
    /// They go on, to the next stage or the host's stack.
    Pass,
}
