//! How frames leave by an interface: through VLANs and bridges to the device that takes them.

use super::{
    links::{Kind, LinkTable},
    neighbours::{Neighbours, Station},
};
use crate::abi::next_hop::{Egress, TAGS_MAX, Tag};

/// More interfaces than this are not on top of each other.
const DEPTH: usize = 16;

/// How frames leave, and what is in the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Leaving {
    pub(super) egress: Egress,
    /// A bridge on the path has not learnt where the neighbour is.
    pub(super) unlearnt: bool,
}

impl From<Egress> for Leaving {
    fn from(egress: Egress) -> Self {
        Self { egress, unlearnt: false }
    }
}

/// Which devices transmit what programs redirect to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transmit {
    /// Those whose drivers can.
    Native,
    /// All with Ethernet headers: programs in generic mode hand frames to them as the stack does.
    Generic,
}

/// How frames to a neighbour with this MAC address leave by an interface. Without one, bridges on the path are as far as it goes.
pub(super) fn leaving(
    links: &LinkTable,
    neighbours: &Neighbours,
    interface: u32,
    to: Option<[u8; 6]>,
    transmit: Transmit,
) -> Leaving {
    let (mut index, mut tags) = (interface, Vec::new());
    for _ in 0..DEPTH {
        let Some(link) = links.get(index).filter(|link| link.up) else { return Egress::None.into() };
        match link.kind {
            Kind::Vlan(tag) => {
                tags.insert(0, tag);
                let Some(lower) = link.lower else { return Egress::Stack(0, Vec::new()).into() };
                index = lower;
            }
            Kind::Bridge { filters, ad } => {
                let Some(to) = to else { return Egress::Bridge.into() };
                let vlan = if filters { vlan_in_bridge(links, index, ad, &mut tags) } else { Some(0) };
                // The bridge drops it, and says so in its counters.
                let Some(vlan) = vlan else { return Egress::Stack(0, Vec::new()).into() };
                let Some(port) = neighbours.port_of(Station { bridge: index, vlan, mac: to }) else {
                    return Leaving { egress: Egress::Stack(0, Vec::new()), unlearnt: true };
                };
                let Some(link) = links.get(port).filter(|link| link.forwards) else { return Egress::None.into() };
                if filters {
                    let Some(member) = link.vlans.get(&vlan) else { return Egress::Stack(0, Vec::new()).into() };
                    if !member.untagged {
                        tags.insert(0, Tag { id: vlan, ad });
                    }
                }
                index = port;
            }
            Kind::Device | Kind::Group => {
                let within = tags.len() <= TAGS_MAX;
                let transmits = link.transmits || transmit == Transmit::Generic && link.ethernet;
                return match transmits && within {
                    true => Egress::Device(index, tags),
                    false if within => Egress::Stack(index, tags),
                    false => Egress::Stack(0, Vec::new()),
                }
                .into();
            }
        }
    }
    Egress::Stack(0, Vec::new()).into()
}

