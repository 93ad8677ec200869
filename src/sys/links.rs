//! The interfaces of one network namespace, asked and listened to over rtnetlink: the sockets stay in the namespace in which
//! they were opened, whoever uses them later and wherever that thread is.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::{Mutex, PoisonError},
};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use super::wake::Source;

/// `enum rtnetlink_groups`: what becomes of interfaces.
const RTNLGRP_LINK: u32 = 1;
const HEADER: usize = 16;
/// `struct ifinfomsg`.
const LINK_MESSAGE: usize = 16;
const IFLA_XDP: u16 = 43;
/// In `IFLA_XDP`: the program of each mode.
const IFLA_XDP_PROG_ID: u16 = 4;
const IFLA_XDP_HW_PROG_ID: u16 = 7;
/// Nested attributes may carry a flag.
const TYPE_MASK: u16 = 0x3fff;

/// Sockets of one network namespace.
#[derive(Debug)]
pub(crate) struct Links {
    requests: Mutex<Socket>,
    events: Socket,
}

/// An interface, as the kernel describes it at this moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct LinkState {
    pub(crate) index: u32,
    /// The programs that it runs, of all modes.
    pub(crate) programs: Vec<u32>,
}

impl Links {
    /// Opens the sockets in the network namespace of the calling thread. Nothing is listened to yet.
    pub(crate) fn open() -> io::Result<Self> {
        let mut requests = Socket::new(NETLINK_ROUTE)?;
        requests.bind_auto()?;
        requests.connect(&SocketAddr::new(0, 0))?;
        let mut events = Socket::new(NETLINK_ROUTE)?;
        events.bind_auto()?;
        events.set_non_blocking(true)?;
        Ok(Self { requests: Mutex::new(requests), events })
    }

    /// The interface of this name; `None` when there is none.
    pub(crate) fn by_name(&self, name: &str) -> io::Result<Option<LinkState>> {
        let mut text = name.as_bytes().to_vec();
        text.push(0);
        self.ask(&request(0, Some(&text)))
    }

    /// The interface of this index; `None` when there is none.
    pub(crate) fn by_index(&self, index: u32) -> io::Result<Option<LinkState>> {
        self.ask(&request(index, None))
    }

    fn ask(&self, request: &[u8]) -> io::Result<Option<LinkState>> {
        let socket = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        socket.send(request, 0)?;
        let (answer, _) = socket.recv_from_full()?;
        parse(&answer)
    }

    /// Fills the descriptor with what becomes of interfaces from now on.
    pub(crate) fn listen(&self) -> io::Result<()> {
        self.events.add_membership(RTNLGRP_LINK)
    }

    /// Takes what was heard. It only means that it is time to look: so does an overrun, in which the kernel has let some
    /// of it go.
    pub(crate) fn drain(&self) -> io::Result<()> {
        let mut buffer = Vec::with_capacity(1 << 13);
        loop {
            buffer.clear();
            match self.events.recv(&mut buffer, 0) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl AsFd for Links {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}

impl Source for Links {
    fn drain(&self) -> io::Result<()> {
        Links::drain(self)
    }
}

/// `RTM_GETLINK` by index, or by a name with its zero.
fn request(index: u32, name: Option<&[u8]>) -> Vec<u8> {
    let mut message = vec![0; HEADER];
    message[4..6].copy_from_slice(&libc::RTM_GETLINK.to_ne_bytes());
    message[6..8].copy_from_slice(&(libc::NLM_F_REQUEST as u16).to_ne_bytes());
    message.extend([0; 4]);
    message.extend(index.to_ne_bytes());
    message.extend([0; 8]);
    if let Some(name) = name {
        message.extend((4 + name.len() as u16).to_ne_bytes());
        message.extend(libc::IFLA_IFNAME.to_ne_bytes());
        message.extend(name);
        message.resize(message.len().next_multiple_of(4), 0);
    }
    let length = message.len() as u32;
    message[..4].copy_from_slice(&length.to_ne_bytes());
    message
}

fn parse(answer: &[u8]) -> io::Result<Option<LinkState>> {
    let short = || io::Error::new(io::ErrorKind::InvalidData, "the kernel's description of an interface is cut short");
    let kind = answer.get(4..6).map(u16_of).ok_or_else(short)?;
    if i32::from(kind) == libc::NLMSG_ERROR {
        let code = answer.get(HEADER..HEADER + 4).map(u32_of).ok_or_else(short)?;
        return match (code as i32).wrapping_neg() {
            libc::ENODEV => Ok(None),
            other => Err(io::Error::from_raw_os_error(other)),
        };
    }
    let index = answer.get(HEADER + 4..HEADER + 8).map(u32_of).ok_or_else(short)?;
    let mut state = LinkState { index, programs: Vec::new() };
    for (kind, value) in Attributes(answer.get(HEADER + LINK_MESSAGE..).ok_or_else(short)?) {
        if kind == IFLA_XDP {
            let of_programs =
                Attributes(value).filter(|(kind, _)| (IFLA_XDP_PROG_ID..=IFLA_XDP_HW_PROG_ID).contains(kind));
            state.programs.extend(of_programs.filter_map(|(_, value)| value.get(..4).map(u32_of)));
        }
    }
    Ok(Some(state))
}

/// Attributes of a message, by type.
struct Attributes<'a>(&'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = usize::from(u16_of(self.0.get(..2)?));
        let kind = u16_of(self.0.get(2..4)?) & TYPE_MASK;
        let value = self.0.get(4..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    }
}

fn u16_of(bytes: &[u8]) -> u16 {
    u16::from_ne_bytes([bytes[0], bytes[1]])
}

fn u32_of(bytes: &[u8]) -> u32 {
    u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_are_found_by_name_and_index() {
        let links = Links::open().unwrap();
        let by_name = links.by_name("lo").unwrap().expect("every namespace has one");
        assert_eq!(links.by_index(by_name.index).unwrap(), Some(by_name));
        assert_eq!(links.by_name("nope0").unwrap(), None);
        assert_eq!(links.by_index(999_999).unwrap(), None);
    }

    /// Needs root.
    #[test]
    fn an_overrun_is_heard_of_and_over() {
        let ns = xdpkit_lab::Namespace::new("overrun").unwrap();
        let links = ns.run(Links::open).unwrap();
        links.listen().unwrap();
        links.events.set_rx_buf_sz(4096).unwrap();
        for mtu in 1400..1600 {
            ns.set_mtu("lo", mtu).unwrap();
        }
        let fd = std::os::fd::AsRawFd::as_raw_fd(&links.events);
        let readable = || super::super::net::wait_readable(fd, std::time::Duration::ZERO).unwrap();
        assert!(readable());
        links.drain().unwrap();
        assert!(!readable());
        ns.set_mtu("lo", 1300).unwrap();
        assert!(readable(), "what comes after an overrun is heard");
    }
}
