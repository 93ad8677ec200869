//! Mirror of `bpf/abi/service.h`.

use std::net::IpAddr;

use bytemuck::{Pod, Zeroable};

use super::assert_same_layout;
use crate::abi::packet::{NETWORK_IPV4, NETWORK_IPV6};

pub(crate) const INDEX_PROBES: u32 = 16;
pub(crate) const INDEX_NUMBER: u64 = 0xffff;
pub(crate) const INDEX_IPV4: u64 = 0x10000;
pub(crate) const INDEX_IPV6: u64 = 0x20000;
pub(crate) const INDEX_SERVICE: u64 = 0x10000;
pub(crate) const INDEX_REMOVED: u64 = 0x80000;

/// An address as records have it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Address(pub(crate) [u64; 2]);

impl From<IpAddr> for Address {
    fn from(address: IpAddr) -> Self {
        let mut octets = [0; 16];
        match address {
            IpAddr::V4(ip) => octets[..4].copy_from_slice(&ip.octets()),
            IpAddr::V6(ip) => octets = ip.octets(),
        }
        Self(bytemuck::cast(octets))
    }
}

impl Address {
    /// `None` for a family that no record of ours has.
    pub(crate) fn get(self, family: u32) -> Option<IpAddr> {
        let octets: [u8; 16] = bytemuck::cast(self.0);
        match u8::try_from(family) {
            Ok(NETWORK_IPV4) => Some(IpAddr::from([octets[0], octets[1], octets[2], octets[3]])),
            Ok(NETWORK_IPV6) => Some(IpAddr::from(octets)),
            _ => None,
        }
    }
}

/// `enum packet_network` of an address.
pub(crate) fn family_of(address: IpAddr) -> u32 {
    if address.is_ipv4() { NETWORK_IPV4 } else { NETWORK_IPV6 }.into()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Vip {
    pub(crate) address: Address,
    pub(crate) family: u32,
    pub(crate) echo: u32,
    pub(crate) held: u64,
}
assert_same_layout!(Vip, crate::sys::skel::dsr_balancer::types::vip, address, family, echo, held);

/// Flags of a service.
pub(crate) const SERVICE_USED: u32 = 1;
pub(crate) const SERVICE_BY_SOURCE: u32 = 2;

/// A service. The port is in network byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Service {
    pub(crate) flags: u32,
    pub(crate) first_line: u32,
    pub(crate) slots: u32,
    pub(crate) vip: u32,
    pub(crate) port: u16,
    pub(crate) protocol: u8,
    pub(crate) reserved: u8,
    pub(crate) scheduler: u32,
    pub(crate) function: [u64; 5],
}
assert_same_layout!(
    Service,
    crate::sys::skel::dsr_balancer::types::service,
    flags,
    first_line,
    slots,
    vip,
    port,
    protocol,
    scheduler,
    function
);

pub(crate) const SLOT_LINE_WORDS: usize = 16;
pub(crate) const SLOT_BACKEND: u32 = 0xffff;
pub(crate) const SLOT_PREVIOUS_SHIFT: u32 = 16;

/// Flags of a backend.
pub(crate) const BACKEND_USED: u32 = 1;
pub(crate) const BACKEND_DRAINING: u32 = 2;
pub(crate) const BACKEND_REMOVED: u32 = 4;
pub(crate) const BACKEND_KILLED: u32 = 8;

/// A backend. The port is in network byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Backend {
    pub(crate) address: Address,
    pub(crate) family: u32,
    pub(crate) flags: u32,
    pub(crate) service: u32,
    pub(crate) weight: u32,
    pub(crate) port: u16,
    pub(crate) reserved: u16,
    pub(crate) identity: u32,
    pub(crate) function: [u64; 3],
}
assert_same_layout!(
    Backend,
    crate::sys::skel::dsr_balancer::types::backend,
    address,
    family,
    flags,
    service,
    weight,
    port,
    identity,
    function
);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct BackendCpu {
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
    pub(crate) flows: u64,
    pub(crate) function: u64,
    pub(crate) reserved: [u64; 4],
}
assert_same_layout!(BackendCpu, crate::sys::skel::dsr_balancer::types::backend_state, packets, bytes, flows, function);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct ServiceCpu {
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
    pub(crate) flows: u64,
    pub(crate) too_big: u64,
    pub(crate) no_backend: u64,
    pub(crate) function: [u64; 3],
}
assert_same_layout!(
    ServiceCpu,
    crate::sys::skel::dsr_balancer::types::service_state,
    packets,
    bytes,
    flows,
    too_big,
    no_backend,
    function
);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct BalancerSettings {
    pub(crate) seed: u64,
    pub(crate) vip_mask: u32,
    pub(crate) service_mask: u32,
    pub(crate) echo: u32,
    pub(crate) answers_per_second: u32,
    pub(crate) next_identity: u64,
    pub(crate) probe_interface: u32,
    pub(crate) probe_base: u32,
    pub(crate) table_size: u32,
    pub(crate) reserved: u32,
    pub(crate) vip_filter: u64,
}
assert_same_layout!(
    BalancerSettings,
    crate::sys::skel::dsr_balancer::types::balancer_settings,
    seed,
    vip_mask,
    service_mask,
    echo,
    answers_per_second,
    next_identity,
    probe_interface,
    probe_base,
    table_size,
    vip_filter
);
