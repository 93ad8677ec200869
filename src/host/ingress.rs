//! What frames that come in by an interface are for: through VLANs, bonds and bridges to the interface whose addresses and
//! routes hold for them.

use std::collections::BTreeSet;

use super::links::{Kind, Link, LinkTable};
use crate::abi::next_hop::{TAGS_MAX, Tag};

impl LinkTable {
    /// The interface whose addresses and routes hold for frames that come in by this one with these tags (the outer one first);
    /// `None` when no interface is for them.
    pub(super) fn layer3(&self, index: u32, tags: &[Tag]) -> Option<u32> {
        let (mut index, mut tags) = (index, tags.to_vec());
        // A VLAN, a bond or a bridge each bring the frame one further.
        for _ in 0..self.len() + 1 {
            let link = self.get(index)?;
            if let Some(outer) = tags.first()
                && let Some(vlan) = self.vlan_on(index, *outer)
            {
                index = vlan;
                tags.remove(0);
                continue;
            }
            let master = link.master.and_then(|master| Some((master, self.get(master)?)));
            match master.map(|(master, link)| (master, link, link.kind)) {
                Some((master, _, Kind::Group)) => index = master,
                Some((master, bridge, Kind::Bridge { filters, ad })) => {
                    index = master;
                    if filters {
                        tags = into_bridge(link, bridge, ad, tags)?;
                    }
                }
                _ => return tags.is_empty().then_some(index),
            }
        }
        None
    }

    fn vlan_on(&self, lower: u32, tag: Tag) -> Option<u32> {
        let is = |link: &Link| link.lower == Some(lower) && link.kind == Kind::Vlan(tag);
        self.iter().find(|(_, link)| is(link)).map(|(index, _)| index)
    }

    /// The interfaces by which, and the tags with which, frames come in that some VLAN interface is for.
    pub(super) fn tagged_arrivals(&self) -> BTreeSet<(u32, Vec<Tag>)> {
        let vlans = self.iter().filter(|(_, link)| matches!(link.kind, Kind::Vlan(_)));
        let all = vlans.flat_map(|(index, _)| self.arrivals(index, 0));
        all.filter(|(_, tags)| (1..=TAGS_MAX).contains(&tags.len())).collect()
    }

    /// Where frames for an interface may come in.
    fn arrivals(&self, index: u32, depth: usize) -> BTreeSet<(u32, Vec<Tag>)> {
        let mut all = BTreeSet::from([(index, Vec::new())]);
        let Some(link) = self.get(index).filter(|_| depth < 8) else { return all };
        match (link.kind, link.lower) {
            (Kind::Vlan(tag), Some(lower)) => {
                for (device, mut tags) in self.arrivals(lower, depth + 1) {
                    tags.push(tag);
                    all.insert((device, tags));
                }
            }
            (Kind::Group | Kind::Bridge { .. }, _) => {
                let ports = self.iter().filter(|(_, port)| port.master == Some(index));
                all.extend(ports.flat_map(|(port, _)| self.arrivals(port, depth + 1)));
            }
            _ => {}
        }
        all
    }
}

/// The tags with which a bridge that filters takes a frame for itself; `None` when it does not.
fn into_bridge(port: &Link, bridge: &Link, ad: bool, mut tags: Vec<Tag>) -> Option<Vec<Tag>> {
    let id = match tags.first() {
        Some(outer) if outer.ad == ad && outer.id != 0 => tags.remove(0).id,
        _ => port.pvid()?,
    };
    port.vlans.get(&id)?;
    if !bridge.vlans.get(&id)?.untagged {
        tags.insert(0, Tag { id, ad });
    }
    Some(tags)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::{
        super::links::{
            Membership,
            tests::{link, links, tag},
        },
        *,
    };

    #[test]
    fn frames_of_a_trunk_are_for_the_interfaces_of_their_tags() {
        // A bond of 1 and 2 with VLAN 10, and on this one 20 (802.1ad outside); 7 is in a VRF.
        let outer = Tag { id: 10, ad: true };
        let links = links([
            (1, link(Kind::Device, Some(3), None)),
            (2, link(Kind::Device, Some(3), None)),
            (3, link(Kind::Group, None, None)),
            (4, link(Kind::Vlan(outer), None, Some(3))),
            (5, link(Kind::Vlan(tag(20)), None, Some(4))),
            (7, link(Kind::Device, Some(8), None)),
            (8, link(Kind::Device, None, None)),
        ]);
        assert_eq!(links.layer3(1, &[]), Some(3));
        assert_eq!(links.layer3(2, &[outer]), Some(4));
        assert_eq!(links.layer3(1, &[outer, tag(20)]), Some(5));
        assert_eq!(links.layer3(1, &[tag(10)]), None);
        assert_eq!(links.layer3(1, &[tag(20)]), None);
        assert_eq!(links.layer3(7, &[]), Some(7));
        let arrivals = links.tagged_arrivals();
        let expected = [1, 2, 3].map(|device| [(device, vec![outer]), (device, vec![outer, tag(20)])]);
        assert!(expected.iter().flatten().all(|arrival| arrivals.contains(arrival)), "{arrivals:?}");
        assert_eq!(arrivals.len(), 7, "and what comes in by the outer VLAN: {arrivals:?}");
    }

    #[test]
    fn frames_that_a_bridge_lets_in_are_for_it_or_its_vlans() {
        let member = |pvid, untagged| Membership { pvid, untagged };
        let port = |vlans: &[(u16, Membership)]| Link {
            vlans: vlans.iter().copied().collect(),
            ..link(Kind::Device, Some(3), None)
        };
        let bridge = |filters| Link {
            vlans: BTreeMap::from([(1, member(true, true)), (100, member(false, false))]),
            ..link(Kind::Bridge { filters, ad: false }, None, None)
        };
        let table = |filters| {
            links([
                (1, port(&[(1, member(true, true)), (100, member(false, false))])),
                (2, port(&[(100, member(true, true)), (200, member(false, false))])),
                (3, bridge(filters)),
                (4, link(Kind::Vlan(tag(100)), None, Some(3))),
            ])
        };
        let filters = table(true);
        assert_eq!(filters.layer3(1, &[]), Some(3));
        assert_eq!(filters.layer3(1, &[tag(100)]), Some(4));
        assert_eq!(filters.layer3(2, &[]), Some(4), "an access port of VLAN 100");
        assert_eq!(filters.layer3(2, &[tag(200)]), None, "the bridge itself is not in it");
        assert_eq!(filters.layer3(1, &[tag(200)]), None);
        let plain = table(false);
        assert_eq!(plain.layer3(2, &[]), Some(3));
        assert_eq!(plain.layer3(2, &[tag(100)]), Some(4));
        assert_eq!(plain.layer3(2, &[tag(200)]), None);
    }

    #[test]
    fn interfaces_that_lead_to_each_other_come_to_an_end() {
        let round = links([(1, link(Kind::Group, Some(2), None)), (2, link(Kind::Group, Some(1), None))]);
        assert_eq!(round.layer3(1, &[]), None);
        assert!(round.tagged_arrivals().is_empty());
    }
}
