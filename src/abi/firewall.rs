//! Mirror of `bpf/abi/firewall.h`.

use std::net::{Ipv4Addr, Ipv6Addr};

use bytemuck::{Pod, Zeroable};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::assert_same_layout;

/// In `Settings::not_ip`: the same as the default.
pub(crate) const FOLLOW_DEFAULT: u32 = 0xff;

/// The kernel compares the address byte by byte from the front, so it must be in network byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Key4 {
    prefix_length: u32,
    address: [u8; 4],
}
assert_same_layout!(Key4, crate::sys::skel::firewall::types::firewall_key4, prefix_length, address);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Key6 {
    prefix_length: u32,
    address: [u8; 16],
}
assert_same_layout!(Key6, crate::sys::skel::firewall::types::firewall_key6, prefix_length, address);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Rule {
    pub(crate) action: u32,
    pub(crate) prefix_length: u32,
}
assert_same_layout!(Rule, crate::sys::skel::firewall::types::firewall_rule, action, prefix_length);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Settings {
    pub(crate) default_action: u32,
    pub(crate) not_ip: u32,
    pub(crate) unsupported: u32,
    pub(crate) neighbours: u32,
}
assert_same_layout!(
    Settings,
    crate::sys::skel::firewall::types::firewall_settings,
    default_action,
    not_ip,
    unsupported,
    neighbours
);

/// Host bits are cleared: `10.9.9.9/8` and `10.0.0.0/8` are the same key.
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

/// `None` for a prefix length that no rule of ours has.
impl Key4 {
    pub(crate) fn net(&self) -> Option<IpNet> {
        let length = u8::try_from(self.prefix_length).ok()?;
        Some(Ipv4Net::new(Ipv4Addr::from(self.address), length).ok()?.into())
    }
}

impl Key6 {
    pub(crate) fn net(&self) -> Option<IpNet> {
        let length = u8::try_from(self.prefix_length).ok()?;
        Some(Ipv6Net::new(Ipv6Addr::from(self.address), length).ok()?.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_in_network_byte_order_with_host_bits_cleared() {
        let key = Key4::from("192.168.178.9/24".parse::<Ipv4Net>().unwrap());
        assert_eq!(bytemuck::bytes_of(&key)[4..], [192, 168, 178, 0]);
        assert_eq!(key.prefix_length, 24);
        assert_eq!(key.net().unwrap().to_string(), "192.168.178.0/24");

        let key = Key6::from("2001:db8::1/33".parse::<Ipv6Net>().unwrap());
        assert_eq!(key.address[..4], [0x20, 0x01, 0x0d, 0xb8]);
        assert_eq!(key.net().unwrap().to_string(), "2001:db8::/33");
    }
}
