//! What clients and backends of a NAT balancer say to each other, packet by packet.

use std::net::{IpAddr, SocketAddr};

use xdpkit::{ConnectionState, Reason, ServiceAddr, ServiceProtocol};
use xdpkit_lab::frame::{Frame, tcp};

use super::nat::{Bench, SERVICES, at, service};

/// A client's and a service's ends of each protocol and family, with a client of the same family.
pub(crate) fn conversations() -> impl Iterator<Item = (ServiceAddr, SocketAddr, SocketAddr, SocketAddr)> {
    SERVICES.into_iter().map(|(name, backend)| {
        let name = service(name);
        let client = if name.address.is_ipv4() { "10.0.0.20:4000" } else { "[2001:db8:a::20]:4000" };
        (name, at(client), (name.address, name.port.unwrap()).into(), at(backend))
    })
}

pub(crate) fn segment(service: &ServiceAddr, from: SocketAddr, to: SocketAddr) -> Frame {
    match service.protocol {
        ServiceProtocol::Tcp => Frame::tcp(from, to),
        _ => Frame::udp(from, to),
    }
    .payload(&[7; 33])
}

/// Opens a connection as a client and a backend do, and answers it. UDP: one datagram each way and one more.
pub(crate) fn open(bench: &Bench, service: &ServiceAddr, client: SocketAddr) -> xdpkit::Connection {
    let vip = SocketAddr::new(service.address, service.port.unwrap());
    let first = bench.client_sends(&segment(service, client, vip));
    assert_eq!(first.reason, Reason::Forwarded, "{service}");
    let found = bench.balancer.find(client, service).unwrap().unwrap();
    let answer = segment(service, found.backend, found.source);
    let confirm = segment(service, client, vip);
    if service.protocol == ServiceProtocol::Tcp {
        assert_eq!(found.state, ConnectionState::TcpSyn);
        let answer = answer.flags(tcp::SYN | tcp::ACK).sequence(1000, 2);
        assert_eq!(bench.backend_sends(&answer).reason, Reason::Answered);
        let confirm = confirm.flags(tcp::ACK).sequence(2, 1001);
        assert_eq!(bench.client_sends(&confirm).reason, Reason::Forwarded);
    } else {
        assert_eq!(found.state, ConnectionState::UdpNew);
        assert_eq!(bench.backend_sends(&answer).reason, Reason::Answered);
        assert_eq!(bench.client_sends(&confirm).reason, Reason::Forwarded);
    }
    let found = bench.balancer.find(client, service).unwrap().unwrap();
    let open = [ConnectionState::TcpEstablished, ConnectionState::UdpAnswered];
    assert!(open.contains(&found.state), "{found}");
    found
}

pub(crate) const TCP4: &str = "tcp/10.0.0.100:80";

pub(crate) fn tcp4(flags: u8) -> Frame {
    Frame::tcp(at("10.0.0.20:4000"), at("10.0.0.100:80")).flags(flags)
}

pub(crate) fn state(bench: &Bench, client: SocketAddr) -> Option<ConnectionState> {
    bench.balancer.find(client, &service(TCP4)).unwrap().map(|found| found.state)
}

/// ICMP's "fragmentation needed" and "packet too big" about this packet.
pub(crate) fn too_big(from: IpAddr, to: IpAddr, about: &Frame, cut: usize) -> Frame {
    let mut quoted = about.packet();
    quoted.truncate(cut);
    match from {
        IpAddr::V4(_) => Frame::icmp(from, to, 3, 4, [0, 0, 5, 120]).payload(&quoted),
        IpAddr::V6(_) => Frame::icmp(from, to, 2, 0, [0, 0, 5, 120]).payload(&quoted),
    }
}
