//! What a host does with packets that are not for it: routes, rules, neighbours, and what neighbours say of themselves.

use std::net::{IpAddr, Ipv6Addr};

use ipnet::IpNet;

use crate::error::{Context, Result};
use crate::frame::Frame;
use crate::namespace::Namespace;
use crate::netlink::{RouteRequest, RuleRequest, default_net};
use crate::packet::PacketSocket;

/// A route: a destination and at least one next hop.
#[derive(Clone, Debug)]
#[must_use = "nothing is routed before it is inserted"]
pub struct Route {
    dst: IpNet,
    hops: Vec<(Option<IpAddr>, Option<String>)>,
    table: Option<u32>,
    metric: Option<u32>,
    source: Option<IpAddr>,
}

impl Route {
    /// A route to a network.
    pub fn to(dst: IpNet) -> Self {
        Self { dst, hops: Vec::new(), table: None, metric: None, source: None }
    }

    /// One more next hop: a gateway that is reachable by other routes.
    pub fn via(mut self, gateway: IpAddr) -> Self {
        self.hops.push((Some(gateway), None));
        self
    }

    /// One more next hop: a gateway on this interface.
    pub fn via_dev(mut self, gateway: IpAddr, dev: &str) -> Self {
        self.hops.push((Some(gateway), Some(dev.into())));
        self
    }

    /// Neighbours that are reached directly on this interface.
    pub fn on_link(mut self, dev: &str) -> Self {
        self.hops.push((None, Some(dev.into())));
        self
    }

    /// In another table than the main one.
    pub fn table(mut self, table: u32) -> Self {
        self.table = Some(table);
        self
    }

    /// The smallest wins.
    pub fn metric(mut self, metric: u32) -> Self {
        self.metric = Some(metric);
        self
    }

    /// The address from which the host's own packets leave.
    pub fn source(mut self, source: IpAddr) -> Self {
        self.source = Some(source);
        self
    }

    fn request(&self, ns: &Namespace) -> Result<RouteRequest> {
        let index = |(via, dev): &(Option<IpAddr>, Option<String>)| {
            Ok((*via, dev.as_deref().map(|dev| ns.ifindex(dev)).transpose()?))
        };
        let hops = self.hops.iter().map(index).collect::<Result<_>>()?;
        Ok(RouteRequest { dst: self.dst, hops, table: self.table, metric: self.metric, source: self.source })
    }
}

/// A policy rule: packets from this network are routed by this table.
#[derive(Clone, Debug)]
#[must_use = "nothing changes before it is added"]
pub struct Rule {
    from: IpNet,
    iif: Option<String>,
    table: u32,
    priority: u32,
}

impl Rule {
    /// Asked before the main table, at priority 1000.
    pub fn new(from: IpNet, table: u32) -> Self {
        Self { from, iif: None, table, priority: 1000 }
    }

    /// Only for packets that come in by this interface.
    pub fn iif(mut self, dev: &str) -> Self {
        self.iif = Some(dev.into());
        self
    }

    fn request(&self) -> RuleRequest<'_> {
        RuleRequest { from: self.from, iif: self.iif.as_deref(), table: self.table, priority: self.priority }
    }
}

impl Namespace {
    /// Adds a route, or replaces the one to the same network with the same metric.
    pub fn replace_route(&self, route: &Route) -> Result<()> {
        let request = route.request(self)?;
        self.netlink().replace_route(&request).context(|| format!("namespace {}: {route:?}", self.name()))
    }

    /// Removes a route.
    pub fn remove_route(&self, route: &Route) -> Result<()> {
        let request = route.request(self)?;
        self.netlink().remove_route(&request).context(|| format!("namespace {}: remove {route:?}", self.name()))
    }

    /// Adds a route through a gateway.
    pub fn add_route(&self, dst: IpNet, via: IpAddr) -> Result<()> {
        let request = Route::to(dst).via(via).request(self)?;
        let added = self.netlink().add_route(&request);
        added.context(|| format!("namespace {}: add route to {dst} via {via}", self.name()))
    }

    /// Adds the default route of the gateway's family.
    pub fn add_default_route(&self, via: IpAddr) -> Result<()> {
        self.add_route(default_net(via), via)
    }

    /// Adds a route to neighbours that are reached directly on an interface.
    pub fn add_onlink_route(&self, dst: IpNet, dev: &str) -> Result<()> {
        let request = Route::to(dst).on_link(dev).request(self)?;
        self.netlink().add_route(&request).context(|| self.about(dev, &format!("add route to {dst}")))
    }

    /// Adds a policy rule.
    pub fn add_rule(&self, rule: &Rule) -> Result<()> {
        self.netlink().add_rule(&rule.request()).context(|| format!("namespace {}: add {rule:?}", self.name()))
    }

    /// Removes a policy rule.
    pub fn remove_rule(&self, rule: &Rule) -> Result<()> {
        self.netlink().remove_rule(&rule.request()).context(|| format!("namespace {}: remove {rule:?}", self.name()))
    }

    /// Adds or replaces a permanent neighbour entry.
    pub fn add_neighbour(&self, dev: &str, ip: IpAddr, mac: [u8; 6]) -> Result<()> {
        let added = self.netlink().add_neighbour(self.ifindex(dev)?, ip, mac, true);
        added.context(|| self.about(dev, &format!("add neighbour {ip}")))
    }

