//! The slots of the balancers' tables, mapped.

use std::sync::atomic::AtomicU32;

use crate::{Result, abi::service::SLOT_LINE_WORDS, base::StageCore, sys::mmap::Mapping};

/// All slots of all services. A slot is known by its number among all.
#[derive(Debug)]
pub(crate) struct Slots(Mapping);

impl Slots {
    pub(crate) fn of(core: &StageCore) -> Result<Self> {
        Mapping::new(core.map("slots")).map(Self)
    }

    /// `count` slots that start at a line.
    pub(crate) fn range(&self, first_line: u32, count: u32) -> &[AtomicU32] {
        let start = first_line as usize * SLOT_LINE_WORDS;
        &self.0.as_ref()[start..start + count as usize]
    }
}

/// Lines of a table of so many slots.
pub(crate) fn lines_of(slots: u32) -> u32 {
    slots.div_ceil(SLOT_LINE_WORDS as u32)
}
