//! One forged datagram between real hosts, from one of our services to another: nobody talks to anybody for ever. Trap A4.

mod common;

use std::{net::SocketAddr, time::Duration};

use common::{
    dsr_net::{Net, Way},
    nat::{PATIENCE, attach, backends, ip},
    wait_for,
};
use xdpkit::{DsrConfig, DsrService, NatBalancer, NatConfig, NatMode, NatService, Reason, ServiceAddr, Stage as _};
use xdpkit_lab::{
    frame::Frame,
    packet::PacketSocket,
    topology::Nat,
    traffic::{UdpEcho, udp_echo},
};

/// Virtual addresses in pairs, routed to the balancer.
const PAIRS: [[&str; 2]; 2] = [["198.51.100.10", "198.51.100.11"], ["2001:db8:99::10", "2001:db8:99::11"]];

#[test]
fn a4_a_forged_datagram_between_two_services_of_the_nat_balancer_ends_there() {
    let lab = Nat::new(1, 2).unwrap();
    for mode in [NatMode::Full, NatMode::Destination] {
        let balancer = NatBalancer::load(&NatConfig::default()).unwrap();
        let _attached = attach(&lab, &balancer);
        // What leaves for a virtual address comes back: the client's host is the balancer's router.
        lab.clients[0].enable_forwarding().unwrap();
        for (family6, pair) in [(false, PAIRS[0].map(ip)), (true, PAIRS[1].map(ip))] {
            let backends = backends(&lab, family6, 7);
            let hosts = lab.backends.iter().zip(&backends);
            let echoes: Vec<_> = hosts.map(|(ns, at)| UdpEcho::start(ns, *at).unwrap()).collect();
            for (vip, backend) in pair.into_iter().zip(&backends) {
                balancer.insert(ServiceAddr::udp(vip, 7), &NatService::new([*backend]).mode(mode)).unwrap();
            }
            let received = || echoes.iter().map(UdpEcho::datagrams).sum::<usize>();
            for vip in pair {
                assert_eq!(udp_echo(&lab.clients[0], (vip, 7).into(), b"warm", PATIENCE).unwrap(), b"warm");
            }
            let before = (received(), balancer.stats().unwrap().reason(Reason::MartianSource).packets);
            let wire = PacketSocket::open(&lab.clients[0], "eth0").unwrap();
            let macs = (lab.clients[0].mac("eth0").unwrap(), lab.balancer.mac("eth0").unwrap());
            let forged = Frame::udp((pair[0], 7).into(), (pair[1], 7).into()).payload(b"for ever").macs(macs.0, macs.1);
            wire.send(&forged.build()).unwrap();
            wait_for(|| balancer.stats().unwrap().reason(Reason::MartianSource).packets > before.1);
            // Whatever it had caused would have gone round by now.
            for vip in pair {
                assert_eq!(udp_echo(&lab.clients[0], (vip, 7).into(), b"after", PATIENCE).unwrap(), b"after");
            }
            assert_eq!(received() - before.0, 2, "{mode:?} {pair:?}: what the client itself has asked");
        }
    }
}

#[test]
fn a4_a_forged_datagram_between_two_services_of_the_dsr_balancer_ends_there() {
    for way in [Way::L2, Way::IpIp(1540)] {
        let net = Net::new(way, 1, &DsrConfig::default().services(4).flows(1 << 14));
        net.introduce();
        for family6 in [false, true] {
            let vip = Net::vip(family6);
            let other = if family6 { ip("2001:db8:b::101") } else { ip("192.168.178.101") };
            let kind = if way == Way::L2 { DsrService::l2() } else { DsrService::ipip() };
            for vip in [vip, other] {
                let backend = net.backend(0, family6);
                let insert = || net.balancer.insert_service(ServiceAddr::udp(vip, 7), kind, [(backend, 1)]);
                net.balancer_ns.run(insert).unwrap();
            }
            let echo = UdpEcho::start(&net.backends[0], SocketAddr::new(vip, 7)).unwrap();
            let ask = || udp_echo(&net.client, (vip, 7).into(), b"ask", Duration::from_secs(60)).unwrap();
            assert_eq!(ask(), b"ask");
            // By the gateway, as if it came from somewhere beyond.
            let wire = PacketSocket::open(&net.gateway, "eth1").unwrap();
            let macs = (net.gateway.mac("eth1").unwrap(), net.balancer_ns.mac("eth0").unwrap());
            let forged = Frame::udp((other, 7).into(), (vip, 7).into()).payload(b"for ever").macs(macs.0, macs.1);
            let before = net.balancer.stats().unwrap().reason(Reason::MartianSource).packets;
            wire.send(&forged.build()).unwrap();
            wait_for(|| net.balancer.stats().unwrap().reason(Reason::MartianSource).packets > before);
            assert_eq!(ask(), b"ask");
            assert_eq!(echo.datagrams(), 2, "{way:?} {vip}: what the client itself has asked");
        }
    }
}
