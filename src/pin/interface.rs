//! The pins of one interface: its link, the instances of its chain, the program at its end.

use std::{
    fs::File,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use super::{INTERFACES, LAST, LINK, NEXT, PROGRAM, Undo, put_in_place};
use crate::{
    Error, Interface, Result,
    base::{
        Instance, OWN_MACS, Shared,
        directory::{check_directory, create_directory, failure, lock, names_in, put, remove_directory, remove_file},
        pin_stage,
    },
    sys::{link::Link, map, program::Program},
};

/// What packets meet on an interface, as its pinned slots tell.
#[derive(Debug, Default)]
pub(crate) struct PinnedChain {
    /// Names of the stages, in order.
    pub(crate) stages: Vec<String>,
    /// Id of the caller's own program at the end.
    pub(crate) last: Option<u32>,
}

/// The pins of one interface. Holds no lock: each edit takes one.
#[derive(Debug)]
pub(crate) struct InterfacePins {
    directory: PathBuf,
    home: PathBuf,
}

impl InterfacePins {
    pub(crate) fn new(directory: &Path, interface: &Interface) -> Result<Self> {
        create_directory(directory)?;
        let name = interface.index().to_string();
        check_directory(directory, &[INTERFACES, &name])?;
        Ok(Self::of(directory, &name))
    }

    /// By the name of their directory, an interface's index.
    pub(super) fn of(directory: &Path, name: &str) -> Self {
        Self { directory: directory.to_owned(), home: directory.join(INTERFACES).join(name) }
    }

    pub(crate) fn lock(&self) -> Result<File> {
        lock(&self.directory)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.home
    }

    /// Pins a stage's tables, unless they are.
    pub(crate) fn stage(&self, stage: &Shared, undo: &mut Undo) -> Result<()> {
        put_in_place(&self.directory, stage)?;
        if let Some(home) = pin_stage(&self.directory, stage)? {
            undo.add(home);
        }
        Ok(())
    }

    /// Pins a new instance; answers its directory.
    pub(crate) fn member(&self, stage: &str, instance: &Instance, undo: &mut Undo) -> Result<PathBuf> {
        let home = self.home.join(format!("{}-{stage}", instance.program.id()));
        // A program id is never used again while the program lives, so what is here is a remnant.
        remove_directory(&home)?;
        create_directory(&home)?;
        undo.add(home.clone());
        put(instance.program.as_fd(), &home.join(PROGRAM))?;
        put(instance.slot.as_fd(), &home.join(NEXT))?;
        if let Some(macs) = &instance.own_macs {
            put(macs.as_fd(), &home.join(OWN_MACS))?;
        }
        Ok(home)
    }

    /// Removes the pins of attachments whose interface is gone, this one's among them.
    pub(crate) fn remove_dead(&self) -> Result<()> {
        let interfaces = self.directory.join(INTERFACES);
        for name in names_in(&interfaces)? {
            let home = interfaces.join(name);
            if let Some(link) = Link::open_pinned(&home.join(LINK))?
                && link.info().map_err(failure(&home.join(LINK), "read it"))?.interface == 0
            {
                remove_directory(&home)?;
            }
        }
        Ok(())
    }

    pub(crate) fn link_path(&self) -> PathBuf {
        self.home.join(LINK)
    }

    pub(crate) fn link(&self) -> Result<Option<Link>> {
        Link::open_pinned(&self.home.join(LINK))
    }

    pub(crate) fn put_link(&self, link: &Link) -> Result<()> {
        put(link.as_fd(), &self.home.join(LINK))
    }

    pub(crate) fn remove_link(&self) -> Result<()> {
        remove_file(&self.home.join(LINK))
    }

    /// Pins the caller's own last program. Beside the one before, so that at no moment the one in force is without.
    pub(crate) fn put_last(&self, program: &Program, undo: &mut Undo) -> Result<()> {
        let path = self.last_path(program.id());
        if path.exists() {
            return Ok(());
        }
        create_directory(&self.home.join(LAST))?;
        put(program.as_fd(), &path)?;
        undo.add(path);
        Ok(())
    }

    pub(crate) fn last(&self, id: u32) -> Result<Program> {
        let path = self.last_path(id);
        Program::open_pinned(&path)?.ok_or(Error::PinMissing { path })
    }

    pub(crate) fn remove_last(&self, id: u32) -> Result<()> {
        remove_file(&self.last_path(id))
    }

    fn last_path(&self, id: u32) -> PathBuf {
        self.home.join(LAST).join(id.to_string())
    }

    /// Follows the slots from the program that the link runs; an empty chain when that is not one of ours.
    pub(crate) fn chain(&self, head: u32) -> Result<PinnedChain> {
        let mut chain = PinnedChain::default();
        let mut next = Some(head);
        while let Some(id) = next {
            let Some((name, home)) = self.find_member(id)? else {
                chain.last = Some(id).filter(|_| !chain.stages.is_empty());
                break;
            };
            chain.stages.push(name);
            let path = home.join(NEXT);
            let slot = map::open_pinned(&path, NEXT)?.ok_or(Error::PinMissing { path })?;
            next = slot.slot_program()?;
        }
        Ok(chain)
    }

    /// The program that the pinned instance of this id runs, to name it in an update.
    pub(crate) fn program(&self, id: u32) -> Result<Option<Program>> {
        match self.find_member(id)? {
            Some((_, home)) => Program::open_pinned(&home.join(PROGRAM)),
            None => Ok(None),
        }
    }

    pub(super) fn find_member(&self, id: u32) -> Result<Option<(String, PathBuf)>> {
        let prefix = format!("{id}-");
        let names = names_in(&self.home)?;
        Ok(names.iter().find_map(|name| Some((name.strip_prefix(&prefix)?.to_owned(), self.home.join(name)))))
    }

    /// Removes the pins of all instances and last programs that are not of this chain.
    pub(crate) fn sweep(&self, members: &[&Path], last: Option<u32>) -> Result<()> {
        for name in names_in(&self.home)?.iter().filter(|name| name.contains('-')) {
            let path = self.home.join(name);
            if !members.contains(&path.as_path()) {
                remove_directory(&path)?;
            }
        }
        for name in names_in(&self.home.join(LAST))? {
            if last.is_none_or(|id| name != id.to_string()) {
                remove_file(&self.home.join(LAST).join(name))?;
            }
        }
        Ok(())
    }

    /// Removes all pins of the interface; the stages' tables stay.
    pub(crate) fn remove(&self) -> Result<()> {
        remove_directory(&self.home)
    }
}
