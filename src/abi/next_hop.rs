//! Mirror of `bpf/abi/next_hop.h`.

use std::net::IpAddr;

use bytemuck::{Pod, Zeroable};

use super::service::{Address, family_of};

/// Entries of the table; the first is the head.
pub(crate) const NEXT_HOPS: u32 = 4096;
/// An entry is stored at most this far from where the hash of its key says.
pub(crate) const NEXT_HOP_PROBES: u32 = 16;

/// `enum next_hop_use`.
pub(crate) const NEXT_HOP_FREE: u32 = 0;
pub(crate) const NEXT_HOP_CLAIMED: u32 = 1;
pub(crate) const NEXT_HOP_USED: u32 = 2;
pub(crate) const NEXT_HOP_LEAVING: u32 = 3;

/// Generations of the resolver are below this.
pub(crate) const NEXT_HOP_BY_TIME: u32 = 0x8000_0000;

/// An entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct NextHop {
    pub(crate) address: [u64; 2],
    pub(crate) interface: u32,
    pub(crate) mtu: u16,
    pub(crate) family: u8,
    pub(crate) reserved: u8,
    /// `use` in C.
    pub(crate) state: u32,
    pub(crate) last_used: u32,
    pub(crate) to: u64,
    pub(crate) from: u64,
    pub(crate) egress: u64,
    pub(crate) spare: u64,
}

/// In the place of the first entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct NextHopHead {
    pub(crate) lease: u64,
    pub(crate) generation: u32,
    pub(crate) wanted: u32,
    pub(crate) reserved: [u64; 6],
}

const _: () = assert!(size_of::<NextHop>() == 64 && size_of::<NextHopHead>() == 64);

/// What an entry is about: a neighbour, by the interface that routes name, and the MTU of the route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct NextHopKey {
    pub(crate) interface: u32,
    pub(crate) address: IpAddr,
    pub(crate) mtu: u16,
}

impl NextHopKey {
    /// The first three words of its entry.
    pub(crate) fn words(&self) -> [u64; 3] {
        let Address([high, low]) = Address::from(self.address);
        let family = u64::from(family_of(self.address));
        [high, low, u64::from(self.interface) | u64::from(self.mtu) << 32 | family << 48]
    }

    /// `None` for words that no key has.
    pub(crate) fn of(words: [u64; 3]) -> Option<Self> {
        let [high, low, rest] = words;
        let address = Address([high, low]).get((rest >> 48) as u32)?;
        Some(Self { interface: rest as u32, address, mtu: (rest >> 32) as u16 })
    }
}

/// A key of `links`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct LinkKey {
    pub(crate) device: u32,
    pub(crate) tags: u32,
}

/// A value of `links`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct LinkInfo {
    pub(crate) egress: u64,
    pub(crate) layer3: u32,
    pub(crate) reserved: u32,
}

/// How many tags the programs read and write.
pub(crate) const TAGS_MAX: usize = 2;

/// A VLAN tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Tag {
    pub(crate) id: u16,
    /// Of 802.1ad, not of 802.1Q.
    pub(crate) ad: bool,
}

/// Tags of a frame, the outer one first, as `link_key` has them.
pub(crate) fn tags_word(tags: &[Tag]) -> u32 {
    tags.iter().rev().fold(0, |word, tag| word << 12 | u32::from(tag.id & 0xfff)) | (tags.len() as u32) << 24
}

/// `enum next_hop_exit`, with what belongs to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Egress {
    /// The link is down or gone.
    None,
    /// By this device, with these tags, the outer one first.
    Device(u32, Vec<Tag>),
    /// Only the host's stack can send by it; the device at the end, where there is one, may still send back what came in
    /// by it.
    Stack(u32, Vec<Tag>),
    /// By the port at which a bridge has the neighbour.
    Bridge,
}

impl Egress {
    /// As entries have it.
    pub(crate) fn word(&self) -> u64 {
        let (exit, device, tags) = match self {
            Self::None => return 0,
            Self::Bridge => return 3 << 60,
            Self::Device(device, tags) => (1, *device, tags),
            Self::Stack(device, tags) => (2, *device, tags),
        };
        let mut word = u64::from(device) | (tags.len() as u64) << 56 | exit << 60;
        for (at, tag) in tags.iter().take(TAGS_MAX).enumerate() {
            word |= u64::from(tag.id & 0xfff) << (32 + 12 * at) | u64::from(tag.ad) << (58 + at);
        }
        word
    }
}

/// A MAC address as entries have it.
pub(crate) fn mac_word(mac: [u8; 6]) -> u64 {
    let mut octets = [0; 8];
    octets[..6].copy_from_slice(&mac);
    u64::from_ne_bytes(octets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_the_struct() {
        let key = NextHopKey { interface: 7, address: "192.0.2.1".parse().unwrap(), mtu: 1500 };
        let mut hop = NextHop { interface: 7, mtu: 1500, family: 4, ..NextHop::default() };
        hop.address = bytemuck::cast::<[u8; 16], _>([192, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        hop.family = family_of(key.address) as u8;
        let words: [u64; 8] = bytemuck::cast(hop);
        assert_eq!(words[..3], key.words());
        assert_eq!(NextHopKey::of(key.words()), Some(key));
        let key = NextHopKey { address: "2001:db8::9".parse().unwrap(), ..key };
        assert_eq!(NextHopKey::of(key.words()), Some(key));
        assert_eq!(NextHopKey::of([0; 3]), None);
    }

    #[test]
    fn tags_stand_where_the_header_says() {
        let [outer, inner] = [Tag { id: 0x123, ad: true }, Tag { id: 0xabc, ad: false }];
        assert_eq!(tags_word(&[]), 0);
        assert_eq!(tags_word(&[outer, inner]), 0x02ab_c123);
        assert_eq!([Egress::None.word(), Egress::Bridge.word()], [0, 3 << 60]);
        assert_eq!(Egress::Device(9, vec![]).word(), 1 << 60 | 9);
        assert_eq!(Egress::Device(9, vec![outer, inner]).word(), 0x16ab_c123_0000_0009);
        assert_eq!(Egress::Stack(9, vec![inner]).word(), 0x2100_0abc_0000_0009);
    }
}
