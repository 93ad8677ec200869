//! What interfaces can do with XDP, as the kernel tells it (netdev generic netlink, Linux 6.3).

use std::{collections::BTreeMap, io};

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NlasIterator};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_GENERIC};

use super::requests::messages;

/// `NETDEV_XDP_ACT_NDO_XMIT`: other interfaces' frames can be transmitted by it.
pub(super) const TRANSMITS: u64 = 4;

const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const CTRL_ATTR_MCAST_GROUPS: u16 = 7;
const CTRL_ATTR_MCAST_GRP_NAME: u16 = 1;
const CTRL_ATTR_MCAST_GRP_ID: u16 = 2;
const NETDEV_CMD_DEV_GET: u8 = 1;
const NETDEV_A_DEV_IFINDEX: u16 = 1;
const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;
/// `struct nlmsghdr`, and with `struct genlmsghdr` behind it.
const HEADER: usize = 16;
const HEADERS: usize = 20;

/// A socket for questions of one network namespace.
#[derive(Debug)]
pub(super) struct Features {
    socket: Socket,
    family: u16,
    sequence: u32,
}

impl Features {
    /// In the network namespace of the calling thread; `None` when the kernel cannot tell.
    pub(super) fn open() -> io::Result<Option<Self>> {
        let (socket, Some((family, _))) = (open()?, family()?) else { return Ok(None) };
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Some(Self { socket, family, sequence: 0 }))
    }

    /// `enum netdev_xdp_act` of every interface.
    pub(super) fn of_all(&mut self) -> io::Result<BTreeMap<u32, u64>> {
        self.sequence = self.sequence.wrapping_add(1);
        let flags = NLM_F_REQUEST | NLM_F_DUMP;
        let found = ask(&self.socket, &request(self.family, NETDEV_CMD_DEV_GET, flags, self.sequence, &[]), true)?;
        let mut features = BTreeMap::new();
        for message in found {
            let (mut index, mut told) = (None, 0);
            attributes(&message, |kind, value| match kind {
                NETDEV_A_DEV_IFINDEX => index = value.first_chunk().copied().map(u32::from_ne_bytes),
                NETDEV_A_DEV_XDP_FEATURES => told = value.first_chunk().copied().map_or(0, u64::from_ne_bytes),
                _ => {}
            });
            features.extend(index.map(|index| (index, told)));
        }
        Ok(features)
    }

    /// A socket that hears of changes; `None` when the kernel cannot tell.
    pub(super) fn listen() -> io::Result<Option<Socket>> {
        let (socket, Some((_, Some(group)))) = (open()?, family()?) else { return Ok(None) };
        socket.set_non_blocking(true)?;
        socket.add_membership(group)?;
        Ok(Some(socket))
    }
}

fn open() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_GENERIC)?;
    socket.bind_auto()?;
    Ok(socket)
}

/// The numbers of the family, and of the group that hears of interfaces.
fn family() -> io::Result<Option<(u16, Option<u32>)>> {
    let socket = open()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let name = b"netdev\0";
    let mut body = (4 + name.len() as u16).to_ne_bytes().to_vec();
    body.extend(CTRL_ATTR_FAMILY_NAME.to_ne_bytes());
    body.extend(name);
    body.push(0);
    let found = match ask(&socket, &request(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, NLM_F_REQUEST, 1, &body), false) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        found => found?,
    };
    let (mut id, mut group) = (None, None);
    for message in found {
        attributes(&message, |kind, value| match kind {
            CTRL_ATTR_FAMILY_ID => id = value.first_chunk().copied().map(u16::from_ne_bytes),
            CTRL_ATTR_MCAST_GROUPS => group = group_named(value, b"mgmt\0"),
            _ => {}
        });
    }
    Ok(id.map(|id| (id, group)))
}

fn group_named(groups: &[u8], wanted: &[u8]) -> Option<u32> {
    NlasIterator::new(groups).filter_map(Result::ok).find_map(|group| {
        let (mut is, mut id) = (false, None);
        for attribute in NlasIterator::new(group.value()).filter_map(Result::ok) {
            match attribute.kind() {
                CTRL_ATTR_MCAST_GRP_NAME => is = attribute.value() == wanted,
                CTRL_ATTR_MCAST_GRP_ID => id = attribute.value().first_chunk().copied().map(u32::from_ne_bytes),
                _ => {}
            }
        }
        id.filter(|_| is)
    })
}

fn request(family: u16, command: u8, flags: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
    let mut message = ((HEADERS + body.len()) as u32).to_ne_bytes().to_vec();
    message.extend(family.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend(sequence.to_ne_bytes());
    message.extend([0; 4]);
    message.extend([command, 1, 0, 0]);
    message.extend(body);
    message
}

/// The replies to a request, without those to earlier ones.
fn ask(socket: &Socket, request: &[u8], several: bool) -> io::Result<Vec<Vec<u8>>> {
    socket.send(request, 0)?;
    let mut found = Vec::new();
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        for message in messages(&datagram).filter(|message| message[8..12] == request[8..12]) {
            match i32::from(u16::from_ne_bytes([message[4], message[5]])) {
                libc::NLMSG_DONE => return Ok(found),
                libc::NLMSG_ERROR => {
                    let code = message[HEADER..].first_chunk().copied().map_or(0, i32::from_ne_bytes);
                    return Err(io::Error::from_raw_os_error(-code));
                }
                _ => found.push(message.to_vec()),
            }
        }
        if !several && !found.is_empty() {
            return Ok(found);
        }
    }
}

fn attributes(message: &[u8], mut each: impl FnMut(u16, &[u8])) {
    for attribute in NlasIterator::new(message.get(HEADERS..).unwrap_or_default()).filter_map(Result::ok) {
        each(attribute.kind(), attribute.value());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Needs root, and says nothing of kernels before 6.3.
    #[test]
    fn a_veth_end_transmits_once_the_other_receives() {
        let [a, b] = ["a", "b"].map(|name| xdpkit_lab::Namespace::new(name).unwrap());
        xdpkit_lab::veth((&a, "eth0"), (&b, "eth0")).unwrap();
        let Some(mut features) = a.run(Features::open).unwrap() else { return };
        let index = a.ifindex("eth0").unwrap();
        let mut transmits = || features.of_all().unwrap()[&index] & TRANSMITS != 0;
        b.set_gro("eth0", false).unwrap();
        assert!(!transmits());
        let _pass = b.xdp_pass("eth0").unwrap();
        assert!(transmits());
    }
}
