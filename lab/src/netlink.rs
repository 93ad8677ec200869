//! Rtnetlink requests of one namespace: the socket stays in the namespace it was opened in, so
//! requests need no thread inside.

mod routing;
mod stacked;

pub(crate) use routing::{RouteRequest, RuleRequest};

use std::fmt::Debug;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::RawFd;
use std::sync::{Mutex, PoisonError};

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    InfoBridge, InfoData, InfoKind, InfoMacVlan, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, LinkXdp,
    MacVlanMode,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

/// A request socket. One request at a time: requests from several threads wait for each other.
pub(crate) struct Netlink(Mutex<Socket>);

impl Debug for Netlink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Netlink")
    }
}

impl Netlink {
    /// Opens the socket in the namespace of the calling thread.
    pub(crate) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self(Mutex::new(socket)))
    }

    /// Creates a veth pair: `name` here, `peer` in the namespace behind `peer_ns`.
    pub(crate) fn add_veth(&self, name: &str, peer: &str, peer_ns: RawFd) -> io::Result<()> {
        let mut end = LinkMessage::default();
        end.attributes = vec![LinkAttribute::IfName(peer.into()), LinkAttribute::NetNsFd(peer_ns)];
        self.add_link(name, InfoKind::Veth, InfoData::Veth(InfoVeth::Peer(end)), vec![])
    }

    /// The same with this many queues at `name`, and one each at the peer.
    pub(crate) fn add_veth_with_queues(
        &self,
        name: &str,
        peer: &str,
        peer_ns: RawFd,
        transmit: u32,
        receive: u32,
    ) -> io::Result<()> {
        let mut end = LinkMessage::default();
        end.attributes = vec![
            LinkAttribute::IfName(peer.into()),
            LinkAttribute::NetNsFd(peer_ns),
            LinkAttribute::NumTxQueues(1),
            LinkAttribute::NumRxQueues(1),
        ];
        let queues = vec![LinkAttribute::NumTxQueues(transmit), LinkAttribute::NumRxQueues(receive)];
        self.add_link(name, InfoKind::Veth, InfoData::Veth(InfoVeth::Peer(end)), queues)
    }

    /// Creates a bridge that floods multicast, so that neighbour discovery does not depend on
    /// snooping state.
    pub(crate) fn add_bridge(&self, name: &str) -> io::Result<()> {
        let options = vec![InfoBridge::MulticastSnooping(false)];
        self.add_link(name, InfoKind::Bridge, InfoData::Bridge(options), vec![])
    }

    /// Has a bridge forget at once where stations are: it sends every frame to all ports, as a hub does.
    pub(crate) fn forget_stations(&self, name: &str, index: u32) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        let data = InfoData::Bridge(vec![InfoBridge::AgeingTime(0)]);
        link.attributes = vec![
            LinkAttribute::IfName(name.into()),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge), LinkInfo::Data(data)]),
        ];
        self.request(RouteNetlinkMessage::NewLink(link), 0).map(drop)
    }

    /// Creates a macvlan with a MAC address of its own on an interface.
    pub(crate) fn add_macvlan(&self, name: &str, lower: u32, mac: [u8; 6]) -> io::Result<()> {
        let more = vec![LinkAttribute::Link(lower), LinkAttribute::Address(mac.to_vec())];
        let data = InfoData::MacVlan(vec![InfoMacVlan::Mode(MacVlanMode::Private)]);
        self.add_link(name, InfoKind::MacVlan, data, more)
    }

    fn add_link(&self, name: &str, kind: InfoKind, data: InfoData, more: Vec<LinkAttribute>) -> io::Result<()> {
        let mut link = LinkMessage::default();
        let info = vec![LinkInfo::Kind(kind), LinkInfo::Data(data)];
        link.attributes = vec![LinkAttribute::IfName(name.into()), LinkAttribute::LinkInfo(info)];
        link.attributes.extend(more);
        self.request(RouteNetlinkMessage::NewLink(link), NLM_F_CREATE | NLM_F_EXCL).map(drop)
    }

    /// The interface's index and hardware address.
    pub(crate) fn link(&self, name: &str) -> io::Result<(u32, Vec<u8>)> {
        let mut query = LinkMessage::default();
        query.attributes = vec![LinkAttribute::IfName(name.into())];
        for answer in self.request(RouteNetlinkMessage::GetLink(query), 0)? {
            if let RouteNetlinkMessage::NewLink(link) = answer {
                let mac = link.attributes.iter().find_map(|attribute| match attribute {
                    LinkAttribute::Address(mac) => Some(mac.clone()),
                    _ => None,
                });
                return Ok((link.header.index, mac.unwrap_or_default()));
            }
        }
        Err(io::Error::from_raw_os_error(libc::ENODEV))
    }

    /// The id of the XDP program that the interface runs.
    pub(crate) fn xdp_program(&self, name: &str) -> io::Result<Option<u32>> {
        let mut query = LinkMessage::default();
        query.attributes = vec![LinkAttribute::IfName(name.into())];
        let answers = self.request(RouteNetlinkMessage::GetLink(query), 0)?;
        let links = answers.iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => Some(&link.attributes),
            _ => None,
        });
        let mut found = links.flatten().filter_map(|attribute| match attribute {
            LinkAttribute::Xdp(xdp) => xdp.iter().find_map(|entry| match entry {
                LinkXdp::ProgId(id) => Some(*id),
                _ => None,
            }),
            _ => None,
        });
        Ok(found.next())
    }

    pub(crate) fn set_link(&self, index: u32, attributes: Vec<LinkAttribute>) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.attributes = attributes;
        self.request(RouteNetlinkMessage::SetLink(link), 0).map(drop)
    }

    pub(crate) fn set_up(&self, index: u32, up: bool) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.header.change_mask = LinkFlags::Up;
        link.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
        self.request(RouteNetlinkMessage::SetLink(link), 0).map(drop)
    }

    pub(crate) fn delete_link(&self, index: u32) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        self.request(RouteNetlinkMessage::DelLink(link), 0).map(drop)
    }

    pub(crate) fn add_address(&self, index: u32, net: IpNet) -> io::Result<()> {
        let mut message = AddressMessage::default();
        message.header.family = family(net.addr());
        message.header.prefix_len = net.prefix_len();
        message.header.index = index;
        message.header.scope = AddressScope::Universe;
        if net.addr().is_ipv6() {
            message.header.flags = AddressHeaderFlags::Nodad;
        }
        message.attributes = vec![AddressAttribute::Local(net.addr()), AddressAttribute::Address(net.addr())];
        self.request(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_EXCL).map(drop)
    }

    pub(crate) fn remove_address(&self, index: u32, net: IpNet) -> io::Result<()> {
        let mut message = AddressMessage::default();
        message.header.family = family(net.addr());
        message.header.prefix_len = net.prefix_len();
        message.header.index = index;
        message.attributes = vec![AddressAttribute::Local(net.addr()), AddressAttribute::Address(net.addr())];
        self.request(RouteNetlinkMessage::DelAddress(message), 0).map(drop)
    }

    /// Sends one request and collects the answers up to its acknowledgement.
    fn request(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
        let socket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        socket.send(&bytes, 0)?;
        let mut answers = Vec::new();
        loop {
            let (datagram, _) = socket.recv_from_full()?;
            let mut rest = &datagram[..];
            while !rest.is_empty() {
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
                // Messages are padded to four bytes; a length of zero would loop for ever.
                let length = (answer.header.length as usize).next_multiple_of(4).max(4);
                rest = rest.get(length..).unwrap_or_default();
                match answer.payload {
                    NetlinkPayload::Error(status) => {
                        return match status.code {
                            None => Ok(answers),
                            Some(_) => Err(status.to_io()),
                        };
                    }
                    NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                    _ => {}
                }
            }
        }
    }
}

fn family(ip: IpAddr) -> AddressFamily {
    match ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

/// The default route of a gateway's family.
pub(crate) fn default_net(via: IpAddr) -> IpNet {
    match via {
        IpAddr::V4(_) => IpNet::new_assert(Ipv4Addr::UNSPECIFIED.into(), 0),
        IpAddr::V6(_) => IpNet::new_assert(Ipv6Addr::UNSPECIFIED.into(), 0),
    }
}
