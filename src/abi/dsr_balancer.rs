//! Mirror of `bpf/abi/dsr_balancer.h`.

use bytemuck::{Pod, Zeroable};

use super::assert_same_layout;

pub(crate) const IPIP: u32 = 0x100;
pub(crate) const OUTER_FRAGMENTS: u32 = 0x200;

/// Bits of `CLOCK_MONOTONIC_COARSE` in nanoseconds that times leave out.
pub(crate) const TIME_SHIFT: u32 = 24;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Transition {
    pub(crate) begin: u32,
    pub(crate) last: u32,
}
assert_same_layout!(Transition, crate::sys::skel::dsr_balancer::types::dsr_transition, begin, last);

/// Times in units of 2^24 ns; addresses as in packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Settings {
    pub(crate) idle: u32,
    pub(crate) longest: u32,
    pub(crate) udp_grace: u32,
    pub(crate) reserved: u32,
    pub(crate) outer4: u32,
    pub(crate) outer4_mask: u32,
    pub(crate) outer6: [u64; 2],
    pub(crate) outer6_mask: u64,
}
assert_same_layout!(
    Settings,
    crate::sys::skel::dsr_balancer::types::dsr_settings,
    idle,
    longest,
    udp_grace,
    outer4,
    outer4_mask,
    outer6,
    outer6_mask
);

/// Next hops to a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Paths {
    pub(crate) told: u64,
    pub(crate) sample: [u64; 3],
    pub(crate) choice: [u64; 32],
}
assert_same_layout!(Paths, crate::sys::skel::dsr_balancer::types::dsr_paths, told, sample, choice);

pub(crate) const RECORD_KIND_SHIFT: u32 = 16;
pub(crate) const RECORD_SIDE: u64 = 1 << 19;
pub(crate) const RECORD_TIME_SHIFT: u32 = 20;
pub(crate) const CLOSING: u64 = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Side {
    pub(crate) client: super::service::Address,
    pub(crate) ports: u32,
    pub(crate) service: u32,
    pub(crate) reserved: u64,
}
assert_same_layout!(Side, crate::sys::skel::dsr_balancer::types::dsr_side, client, ports, service);

/// Places in a service's own counters.
pub(crate) const IN_TRANSITION: usize = 0;
pub(crate) const RECORDED: usize = 1;
pub(crate) const UNRECORDED: usize = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Event {
    pub(crate) timestamp: u64,
    pub(crate) backend: u32,
    pub(crate) identity: u32,
    pub(crate) interface: u32,
    pub(crate) state: u16,
    pub(crate) mac: [u8; 6],
    pub(crate) cpu: u32,
}
// No map names the struct, so no skeleton has it: the header asserts the same.
const _: () = assert!(size_of::<Event>() == 32 && std::mem::offset_of!(Event, mac) == 22);
