//! Attaching a chain, taking over one that is pinned, and detaching.

use std::{os::fd::AsFd as _, path::Path};

use super::{Attached, Pipeline, unreadable};
#[allow(unused_imports, reason = "for links in the documentation")]
use crate::Stage;
use crate::{
    AttachOptions, Error, Interface, Result, XdpMode,
    attach::Made,
    pin::{InterfacePins, Undo},
    sys::{self, link::Link, program::Program},
};

impl Pipeline {
    /// Attaches to an interface; at most once. With [`AttachOptions::pin`], a chain that an earlier process
    /// pinned for this interface is swapped for this one in one step; a last program pinned there goes on
    /// unless this pipeline has its own.
    ///
    /// # Errors
    /// As [`Stage::attach`], and [`Error::StagesLost`]. After an error the pipeline is as before, and so is what
    /// was pinned.
    pub fn attach(&mut self, options: &AttachOptions) -> Result<()> {
        if let Some(attached) = &self.attached {
            let what = format!("it is attached to `{}` already; one pipeline guards one interface", attached.interface);
            return Err(Error::Pipeline { what });
        }
        let interface = options.interface()?;
        let Some(directory) = options.pin_directory() else {
            let Made { link, mode, fallback } = options.link(&interface, self.members[0].fd())?;
            self.attached = Some(Attached { link, interface, mode, fallback, adopted: false, pins: None });
            return Ok(());
        };
        let pins = InterfacePins::new(directory, &interface)?;
        let _lock = pins.lock()?;
        pins.remove_dead()?;
        let done = match pins.link()? {
            Some(link) => self.take_over(options, link, interface, pins),
            None => self.attach_pinned(options, interface, pins),
        };
        if done.is_err() {
            self.members.iter_mut().for_each(|member| member.pin = None);
        }
        done
    }

    fn attach_pinned(&mut self, options: &AttachOptions, interface: Interface, pins: InterfacePins) -> Result<()> {
        // Remnants of an attachment that never came about.
        pins.remove()?;
        let mut undo = Undo::default();
        undo.add(pins.path().to_owned());
        self.pin_members(&pins, &mut undo)?;
        let Made { link, mode, fallback } = options.link(&interface, self.members[0].fd())?;
        pins.put_link(&link)?;
        undo.keep();
        self.attached = Some(Attached { link, interface, mode, fallback, adopted: false, pins: Some(pins) });
        Ok(())
    }

    /// Swaps the chain that is pinned for this one.
    fn take_over(
        &mut self,
        options: &AttachOptions,
        link: Link,
        interface: Interface,
        pins: InterfacePins,
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
            link.replace(old.as_fd(), self.members[0].fd()).map_err(|cause| unreadable(&interface, cause))
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
        self.attached = Some(Attached { link, interface, mode, fallback: None, adopted: true, pins: Some(pins) });
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

    /// Detaches, also when pinned: the link and its pins go, the pins of the stages' tables stay.
    ///
    /// # Errors
    /// [`Error::Interface`], [`Error::Pin`], or [`Error::Superseded`] when another process has taken over:
    /// then nothing was done.
    pub fn detach(mut self) -> Result<()> {
        let _lock = self.begin_edit()?;
        let Some(attached) = self.attached.take() else { return Ok(()) };
        let fail = |cause| Error::Interface {
            interface: attached.interface.name().to_owned(),
            operation: "detach from it",
            cause,
        };
        // The link's pin first: if we die here, the link dies with us, and no dead link stays pinned.
        if let Some(pins) = &attached.pins {
            pins.remove_link()?;
        }
        attached.link.detach().map_err(fail)?;
        // Packets that are inside the chain still get to its end.
        let waited = self.wait_for_readers();
        if let Some(pins) = &attached.pins {
            pins.remove()?;
        }
        waited
    }
}
