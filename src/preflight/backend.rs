//! What a backend of a direct-server-return balancer lacks.

use std::net::IpAddr;

use super::{Finding, FindingKind, Findings, Severity};
use crate::{Interface, Result, address::Unmapped as _, sys};

/// What a backend of a direct-server-return balancer lacks to serve these virtual addresses, which reach it by
/// `interface`: with L2 forwarding as they are, with IP-in-IP out of a tunnel device or `TunnelDecap`.
///
/// # Errors
/// [`Error::Interface`](crate::Error::Interface) when the kernel does not tell.
pub fn dsr_backend(interface: &Interface, vips: &[IpAddr]) -> Result<Vec<Finding>> {
    let mut findings = Findings::of(interface)?;
    let vips: Vec<IpAddr> = vips.iter().map(|vip| vip.unmapped()).collect();
    for vip in &vips {
        let local = sys::route::route_to(*vip).is_ok_and(|route| route.is_some_and(|route| route.local));
        if !local {
            let length = if vip.is_ipv4() { 32 } else { 128 };
            let text = format!("{vip} is none of its addresses: it forwards or drops its packets");
            let remedy = Some(format!("ip addr add {vip}/{length} dev lo"));
            findings.add_to_host(Severity::Blocker, FindingKind::VipNotLocal, text, remedy);
        }
    }
    if vips.iter().any(IpAddr::is_ipv4) {
        let name = interface.name();
        if findings.ipv4_setting("arp_ignore") == 0 {
            findings.add(
                Severity::Blocker,
                FindingKind::ArpIgnore,
                "arp_ignore is 0: it answers ARP for virtual addresses on lo, and clients' packets bypass the balancer"
                    .into(),
                Some(format!("sysctl -w net.ipv4.conf.{name}.arp_ignore=1")),
            );
        }
        if findings.ipv4_setting("arp_announce") < 2 {
            findings.add(
                Severity::Warning,
                FindingKind::ArpAnnounce,
                "arp_announce is below 2: its own ARP requests may name a virtual address, and neighbours learn it"
                    .into(),
                Some(format!("sysctl -w net.ipv4.conf.{name}.arp_announce=2")),
            );
        }
        if findings.ipv4_setting("rp_filter") == 1 {
            findings.add(
                Severity::Warning,
                FindingKind::ReversePathFilter,
                "rp_filter is 1 (strict): packets whose replies would leave by another interface are dropped, among them all \
                 that come out of a tunnel device, whose own setting counts too"
                    .into(),
                Some(format!("sysctl -w net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.{name}.rp_filter=0")),
            );
        }
    }
    Ok(findings.list)
}
