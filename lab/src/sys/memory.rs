//! Memory that this process shares with a BPF map.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, AtomicU64};

/// The values of an array map created with `BPF_F_MMAPABLE`, as words that programs and this process read and write.
#[derive(Debug)]
pub struct MapMemory {
    start: NonNull<AtomicU32>,
    words: usize,
}

// SAFETY: the mapping belongs to no thread, and atomics are all that is given out.
unsafe impl Send for MapMemory {}
// SAFETY: as above.
unsafe impl Sync for MapMemory {}

impl MapMemory {
    /// Maps the first `bytes` of the map's values, which it must have.
    pub(crate) fn new(map: BorrowedFd<'_>, bytes: usize) -> io::Result<Self> {
        // SAFETY: a new mapping, at an address of the kernel's choice, of a file that is open. The kernel refuses what
        // is longer than the map.
        let start = unsafe {
            let both = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(ptr::null_mut(), bytes, both, libc::MAP_SHARED, map.as_raw_fd(), 0)
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).expect("mmap does not answer NULL");
        Ok(Self { start, words: bytes / size_of::<AtomicU32>() })
    }
}

impl AsRef<[AtomicU32]> for MapMemory {
    fn as_ref(&self) -> &[AtomicU32] {
        // SAFETY: the mapping is page-aligned, readable, writable and at least this long until it is dropped.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }
}

/// The same, as words of 64 bits.
#[derive(Debug)]
pub struct LongMemory(pub(crate) MapMemory);

impl AsRef<[AtomicU64]> for LongMemory {
    fn as_ref(&self) -> &[AtomicU64] {
        // SAFETY: as for the words of 32 bits; the mapping starts on a page, and half as many fit into it.
        unsafe { std::slice::from_raw_parts(self.0.start.as_ptr().cast(), self.0.words / 2) }
    }
}

impl Drop for MapMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nobody borrows it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.words * size_of::<AtomicU32>()) };
    }
}
