//! Devices that stand on others: VLANs, bonds, VRFs, and bridges that filter VLANs. Not every kernel has them
//! ([`Error::is_unsupported`](crate::Error::is_unsupported)).

use netlink_packet_route::link::LinkAttribute;

use crate::error::{Context, Result};
use crate::namespace::Namespace;
use crate::sys;

/// A VLAN tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tag {
    /// IEEE 802.1Q.
    Customer(u16),
    /// IEEE 802.1ad.
    Service(u16),
}

impl Namespace {
    /// Creates a VLAN on an interface and sets it up. Programs see the tag only where the other end of the wire does not hide
    /// it ([`set_vlan_offload`](Self::set_vlan_offload)).
    pub fn add_vlan(&self, name: &str, lower: &str, tag: Tag) -> Result<()> {
        let index = self.ifindex(lower)?;
        let (service, id) = match tag {
            Tag::Customer(id) => (false, id),
            Tag::Service(id) => (true, id),
        };
        let added = self.netlink().add_vlan(name, index, service, id);
        added.context(|| self.about(name, &format!("create the VLAN {tag:?} on {lower}")))?;
        self.set_up(name)
    }

    /// Lets an interface send tags beside the frame, where XDP programs at the other end of a veth do not see them, or in it.
    pub fn set_vlan_offload(&self, dev: &str, on: bool) -> Result<()> {
        for feature in ["tx-vlan-hw-insert", "tx-vlan-stag-hw-insert"] {
            let set = sys::ethtool::set_feature(self.control(), dev, feature, on);
            set.context(|| self.about(dev, &format!("turn {feature} {}", if on { "on" } else { "off" })))?;
        }
        Ok(())
    }

    /// Creates an active-backup bond of these ports, all up, that looks at their carrier every 20 ms.
    pub fn add_bond(&self, name: &str, ports: &[&str]) -> Result<()> {
        self.netlink().add_bond(name, 20).context(|| self.about(name, "create the bond"))?;
        for port in ports {
            // It takes no port that is up.
            self.set_down(port)?;
            self.join(port, name)?;
        }
        self.set_up(name)
    }

    /// Creates a VRF with its routes in a table, and moves interfaces into it: their routes must be added afterwards.
    pub fn add_vrf(&self, name: &str, table: u32, devices: &[&str]) -> Result<()> {
        self.netlink().add_vrf(name, table).context(|| self.about(name, "create the VRF"))?;
        self.set_up(name)?;
        devices.iter().try_for_each(|dev| self.join(dev, name))
    }

    /// Creates a bridge that filters VLANs, with the given ports, all up and so far in no VLAN but 1.
    pub fn add_filtering_bridge(&self, name: &str, ports: &[&str]) -> Result<()> {
        self.netlink().add_filtering_bridge(name).context(|| self.about(name, "create the filtering bridge"))?;
        ports.iter().try_for_each(|port| self.join(port, name))?;
        self.set_up(name)
    }

    /// Makes a port of a bridge, or the bridge itself, a member of a VLAN.
    pub fn add_bridge_vlan(&self, dev: &str, id: u16, membership: Membership) -> Result<()> {
        let (is_bridge, untagged) = match membership {
            Membership::Untagged => (false, true),
            Membership::Tagged => (false, false),
            Membership::Bridge => (true, false),
        };
        let added = self.netlink().add_bridge_vlan(self.ifindex(dev)?, is_bridge, id, untagged);
        added.context(|| self.about(dev, &format!("join VLAN {id}")))
    }

    fn join(&self, port: &str, controller: &str) -> Result<()> {
        let index = self.ifindex(controller)?;
        let set = self.netlink().set_link(self.ifindex(port)?, vec![LinkAttribute::Controller(index)]);
        set.context(|| self.about(port, &format!("join {controller}")))?;
        self.set_up(port)
    }
}

/// How a bridge's port is in a VLAN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Membership {
    /// Its frames have no tag, and what has none is of this VLAN.
    Untagged,
    /// Its frames have a tag.
    Tagged,
    /// It is the bridge itself: a VLAN on the bridge has them.
    Bridge,
}
