//! What the examples for both DSR tutorials share: the `--service` flag, the balancer, and the tutorials' networks.

use std::{
    error::Error,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, atomic::AtomicBool},
    thread,
    time::Duration,
};

use serde_json::json;
use xdpkit::{
    AttachOptions, Attachment, DsrBalancer, DsrConfig, DsrService, Forwarding, ServiceAddr, Stage as _, TunnelDecap,
    TunnelDecapConfig, ipnet::IpNet, preflight::BalancerKind,
};
use xdpkit_lab::{
    Namespace,
    topology::{Addresses, DsrIpip, DsrL2},
    traffic::{HttpServer, http_get},
};

use super::{Output, Session, Usage, lab::Scenario};

pub(crate) const VIP4: Ipv4Addr = Ipv4Addr::new(192, 168, 178, 100);
pub(crate) const VIP6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xb, 0, 0, 0, 0, 0x100);
const PATIENCE: Duration = Duration::from_secs(5);
const PAGES: usize = 8;

/// A service with its backends and their weights.
pub(crate) type Wanted = (ServiceAddr, Vec<(IpAddr, u32)>);

const EXPECTED: &str =
    "tcp/VIP:PORT=BACKEND[@WEIGHT],... or udp/..., with `*` for any port and IPv6 addresses in brackets";

/// One value of `--service`.
pub(crate) fn parse_service(flag: &str, value: &str) -> Result<Wanted, Usage> {
    let wrong = || Usage::new(flag, value, EXPECTED);
    let (service, list) = value.split_once('=').ok_or_else(wrong)?;
    let service = service.parse().map_err(|_| wrong())?;
    let backends = list.split(',').map(|text| backend(text).ok_or_else(wrong)).collect::<Result<_, _>>()?;
    Ok((service, backends))
}

fn backend(text: &str) -> Option<(IpAddr, u32)> {
    let (address, weight) = match text.split_once('@') {
        Some((address, weight)) => (address, weight.parse().ok()?),
        None => (text, 1),
    };
    let bare = address.strip_prefix('[').map(|rest| rest.strip_suffix(']')?.parse::<Ipv6Addr>().ok());
    let address = match bare {
        Some(inside) => IpAddr::V6(inside?),
        // A weight may follow an address in brackets only.
        None => address.parse().ok().filter(|ip: &IpAddr| ip.is_ipv4() || !text.contains('@'))?,
    };
    Some((address, weight))
}

/// The life of either balancer's example.
pub(crate) fn run(about: &str, own_flags: &str, forwarding: Forwarding) -> Result<(), Box<dyn Error>> {
    let mut services: Vec<Wanted> = Vec::new();
    let own = |flag: &str, value: &str| {
        if flag != "--service" {
            return Ok(false);
        }
        let (service, backends) = parse_service(flag, value)?;
        if services.iter().any(|(other, _)| *other == service) {
            return Err(Usage::new(flag, value, "each service once"));
        }
        services.push((service, backends));
        Ok(true)
    };
    let flags = super::parse(about, own, own_flags)?;
    if !flags.lab && services.is_empty() {
        return Err(Usage::new("--service", "", EXPECTED).into());
    }
    let lab = flags.lab.then(|| Tutorial::build(forwarding)).transpose()?;
    if let (Some(lab), true) = (&lab, services.is_empty()) {
        services = lab.services();
    }
    let balancer = DsrBalancer::load(&DsrConfig::default())?;
    let kind = match forwarding {
        Forwarding::L2 => DsrService::l2(),
        Forwarding::IpIp => DsrService::ipip(),
    };
    let insert =
        || services.iter().try_for_each(|(service, list)| balancer.insert_service(*service, kind, list.clone()));
    match &lab {
        Some(lab) => lab.balancer.run(insert)?,
        None => insert()?,
    }
    let output = Output { json: flags.json };
    for (service, backends) in &services {
        for (backend, weight) in backends {
            output.line(
                &json!({"event": "backend", "service": service.to_string(), "backend": backend.to_string(), "weight": weight}),
                || format!("{service} -> {backend}, weight {weight}"),
            );
        }
    }
    let (place, own) = (lab.as_ref().map(|lab| &lab.balancer), flags.interfaces.iter().map(String::as_str));
    let names: Vec<&str> = if place.is_some() { vec!["eth0"] } else { own.collect() };
    let kind = if forwarding == Forwarding::L2 { BalancerKind::DsrL2 } else { BalancerKind::DsrIpip };
    let addresses = (
        services.iter().map(|(service, _)| service.address).collect(),
        services.iter().flat_map(|(_, backends)| backends).map(|(backend, _)| *backend).collect(),
    );
    super::warn_of_balancer(output, place, kind, &names, addresses)?;
    let session = Session::start(&flags, &balancer, place)?;
    let scenario = lab.map(|lab| lab.play(session.stop(), output));
    let tick = |_| {
        thread::sleep(Duration::from_millis(50));
        Ok(false)
    };
    session.run(tick, || statistics(&balancer))?;
    scenario.map_or(Ok(()), Scenario::finish)
}

