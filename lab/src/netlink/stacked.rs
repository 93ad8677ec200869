//! Devices that stand on others: VLANs, bonds, VRFs, and bridges that filter VLANs.

use std::io;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::link::{
    AfSpecBridge, BondMode, BridgeFlag, BridgeVlanInfo, BridgeVlanInfoFlags, InfoBond, InfoBridge, InfoData, InfoKind,
    InfoVlan, InfoVrf, LinkAttribute, LinkMessage, VlanProtocol,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::Netlink;

impl Netlink {
    /// Creates a VLAN on an interface: 802.1ad (a service tag) or 802.1Q.
    pub(crate) fn add_vlan(&self, name: &str, lower: u32, service: bool, id: u16) -> io::Result<()> {
        let protocol = if service { VlanProtocol::Ieee8021Ad } else { VlanProtocol::Ieee8021Q };
        let data = InfoData::Vlan(vec![InfoVlan::Protocol(protocol), InfoVlan::Id(id)]);
        self.add_link(name, InfoKind::Vlan, data, vec![LinkAttribute::Link(lower)])
    }

    /// Creates an active-backup bond that looks at its ports' carrier every so many milliseconds.
    pub(crate) fn add_bond(&self, name: &str, milliseconds: u32) -> io::Result<()> {
        let options = vec![InfoBond::Mode(BondMode::ActiveBackup), InfoBond::MiiMon(milliseconds)];
        self.add_link(name, InfoKind::Bond, InfoData::Bond(options), vec![])
    }

    /// Creates a VRF whose routes are in this table.
    pub(crate) fn add_vrf(&self, name: &str, table: u32) -> io::Result<()> {
        self.add_link(name, InfoKind::Vrf, InfoData::Vrf(vec![InfoVrf::TableId(table)]), vec![])
    }

    /// Creates a bridge that forwards a VLAN's frames to that VLAN's ports only.
    pub(crate) fn add_filtering_bridge(&self, name: &str) -> io::Result<()> {
        let options = vec![InfoBridge::MulticastSnooping(false), InfoBridge::VlanFiltering(true)];
        self.add_link(name, InfoKind::Bridge, InfoData::Bridge(options), vec![])
    }

    /// Makes a port (or the bridge itself) a member of a VLAN; `untagged`: without tag on the wire, and what comes in without
    /// one is of this VLAN.
    pub(crate) fn add_bridge_vlan(&self, index: u32, is_bridge: bool, id: u16, untagged: bool) -> io::Result<()> {
        let flags = match untagged {
            true => BridgeVlanInfoFlags::Pvid | BridgeVlanInfoFlags::Untagged,
            false => BridgeVlanInfoFlags::empty(),
        };
        let whose = if is_bridge { BridgeFlag::LowerDev } else { BridgeFlag::Controller };
        let mut link = LinkMessage::default();
        link.header.interface_family = AddressFamily::Bridge;
        link.header.index = index;
        let vlan = AfSpecBridge::VlanInfo(BridgeVlanInfo { flags, vid: id });
        link.attributes = vec![LinkAttribute::AfSpecBridge(vec![AfSpecBridge::Flags(whose), vlan])];
        self.request(RouteNetlinkMessage::SetLink(link), NLM_F_CREATE | NLM_F_EXCL).map(drop)
    }
}
