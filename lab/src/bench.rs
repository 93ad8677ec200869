//! Nanoseconds a packet, by test runs: every XDP program is measured in the same way.
//!
//! A test run repeats one program on one frame, which alone would measure the wrong thing: what a
//! program changes in the frame stays changed, and the same flow comes again and again. So a wrapper
//! runs first. It restores the frame, makes it the next flow's, and tail-calls the program under
//! test. What the wrapper costs, an empty program costs too: figures are differences to that.
//!
//! ```no_run
//! use xdpkit_lab::bench::{Harness, random_v4};
//! use xdpkit_lab::frame::Frame;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let frame = Frame::udp("10.0.0.1:1".parse()?, "10.0.0.2:53".parse()?).build();
//! let harness = Harness::new(&frame, &random_v4(1 << 16))?;
//! println!("{}", harness.table(&[("parse", harness.parse_only())], 200)?);
//! # Ok(())
//! # }
//! ```

mod check;
mod checksum;
mod cost;
mod flow_table;
mod flows;
mod kernel;
mod layout;
mod live;
mod lpm;
mod rate;
mod token_bucket;
mod verdict;
mod yardstick;

use std::cell::{Cell, RefCell};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

pub use check::Checks;
pub use checksum::{ChecksumAnswer, ChecksumCase, ChecksumProbe};
pub use cost::{Cost, Table};
pub use flow_table::{FlowAnswer, FlowOperation, FlowProbe, FlowRank, FlowStress};
pub use flows::{Random, random_v4, random_v6};
use kernel::{Programs, Run};
use layout::Layout;
pub use live::{LiveForward, LiveFrames};
pub use lpm::{LpmProbe, Route};
pub use rate::LruLimiter;
pub use token_bucket::{TokenBucket, TokenCount};
pub use verdict::VerdictProbe;
pub use yardstick::Yardstick;

use crate::device::veth;
use crate::error::{Context, Error, Result};
use crate::namespace::Namespace;
use crate::sys;

/// Packets of one timed window: short enough (below a millisecond for most programs) that many are
/// disturbed by nothing, long enough for the cost of the call, some microseconds, to vanish.
const WINDOW: u32 = 1 << 14;
/// Packets before each window, untimed: caches and predictors have just seen another program.
const LEAD_IN: u32 = 1 << 11;
/// Packets of one call at most, so that signals are answered soon.
const CALL: u32 = 1 << 20;
/// Packets that [`Harness::time`] runs at least.
const TIMED_MIN: u64 = 1 << 14;
/// Larger frames would come in several buffers, which the wrapper does not restore.
const FRAME_MAX: usize = 2048;
/// What a program may add to a frame.
const GROWTH: usize = 512;

const XDP_ABORTED: u32 = 0;

/// A frame, flows and the wrapper, ready to time any XDP program of section `xdp.frags`.
///
/// One thread at a time: the flows come from one counter. Two harnesses know nothing of each other.
pub struct Harness {
    programs: Programs,
    frame: Vec<u8>,
    /// The flow that is next.
    next: Cell<u64>,
    /// The last run's frame.
    after: RefCell<Vec<u8>>,
    /// Attached somewhere, a program's test runs start in microseconds instead of 10 to 18 ms.
    _attached: OwnedFd,
    _idle: Namespace,
}

impl fmt::Debug for Harness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Harness").field("frame", &self.frame.len()).field("next", &self.next).finish_non_exhaustive()
    }
}

impl Harness {
    /// Loads the wrapper for packets that are `template` but for the source address and, directly
    /// behind IP, the TCP or UDP source port: those are of the flows, one after the other. Their
    /// number must be a power of two; they come in a random but always the same order.
    ///
    /// The frame is filled up to a multiple of 32 bytes, unless it is longer than 128. See
    /// `lab/bpf/bench.bpf.c` for what the wrapper does not restore.
    pub fn new(template: &[u8], flows: &[SocketAddr]) -> Result<Self> {
        let flows: Vec<_> = flows.iter().map(|flow| (*flow, 0)).collect();
        Self::with_ports(template, &flows)
    }

