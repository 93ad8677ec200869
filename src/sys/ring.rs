//! A ring buffer that is pulled from, one record at a time.
//!
//! Our own reader of the kernel's protocol (Documentation/bpf/ringbuf.rst) rather than libbpf's: that one trusts the
//! record headers, which is unsound as soon as a second process reads the same pinned ring, and it calls back until
//! the ring is empty, so that a descriptor no longer tells whether events are left.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    ptr::{self, NonNull},
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use libbpf_rs::MapCore as _;

use super::map::Map;
use crate::Result;

const HEADER: u64 = 8;
const BUSY: u32 = 1 << 31;
const DISCARDED: u32 = 1 << 30;

/// One mapping of a part of the ring's memory.
struct Mapping {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: the memory is shared with the kernel anyway; everything in it is read and written atomically or copied
// out, and the mapping itself does not belong to a thread.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(map: &OwnedFd, length: usize, protection: i32, offset: usize) -> io::Result<Self> {
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice; it aliases nothing of ours.
        let start =
            unsafe { libc::mmap(ptr::null_mut(), length, protection, libc::MAP_SHARED, map.as_raw_fd(), offset) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start: NonNull::new(start.cast()).expect("a mapping is not at zero"), length })
    }

    /// The position that the first page starts with.
    fn position(&self) -> &AtomicU64 {
        // SAFETY: the mapping is at least a page, page-aligned, and lives as long as `self`.
        unsafe { self.start.cast::<AtomicU64>().as_ref() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is exactly what `new` mapped, and nobody can use it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

/// The reader of a ring buffer map.
///
/// A second reader, in whatever process, makes both lose and repeat records, but never leads outside of the ring.
pub(crate) struct Ring {
    map: OwnedFd,
    consumer: Mapping,
    /// The producer's position, and behind that page the data, twice in a row so that no record is ever torn.
    producer: Mapping,
    page: usize,
    size: u64,
}

impl Ring {
    pub(crate) fn open(map: &Map) -> Result<Self> {
        let open = || {
            // SAFETY: asks for a number, takes no pointers.
            let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).map_err(io::Error::other)?;
            let size = map.handle().max_entries() as usize;
            let fd = map.as_fd().try_clone_to_owned()?;
            let consumer = Mapping::new(&fd, page, libc::PROT_READ | libc::PROT_WRITE, 0)?;
            let producer = Mapping::new(&fd, page + 2 * size, libc::PROT_READ, page)?;
            Ok(Self { map: fd, consumer, producer, page, size: size as u64 })
        };
        open().map_err(|error| map.error("open the ring buffer", error))
    }

    /// The oldest record, if there is one.
    pub(crate) fn next(&mut self) -> Option<Vec<u8>> {
        loop {
            let consumed = self.consumer.position().load(Ordering::Relaxed);
            let produced = self.producer.position().load(Ordering::Acquire);
            if consumed >= produced {
                return None;
            }
            // Records start at multiples of 8; a foreign writer of the position must not break that.
            let offset = (consumed & (self.size - 1) & !7) as usize;
            // SAFETY: `offset` is below the ring's size and a multiple of 8, and the data behind the producer's page is
            // mapped twice, so header and length lie inside the mapping.
            let length = unsafe { self.producer.start.add(self.page + offset).cast::<AtomicU32>().as_ref() };
            let header = length.load(Ordering::Acquire);
            if header & BUSY != 0 {
                return None;
            }
            let length = u64::from(header & !(BUSY | DISCARDED));
            let record = (header & DISCARDED == 0 && length <= self.size - HEADER).then(|| {
                let mut record = vec![0_u8; length as usize];
                // SAFETY: the record ends at most one ring's size behind its start, inside the second mapping of the
                // data; the vector has that length, and the two do not overlap.
                unsafe {
                    let from = self.producer.start.add(self.page + offset + HEADER as usize);
                    ptr::copy_nonoverlapping(from.as_ptr(), record.as_mut_ptr(), record.len());
                }
                record
            });
            // A length that cannot be means that another reader let the kernel overwrite what we look at: catch up.
            let next =
                if length <= self.size - HEADER { consumed + (length + HEADER).next_multiple_of(8) } else { produced };
            self.consumer.position().store(next, Ordering::Release);
            if record.is_some() {
                return record;
            }
        }
    }
}

/// Readable while there are records.
impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.map.as_fd()
    }
}
