//! Routes, rules and neighbours.

use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteNextHop, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};

use super::{Netlink, family};

/// A route, with interfaces by their index.
pub(crate) struct RouteRequest {
    pub(crate) dst: IpNet,
    /// Gateway and interface of each next hop, at least one of both.
    pub(crate) hops: Vec<(Option<IpAddr>, Option<u32>)>,
    pub(crate) table: Option<u32>,
    pub(crate) metric: Option<u32>,
    pub(crate) source: Option<IpAddr>,
}

/// A policy rule that leads to a table.
pub(crate) struct RuleRequest<'r> {
    pub(crate) from: IpNet,
    pub(crate) iif: Option<&'r str>,
    pub(crate) table: u32,
    pub(crate) priority: u32,
}

impl Netlink {
    /// Adds a route, or replaces the one with the same destination and metric.
    pub(crate) fn replace_route(&self, route: &RouteRequest) -> io::Result<()> {
        let message = RouteNetlinkMessage::NewRoute(route_message(route));
        self.request(message, NLM_F_CREATE | NLM_F_REPLACE).map(drop)
    }

    pub(crate) fn add_route(&self, route: &RouteRequest) -> io::Result<()> {
        let message = RouteNetlinkMessage::NewRoute(route_message(route));
        self.request(message, NLM_F_CREATE | NLM_F_EXCL).map(drop)
    }

    pub(crate) fn remove_route(&self, route: &RouteRequest) -> io::Result<()> {
        self.request(RouteNetlinkMessage::DelRoute(route_message(route)), 0).map(drop)
    }

    pub(crate) fn add_rule(&self, rule: &RuleRequest<'_>) -> io::Result<()> {
        let message = RouteNetlinkMessage::NewRule(rule_message(rule));
        self.request(message, NLM_F_CREATE | NLM_F_EXCL).map(drop)
    }

    pub(crate) fn remove_rule(&self, rule: &RuleRequest<'_>) -> io::Result<()> {
        self.request(RouteNetlinkMessage::DelRule(rule_message(rule)), 0).map(drop)
    }

    /// Adds or replaces a neighbour entry: a permanent one, or one that was valid and has to be confirmed.
    pub(crate) fn add_neighbour(&self, index: u32, ip: IpAddr, mac: [u8; 6], permanent: bool) -> io::Result<()> {
        let mut entry = neighbour(index, ip);
        entry.header.state = if permanent { NeighbourState::Permanent } else { NeighbourState::Stale };
        entry.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
        self.request(RouteNetlinkMessage::NewNeighbour(entry), NLM_F_CREATE | NLM_F_REPLACE).map(drop)
    }

    pub(crate) fn remove_neighbour(&self, index: u32, ip: IpAddr) -> io::Result<()> {
        self.request(RouteNetlinkMessage::DelNeighbour(neighbour(index, ip)), 0).map(drop)
    }
}

fn route_message(route: &RouteRequest) -> RouteMessage {
    let dst = route.dst.trunc();
    let mut message = RouteMessage::default();
    message.header.address_family = family(dst.addr());
    message.header.destination_prefix_length = dst.prefix_len();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Static;
    message.header.kind = RouteType::Unicast;
    if dst.addr().is_ipv4() && route.hops.iter().all(|(via, _)| via.is_none()) {
        message.header.scope = RouteScope::Link;
    }
    let attributes = &mut message.attributes;
    if dst.prefix_len() > 0 {
        attributes.push(RouteAttribute::Destination(RouteAddress::from(dst.addr())));
    }
    match &route.hops[..] {
        [(via, dev)] => {
            attributes.extend(via.map(|via| RouteAttribute::Gateway(via.into())));
            attributes.extend(dev.map(RouteAttribute::Oif));
        }
        hops => attributes.push(RouteAttribute::MultiPath(hops.iter().map(next_hop).collect())),
    }
    attributes.extend(route.metric.map(RouteAttribute::Priority));
    attributes.extend(route.source.map(|source| RouteAttribute::PrefSource(source.into())));
    if let Some(table) = route.table {
        message.header.table = u8::try_from(table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
        message.attributes.push(RouteAttribute::Table(table));
    }
    message
}

fn next_hop(&(via, dev): &(Option<IpAddr>, Option<u32>)) -> RouteNextHop {
    let mut hop = RouteNextHop::default();
    hop.interface_index = dev.unwrap_or(0);
    hop.attributes = via.map(|via| RouteAttribute::Gateway(via.into())).into_iter().collect();
    hop
}

fn rule_message(rule: &RuleRequest<'_>) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family(rule.from.addr());
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![RuleAttribute::Table(rule.table), RuleAttribute::Priority(rule.priority)];
    if rule.from.prefix_len() > 0 {
        message.header.src_len = rule.from.prefix_len();
        message.attributes.push(RuleAttribute::Source(rule.from.addr()));
    }
    message.attributes.extend(rule.iif.map(|name| RuleAttribute::Iifname(name.into())));
    message
}

fn neighbour(index: u32, ip: IpAddr) -> NeighbourMessage {
    let mut entry = NeighbourMessage::default();
    entry.header.family = family(ip);
    entry.header.ifindex = index;
    entry.header.kind = RouteType::Unicast;
    let ip = match ip {
        IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
        IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
    };
    entry.attributes = vec![NeighbourAttribute::Destination(ip)];
    entry
}
