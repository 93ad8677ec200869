//! The balancers' mapped tables: every access is one aligned word, so that programs see the old or the new one.

use std::{
    marker::PhantomData,
    sync::atomic::{AtomicU32, Ordering},
};

use bytemuck::Pod;

use crate::{Result, abi::service::SLOT_LINE_WORDS, stage::StageCore, sys::mmap::Mapping};

/// An array of records.
#[derive(Debug)]
pub(crate) struct Table<T> {
    words: Mapping,
    record: PhantomData<fn() -> T>,
}

impl<T: Pod> Table<T> {
    const WORDS: usize = size_of::<T>() / 4;

    pub(crate) fn of(core: &StageCore, name: &str) -> Result<Self> {
        let words = Mapping::new(core.map(name))?;
        assert!(words.as_ref().len().is_multiple_of(Self::WORDS), "map {name}: value size");
        Ok(Self { words, record: PhantomData })
    }

    pub(crate) fn len(&self) -> u32 {
        (self.words.as_ref().len() / Self::WORDS) as u32
    }

    fn record(&self, index: u32) -> &[AtomicU32] {
        let start = index as usize * Self::WORDS;
        &self.words.as_ref()[start..start + Self::WORDS]
    }

    pub(crate) fn read(&self, index: u32) -> T {
        let mut value = T::zeroed();
        for (to, word) in bytemuck::bytes_of_mut(&mut value).chunks_exact_mut(4).zip(self.record(index)) {
            to.copy_from_slice(&word.load(Ordering::Acquire).to_ne_bytes());
        }
        value
    }

    /// Writes a record that no program reads, or whose words may change one by one.
    pub(crate) fn write(&self, index: u32, value: &T) {
        for (word, from) in self.record(index).iter().zip(bytemuck::bytes_of(value).chunks_exact(4)) {
            word.store(u32::from_ne_bytes([from[0], from[1], from[2], from[3]]), Ordering::Release);
        }
    }

    /// Sets the field of 32 bits at this offset of a record.
    pub(crate) fn set(&self, index: u32, offset: usize, word: u32) {
        self.record(index)[offset / 4].store(word, Ordering::Release);
    }
}

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
