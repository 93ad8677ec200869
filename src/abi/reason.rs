//! Mirror of the counters in `bpf/abi/reason.h`.

use bytemuck::{Pod, Zeroable};

use super::assert_same_layout;

pub(crate) const REASONS: usize = 128;
pub(crate) const ACTIONS: usize = 8;
pub(crate) const OWN_COUNTS: usize = 64;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Count {
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
}
assert_same_layout!(Count, crate::sys::skel::firewall::types::xdpkit_count, packets, bytes);

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Counters {
    pub(crate) count: [[Count; ACTIONS]; REASONS],
    /// By an enum of the stage's own.
    pub(crate) own: [Count; OWN_COUNTS],
}
assert_same_layout!(Counters, crate::sys::skel::firewall::types::xdpkit_counters, count, own);

impl From<Count> for crate::Count {
    fn from(count: Count) -> Self {
        Self { packets: count.packets, bytes: count.bytes }
    }
}

impl From<crate::Count> for Count {
    fn from(count: crate::Count) -> Self {
        Self { packets: count.packets, bytes: count.bytes }
    }
}
