//! What a host lacks to balance.

use std::{collections::BTreeMap, fs, net::IpAddr};

use super::{Finding, FindingKind, Findings, Severity, redirect_target};
use crate::{
    Error, Interface, Result,
    address::Unmapped as _,
    host,
    sys::{self, route::Route},
};

/// How packets get to backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BalancerKind {
    /// [`NatBalancer`](crate::NatBalancer): replies come back through the balancer.
    Nat,
    /// [`DsrBalancer`](crate::DsrBalancer) with L2 forwarding.
    DsrL2,
    /// [`DsrBalancer`](crate::DsrBalancer) with IP-in-IP tunnels.
    DsrIpip,
}

/// A balancer, as it is to be: what [`balancer`] looks at.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct BalancerSetup {
    /// How packets get to backends.
    pub kind: BalancerKind,
    /// The interfaces to which it is to be attached.
    pub interfaces: Vec<Interface>,
    /// The virtual addresses.
    pub vips: Vec<IpAddr>,
    /// The backends' addresses.
    pub backends: Vec<IpAddr>,
}

impl BalancerSetup {
    /// Without virtual addresses and backends yet.
    #[must_use]
    pub fn new(kind: BalancerKind, interfaces: impl IntoIterator<Item = Interface>) -> Self {
        Self { kind, interfaces: interfaces.into_iter().collect(), vips: Vec::new(), backends: Vec::new() }
    }

    /// Adds virtual addresses.
    #[must_use]
    pub fn vips(mut self, vips: impl IntoIterator<Item = IpAddr>) -> Self {
        self.vips.extend(vips.into_iter().map(IpAddr::unmapped));
        self
    }

    /// Adds backends.
    #[must_use]
    pub fn backends(mut self, backends: impl IntoIterator<Item = IpAddr>) -> Self {
        self.backends.extend(backends.into_iter().map(IpAddr::unmapped));
        self
    }

    fn is_attached_to(&self, index: u32) -> bool {
        self.interfaces.iter().any(|interface| interface.index() == index)
    }
}

/// What the host lacks for such a balancer, in the network namespace of the calling thread: forwarding, routes, devices that
/// packets cannot leave by, reverse-path filters, addresses that nobody answers for. Blockers first. To be asked before
/// packets come and whenever the network changes.
///
/// # Errors
/// [`Error::Interface`](crate::Error::Interface), [`Error::Route`](crate::Error::Route) when the kernel does not tell.
pub fn balancer(setup: &BalancerSetup) -> Result<Vec<Finding>> {
    let mut list = Vec::new();
    let has = |ipv4: bool| setup.vips.iter().any(|vip| vip.is_ipv4() == ipv4);
    for interface in &setup.interfaces {
        let mut findings = Findings::of(interface)?;
        ingress(&mut findings, has(true), has(false));
        list.extend(findings.list);
    }
    for vip in unique(&setup.vips) {
        list.extend(virtual_address(setup, vip, route_to(vip)?));
    }
    let mut egress: BTreeMap<u32, Vec<IpAddr>> = BTreeMap::new();
    for backend in unique(&setup.backends) {
        let route = route_to(backend)?;
        list.extend(backend_route(setup, backend, route));
        if let Some(Route { interface: Some(index), local: false, .. }) = route {
            egress.entry(index).or_default().push(backend);
        }
    }
    for (index, backends) in egress {
        // It may have gone since.
        if let Ok(interface) = Interface::by_index(index) {
            list.extend(leaving(setup, &interface, &backends)?);
        }
    }
    list.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    Ok(list)
}

