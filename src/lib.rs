#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod abi;
mod attach;
mod error;
mod events;
mod firewall;
#[cfg(feature = "health")]
mod health;
mod interface;
#[allow(dead_code, reason = "the rate limiter will use the rest")]
mod lpm;
mod monitor;
mod packet;
#[cfg(feature = "pcapng")]
mod pcapng;
mod pin;
mod pipeline;
pub mod preflight;
mod reason;
#[doc = include_str!("../docs/recipes.md")]
pub mod recipes {}
#[doc = include_str!("../docs/operations.md")]
pub mod operations {}
mod stage;
mod stats;
mod sys;
mod test_run;
mod text;

pub use attach::{AttachOptions, Attachment, XdpMode};
pub use error::{Error, Result};
pub use events::Events;
pub use firewall::{
    Decision, Engine, Firewall, FirewallConfig, FirewallEvent, Inserted, PendingList, Progress, Replaced, Rule,
    RuleEntry, Selector, parse_prefix, read_prefix_list, read_prefix_list_with_progress,
};
#[cfg(feature = "health")]
pub use health::{Health, HealthChange, HealthCheck, HealthChecks, Probe};
pub use interface::Interface;
pub use ipnet;
pub use monitor::{MonitorConfig, PacketMonitor, Protocol, ProtocolCounts};
pub use packet::{Fragment, Network, PacketEvent, Transport, VlanTag};
#[cfg(feature = "pcapng")]
pub use pcapng::PcapngWriter;
pub use pin::{Pinned, open_program, pinned, remove_pins};
pub use pipeline::{Pipeline, Position};
pub use reason::{Action, Reason};
pub use stage::Stage;
pub use stats::{Count, ReasonCount, Stats};
pub use test_run::{TestRun, Verdict};
