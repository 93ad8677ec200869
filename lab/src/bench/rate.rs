//! What the rate limiter is compared with: `lab/bpf/rate.bpf.c`.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{MapCore, MapFlags};

use super::kernel::io_error;
use crate::error::{Context, Result};

#[allow(clippy::all, clippy::undocumented_unsafe_blocks, unreachable_pub, missing_docs, unused, reason = "generated")]
mod skel {
    include!(concat!(env!("OUT_DIR"), "/rate.skel.rs"));
}

/// A limiter that keeps its buckets in an LRU_HASH.
#[derive(Debug)]
pub struct LruLimiter(OwnedFd);

impl LruLimiter {
    /// Loads it, for so many sources, each of which may send a packet in so many units of 1,024 ns, and so many at once.
    pub fn load(sources: u32, cost: u64, burst: u64) -> Result<Self> {
        Self::load_all(sources, cost, burst).context(|| "load the LRU_HASH limiter".into())
    }

    fn load_all(sources: u32, cost: u64, burst: u64) -> io::Result<Self> {
        let mut storage = MaybeUninit::uninit();
        let mut open = skel::RateSkelBuilder::default().open(&mut storage).map_err(io_error)?;
        open.maps.buckets.set_max_entries(sources).map_err(io_error)?;
        let loaded = open.load().map_err(io_error)?;
        // `struct rate_limit`: the cost with twelve more bits, the depth, a second more than that, two shifts.
        let words: [u64; 8] = [cost << 12, cost * burst, cost * burst + (1 << 20), 1, 10 << 32, 0, 0, 0];
        let value = words.map(u64::to_ne_bytes).concat();
        loaded.maps.limit.update(&0_u32.to_ne_bytes(), &value, MapFlags::ANY).map_err(io_error)?;
        Ok(Self(loaded.progs.lru_limiter.as_fd().try_clone_to_owned()?))
    }

    /// Its program.
    pub fn program(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
