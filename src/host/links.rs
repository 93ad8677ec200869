//! Network interfaces and how they stand on each other.

use std::collections::BTreeMap;

use netlink_packet_route::link::{
    AfSpecBridge, BridgePortState, BridgeVlanInfoFlags, InfoBridge, InfoBridgePort, InfoData, InfoKind, InfoPortData,
    InfoVlan, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage, VlanProtocol,
};

use super::features::TRANSMITS;
use crate::abi::next_hop::Tag;

/// What matters of an interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) mac: Option<[u8; 6]>,
    /// The bridge, bond, team or VRF that it is a port of.
    pub(super) master: Option<u32>,
    /// The interface that it stands on: of a VLAN, macvlan, ipvlan, MACsec and the like.
    pub(super) lower: Option<u32>,
    pub(super) kind: Kind,
    pub(super) mtu: u32,
    /// A VRF: its ports have routes of their own.
    pub(super) vrf: bool,
    /// It takes frames and brings them somewhere.
    pub(super) up: bool,
    /// It transmits what programs of other interfaces redirect to it.
    pub(super) transmits: bool,
    /// Its frames have Ethernet headers.
    pub(super) ethernet: bool,
    /// As a port of a bridge: frames pass.
    pub(super) forwards: bool,
    /// As a bridge that filters, or a port of one: whose frames pass.
    pub(super) vlans: BTreeMap<u16, Membership>,
}

/// What frames to and from an interface go through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Kind {
    /// A card, a veth end, a bond, a tunnel: what takes frames as they are.
    #[default]
    Device,
    /// A bond or team: what its ports receive comes in by it.
    Group,
    Vlan(Tag),
    Bridge {
        filters: bool,
        /// It goes by tags of 802.1ad.
        ad: bool,
    },
}

/// Of a VLAN, at a port of a bridge.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Membership {
    /// Untagged frames that come in are of it.
    pub(super) pvid: bool,
    /// Its frames leave untagged.
    pub(super) untagged: bool,
}

impl Link {
    /// `features` are what the kernel says that it can do with XDP, where the kernel does.
    pub(super) fn of(message: &LinkMessage, features: Option<u64>) -> Self {
        let flags = message.header.flags;
        let mut link =
            Self { up: flags.contains(LinkFlags::Up | LinkFlags::LowerUp | LinkFlags::Running), ..Self::default() };
        let (mut kind, mut elsewhere) = (None, false);
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::Address(address) => link.mac = address.as_slice().try_into().ok(),
                LinkAttribute::Controller(master) => link.master = Some(*master),
                LinkAttribute::Link(lower) => link.lower = Some(*lower),
                LinkAttribute::LinkNetNsId(_) => elsewhere = true,
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::LinkInfo(infos) => infos.iter().for_each(|info| match info {
                    LinkInfo::Kind(found) => kind = Some(found.clone()),
                    LinkInfo::Data(data) => link.kind = Kind::of(data).unwrap_or(link.kind),
                    LinkInfo::PortData(InfoPortData::BridgePort(port)) => {
                        link.forwards = port.contains(&InfoBridgePort::State(BridgePortState::Forwarding));
                    }
                    _ => {}
                }),
                _ => {}
            }
        }
        if matches!(kind, Some(InfoKind::Bond | InfoKind::Team)) {
            link.kind = Kind::Group;
        }
        link.vrf = matches!(kind, Some(InfoKind::Vrf));
        link.ethernet = message.header.link_layer_type == LinkLayerType::Ether;
        link.transmits =
            link.ethernet && features.map_or_else(|| may_transmit(kind.as_ref()), |told| told & TRANSMITS != 0);
        link.lower = link.lower.filter(|_| !elsewhere && stands_on_its_link(kind.as_ref()));
        link
    }

    pub(super) fn filters_vlans(&self) -> bool {
        matches!(self.kind, Kind::Bridge { filters: true, .. })
    }

    /// The VLAN of frames without a tag that come in by it.
    pub(super) fn pvid(&self) -> Option<u16> {
        self.vlans.iter().find(|(_, membership)| membership.pvid).map(|(id, _)| *id)
    }
}

