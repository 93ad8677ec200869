//! Mirror of `bpf/abi/monitor.h`.

use bytemuck::{Pod, Zeroable};

use super::assert_same_layout;

pub(crate) const PROTOCOLS: usize = 16;

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Settings {
    pub(crate) sample: u32,
    /// XDP action + 1; 0: not set.
    pub(crate) action: [u8; PROTOCOLS],
}
assert_same_layout!(Settings, crate::sys::skel::monitor::types::monitor_settings, sample, action);
