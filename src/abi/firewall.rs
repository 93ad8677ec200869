//! Mirror of `bpf/abi/firewall.h`.

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

impl Key4 {
    /// `None` for a prefix length that no key of ours has.
    pub(crate) fn net(&self) -> Option<IpNet> {
        IpNet::new(self.address.into(), u8::try_from(self.prefix_length).ok()?).ok()
    }
}

impl Key6 {
    /// As [`Key4::net`].
    pub(crate) fn net(&self) -> Option<IpNet> {
        IpNet::new(self.address.into(), u8::try_from(self.prefix_length).ok()?).ok()
    }
}

/// Parts of a leaf.
pub(crate) const LEAF_RULE: u32 = 0x0fff_ffff;
pub(crate) const LEAF_PLAIN: u32 = 0x1000_0000;
pub(crate) const LEAF_DENY: u32 = 0x2000_0000;

/// Flags of a record. Those of list A, shifted by the list's number for B.
pub(crate) const LIST: u32 = 1;
pub(crate) const DENY: u32 = 4;
pub(crate) const PLAIN: u32 = 16;
pub(crate) const DESTINATION: u32 = 64;
pub(crate) const PROTOCOL: u32 = 128;
pub(crate) const PORTS: u32 = 256;
pub(crate) const IPV6: u32 = 512;
pub(crate) const COUNT_ONLY: u32 = 1024;

/// A rule. Addresses are in network byte order, IPv4 ones in the first four bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Record {
    pub(crate) expires: u64,
    pub(crate) next: u32,
    pub(crate) counter: u32,
    pub(crate) flags: u32,
    pub(crate) source_length: u8,
    pub(crate) destination_length: u8,
    pub(crate) protocol: u8,
    pub(crate) reserved: u8,
    pub(crate) first_port: u16,
    pub(crate) last_port: u16,
    pub(crate) reserved_too: u32,
    pub(crate) source: [u8; 16],
    pub(crate) destination: [u8; 16],
}
assert_same_layout!(
    Record,
    crate::sys::skel::firewall::types::firewall_rule,
    expires,
    next,
    counter,
    flags,
    source_length,
    destination_length,
    protocol,
    first_port,
    last_port,
    source,
    destination
);

/// `list`: waits for a confirmation.
pub(crate) const PENDING: u32 = 2;

pub(crate) const ENGINE_TRIE: u32 = 0;
pub(crate) const ENGINE_COMPILED: u32 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Settings {
    pub(crate) default_action: u32,
    pub(crate) not_ip: u32,
    pub(crate) unsupported: u32,
    pub(crate) neighbours: u32,
    pub(crate) engine: u32,
    pub(crate) list: u32,
    pub(crate) deadline: u64,
    pub(crate) roots: [[u32; 2]; 2],
    pub(crate) count_only: u32,
    pub(crate) sample: u32,
    pub(crate) counters: u32,
    pub(crate) counters_mask: u32,
    pub(crate) counters_shared: u32,
    pub(crate) reserved: u32,
}
assert_same_layout!(
    Settings,
    crate::sys::skel::firewall::types::firewall_settings,
    default_action,
    not_ip,
    unsupported,
    neighbours,
    engine,
    list,
    deadline,
    roots,
    count_only,
    sample,
    counters,
    counters_mask,
    counters_shared,
    reserved
);

/// What a CPU has yet to add to its counters: `turns`, words that only the program looks at, and the entries.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Uncounted {
    pub(crate) turns: u64,
    pub(crate) used: u32,
    pub(crate) reserved: u32,
    pub(crate) entry: [u64; 62],
}
assert_same_layout!(Uncounted, crate::sys::skel::firewall::types::firewall_uncounted, turns, used, reserved, entry);

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