impl Kind {
    fn of(data: &InfoData) -> Option<Self> {
        let is_ad = |protocol: &VlanProtocol| *protocol == VlanProtocol::Ieee8021Ad;
        match data {
            InfoData::Vlan(infos) => {
                let mut tag = Tag { id: 0, ad: false };
                for info in infos {
                    match info {
                        InfoVlan::Id(id) => tag.id = *id,
                        InfoVlan::Protocol(protocol) => tag.ad = is_ad(protocol),
                        _ => {}
                    }
                }
                Some(Self::Vlan(tag))
            }
            InfoData::Bridge(infos) => {
                let (mut filters, mut ad) = (false, false);
                for info in infos {
                    match info {
                        InfoBridge::VlanFiltering(on) => filters = *on,
                        InfoBridge::VlanProtocol(protocol) => ad = is_ad(protocol),
                        _ => {}
                    }
                }
                Some(Self::Bridge { filters, ad })
            }
            _ => None,
        }
    }
}

/// Whether the link that the kernel names is what it stands on. Of a veth it is the other end, of a tunnel what its packets
/// leave by.
fn stands_on_its_link(kind: Option<&InfoKind>) -> bool {
    match kind {
        Some(
            InfoKind::Vlan
            | InfoKind::MacVlan
            | InfoKind::MacVtap
            | InfoKind::IpVlan
            | InfoKind::IpVtap
            | InfoKind::MacSec,
        ) => true,
        Some(InfoKind::Other(name)) => matches!(name.as_str(), "ipvlan" | "ipvtap" | "macsec" | "hsr" | "dsa"),
        _ => false,
    }
}

/// Where the kernel does not tell whether a driver has `ndo_xdp_xmit` (before 6.3): of the virtual ones, these have it, and
/// of cards it is taken for granted.
fn may_transmit(kind: Option<&InfoKind>) -> bool {
    matches!(kind, None | Some(InfoKind::Veth | InfoKind::Tun | InfoKind::Bond))
}

/// The VLANs of a bridge or a port, told with the family `AF_BRIDGE`. Ranges are told by their ends.
pub(super) fn vlans_of(message: &LinkMessage) -> BTreeMap<u16, Membership> {
    let mut vlans = BTreeMap::new();
    let mut begin = None;
    for attribute in &message.attributes {
        let LinkAttribute::AfSpecBridge(infos) = attribute else { continue };
        for info in infos {
            let AfSpecBridge::VlanInfo(info) = info else { continue };
            if info.flags.contains(BridgeVlanInfoFlags::RangeBegin) {
                begin = Some(info.vid);
                continue;
            }
            let membership = Membership {
                pvid: info.flags.contains(BridgeVlanInfoFlags::Pvid),
                untagged: info.flags.contains(BridgeVlanInfoFlags::Untagged),
            };
            vlans.extend((begin.take().unwrap_or(info.vid)..=info.vid).map(|id| (id, membership)));
        }
    }
    vlans
}

/// The interfaces of a network namespace, by index.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct LinkTable(BTreeMap<u32, Link>);

impl LinkTable {
    pub(super) fn new(links: BTreeMap<u32, Link>) -> Self {
        Self(links)
    }

    pub(super) fn get(&self, index: u32) -> Option<&Link> {
        self.0.get(&index)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &Link)> {
        self.0.iter().map(|(index, link)| (*index, link))
    }

    /// The devices that frames of an interface leave by: those below a VLAN, and the ports of a bridge or bond.
    pub(super) fn below(&self, interface: u32) -> Vec<u32> {
        let (mut found, mut seen, mut open) = (Vec::new(), vec![interface], vec![interface]);
        while let Some(index) = open.pop() {
            let Some(link) = self.0.get(&index) else { continue };
            let next: Vec<u32> = match link.kind {
                Kind::Vlan(_) => link.lower.into_iter().collect(),
                Kind::Bridge { .. } => self.ports(index).collect(),
                Kind::Group | Kind::Device => Vec::new(),
            };
            if next.is_empty() {
                found.push(index);
            }
            for below in next {
                if !seen.contains(&below) {
                    seen.push(below);
                    open.push(below);
                }
            }
        }
        found
    }

    fn ports(&self, master: u32) -> impl Iterator<Item = u32> {
        self.iter().filter(move |(_, link)| link.master == Some(master)).map(|(index, _)| index)
    }

