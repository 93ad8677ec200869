//! Putting larger tables in the place of smaller ones, in every chain that is pinned.

use std::{
    io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use super::{INTERFACES, InterfacePins, NEXT, Undo};
use crate::{
    Error, Result,
    base::{
        Instance, OWN_MACS, OwnMacs, Shared, aside_path,
        directory::{lock, names_in, remove_directory},
        exchange_stage,
    },
    sys::{grace::GracePeriod, map},
};

/// Puts a stage's larger tables in the place of those that are pinned in this directory, which is locked: from its next packet
/// on, every chain there goes by them. Does nothing for a stage whose tables are in their place.
///
/// Killed in the middle, a process leaves chains that go by the earlier tables beside others; whoever is here next finishes.
pub(crate) fn put_in_place(directory: &Path, stage: &Shared) -> Result<()> {
    let aside = aside_path(directory, &stage.name);
    let mut grown = stage.grown();
    let ours = grown.as_ref().is_some_and(|grown| grown.directory == directory);
    if !ours && (grown.is_some() || !aside.exists()) {
        return Ok(());
    }
    // First what can fail.
    let mut chains = Vec::new();
    for name in names_in(&directory.join(INTERFACES))? {
        let pins = InterfacePins::of(directory, &name);
        if pins.has_stage(&stage.name)? {
            chains.push((pins, stage.instantiate()?));
        }
    }
    let grace = GracePeriod::new().map_err(no_grace)?;
    if ours {
        exchange_stage(directory, stage)?;
    }
    let mut replaced = Vec::new();
    for (pins, instance) in &chains {
        replaced.extend(pins.replace_instance(&stage.name, instance)?);
    }
    grace.wait().map_err(no_grace)?;
    for home in replaced {
        remove_directory(&home)?;
    }
    if ours && let Some(grown) = grown.take() {
        grown.settle(&stage.maps)?;
    }
    remove_directory(&aside)
}

/// Says that this process goes on with a stage's tables for good; larger ones come into their place, if they are not there.
pub(crate) fn make_ready(stage: &Shared) -> Result<()> {
    let grown = stage.grown().as_ref().map(|grown| grown.directory.clone());
    match grown {
        Some(directory) => {
            let _lock = lock(&directory)?;
            put_in_place(&directory, stage)
        }
        None => stage.owner.ready(),
    }
}

fn no_grace(cause: io::Error) -> Error {
    Error::Map { map: "grace_outer".into(), operation: "wait for a grace period", cause }
}

impl InterfacePins {
    fn has_stage(&self, stage: &str) -> Result<bool> {
        Ok(names_in(self.path())?.iter().any(|name| name.split_once('-').is_some_and(|(_, name)| name == stage)))
    }

    /// Puts another instance of a stage in the place of the one that is in this chain. Answers where that one is pinned:
    /// packets may still be inside of it.
    fn replace_instance(&self, stage: &str, instance: &Instance) -> Result<Option<PathBuf>> {
        let Some(link) = self.link()? else { return Ok(None) };
        let unreadable = |cause| Error::Pin { path: self.link_path(), operation: "read or change it", cause };
        let head = link.info().map_err(unreadable)?.program;
        let (mut before, mut next) = (None, Some(head));
        while let Some(id) = next {
            let Some((name, home)) = self.find_member(id)? else { return Ok(None) };
            let path = home.join(NEXT);
            let slot = map::open_pinned(&path, NEXT)?.ok_or(Error::PinMissing { path })?;
            let behind = slot.slot_program()?;
            if name != stage {
                (before, next) = (Some(slot), behind);
                continue;
            }
            if let Some(behind) = behind {
                let behind = self.program(behind)?.map_or_else(|| self.last(behind), Ok)?;
                let filled = instance.slot.slot_set(behind.as_fd());
                filled.map_err(|error| instance.slot.error("fill the slot", error))?;
            }
            // They are followed where this process attaches.
            if let (Some(macs), Some(old)) = (&instance.own_macs, map::open_pinned(&home.join(OWN_MACS), OWN_MACS)?) {
                macs.copy(&OwnMacs::of(old)?);
            }
            let mut undo = Undo::default();
            self.member(stage, instance, &mut undo)?;
            let done = match &before {
                Some(slot) => slot.slot_set(instance.program.as_fd()),
                None => match self.program(id)? {
                    Some(old) => link.replace(old.as_fd(), instance.program.as_fd()),
                    None => return Ok(None),
                },
            };
            return match done {
                Ok(()) => {
                    undo.keep();
                    Ok(Some(home))
                }
                // Its interface is gone, and packets with it.
                Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => Ok(None),
                Err(error) => Err(unreadable(error)),
            };
        }
        Ok(None)
    }
}
