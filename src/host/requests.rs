//! Questions and orders to rtnetlink.

use std::{collections::BTreeMap, io};

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    link::{LinkAttribute, LinkExtentMask, LinkMessage},
    neighbour::NeighbourMessage,
    route::RouteMessage,
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use super::{
    features::Features,
    links::{Link, LinkTable, vlans_of},
    neighbours::{Change, change_of},
};

/// Dumps that changed meanwhile are asked for again, up to this number of attempts.
const ATTEMPTS: usize = 5;

/// A socket for questions, of one network namespace.
#[derive(Debug)]
pub(super) struct Requests {
    socket: Socket,
    sequence: u32,
    /// `None` where the kernel cannot tell (before 6.3).
    features: Option<Features>,
}

impl Requests {
    /// In the network namespace of the calling thread.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0, features: Features::open()? })
    }

    /// All interfaces at this moment.
    pub(super) fn links(&mut self) -> io::Result<LinkTable> {
        let features = self.features.as_mut().map(Features::of_all).transpose()?;
        let mut links = BTreeMap::new();
        for message in self.dump(&link_request(AddressFamily::Unspec, LinkExtentMask::SkipStats))? {
            if let RouteNetlinkMessage::NewLink(link) = message {
                let index = link.header.index;
                let told = features.as_ref().map(|features| features.get(&index).copied().unwrap_or_default());
                links.insert(index, Link::of(&link, told));
            }
        }
        if links.values().any(Link::filters_vlans) {
            for message in self.dump(&link_request(AddressFamily::Bridge, LinkExtentMask::BrvlanCompressed))? {
                if let RouteNetlinkMessage::NewLink(port) = message
                    && let Some(link) = links.get_mut(&port.header.index)
                {
                    link.vlans = vlans_of(&port);
                }
            }
        }
        Ok(LinkTable::new(links))
    }

    /// All neighbours, and where bridges have learnt stations, at this moment.
    pub(super) fn neighbours(&mut self, links: &LinkTable) -> io::Result<Vec<Change>> {
        let mut changes = Vec::new();
        let mut families = vec![AddressFamily::Unspec];
        if links.has_bridges() {
            families.push(AddressFamily::Bridge);
        }
        for family in families {
            let mut question = NeighbourMessage::default();
            question.header.family = family;
            let found = self.dump(&RouteNetlinkMessage::GetNeighbour(question))?;
            changes.extend(found.iter().filter_map(change_of));
        }
        Ok(changes)
    }

    /// The route to an address; `None` when there is none.
    pub(super) fn route(&mut self, question: RouteMessage) -> io::Result<Option<RouteMessage>> {
        let sequence = self.send(RouteNetlinkMessage::GetRoute(question), NLM_F_REQUEST)?;
        match self.receive(sequence) {
            Ok((found, _)) => Ok(found.into_iter().find_map(|message| match message {
                RouteNetlinkMessage::NewRoute(route) => Some(route),
                _ => None,
            })),
            Err(error) => match error.raw_os_error() {
                Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::ESRCH | libc::EINVAL | libc::EACCES) => Ok(None),
                _ => Err(error),
            },
        }
    }

    /// Has the kernel do something.
    pub(super) fn order(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        let sequence = self.send(message, NLM_F_REQUEST | NLM_F_ACK | flags)?;
        self.receive(sequence).map(drop)
    }

    fn dump(&mut self, question: &RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        for _ in 1..ATTEMPTS {
            let sequence = self.send(question.clone(), NLM_F_REQUEST | NLM_F_DUMP)?;
            if let (found, false) = self.receive(sequence)? {
                return Ok(found);
            }
        }
        // It changes all the time: what is missing will be heard of.
        let sequence = self.send(question.clone(), NLM_F_REQUEST | NLM_F_DUMP)?;
        self.receive(sequence).map(|(found, _)| found)
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<u32> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut request = NetlinkMessage::from(message);
        request.header.flags = flags;
        request.header.sequence_number = self.sequence;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        Ok(self.sequence)
    }

    /// What belongs to a request, and whether it changed while the kernel told it.
    fn receive(&mut self, sequence: u32) -> io::Result<(Vec<RouteNetlinkMessage>, bool)> {
        let (mut found, mut changed) = (Vec::new(), false);
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            for message in messages(&datagram) {
                // What a newer kernel says in a way that the library does not know is left out.
                let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(message) else { continue };
                if message.header.sequence_number != sequence {
                    continue;
                }
                let several = message.header.flags & libc::NLM_F_MULTI as u16 != 0;
                changed |= message.header.flags & NLM_F_DUMP_INTR != 0;
                match message.payload {
                    NetlinkPayload::Done(_) => return Ok((found, changed)),
                    NetlinkPayload::Error(status) if status.code.is_some() => return Err(status.to_io()),
                    NetlinkPayload::Error(_) => return Ok((found, changed)),
                    NetlinkPayload::InnerMessage(inner) => {
                        found.push(inner);
                        if !several {
                            return Ok((found, changed));
                        }
                    }
                    _ => {}
                }
            }
        }
    }
}

/// The messages of a datagram, each with its header.
pub(super) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = &[u8]> {
    const HEADER: usize = 16;
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(*datagram.first_chunk()?) as usize;
        let message = datagram.get(..length).filter(|message| message.len() >= HEADER)?;
        // They are padded to four bytes.
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

fn link_request(family: AddressFamily, mask: LinkExtentMask) -> RouteNetlinkMessage {
    let mut question = LinkMessage::default();
    question.header.interface_family = family;
    question.attributes = vec![LinkAttribute::ExtMask(vec![mask])];
    RouteNetlinkMessage::GetLink(question)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_datagram_that_is_cut_short_ends() {
        let mut one = [0_u8; 20];
        one[..4].copy_from_slice(&18_u32.to_ne_bytes());
        let two = [&one[..], &one[..]].concat();
        assert_eq!(messages(&two).map(<[u8]>::len).collect::<Vec<_>>(), [18, 18]);
        assert_eq!(messages(&two[..37]).count(), 1);
        assert_eq!(messages(&[0; 64]).count(), 0);
    }

    /// Needs root.
    #[test]
    fn every_namespace_has_a_link_and_answers_after_a_refusal() {
        let ns = xdpkit_lab::Namespace::new("requests").unwrap();
        let mut requests = ns.run(Requests::open).unwrap();
        let gone = RouteNetlinkMessage::DelNeighbour(NeighbourMessage::default());
        assert!(requests.order(gone, 0).is_err());
        let links = requests.links().unwrap();
        assert!(links.get(ns.ifindex("lo").unwrap()).is_some());
        assert!(requests.neighbours(&links).is_ok());
    }
}
