//! What all network functions stand on: the inside of a stage, its mapped records, its owner, and where it is pinned.
//!
//! Nothing here knows of interfaces, chains or a particular function: `stage`, `attach`, `pin`, `pipeline` and the functions
//! depend on this, and this on `sys` and `abi`.

mod adopt;
pub(crate) mod directory;
mod growth;
mod home;
mod mix;
mod next_hops;
mod own_macs;
mod owner;
mod records;
mod stage_core;
mod state;

pub(crate) use adopt::load_or_adopt;
pub(crate) use growth::{COPIED, Carry, Counted, Growth, Sets, Settle, counted_entries};
pub(crate) use home::{STAGES, aside_path, exchange_stage, map_path, open_map, pin_stage, pinned_stages};
pub(crate) use mix::mix64;
#[cfg(test)]
pub(crate) use next_hops::tests::next_hops;
pub(crate) use next_hops::{Hop, NextHops};
pub(crate) use own_macs::{OWN_MACS, OwnMacs};
pub(crate) use owner::Owner;
pub(crate) use records::Records;
pub use stage_core::Recovery;
pub(crate) use stage_core::{Instance, Shared, StageCore, StageKind, TEST_MAC};
pub(crate) use state::{Edit, State};
