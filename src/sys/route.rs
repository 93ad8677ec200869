//! What the kernel's routing tables say of an address, asked over rtnetlink (`RTM_GETROUTE`).

use std::{
    io,
    net::IpAddr,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

/// The way to an address, as a packet of this host's own would go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Route {
    /// It is one of this host's own addresses.
    pub(crate) local: bool,
    /// It is reached through a router.
    pub(crate) gateway: bool,
    /// The address that this host would send from.
    pub(crate) source: Option<IpAddr>,
}

const HEADER: usize = 16;
const ROUTE_MESSAGE: usize = 12;

/// The route to an address in the network namespace of the calling thread; `None` when there is none.
pub(crate) fn route_to(address: IpAddr) -> io::Result<Option<Route>> {
    // SAFETY: no pointers are involved.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_ROUTE) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor, and nobody else knows it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let request = request_for(address);
    // SAFETY: the kernel reads so many bytes of a live buffer. Unbound and unconnected, a netlink socket talks to it.
    let sent = unsafe { libc::send(socket.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut answer = [0_u8; 4096];
    // SAFETY: the kernel writes at most so many bytes to a live buffer.
    let length = unsafe { libc::recv(socket.as_raw_fd(), answer.as_mut_ptr().cast(), answer.len(), 0) };
    match usize::try_from(length) {
        Ok(length) => parse(&answer[..length], address.is_ipv4()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

fn request_for(address: IpAddr) -> Vec<u8> {
    let (family, octets) = match address {
        IpAddr::V4(ip) => (libc::AF_INET, ip.octets().to_vec()),
        IpAddr::V6(ip) => (libc::AF_INET6, ip.octets().to_vec()),
    };
    let attribute = 4 + octets.len();
    let length = HEADER + ROUTE_MESSAGE + attribute;
    let mut message = Vec::with_capacity(length);
    message.extend((length as u32).to_ne_bytes());
    message.extend(libc::RTM_GETROUTE.to_ne_bytes());
    message.extend((libc::NLM_F_REQUEST as u16).to_ne_bytes());
    message.extend([0; 8]); // sequence number and port: there is one answer, to this socket
    message.extend([family as u8, octets.len() as u8 * 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    message.extend((attribute as u16).to_ne_bytes());
    message.extend(libc::RTA_DST.to_ne_bytes());
    message.extend(octets);
    message
}

fn parse(answer: &[u8], ipv4: bool) -> io::Result<Option<Route>> {
    let short = || io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer is cut short");
    let u16_at = |at: usize| answer.get(at..at + 2).map(|b| u16::from_ne_bytes([b[0], b[1]])).ok_or_else(short);
    if i32::from(u16_at(4)?) == libc::NLMSG_ERROR {
        let code = answer.get(HEADER..HEADER + 4).ok_or_else(short)?;
        let code = -i32::from_ne_bytes([code[0], code[1], code[2], code[3]]);
        return match code {
            libc::ENETUNREACH | libc::EHOSTUNREACH | libc::ESRCH | libc::EINVAL | libc::EACCES => Ok(None),
            other => Err(io::Error::from_raw_os_error(other)),
        };
    }
    const TYPE_AT: usize = HEADER + 7;
    let mut route = Route { local: *answer.get(TYPE_AT).ok_or_else(short)? == libc::RTN_LOCAL, ..Route::default() };
    let mut at = HEADER + ROUTE_MESSAGE;
    while at + 4 <= answer.len() {
        let (length, kind) = (usize::from(u16_at(at)?), u16_at(at + 2)?);
        let value = answer.get(at + 4..at + length.max(4)).ok_or_else(short)?;
        match kind {
            libc::RTA_GATEWAY | libc::RTA_VIA => route.gateway = true,
            libc::RTA_PREFSRC if ipv4 => route.source = <[u8; 4]>::try_from(value).ok().map(IpAddr::from),
            libc::RTA_PREFSRC => route.source = <[u8; 16]>::try_from(value).ok().map(IpAddr::from),
            _ => {}
        }
        at += length.next_multiple_of(4).max(4);
    }
    Ok(Some(route))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_local_and_reached_from_itself() {
        let address: IpAddr = "127.0.0.1".parse().unwrap();
        let route = route_to(address).unwrap().expect("every host has one");
        assert_eq!(route, Route { local: true, gateway: false, source: Some(address) });
        assert!(route_to("::1".parse().unwrap()).unwrap().is_some_and(|route| route.local));
    }
}
