//! What an interface lacks.

use super::{Finding, FindingKind, Findings, Severity, findings::Feature};
use crate::{
    Interface, Result,
    sys::{self, net::Offload},
};

/// What an interface lacks to be guarded in native mode.
///
/// # Errors
/// [`Error::Interface`](crate::Error::Interface) when the kernel does not tell.
pub fn interface(interface: &Interface) -> Result<Vec<Finding>> {
    let mut findings = Findings::of(interface)?;
    if !findings.device.is_ethernet() {
        findings.not_ethernet();
        return Ok(findings.list);
    }
    let state = findings.state;
    if let Some(program) = state.program() {
        let text = format!("XDP program {program} is attached already");
        findings.add(Severity::Blocker, FindingKind::ProgramAttached, text, None);
    }
    findings.membership();
    if !findings.feature(Feature::Basic) {
        findings.add(
            Severity::Blocker,
            FindingKind::NoNativeMode,
            "its driver has no native XDP: only generic mode works here, several times slower".into(),
            None,
        );
    }
    if findings.is_on(Offload::LargeReceive) {
        let remedy = format!("ethtool -K {interface} lro off");
        let text = "LRO is on, which native XDP refuses".into();
        findings.add(Severity::Blocker, FindingKind::LargeReceiveOffload, text, Some(remedy));
    }
    findings.transmit_checksum(
        "programs at the other end of this link see packets of local sockets with unfinished checksums; a balancer \
         that rewrites them sends broken ones",
    );
    Ok(findings.list)
}

/// What a program sees otherwise on this interface in generic mode than in native mode: packets that were merged, or that
/// their sender has not cut yet.
///
/// Merged packets are counted as one frame; [`Limit::packets`](crate::Limit::packets) charges them by segments; balancers
/// do not forward what is longer than the way's MTU, and count it
/// ([`Reason::TooBig`](crate::Reason::TooBig), [`Reason::TooBigAnswered`](crate::Reason::TooBigAnswered)).
///
/// # Errors
/// [`Error::Interface`](crate::Error::Interface) when the kernel does not tell.
pub fn generic_mode(interface: &Interface) -> Result<Vec<Finding>> {
    let mut findings = Findings::of(interface)?;
    let consequence =
        "in generic mode, counters count them as one frame, and balancers drop what is longer than the MTU";
    match sys::net::driver_of(interface.name()).unwrap_or_default().as_str() {
        "bonding" | "team" | "bridge" | "802.1Q VLAN Support" | "macvlan" | "ipvlan" | "openvswitch" => {
            let text = format!(
                "it stands above other interfaces, whose GRO merges packets before they come here: {consequence}; or attach \
                 to the interfaces below"
            );
            let remedy = Some("ethtool -K LOWER gro off".into());
            findings.add(Severity::Warning, FindingKind::MergedPackets, text, remedy);
        }
        "veth" | "tun" | "virtio_net" => {
            let text = format!(
                "packets from the host or guest at its other end come in uncut where that one leaves segmentation to \
                 its device: {consequence}"
            );
            let remedy = Some("ethtool -K OTHER-END tso off gso off".into());
            findings.add(Severity::Advice, FindingKind::MergedPackets, text, remedy);
        }
        _ => {}
    }
    if findings.is_on(Offload::GenericReceive) {
        findings.add(
            Severity::Advice,
            FindingKind::GenericReceiveOffload,
            "GRO is on: while a program is attached in generic mode, the kernel merges nothing here, whatever ethtool says, \
             and receiving costs the host more"
                .into(),
            None,
        );
    }
    Ok(findings.list)
}

/// What an interface lacks to receive frames that another one's program redirects to it (`XDP_REDIRECT`), or
/// that its own sends back (`XDP_TX`).
///
/// # Errors
/// [`Error::Interface`](crate::Error::Interface) when the kernel does not tell.
pub fn redirect_target(interface: &Interface) -> Result<Vec<Finding>> {
    let mut findings = Findings::of(interface)?;
    if !findings.device.is_ethernet() {
        findings.not_ethernet();
        return Ok(findings.list);
    }
    if !findings.feature(Feature::Transmit) {
        findings.add(
            Severity::Blocker,
            FindingKind::NoXdpTransmit,
            "it cannot send XDP frames: they are lost, in silence. On veth, the other end needs a native XDP program \
             (one that passes everything will do); on other drivers, attach one here or see the driver's limits"
                .into(),
            None,
        );
        return Ok(findings.list);
    }
    findings.other_end();
    if !findings.feature(Feature::TransmitFragments) {
        let text = "it cannot send XDP frames of several buffers: jumbo frames are lost".into();
        findings.add(Severity::Advice, FindingKind::NoFragmentsTransmit, text, None);
    }
    Ok(findings.list)
}
