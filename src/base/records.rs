//! Mapped records: an array map's values as this process's memory. Every access is one aligned word, so that programs and
//! other threads see the old or the new one.

use std::{
    marker::PhantomData,
    sync::atomic::{AtomicU32, Ordering},
};

use bytemuck::Pod;

use super::StageCore;
use crate::{Result, sys::mmap::Mapping};

/// An array of records, one after the other.
#[derive(Debug)]
pub(crate) struct Records<T> {
    words: Mapping,
    record: PhantomData<fn() -> T>,
}

impl<T: Pod> Records<T> {
    const WORDS: usize = size_of::<T>() / 4;

    /// # Panics
    /// When the map's values are not whole records: a mistake in this crate.
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
        self.write_words(index, value, |_| true);
    }

    /// Writes a record that no program reads; the field of 32 bits at this offset comes last: it says that the rest counts.
    pub(crate) fn write_with_last(&self, index: u32, value: &T, offset: usize) {
        self.write_words(index, value, |at| at != offset / 4);
        self.write_words(index, value, |at| at == offset / 4);
    }

    fn write_words(&self, index: u32, value: &T, which: impl Fn(usize) -> bool) {
        let words = self.record(index).iter().zip(bytemuck::bytes_of(value).chunks_exact(4)).enumerate();
        for (_, (word, from)) in words.filter(|(at, _)| which(*at)) {
            word.store(u32::from_ne_bytes([from[0], from[1], from[2], from[3]]), Ordering::Release);
        }
    }

    /// The field of 32 bits at this offset of a record; 0 of one that is not there: the index may come from shared memory.
    pub(crate) fn get(&self, index: u32, offset: usize) -> u32 {
        if index < self.len() { self.record(index)[offset / 4].load(Ordering::Acquire) } else { 0 }
    }

    /// Sets that field. What was written before is there for whoever finds it by this word.
    pub(crate) fn set(&self, index: u32, offset: usize, word: u32) {
        self.record(index)[offset / 4].store(word, Ordering::SeqCst);
    }
}
