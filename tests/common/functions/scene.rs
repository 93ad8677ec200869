//! The networks, with traffic in them that notices any mistake.

use std::net::SocketAddr;

use xdpkit_lab::{
    Namespace,
    bpffs::BpfFs,
    topology::{DsrL2, Nat, Pair},
    traffic::TcpEcho,
};

use super::{
    super::{busy::Busy, traffic::Lockstep},
    Function, MADE_UP, Place,
    dsr::DSR_VIP,
    made_up, made_up_mac,
};

/// A network with pins and traffic, for processes that own the function in it one after the other.
pub(crate) struct Scene {
    pub(crate) ns: Namespace,
    pub(crate) place: Place,
    _bpffs: BpfFs,
    net: Net,
}

enum Net {
    Pair(Pair),
    Nat(Nat),
    Dsr(DsrL2),
}

impl Scene {
    pub(crate) fn new(function: Function) -> Self {
        let bpffs = BpfFs::new().unwrap();
        let directory = bpffs.path().join("app");
        std::fs::create_dir(&directory).unwrap();
        let net = match function {
            Function::Nat => Net::Nat(Nat::new(1, 2).unwrap()),
            Function::Dsr => Net::Dsr(DsrL2::new(2, DSR_VIP.into(), "2001:db8:b::100".parse().unwrap()).unwrap()),
            _ => Net::Pair(Pair::new().unwrap()),
        };
        let (ns, behind) = match &net {
            Net::Pair(pair) => (pair.server.clone(), None),
            Net::Nat(lab) => (lab.balancer.clone(), Some("eth1")),
            Net::Dsr(lab) => (lab.balancer.clone(), Some("eth0")),
        };
        for number in 0..MADE_UP {
            behind.iter().for_each(|dev| ns.add_neighbour(dev, made_up(number), made_up_mac(number)).unwrap());
        }
        if let Net::Nat(lab) = &net {
            // The balancer's host knows a way to everywhere, as hosts do.
            for via in lab.client_addrs[0].both() {
                let _ = lab.balancer.add_default_route(via);
            }
        }
        let place = Place { directory, mac: ns.mac("eth0").unwrap(), more: Default::default() };
        Self { ns, place, _bpffs: bpffs, net }
    }

    /// Starts traffic that notices any packet that is lost or slips by.
    pub(crate) fn traffic(&self) -> Traffic {
        match &self.net {
            Net::Pair(pair) => Traffic::Lockstep(Lockstep::start(pair)),
            Net::Nat(lab) => {
                lab.backends.iter().for_each(|backend| backend.steer_flows("eth0").unwrap());
                let at = |number: usize| SocketAddr::new(lab.backend_addrs[number].v4.into(), 8080);
                let echoes = (0..2).map(|number| TcpEcho::start(&lab.backends[number], at(number)).unwrap()).collect();
                let busy = Busy::start(&lab.clients[0], &["198.51.100.10:80".parse().unwrap()], 6);
                Traffic::Busy { busy, _echoes: echoes }
            }
            Net::Dsr(lab) => {
                lab.backends.iter().for_each(|backend| backend.steer_flows("eth0").unwrap());
                let vip = SocketAddr::from((DSR_VIP, 80));
                let echoes = lab.backends.iter().map(|backend| TcpEcho::start(backend, vip).unwrap()).collect();
                let busy = Busy::start(&lab.client, &[vip], 6);
                Traffic::Busy { busy, _echoes: echoes }
            }
        }
    }
}

pub(crate) enum Traffic {
    Lockstep(Lockstep),
    Busy { busy: Busy, _echoes: Vec<TcpEcho> },
}

impl Traffic {
    /// Panics when something was lost, slipped by or broke.
    pub(crate) fn goes_on(&self, what: &str) {
        match self {
            Self::Lockstep(lockstep) => assert!(lockstep.is_running(), "{what}: a frame was lost or slipped by"),
            Self::Busy { busy, .. } => {
                busy.all_go_on();
                assert!(busy.broken().is_empty(), "{what}: connections broke: {:?}", busy.broken());
            }
        }
    }

    pub(crate) fn end(self) {
        match self {
            Self::Lockstep(lockstep) => {
                let sent = lockstep.stop();
                assert!(sent.denied > 0 && sent.allowed > 0, "there was traffic: {sent:?}");
            }
            Self::Busy { busy, .. } => assert!(busy.broken().is_empty(), "connections broke: {:?}", busy.broken()),
        }
    }
}
