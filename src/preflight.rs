//! What a host lacks before XDP can do its work, told in advance.
//!
//! Nothing here changes anything. Each [`Finding`] says what is wrong, what it leads to and what to do.

use std::{fmt, fs, net::IpAddr};

use crate::{
    Interface, Result,
    address::Unmapped as _,
    sys::{
        self,
        device::Device,
        net::{Offload, XdpState},
        privilege,
    },
};

/// How much a [`Finding`] matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// Works, but not as well as it could.
    Advice,
    /// Some packets will be wrong or lost.
    Warning,
    /// It will not work.
    Blocker,
}

/// One thing that is not as XDP needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Finding {
    /// How much it matters.
    pub severity: Severity,
    /// The interface, or `host`.
    pub object: String,
    /// What is wrong, what it leads to, and what to do.
    pub text: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Advice => "advice",
            Severity::Warning => "warning",
            Severity::Blocker => "blocker",
        };
        write!(f, "{severity}: {}: {}", self.object, self.text)
    }
}

/// What the host and this process lack: capabilities, the BPF JIT, the kernel's version; and whether a user namespace or a
/// seccomp filter forbids it BPF.
#[must_use]
pub fn host() -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut find = |severity, text: String| findings.push(Finding { severity, object: "host".into(), text });
    let missing = privilege::missing_capabilities();
    if !missing.is_empty() {
        find(Severity::Blocker, format!("this process lacks {}: run as root or grant them", missing.join(", ")));
    }
    // Where capabilities are missing, the kernel may refuse for want of them.
    for by in privilege::forbidden().into_iter().filter(|_| missing.is_empty()) {
        find(Severity::Blocker, by.to_owned());
    }
    if sys::kernel_older_than(5, 18) {
        find(Severity::Blocker, format!("Linux {} is older than 5.18, which is needed", sys::kernel_release()));
    } else if sys::kernel_older_than(6, 1) {
        find(Severity::Advice, format!("Linux {} is older than 6.1, where tests begin", sys::kernel_release()));
    }
    let jit = fs::read_to_string("/proc/sys/net/core/bpf_jit_enable").unwrap_or_default();
    if jit.trim() == "0" {
        find(
            Severity::Warning,
            "the BPF JIT is off, programs are interpreted: sysctl net.core.bpf_jit_enable=1".into(),
        );
    }
    findings
}

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
        findings.add(Severity::Blocker, format!("XDP program {program} is attached already"));
    }
    findings.membership();
    if !findings.feature(Feature::Basic) {
        findings.add(
            Severity::Blocker,
            "its driver has no native XDP: only generic mode works here, several times slower".into(),
        );
    }
    if findings.is_on(Offload::LargeReceive) {
        findings.add(Severity::Blocker, format!("LRO is on, which native XDP refuses: ethtool -K {interface} lro off"));
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
                "it stands above other interfaces, whose GRO merges packets before they come here: {consequence}: attach \
                 to the interfaces below, or ethtool -K LOWER gro off"
            );
            findings.add(Severity::Warning, text);
        }
        "veth" | "tun" | "virtio_net" => {
            let text = format!(
                "packets from the host or guest at its other end come in uncut where that one leaves segmentation to \
                 its device: {consequence}: ethtool -K OTHER-END tso off gso off"
            );
            findings.add(Severity::Advice, text);
        }
        _ => {}
    }
    if findings.is_on(Offload::GenericReceive) {
        findings.add(
            Severity::Advice,
            "GRO is on: while a program is attached in generic mode, the kernel merges nothing here, whatever ethtool says, \
             and receiving costs the host more"
                .into(),
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
            "it cannot send XDP frames: they are lost, in silence. On veth, the other end needs a native XDP program \
             (one that passes everything will do); on other drivers, attach one here or see the driver's limits"
                .into(),
        );
        return Ok(findings.list);
    }
    findings.other_end();
    if !findings.feature(Feature::TransmitFragments) {
        findings.add(Severity::Advice, "it cannot send XDP frames of several buffers: jumbo frames are lost".into());
    }
    Ok(findings.list)
}

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
            let text = format!(
                "{vip} is none of its addresses: it forwards or drops its packets: ip addr add {vip}/{length} dev lo"
            );
            findings.add_to_host(Severity::Blocker, text);
        }
    }
    if vips.iter().any(IpAddr::is_ipv4) {
        let name = interface.name();
        // The kernel takes the larger of the two values for each of these settings.
        let effective = |key: &str| {
            let read = |place: &str| {
                let text = fs::read_to_string(format!("/proc/sys/net/ipv4/conf/{place}/{key}")).ok()?;
                text.trim().parse::<u8>().ok()
            };
            read("all").max(read(name)).unwrap_or(0)
        };
        if effective("arp_ignore") == 0 {
            findings.add(
                Severity::Blocker,
                format!(
                    "arp_ignore is 0: it answers ARP for virtual addresses on lo, and clients' packets bypass the \
                     balancer: sysctl net.ipv4.conf.{name}.arp_ignore=1"
                ),
            );
        }
        if effective("arp_announce") < 2 {
            findings.add(
                Severity::Warning,
                format!(
                    "arp_announce is below 2: its own ARP requests may name a virtual address, and neighbours learn \
                     it: sysctl net.ipv4.conf.{name}.arp_announce=2"
                ),
            );
        }
        if effective("rp_filter") == 1 {
            findings.add(
                Severity::Warning,
                format!(
                    "rp_filter is 1 (strict): packets whose answers would leave by another interface are dropped, among \
                     them all that come out of a tunnel device: sysctl net.ipv4.conf.all.rp_filter=0 and the same for \
                     {name} and the tunnel"
                ),
            );
        }
    }
    Ok(findings.list)
}

