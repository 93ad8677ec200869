//! The NAT balancer, packet by packet: what comes in, what has to go out. Traps: L1 to L6, L10 to L16, L18 to L23, H3.

mod common;

use common::nat::{Bench, SERVICES, Side, VIP4, VIP6, at, ip, service};
use xdpkit::{
    Action, ConnectionState, Error, NatBalancer, NatConfig, NatMode, NatService, Reason, Scheduler, ServiceAddr,
    Stage as _,
};
use xdpkit_lab::frame::{Frame, tcp};

/// A client's and a service's ends of each protocol and family, with a client of the same family.
fn conversations()
-> impl Iterator<Item = (ServiceAddr, std::net::SocketAddr, std::net::SocketAddr, std::net::SocketAddr)> {
    SERVICES.into_iter().map(|(name, backend)| {
        let name = service(name);
        let client = if name.address.is_ipv4() { "10.0.0.20:4000" } else { "[2001:db8:a::20]:4000" };
        (name, at(client), (name.address, name.port.unwrap()).into(), at(backend))
    })
}

fn segment(service: &ServiceAddr, from: std::net::SocketAddr, to: std::net::SocketAddr) -> Frame {
    match service.protocol {
        xdpkit::ServiceProtocol::Tcp => Frame::tcp(from, to),
        _ => Frame::udp(from, to),
    }
    .payload(&[7; 33])
}

#[test]
fn packets_are_translated_both_ways_with_every_checksum_right() {
    for mode in [NatMode::Full, NatMode::Destination] {
        let bench = Bench::with_services(&NatConfig::default(), mode);
        for (service, client, vip, backend) in conversations() {
            let there = segment(&service, client, vip);
            let went = bench.from_client(&there);
            let connection = bench.balancer.find(client, &service).unwrap().expect("there is a connection");
            match mode {
                NatMode::Full => assert_eq!(connection.source.ip(), vip.ip()),
                _ => assert_eq!(connection.source, client),
            }
            assert_eq!((connection.client, connection.backend), (client, backend));
            let wanted = segment(&service, connection.source, backend).ttl(63);
            assert_eq!(went, bench.to_backend(&wanted), "{mode:?} {service}");

            let back = segment(&service, backend, connection.source);
            let back =
                if service.protocol == xdpkit::ServiceProtocol::Tcp { back.flags(tcp::SYN | tcp::ACK) } else { back };
            let came = bench.from_backend(&back);
            let wanted = segment(&service, vip, client).ttl(63);
            let wanted = if service.protocol == xdpkit::ServiceProtocol::Tcp {
                wanted.flags(tcp::SYN | tcp::ACK)
            } else {
                wanted
            };
            assert_eq!(came, bench.to_client(&wanted), "{mode:?} {service}");
        }
    }
}
