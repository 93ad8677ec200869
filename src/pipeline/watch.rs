//! Waiting for the moment at which an interface runs a chain no more.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use super::attached::{Guarded, LOOK};
#[allow(unused_imports, reason = "for links in the documentation")]
use crate::Pipeline;
use crate::{
    Error, Result,
    base::Shared,
    sys::{
        notices::Notices,
        wake::{Sources, Tick},
    },
};

/// A way in which packets of an interface come to miss a chain that was attached to it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Loss {
    /// Nothing runs the chain: the interface is gone (deleted, its driver unloaded, its peer deleted), or somebody with
    /// `CAP_SYS_ADMIN` or the link's pin has detached the link.
    Detached {
        /// The interface.
        interface: String,
    },
    /// The interface has left: for another network namespace, or it was renamed and another has its name now. The chain has
    /// gone with it, goes on judging its packets and can be edited; what has or will have the name here is not guarded.
    Moved {
        /// The interface, by the name that it had here.
        interface: String,
    },
    /// Another process has taken over for good: the tables of a stage, or the interface, on which another program runs in the
    /// place of the chain's first. Edits return [`Error::Superseded`].
    Superseded {
        /// The stage or the interface.
        what: String,
    },
    /// The pins of the attachment were removed. Packets go on being judged, but only as long as this process lives:
    /// [`Pipeline::reattach`] pins it again.
    Unpinned {
        /// The interface.
        interface: String,
        /// Where the link was pinned.
        path: PathBuf,
    },
}

/// Waits for a [`Loss`]: [`Pipeline::watch`], [`Attachment::watch`](crate::Attachment::watch), [`Stage::watch`](crate::Stage::watch).
///
/// It is woken by what the kernel tells of interfaces (rtnetlink) in the network namespace in which the chain was attached,
/// whichever thread waits. Once a second it looks in any case: of a link that is detached by hand or a pin that is removed, the kernel
/// tells nobody. Each time, the state is read anew; nothing is remembered, and what is missed while nobody waits is found by
/// the next look. A network namespace has to allow netlink sockets.
///
/// [`AsFd`] gives a descriptor for poll(2), epoll(7) or an async runtime: when it is readable, call [`Watch::wait`] with a
/// timeout of zero. It is readable once a second at least, mostly for nothing.
///
/// A watch keeps nothing attached, and belongs to one attachment: after [`Pipeline::reattach`], watch anew.
///
/// ```no_run
/// use std::time::Duration;
/// use xdpkit::{AttachOptions, Firewall, FirewallConfig, Loss, Stage as _};
///
/// # fn main() -> xdpkit::Result<()> {
/// let firewall = Firewall::load(&FirewallConfig::default())?;
/// let mut attachment = firewall.attach(&AttachOptions::new("eth0"))?;
/// loop {
///     let mut watch = attachment.watch()?;
///     match watch.wait(Duration::MAX)? {
///         Some(Loss::Superseded { .. }) => return Ok(()), // an upgrade
///         Some(loss) => eprintln!("not guarded: {loss:?}"),
///         None => continue,
///     }
///     while !watch.wait_for_interface(Duration::MAX)? {}
///     attachment.reattach()?;
/// }
/// # }
/// ```
#[derive(Debug)]
pub struct Watch {
    watched: Watched,
    sources: Sources,
}

#[derive(Debug)]
enum Watched {
    Chain(Arc<Guarded>),
    Stage(Arc<Shared>),
}

impl Watched {
    fn loss(&self) -> Result<Option<Loss>> {
        match self {
            Self::Chain(guarded) => guarded.loss(),
            Self::Stage(stage) => Ok(stage.owner.is_superseded().then(|| superseded(stage))),
        }
    }

    fn name(&self) -> String {
        match self {
            Self::Chain(guarded) => guarded.interface().name().to_owned(),
            Self::Stage(stage) => stage.name.clone(),
        }
    }
}

pub(super) fn superseded(stage: &Shared) -> Loss {
    Loss::Superseded { what: format!("stage `{}`", stage.name) }
}

impl Watch {
    pub(super) fn of_chain(guarded: Arc<Guarded>, sources: Sources) -> Self {
        Self { watched: Watched::Chain(guarded), sources }
    }

    /// Of a stage's tables, whether it is attached or not.
    pub(crate) fn of_stage(stage: &Arc<Shared>) -> Result<Self> {
        let refused = |cause| failed(&stage.name, "listen for changes of its pins", cause);
        let notices = Notices::of(stage.owner.watched().into_iter()).map_err(refused)?;
        let tick = Tick::every(LOOK).map_err(refused)?;
        let sources = Sources::new(vec![Box::new(notices), Box::new(tick)]).map_err(refused)?;
        Ok(Self { watched: Watched::Stage(Arc::clone(stage)), sources })
    }

    /// Waits for a loss, at most this long. Says so at once, and each time, while there is one.
    ///
    /// # Errors
    /// [`Error::Interface`] when the kernel does not tell; [`Error::Pipeline`] when what is watched was dropped, detached or
    /// attached again by this process.
    pub fn wait(&mut self, timeout: Duration) -> Result<Option<Loss>> {
        self.wait_until(timeout, Watched::loss)
    }

    /// Waits until there is an interface of the name to which the chain was attached, at most this long; true when there is
    /// one. For a time to call [`Pipeline::reattach`].
    ///
    /// # Errors
    /// [`Error::Interface`] when the kernel does not tell; [`Error::Pipeline`] for a watch of a stage, which has no interface.
    pub fn wait_for_interface(&mut self, timeout: Duration) -> Result<bool> {
        let present = self.wait_until(timeout, |watched| match watched {
            Watched::Chain(guarded) => Ok(guarded.is_present()?.then_some(())),
            Watched::Stage(_) => {
                Err(Error::Pipeline { what: "a watch of a stage has no interface to wait for".into() })
            }
        })?;
        Ok(present.is_some())
    }

    fn wait_until<T>(&mut self, timeout: Duration, look: impl Fn(&Watched) -> Result<Option<T>>) -> Result<Option<T>> {
        // A time beyond what the clock can say means without end.
        let end = Instant::now().checked_add(timeout);
        let refused = |cause| failed(&self.watched.name(), "wait for changes of it", cause);
        loop {
            // Before the look: what changes after it wakes us.
            self.sources.drain().map_err(refused)?;
            if let Some(found) = look(&self.watched)? {
                return Ok(Some(found));
            }
            let left = end.map_or(Duration::MAX, |end| end.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return Ok(None);
            }
            self.sources.wait(left).map_err(refused)?;
        }
    }
}

fn failed(name: &str, operation: &'static str, cause: io::Error) -> Error {
    Error::Interface { interface: name.to_owned(), operation, cause }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.sources.as_fd()
    }
}

/// For runtimes that ask for a number, such as tokio's `AsyncFd`.
impl AsRawFd for Watch {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}
