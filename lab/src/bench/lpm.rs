//! The compiled longest-prefix-match table in the kernel, by itself: `lab/bpf/lpm.bpf.c`.

use std::io;
use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use ipnet::IpNet;
use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{MapCore, MapFlags, MapHandle};

use super::kernel::{io_error, repeat};
use crate::error::{Context, Result};
use crate::sys::memory::MapMemory;

#[allow(clippy::all, clippy::undocumented_unsafe_blocks, unreachable_pub, missing_docs, unused, reason = "generated")]
mod skel {
    include!(concat!(env!("OUT_DIR"), "/lpm.skel.rs"));
}

/// Bytes of a table's line.
const LINE: usize = 64;
/// Questions that are answered in one go, and the words of one.
const QUESTIONS: usize = 1 << 16;
const QUESTION_WORDS: usize = 8;
const ANSWER_AT: usize = 4;
/// Trie entries written in one call.
const BATCH: usize = 1 << 16;

/// A prefix and what a look-up of it answers.
pub type Route = (IpNet, u32);

/// Programs that look the source address up, in the table and in the kernel's trie.
#[derive(Debug)]
pub struct LpmProbe {
    programs: [OwnedFd; 6],
    state: MapHandle,
    tries: [MapHandle; 2],
    lines: MapHandle,
    questions: MapMemory,
    roots: [u32; 2],
}

impl LpmProbe {
    /// Loads them, with an empty table of so many lines and tries for so many prefixes each.
    pub fn load(lines: u32, prefixes: u32) -> Result<Self> {
        Self::load_all(lines, prefixes).context(|| "load the look-up programs".into())
    }

    fn load_all(lines: u32, prefixes: u32) -> io::Result<Self> {
        let mut storage = MaybeUninit::uninit();
        let mut open = skel::LpmSkelBuilder::default().open(&mut storage).map_err(io_error)?;
        open.maps.lpm_lines.set_max_entries(lines).map_err(io_error)?;
        open.maps.trie4.set_max_entries(prefixes.max(1)).map_err(io_error)?;
        open.maps.trie6.set_max_entries(prefixes.max(1)).map_err(io_error)?;
        let loaded = open.load().map_err(io_error)?;
        let (maps, progs) = (&loaded.maps, &loaded.progs);
        let own = |fd: BorrowedFd<'_>| fd.try_clone_to_owned();
        Ok(Self {
            programs: [
                own(progs.table_v4.as_fd())?,
                own(progs.table_v6.as_fd())?,
                own(progs.trie_v4.as_fd())?,
                own(progs.trie_v6.as_fd())?,
                own(progs.answer_v4.as_fd())?,
                own(progs.answer_v6.as_fd())?,
            ],
            state: MapHandle::try_from(&maps.probe).map_err(io_error)?,
            tries: [
                MapHandle::try_from(&maps.trie4).map_err(io_error)?,
                MapHandle::try_from(&maps.trie6).map_err(io_error)?,
            ],
            lines: MapHandle::try_from(&maps.lpm_lines).map_err(io_error)?,
            questions: MapMemory::new(maps.questions.as_fd(), QUESTIONS * QUESTION_WORDS * 4)?,
            roots: [0; 2],
        })
    }

    /// The table's memory.
    pub fn memory(&self) -> Result<MapMemory> {
        let memory = MapMemory::new(self.lines.as_fd(), self.lines.max_entries() as usize * LINE);
        memory.context(|| "map the table into memory".into())
    }

    /// Tells the programs on which lines the tables of the two families start.
    pub fn set_roots(&mut self, v4: u32, v6: u32) -> Result<()> {
        self.roots = [v4, v6];
        self.reset().context(|| "set the roots".into())
    }

    fn reset(&self) -> io::Result<()> {
        let state = [self.roots[0], self.roots[1], 0, 0].map(u32::to_ne_bytes).concat();
        self.state.update(&0_u32.to_ne_bytes(), &state, MapFlags::ANY).map_err(io_error)
    }

    /// Looks up in the table: a program for a harness with frames of this family, and no VLAN tags.
    pub fn table(&self, ipv6: bool) -> BorrowedFd<'_> {
        self.programs[usize::from(ipv6)].as_fd()
    }

    /// The same in the kernel's trie.
    pub fn trie(&self, ipv6: bool) -> BorrowedFd<'_> {
        self.programs[2 + usize::from(ipv6)].as_fd()
    }

    /// Adds prefixes of one family to its trie.
    pub fn fill_trie(&self, ipv6: bool, routes: &[Route]) -> Result<()> {
        for routes in routes.chunks(BATCH) {
            let keys: Vec<u8> = routes.iter().flat_map(|(net, _)| trie_key(*net)).collect();
            let values: Vec<u8> = routes.iter().flat_map(|(_, leaf)| leaf.to_ne_bytes()).collect();
            let (trie, count) = (&self.tries[usize::from(ipv6)], routes.len() as u32);
            let filled = trie.update_batch(&keys, &values, count, MapFlags::ANY, MapFlags::ANY).map_err(io_error);
            filled.context(|| "fill the trie".into())?;
        }
        Ok(())
    }

    /// What the table's program finds for addresses of one family.
    pub fn answers(&self, addresses: &[IpAddr]) -> Result<Vec<u32>> {
        let mut answers = Vec::with_capacity(addresses.len());
        for addresses in addresses.chunks(QUESTIONS) {
            let answered = self.answer(addresses, &mut answers);
            answered.context(|| "run the look-up program".into())?;
        }
        Ok(answers)
    }

    fn answer(&self, addresses: &[IpAddr], answers: &mut Vec<u32>) -> io::Result<()> {
        let (questions, _) = self.questions.as_ref().as_chunks::<QUESTION_WORDS>();
        for (question, address) in questions.iter().zip(addresses) {
            question.iter().zip(address_words(*address)).for_each(|(to, word)| to.store(word, Ordering::Relaxed));
            question[ANSWER_AT].store(u32::MAX, Ordering::Relaxed);
        }
        self.reset()?;
        repeat(&self.programs[4 + usize::from(addresses[0].is_ipv6())], addresses.len() as u32)?;
        let answer = |question: &[AtomicU32; QUESTION_WORDS]| question[ANSWER_AT].load(Ordering::Relaxed);
        answers.extend(questions.iter().take(addresses.len()).map(answer));
        Ok(())
    }
}

/// As `struct question` has it.
fn address_words(address: IpAddr) -> [u32; 4] {
    let mut octets = [0; 16];
    match address {
        IpAddr::V4(ip) => octets[..4].copy_from_slice(&ip.octets()),
        IpAddr::V6(ip) => octets = ip.octets(),
    }
    let (words, _) = octets.as_chunks::<4>();
    std::array::from_fn(|at| u32::from_ne_bytes(words[at]))
}

fn trie_key(net: IpNet) -> Vec<u8> {
    let mut key = u32::from(net.prefix_len()).to_ne_bytes().to_vec();
    match net {
        IpNet::V4(net) => key.extend(net.network().octets()),
        IpNet::V6(net) => key.extend(net.network().octets()),
    }
    key
}
