//! The flow table in the kernel, by itself: `lab/bpf/flow_table.bpf.c`.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{MapCore, MapFlags, MapHandle};

use super::kernel::{io_error, repeat};
use crate::error::{Context, Result};
use crate::sys::memory::{LongMemory, MapMemory};

#[allow(clippy::all, clippy::undocumented_unsafe_blocks, unreachable_pub, missing_docs, unused, reason = "generated")]
mod skel {
    include!(concat!(env!("OUT_DIR"), "/flow_table.skel.rs"));
}

/// Bytes of a line, and words of the header.
const LINE: usize = 64;
const HEADER_WORDS: usize = 26;
/// Questions that are answered in one go, and the 64-bit words of one.
const QUESTIONS: usize = 1 << 16;
const QUESTION_WORDS: usize = 8;
/// Operations of one stress call: signals are answered in between.
const CALL: u32 = 1 << 20;

/// What the probe is asked to do with the entry of a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowOperation {
    /// Look it up.
    Find,
    /// Insert it with this value.
    Insert(u64),
    /// Give it this value.
    Update(u64),
    /// Remove it.
    Remove,
    /// Hash the number and this one to a tag.
    Hash(u64),
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowAnswer {
    /// Find, update, remove: 1 when it was done. Insert: `enum flow_answer`.
    pub answer: u32,
    /// Its value before.
    pub value: u64,
    /// The entry that went for an inserted one: key and value.
    pub victim: Option<(u64, u64)>,
    /// What the program made of the number.
    pub key: u64,
    /// Where the entry is.
    pub slot: u32,
}

/// Sums over the CPUs of what stress operations did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "as struct flow_stress tells")]
pub struct FlowStress {
    pub operations: u64,
    pub added: u64,
    pub removed: u64,
    pub torn: u64,
    pub evictions: u64,
    pub full: u64,
    pub given_up: u64,
}

/// What the rank of the program says; `struct flow_probe` has it in the lowest bits of `now`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowRank {
    /// Nothing goes.
    Keep,
    /// The lowest value goes, but only in need.
    Lowest,
    /// What has a value below this one is as good as gone.
    Stale(u64),
}

impl FlowRank {
    fn code(self) -> u64 {
        match self {
            Self::Keep => 0,
            Self::Lowest => 1,
            Self::Stale(below) => below << 2 | 2,
        }
    }
}

/// Programs that use a table, and the kernel's LRU_HASH beside it.
#[derive(Debug)]
pub struct FlowProbe {
    programs: [OwnedFd; 4],
    answer: OwnedFd,
    stress: OwnedFd,
    state: MapHandle,
    stress_state: MapHandle,
    lines: MapHandle,
    header: MapHandle,
    questions: LongMemory,
}

impl FlowProbe {
    /// Loads them, with a table of so many lines, stash and all, and an LRU_HASH of so many entries.
    pub fn load(lines: u32, lru: u32) -> Result<Self> {
        Self::load_all(lines, lru).context(|| "load the flow table's programs".into())
    }

    fn load_all(lines: u32, lru: u32) -> io::Result<Self> {
        let mut storage = MaybeUninit::uninit();
        let mut open = skel::FlowTableSkelBuilder::default().open(&mut storage).map_err(io_error)?;
        open.maps.flows_lines.set_max_entries(lines).map_err(io_error)?;
        open.maps.lru.set_max_entries(lru).map_err(io_error)?;
        let loaded = open.load().map_err(io_error)?;
        let (maps, progs) = (&loaded.maps, &loaded.progs);
        let own = |fd: BorrowedFd<'_>| fd.try_clone_to_owned();
        Ok(Self {
            programs: [
                own(progs.table_known.as_fd())?,
                own(progs.lru_known.as_fd())?,
                own(progs.table_new.as_fd())?,
                own(progs.lru_new.as_fd())?,
            ],
            answer: own(progs.answer.as_fd())?,
            stress: own(progs.stress.as_fd())?,
            state: MapHandle::try_from(&maps.probe).map_err(io_error)?,
            stress_state: MapHandle::try_from(&maps.stress_state).map_err(io_error)?,
            lines: MapHandle::try_from(&maps.flows_lines).map_err(io_error)?,
            header: MapHandle::try_from(&maps.flows_table).map_err(io_error)?,
            questions: LongMemory(MapMemory::new(maps.questions.as_fd(), QUESTIONS * QUESTION_WORDS * 8)?),
        })
    }

    /// The table's memory: its lines, and its header.
    pub fn memory(&self) -> Result<[LongMemory; 2]> {
        let lines = MapMemory::new(self.lines.as_fd(), self.lines.max_entries() as usize * LINE);
        let header = MapMemory::new(self.header.as_fd(), HEADER_WORDS * 8);
        let both = lines.and_then(|lines| Ok([LongMemory(lines), LongMemory(header?)]));
        both.context(|| "map the table into memory".into())
    }

