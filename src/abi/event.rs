//! Mirror of `bpf/abi/event.h`.

use bytemuck::{Pod, Zeroable};

use super::{assert_same_layout, packet::VLANS_MAX};

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct EventsState {
    pub(crate) seen: u64,
    pub(crate) lost: u64,
}
assert_same_layout!(EventsState, crate::sys::skel::monitor::types::events_state, seen, lost);

/// Bytes of a frame that an event carries.
pub(crate) const FRAME_BYTES: usize = 128;

/// Big-endian fields are byte arrays, so that nobody takes them for numbers.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Event {
    pub(crate) timestamp: u64,
    pub(crate) interface: u32,
    pub(crate) rx_queue: u32,
    pub(crate) bytes: u32,
    pub(crate) ether_type: [u8; 2],
    pub(crate) vlan_tci: [[u8; 2]; VLANS_MAX],
    pub(crate) source_port: [u8; 2],
    pub(crate) destination_port: [u8; 2],
    pub(crate) source_mac: [u8; 6],
    pub(crate) destination_mac: [u8; 6],
    pub(crate) vlans: u8,
    pub(crate) network: u8,
    pub(crate) protocol: u8,
    pub(crate) fragment: u8,
    pub(crate) hop_limit: u8,
    pub(crate) transport: u8,
    pub(crate) tcp_flags: u8,
    pub(crate) icmp_type: u8,
    pub(crate) icmp_code: u8,
    pub(crate) reason: u8,
    pub(crate) action: u8,
    pub(crate) reserved: [u8; 3],
    pub(crate) source: [u8; 16],
    pub(crate) destination: [u8; 16],
    /// Of the stage: what decided. 0: nothing particular.
    pub(crate) detail: u32,
    /// Bytes of `frame` that are valid.
    pub(crate) captured: u32,
    pub(crate) frame: [u8; FRAME_BYTES],
}
// No map has this type, so the skeleton does not know it: `event.h` asserts the same numbers.
const _: () = assert!(size_of::<Event>() == 224 && std::mem::offset_of!(Event, source) == 56);
