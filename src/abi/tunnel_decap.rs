//! Mirror of `bpf/abi/tunnel_decap.h`.

use bytemuck::{Pod, Zeroable};
use ipnet::{Ipv4Net, Ipv6Net};

use super::assert_same_layout;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Key4 {
    prefix_length: u32,
    address: [u8; 4],
}
assert_same_layout!(Key4, crate::sys::skel::tunnel_decap::types::tunnel_key4, prefix_length, address);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Key6 {
    prefix_length: u32,
    address: [u8; 16],
}
assert_same_layout!(Key6, crate::sys::skel::tunnel_decap::types::tunnel_key6, prefix_length, address);

impl From<Ipv4Net> for Key4 {
    fn from(net: Ipv4Net) -> Self {
        Self { prefix_length: net.prefix_len().into(), address: net.network().octets() }
    }
}

impl From<Ipv6Net> for Key6 {
    fn from(net: Ipv6Net) -> Self {
        Self { prefix_length: net.prefix_len().into(), address: net.network().octets() }
    }
}

pub(crate) const VIP: u32 = 1;
pub(crate) const SOURCE: u32 = 2;
pub(crate) const DESTINATION: u32 = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Settings {
    pub(crate) any: u32,
    pub(crate) reserved: u32,
}
assert_same_layout!(Settings, crate::sys::skel::tunnel_decap::types::tunnel_settings, any);
