//! Events: records that a program hands to user space, pulled by the reader.

use std::{
    collections::BTreeSet,
    fmt,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::{
    Error, Result,
    sys::{self, map::Map, ring::Ring},
};

/// `None` for a record that this build does not know.
pub(crate) type Decode<T> = Box<dyn Fn(&[u8]) -> Option<T> + Send + Sync>;

/// The reader of a stage's events. Pull-style: nothing is called back, nothing runs in the background.
///
/// A ring buffer has one reader in a process; it can be given to another after it was dropped. Two processes that
/// read the same pinned ring take events from each other. [`AsFd`] gives a descriptor that is readable while there
/// are events, for poll(2), epoll(7) or an async runtime.
pub struct Events<T> {
    ring: Ring,
    decode: Decode<T>,
    stage: String,
    _claim: Claim,
}

impl<T> Events<T> {
    pub(crate) fn open(stage: &str, map: &Map, decode: Decode<T>) -> Result<Self> {
        let claim = Claim::of(map.id()?).ok_or_else(|| Error::EventsTaken { stage: stage.to_owned() })?;
        Ok(Self { ring: Ring::open(map)?, decode, stage: stage.to_owned(), _claim: claim })
    }

    /// The oldest event, or `None` when there is none at the moment. Never waits.
    pub fn try_next(&mut self) -> Option<T> {
        // A record that this build does not know comes from a newer program: passed over.
        std::iter::from_fn(|| self.ring.next()).find_map(|record| (self.decode)(&record))
    }

    /// The oldest event; waits for one at most this long.
    ///
    /// # Errors
    /// [`Error::Map`] when the kernel refuses to wait.
    pub fn next_within(&mut self, timeout: Duration) -> Result<Option<T>> {
        // A time beyond what the clock can say means without end.
        let end = Instant::now().checked_add(timeout);
        loop {
            if let Some(event) = self.try_next() {
                return Ok(Some(event));
            }
            let left = end.map_or(Duration::MAX, |end| end.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return Ok(None);
            }
            let fd = self.as_fd().as_raw_fd();
            sys::net::wait_readable(fd, left).map_err(|cause| Error::Map {
                map: format!("{}.events", self.stage),
                operation: "wait for events",
                cause,
            })?;
        }
    }
}

impl<T> AsFd for Events<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

/// For runtimes that ask for a number, such as tokio's `AsyncFd`.
impl<T> AsRawFd for Events<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl<T> fmt::Debug for Events<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").field("stage", &self.stage).finish_non_exhaustive()
    }
}

/// The right to read a ring, by its map's id: a value and an adopted twin of it share the ring.
struct Claim(u32);

static CLAIMED: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

impl Claim {
    fn of(map: u32) -> Option<Self> {
        // Lazily: a claim that is made in vain would give the right back when dropped.
        CLAIMED.lock().unwrap_or_else(PoisonError::into_inner).insert(map).then(|| Self(map))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        CLAIMED.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.0);
    }
}
