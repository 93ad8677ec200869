//! Attaching a chain, taking over one that is pinned, and detaching.

use std::{os::fd::AsFd as _, path::Path, sync::Arc};

use super::{Attached, Loss, Member, Pipeline, attached::follow_host, unreadable};
#[allow(unused_imports, reason = "for links in the documentation")]
use crate::Stage;
use crate::{
    AttachOptions, Error, Interface, Result, XdpMode,
    attach::Made,
    host::Host,
    pin::{self, InterfacePins, Undo},
    sys::{self, link::Link, links::Links, program::Program},
};

impl Pipeline {
    /// Attaches to an interface; a second time only once the first interface is lost ([`Loss::Detached`],
    /// [`Loss::Moved`]). With [`AttachOptions::pin`], a chain that an earlier process
    /// pinned for this interface is swapped for this one in one step; a last program pinned there goes on
    /// unless this pipeline has its own.
    ///
    /// # Errors
    /// As [`Stage::attach`], [`Error::StagesLost`], and [`Error::Superseded`] for a stage whose tables another process has
    /// adopted. After an error the pipeline is as before, and so is what
    /// was pinned.
    pub fn attach(&mut self, options: &AttachOptions) -> Result<()> {
        let loss = self.loss()?;
        match (&self.attached, &loss) {
            (None, _) | (_, Some(Loss::Detached { .. } | Loss::Moved { .. })) => {}
            (Some(attached), Some(Loss::Superseded { .. })) => attached.check()?,
            (Some(attached), _) => {
                let interface = attached.interface();
                let what = format!("it is attached to `{interface}` already; one pipeline guards one interface");
                return Err(Error::Pipeline { what });
            }
        }
        self.refuse_superseded()?;
        let interface = options.interface()?;
        self.attach_to(options, interface)?;
        if options.announces_ready() {
            for member in &self.members {
                match pin::make_ready(&member.shared) {
                    // Whoever has adopted the tables since then attaches next.
                    Ok(()) | Err(Error::Superseded { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    fn attach_to(&mut self, options: &AttachOptions, interface: Interface) -> Result<()> {
        let links = Links::open().map_err(|cause| unreadable(&interface, cause))?;
        let host = Host::here().map_err(|cause| unreadable(&interface, cause))?;
        follow_host(&host, &interface, options, &self.members)?;
        let done = self.attach_followed(options, interface, links, &host);
        if let (Ok(()), Some(attached)) = (&done, &self.attached) {
            let generic = attached.mode == XdpMode::Generic;
            let tables = self.members.iter().filter_map(|member| member.shared.next_hops.as_ref());
            tables.for_each(|next_hops| next_hops.set_generic(generic));
        }
        if done.is_err() && self.attached.is_none() {
            // Test runs go by what they went by before.
            self.members
                .iter()
                .filter_map(|member| member.instance.own_macs.as_ref())
                .for_each(|macs| host.forget(macs));
        }
        done
    }

    fn attach_followed(
        &mut self,
        options: &AttachOptions,
        interface: Interface,
        links: Links,
        host: &Arc<Host>,
    ) -> Result<()> {
        let loss = self.loss()?;
        let Some(directory) = options.pin_directory() else {
            let made = options.link(&interface, self.members[0].fd())?;
            let attached = Attached::new(made, &self.members, interface, links, None, Arc::clone(host), options);
            return self.put_attached(attached);
        };
        let pins = InterfacePins::new(directory, &interface)?;
        let _lock = pins.lock()?;
        pins.remove_dead()?;
        // Before it is looked at what runs: larger tables come with other instances.
        self.members.iter().try_for_each(|member| pin::put_in_place(directory, &member.shared))?;
        // An interface that has left with this chain may have had the index of the one that is here now.
        if matches!(loss, Some(Loss::Moved { .. })) && self.pins().is_some_and(|left| left.path() == pins.path()) {
            pins.remove_link()?;
        }
        let before: Vec<_> = self.members.iter().map(|member| member.pin.clone()).collect();
        let done = match pins.link()? {
            // What was lost is never won back from a process that has it now.
            Some(_) if self.attached.is_some() => Err(Error::Superseded { what: format!("interface `{interface}`") }),
            Some(link) => self.take_over(options, link, interface, links, pins, host),
            None => self.attach_pinned(options, interface, links, pins, host),
        };
        if done.is_err() {
            self.members.iter_mut().zip(before).for_each(|(member, pin)| member.pin = pin);
        }
        done
    }

    /// Attaches again after a loss, with the options of the first time: looks the interface up by its name in the network
    /// namespace of the calling thread, as [`Pipeline::attach`] does. Tables, counters and members are what they were.
    /// Does nothing when nothing was lost, and pins again what lacks its pins only.
    ///
    /// What was pinned for the interface that is lost is removed. From one that has left with the chain ([`Loss::Moved`]), the
    /// chain is taken off.
    ///
    /// # Errors
    /// As [`Pipeline::attach`]: [`Error::UnknownInterface`] as long as there is none of that name. [`Error::Superseded`] when
    /// another process has taken over, [`Error::Pipeline`] for a pipeline that was never attached.
    pub fn reattach(&mut self) -> Result<()> {
        let Some(attached) = &self.attached else {
            return Err(Error::Pipeline { what: "it was not attached before".into() });
        };
        let options = attached.options.clone();
        match attached.loss()? {
            None => Ok(()),
            Some(Loss::Unpinned { .. }) => self.pin_again(),
            Some(_) => self.attach(&options),
        }
    }

    /// Lets go of an attachment that was lost, and has another.
    fn put_attached(&mut self, attached: Attached) -> Result<()> {
        let Some(old) = self.attached.replace(attached) else { return Ok(()) };
        match (&old.pins, self.pins()) {
            (Some(old), now) if now.is_none_or(|now| now.path() != old.path()) => old.remove(),
            _ => Ok(()),
        }
    }

    fn attach_pinned(
        &mut self,
        options: &AttachOptions,
        interface: Interface,
        links: Links,
        pins: InterfacePins,
        host: &Arc<Host>,
    ) -> Result<()> {
        // Remnants of an attachment that never came about.
        pins.remove()?;
        let mut undo = Undo::default();
        undo.add(pins.path().to_owned());
        self.pin_members(&pins, &mut undo)?;
        let made = options.link(&interface, self.members[0].fd())?;
        pins.put_link(&made.link)?;
        undo.keep();
        let host = Arc::clone(host);
        self.put_attached(Attached::new(made, &self.members, interface, links, Some(pins), host, options))
    }

    /// Pins again what goes on without pins.
    fn pin_again(&mut self) -> Result<()> {
        let Some(options) = self.attached.as_ref().map(|attached| attached.options.clone()) else { return Ok(()) };
        let (Some(directory), Some(interface)) = (options.pin_directory(), self.interface().cloned()) else {
            return Ok(());
        };
        let pins = InterfacePins::new(directory, &interface)?;
        let _lock = self.begin_edit()?;
        if pins.link()?.is_some() {
            return Ok(());
        }
        pins.remove()?;
        let mut undo = Undo::default();
        undo.add(pins.path().to_owned());
        self.pin_members(&pins, &mut undo)?;
        self.attached.as_ref().map_or(Ok(()), Attached::pin_link)?;
        undo.keep();
        Ok(())
    }

    /// Swaps the chain that is pinned for this one.
    fn take_over(
        &mut self,
        options: &AttachOptions,
        link: Link,
        interface: Interface,
        links: Links,
        pins: InterfacePins,
        host: &Arc<Host>,
    ) -> Result<()> {
        let mismatch = |what: &str, found: String, expected: String| Error::PinMismatch {
            path: pins.path().join("link"),
            what: what.into(),
            found,
            expected,
        };
        let now = link.info().map_err(|cause| unreadable(&interface, cause))?;
        let state = sys::net::xdp_state(interface.index()).map_err(|cause| unreadable(&interface, cause))?;
        if now.interface != interface.index() || !state.programs.contains(&now.program) {
            let found = format!("interface {} of another network namespace", now.interface);
            return Err(mismatch(
                "what the link is attached to",
                found,
                format!("`{interface}` ({})", interface.index()),
            ));
        }
        let chain = pins.chain(now.program)?;
        let Some(old) = pins.program(now.program)? else {
            return Err(mismatch("the program that runs", now.program.to_string(), "one that is pinned beside".into()));
        };
        let names = self.stages();
        let lost: Vec<String> = chain.stages.into_iter().filter(|name| !names.contains(&name.as_str())).collect();
        if !lost.is_empty() && !options.may_drop_stages() {
            return Err(Error::StagesLost { path: pins.path().to_owned(), stages: lost });
        }
        let kept = match chain.last {
            Some(id) if self.last.is_none() => Some(pins.last(id)?),
            _ => None,
        };
        let end = self.members.len() - 1;
        if kept.is_some() {
            self.members[end].point_to(kept.as_ref())?;
        }
        let mut undo = Undo::default();
        let swapped = self.pin_members(&pins, &mut undo).and_then(|()| {
            link.replace(old.as_fd(), self.members[0].fd()).map_err(|cause| match cause.raw_os_error() {
                Some(libc::ENOLINK) => Error::Detached { interface: interface.name().to_owned() },
                _ => unreadable(&interface, cause),
            })
        });
        if let Err(error) = swapped {
            if kept.is_some() {
                self.members[end].point_to(None)?;
            }
            return Err(error);
        }
        undo.keep();
        self.last = kept.or(self.last.take());
        let mode = match state.programs {
            [generic, _, _] if generic == now.program => XdpMode::Generic,
            [_, _, offload] if offload == now.program => XdpMode::Offload,
            _ => XdpMode::Native,
        };
        // Packets may still be under way in the old chain, whose slots live by their pins. Where we cannot wait for
        // them, or not sweep, the next take-over will.
        if self.wait_for_readers().is_ok() {
            let _ = pins.sweep(&self.pinned_paths(), self.last.as_ref().map(Program::id));
        }
        let made = Made { link, mode, fallback: None };
        let host = Arc::clone(host);
        let mut attached = Attached::new(made, &self.members, interface, links, Some(pins), host, options);
        attached.adopted = true;
        self.attached = Some(attached);
        Ok(())
    }

    /// Puts the chain in force again after a process that took it over has ended before it was ready.
    pub(super) fn take_back(&mut self) -> Result<()> {
        let Some(attached) = self.attached.take() else { return Ok(()) };
        let taken = self.take_back_link(&attached);
        self.attached = Some(attached);
        taken
    }

    fn take_back_link(&mut self, attached: &Attached) -> Result<()> {
        let (Some(pins), Some(other)) = (&attached.pins, attached.other_program()?) else { return Ok(()) };
        let superseded = || Error::Superseded { what: format!("interface `{}`", attached.interface()) };
        let old = pins.program(other)?.ok_or_else(superseded)?;
        let mut undo = Undo::default();
        self.pin_members(pins, &mut undo)?;
        attached.set_program(old.as_fd(), &self.members[0].instance.program)?;
        undo.keep();
        if self.wait_for_readers().is_ok() {
            pins.sweep(&self.pinned_paths(), self.last.as_ref().map(Program::id))?;
        }
        Ok(())
    }

    fn pin_members(&mut self, pins: &InterfacePins, undo: &mut Undo) -> Result<()> {
        for member in &mut self.members {
            pins.stage(&member.shared, undo)?;
            member.pin = Some(pins.member(&member.shared.name, &member.instance, undo)?);
        }
        self.last.as_ref().map_or(Ok(()), |last| pins.put_last(last, undo))
    }

    fn pinned_paths(&self) -> Vec<&Path> {
        self.members.iter().filter_map(|member| member.pin.as_deref()).collect()
    }

    /// Detaches, also when pinned: the link and its pins go, the pins of the stages' tables stay. When the interface is gone
    /// already, its pins go.
    ///
    /// # Errors
    /// [`Error::Interface`], [`Error::Pin`], or [`Error::Superseded`] when another process has taken over:
    /// then nothing was done.
    pub fn detach(mut self) -> Result<()> {
        let _lock = match self.begin_edit() {
            Err(Error::Detached { .. }) => {
                self.pins().filter(|pins| pins.path().exists()).map(InterfacePins::lock).transpose()?
            }
            other => other?,
        };
        let Some(attached) = self.attached.take() else { return Ok(()) };
        let fail = |cause| Error::Interface {
            interface: attached.interface().name().to_owned(),
            operation: "detach from it",
            cause,
        };
        // The link's pin first: if we die here, the link dies with us, and no dead link stays pinned.
        if let Some(pins) = &attached.pins {
            pins.remove_link()?;
        }
        attached.detach().map_err(fail)?;
        // Packets that are inside the chain still get to its end.
        let waited = self.wait_for_readers();
        if let Some(pins) = &attached.pins {
            pins.remove()?;
        }
        waited?;
        std::mem::take(&mut self.members).into_iter().for_each(Member::recycle);
        Ok(())
    }
}
