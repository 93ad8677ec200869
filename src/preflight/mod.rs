//! What a host lacks before XDP can do its work.
//!
//! Nothing here changes anything. Each [`Finding`] says what is wrong and what it leads to, has a [`FindingKind`] to match on,
//! and where there is one, the command that mends it.

mod backend;
mod balancer;
mod findings;
mod interface;

use std::{fmt, fs};

pub use backend::dsr_backend;
pub use balancer::{BalancerKind, BalancerSetup, balancer};
use findings::Findings;
pub use interface::{generic_mode, interface, redirect_target};

use crate::sys::{self, privilege};

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

impl Severity {
    /// Lower-case name: `advice`, `warning`, `blocker`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Advice => "advice",
            Self::Warning => "warning",
            Self::Blocker => "blocker",
        }
    }
}

macro_rules! kinds {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal;)+) => {
        /// What a [`Finding`] is about.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum FindingKind {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl FindingKind {
            /// The name in lower case with underscores, such as `forwarding_off`.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }
        }
    };
}

kinds! {
    /// The process lacks capabilities.
    MissingCapability = "missing_capability";
    /// A user namespace or a seccomp filter forbids BPF.
    Forbidden = "forbidden";
    /// The kernel is older than needed, or than tested.
    OldKernel = "old_kernel";
    /// BPF programs are interpreted.
    JitOff = "jit_off";
    /// The device has no Ethernet header.
    NotEthernet = "not_ethernet";
    /// Another XDP program is attached, here or on the device that this one belongs to.
    ProgramAttached = "program_attached";
    /// A member of a bond or team.
    BondMember = "bond_member";
    /// The driver has no native XDP.
    NoNativeMode = "no_native_mode";
    /// LRO is on.
    LargeReceiveOffload = "large_receive_offload";
    /// GRO is on.
    GenericReceiveOffload = "generic_receive_offload";
    /// The sender's checksum offload is on.
    TransmitChecksumOffload = "transmit_checksum_offload";
    /// Packets come in merged, or before their sender has cut them.
    MergedPackets = "merged_packets";
    /// The device cannot send XDP frames.
    NoXdpTransmit = "no_xdp_transmit";
    /// The device cannot send XDP frames of several buffers.
    NoFragmentsTransmit = "no_fragments_transmit";
    /// The other end of a veth pair has no native XDP program.
    PeerWithoutProgram = "peer_without_program";
    /// A virtual address is none of this host's.
    VipNotLocal = "vip_not_local";
    /// The host answers ARP for virtual addresses.
    ArpIgnore = "arp_ignore";
    /// ARP requests of the host may name a virtual address.
    ArpAnnounce = "arp_announce";
    /// The host drops packets whose source it would not reach by the same interface.
    ReversePathFilter = "reverse_path_filter";
    /// The interface does not forward packets of a family.
    ForwardingOff = "forwarding_off";
    /// There is no route to an address.
    NoRoute = "no_route";
    /// A backend is an address of this host.
    OwnBackend = "own_backend";
    /// A backend is behind a router, where it has to be on a link.
    BackendOffLink = "backend_off_link";
    /// A virtual address is on a link of this host, and nobody there answers for it.
    VipUnanswered = "vip_unanswered";
    /// Packets leave, or replies come, by an interface where the balancer is not attached.
    NotAttached = "not_attached";
}

/// One thing that is not as XDP needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Finding {
    /// How much it matters.
    pub severity: Severity,
    /// What it is about.
    pub kind: FindingKind,
    /// The interface, or `host`.
    pub object: String,
    /// What is wrong, and what it leads to.
    pub text: String,
    /// The command that mends it, where one does.
    pub remedy: Option<String>,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.severity.name(), self.object, self.text)?;
        self.remedy.as_ref().map_or(Ok(()), |remedy| write!(f, ": {remedy}"))
    }
}

/// What the host and this process lack: capabilities, the BPF JIT, the kernel's version; and whether a user namespace or a
/// seccomp filter forbids it BPF.
#[must_use]
pub fn host() -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut find = |severity, kind, text: String, remedy: Option<&str>| {
        let remedy = remedy.map(str::to_owned);
        findings.push(Finding { severity, kind, object: "host".into(), text, remedy });
    };
    let missing = privilege::missing_capabilities();
    if !missing.is_empty() {
        let text = format!("this process lacks {}: run as root or grant them", missing.join(", "));
        find(Severity::Blocker, FindingKind::MissingCapability, text, None);
    }
    // Where capabilities are missing, the kernel may refuse for want of them.
    for by in privilege::forbidden().into_iter().filter(|_| missing.is_empty()) {
        find(Severity::Blocker, FindingKind::Forbidden, by.to_owned(), None);
    }
    if sys::kernel_older_than(5, 18) {
        let text = format!("Linux {} is older than 5.18, which is needed", sys::kernel_release());
        find(Severity::Blocker, FindingKind::OldKernel, text, None);
    } else if sys::kernel_older_than(6, 1) {
        let text = format!("Linux {} is older than 6.1, the oldest that is tested", sys::kernel_release());
        find(Severity::Advice, FindingKind::OldKernel, text, None);
    }
    let jit = fs::read_to_string("/proc/sys/net/core/bpf_jit_enable").unwrap_or_default();
    if jit.trim() == "0" {
        find(
            Severity::Warning,
            FindingKind::JitOff,
            "the BPF JIT is off, programs are interpreted".into(),
            Some("sysctl -w net.core.bpf_jit_enable=1"),
        );
    }
    findings
}