/// Bits of `enum netdev_xdp_act`.
#[derive(Clone, Copy)]
enum Feature {
    Basic = 1,
    Transmit = 1 << 2,
    TransmitFragments = 1 << 6,
}

struct Findings {
    interface: Interface,
    device: Device,
    state: XdpState,
    list: Vec<Finding>,
}

impl Findings {
    fn of(interface: &Interface) -> Result<Self> {
        let state = sys::net::xdp_state(interface.index()).map_err(|cause| crate::Error::Interface {
            interface: interface.name().to_owned(),
            operation: "read its XDP state",
            cause,
        })?;
        Ok(Self { interface: interface.clone(), device: interface.describe()?, state, list: Vec::new() })
    }

    fn not_ethernet(&mut self) {
        let text = format!(
            "it has no Ethernet header ({}): XDP programs here would misread its packets",
            self.device.type_name()
        );
        self.add(Severity::Blocker, text);
    }

    /// What the bridge or bond that it belongs to means for a program.
    fn membership(&mut self) {
        let Some((index, kind)) = self.device.master.clone() else { return };
        let Some(master) = sys::net::name_of(index) else { return };
        if let Some(program) = sys::net::xdp_state(index).ok().and_then(|state| state.program()) {
            let text =
                format!("XDP program {program} is attached to `{master}`, which it belongs to: one or the other");
            self.add(Severity::Blocker, text);
        } else if matches!(kind.as_str(), "bond" | "team") {
            let text = format!("it is a member of the {kind} `{master}`: a program here sees what arrives by it alone");
            self.add(Severity::Advice, text);
        }
    }

    /// A veth end without a native program receives XDP frames only if it has GRO on; and then frames that a program sends
    /// back lie in its ring until something else wakes it, and are lost when the ring is full.
    fn other_end(&mut self) {
        if self.device.kind != "veth" {
            return;
        }
        let lost = "frames that a program on this end sends back (XDP_TX) are counted as sent and not delivered; redirected \
                    ones arrive only with GRO on there";
        match self.device.peer() {
            Ok(Some(peer)) if peer.native_program == 0 => self.add(
                Severity::Warning,
                format!(
                    "the other end, `{}`, has no native XDP program: {lost}: attach one there (one that passes everything \
                     will do)",
                    peer.name
                ),
            ),
            Ok(_) => {}
            Err(cause) => self.add(
                Severity::Warning,
                format!(
                    "whether the other end has a native XDP program cannot be seen from here ({cause}); without one, {lost}"
                ),
            ),
        }
    }

    fn add_to_host(&mut self, severity: Severity, text: String) {
        self.list.push(Finding { severity, object: "host".into(), text });
    }

    fn add(&mut self, severity: Severity, text: String) {
        self.list.push(Finding { severity, object: self.interface.name().to_owned(), text });
    }

    /// Kernels before 6.3 do not tell: no finding then.
    fn feature(&self, feature: Feature) -> bool {
        self.state.features.is_none_or(|bits| bits & feature as u64 != 0)
    }

    /// Drivers that know no offloads have none on.
    fn is_on(&self, offload: Offload) -> bool {
        sys::net::offload_is_on(self.interface.name(), offload).unwrap_or(false)
    }

    fn transmit_checksum(&mut self, consequence: &str) {
        if self.is_on(Offload::TransmitChecksum) {
            let text = format!("tx checksum offload is on: {consequence}: ethtool -K {} tx off", self.interface);
            self.add(Severity::Advice, text);
        }
    }
}
