//! Attaching to interfaces: modes, options, and the attachment of a single stage.

use std::{
    fmt,
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
    str::FromStr,
};

use crate::{Error, Interface, Loss, Pipeline, Result, Watch, refusal, sys::link::Link};

/// Where in the receive path the program runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
pub enum XdpMode {
    /// In the driver, before the kernel allocates anything for the packet: the fast one, and the default.
    /// The driver must support XDP.
    #[default]
    Native,
    /// In the network stack, after the packet's buffer has been allocated: every Ethernet interface can do it, several
    /// times slower. Good for trying things out.
    Generic,
    /// On the network card itself. Always refused today: no card takes programs with the maps that ours have.
    Offload,
    /// Native, and generic where the driver does not support XDP or refuses it; [`Attachment::mode`] says which, and
    /// [`Attachment::fallback`] why.
    Auto,
}

impl XdpMode {
    const FLAG_GENERIC: u32 = 1 << 1;
    const FLAG_NATIVE: u32 = 1 << 2;
    const FLAG_OFFLOAD: u32 = 1 << 3;

    /// The modes to try, with the kernel's `XDP_FLAGS_*`.
    fn attempts(self) -> &'static [(Self, u32)] {
        match self {
            Self::Native => &[(Self::Native, Self::FLAG_NATIVE)],
            Self::Generic => &[(Self::Generic, Self::FLAG_GENERIC)],
            Self::Offload => &[(Self::Offload, Self::FLAG_OFFLOAD)],
            Self::Auto => &[(Self::Native, Self::FLAG_NATIVE), (Self::Generic, Self::FLAG_GENERIC)],
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Generic => "generic",
            Self::Offload => "offload",
            Self::Auto => "auto",
        }
    }
}

impl fmt::Display for XdpMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for XdpMode {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let modes = [Self::Native, Self::Generic, Self::Offload, Self::Auto];
        modes.into_iter().find(|mode| mode.name() == text).ok_or_else(|| Error::Invalid {
            what: "XDP mode",
            value: text.to_owned(),
            expected: "native, generic, offload or auto",
        })
    }
}

/// Where and how to attach.
#[derive(Clone, Debug)]
#[must_use]
pub struct AttachOptions {
    interface: String,
    mode: XdpMode,
    pin: Option<PathBuf>,
    replace_chain: bool,
    announce_ready: bool,
    own_macs: Vec<[u8; 6]>,
}

impl AttachOptions {
    /// The interface of this name in the calling thread's network namespace, in native mode.
    pub fn new(interface: impl Into<String>) -> Self {
        Self {
            interface: interface.into(),
            mode: XdpMode::Native,
            pin: None,
            replace_chain: false,
            announce_ready: true,
            own_macs: Vec::new(),
        }
    }

    /// Attaches in this mode. Ignored when an attachment is taken over: a link keeps its mode.
    pub fn mode(mut self, mode: XdpMode) -> Self {
        self.mode = mode;
        self
    }

    /// Makes the attachment survive this process: link, programs, slots and tables are pinned below this
    /// directory of a BPF file system. Several interfaces and stages may share it.
    ///
    /// Where the directory already holds the link of this interface, it is taken over: the programs that run
    /// are swapped for the new ones in one step, no packet passes in between, and the tables go on, provided
    /// the stages were adopted from the same directory. Else the call fails and touches nothing. So does one that
    /// would drop a stage from the chain that is pinned: see [`AttachOptions::replace_chain`].
    ///
    /// An interface stands there by its index, so network namespaces need a directory each.
    pub fn pin(mut self, directory: impl Into<PathBuf>) -> Self {
        self.pin = Some(directory.into());
        self
    }

    /// When a pinned chain is taken over, lets go of its stages that are not among the new ones.
    pub fn replace_chain(mut self, replace: bool) -> Self {
        self.replace_chain = replace;
        self
    }

    /// Whether attaching also says that this process goes on with adopted tables for good ([`Stage::ready`]); true by
    /// default. A process with several chains turns it off, attaches them all, and says so at the end: if it ends before, the
    /// earlier process has its tables and chains back.
    ///
    /// [`Stage::ready`]: crate::Stage::ready
    pub fn announce_ready(mut self, announce: bool) -> Self {
        self.announce_ready = announce;
        self
    }

    /// Frames to this MAC address are for this host, too. Those of the interface and of all devices that stand on it (bridge,
    /// bond, VLAN, macvlan) are found and followed; this is for addresses that the kernel does not know. Can be called
    /// repeatedly; at most 63 are known in all.
    pub fn own_mac(mut self, mac: [u8; 6]) -> Self {
        self.own_macs.push(mac);
        self
    }

    pub(crate) fn own_macs(&self) -> &[[u8; 6]] {
        &self.own_macs
    }

    pub(crate) fn announces_ready(&self) -> bool {
        self.announce_ready
    }

    pub(crate) fn may_drop_stages(&self) -> bool {
        self.replace_chain
    }

    /// The interface, if programs can understand its frames.
    pub(crate) fn interface(&self) -> Result<Interface> {
        let interface = Interface::by_name(&self.interface)?;
        interface.check_ethernet()?;
        Ok(interface)
    }

