//! Events: records that a program hands to user space, pulled by the reader.

use std::{
    fmt,
    marker::PhantomData,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    Error, Result,
    sys::{self, map::Map, ring::Ring},
};

/// The reader of a stage's events. Pull-style: nothing is called back, nothing runs in the background.
///
/// A ring buffer has one reader; it can be given to another after it was dropped. [`AsFd`] gives a descriptor
/// that is readable when there are events, for poll(2), epoll(7) or an async runtime.
pub struct Events<T> {
    ring: Ring,
    decode: fn(&[u8]) -> Option<T>,
    stage: String,
    _claim: Claim,
    item: PhantomData<fn() -> T>,
}

impl<T> Events<T> {
    pub(crate) fn open(
        stage: &str,
        map: &Map,
        taken: &Arc<AtomicBool>,
        decode: fn(&[u8]) -> Option<T>,
    ) -> Result<Self> {
        if taken.swap(true, Ordering::AcqRel) {
            return Err(Error::EventsTaken { stage: stage.to_owned() });
        }
        let claim = Claim(Arc::clone(taken));
        Ok(Self { ring: Ring::open(map)?, decode, stage: stage.to_owned(), _claim: claim, item: PhantomData })
    }

    /// The oldest event, or `None` when there is none at the moment. Never waits.
    ///
    /// # Errors
    /// [`Error::Map`] when the kernel refuses.
    pub fn try_next(&mut self) -> Result<Option<T>> {
        loop {
            let record = self.ring.next().map_err(|source| self.error("read events", source))?;
            match record {
                None => return Ok(None),
                // A record that this build does not know comes from a newer program: passed over.
                Some(record) => {
                    if let Some(event) = (self.decode)(&record) {
                        return Ok(Some(event));
                    }
                }
            }
        }
    }

    /// The oldest event; waits for one at most this long.
    ///
    /// # Errors
    /// [`Error::Map`] when the kernel refuses.
    pub fn next_within(&mut self, timeout: Duration) -> Result<Option<T>> {
        let end = Instant::now() + timeout;
        loop {
            if let Some(event) = self.try_next()? {
                return Ok(Some(event));
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let fd = self.as_fd().as_raw_fd();
            sys::net::wait_readable(fd, left).map_err(|source| self.error("wait for events", source))?;
        }
    }

    fn error(&self, operation: &'static str, source: std::io::Error) -> Error {
        Error::Map { map: format!("{}.events", self.stage), operation, source }
    }
}

impl<T> AsFd for Events<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

impl<T> fmt::Debug for Events<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").field("stage", &self.stage).finish_non_exhaustive()
    }
}

/// Gives the ring buffer back.
struct Claim(Arc<AtomicBool>);

impl Drop for Claim {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}
