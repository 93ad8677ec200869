//! A NAT balancer between a client's network and a backend's, for test runs: where packets come in, what comes out.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use xdpkit::{
    Action, AttachOptions, Attachment, Interface, NatBalancer, NatConfig, NatMode, NatService, Reason, ServiceAddr,
    Stage as _, TestRun,
};
use xdpkit_lab::{frame::Frame, topology::Nat};

/// Ethernet addresses of everybody beyond the balancer: the neighbours are made up.
pub(crate) const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 1, 1];
pub(crate) const BACKEND_MAC: [u8; 6] = [2, 0, 0, 0, 2, 2];

pub(crate) const VIP4: &str = "10.0.0.100";
pub(crate) const VIP6: &str = "2001:db8:a::100";

/// Services, each with its backend.
pub(crate) const SERVICES: [(&str, &str); 4] = [
    ("tcp/10.0.0.100:80", "192.168.178.11:8080"),
    ("udp/10.0.0.100:53", "192.168.178.11:5353"),
    ("tcp/[2001:db8:a::100]:80", "[2001:db8:b::11]:8080"),
    ("udp/[2001:db8:a::100]:53", "[2001:db8:b::11]:5353"),
];

/// Virtual addresses that exist nowhere: in the lab, the balancer is everybody's default gateway.
pub(crate) const ROUTED_VIPS: [&str; 2] = ["198.51.100.10", "2001:db8:99::10"];
/// For how long real hosts wait for each other.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Attaches to both sides of the lab's balancer, which knows a way to everywhere, as hosts do: a virtual address that it
/// knows nothing of might be its own, and its packets are no good for finding out neighbours.
pub(crate) fn attach(lab: &Nat, balancer: &NatBalancer) -> Vec<Attachment> {
    for via in lab.client_addrs[0].both() {
        // It is there when others were attached before.
        let _ = lab.balancer.add_default_route(via);
    }
    lab.backends.iter().for_each(|backend| backend.steer_flows("eth0").unwrap());
    ["eth0", "eth1"]
        .into_iter()
        .map(|name| lab.balancer.run(|| balancer.attach(&AttachOptions::new(name)).unwrap()))
        .collect()
}

/// The lab's backends, at this port.
pub(crate) fn backends(lab: &Nat, ipv6: bool, port: u16) -> Vec<SocketAddr> {
    lab.backend_addrs
        .iter()
        .map(|host| (if ipv6 { host.v6.into() } else { IpAddr::from(host.v4) }, port).into())
        .collect()
}

/// Which side of the balancer a packet comes in by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Clients,
    Backends,
}

pub(crate) struct Bench {
    pub(crate) lab: Nat,
    pub(crate) balancer: NatBalancer,
    pub(crate) front: Interface,
    pub(crate) back: Interface,
    front_mac: [u8; 6],
    back_mac: [u8; 6],
}

/// What became of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) action: Action,
    pub(crate) reason: Reason,
    pub(crate) frame: Vec<u8>,
}

impl Bench {
    /// Clients at 10.0.0.20 to .49 and 2001:db8:a::20 to ::49, backends at 192.168.178.11 to .20 and 2001:db8:b::11 to
    /// ::20, all known to the balancer's host. Nobody answers there.
    pub(crate) fn new(config: &NatConfig) -> Self {
        let lab = Nat::new(1, 1).unwrap();
        let balancer = NatBalancer::load(config).unwrap();
        for last in 20..50 {
            for address in [format!("10.0.0.{last}"), format!("2001:db8:a::{last}")] {
                lab.balancer.add_neighbour("eth0", address.parse().unwrap(), CLIENT_MAC).unwrap();
            }
        }
        for last in 11..21 {
            for address in [format!("192.168.178.{last}"), format!("2001:db8:b::{last}")] {
                lab.balancer.add_neighbour("eth1", address.parse().unwrap(), BACKEND_MAC).unwrap();
            }
        }
        let [front, back] = ["eth0", "eth1"].map(|name| lab.balancer.run(|| Interface::by_name(name).unwrap()));
        let [front_mac, back_mac] = ["eth0", "eth1"].map(|name| lab.balancer.mac(name).unwrap());
        Self { lab, balancer, front, back, front_mac, back_mac }
    }

    /// With a service on both virtual addresses, for both protocols, with one backend each.
    pub(crate) fn with_services(config: &NatConfig, mode: NatMode) -> Self {
        let bench = Self::new(config);
        for (name, backend) in SERVICES {
            bench.balancer.insert(service(name), &NatService::new([at(backend)]).mode(mode)).unwrap();
        }
        bench
    }

    pub(crate) fn run(&self, side: Side, frame: &[u8]) -> Outcome {
        let interface = if side == Side::Clients { &self.front } else { &self.back };
        let before = self.balancer.stats().unwrap();
        let request = TestRun::new(frame).ingress(interface, 0);
        let verdict = self.lab.balancer.run(|| self.balancer.run(&request)).unwrap();
        let counted = self.balancer.stats().unwrap().since(&before);
        let [line] = counted.reasons.as_slice() else { panic!("counted {:?}", counted.reasons) };
        assert_eq!(line.action, verdict.action, "the counter agrees with the verdict");
        assert_eq!((line.count.packets, line.count.bytes), (1, frame.len() as u64));
        Outcome { action: verdict.action, reason: line.reason, frame: verdict.frame }
    }

    pub(crate) fn client_sends(&self, frame: &Frame) -> Outcome {
        self.run(Side::Clients, &frame.clone().macs(CLIENT_MAC, self.front_mac).build())
    }

    pub(crate) fn backend_sends(&self, frame: &Frame) -> Outcome {
        self.run(Side::Backends, &frame.clone().macs(BACKEND_MAC, self.back_mac).build())
    }

    /// Source and destination of frames from clients to the balancer; and the others.
    pub(crate) fn macs_of_clients(&self) -> ([u8; 6], [u8; 6]) {
        (CLIENT_MAC, self.front_mac)
    }

    pub(crate) fn macs_to_clients(&self) -> ([u8; 6], [u8; 6]) {
        (self.front_mac, CLIENT_MAC)
    }

    pub(crate) fn macs_of_backends(&self) -> ([u8; 6], [u8; 6]) {
        (BACKEND_MAC, self.back_mac)
    }

    pub(crate) fn macs_to_backends(&self) -> ([u8; 6], [u8; 6]) {
        (self.back_mac, BACKEND_MAC)
    }

    /// The frame as it must go to a backend.
    pub(crate) fn to_backend(&self, frame: &Frame) -> Outcome {
        let frame = frame.clone().macs(self.back_mac, BACKEND_MAC).build();
        Outcome { action: Action::Redirect, reason: Reason::Forwarded, frame }
    }

    /// The frame as it must go to a client.
    pub(crate) fn to_client(&self, frame: &Frame) -> Outcome {
        let frame = frame.clone().macs(self.front_mac, CLIENT_MAC).build();
        Outcome { action: Action::Redirect, reason: Reason::Answered, frame }
    }
}

pub(crate) fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn service(text: &str) -> ServiceAddr {
    text.parse().unwrap()
}
