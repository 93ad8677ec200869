//! What the kernel's routing tables say of an address, asked over rtnetlink (`RTM_GETROUTE`).

use std::{io, net::IpAddr};

use super::netlink;

/// The way to an address, as a packet of this host's own would go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Route {
    /// It is one of this host's own addresses.
    pub(crate) local: bool,
    /// It is reached through a router.
    pub(crate) gateway: bool,
    /// The address that this host would send from.
    pub(crate) source: Option<IpAddr>,
    /// Index of the interface that packets leave by.
    pub(crate) interface: Option<u32>,
}

const ROUTE_MESSAGE: usize = 12;

/// The route to an address in the network namespace of the calling thread; `None` when there is none.
pub(crate) fn route_to(address: IpAddr) -> io::Result<Option<Route>> {
    route_in(address, None)
}

/// By the routes of a VRF, whose interface this is.
pub(crate) fn route_in(address: IpAddr, vrf: Option<u32>) -> io::Result<Option<Route>> {
    match netlink::ask(libc::RTM_GETROUTE, &request_for(address, vrf)) {
        Ok(answer) => parse(&answer, address.is_ipv4()).map(Some),
        Err(error) => match error.raw_os_error() {
            Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::ESRCH | libc::EINVAL | libc::EACCES) => Ok(None),
            _ => Err(error),
        },
    }
}

fn request_for(address: IpAddr, vrf: Option<u32>) -> Vec<u8> {
    let (family, octets) = match address {
        IpAddr::V4(ip) => (libc::AF_INET, ip.octets().to_vec()),
        IpAddr::V6(ip) => (libc::AF_INET6, ip.octets().to_vec()),
    };
    let mut message = vec![family as u8, octets.len() as u8 * 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    netlink::put(&mut message, libc::RTA_DST, &octets);
    vrf.iter().for_each(|index| netlink::put(&mut message, libc::RTA_OIF, &index.to_ne_bytes()));
    message
}

fn parse(answer: &[u8], ipv4: bool) -> io::Result<Route> {
    const TYPE_AT: usize = 7;
    let short = || io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer is cut short");
    let mut route = Route { local: *answer.get(TYPE_AT).ok_or_else(short)? == libc::RTN_LOCAL, ..Route::default() };
    for (kind, value) in netlink::attributes(answer.get(ROUTE_MESSAGE..).ok_or_else(short)?) {
        match kind {
            libc::RTA_GATEWAY | libc::RTA_VIA => route.gateway = true,
            libc::RTA_OIF => route.interface = netlink::u32_of(value),
            libc::RTA_PREFSRC if ipv4 => route.source = <[u8; 4]>::try_from(value).ok().map(IpAddr::from),
            libc::RTA_PREFSRC => route.source = <[u8; 16]>::try_from(value).ok().map(IpAddr::from),
            _ => {}
        }
    }
    Ok(route)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_local_and_reached_from_itself() {
        let address: IpAddr = "127.0.0.1".parse().unwrap();
        let route = route_to(address).unwrap().expect("every host has one");
        assert_eq!((route.local, route.gateway, route.source), (true, false, Some(address)));
        assert!(route.interface.is_some());
        assert!(route_to("::1".parse().unwrap()).unwrap().is_some_and(|route| route.local));
    }
}