    /// The same for flows that differ in the destination port too; 0 keeps the template's.
    pub fn with_ports(template: &[u8], flows: &[(SocketAddr, u16)]) -> Result<Self> {
        let refuse = |what: &str| {
            let source = io::Error::new(io::ErrorKind::InvalidInput, what.to_owned());
            Error::new("set up a benchmark", source)
        };
        if template.len() > FRAME_MAX {
            return Err(refuse("the frame is longer than 2048 bytes"));
        }
        if !flows.len().is_power_of_two() || flows.len() > 1 << 24 {
            return Err(refuse("the number of flows is not a power of two up to 2^24"));
        }
        let mut frame = template.to_vec();
        Layout::pad(&mut frame);
        let layout = Layout::of(&frame).ok_or_else(|| refuse("the frame holds no IP packet, or too many headers"))?;
        let mut flows = flows.to_vec();
        Random::new(0).shuffle(&mut flows);
        let mut encoded = Vec::with_capacity(flows.len() * layout.flow_size());
        for (flow, destination_port) in &flows {
            encoded.extend(
                layout
                    .encode(flow, *destination_port)
                    .ok_or_else(|| refuse("a flow and the frame differ in IP version"))?,
            );
        }
        let programs = Programs::load(&frame, &layout, &encoded).context(|| "load the benchmark's programs".into())?;

        let idle = Namespace::new("bench")?;
        veth((&idle, "a"), (&idle, "b"))?;
        // Down: the kernel's own packets would run the wrapper too, beside the test run, on its state.
        idle.set_down("a")?;
        let index = idle.ifindex("a")?;
        let attached = idle.run(|| sys::bpf::attach_xdp_native(programs.wrapper.as_fd(), index));
        let attached = attached.context(|| "attach the benchmark's wrapper".into())?;
        Ok(Self { programs, frame, next: Cell::new(0), after: RefCell::default(), _attached: attached, _idle: idle })
    }

