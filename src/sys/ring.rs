//! A ring buffer that is pulled from.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::{Arc, Mutex, PoisonError},
};

use libbpf_rs::{RingBuffer, RingBufferBuilder};

use super::{check, io_error, map::Map};
use crate::Result;

/// Records taken from the kernel at once: bounds what a flood can make us hold.
const AT_ONCE: usize = 64;

type Queue = Arc<Mutex<VecDeque<Vec<u8>>>>;

/// The reader of a ring buffer map. There must be only one at a time.
pub(crate) struct Ring {
    ring: RingBuffer<'static>,
    queue: Queue,
}

impl Ring {
    pub(crate) fn open(map: &Map) -> Result<Self> {
        let queue = Queue::default();
        let sink = Arc::clone(&queue);
        let mut builder = RingBufferBuilder::new();
        let fail = |error: libbpf_rs::Error| map.error("open the ring buffer", io_error(&error));
        builder
            .add(map.handle(), move |record: &[u8]| {
                sink.lock().unwrap_or_else(PoisonError::into_inner).push_back(record.to_owned());
                0
            })
            .map_err(fail)?;
        let ring = builder.build().map_err(fail)?;
        Ok(Self { ring, queue })
    }

    /// The oldest record, if there is one.
    pub(crate) fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.is_empty() {
            drop(queue);
            check(self.ring.consume_raw_n(AT_ONCE))?;
            queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        }
        Ok(queue.pop_front())
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor belongs to the ring buffer, which `self` owns and never closes early.
        unsafe { BorrowedFd::borrow_raw(self.ring.epoll_fd()) }
    }
}
