//! By which neighbour the kernel reaches an address.

use std::{io, net::IpAddr};

use netlink_packet_route::{
    AddressFamily,
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteType, RouteVia},
};

use super::{links::LinkTable, requests::Requests};
use crate::abi::next_hop::NextHopKey;

/// `RTAX_MTU`, in the metric that says which others the administrator has fixed.
const LOCKED_MTU: u32 = 1 << 2;

/// The next hops to an address, as a packet without ports would go: by the host's own routes, and by those of each VRF. None
/// where there are none, or the address is the host's own.
pub(super) fn next_hops_of(address: IpAddr, links: &LinkTable, requests: &mut Requests) -> io::Result<Vec<NextHopKey>> {
    let mut found = Vec::new();
    for vrf in [None].into_iter().chain(links.vrfs().map(Some)) {
        let route = requests.route(question(address, vrf))?;
        found.extend(route.and_then(|route| key_of(&route, address, links)));
    }
    Ok(found)
}

fn question(address: IpAddr, vrf: Option<u32>) -> RouteMessage {
    let mut route = RouteMessage::default();
    (route.header.address_family, route.header.destination_prefix_length) = match address {
        IpAddr::V4(_) => (AddressFamily::Inet, 32),
        IpAddr::V6(_) => (AddressFamily::Inet6, 128),
    };
    route.attributes = vec![RouteAttribute::Destination(address.into())];
    route.attributes.extend(vrf.map(RouteAttribute::Oif));
    route
}

fn key_of(route: &RouteMessage, address: IpAddr, links: &LinkTable) -> Option<NextHopKey> {
    if route.header.kind != RouteType::Unicast {
        return None;
    }
    let (mut interface, mut neighbour, mut mtu, mut locked) = (None, address, None, false);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => interface = Some(*index),
            RouteAttribute::Gateway(RouteAddress::Inet(ip)) | RouteAttribute::Via(RouteVia::Inet(ip)) => {
                neighbour = IpAddr::V4(*ip);
            }
            RouteAttribute::Gateway(RouteAddress::Inet6(ip)) | RouteAttribute::Via(RouteVia::Inet6(ip)) => {
                neighbour = IpAddr::V6(*ip);
            }
            RouteAttribute::Metrics(metrics) => metrics.iter().for_each(|metric| match metric {
                RouteMetric::Mtu(bytes) => mtu = Some(*bytes),
                RouteMetric::Lock(which) => locked = which & LOCKED_MTU != 0,
                _ => {}
            }),
            _ => {}
        }
    }
    let interface = interface?;
    // As `bpf_fib_lookup` has it: a route's MTU counts where it is locked.
    let mtu = mtu.filter(|_| locked).unwrap_or(links.get(interface)?.mtu);
    Some(NextHopKey { interface, address: neighbour, mtu: u16::try_from(mtu).unwrap_or(u16::MAX) })
}

#[cfg(test)]
mod tests {
    //! These need root.

    use super::*;

    #[test]
    fn routes_name_the_neighbour_and_its_interface() {
        let [ns, other] = ["host", "other"].map(|name| xdpkit_lab::Namespace::new(name).unwrap());
        xdpkit_lab::veth((&ns, "eth0"), (&other, "eth0")).unwrap();
        for net in ["192.0.2.1/24", "2001:db8::1/64"] {
            ns.add_address("eth0", net.parse().unwrap()).unwrap();
        }
        for via in ["192.0.2.254", "2001:db8::fe"] {
            ns.add_default_route(via.parse().unwrap()).unwrap();
        }
        let mut requests = ns.run(Requests::open).unwrap();
        let links = requests.links().unwrap();
        let interface = ns.ifindex("eth0").unwrap();
        let mut of =
            |address: &str| next_hops_of(address.parse().unwrap(), &links, &mut requests).unwrap().into_iter().next();
        for (address, neighbour) in [
            ("192.0.2.9", Some("192.0.2.9")),
            ("198.51.100.1", Some("192.0.2.254")),
            ("2001:db8::9", Some("2001:db8::9")),
            ("2001:db8:1::1", Some("2001:db8::fe")),
            ("192.0.2.1", None),
            ("127.0.0.1", None),
            ("224.0.0.1", None),
        ] {
            let expected =
                neighbour.map(|address| NextHopKey { interface, address: address.parse().unwrap(), mtu: 1500 });
            assert_eq!(of(address), expected, "{address}");
        }
    }
}
