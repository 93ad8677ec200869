//! Collecting what is found about an interface.

use super::{Finding, FindingKind, Severity};
use crate::{
    Interface, Result,
    sys::{
        self,
        device::Device,
        net::{Offload, XdpState},
    },
};

/// Bits of `enum netdev_xdp_act`.
#[derive(Clone, Copy)]
pub(super) enum Feature {
    Basic = 1,
    Transmit = 1 << 2,
    TransmitFragments = 1 << 6,
}

pub(super) struct Findings {
    pub(super) interface: Interface,
    pub(super) device: Device,
    pub(super) state: XdpState,
    pub(super) list: Vec<Finding>,
}

impl Findings {
    pub(super) fn of(interface: &Interface) -> Result<Self> {
        let state = sys::net::xdp_state(interface.index()).map_err(|cause| crate::Error::Interface {
            interface: interface.name().to_owned(),
            operation: "read its XDP state",
            cause,
        })?;
        Ok(Self { interface: interface.clone(), device: interface.describe()?, state, list: Vec::new() })
    }

    pub(super) fn not_ethernet(&mut self) {
        let text = format!(
            "it has no Ethernet header ({}): XDP programs here would misread its packets",
            self.device.type_name()
        );
        self.add(Severity::Blocker, FindingKind::NotEthernet, text, None);
    }

    /// What the bridge or bond that it belongs to means for a program.
    pub(super) fn membership(&mut self) {
        let Some((index, kind)) = self.device.master.clone() else { return };
        let Some(master) = sys::net::name_of(index) else { return };
        if let Some(program) = sys::net::xdp_state(index).ok().and_then(|state| state.program()) {
            let text =
                format!("XDP program {program} is attached to `{master}`, which it belongs to: one or the other");
            self.add(Severity::Blocker, FindingKind::ProgramAttached, text, None);
        } else if matches!(kind.as_str(), "bond" | "team") {
            let text = format!("it is a member of the {kind} `{master}`: a program here sees what arrives by it alone");
            self.add(Severity::Advice, FindingKind::BondMember, text, None);
        }
    }

    /// A veth end without a native program receives XDP frames only if it has GRO on; and then frames that a program sends
    /// back lie in its ring until something else wakes it, and are lost when the ring is full.
    pub(super) fn other_end(&mut self) {
        if self.device.kind != "veth" {
            return;
        }
        let lost = "frames that a program on this end sends back (XDP_TX) are counted as sent and not delivered; redirected \
                    ones arrive only with GRO on there";
        match self.device.peer() {
            Ok(Some(peer)) if peer.native_program == 0 => self.add(
                Severity::Warning,
                FindingKind::PeerWithoutProgram,
                format!(
                    "the other end, `{}`, has no native XDP program: {lost}: attach one there (one that passes everything \
                     will do)",
                    peer.name
                ),
                None,
            ),
            Ok(_) => {}
            Err(cause) => self.add(
                Severity::Warning,
                FindingKind::PeerWithoutProgram,
                format!(
                    "whether the other end has a native XDP program cannot be seen from here ({cause}); without one, {lost}"
                ),
                None,
            ),
        }
    }

    pub(super) fn add_to_host(&mut self, severity: Severity, kind: FindingKind, text: String, remedy: Option<String>) {
        self.list.push(Finding { severity, kind, object: "host".into(), text, remedy });
    }

    pub(super) fn add(&mut self, severity: Severity, kind: FindingKind, text: String, remedy: Option<String>) {
        self.list.push(Finding { severity, kind, object: self.interface.name().to_owned(), text, remedy });
    }

    /// Kernels before 6.3 do not tell: no finding then.
    pub(super) fn feature(&self, feature: Feature) -> bool {
        self.state.features.is_none_or(|bits| bits & feature as u64 != 0)
    }

    /// Drivers that know no offloads have none on.
    pub(super) fn is_on(&self, offload: Offload) -> bool {
        sys::net::offload_is_on(self.interface.name(), offload).unwrap_or(false)
    }

    pub(super) fn transmit_checksum(&mut self, consequence: &str) {
        if self.is_on(Offload::TransmitChecksum) {
            let remedy = format!("ethtool -K {} tx off", self.interface);
            let text = format!("tx checksum offload is on: {consequence}");
            self.add(Severity::Advice, FindingKind::TransmitChecksumOffload, text, Some(remedy));
        }
    }

    /// What the kernel goes by in a setting of an interface for IPv4: the larger of its own value and that for all.
    pub(super) fn ipv4_setting(&self, key: &str) -> u8 {
        let read = |place: &str| {
            let text = std::fs::read_to_string(format!("/proc/sys/net/ipv4/conf/{place}/{key}")).ok()?;
            text.trim().parse::<u8>().ok()
        };
        read("all").max(read(self.interface.name())).unwrap_or(0)
    }
}