    /// Counts packets by IPv4 source: in the table, or in the LRU_HASH. For frames without VLAN tags.
    pub fn known(&self, lru: bool) -> BorrowedFd<'_> {
        self.programs[usize::from(lru)].as_fd()
    }

    /// The same as if every packet came from a source that was never seen.
    pub fn new_flows(&self, lru: bool) -> BorrowedFd<'_> {
        self.programs[2 + usize::from(lru)].as_fd()
    }

    fn reset(&self, words: [u64; 4]) -> io::Result<()> {
        let state = words.map(u64::to_ne_bytes).concat();
        self.state.update(&0_u32.to_ne_bytes(), &state, MapFlags::ANY).map_err(io_error)
    }

    /// Does operations on numbers, one after the other.
    pub fn answers(&self, rank: FlowRank, operations: &[(u64, FlowOperation)]) -> Result<Vec<FlowAnswer>> {
        let mut answers = Vec::with_capacity(operations.len());
        for operations in operations.chunks(QUESTIONS) {
            let answered = self.answer(rank, operations, &mut answers);
            answered.context(|| "run the flow table's program".into())?;
        }
        Ok(answers)
    }

    fn answer(
        &self,
        rank: FlowRank,
        operations: &[(u64, FlowOperation)],
        answers: &mut Vec<FlowAnswer>,
    ) -> io::Result<()> {
        let (questions, _) = self.questions.as_ref().as_chunks::<QUESTION_WORDS>();
        for (question, (number, operation)) in questions.iter().zip(operations) {
            let (code, value) = match operation {
                FlowOperation::Find => (0, 0),
                FlowOperation::Insert(value) => (1, *value),
                FlowOperation::Update(value) => (2, *value),
                FlowOperation::Remove => (3, 0),
                FlowOperation::Hash(value) => (4, *value),
            };
            for (to, word) in question.iter().zip([*number, value, rank.code(), 0, 0, code, 0, 0]) {
                to.store(word, Ordering::Relaxed);
            }
        }
        self.reset([0; 4])?;
        repeat(&self.answer, operations.len() as u32)?;
        answers.extend(questions.iter().take(operations.len()).map(|question| {
            let word = |at: usize| question[at].load(Ordering::Relaxed);
            FlowAnswer {
                answer: (word(5) >> 32) as u32,
                value: word(1),
                victim: (word(3) != 0).then(|| (word(3), word(4))),
                key: word(7),
                slot: word(6) as u32,
            }
        }));
        Ok(())
    }

    /// Adds to random entries of `keys` numbers, inserts those that are not there and, where `remove` is not 0, removes
    /// one in so many, on so many threads at once: `operations` each.
    pub fn stress(
        &self,
        rank: FlowRank,
        keys: u64,
        remove: u64,
        threads: usize,
        operations: u64,
    ) -> Result<FlowStress> {
        let ran = self.run_stress(rank, keys, remove, threads, operations);
        ran.context(|| "run the flow table's stress program".into())
    }

    fn run_stress(
        &self,
        rank: FlowRank,
        keys: u64,
        remove: u64,
        threads: usize,
        operations: u64,
    ) -> io::Result<FlowStress> {
        self.reset([0, keys, rank.code(), remove])?;
        let before = self.stress_sums()?;
        std::thread::scope(|scope| {
            let work = || {
                let mut left = operations;
                while left > 0 {
                    let now = left.min(CALL.into());
                    repeat(&self.stress, now as u32)?;
                    left -= now;
                }
                Ok(())
            };
            let running: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            running.into_iter().try_for_each(|thread| thread.join().expect("it does not panic"))
        })
        .and_then(|()| {
            let now = self.stress_sums()?;
            let since = |at: usize| now[at] - before[at];
            Ok(FlowStress {
                operations: since(1),
                added: since(2),
                removed: since(3),
                torn: since(4),
                evictions: since(5),
                full: since(6),
                given_up: since(7),
            })
        })
    }

    fn stress_sums(&self) -> io::Result<[u64; 8]> {
        let cpus = self.stress_state.lookup_percpu(&0_u32.to_ne_bytes(), MapFlags::ANY).map_err(io_error)?;
        let mut sums = [0_u64; 8];
        for cpu in cpus.unwrap_or_default() {
            let (words, _) = cpu.as_chunks::<8>();
            for (sum, word) in sums.iter_mut().zip(words) {
                *sum = sum.wrapping_add(u64::from_ne_bytes(*word));
            }
        }
        Ok(sums)
    }
}

/// The words of the questions are read and written one by one.
const _: () = assert!(size_of::<[AtomicU64; QUESTION_WORDS]>() == 64);
