//! Editing a chain while packets flow. All of it answers [`Error::Detached`] when nothing runs the chain any more, and
//! [`Error::Superseded`] when another process has taken it over.

use std::{os::fd::BorrowedFd, sync::Arc};

use super::{Attached, Member, Pipeline, Position, check_chain, fresh_chain};
use crate::{Error, Result, Stage, base::Shared, pin::Undo, sys::program::Program};

impl Pipeline {
    /// Adds a stage while packets flow.
    ///
    /// # Errors
    /// [`Error::UnknownStage`], [`Error::Pipeline`] when the name is taken or the chain too long, and
    /// whatever loading and pinning answers. The chain is then as before.
    pub fn insert(&mut self, position: Position<'_>, stage: &dyn Stage) -> Result<()> {
        let at = match position {
            Position::First => 0,
            Position::Last => self.members.len(),
            Position::Before(name) => self.index(name)?,
            Position::After(name) => self.index(name)? + 1,
        };
        let mut names = self.stages();
        names.insert(at, stage.name());
        check_chain(&names, self.last.is_some())?;
        let _lock = self.begin_edit()?;
        let mut undo = Undo::default();
        let member = self.prepare(stage.core(), at, &mut undo)?;
        self.redirect_to(at, member)?;
        undo.keep();
        Ok(())
    }

    /// Takes a stage out while packets flow, and returns when no CPU runs it any more.
    ///
    /// # Errors
    /// [`Error::UnknownStage`]; [`Error::Pipeline`] for the only stage.
    pub fn remove(&mut self, name: &str) -> Result<()> {
        let at = self.index(name)?;
        if self.members.len() == 1 {
            return Err(Error::Pipeline { what: format!("`{name}` is its only stage: detach it instead") });
        }
        let _lock = self.begin_edit()?;
        if at == 0 {
            self.set_head(&self.members[1])?;
        } else {
            self.members[at - 1].point_to(self.program_at(at + 1))?;
        }
        let removed = self.members.remove(at);
        self.retire(vec![removed])
    }

    /// Puts another stage in the place of one while packets flow: each packet meets one or the other.
    ///
    /// # Errors
    /// As [`Pipeline::insert`].
    pub fn replace(&mut self, name: &str, stage: &dyn Stage) -> Result<()> {
        let at = self.index(name)?;
        let mut names = self.stages();
        names[at] = stage.name();
        check_chain(&names, self.last.is_some())?;
        let _lock = self.begin_edit()?;
        let mut undo = Undo::default();
        let member = self.prepare(stage.core(), at + 1, &mut undo)?;
        self.redirect_to(at, member)?;
        undo.keep();
        let replaced = self.members.remove(at + 1);
        self.retire(vec![replaced])
    }

    /// Brings the stages into another order while packets flow: each packet meets all of them in the old
    /// order or in the new one.
    ///
    /// # Errors
    /// [`Error::Pipeline`] unless `names` holds exactly the names of [`Pipeline::stages`].
    pub fn reorder(&mut self, names: &[&str]) -> Result<()> {
        let (mut wanted, mut have) = (names.to_vec(), self.stages());
        wanted.sort_unstable();
        have.sort_unstable();
        if wanted != have {
            let what =
                format!("the order `{}` must name each of its stages once: {}", names.join(", "), have.join(", "));
            return Err(Error::Pipeline { what });
        }
        let mut shared = Vec::new();
        for name in names {
            shared.push(Arc::clone(&self.members[self.index(name)?].shared));
        }
        self.swap_chain(&shared)
    }

    /// Puts these stages in the place of all while packets flow: each packet meets the old chain or the new one. A
    /// last program of the caller's own stays. When nothing would change, nothing is done.
    ///
    /// # Errors
    /// As [`Pipeline::new`] and [`Pipeline::insert`]. The chain is then as before.
    pub fn set_stages(&mut self, stages: &[&dyn Stage]) -> Result<()> {
        let shared: Vec<_> = stages.iter().map(|stage| Arc::clone(&stage.core().shared)).collect();
        let names: Vec<&str> = shared.iter().map(|stage| stage.name.as_str()).collect();
        check_chain(&names, self.last.is_some())?;
        let same = |(new, old): (&Arc<Shared>, &Member)| Arc::ptr_eq(new, &old.shared);
        if shared.len() == self.members.len() && shared.iter().zip(&self.members).all(same) {
            return self.attached.as_ref().map_or(Ok(()), Attached::check);
        }
        self.swap_chain(&shared)
    }

    /// Builds a chain aside and swaps the head.
    fn swap_chain(&mut self, shared: &[Arc<Shared>]) -> Result<()> {
        let _lock = self.begin_edit()?;
        let mut fresh = fresh_chain(shared, self.last.as_ref())?;
        let mut undo = Undo::default();
        self.follow_host(&fresh)?;
        for member in &mut fresh {
            self.pin_member(member, &mut undo)?;
        }
        self.set_head(&fresh[0])?;
        undo.keep();
        let old = std::mem::replace(&mut self.members, fresh);
        self.retire(old)
    }

    /// Ends the chain in an XDP program of the caller's own, or with `None` in the network stack. The
    /// program must be of section `xdp.frags`, as our stages are. While packets flow, too.
    ///
    /// The kernel follows at most 33 tail calls a packet, and lets one go on past the next: a program that makes
    /// tail calls itself must leave the chain enough of them.
    ///
    /// # Errors
    /// [`Error::IncompatibleProgram`] says what differs; the chain is then as before. After any other error the
    /// chain may end in either program.
    pub fn set_last(&mut self, program: Option<BorrowedFd<'_>>) -> Result<()> {
        let unreadable =
            |cause| Error::Program { program: "last".into(), operation: "duplicate its descriptor", cause };
        let program = match program {
            Some(fd) => Some(Program::from_fd(fd.try_clone_to_owned().map_err(unreadable)?)?),
            None => None,
        };
        if let Some(own) =
            program.as_ref().filter(|own| self.members.iter().any(|m| m.instance.program.id() == own.id()))
        {
            let (program, id) = (own.name().to_owned(), own.id());
            return Err(Error::IncompatibleProgram {
                program,
                id,
                why: "it is a stage of this chain: packets would go in circles",
            });
        }
        check_chain(&self.stages(), program.is_some())?;
        let _lock = self.begin_edit()?;
        let mut undo = Undo::default();
        if let (Some(pins), Some(last)) = (self.pins(), &program) {
            pins.put_last(last, &mut undo)?;
        }
        self.members[self.members.len() - 1].point_to(program.as_ref())?;
        undo.keep();
        let Some(old) = std::mem::replace(&mut self.last, program) else { return Ok(()) };
        if let Some(pins) = self.pins().filter(|_| self.last.as_ref().is_none_or(|last| last.id() != old.id())) {
            pins.remove_last(old.id())?;
        }
        self.wait_for_readers()
    }
}
