//! Letting go of backends that are leaving: their numbers are used again when nothing leads to them any more.

use std::{io, mem::offset_of};

use super::{Book, SlotRule};
use crate::{
    Error, Result,
    abi::service::{Backend, BackendCpu, SLOT_BACKEND, SLOT_PREVIOUS_SHIFT},
    balancer::ServiceAddr,
    base::{Counted, StageCore},
    sys::grace::GracePeriod,
};

impl<R: SlotRule> Book<R> {
    /// Forgets backends that are leaving and that no slot names any more, in either half.
    pub(crate) fn release(&mut self, core: &StageCore) -> Result<()> {
        let mut gone = Vec::new();
        for entry in self.entries.values() {
            let leaving: Vec<u16> = entry.members.iter().filter(|m| !m.is_staying()).map(|m| m.id).collect();
            if leaving.is_empty() {
                continue;
            }
            let mut named = vec![false; usize::from(u16::MAX) + 1];
            for (_, word) in self.words(entry) {
                named[(word & SLOT_BACKEND) as usize] = true;
                named[(word >> SLOT_PREVIOUS_SHIFT) as usize] = true;
            }
            gone.extend(leaving.into_iter().filter(|id| {
                let record = self.backends.read((*id).into());
                !named[usize::from(*id)] && !self.rule.holds(*id, &record, &mut self.words(entry))
            }));
        }
        if gone.is_empty() {
            return Ok(());
        }
        for entry in self.entries.values_mut() {
            entry.members.retain(|member| !gone.contains(&member.id));
        }
        self.wait(core)?;
        self.forget(core, &gone)
    }

    /// Makes these numbers free. No program can meet them any more.
    pub(super) fn forget(&mut self, core: &StageCore, gone: &[u16]) -> Result<()> {
        let states = Counted::<BackendCpu>::of(core, "backend_states");
        for id in gone {
            self.backends.set((*id).into(), offset_of!(Backend, flags), 0);
            states.reset((*id).into())?;
            self.free.push(*id);
        }
        Ok(())
    }

    pub(super) fn take_id(&mut self) -> Option<u16> {
        self.free.pop().or_else(|| {
            let id = self.fresh;
            (u32::from(id) < self.backends.len()).then(|| {
                self.fresh += 1;
                id
            })
        })
    }

    /// Sees to it that so many backends can be added.
    pub(super) fn make_room(&mut self, core: &StageCore, service: &ServiceAddr, count: usize) -> Result<()> {
        let room = |book: &Self| book.free.len() + (book.backends.len() - u32::from(book.fresh)) as usize;
        if room(self) < count {
            self.release(core)?;
        }
        if room(self) < count {
            let entry = format!("{count} more of {service}");
            return Err(Error::Full { map: "backends".into(), capacity: self.backends.len() - 1, entry });
        }
        Ok(())
    }

    /// Waits until no packet is handled by what was in the tables before.
    pub(crate) fn wait(&mut self, core: &StageCore) -> Result<()> {
        let fail = |source: io::Error| core.map("backends").error("wait for a grace period", source);
        let grace = match self.grace.take() {
            Some(grace) => grace,
            None => GracePeriod::new().map_err(fail)?,
        };
        grace.wait().map_err(fail)?;
        self.grace = Some(grace);
        Ok(())
    }
}