    /// A program that only passes: what all figures are compared with.
    pub fn empty(&self) -> BorrowedFd<'_> {
        self.programs.empty.as_fd()
    }

    /// A program that runs the library's parser and passes.
    pub fn parse_only(&self) -> BorrowedFd<'_> {
        self.programs.parse_only.as_fd()
    }

    /// A program that makes room for a header and sends the frame back: what encapsulation costs at least.
    pub fn grow(&self) -> BorrowedFd<'_> {
        self.programs.grow.as_fd()
    }

    /// CPU time for `packets` packets, wrapper included: criterion's `iter_custom`. Few packets are
    /// timed as many and scaled, so that the cost of the call never counts.
    pub fn time(&self, program: BorrowedFd<'_>, packets: u64) -> Result<Duration> {
        self.put(program)?;
        self.run(LEAD_IN)?;
        let (mut left, mut time) = (packets.max(TIMED_MIN), Duration::ZERO);
        let scale = packets as f64 / left as f64;
        while left > 0 {
            let now = left.min(CALL.into());
            time += self.run(now as u32)?.time;
            left -= now;
        }
        Ok(time.mul_f64(scale))
    }

    /// What one program costs above the empty one. See [`Harness::costs_above_empty`].
    pub fn cost_above_empty(&self, program: BorrowedFd<'_>, rounds: u32) -> Result<Cost> {
        Ok(self.costs_above_empty(&[program], rounds)?[0])
    }

    /// What programs cost above the empty one. A round is a short window of each, the empty one
    /// included, so that a drift of the machine meets all alike. 200 rounds give figures that are
    /// good to a nanosecond on a machine that others use too.
    pub fn costs_above_empty(&self, programs: &[BorrowedFd<'_>], rounds: u32) -> Result<Vec<Cost>> {
        let mut windows: Vec<Vec<f64>> = vec![Vec::new(); programs.len()];
        let mut empty = Vec::new();
        for round in 0..rounds.max(1) as usize {
            empty.push(self.window(self.empty())?);
            for offset in 0..programs.len() {
                // Nobody always follows the same neighbour.
                let at = (round + offset) % programs.len();
                windows[at].push(self.window(programs[at])?);
            }
        }
        Ok(windows.iter().map(|window| Cost::new(window, &empty)).collect())
    }

    /// The same for named programs, printable.
    pub fn table(&self, rows: &[(&str, BorrowedFd<'_>)], rounds: u32) -> Result<Table> {
        let programs: Vec<_> = rows.iter().map(|(_, program)| *program).collect();
        let costs = self.costs_above_empty(&programs, rounds)?;
        let names = rows.iter().map(|(name, _)| (*name).to_owned());
        Ok(Table { rows: names.zip(costs).collect() })
    }

    /// Runs a program on the next `packets` flows, untimed; for checks that it does what is measured.
    /// Answers the XDP action and frame of the last one.
    pub fn verdict(&self, program: BorrowedFd<'_>, packets: u32) -> Result<(u32, Vec<u8>)> {
        self.put(program)?;
        let run = self.run(packets)?;
        Ok((run.verdict, self.after.take()))
    }

    /// Nanoseconds a packet.
    fn window(&self, program: BorrowedFd<'_>) -> Result<f64> {
        self.put(program)?;
        self.run(LEAD_IN)?;
        let time = self.run(WINDOW)?.time;
        Ok(time.as_nanos() as f64 / f64::from(WINDOW))
    }

    fn put(&self, program: BorrowedFd<'_>) -> Result<()> {
        let put = self.programs.put_under_test(program);
        put.context(|| "put a program under test (it must be of section xdp.frags)".into())
    }

    fn run(&self, packets: u32) -> Result<Run> {
        let mut after = self.after.borrow_mut();
        after.resize(self.frame.len() + GROWTH, 0);
        let next = self.next.get();
        let run = self.programs.run(&self.frame, next, packets, &mut after);
        self.next.set(next + u64::from(packets));
        let aborted = |run: Run| match run.verdict {
            XDP_ABORTED => Err(io::Error::other("it aborted, or the wrapper did")),
            _ => Ok(run),
        };
        run.and_then(aborted).context(|| "run a program under test".into())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::frame::Frame;

    const XDP_PASS: u32 = 2;
    const XDP_TX: u32 = 3;

    fn frame(flow: SocketAddr) -> Vec<u8> {
        let destination = if flow.is_ipv4() { "10.0.0.1:53" } else { "[fd::1]:53" };
        Frame::udp(flow, destination.parse().unwrap()).payload(&[7; 60]).checksum(1).ip_checksum(1).build()
    }

    #[test]
    fn every_packet_is_the_next_flow_in_a_whole_frame() {
        for flows in [random_v4(16), random_v6(16)] {
            let mut template = frame(flows[0]);
            let harness = Harness::new(&template, &flows).unwrap();
            Layout::pad(&mut template);
            let padding = &template[frame(flows[0]).len()..];
            let mut wanted: HashSet<_> = flows.iter().map(|flow| [&frame(*flow), padding].concat()).collect();
            for _ in 0..16 {
                let (action, seen) = harness.verdict(harness.empty(), 1).unwrap();
                assert_eq!(action, XDP_PASS);
                assert!(wanted.remove(&seen), "{seen:02x?} again, or never a template");
            }
            assert_eq!(wanted.len(), 0);
        }
    }

    #[test]
    fn whatever_a_program_does_to_the_frame_is_undone() {
        for flows in [random_v4(1), random_v6(1)] {
            let template = frame(flows[0]);
            let harness = Harness::new(&template, &flows).unwrap();
            let (_, whole) = harness.verdict(harness.empty(), 1).unwrap();
            for packets in [1, 2, 3, 1000, 1001] {
                let (action, mangled) = harness.verdict(harness.programs.mangle.as_fd(), packets).unwrap();
                assert_eq!(action, XDP_TX);
                let (head, tail) = mangled.split_at(64);
                assert_eq!(head, [0xff; 64]);
                // It shortens first, then lengthens.
                let kept = match mangled.len() {
                    short if short == whole.len() - 20 => &whole[14 + 64..whole.len() - 6],
                    long if long == whole.len() + 64 => &[&whole[24..], &[0; 24]].concat()[..],
                    other => panic!("{other} bytes of {}", whole.len()),
                };
                assert_eq!(tail, kept);
            }
        }
    }

    #[test]
    fn the_clock_agrees_with_the_kernel() {
        let flows = random_v4(1);
        let harness = Harness::new(&frame(flows[0]), &flows).unwrap();
        harness.put(harness.empty()).unwrap();
        // Either may be disturbed, however long: until once neither is. The kernel cuts the fraction off.
        let agree = (0..100_000).any(|_| {
            let run = harness.run(WINDOW).unwrap();
            let ours = run.time.as_nanos() as f64 / f64::from(WINDOW);
            let kernels = run.mean.as_nanos() as f64 + 0.5;
            (ours - kernels).abs() / kernels.max(20.0) < 0.05
        });
        assert!(agree, "5 % apart at least, in every window");
    }

    #[test]
    fn what_cannot_be_measured_is_refused() {
        let flows = random_v4(2);
        let refused = |template: &[u8], flows: &[SocketAddr]| Harness::new(template, flows).unwrap_err().to_string();
        assert!(refused(&frame(flows[0]), &random_v4(3)).contains("power of two"));
        assert!(refused(&frame(flows[0]), &random_v6(2)).contains("IP version"));
        assert!(refused(&[0; 60], &flows).contains("no IP packet"));
        assert!(refused(&[0; 4000], &flows).contains("longer than"));
    }
}