    pub(crate) fn pin_directory(&self) -> Option<&Path> {
        self.pin.as_deref()
    }

    /// Makes the link, in the first mode that the interface takes.
    pub(crate) fn link(&self, interface: &Interface, program: BorrowedFd<'_>) -> Result<Made> {
        let mut refusal = None;
        for &(mode, flags) in self.mode.attempts() {
            match Link::create(program, interface.index(), flags) {
                Ok(link) => return Ok(Made { link, mode, fallback: refusal }),
                Err(cause) => {
                    let error = refusal::explain(interface, program, mode, flags, cause);
                    if !matches!(error, Error::ModeRefused { .. }) {
                        return Err(error);
                    }
                    // Where both are refused, the first says why the interface is not guarded as it should be.
                    refusal.get_or_insert(error);
                }
            }
        }
        Err(refusal.expect("every mode has an attempt"))
    }
}

/// A link that was made.
#[derive(Debug)]
pub(crate) struct Made {
    pub(crate) link: Link,
    pub(crate) mode: XdpMode,
    /// Why it is not in native mode, if that was tried first.
    pub(crate) fallback: Option<Error>,
}

/// A single stage on an interface. Dropping it detaches, unless it is pinned.
#[derive(Debug)]
#[must_use = "dropping an attachment detaches it"]
pub struct Attachment {
    pipeline: Pipeline,
}

impl Attachment {
    pub(crate) fn new(pipeline: Pipeline) -> Self {
        Self { pipeline }
    }

    /// The interface that it was attached to, by the name that it had then. Whether it is there, [`Attachment::loss`] tells.
    #[must_use]
    pub fn interface(&self) -> &Interface {
        self.pipeline.interface().expect("an attachment is attached")
    }

    /// The mode in which the program runs: [`XdpMode::Native`], [`XdpMode::Generic`] or [`XdpMode::Offload`]. `None` when it
    /// runs no more: the interface is gone, or another program has taken its place.
    #[must_use]
    pub fn mode(&self) -> Option<XdpMode> {
        self.pipeline.mode()
    }

    /// With [`XdpMode::Auto`], why the interface is guarded in generic mode rather than in native mode
    /// ([`Error::ModeRefused`]); `None` in native mode, in a mode that was asked for, and after a take-over.
    #[must_use]
    pub fn fallback(&self) -> Option<&Error> {
        self.pipeline.fallback()
    }

    /// Frames that a program of this interface has sent back or redirected (counted as forwarded), and that were lost on the way
    /// out all the same: the other device could not transmit them, or was full. Since it was attached by this process; of
    /// `XDP_TX` only with drivers that tell (`xdp_bulk_tx`: veth). `None` where the kernel does not let this process look
    /// (raw tracepoints: `CAP_PERFMON`, and a kernel with BTF).
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn redirect_failed(&self) -> Result<Option<u64>> {
        self.pipeline.redirect_failed()
    }

    /// Whether the interface is still there and runs this attachment's program.
    ///
    /// # Errors
    /// [`Error::Interface`] when the kernel does not tell.
    pub fn is_attached(&self) -> Result<bool> {
        self.pipeline.is_attached()
    }

    /// What keeps packets of the interface from this stage at the moment; `None` when all is well.
    ///
    /// # Errors
    /// [`Error::Interface`] when the kernel does not tell.
    pub fn loss(&self) -> Result<Option<Loss>> {
        self.pipeline.loss()
    }

    /// Waits for a loss: see [`Watch`].
    ///
    /// # Errors
    /// [`Error::Interface`] when the kernel refuses to notify.
    pub fn watch(&self) -> Result<Watch> {
        self.pipeline.watch()
    }

    /// Attaches again after a loss, with the same options: see [`Pipeline::reattach`].
    ///
    /// # Errors
    /// As [`Stage::attach`](crate::Stage::attach); [`Error::Superseded`] when another process has taken over.
    pub fn reattach(&mut self) -> Result<()> {
        self.pipeline.reattach()
    }

    /// Whether an earlier process's attachment was taken over from its pins.
    #[must_use]
    pub fn adopted(&self) -> bool {
        self.pipeline.adopted()
    }

    /// Detaches, also when pinned: the link and its pins go, the pins of the stage's tables stay.
    ///
    /// # Errors
    /// [`Error::Interface`], [`Error::Pin`], or [`Error::Superseded`] when another process has taken over.
    pub fn detach(self) -> Result<()> {
        self.pipeline.detach()
    }

    /// The attachment as a chain of one stage, to which others can be added while packets flow.
    pub fn into_pipeline(self) -> Pipeline {
        self.pipeline
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_round_trip_and_a_wrong_one_is_named() {
        for name in ["native", "generic", "offload", "auto"] {
            assert_eq!(name.parse::<XdpMode>().unwrap().to_string(), name);
        }
        let error = "driver".parse::<XdpMode>().unwrap_err().to_string();
        assert_eq!(error, "XDP mode `driver`: expected native, generic, offload or auto");
    }
}
