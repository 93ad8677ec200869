//! A balancer's host for packet tests: two links with neighbours that need no resolving, and frames by their parts.

use std::{
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicU32, Ordering},
};

use xdpkit::{Action, DsrBalancer, DsrConfig, DsrService, Interface, Reason, ServiceAddr, Stage as _, TestRun};
use xdpkit_lab::{Namespace, frame::Frame, frame::checksum, veth};

use super::bytes::set_hops;

/// Virtual addresses.
pub(crate) const VIP4: &str = "192.168.178.100";
pub(crate) const VIP6: &str = "2001:db8:b::100";
/// Neighbours on eth0, by number from 11 on, and their MACs.
pub(crate) fn neighbour4(number: u8) -> IpAddr {
    format!("192.168.178.{number}").parse().unwrap()
}
pub(crate) fn neighbour6(number: u8) -> IpAddr {
    format!("2001:db8:b::{number}").parse().unwrap()
}
pub(crate) fn mac(number: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0xb, number]
}
/// The router on eth0 behind which all else is.
pub(crate) const GATEWAY: u8 = 1;
/// A neighbour on eth1.
pub(crate) const SECOND_LINK: u8 = 77;

/// The host. Everything runs in its namespace.
pub(crate) struct Host {
    pub(crate) ns: Namespace,
    _peer: Namespace,
    pub(crate) mac: [u8; 6],
}

impl Host {
    pub(crate) fn new() -> Self {
        let (ns, peer) = (Namespace::new("balancer").unwrap(), Namespace::new("peer").unwrap());
        // Its multicasts would be packets that no test sent.
        peer.sysctl("net.ipv6.conf.default.disable_ipv6", "1").unwrap();
        for (dev, four, six) in
            [("eth0", "192.168.178.10/24", "2001:db8:b::10/64"), ("eth1", "172.31.0.10/24", "2001:db8:d::10/64")]
        {
            veth((&ns, dev), (&peer, dev)).unwrap();
            ns.add_address(dev, four.parse().unwrap()).unwrap();
            ns.add_address(dev, six.parse().unwrap()).unwrap();
        }
        ns.enable_forwarding().unwrap();
        ns.add_default_route(neighbour4(GATEWAY)).unwrap();
        ns.add_default_route(neighbour6(GATEWAY)).unwrap();
        for number in [GATEWAY, 11, 12, 13, 14, 15] {
            ns.add_neighbour("eth0", neighbour4(number), mac(number)).unwrap();
            ns.add_neighbour("eth0", neighbour6(number), mac(number)).unwrap();
        }
        for address in ["172.31.0.77", "2001:db8:d::77"] {
            ns.add_neighbour("eth1", address.parse().unwrap(), mac(SECOND_LINK)).unwrap();
        }
        let mac = ns.mac("eth0").unwrap();
        Self { ns, _peer: peer, mac }
    }

    /// A balancer for packets that come in by eth0.
    pub(crate) fn balancer(&self, config: &DsrConfig) -> Balancer<'_> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("dsr{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let config = config.clone().name(name);
        self.ns.run(|| {
            let balancer = DsrBalancer::load(&config).unwrap();
            let eth0 = Interface::by_name("eth0").unwrap();
            Balancer { host: self, balancer, eth0 }
        })
    }
}

pub(crate) struct Balancer<'h> {
    pub(crate) host: &'h Host,
    pub(crate) balancer: DsrBalancer,
    eth0: Interface,
}

/// What became of a frame.
pub(crate) type Outcome = (Action, Reason, Vec<u8>);

