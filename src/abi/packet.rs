//! Mirror of `bpf/abi/packet.h`.

/// VLAN tags that the parser walks over.
pub(crate) const VLANS_MAX: usize = 2;

pub(crate) const NETWORK_ARP: u8 = 1;
pub(crate) const NETWORK_IPV4: u8 = 2;
pub(crate) const NETWORK_IPV6: u8 = 3;

pub(crate) const FRAGMENT_FIRST: u8 = 1;
pub(crate) const FRAGMENT_LATER: u8 = 2;
