//! What the kernel's own tables cost here, in the run that judges something else: `lab/bpf/yardstick.bpf.c`.
//!
//! Limits in nanoseconds hold on the machine that they were found on. Those that are made of cache misses are elsewhere
//! a ratio to what a miss cost there: see [`Yardstick::scale`].

use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::{fmt, io};

use libbpf_rs::skel::{OpenSkel, SkelBuilder};

use super::kernel::io_error;
use super::{Harness, Random, random_v4};
use crate::error::{Context, Result};
use crate::frame::Frame;

#[allow(clippy::all, clippy::undocumented_unsafe_blocks, unreachable_pub, missing_docs, unused, reason = "generated")]
mod skel {
    include!(concat!(env!("OUT_DIR"), "/yardstick.skel.rs"));
}

/// What a random word of an array of 2^24 cost where the limits were found.
const ARRAY_THERE: f64 = 44.0;

/// The kernel's tables measured, in nanoseconds above an empty program.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Yardstick {
    /// Keys in the LRU_HASH, and random words in the array.
    pub keys: usize,
    /// A look-up in the LRU_HASH that hits.
    pub look_up: f64,
    /// An insertion into the LRU_HASH in place of another key.
    pub insert: f64,
    /// A word of an array of 2^24, for each key its own.
    pub array: f64,
    /// The same word changed atomically, which is what a table that CPUs share costs at least.
    pub atomic: f64,
}

impl Yardstick {
    /// Measures, for so many keys: a power of two.
    pub fn measure(keys: usize, rounds: u32) -> Result<Self> {
        let flows = random_v4(keys);
        // Entered in another order: an LRU_HASH takes its elements one behind the other, and would find them so.
        let mut others = flows.clone();
        Random::new(9).shuffle(&mut others);
        let frame = Frame::udp(flows[0], SocketAddr::from(([198, 51, 100, 1], 53))).payload(&[0; 18]).build();
        let [before, harness] = [Harness::new(&frame, &others)?, Harness::new(&frame, &flows)?];
        let [look_up, insert, array, atomic] = Self::load(keys as u32).context(|| "load the yardstick".into())?;
        before.verdict(look_up.as_fd(), keys as u32)?;
        harness.verdict(look_up.as_fd(), keys as u32)?;
        let known: [BorrowedFd<'_>; 3] = [look_up.as_fd(), array.as_fd(), atomic.as_fd()];
        let costs = harness.costs_above_empty(&known, rounds)?;
        // So many that each one more evicts another.
        harness.verdict(insert.as_fd(), 4 * keys as u32)?;
        let fresh = harness.cost_above_empty(insert.as_fd(), rounds)?;
        let [look_up, array, atomic] = [0, 1, 2].map(|row| costs[row].median);
        Ok(Self { keys, look_up, insert: fresh.median, array, atomic })
    }

    fn load(keys: u32) -> io::Result<[OwnedFd; 4]> {
        let mut storage = MaybeUninit::uninit();
        let mut open = skel::YardstickSkelBuilder::default().open(&mut storage).map_err(io_error)?;
        // An LRU_HASH of just as many entries evicts before it is full.
        open.maps.hash.set_max_entries(2 * keys).map_err(io_error)?;
        let loaded = open.load().map_err(io_error)?;
        let own = |fd: BorrowedFd<'_>| fd.try_clone_to_owned();
        let programs = &loaded.progs;
        Ok([
            own(programs.look_up.as_fd())?,
            own(programs.insert.as_fd())?,
            own(programs.array.as_fd())?,
            own(programs.atomic.as_fd())?,
        ])
    }

    /// A limit of the machine that it was found on, in nanoseconds, as it reads on this one: never less than it is, and
    /// just that while as many keys fit the caches.
    #[must_use]
    pub fn scale(&self, limit: f64) -> f64 {
        limit * (self.array / ARRAY_THERE).max(1.0)
    }
}

impl fmt::Display for Yardstick {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { keys, look_up, insert, array, atomic } = self;
        write!(
            f,
            "{keys} keys: LRU_HASH look-up {look_up:.1} ns, insertion {insert:.1} ns, array {array:.1} ns, atomically {atomic:.1} ns"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_grows_with_the_machines_figure_and_never_shrinks() {
        let here = Yardstick { keys: 1 << 20, look_up: 236.0, insert: 748.0, array: 88.0, atomic: 150.0 };
        assert_eq!(here.scale(130.0), 260.0);
        assert_eq!(Yardstick { array: 1.0, ..here }.scale(25.0), 25.0);
    }

    #[test]
    fn the_kernels_tables_are_measured() {
        let Yardstick { keys, look_up, insert, array, atomic } = Yardstick::measure(1 << 10, 5).unwrap();
        assert_eq!(keys, 1 << 10);
        assert!([look_up, insert, array, atomic].iter().all(|figure| figure.is_finite()));
    }
}
