//! The values of an array map as this process's memory.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _},
    ptr::{self, NonNull},
    sync::atomic::{AtomicU32, AtomicU64},
};

use libbpf_rs::MapCore as _;

use super::map::Map;
use crate::Result;

/// All values of an array that was created with `BPF_F_MMAPABLE`, one after the other, as words: reads and writes need
/// no system call, and programs see them at once. It outlives the map's descriptors.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<AtomicU32>,
    words: usize,
}

// SAFETY: a mapping belongs to the process and to no thread, and only atomics of it are given out.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// # Panics
    /// When the values are not of whole 8-byte words: the kernel would pad each of them.
    pub(crate) fn new(map: &Map) -> Result<Self> {
        let value = map.handle().value_size() as usize;
        assert_eq!(value % 8, 0, "map {}: value size", map.name());
        let words = value / size_of::<AtomicU32>() * map.capacity() as usize;
        // SAFETY: a new mapping, at an address of the kernel's choice, of an open descriptor. The kernel refuses maps that
        // cannot be mapped, and lengths beyond their last page.
        let start = unsafe {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            let fd = map.as_fd().as_raw_fd();
            libc::mmap(ptr::null_mut(), words * size_of::<AtomicU32>(), access, libc::MAP_SHARED, fd, 0)
        };
        if start == libc::MAP_FAILED {
            return Err(map.error("map it into memory", io::Error::last_os_error()));
        }
        let start = NonNull::new(start.cast()).expect("mmap does not answer NULL");
        Ok(Self { start, words })
    }
}

impl AsRef<[AtomicU32]> for Mapping {
    fn as_ref(&self) -> &[AtomicU32] {
        // SAFETY: from `start`, which is page-aligned, so many words are readable and writable until `drop`. Whoever else
        // has them mapped uses atomics too, and so do programs: their loads and stores of words are single ones.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }
}

/// The same, as words of 64 bits.
#[derive(Debug)]
pub(crate) struct LongMapping(Mapping);

impl LongMapping {
    /// # Panics
    /// As [`Mapping::new`].
    pub(crate) fn new(map: &Map) -> Result<Self> {
        Mapping::new(map).map(Self)
    }
}

impl AsRef<[AtomicU64]> for LongMapping {
    fn as_ref(&self) -> &[AtomicU64] {
        // SAFETY: as for the words of 32 bits: the mapping starts on a page and is of whole 8-byte words. Nobody gets both
        // views of one mapping.
        unsafe { std::slice::from_raw_parts(self.0.start.as_ptr().cast(), self.0.words / 2) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `new` made, and nobody borrows from it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.words * size_of::<AtomicU32>()) };
    }
}

#[cfg(test)]
mod tests {
    //! These need root.

    use std::sync::atomic::Ordering;

    use libbpf_rs::{MapHandle, MapType, libbpf_sys as raw};

    use super::*;
    use crate::sys::map::TypedMap;

    fn create(flags: u32) -> Map {
        let size = size_of::<raw::bpf_map_create_opts>() as raw::size_t;
        let options = raw::bpf_map_create_opts { sz: size, map_flags: flags, ..Default::default() };
        Map::new(MapHandle::create(MapType::Array, Some("test"), 4, 64, 100, &options).expect("needs root"), "test")
    }

    #[test]
    fn both_ways_lead_to_the_same_values() {
        const MMAPABLE: u32 = 1 << 10;
        let map = create(MMAPABLE);
        let mapping = Mapping::new(&map).unwrap();
        assert_eq!(mapping.as_ref().len(), 100 * 16);
        let table = TypedMap::<u32, [u32; 16]>::new(&map);
        table.set(&99, &[7; 16]).unwrap();
        assert!(mapping.as_ref()[99 * 16..].iter().all(|word| word.load(Ordering::Relaxed) == 7));
        mapping.as_ref()[98 * 16 + 1].store(8, Ordering::Relaxed);
        assert_eq!(table.get(&98).unwrap().unwrap()[..3], [0, 8, 0]);
        drop(map);
        assert_eq!(mapping.as_ref()[98 * 16 + 1].load(Ordering::Relaxed), 8);
    }

    #[test]
    fn a_map_that_cannot_be_mapped_is_an_error() {
        let error = Mapping::new(&create(0)).unwrap_err().to_string();
        assert!(error.contains("test"), "{error}");
    }
}
