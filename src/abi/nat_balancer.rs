//! Mirror of `bpf/abi/nat_balancer.h`.

use bytemuck::{Pod, Zeroable};

use super::{assert_same_layout, service::Address};

/// In `Service::flags`.
pub(crate) const DESTINATION_ONLY: u32 = 0x100;
pub(crate) const ADDRESSES_SHIFT: u32 = 12;
pub(crate) const ADDRESSES_MAX: usize = 16;
pub(crate) const NUMBER_MAX: u16 = 0x3fff;

/// In `Service::scheduler`.
pub(crate) const BY_SLOT: u32 = 0;
pub(crate) const ROUND_ROBIN: u32 = 1;
pub(crate) const LEAST_LOADED: u32 = 2;

/// Parts of a connection's word.
pub(crate) const FLAGS_SHIFT: u32 = 32;
pub(crate) const GENERATION_SHIFT: u32 = 48;

/// Flags in it.
pub(crate) const LIVE: u32 = 1;
pub(crate) const CLAIMED: u32 = 2;
pub(crate) const ANSWERED: u32 = 4;
pub(crate) const CONFIRMED: u32 = 8;
pub(crate) const FIN_CLIENT: u32 = 16;
pub(crate) const FIN_BACKEND: u32 = 32;
pub(crate) const RST_CLIENT: u32 = 64;
pub(crate) const RST_BACKEND: u32 = 128;
pub(crate) const COUNTED: u32 = 256;
pub(crate) const TCP: u32 = 512;
pub(crate) const IPV6: u32 = 1024;
pub(crate) const KEPT_SOURCE: u32 = 2048;

pub(crate) const STATES: usize = 8;
/// In the flow table's values.
pub(crate) const VALUE_RECORD: u64 = 0xffff_ffff;

/// A connection. Ports are in network byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Connection {
    pub(crate) word: u64,
    pub(crate) client: Address,
    pub(crate) client_port: u16,
    pub(crate) port: u16,
    pub(crate) backend: u16,
    pub(crate) address: u16,
    pub(crate) identity: u32,
    pub(crate) expected: u32,
    pub(crate) choice: [u64; 2],
    pub(crate) service: u16,
    pub(crate) reserved: [u16; 3],
}
assert_same_layout!(
    Connection,
    crate::sys::skel::nat_balancer::types::nat_connection,
    word,
    client,
    client_port,
    port,
    backend,
    address,
    identity,
    expected,
    choice,
    service
);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Load {
    pub(crate) active: u64,
    pub(crate) reserved: [u64; 7],
}
assert_same_layout!(Load, crate::sys::skel::nat_balancer::types::nat_load, active);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Settings {
    pub(crate) secret: [u64; 4],
    pub(crate) records_mask: u32,
    pub(crate) timeout: [u32; STATES],
    pub(crate) first_port: u32,
    pub(crate) last_port: u32,
    pub(crate) second: u32,
    pub(crate) ports_shared: u32,
    pub(crate) destination_only: u32,
    pub(crate) backend_mask: u32,
    pub(crate) reset_unknown: u32,
    pub(crate) sample: u32,
    pub(crate) reserved: u32,
}
assert_same_layout!(
    Settings,
    crate::sys::skel::nat_balancer::types::nat_settings,
    secret,
    records_mask,
    timeout,
    first_port,
    last_port,
    second,
    ports_shared,
    destination_only,
    backend_mask,
    reset_unknown,
    sample
);

pub(crate) const EVENT_NEW: u32 = 0;
pub(crate) const EVENT_CLOSED: u32 = 1;
pub(crate) const EVENT_REFUSED: u32 = 2;

/// What happened to a connection. Ports are in network byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Event {
    pub(crate) timestamp: u64,
    pub(crate) kind: u32,
    pub(crate) reason: u32,
    pub(crate) client: Address,
    pub(crate) client_port: u16,
    pub(crate) port: u16,
    pub(crate) service: u16,
    pub(crate) backend: u16,
    pub(crate) flags: u32,
    pub(crate) identity: u32,
}
/// As the static assertion in the header says.
const _: () = assert!(size_of::<Event>() == 48 && std::mem::offset_of!(Event, identity) == 44);
