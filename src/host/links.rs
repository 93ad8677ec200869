//! Network interfaces and how they stand on each other.

use std::{collections::BTreeMap, io};

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// A socket for questions, of one network namespace.
#[derive(Debug)]
pub(super) struct Requests(Socket);

impl Requests {
    /// In the network namespace of the calling thread.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self(socket))
    }

    /// All interfaces at this moment.
    pub(super) fn links(&mut self) -> io::Result<LinkTable> {
        let all = self.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
        let links = all.into_iter().filter_map(|message| match message {
            RouteNetlinkMessage::NewLink(link) => Some((link.header.index, Link::of(&link))),
            _ => None,
        });
        Ok(LinkTable(links.collect()))
    }

    fn dump(&mut self, question: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        let mut request = NetlinkMessage::from(question);
        request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.0.send(&bytes, 0)?;
        let mut found = Vec::new();
        loop {
            let (datagram, _) = self.0.recv_from_full()?;
            let mut rest = &datagram[..];
            while !rest.is_empty() {
                let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest);
                // Messages are padded to four bytes; a length of zero would loop for ever.
                let length = rest.first_chunk().copied().map_or(4, u32::from_ne_bytes) as usize;
                rest = rest.get(length.next_multiple_of(4).max(4)..).unwrap_or_default();
                // What a newer kernel says in a way that the library does not know is left out.
                let Ok(message) = message else { continue };
                match message.payload {
                    NetlinkPayload::Done(_) => return Ok(found),
                    NetlinkPayload::Error(status) => return Err(status.to_io()),
                    NetlinkPayload::InnerMessage(inner) => found.push(inner),
                    _ => {}
                }
            }
        }
    }
}

/// What matters of an interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Link {
    mac: Option<[u8; 6]>,
    /// The bridge, bond, team or VRF that it is a port of.
    master: Option<u32>,
    /// The interface that it stands on: of a VLAN, macvlan, ipvlan, MACsec and the like.
    lower: Option<u32>,
}

impl Link {
    fn of(message: &LinkMessage) -> Self {
        let mut link = Self::default();
        let (mut kind, mut elsewhere) = (None, false);
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::Address(address) => link.mac = address.as_slice().try_into().ok(),
                LinkAttribute::Controller(master) => link.master = Some(*master),
                LinkAttribute::Link(lower) => link.lower = Some(*lower),
                LinkAttribute::LinkNetNsId(_) => elsewhere = true,
                LinkAttribute::LinkInfo(infos) => {
                    kind = infos.iter().find_map(|info| match info {
                        LinkInfo::Kind(kind) => Some(kind.clone()),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        // Of a veth it is the other end, of a tunnel what its packets leave by.
        let stands_on_it = match &kind {
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
        };
        link.lower = link.lower.filter(|_| stands_on_it && !elsewhere);
        link
    }
}

/// The interfaces of a network namespace, by index.
#[derive(Debug)]
pub(super) struct LinkTable(BTreeMap<u32, Link>);

impl LinkTable {
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
mod tests {
    use super::*;

    fn table(links: &[(u32, u8, Option<u32>, Option<u32>)]) -> LinkTable {
        let link = |&(index, last, master, lower): &(u32, u8, Option<u32>, Option<u32>)| {
            (index, Link { mac: Some([2, 0, 0, 0, 0, last]), master, lower })
        };
        LinkTable(links.iter().map(link).collect())
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
}
