//! The checksum arithmetic in the kernel, by itself: `lab/bpf/checksum.bpf.c`.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{MapCore, MapFlags, MapHandle};

use super::kernel::{io_error, repeat};
use crate::error::{Context, Result};
use crate::sys::memory::MapMemory;

#[allow(clippy::all, clippy::undocumented_unsafe_blocks, unreachable_pub, missing_docs, unused, reason = "generated")]
mod skel {
    include!(concat!(env!("OUT_DIR"), "/checksum.skel.rs"));
}

/// Cases that are worked out in one go, and the words of one.
const CASES: usize = 1 << 14;
const CASE_WORDS: usize = 16;
const CASE: usize = 4 * CASE_WORDS;

/// What the program is given, all of it as it stands in packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChecksumCase {
    /// Bytes of a message.
    pub before: [u8; 16],
    /// What some of them become.
    pub after: [u8; 16],
    /// The message's checksum.
    pub check: [u8; 2],
    /// Another thing altogether: an IPv4 header without options.
    pub header: [u8; 20],
}

/// What it makes of that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChecksumAnswer {
    /// The message's checksum after the first 2 bytes have changed.
    pub changed2: [u8; 2],
    /// After the first 4 have.
    pub changed4: [u8; 2],
    /// After all 16 have.
    pub changed16: [u8; 2],
    /// As that of a UDP datagram, after the first 4, the next 4 and 2 more have.
    pub udp: [u8; 2],
    /// What the header's checksum should have been.
    pub of_header: [u8; 2],
    /// The header with one hop less.
    pub header: [u8; 20],
}

/// A program that works out checksums as the library's programs do.
#[derive(Debug)]
pub struct ChecksumProbe {
    program: OwnedFd,
    next: MapHandle,
    cases: MapMemory,
}

impl ChecksumProbe {
    /// Loads it.
    pub fn load() -> Result<Self> {
        Self::load_all().context(|| "load the checksum program".into())
    }

    fn load_all() -> io::Result<Self> {
        let mut storage = MaybeUninit::uninit();
        let open = skel::ChecksumSkelBuilder::default().open(&mut storage).map_err(io_error)?;
        let loaded = open.load().map_err(io_error)?;
        Ok(Self {
            program: loaded.progs.answer.as_fd().try_clone_to_owned()?,
            next: MapHandle::try_from(&loaded.maps.next).map_err(io_error)?,
            cases: MapMemory::new(loaded.maps.cases.as_fd(), CASES * CASE)?,
        })
    }

    /// What the program makes of each case.
    pub fn answers(&self, cases: &[ChecksumCase]) -> Result<Vec<ChecksumAnswer>> {
        let mut answers = Vec::with_capacity(cases.len());
        for cases in cases.chunks(CASES) {
            self.answer(cases, &mut answers).context(|| "run the checksum program".into())?;
        }
        Ok(answers)
    }

    fn answer(&self, cases: &[ChecksumCase], answers: &mut Vec<ChecksumAnswer>) -> io::Result<()> {
        let (lines, _) = self.cases.as_ref().as_chunks::<CASE_WORDS>();
        for (line, case) in lines.iter().zip(cases) {
            let mut bytes = [0xaa; CASE];
            bytes[..16].copy_from_slice(&case.before);
            bytes[16..32].copy_from_slice(&case.after);
            bytes[32..52].copy_from_slice(&case.header);
            bytes[52..54].copy_from_slice(&case.check);
            let (words, _) = bytes.as_chunks::<4>();
            line.iter().zip(words).for_each(|(to, word)| to.store(u32::from_ne_bytes(*word), Ordering::Relaxed));
        }
        self.next.update(&0_u32.to_ne_bytes(), &0_u32.to_ne_bytes(), MapFlags::ANY).map_err(io_error)?;
        repeat(&self.program, cases.len() as u32)?;
        answers.extend(lines.iter().take(cases.len()).map(read));
        Ok(())
    }
}

fn read(line: &[AtomicU32; CASE_WORDS]) -> ChecksumAnswer {
    let mut bytes = [0; CASE];
    let (words, _) = bytes.as_chunks_mut::<4>();
    words.iter_mut().zip(line).for_each(|(to, word)| *to = word.load(Ordering::Relaxed).to_ne_bytes());
    let two = |at: usize| [bytes[at], bytes[at + 1]];
    let mut header = [0; 20];
    header.copy_from_slice(&bytes[32..52]);
    ChecksumAnswer {
        changed2: two(54),
        changed4: two(56),
        changed16: two(58),
        udp: two(60),
        of_header: two(62),
        header,
    }
}