    /// The VRFs, each of which has routes of its own.
    pub(super) fn vrfs(&self) -> impl Iterator<Item = u32> {
        self.iter().filter(|(_, link)| link.vrf).map(|(index, _)| index)
    }

    pub(super) fn has_bridges(&self) -> bool {
        self.0.values().any(|link| matches!(link.kind, Kind::Bridge { .. }))
    }

    /// The MAC addresses of this interface and of all that stand on it, its own first, each once; none where it is not there.
    pub(super) fn own_macs(&self, interface: u32) -> Vec<[u8; 6]> {
        let (mut macs, mut seen, mut open) = (Vec::new(), vec![interface], vec![interface]);
        while let Some(index) = open.pop() {
            let Some(link) = self.0.get(&index) else { continue };
            macs.extend(link.mac.filter(|mac| !macs.contains(mac)));
            let above = self.0.iter().filter(|(_, other)| other.lower == Some(index)).map(|(index, _)| *index);
            for above in above.chain(link.master) {
                if !seen.contains(&above) {
                    seen.push(above);
                    open.push(above);
                }
            }
        }
        macs
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) const fn tag(id: u16) -> Tag {
        Tag { id, ad: false }
    }

    /// A link that is up and transmits.
    pub(in super::super) fn link(kind: Kind, master: Option<u32>, lower: Option<u32>) -> Link {
        Link {
            kind,
            master,
            lower,
            up: true,
            transmits: true,
            ethernet: true,
            forwards: true,
            mtu: 1500,
            ..Link::default()
        }
    }

    pub(in super::super) fn links<const N: usize>(links: [(u32, Link); N]) -> LinkTable {
        LinkTable(links.into())
    }

    fn table(of: &[(u32, u8, Option<u32>, Option<u32>)]) -> LinkTable {
        let link = |&(index, last, master, lower): &(u32, u8, Option<u32>, Option<u32>)| {
            (index, Link { mac: Some([2, 0, 0, 0, 0, last]), ..link(Kind::Device, master, lower) })
        };
        LinkTable(of.iter().map(link).collect())
    }

    #[test]
    fn addresses_of_all_that_stands_on_an_interface_are_its_hosts() {
        // A bond of 1 and 2, a VLAN on it, which is a port of a bridge, on which there is a macvlan; 8 has nothing to do with it.
        let links = table(&[
            (1, 1, Some(3), None),
            (2, 1, Some(3), None),
            (3, 1, None, None),
            (4, 4, Some(5), Some(3)),
            (5, 5, None, None),
            (6, 6, None, Some(5)),
            (8, 8, None, None),
        ]);
        let last = |interface| links.own_macs(interface).iter().map(|mac| mac[5]).collect::<Vec<_>>();
        assert_eq!(last(1), [1, 4, 5, 6]);
        assert_eq!(last(5), [5, 6]);
        assert_eq!(last(8), [8]);
        assert_eq!(last(9), [0; 0]);
    }

    #[test]
    fn interfaces_that_lead_to_each_other_come_to_an_end() {
        let links = table(&[(1, 1, Some(2), Some(2)), (2, 2, Some(1), Some(1))]);
        assert_eq!(links.own_macs(1).len(), 2);
    }

    #[test]
    fn ranges_of_vlans_are_told_by_their_ends() {
        use netlink_packet_route::link::BridgeVlanInfo;
        let info = |vid, flags| AfSpecBridge::VlanInfo(BridgeVlanInfo { vid, flags });
        let mut message = LinkMessage::default();
        message.attributes = vec![LinkAttribute::AfSpecBridge(vec![
            info(1, BridgeVlanInfoFlags::Pvid | BridgeVlanInfoFlags::Untagged),
            info(100, BridgeVlanInfoFlags::RangeBegin),
            info(103, BridgeVlanInfoFlags::RangeEnd),
        ])];
        let vlans = vlans_of(&message);
        assert_eq!(vlans.keys().copied().collect::<Vec<_>>(), [1, 100, 101, 102, 103]);
        assert_eq!(vlans[&1], Membership { pvid: true, untagged: true });
        assert_eq!(vlans[&103], Membership::default());
    }
}