    /// Adds or replaces a neighbour entry that was valid and has to be confirmed (`nud stale`).
    pub fn add_stale_neighbour(&self, dev: &str, ip: IpAddr, mac: [u8; 6]) -> Result<()> {
        let added = self.netlink().add_neighbour(self.ifindex(dev)?, ip, mac, false);
        added.context(|| self.about(dev, &format!("add stale neighbour {ip}")))
    }

    /// Makes the kernel forget a neighbour, if it knows it.
    pub fn forget_neighbour(&self, dev: &str, ip: IpAddr) -> Result<()> {
        match self.netlink().remove_neighbour(self.ifindex(dev)?, ip) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            removed => removed.context(|| self.about(dev, &format!("forget neighbour {ip}"))),
        }
    }

    /// Tells everybody on the link that this address is at the interface's present MAC address: by a gratuitous ARP request
    /// (RFC 5227) or an unsolicited neighbour advertisement (RFC 4861 7.2.6).
    pub fn announce(&self, dev: &str, ip: IpAddr) -> Result<()> {
        let mac = self.mac(dev)?;
        let frame = match ip {
            IpAddr::V4(ip) => Frame::arp_request(mac, ip, ip),
            IpAddr::V6(ip) => neighbour_advertisement(mac, ip),
        };
        PacketSocket::open(self, dev)?.send(&frame.build())
    }
}

fn neighbour_advertisement(mac: [u8; 6], ip: Ipv6Addr) -> Frame {
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    // The flag is "override"; the option is the target's link-layer address, one unit of 8 bytes long.
    let frame = Frame::icmp(ip.into(), all_nodes.into(), 136, 0, [0x20, 0, 0, 0]).ttl(255);
    frame.payload(&[&ip.octets()[..], &[2, 1], &mac].concat()).macs(mac, [0x33, 0x33, 0, 0, 0, 1])
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::device::veth;
    use crate::traffic::ping;

    const SECOND: Duration = Duration::from_secs(1);

    fn pair() -> (Namespace, Namespace) {
        let (a, b) = (Namespace::new("a").unwrap(), Namespace::new("b").unwrap());
        veth((&a, "eth0"), (&b, "eth0")).unwrap();
        for (ns, number) in [(&a, 1), (&b, 2)] {
            ns.add_address("eth0", format!("10.0.0.{number}/24").parse().unwrap()).unwrap();
            ns.add_address("eth0", format!("fd00::{number}/64").parse().unwrap()).unwrap();
        }
        (a, b)
    }

    fn reaches(ns: &Namespace, ip: &str) -> bool {
        let end = Instant::now() + Duration::from_secs(5);
        loop {
            match ping(ns, ip.parse().unwrap(), 1, Duration::ZERO, SECOND / 5) {
                Ok(report) if report.received == 1 => return true,
                _ if Instant::now() > end => return false,
                _ => {}
            }
        }
    }

    #[test]
    fn an_announced_address_is_believed() {
        let (a, b) = pair();
        for ip in ["10.0.0.2", "fd00::2"] {
            assert!(reaches(&a, ip));
        }
        b.set_mac("eth0", [2, 0, 0, 0, 9, 9]).unwrap();
        for ip in ["10.0.0.2", "fd00::2"] {
            // A frame for the old address would be none of its.
            a.add_stale_neighbour("eth0", ip.parse().unwrap(), [2, 0, 0, 0, 9, 8]).unwrap();
            b.announce("eth0", ip.parse().unwrap()).unwrap();
            let report = ping(&a, ip.parse().unwrap(), 1, Duration::ZERO, SECOND).unwrap();
            assert_eq!(report.received, 1, "{ip}");
        }
    }

    #[test]
    fn routes_and_rules_lead_where_they_say() {
        let (a, b) = pair();
        for (ip, via, other, source) in
            [("10.1.0.1", "10.0.0.2", "10.0.0.3/24", "10.0.0.1"), ("fd01::1", "fd00::2", "fd00::3/64", "fd00::1")]
        {
            let other: IpNet = other.parse().unwrap();
            b.add_address("eth0", other).unwrap();
            let net = IpNet::from(ip.parse::<IpAddr>().unwrap());
            let via: IpAddr = via.parse().unwrap();
            b.add_address("lo", net).unwrap();
            let gone: IpAddr = if via.is_ipv4() { "10.0.0.9" } else { "fd00::9" }.parse().unwrap();
            a.replace_route(&Route::to(net).via(gone).metric(10)).unwrap();
            a.replace_route(&Route::to(net).via(via).metric(10)).unwrap();
            assert!(reaches(&a, ip), "{ip}: replaced");
            a.remove_route(&Route::to(net).via(via).metric(10)).unwrap();
            assert!(ping(&a, net.addr(), 1, Duration::ZERO, SECOND / 10).is_err(), "{ip}: removed");
            let own = IpNet::from(source.parse::<IpAddr>().unwrap());
            let two = Route::to(net).via_dev(via, "eth0").via_dev(other.addr(), "eth0");
            a.replace_route(&two.source(own.addr()).table(300)).unwrap();
            // An address is chosen by a route: without a rule for what has none yet, there is none.
            a.add_rule(&Rule::new(default_net(via), 300)).unwrap();
            assert!(reaches(&a, ip), "{ip}: by the rule");
            a.remove_rule(&Rule::new(default_net(via), 300)).unwrap();
            a.add_rule(&Rule::new(own, 300).iif("eth0")).unwrap();
            assert!(ping(&a, net.addr(), 1, Duration::ZERO, SECOND / 10).is_err(), "{ip}: for others only");
        }
    }
}
