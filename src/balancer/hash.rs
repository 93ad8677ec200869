//! The hashes of `bpf/include/service.h`, bit by bit: they say where user space must write, and which slot a flow has.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub(crate) use crate::base::mix64;

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

pub(crate) fn index_hash(word: u64) -> u64 {
    (word ^ word >> 32).wrapping_mul(GOLDEN)
}

pub(crate) fn index_hash6(address: Ipv6Addr) -> u64 {
    let [high, low] = halves(address);
    mix64(high ^ 0x2545_f491_4f6c_dd1d) ^ mix64(low)
}

/// As a program reads them from a packet.
pub(crate) fn halves(address: Ipv6Addr) -> [u64; 2] {
    bytemuck::cast(address.octets())
}

pub(crate) fn raw4(address: Ipv4Addr) -> u32 {
    u32::from_ne_bytes(address.octets())
}

/// What decides a flow's slot. Ports in host byte order; both 0 where the service goes by source addresses. `None` when
/// the families differ.
pub(crate) fn flow_hash(seed: u64, client: IpAddr, vip: IpAddr, ports: (u16, u16), protocol: u8) -> Option<u64> {
    let word = u64::from(ports.1.to_be()) << 16 | u64::from(ports.0.to_be());
    let b = word << 8 | u64::from(protocol);
    match (client, vip) {
        (IpAddr::V4(client), IpAddr::V4(vip)) => {
            let a = u64::from(raw4(client)) << 32 | u64::from(raw4(vip));
            Some(mix64((a ^ seed).wrapping_mul(GOLDEN) ^ b ^ a >> 32))
        }
        (IpAddr::V6(client), IpAddr::V6(vip)) => {
            let (client, vip) = (halves(client), halves(vip));
            let a = mix64(client[0] ^ seed) ^ client[1];
            let b = mix64(vip[0].wrapping_add(vip[1].wrapping_mul(GOLDEN))) ^ b;
            Some(mix64(mix64(a).wrapping_add(b)))
        }
        _ => None,
    }
}

/// A slot of a table of so many.
pub(crate) fn slot_of(slots: u32, hash: u64) -> u32 {
    (((hash >> 32) * u64::from(slots)) >> 32) as u32
}
