//! What a rate limiter is judged by: `lab/bpf/token_bucket.bpf.c`.
//!
//! How much a limiter has to admit depends on when it was asked: while nobody has a packet to offer, because all senders
//! wait for a CPU, a bucket that is full loses what it would have gained. So what has to come out is not computed from a
//! wall clock, but by a second bucket that is offered the same packets at the same moments.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{MapCore, MapFlags, MapHandle};

use super::kernel::io_error;
use crate::error::{Context, Result};

#[allow(clippy::all, clippy::undocumented_unsafe_blocks, unreachable_pub, missing_docs, unused, reason = "generated")]
mod skel {
    include!(concat!(env!("OUT_DIR"), "/token_bucket.skel.rs"));
}

/// A token bucket for packets in front of a program under test.
#[derive(Debug)]
pub struct TokenBucket {
    program: OwnedFd,
    bucket: MapHandle,
    _under_test: MapHandle,
}

/// What a [`TokenBucket`] has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenCount {
    /// Packets.
    pub offered: u64,
    /// Those that may be admitted.
    pub admitted: u64,
    /// From the first packet to the last.
    pub time: Duration,
    /// For so long in all, the bucket was full and nobody had a packet.
    pub lost: Duration,
    /// So often was it full.
    pub overflows: u64,
}

impl TokenBucket {
    /// A full bucket of `burst` packets that gains one each `interval`, in front of a program of section `xdp.frags`.
    pub fn before(program: BorrowedFd<'_>, interval: Duration, burst: u64) -> Result<Self> {
        Self::load(program, interval.as_nanos() as u64, burst).context(|| "load the token bucket".into())
    }

    fn load(program: BorrowedFd<'_>, cost: u64, burst: u64) -> io::Result<Self> {
        let mut storage = MaybeUninit::uninit();
        let mut open = skel::TokenBucketSkelBuilder::default().open(&mut storage).map_err(io_error)?;
        let constants = open.maps.rodata_data.as_deref_mut().expect("the object has constants");
        constants.cost = cost;
        constants.depth = cost * burst;
        let loaded = open.load().map_err(io_error)?;
        let under_test = MapHandle::try_from(&loaded.maps.under_test).map_err(io_error)?;
        let fd = program.as_raw_fd().to_ne_bytes();
        under_test.update(&0_u32.to_ne_bytes(), &fd, MapFlags::ANY).map_err(io_error)?;
        Ok(Self {
            program: loaded.progs.token_bucket.as_fd().try_clone_to_owned()?,
            bucket: MapHandle::try_from(&loaded.maps.bucket).map_err(io_error)?,
            _under_test: under_test,
        })
    }

    /// The program that counts and then goes on to the one under test.
    pub fn program(&self) -> BorrowedFd<'_> {
        self.program.as_fd()
    }

    /// What it has seen so far.
    pub fn count(&self) -> Result<TokenCount> {
        let read = || -> io::Result<TokenCount> {
            let value = self.bucket.lookup(&0_u32.to_ne_bytes(), MapFlags::ANY).map_err(io_error)?;
            let value = value.ok_or_else(|| io::Error::other("the map is empty"))?;
            let words: Vec<u64> =
                value.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().expect("eight bytes"))).collect();
            let &[_, first, last, _, offered, admitted, lost, overflows] = words.as_slice() else {
                return Err(io::Error::other("its value has another size"));
            };
            let (time, lost) = (Duration::from_nanos(last - first), Duration::from_nanos(lost));
            Ok(TokenCount { offered, admitted, time, lost, overflows })
        };
        read().context(|| "read the token bucket".into())
    }
}

#[cfg(test)]
mod tests {
    use std::thread::sleep;

    use super::*;
    use crate::bench::{Harness, random_v4};
    use crate::frame::Frame;

    #[test]
    fn it_admits_what_was_asked_for_in_time() {
        let flows = random_v4(1);
        let frame = Frame::udp(flows[0], "10.0.0.1:53".parse().unwrap()).build();
        let harness = Harness::new(&frame, &flows).unwrap();
        let bucket = TokenBucket::before(harness.empty(), Duration::from_millis(100), 5).unwrap();
        let send = |packets| harness.verdict(bucket.program(), packets).unwrap();
        send(1000);
        let first = bucket.count().unwrap();
        assert!(first.offered == 1000 && (5..100).contains(&first.admitted), "{first:?}");
        // Longer than it takes to be full again.
        sleep(Duration::from_millis(900));
        send(1000);
        let then = bucket.count().unwrap();
        assert!(then.offered == 2000 && then.admitted >= first.admitted + 5 && then.overflows >= 1, "{then:?}");
        // All that has come together was admitted, is there, or is lost.
        let came = then.time + Duration::from_millis(500);
        let left = came.checked_sub(then.lost + Duration::from_millis(100 * then.admitted)).unwrap();
        assert!(left <= Duration::from_millis(500) && then.lost >= Duration::from_millis(300), "{then:?}");
    }
}