fn unique(addresses: &[IpAddr]) -> Vec<IpAddr> {
    let mut addresses = addresses.to_vec();
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

fn route_to(address: IpAddr) -> Result<Option<Route>> {
    sys::route::route_to(address).map_err(|cause| Error::Route { address, cause })
}

fn setting(family: &str, interface: &Interface, key: &str) -> bool {
    let path = format!("/proc/sys/net/{family}/conf/{interface}/{key}");
    fs::read_to_string(path).is_ok_and(|text| text.trim() != "0")
}

fn ingress(findings: &mut Findings, ipv4: bool, ipv6: bool) {
    let interface = findings.interface.clone();
    for (wanted, family, name) in [(ipv4, "ipv4", "IPv4"), (ipv6, "ipv6", "IPv6")] {
        if wanted && !setting(family, &interface, "forwarding") {
            findings.add(
                Severity::Blocker,
                FindingKind::ForwardingOff,
                format!("it does not forward {name}: the kernel names no next hop for what comes in by it"),
                Some(format!("sysctl -w net.{family}.conf.{interface}.forwarding=1")),
            );
        }
    }
    if ipv4 && findings.ipv4_setting("rp_filter") == 1 {
        findings.add(
            Severity::Warning,
            FindingKind::ReversePathFilter,
            "rp_filter is 1 (strict): where the route to clients leaves by another interface, the stack drops packets that it \
             is to find a neighbour for or to send on"
                .into(),
            Some(format!("sysctl -w net.ipv4.conf.{interface}.rp_filter=2")),
        );
    }
}

/// Whether somebody answers for an address on a link.
fn virtual_address(setup: &BalancerSetup, vip: IpAddr, route: Option<Route>) -> Option<Finding> {
    let Some(Route { local: false, gateway: false, interface: Some(index), .. }) = route else { return None };
    let interface = setup.interfaces.iter().find(|interface| interface.index() == index)?;
    let (proxy, family, length) = if vip.is_ipv4() { ("proxy_arp", "ipv4", 32) } else { ("proxy_ndp", "ipv6", 128) };
    (!setting(family, interface, proxy)).then(|| Finding {
        severity: Severity::Warning,
        kind: FindingKind::VipUnanswered,
        object: interface.name().to_owned(),
        text: format!(
            "{vip} is on its link and none of this host's addresses: nobody answers clients and routers there that ask who has it"
        ),
        remedy: Some(format!("ip address add {vip}/{length} dev {interface}")),
    })
}

fn backend_route(setup: &BalancerSetup, backend: IpAddr, route: Option<Route>) -> Option<Finding> {
    let find =
        |kind, text, remedy| Some(Finding { severity: Severity::Blocker, kind, object: "host".into(), text, remedy });
    match route {
        None => find(
            FindingKind::NoRoute,
            format!("there is no route to backend {backend}"),
            Some(format!("ip route add {backend} via ROUTER")),
        ),
        Some(Route { local: true, .. }) => find(
            FindingKind::OwnBackend,
            format!("backend {backend} is an address of this host, which packets do not leave for"),
            None,
        ),
        Some(Route { gateway: true, .. }) if setup.kind == BalancerKind::DsrL2 => find(
            FindingKind::BackendOffLink,
            format!("backend {backend} is behind a router, where L2 forwarding does not reach: use IP-in-IP"),
            None,
        ),
        Some(_) => None,
    }
}

fn leaving(setup: &BalancerSetup, interface: &Interface, backends: &[IpAddr]) -> Result<Vec<Finding>> {
    let unknown = |cause| Error::Interface {
        interface: interface.name().to_owned(),
        operation: "look for the devices below it",
        cause,
    };
    let devices = host::devices_below(interface.index()).map_err(unknown)?;
    let mut list = Vec::new();
    for device in &devices {
        list.extend(redirect_target(&Interface::by_index(*device)?)?);
    }
    // Replies come in by one of them, or where the program is attached above.
    let mut attached = devices.into_iter().chain([interface.index()]);
    if setup.kind == BalancerKind::Nat && !attached.any(|device| setup.is_attached_to(device)) {
        let names: Vec<String> = backends.iter().map(ToString::to_string).collect();
        list.push(Finding {
            severity: Severity::Blocker,
            kind: FindingKind::NotAttached,
            object: interface.name().to_owned(),
            text: format!(
                "replies of {} come in by it, and the balancer is not to be attached there: they would not be translated back",
                names.join(", ")
            ),
            remedy: None,
        });
    }
    Ok(list)
}
