//! The balancers of the laboratory's host, one after the other on each card: NAT for one virtual address, direct server return
//! for the other.

use std::net::SocketAddr;

use xdpkit::{
    AttachOptions, Attachment, DsrBalancer, DsrConfig, DsrService, NatBalancer, NatConfig, NatMode, NatService,
    Pipeline, ServiceAddr, Stage, Stats, TunnelDecap, TunnelDecapConfig,
};

use crate::lab::{FAMILIES, FAR, Lab, NEAR, dsr_vip, nat_vip};

/// How packets get to a backend, each at a port of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    FullNat,
    Dnat,
    L2,
    IpIp,
}

pub(crate) const METHODS: [Method; 4] = [Method::FullNat, Method::Dnat, Method::L2, Method::IpIp];
pub(crate) const PORTS: [u16; 2] = [80, 81];

impl Method {
    pub(crate) fn is_nat(self) -> bool {
        matches!(self, Self::FullNat | Self::Dnat)
    }

    /// Where clients go.
    pub(crate) fn target(self, family6: bool) -> SocketAddr {
        let vip = if self.is_nat() { nat_vip(family6) } else { dsr_vip(family6) };
        (vip, PORTS[usize::from(matches!(self, Self::Dnat | Self::IpIp))]).into()
    }

    /// The network by whose addresses the balancer reaches backends: neighbours, or hosts behind them.
    pub(crate) fn network(self) -> u8 {
        if self == Self::L2 { NEAR } else { FAR }
    }
}

pub(crate) struct Balancers {
    pub(crate) nat: NatBalancer,
    pub(crate) dsr: DsrBalancer,
    /// Services that could not be inserted, and why.
    pub(crate) refused: Vec<String>,
    _chains: Vec<Pipeline>,
    _decaps: Vec<(TunnelDecap, Vec<Attachment>)>,
}

impl Balancers {
    /// Balances TCP and UDP in all ways and both families, on all cards.
    pub(crate) fn start(lab: &Lab) -> Self {
        Self::start_with(lab, &dsr_config())
    }

    pub(crate) fn start_with(lab: &Lab, config: &DsrConfig) -> Self {
        let (nat, dsr, chains, refused) = lab.balancer.run(|| {
            let nat = NatBalancer::load(&nat_config()).unwrap();
            let dsr = DsrBalancer::load(config).unwrap();
            let refused = insert_services(&nat, &dsr, lab.backends.len());
            let attach = |card: &&str| {
                attach(&nat, &dsr, lab.front_cards.contains(card), AttachOptions::new(*card).mode(lab.mode))
            };
            let chains = lab.cards.iter().map(attach).collect();
            (nat, dsr, chains, refused)
        });
        Self { nat, dsr, refused, _chains: chains, _decaps: decapsulate(lab) }
    }

    pub(crate) fn stats(&self, method: Method) -> Stats {
        if method.is_nat() { self.nat.stats().unwrap() } else { self.dsr.stats().unwrap() }
    }
}

/// The default but for sizes: tables are made for each test.
pub(crate) fn nat_config() -> NatConfig {
    NatConfig::default().services(16).backends(64).table_size(4099).capacity(1 << 13)
}

pub(crate) fn dsr_config() -> DsrConfig {
    DsrConfig::default().services(16).backends(64).table_size(4099).flows(1 << 13)
}

/// Attaches to a card: NAT for both directions, direct server return where clients come in. Programs take long to load, and
/// each card has its own.
pub(crate) fn attach(nat: &NatBalancer, dsr: &DsrBalancer, is_front: bool, options: AttachOptions) -> Pipeline {
    let stages = [nat as &dyn Stage, dsr];
    let mut chain = Pipeline::new(if is_front { &stages } else { &stages[..1] }).unwrap();
    chain.attach(&options).unwrap();
    chain
}

/// All services, with the laboratory's first backends; returns which were refused.
pub(crate) fn insert_services(nat: &NatBalancer, dsr: &DsrBalancer, backends: usize) -> Vec<String> {
    let mut refused = Vec::new();
    for (method, family6) in METHODS.into_iter().flat_map(|method| FAMILIES.map(|family6| (method, family6))) {
        let target = method.target(family6);
        let list: Vec<_> =
            (11..).take(backends).map(|number| crate::lab::ip(family6, method.network(), number)).collect();
        for service in [ServiceAddr::tcp(target.ip(), target.port()), ServiceAddr::udp(target.ip(), target.port())] {
            if method.is_nat() {
                let mode = if method == Method::FullNat { NatMode::Full } else { NatMode::Destination };
                let list = list.iter().map(|ip| SocketAddr::new(*ip, target.port()));
                nat.insert(service, &NatService::new(list).mode(mode)).unwrap();
            } else {
                let kind = if method == Method::L2 { DsrService::l2() } else { DsrService::ipip() };
                let inserted = dsr.insert_service(service, kind, list.iter().map(|ip| (*ip, 1)));
                refused.extend(inserted.err().map(|error| format!("{service}: {error}")));
            }
        }
    }
    refused
}

/// The backends' end of the tunnels.
pub(crate) fn decapsulate(lab: &Lab) -> Vec<(TunnelDecap, Vec<Attachment>)> {
    let every = |backend: &xdpkit_lab::Namespace| {
        let config = TunnelDecapConfig::default().vip(dsr_vip(false)).vip(dsr_vip(true)).any_source();
        let decap = TunnelDecap::load(&config).unwrap();
        let attach = |card: &str| backend.run(|| decap.attach(&AttachOptions::new(card))).unwrap();
        let second = backend.ifindex("eth1").is_ok();
        let attached = ["eth0", "eth1"].into_iter().take(1 + usize::from(second)).map(attach).collect();
        (decap, attached)
    };
    lab.backends.iter().map(every).collect()
}