fn statistics(balancer: &DsrBalancer) -> xdpkit::Result<serde_json::Value> {
    let mut services = Vec::new();
    for entry in balancer.services()? {
        let backends = balancer.backends(entry.address)?;
        let backends: Vec<_> = backends
            .iter()
            .map(|backend| {
                json!({
                    "backend": backend.address.to_string(),
                    "state": backend.state.name(),
                    "weight": backend.weight,
                    "slots": backend.slots,
                    "packets": backend.stats.forwarded.packets,
                    "bytes": backend.stats.forwarded.bytes,
                    "new_flows": backend.stats.new_flows,
                })
            })
            .collect();
        services.push(json!({
            "service": entry.address.to_string(),
            "packets": entry.stats.received.packets,
            "new_flows": entry.stats.new_flows,
            "slots_in_transition": entry.slots_in_transition,
            "recorded": entry.recorded,
            "too_big": entry.stats.too_big,
            "backends": backends,
        }));
    }
    Ok(json!({"services": services}))
}

/// A tutorial's network: a client behind a gateway, a balancer, backends with web servers.
pub(crate) struct Tutorial {
    forwarding: Forwarding,
    client: Namespace,
    pub(crate) client_addr: Addresses,
    pub(crate) balancer: Namespace,
    backends: Vec<Namespace>,
    backend_addrs: Vec<Addresses>,
    _decaps: Vec<(TunnelDecap, Attachment)>,
    _keep: Box<dyn std::any::Any + Send + Sync>,
}

/// Where the laboratory's tunnels begin: at its balancer, and at the dummy address of RFC 7600 as long as its host does
/// not know the next hop.
pub(crate) fn lab_sources() -> impl Iterator<Item = IpNet> {
    [IpAddr::from([192, 168, 178, 10]), [192, 0, 0, 8].into(), [0x2001, 0xdb8, 0xb, 0, 0, 0, 0, 0x10].into()]
        .into_iter()
        .map(IpNet::from)
}

/// A page, as a client got it.
#[derive(Debug)]
pub(crate) struct Page {
    pub(crate) vip: IpAddr,
    /// What the backend says of itself, and whom it saw.
    pub(crate) text: String,
}

impl Tutorial {
    pub(crate) fn build(forwarding: Forwarding) -> Result<Self, Box<dyn Error>> {
        let (client, client_addr, balancer, backends, backend_addrs, keep): (
            _,
            _,
            _,
            _,
            _,
            Box<dyn std::any::Any + Send + Sync>,
        ) = match forwarding {
            Forwarding::L2 => {
                let t = DsrL2::new(2, VIP4, VIP6)?;
                let (client, balancer, backends) = (t.client.clone(), t.balancer.clone(), t.backends.clone());
                (client, t.client_addr, balancer, backends, t.backend_addrs.clone(), Box::new(t))
            }
            Forwarding::IpIp => {
                let t = DsrIpip::new(2, VIP4, VIP6)?;
                let (client, balancer, backends) = (t.client.clone(), t.balancer.clone(), t.backends.clone());
                (client, t.client_addr, balancer, backends, t.backend_addrs.clone(), Box::new(t))
            }
        };
        let mut decaps = Vec::new();
        if forwarding == Forwarding::IpIp {
            for backend in &backends {
                let config = TunnelDecapConfig::default().vip(VIP4).vip(VIP6);
                let decap = TunnelDecap::load(&lab_sources().fold(config, TunnelDecapConfig::source))?;
                let attachment = backend.run(|| decap.attach(&AttachOptions::new("eth0")))?;
                decaps.push((decap, attachment));
            }
        }
        Ok(Self { forwarding, client, client_addr, balancer, backends, backend_addrs, _decaps: decaps, _keep: keep })
    }