impl Balancer<'_> {
    pub(crate) fn service(&self, address: &str, service: DsrService, backends: &[IpAddr]) -> ServiceAddr {
        let address: ServiceAddr = address.parse().unwrap();
        let list: Vec<_> = backends.iter().map(|backend| (*backend, 1)).collect();
        self.host.ns.run(|| self.balancer.insert_service(address, service, list)).unwrap();
        address
    }

    /// Runs a frame that comes in by eth0; exactly one counter must have moved, by it.
    pub(crate) fn run(&self, frame: &[u8]) -> Outcome {
        self.run_by(&self.eth0, frame)
    }

    /// The same by another interface.
    pub(crate) fn run_by(&self, interface: &Interface, frame: &[u8]) -> Outcome {
        let mut frame = frame.to_vec();
        if frame[..6] == self.host.mac {
            // What is for the host comes to the address that it has there.
            frame[..6].copy_from_slice(&interface.mac().unwrap());
        }
        let frame = &frame[..];
        let before = self.balancer.stats().unwrap();
        let request = TestRun::new(frame).ingress(interface, 0);
        let verdict = self.host.ns.run(|| self.balancer.run(&request)).unwrap();
        let counted = self.balancer.stats().unwrap().since(&before);
        let [line] = counted.reasons.as_slice() else { panic!("counted {:?}", counted.reasons) };
        assert_eq!(line.action, verdict.action, "the counter agrees with the verdict");
        assert_eq!((line.count.packets, line.count.bytes), (1, frame.len() as u64));
        (verdict.action, line.reason, verdict.frame)
    }

    /// The same without looking at counters, many at a time.
    pub(crate) fn run_all(&self, frames: &[Vec<u8>]) -> Vec<(Action, Vec<u8>)> {
        self.host.ns.run(|| {
            let run = |frame: &Vec<u8>| {
                let verdict = self.balancer.run(&TestRun::new(frame).ingress(&self.eth0, 0)).unwrap();
                (verdict.action, verdict.frame)
            };
            frames.iter().map(run).collect()
        })
    }
}

/// What the packet tests use, unless they say otherwise.
pub(crate) fn config() -> DsrConfig {
    DsrConfig::default()
        .services(8)
        .table_size(4099)
        .flows(4096)
        .outer_v4("10.200.0.0/16".parse().unwrap())
        .outer_v6("2001:db8:200::/64".parse().unwrap())
}

pub(crate) fn neighbours(family6: bool, numbers: &[u8]) -> Vec<IpAddr> {
    numbers.iter().map(|number| if family6 { neighbour6(*number) } else { neighbour4(*number) }).collect()
}

/// A client's frame as it comes from the gateway.
pub(crate) fn arriving(host: &Host, frame: Frame) -> Frame {
    frame.macs(mac(GATEWAY), host.mac)
}

pub(crate) fn client(family6: bool, number: u32) -> IpAddr {
    match family6 {
        false => IpAddr::from((0x0a00_0014 + number).to_be_bytes()),
        true => IpAddr::from(((0x2001_0db8_000a_u128 << 80) + 0x20 + u128::from(number)).to_be_bytes()),
    }
}

pub(crate) fn vip(family6: bool) -> IpAddr {
    if family6 { VIP6 } else { VIP4 }.parse().unwrap()
}

pub(crate) fn service_text(protocol: &str, family6: bool, port: &str) -> String {
    if family6 { format!("{protocol}/[{VIP6}]:{port}") } else { format!("{protocol}/{VIP4}:{port}") }
}

/// A TCP segment for port 80 of the virtual address.
pub(crate) fn segment(family6: bool, number: u32, port: u16) -> Frame {
    let source = SocketAddr::new(client(family6, number), port);
    Frame::tcp(source, SocketAddr::new(vip(family6), 80)).payload(b"0123456789")
}

/// The frame with one hop less, other MACs, and an IPv4 checksum that is right again if it was.
pub(crate) fn one_hop_further(frame: &[u8], destination: [u8; 6], source: [u8; 6]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[..6].copy_from_slice(&destination);
    frame[6..12].copy_from_slice(&source);
    let at = network_at(&frame);
    let hops = frame[at + if frame[at] >> 4 == 4 { 8 } else { 7 }];
    set_hops(&mut frame, at, hops - 1);
    frame
}

pub(crate) fn fix_ipv4(frame: &mut [u8], at: usize) {
    let end = at + usize::from(frame[at] & 15) * 4;
    frame[at + 10..at + 12].fill(0);
    let sum = checksum(&frame[at..end]);
    frame[at + 10..at + 12].copy_from_slice(&sum.to_be_bytes());
}

pub(crate) fn network_at(frame: &[u8]) -> usize {
    let mut at = 12;
    while matches!(u16::from_be_bytes([frame[at], frame[at + 1]]), 0x8100 | 0x88a8 | 0x9100) {
        at += 4;
    }
    at + 2
}

/// Offset of what is inside of an outer header.
pub(crate) fn inner_at(frame: &[u8]) -> usize {
    let at = network_at(frame);
    at + if frame[at] >> 4 == 4 { 20 } else { 40 }
}