/// The VLAN of a frame of the host's own in a bridge that filters, whose tag it takes; `None` when the bridge lets it go
/// nowhere.
fn vlan_in_bridge(links: &LinkTable, bridge: u32, ad: bool, tags: &mut Vec<Tag>) -> Option<u16> {
    let bridge = links.get(bridge)?;
    let id = match tags.first() {
        Some(outer) if outer.ad == ad => tags.remove(0).id,
        _ => bridge.pvid()?,
    };
    bridge.vlans.contains_key(&id).then_some(id)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::{
        super::{
            links::{
                Link, Membership,
                tests::{link, links, tag},
            },
            neighbours::Change,
        },
        *,
    };

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

    fn stations(all: &[(u32, u16, u32)]) -> Neighbours {
        let station =
            |&(bridge, vlan, port): &(u32, u16, u32)| Change::Station(Station { bridge, vlan, mac: MAC }, Some(port));
        Neighbours::of(all.iter().map(station).collect())
    }

    #[test]
    fn tags_of_vlans_are_pushed_the_outer_one_last() {
        let outer = Tag { id: 10, ad: true };
        let all = |up| {
            links([
                (1, Link { up, ..link(Kind::Device, None, None) }),
                (2, link(Kind::Vlan(outer), None, Some(1))),
                (3, link(Kind::Vlan(tag(20)), None, Some(2))),
                (4, link(Kind::Vlan(tag(30)), None, Some(3))),
                (5, link(Kind::Vlan(tag(40)), None, None)),
                (6, Link { transmits: false, ..link(Kind::Device, None, None) }),
                (7, link(Kind::Vlan(tag(50)), None, Some(6))),
                (8, link(Kind::Vlan(tag(60)), None, Some(8))),
            ])
        };
        let of = |index| leaving(&all(true), &Neighbours::default(), index, None, Transmit::Native).egress;
        assert_eq!(of(1), Egress::Device(1, vec![]));
        assert_eq!(of(2), Egress::Device(1, vec![outer]));
        assert_eq!(of(3), Egress::Device(1, vec![outer, tag(20)]));
        assert_eq!(of(4), Egress::Stack(0, vec![]), "too many");
        assert_eq!(of(5), Egress::Stack(0, vec![]), "its device is in another namespace");
        assert_eq!(of(7), Egress::Stack(6, vec![tag(50)]));
        let generic = leaving(&all(true), &Neighbours::default(), 7, None, Transmit::Generic).egress;
        assert_eq!(generic, Egress::Device(6, vec![tag(50)]));
        assert_eq!(of(8), Egress::Stack(0, vec![]), "round and round");
        assert_eq!(of(9), Egress::None);
        assert_eq!(
            leaving(&all(false), &Neighbours::default(), 3, None, Transmit::Native).egress,
            Egress::None,
            "a link is down"
        );
    }

    #[test]
    fn a_bridge_sends_to_the_port_that_it_has_learnt() {
        // A bridge of 1, and of VLAN 10 on the trunk 2; VLAN 5 on the bridge.
        let all = |forwards| {
            links([
                (1, Link { forwards, ..link(Kind::Device, Some(9), None) }),
                (2, link(Kind::Device, None, None)),
                (3, link(Kind::Vlan(tag(10)), Some(9), Some(2))),
                (9, link(Kind::Bridge { filters: false, ad: false }, None, None)),
                (10, link(Kind::Vlan(tag(5)), None, Some(9))),
            ])
        };
        let of = |known: &[_], index| leaving(&all(true), &stations(known), index, Some(MAC), Transmit::Native);
        assert_eq!(of(&[(9, 0, 1)], 9), Egress::Device(1, vec![]).into());
        assert_eq!(of(&[(9, 0, 3)], 9), Egress::Device(2, vec![tag(10)]).into());
        assert_eq!(of(&[(9, 0, 3)], 10), Egress::Device(2, vec![tag(10), tag(5)]).into());
        assert_eq!(of(&[], 9), Leaving { egress: Egress::Stack(0, vec![]), unlearnt: true });
        assert_eq!(leaving(&all(true), &stations(&[(9, 0, 1)]), 10, None, Transmit::Native), Egress::Bridge.into());
        assert_eq!(leaving(&all(false), &stations(&[(9, 0, 1)]), 9, Some(MAC), Transmit::Native), Egress::None.into());
    }

    #[test]
    fn a_bridge_that_filters_tags_as_its_ports_say() {
        let member = |pvid, untagged| Membership { pvid, untagged };
        let vlans = |all: &[(u16, Membership)]| all.iter().copied().collect::<BTreeMap<_, _>>();
        let all = links([
            (
                1,
                Link {
                    vlans: vlans(&[(1, member(true, true)), (100, member(false, false))]),
                    ..link(Kind::Device, Some(9), None)
                },
            ),
            (2, Link { vlans: vlans(&[(100, member(true, true))]), ..link(Kind::Device, Some(9), None) }),
            (
                9,
                Link {
                    vlans: vlans(&[(1, member(true, true)), (100, member(false, false))]),
                    ..link(Kind::Bridge { filters: true, ad: false }, None, None)
                },
            ),
            (10, link(Kind::Vlan(tag(100)), None, Some(9))),
            (11, link(Kind::Vlan(tag(200)), None, Some(9))),
        ]);
        let of = |known: &[_], index| leaving(&all, &stations(known), index, Some(MAC), Transmit::Native).egress;
        assert_eq!(of(&[(9, 1, 1)], 9), Egress::Device(1, vec![]));
        assert_eq!(of(&[(9, 100, 1)], 10), Egress::Device(1, vec![tag(100)]));
        assert_eq!(of(&[(9, 100, 2)], 10), Egress::Device(2, vec![]), "an access port");
        assert_eq!(of(&[(9, 1, 2)], 9), Egress::Stack(0, vec![]), "the port is not in the VLAN");
        assert_eq!(of(&[(9, 100, 1)], 9), Egress::Stack(0, vec![]), "learnt in another VLAN");
        assert_eq!(of(&[(9, 200, 1)], 11), Egress::Stack(0, vec![]), "the bridge is not in the VLAN");
    }
}