    /// The IP-in-IP tutorial with a balancer at work and one backend, which takes no tunnels apart yet.
    pub(crate) fn of_one_backend() -> Result<Self, Box<dyn Error>> {
        let t = DsrIpip::new(1, VIP4, VIP6)?;
        let mut tutorial = Self {
            forwarding: Forwarding::IpIp,
            client: t.client.clone(),
            client_addr: t.client_addr,
            balancer: t.balancer.clone(),
            backends: t.backends.clone(),
            backend_addrs: t.backend_addrs.clone(),
            _decaps: Vec::new(),
            _keep: Box::new(()),
        };
        let balancer = DsrBalancer::load(&DsrConfig::default())?;
        let attachment = tutorial.balancer.run(|| {
            for (service, backends) in tutorial.services() {
                balancer.insert_service(service, DsrService::ipip(), backends)?;
            }
            balancer.attach(&AttachOptions::new("eth0"))
        })?;
        tutorial._keep = Box::new((t, balancer, attachment));
        Ok(tutorial)
    }

    /// The first backend's host.
    pub(crate) fn backend(&self) -> &Namespace {
        &self.backends[0]
    }

    /// Port 80 of both virtual addresses, on all backends.
    pub(crate) fn services(&self) -> Vec<Wanted> {
        let of = |family: usize, vip: IpAddr| {
            let backends = self.backend_addrs.iter().map(|addresses| (addresses.both()[family], 1)).collect();
            (ServiceAddr::tcp(vip, 80), backends)
        };
        vec![of(0, VIP4.into()), of(1, VIP6.into())]
    }

    /// Fetches pages from both virtual addresses.
    pub(crate) fn fetch(&self) -> Result<Vec<Page>, Box<dyn Error>> {
        let mut servers = Vec::new();
        for (number, backend) in self.backends.iter().enumerate() {
            for vip in [IpAddr::from(VIP4), VIP6.into()] {
                let page = move |peer: SocketAddr| format!("backend{number} to {}", peer.ip());
                servers.push(HttpServer::start(backend, SocketAddr::new(vip, 80), page)?);
            }
        }
        let mut pages = Vec::new();
        for vip in [IpAddr::from(VIP4), VIP6.into()] {
            for _ in 0..PAGES {
                let page = http_get(&self.client, SocketAddr::new(vip, 80), "/", PATIENCE)?;
                pages.push(Page { vip, text: String::from_utf8_lossy(&page).into_owned() });
            }
        }
        Ok(pages)
    }

    /// Whether the pages are as they should be: from all backends, which saw the client's own address.
    pub(crate) fn judge(&self, pages: &[Page]) -> Result<(), String> {
        for (vip, client) in [IpAddr::from(VIP4), VIP6.into()].into_iter().zip(self.client_addr.both()) {
            let of_vip: Vec<_> = pages.iter().filter(|page| page.vip == vip).collect();
            if let Some(page) = of_vip.iter().find(|page| !page.text.ends_with(&format!(" to {client}"))) {
                return Err(format!("{vip}: `{}` should have been to {client}", page.text));
            }
            if of_vip.len() != PAGES {
                return Err(format!("{vip}: {} pages of {PAGES} came", of_vip.len()));
            }
        }
        for number in 0..self.backends.len() {
            if !pages.iter().any(|page| page.text.starts_with(&format!("backend{number} "))) {
                return Err(format!("backend{number} has sent no page"));
            }
        }
        Ok(())
    }

    pub(crate) fn play(self, stop: Arc<AtomicBool>, output: Output) -> Scenario {
        Scenario::start(stop, move || {
            let pages = self.fetch().map_err(|error| format!("{:?}: {error}", self.forwarding))?;
            for page in &pages {
                let url = match page.vip {
                    IpAddr::V4(ip) => format!("http://{ip}/"),
                    IpAddr::V6(ip) => format!("http://[{ip}]/"),
                };
                output.line(&json!({"event": "lab", "what": format!("GET {url}"), "page": page.text}), || {
                    format!("GET {url}: {}", page.text)
                });
            }
            thread::sleep(Duration::from_millis(200));
            self.judge(&pages)
        })
    }
}
