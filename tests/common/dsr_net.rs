//! The tutorials' networks with a balancer at work in them, for real connections.

use std::{
    any::Any,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use xdpkit::{
    AttachOptions, Attachment, DsrBalancer, DsrConfig, DsrService, ServiceAddr, Stage as _, TunnelDecap,
    TunnelDecapConfig,
};
use xdpkit_lab::{
    Namespace,
    topology::{Addresses, DsrIpip, DsrL2},
    traffic::{HttpServer, http_get, ping},
};

pub(crate) const VIP4: [u8; 4] = [192, 168, 178, 100];
pub(crate) const VIP6: [u16; 8] = [0x2001, 0xdb8, 0xb, 0, 0, 0, 0, 0x100];
const PATIENCE: Duration = Duration::from_secs(60);

/// How packets get to the backends, and what there is at their end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    L2,
    /// With this MTU between gateway and backends, and `TunnelDecap` there.
    IpIp(u32),
    /// The same with the backends' own addresses of the other family.
    Crossed(u32),
}

pub(crate) struct Net {
    pub(crate) client: Namespace,
    pub(crate) balancer_ns: Namespace,
    pub(crate) gateway: Namespace,
    pub(crate) switch: Namespace,
    pub(crate) backends: Vec<Namespace>,
    pub(crate) backend_addrs: Vec<Addresses>,
    pub(crate) client_addr: Addresses,
    pub(crate) balancer: DsrBalancer,
    pub(crate) way: Way,
    pub(crate) decaps: Vec<TunnelDecap>,
    _attached: Vec<Attachment>,
    _topology: Box<dyn Any + Send + Sync>,
}

impl Net {
    pub(crate) fn new(way: Way, backends: usize, config: &DsrConfig) -> Self {
        let vip = (VIP4.into(), VIP6.into());
        let (client, balancer_ns, [gateway, switch], backends, backend_addrs, client_addr, topology): (
            _,
            _,
            _,
            _,
            _,
            _,
            Box<dyn Any + Send + Sync>,
        ) = match way {
            Way::L2 => {
                let t = DsrL2::new(backends, vip.0, vip.1).unwrap();
                let routers = [t.gateway.clone(), t.switch.clone()];
                let parts = (t.client.clone(), t.balancer.clone(), t.backends.clone(), t.backend_addrs.clone());
                (parts.0, parts.1, routers, parts.2, parts.3, t.client_addr, Box::new(t))
            }
            Way::IpIp(mtu) | Way::Crossed(mtu) => {
                let t = DsrIpip::with_mtu(backends, vip.0, vip.1, mtu).unwrap();
                let routers = [t.gateway.clone(), t.switch.clone()];
                let parts = (t.client.clone(), t.balancer.clone(), t.backends.clone(), t.backend_addrs.clone());
                (parts.0, parts.1, routers, parts.2, parts.3, t.client_addr, Box::new(t))
            }
        };
        backends.iter().for_each(|backend| backend.steer_flows("eth0").unwrap());
        let balancer = DsrBalancer::load(config).unwrap();
        let mut attached = vec![balancer_ns.run(|| balancer.attach(&AttachOptions::new("eth0"))).unwrap()];
        let mut decaps = Vec::new();
        if way != Way::L2 {
            for backend in &backends {
                let config = TunnelDecapConfig::default().vip(VIP4).vip(VIP6).any_source();
                let decap = TunnelDecap::load(&config).unwrap();
                attached.push(backend.run(|| decap.attach(&AttachOptions::new("eth0"))).unwrap());
                decaps.push(decap);
            }
        }
        Self {
            client,
            balancer_ns,
            gateway,
            switch,
            backends,
            backend_addrs,
            client_addr,
            balancer,
            way,
            decaps,
            _attached: attached,
            _topology: topology,
        }
    }

    /// Lets the balancer's host find out its neighbours now, where a test is about something else: the first packet to each
    /// would be the host's, and lost, and TCP says it again only after a second.
    pub(crate) fn introduce(&self) {
        for address in self.backend_addrs.iter().flat_map(|host| host.both()) {
            let report = ping(&self.balancer_ns, address, 1, Duration::ZERO, PATIENCE).unwrap();
            assert_eq!(report.received, 1, "{address}");
        }
    }

    /// The address by which the balancer reaches a backend, for a service of this family.
    pub(crate) fn backend(&self, number: usize, family6: bool) -> IpAddr {
        let crossed = matches!(self.way, Way::Crossed(_));
        self.backend_addrs[number].both()[usize::from(family6 != crossed)]
    }

    pub(crate) fn vip(family6: bool) -> IpAddr {
        if family6 { IpAddr::from(VIP6) } else { IpAddr::from(VIP4) }
    }

    /// A TCP service with backends by number and weight.
    pub(crate) fn serve(&self, port: u16, family6: bool, backends: &[(usize, u32)]) -> ServiceAddr {
        let service = ServiceAddr::tcp(Self::vip(family6), port);
        let kind = if self.way == Way::L2 { DsrService::l2() } else { DsrService::ipip() };
        let list: Vec<_> = backends.iter().map(|(number, weight)| (self.backend(*number, family6), *weight)).collect();
        self.balancer_ns.run(|| self.balancer.insert_service(service, kind, list)).unwrap();
        service
    }

    /// A web server on each backend, whose page says which one it is and whom it sees.
    pub(crate) fn pages(&self, family6: bool) -> Vec<HttpServer> {
        let address = SocketAddr::new(Self::vip(family6), 80);
        let serve = |(number, ns): (usize, &Namespace)| {
            HttpServer::start(ns, address, move |peer| format!("{number} {}", peer.ip())).unwrap()
        };
        self.backends.iter().enumerate().map(serve).collect()
    }

    /// Fetches a page; answers the backend's number and the client that it saw.
    pub(crate) fn fetch(&self, family6: bool) -> (usize, IpAddr) {
        let page = http_get(&self.client, SocketAddr::new(Self::vip(family6), 80), "/", PATIENCE).unwrap();
        let page = String::from_utf8(page).unwrap();
        let (number, peer) = page.split_once(' ').unwrap();
        (number.parse().unwrap(), peer.parse().unwrap())
    }

    /// The address of a family that the client has.
    pub(crate) fn client_ip(&self, family6: bool) -> IpAddr {
        self.client_addr.both()[usize::from(family6)]
    }
}
