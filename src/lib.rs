#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod abi;
mod attach;
#[allow(dead_code, reason = "the NAT balancer uses the rest")]
mod balancer;
mod dsr_balancer;
mod error;
mod events;
mod firewall;
#[allow(dead_code, unused_imports, reason = "the rate limiter and the balancers will use it")]
mod flow_table;
mod interface;
#[allow(dead_code, reason = "the rate limiter will use the rest")]
mod lpm;
pub mod maglev;
mod monitor;
mod nat_balancer;
mod packet;
mod pin;
mod pipeline;
pub mod preflight;
mod reason;
mod stage;
mod stats;
mod sys;
mod test_run;
mod tunnel_decap;

pub use attach::{AttachOptions, Attachment, XdpMode};
pub use balancer::{BackendState, BackendStats, Echo, ServiceAddr, ServiceProtocol, ServiceStats};
pub use dsr_balancer::{
    DsrBackendEntry, DsrBalancer, DsrConfig, DsrEvent, DsrFlow, DsrService, DsrServiceEntry, Forwarding, Placement,
    PlacementReason, Way,
};
pub use error::{Error, Result};
pub use events::Events;
pub use firewall::{
    Decision, Engine, Firewall, FirewallConfig, FirewallEvent, Inserted, PendingList, Replaced, Rule, RuleEntry,
    Selector, parse_prefix, read_prefix_list,
};
pub use interface::Interface;
pub use ipnet;
pub use monitor::{MonitorConfig, PacketMonitor, Protocol, ProtocolCounts};
pub use nat_balancer::{
    Connection, ConnectionCounts, ConnectionState, NatBackend, NatBackendStats, NatBalancer, NatConfig, NatEvent,
    NatEventKind, NatMode, NatService, NatServiceStats, NatTimeouts, Scheduler,
};
pub use packet::{Fragment, Network, PacketEvent, Transport, VlanTag};
pub use pin::{Pinned, pinned, remove_pins};
pub use pipeline::{Pipeline, Position};
pub use reason::{Action, Reason};
pub use stage::Stage;
pub use stats::{Count, ReasonCount, Stats};
pub use test_run::{TestRun, Verdict};
pub use tunnel_decap::{TunnelDecap, TunnelDecapConfig};
