//! The attachment of a chain: the link, what is to run on it, and how both are found out about. Watches see it, too.

use std::{
    fs, io,
    os::fd::BorrowedFd,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::{Loss, Member, Watch, unreadable, watch::superseded};
use crate::{
    AttachOptions, Error, Interface, Result, XdpMode,
    attach::Made,
    base::Shared,
    host::Host,
    pin::InterfacePins,
    sys::{
        link::{Link, LinkInfo},
        links::Links,
        notices::Notices,
        program::Program,
        redirects::Lost,
        wake::{Sources, Tick},
    },
};

/// How often a watch looks in any case: the kernel tells nobody when a link is detached by hand, its program exchanged or a pin
/// removed.
pub(super) const LOOK: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Attached {
    guarded: Arc<Guarded>,
    pub(super) mode: XdpMode,
    pub(super) fallback: Option<Error>,
    pub(super) adopted: bool,
    pub(super) pins: Option<InterfacePins>,
    host: Arc<Host>,
    pub(super) options: AttachOptions,
    lost: Option<Lost>,
}

/// What watches see of an attachment. They do not keep it alive: it ends with its pipeline.
#[derive(Debug)]
pub(super) struct Guarded {
    interface: Interface,
    /// Of the network namespace in which it was attached.
    links: Arc<Links>,
    link_pin: Option<PathBuf>,
    /// `None` when the pipeline has let go of it.
    now: Mutex<Option<Now>>,
}

#[derive(Debug)]
struct Now {
    link: Link,
    /// The id of the first program of the chain.
    program: u32,
    /// The stages of the chain, whose tables may become another process's.
    stages: Vec<Arc<Shared>>,
}

impl Now {
    /// Another process has adopted tables of the chain and ended before it was ready: what it put in force is taken back.
    fn can_be_taken_back(&self) -> bool {
        self.stages.iter().any(|stage| stage.owner.was_adopted())
    }
}

impl Attached {
    /// `links` were opened in the interface's network namespace.
    pub(super) fn new(
        made: Made,
        members: &[Member],
        interface: Interface,
        links: Links,
        pins: Option<InterfacePins>,
        host: Arc<Host>,
        options: &AttachOptions,
    ) -> Self {
        let link_pin = pins.as_ref().map(InterfacePins::link_path);
        let program = members[0].instance.program.id();
        let now = Mutex::new(Some(Now { link: made.link, program, stages: stages_of(members) }));
        let lost = Lost::of(interface.index());
        let guarded = Arc::new(Guarded { interface, links: Arc::new(links), link_pin, now });
        let options = options.clone();
        Self { guarded, mode: made.mode, fallback: made.fallback, adopted: false, pins, host, options, lost }
    }

    pub(super) fn interface(&self) -> &Interface {
        &self.guarded.interface
    }

    pub(super) fn redirect_failed(&self) -> Result<Option<u64>> {
        self.lost.as_ref().map(Lost::count).transpose()
    }

    /// Has instances that packets are about to meet go by the MAC addresses of this host.
    pub(super) fn follow_host(&self, members: &[Member]) -> Result<()> {
        follow_host(&self.host, self.interface(), &self.options, members)
    }

    pub(super) fn loss(&self) -> Result<Option<Loss>> {
        self.guarded.loss()
    }

    /// Tells watches of the stages after an edit.
    pub(super) fn set_stages(&self, members: &[Member]) {
        if let Some(now) = self.guarded.now().as_mut() {
            now.stages = stages_of(members);
        }
    }

    /// The program that the link runs, unless it is the chain's first.
    pub(super) fn other_program(&self) -> Result<Option<u32>> {
        let now = self.guarded.now();
        let Some(now) = now.as_ref() else { return Ok(None) };
        let info = now.link.info().map_err(|cause| unreadable(self.interface(), cause))?;
        Ok((info.program != now.program).then_some(info.program))
    }

    /// Whether edits still reach packets.
    pub(super) fn check(&self) -> Result<()> {
        let now = self.guarded.now();
        let now = now.as_ref().expect("it is taken when this is dropped");
        match self.guarded.look(now)?.1 {
            None => Ok(()),
            Some(Loss::Superseded { what }) => Err(Error::Superseded { what }),
            Some(_) => Err(self.guarded.detached()),
        }
    }

    /// Swaps the first program in one step.
    pub(super) fn set_program(&self, old: BorrowedFd<'_>, new: &Program) -> Result<()> {
        let mut now = self.guarded.now();
        let now = now.as_mut().expect("it is taken when this is dropped");
        now.link.replace(old, std::os::fd::AsFd::as_fd(new)).map_err(|cause| match cause.raw_os_error() {
            Some(libc::ENOLINK) => self.guarded.detached(),
            _ => Error::Interface {
                interface: self.interface().name().to_owned(),
                operation: "swap its first program",
                cause,
            },
        })?;
        now.program = new.id();
        Ok(())
    }

    /// Ends the attachment although pins or other descriptors remain.
    pub(super) fn detach(&self) -> io::Result<()> {
        self.guarded.now().as_ref().map_or(Ok(()), |now| now.link.detach())
    }

    /// Pins the link, which is not pinned.
    pub(super) fn pin_link(&self) -> Result<()> {
        let now = self.guarded.now();
        match (&self.pins, now.as_ref()) {
            (Some(pins), Some(now)) => pins.put_link(&now.link),
            _ => Ok(()),
        }
    }

    pub(super) fn watch(&self) -> Result<Watch> {
        let refused = |cause| Error::Interface {
            interface: self.interface().name().to_owned(),
            operation: "listen for changes of it",
            cause,
        };
        let links = Arc::clone(&self.guarded.links);
        links.listen().map_err(refused)?;
        let tick = Tick::every(LOOK).map_err(refused)?;
        let homes =
            Notices::of(self.guarded.now().iter().flat_map(|now| &now.stages).flat_map(|stage| stage.owner.watched()));
        let homes = homes.map_err(refused)?;
        let sources = Sources::new(vec![Box::new(links), Box::new(tick), Box::new(homes)]).map_err(refused)?;
        Ok(Watch::of_chain(Arc::clone(&self.guarded), sources))
    }
}

pub(super) fn follow_host(
    host: &Host,
    interface: &Interface,
    options: &AttachOptions,
    members: &[Member],
) -> Result<()> {
    let refused =
        |operation| move |cause| Error::Interface { interface: interface.name().to_owned(), operation, cause };
    let macs: Vec<_> = members.iter().filter_map(|member| member.instance.own_macs.clone()).collect();
    host.follow(interface.index(), options.own_macs(), &macs)
        .map_err(refused("read the MAC addresses of this host there"))?;
    for next_hops in members.iter().filter_map(|member| member.shared.next_hops.as_ref()) {
        host.serve(next_hops).map_err(refused("resolve next hops from there"))?;
    }
    Ok(())
}

fn stages_of(members: &[Member]) -> Vec<Arc<Shared>> {
    members.iter().map(|member| Arc::clone(&member.shared)).collect()
}

impl Drop for Attached {
    fn drop(&mut self) {
        // Watches may live on.
        self.guarded.now().take();
    }
}

impl Guarded {
    fn now(&self) -> MutexGuard<'_, Option<Now>> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn interface(&self) -> &Interface {
        &self.interface
    }

    pub(super) fn detached(&self) -> Error {
        Error::Detached { interface: self.interface.name().to_owned() }
    }

    /// Whether there is an interface of this name, whatever runs on it.
    pub(super) fn is_present(&self) -> Result<bool> {
        let found = self.links.by_name(self.interface.name()).map_err(|cause| self.unknown(cause))?;
        Ok(found.is_some())
    }

    pub(super) fn loss(&self) -> Result<Option<Loss>> {
        // Held meanwhile: the first program must not change between one look and the next.
        let now = self.now();
        let Some(now) = now.as_ref() else {
            let what = "what was watched has been dropped, detached or attached again: watch it anew".into();
            return Err(Error::Pipeline { what });
        };
        let (mut info, mut loss) = self.look(now)?;
        while loss.is_none() && !self.is_in_place(&info)? {
            // What was no more in its place may have gone or changed since that look: an adopter that is about to be ready puts
            // its program into the link.
            let before = (info.interface, info.program);
            (info, loss) = self.look(now)?;
            if (info.interface, info.program) == before {
                loss = loss.or_else(|| Some(Loss::Moved { interface: self.interface.name().to_owned() }));
            }
        }
        if loss.is_some() {
            return Ok(loss);
        }
        Ok(self.link_pin.as_ref().filter(|pin| is_gone(pin)).map(|pin| {
            let interface = self.interface.name().to_owned();
            Loss::Unpinned { interface, path: pin.clone() }
        }))
    }

    /// What the link itself says.
    fn look(&self, now: &Now) -> Result<(LinkInfo, Option<Loss>)> {
        let info = now.link.info().map_err(|cause| unreadable(&self.interface, cause))?;
        let interface = || self.interface.name().to_owned();
        if let Some(stage) = now.stages.iter().find(|stage| stage.owner.is_superseded()) {
            return Ok((info, Some(superseded(stage))));
        }
        let loss = if info.interface == 0 {
            Some(Loss::Detached { interface: interface() })
        } else if info.program != now.program && !now.can_be_taken_back() {
            Some(Loss::Superseded { what: format!("interface `{}`", self.interface) })
        } else {
            None
        };
        Ok((info, loss))
    }

    /// Whether the link's interface is here, under its name or one that nobody else's name hides.
    fn is_in_place(&self, info: &LinkInfo) -> Result<bool> {
        let here = match self.links.by_name(self.interface.name()).map_err(|cause| self.unknown(cause))? {
            None => self.links.by_index(info.interface).map_err(|cause| self.unknown(cause))?,
            named => named,
        };
        Ok(here.is_some_and(|state| state.index == info.interface && state.programs.contains(&info.program)))
    }

    fn unknown(&self, cause: io::Error) -> Error {
        Error::Interface { interface: self.interface.name().to_owned(), operation: "look for it", cause }
    }
}

/// What cannot be looked at counts as there.
fn is_gone(pin: &std::path::Path) -> bool {
    fs::symlink_metadata(pin).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}
