//! Random flows, the same in every run.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

/// A random sequence that only its seed decides (splitmix64): measurements can be repeated.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Starts a sequence.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, which must not be 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.bits() % end
    }

    /// An IPv4 unicast address that is not of this host.
    pub fn ipv4(&mut self) -> Ipv4Addr {
        loop {
            let ip = Ipv4Addr::from(self.bits() as u32);
            if (1..=223).contains(&ip.octets()[0]) && !ip.is_loopback() {
                return ip;
            }
        }
    }

    /// An IPv6 address of 2000::/3, where global unicast lies.
    pub fn ipv6(&mut self) -> Ipv6Addr {
        let bits = (u128::from(self.bits()) << 64) | u128::from(self.bits());
        Ipv6Addr::from((bits >> 3) | (1 << 125))
    }

    /// Brings items into a random order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for end in (1..items.len()).rev() {
            items.swap(end, self.below(end as u64 + 1) as usize);
        }
    }

    fn port(&mut self) -> u16 {
        1024 + self.below(u64::from(u16::MAX) + 1 - 1024) as u16
    }
}

/// Random IPv4 sources, with ports.
pub fn random_v4(count: usize) -> Vec<SocketAddr> {
    let mut random = Random::new(4);
    (0..count).map(|_| (random.ipv4(), random.port()).into()).collect()
}

/// Random IPv6 sources, with ports.
pub fn random_v6(count: usize) -> Vec<SocketAddr> {
    let mut random = Random::new(6);
    (0..count).map(|_| (random.ipv6(), random.port()).into()).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn flows_are_many_and_always_the_same() {
        for flows in [random_v4 as fn(usize) -> Vec<SocketAddr>, random_v6] {
            assert_eq!(flows(1000), flows(1000));
            assert!(flows(1000).iter().collect::<HashSet<_>>().len() > 990);
        }
        assert!(random_v6(1000).iter().all(|flow| match flow {
            SocketAddr::V6(flow) => flow.ip().octets()[0] >> 5 == 1,
            SocketAddr::V4(_) => false,
        }));
    }

    #[test]
    fn shuffling_keeps_every_item() {
        let mut items: Vec<u32> = (0..1000).collect();
        Random::new(1).shuffle(&mut items);
        assert!(!items.is_sorted());
        items.sort_unstable();
        assert!(items.into_iter().eq(0..1000));
    }
}
