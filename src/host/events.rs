//! What the kernel tells of changes without being asked.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::{Arc, Mutex, PoisonError},
};

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, protocols::NETLINK_ROUTE};

use super::{
    features::Features,
    neighbours::{Change, change_of},
    requests::messages,
};
use crate::sys::wake::Source;

/// `enum rtnetlink_groups`.
const LINK: u32 = 1;
const NEIGH: u32 = 3;
/// Addresses, routes, rules, forwarding settings, next hops by number: all that decides where a packet goes.
const ROUTES: [u32; 9] = [5, 7, 8, 9, 11, 19, 24, 25, 32];
/// Longer messages are not about neighbours.
const BUFFER: usize = 1 << 15;
/// More changes than this are read from the tables instead.
const CHANGES_MAX: usize = 1 << 16;

/// What was heard since the last time.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Heard {
    /// Of interfaces: it is time to look at them.
    pub(super) links: bool,
    /// Of routes and what belongs to them.
    pub(super) routes: bool,
    /// Of neighbours and stations, in the order in which it happened.
    pub(super) changes: Vec<Change>,
    /// The kernel has left something out.
    pub(super) overrun: bool,
}

/// A socket that hears of some things, in one network namespace.
#[derive(Debug)]
pub(super) struct Events {
    socket: Socket,
    heard: Mutex<Heard>,
    about: About,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum About {
    LinksAndNeighbours,
    Routes,
    Features,
}

impl Events {
    /// Of interfaces, in the network namespace of the calling thread.
    pub(super) fn of_links() -> io::Result<Arc<Self>> {
        let events = Self::open(About::LinksAndNeighbours)?;
        events.socket.add_membership(LINK)?;
        Ok(events)
    }

    /// From now on, of neighbours too.
    pub(super) fn add_neighbours(&self) -> io::Result<()> {
        self.socket.add_membership(NEIGH)
    }

    /// Of nothing yet, in the network namespace of the calling thread.
    pub(super) fn of_routes() -> io::Result<Arc<Self>> {
        Self::open(About::Routes)
    }

    /// From now on, of routes.
    pub(super) fn add_routes(&self) -> io::Result<()> {
        ROUTES.into_iter().try_for_each(|group| self.socket.add_membership(group))
    }

    /// Of what interfaces can do, in the network namespace of the calling thread; `None` when the kernel cannot tell.
    pub(super) fn of_features() -> io::Result<Option<Arc<Self>>> {
        let socket = Features::listen()?;
        Ok(socket.map(|socket| Arc::new(Self { socket, heard: Mutex::default(), about: About::Features })))
    }

    fn open(about: About) -> io::Result<Arc<Self>> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.set_non_blocking(true)?;
        // As much as the kernel allows without privileges; an overrun tells of what does not fit.
        let _ = socket.set_rx_buf_sz(1 << 20);
        Ok(Arc::new(Self { socket, heard: Mutex::default(), about }))
    }

    /// What was heard since the last time; after [`Source::drain`].
    pub(super) fn take(&self) -> Heard {
        std::mem::take(&mut *self.heard.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn hear(&self, heard: &mut Heard, datagram: &[u8]) {
        match self.about {
            // These can be many, and all mean the same.
            About::Routes => heard.routes = true,
            About::Features => heard.links = true,
            About::LinksAndNeighbours => messages(datagram).for_each(|message| heard.hear_one(message)),
        }
    }
}

impl Heard {
    fn hear_one(&mut self, message: &[u8]) {
        match u16::from_ne_bytes([message[4], message[5]]) {
            libc::RTM_NEWLINK | libc::RTM_DELLINK => self.links = true,
            libc::RTM_NEWNEIGH | libc::RTM_DELNEIGH => {
                match NetlinkMessage::<RouteNetlinkMessage>::deserialize(message) {
                    Ok(NetlinkMessage { payload: NetlinkPayload::InnerMessage(inner), .. }) => {
                        self.changes.extend(change_of(&inner));
                        if self.changes.len() > CHANGES_MAX {
                            self.changes.clear();
                            self.overrun = true;
                        }
                    }
                    _ => self.overrun = true,
                }
            }
            _ => {}
        }
    }

    /// Together with what was heard of other things.
    pub(super) fn and(mut self, other: Self) -> Self {
        self.links |= other.links;
        self.routes |= other.routes;
        self.overrun |= other.overrun;
        self.changes.extend(other.changes);
        self
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Source for Events {
    fn drain(&self) -> io::Result<()> {
        let mut buffer = Vec::with_capacity(BUFFER);
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            buffer.clear();
            match self.socket.recv(&mut buffer, 0) {
                Ok(_) => self.hear(&mut heard, &buffer),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => match self.about {
                    About::Routes => heard.routes = true,
                    About::LinksAndNeighbours | About::Features => heard.overrun = true,
                },
                Err(error) => return Err(error),
            }
        }
    }
}
