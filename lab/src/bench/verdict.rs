//! What any filter pays for verdicts that the processor cannot foresee: `lab/bpf/verdict.bpf.c`.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;

use libbpf_rs::skel::{OpenSkel, SkelBuilder};

use super::Random;
use super::kernel::io_error;
use crate::error::{Context, Result};
use crate::sys::memory::MapMemory;

#[allow(clippy::all, clippy::undocumented_unsafe_blocks, unreachable_pub, missing_docs, unused, reason = "generated")]
mod skel {
    include!(concat!(env!("OUT_DIR"), "/verdict.skel.rs"));
}

/// Bytes and words of a line of the table.
const LINE: usize = 64;
const WORDS: usize = LINE / 4;

/// Filters of one to three loads a packet, each led to by the one before, from a table of cache lines.
#[derive(Debug)]
pub struct VerdictProbe {
    never_branches: OwnedFd,
    ends_as_a_stage: OwnedFd,
    table: MapMemory,
}

impl VerdictProbe {
    /// Puts the programs into the kernel, with a table of so many lines, a power of two, and so many loads a packet.
    pub fn load(lines: u32, loads: u32) -> Result<Self> {
        Self::load_all(lines, loads).context(|| "load the programs that judge by one bit".into())
    }

    fn load_all(lines: u32, loads: u32) -> io::Result<Self> {
        if !lines.is_power_of_two() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the number of lines is not a power of two"));
        }
        let mut storage = MaybeUninit::uninit();
        let mut open = skel::VerdictSkelBuilder::default().open(&mut storage).map_err(io_error)?;
        let constants = open.maps.rodata_data.as_deref_mut().expect("the object has constants");
        constants.line_mask = lines - 1;
        constants.loads = loads;
        open.maps.lines.set_max_entries(lines).map_err(io_error)?;
        let loaded = open.load().map_err(io_error)?;
        Ok(Self {
            never_branches: loaded.progs.never_branches.as_fd().try_clone_to_owned()?,
            ends_as_a_stage: loaded.progs.ends_as_a_stage.as_fd().try_clone_to_owned()?,
            table: MapMemory::new(loaded.maps.lines.as_fd(), lines as usize * LINE)?,
        })
    }

    /// From now on, drops all packets; or those of random sources, half of them.
    pub fn set_verdicts(&self, mixed: bool) {
        let mut random = Random::new(9);
        for line in self.table.as_ref().chunks(WORDS) {
            line[0].store(random.bits() as u32 | u32::from(!mixed), Ordering::Relaxed);
        }
    }

    /// Answers the verdict without a branch on it.
    pub fn never_branches(&self) -> BorrowedFd<'_> {
        self.never_branches.as_fd()
    }

    /// Goes on to the next stage, or drops.
    pub fn ends_as_a_stage(&self) -> BorrowedFd<'_> {
        self.ends_as_a_stage.as_fd()
    }
}
