//! Every topology carries real traffic in both families, without any program under test.

use std::net::IpAddr;
use std::time::Duration;

use xdpkit_lab::topology::{Addresses, DsrIpip, DsrL2, Nat, Pair};
use xdpkit_lab::traffic::{self, TcpEcho, UdpEcho};
use xdpkit_lab::{Namespace, PacketSocket};

const SECOND: Duration = Duration::from_secs(1);
const VIP4: std::net::Ipv4Addr = std::net::Ipv4Addr::new(10, 99, 0, 1);
const VIP6: std::net::Ipv6Addr = std::net::Ipv6Addr::new(0x2001, 0xdb8, 0x99, 0, 0, 0, 0, 1);

/// TCP, UDP and ping from one namespace to an address of another.
fn check(from: &Namespace, to: &Namespace, ip: IpAddr) {
    let tcp = TcpEcho::start(to, (ip, 7000).into()).unwrap();
    let udp = UdpEcho::start(to, (ip, 7000).into()).unwrap();
    let payload = vec![b'x'; 100_000];
    let echo = traffic::tcp_echo(from, tcp.addr(), &payload, 5 * SECOND);
    assert!(echo.unwrap() == payload, "TCP {} to {ip}", from.name());
    let echo = traffic::udp_echo(from, udp.addr(), &payload[..1000], SECOND);
    assert!(echo.unwrap() == payload[..1000], "UDP {} to {ip}", from.name());
    check_ping(from, ip);
}

fn check_ping(from: &Namespace, ip: IpAddr) {
    let report = traffic::ping(from, ip, 2, Duration::ZERO, 2 * SECOND).unwrap();
    assert_eq!(report.received, 2, "ping {} to {ip}", from.name());
}

fn check_both(from: &Namespace, to: &Namespace, addresses: Addresses) {
    for ip in addresses.both() {
        check(from, to, ip);
    }
}

#[test]
fn pair_carries_traffic_both_ways() {
    let pair = Pair::new().unwrap();
    check_both(&pair.client, &pair.server, pair.server_addr);
    check_both(&pair.server, &pair.client, pair.client_addr);
}

#[test]
fn pair_with_clients_joins_all_of_them() {
    let pair = Pair::with_clients(3).unwrap();
    for client in &pair.clients {
        check_both(client, &pair.server, pair.server_addr);
    }
    check_both(&pair.clients[0], &pair.clients[2], pair.client_addrs[2]);
}

#[test]
fn nat_routes_between_clients_and_backends() {
    let nat = Nat::new(2, 2).unwrap();
    for client in &nat.clients {
        for (backend, addresses) in nat.backends.iter().zip(&nat.backend_addrs) {
            check_both(client, backend, *addresses);
        }
        check_both(client, &nat.balancer, nat.front_addr);
    }
    check_both(&nat.backends[0], &nat.balancer, nat.back_addr);
}

#[test]
fn dsr_l2_routes_between_its_nodes() {
    let dsr = DsrL2::new(2, VIP4, VIP6).unwrap();
    check_both(&dsr.client, &dsr.balancer, dsr.balancer_addr);
    for (backend, addresses) in dsr.backends.iter().zip(&dsr.backend_addrs) {
        check_both(&dsr.client, backend, *addresses);
        check_both(&dsr.balancer, backend, *addresses);
        check_both(backend, &dsr.client, dsr.client_addr);
    }
}

#[test]
fn dsr_ipip_routes_between_its_nodes() {
    let dsr = DsrIpip::with_mtu(2, VIP4, VIP6, 1540).unwrap();
    check_both(&dsr.client, &dsr.balancer, dsr.balancer_addr);
    for (backend, addresses) in dsr.backends.iter().zip(&dsr.backend_addrs) {
        check_both(&dsr.client, backend, *addresses);
        check_both(&dsr.balancer, backend, *addresses);
        check_both(backend, &dsr.client, dsr.client_addr);
    }
}

/// Whether a frame carries a packet from the client to a virtual address.
fn is_request(frame: &[u8]) -> bool {
    match frame.get(12..14) {
        Some([0x08, 0x00]) => frame[30..34] == VIP4.octets(),
        Some([0x86, 0xdd]) => frame[38..54] == VIP6.octets(),
        _ => false,
    }
}

#[test]
fn only_the_balancer_sees_requests_for_the_virtual_address() {
    let l2 = DsrL2::new(2, VIP4, VIP6).unwrap();
    let ipip = DsrIpip::new(2, VIP4, VIP6).unwrap();
    for (client, balancer, backends) in
        [(&l2.client, &l2.balancer, &l2.backends), (&ipip.client, &ipip.balancer, &ipip.backends)]
    {
        // What the kernel would forward by itself, back to the gateway, is not of interest.
        balancer.sysctl("net.ipv4.ip_forward", "0").unwrap();
        balancer.sysctl("net.ipv6.conf.all.forwarding", "0").unwrap();
        for vip in [VIP4.into(), VIP6.into()] {
            let at_balancer = PacketSocket::open(balancer, "eth0").unwrap();
            let at_backends: Vec<_> =
                backends.iter().map(|backend| PacketSocket::open(backend, "eth0").unwrap()).collect();
            let report = traffic::ping(client, vip, 1, Duration::ZERO, SECOND / 5).unwrap();
            assert_eq!(report.received, 0, "{vip} answers without a balancer");
            assert!(at_balancer.recv_matching(SECOND, is_request).unwrap().is_some(), "{vip}");
            for backend in at_backends {
                assert_eq!(backend.recv_matching(SECOND / 20, is_request).unwrap(), None, "{vip}");
            }
        }
    }
}

#[test]
fn the_virtual_address_may_be_the_balancers_own() {
    let balancer6 = "2001:db8:b::10".parse().unwrap();
    let dsr = DsrL2::new(2, [192, 168, 178, 10].into(), balancer6).unwrap();
    check_both(&dsr.client, &dsr.balancer, dsr.balancer_addr);
    check_ping(&dsr.client, dsr.backend_addrs[1].v4.into());
}
