//! A list's prefixes: which leaf each leads to, which covers which, and where packets may fall through.

use std::{
    collections::{BTreeSet, HashMap},
    ops::Bound,
};

use ipnet::IpNet;

use crate::abi::firewall::LEAF_PLAIN;

/// The prefixes of one list.
#[derive(Debug, Default)]
pub(super) struct Prefixes {
    leaves: HashMap<IpNet, u32>,
    /// By family, how many prefixes of each length: only lengths that occur are asked for.
    lengths: [Vec<u32>; 2],
    /// Prefixes whose rules may all not apply: their last record leads to the next shorter prefix.
    open: BTreeSet<IpNet>,
    /// Rules, which may be more than prefixes.
    pub(super) rules: usize,
}

fn family(prefix: IpNet) -> usize {
    usize::from(matches!(prefix, IpNet::V6(_)))
}

impl Prefixes {
    pub(super) fn with_capacity(prefixes: usize) -> Self {
        Self { leaves: HashMap::with_capacity(prefixes), ..Self::default() }
    }

    /// The leaf of exactly this prefix, 0 for none.
    pub(super) fn leaf(&self, prefix: IpNet) -> u32 {
        self.leaves.get(&prefix).copied().unwrap_or(0)
    }

    /// Sets the leaf of a prefix; 0 removes it.
    pub(super) fn set_leaf(&mut self, prefix: IpNet, leaf: u32) {
        let lengths = &mut self.lengths[family(prefix)];
        lengths.resize(129, 0);
        let count = &mut lengths[usize::from(prefix.prefix_len())];
        match leaf {
            0 => *count -= u32::from(self.leaves.remove(&prefix).is_some()),
            _ => *count += u32::from(self.leaves.insert(prefix, leaf).is_none()),
        }
    }

    /// The longest prefix that covers this one and is shorter, with its leaf.
    pub(super) fn covering(&self, prefix: IpNet) -> Option<(IpNet, u32)> {
        self.longest(prefix, prefix.prefix_len().checked_sub(1)?)
    }

    /// The longest prefix of at most this length that covers an address.
    pub(super) fn longest(&self, address: IpNet, length: u8) -> Option<(IpNet, u32)> {
        let lengths = &self.lengths[family(address)];
        let occurring = (0..=length).rev().filter(|length| lengths.get(usize::from(*length)).is_some_and(|n| *n > 0));
        occurring
            .filter_map(|length| IpNet::new(address.addr(), length).ok())
            .find_map(|net| self.leaves.get_key_value(&net.trunc()).map(|(net, leaf)| (*net, *leaf)))
    }

    pub(super) fn covering_leaf(&self, prefix: IpNet) -> u32 {
        self.covering(prefix).map_or(0, |(_, leaf)| leaf)
    }

    pub(super) fn set_open(&mut self, prefix: IpNet, open: bool) {
        if open {
            self.open.insert(prefix);
        } else {
            self.open.remove(&prefix);
        }
    }

    pub(super) fn is_open(&self, prefix: IpNet) -> bool {
        self.open.contains(&prefix)
    }

    /// Open prefixes inside this one.
    pub(super) fn open_inside(&self, prefix: IpNet) -> impl Iterator<Item = IpNet> {
        let behind = self.open.range((Bound::Excluded(prefix), Bound::Unbounded));
        behind.copied().take_while(move |inner| prefix.contains(inner))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (IpNet, u32)> {
        self.leaves.iter().map(|(prefix, leaf)| (*prefix, *leaf))
    }
}

/// Whether a leaf ends the asking.
pub(super) fn ends(leaf: u32) -> bool {
    leaf == 0 || leaf & LEAF_PLAIN != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_covering_prefix_is_found() {
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        let mut prefixes = Prefixes::default();
        for (at, text) in ["0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.3/32", "::/0"].into_iter().enumerate() {
            prefixes.set_leaf(net(text), at as u32 + 1);
            prefixes.set_open(net(text), true);
        }
        assert_eq!(prefixes.covering(net("10.1.2.3/32")), Some((net("10.1.0.0/16"), 3)));
        assert_eq!(prefixes.covering(net("10.1.0.0/16")), Some((net("10.0.0.0/8"), 2)));
        assert_eq!(prefixes.covering(net("0.0.0.0/0")), None);
        assert_eq!(prefixes.longest(net("11.0.0.1/32"), 32), Some((net("0.0.0.0/0"), 1)));
        assert!(prefixes.open_inside(net("10.0.0.0/8")).eq([net("10.1.0.0/16"), net("10.1.2.3/32")]));
        assert_eq!(prefixes.open_inside(net("0.0.0.0/0")).count(), 3);
        prefixes.set_leaf(net("10.1.0.0/16"), 0);
        assert_eq!(prefixes.covering_leaf(net("10.1.2.3/32")), 2);
        assert_eq!(prefixes.iter().count(), 4);
    }
}
