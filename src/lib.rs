#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod abi;
mod address;
mod attach;
mod balancer;
mod base;
mod dsr_balancer;
mod error;
mod events;
mod firewall;
mod flow_table;
#[cfg(feature = "health")]
mod health;
mod host;
mod interface;
#[allow(dead_code, reason = "its tests and benchmarks use the rest")]
mod lpm;
pub mod maglev;
mod monitor;
mod nat_balancer;
mod packet;
#[cfg(feature = "pcapng")]
mod pcapng;
mod pin;
mod pinned;
mod pipeline;
pub mod preflight;
mod rate_limiter;
mod reason;
mod refusal;
#[doc = include_str!("../docs/recipes.md")]
pub mod recipes {}
#[doc = include_str!("../docs/operations.md")]
#[doc = "\n## The systemd units\n\n`edge.service`:\n\n```ini"]
#[doc = include_str!("../docs/systemd/edge.service")]
#[doc = "```\n\n`sys-fs-bpf-edge.mount`:\n\n```ini"]
#[doc = include_str!("../docs/systemd/sys-fs-bpf-edge.mount")]
#[doc = "```"]
pub mod operations {}
mod stage;
mod stats;
mod sys;
mod test_run;
mod text;
mod tunnel_decap;

pub use attach::{AttachOptions, Attachment, XdpMode};
pub use balancer::{BackendState, BackendStats, Echo, ServiceAddr, ServiceProtocol, ServiceStats};
pub use base::Recovery;
pub use dsr_balancer::{
    DsrBackendEntry, DsrBalancer, DsrConfig, DsrEvent, DsrFlow, DsrService, DsrServiceEntry, Forwarding, Placement,
    PlacementReason, Way,
};
pub use error::{Error, Result};
pub use events::Events;
pub use firewall::{
    Decision, Engine, Firewall, FirewallConfig, FirewallEvent, Inserted, PendingList, Progress, Replaced, Rule,
    RuleEntry, Selector, parse_prefix, read_prefix_list, read_prefix_list_with_progress,
};
#[cfg(feature = "health")]
pub use health::{Health, HealthChange, HealthCheck, HealthChecks, HealthStats, Probe, Unsent, UnsentReason};
pub use interface::Interface;
pub use ipnet;
pub use monitor::{MonitorConfig, PacketMonitor, Protocol, ProtocolCounts};
pub use nat_balancer::{
    Connection, ConnectionCounts, ConnectionState, NatBackend, NatBackendStats, NatBalancer, NatConfig, NatEvent,
    NatEventKind, NatMode, NatService, NatServiceStats, NatTimeouts, Scheduler,
};
pub use packet::{Fragment, Network, PacketEvent, Transport, VlanTag};
#[cfg(feature = "pcapng")]
pub use pcapng::PcapngWriter;
pub use pin::{Pinned, open_program, pinned, remove_pins};
pub use pinned::pinned_stats;
pub use pipeline::{Loss, Pipeline, Position, Watch};
pub use rate_limiter::{
    Ban, BanPolicy, Bans, Bucket, Limit, Limits, Meter, Rate, RateEvent, RateLimiter, RateLimiterConfig,
    RateLimiterCounts, Scope, ScopeStats, TableFull, Tier, Tiers, TiersReplaced,
};
pub use reason::{Action, Reason};
pub use stage::Stage;
pub use stats::{Count, ReasonCount, Stats};
pub use test_run::{TestRun, Verdict};
pub use tunnel_decap::{TunnelDecap, TunnelDecapConfig};
