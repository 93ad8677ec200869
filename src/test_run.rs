//! Running a program on a frame without an interface (`BPF_PROG_TEST_RUN`).

use std::time::Duration;

use crate::{
    Action, Interface, Result,
    base::{Instance, OwnMacs, TEST_MAC},
    sys::program::{Program, RunRequest},
};

/// One test run: a frame and how to run it.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct TestRun<'a> {
    request: RunRequest<'a>,
    /// Of the interface that the frame comes in by.
    mac: Option<[u8; 6]>,
}

impl<'a> TestRun<'a> {
    /// The destination MAC address of frames that are for this host (02:00:00:00:00:02), in a run of a stage, or of a chain that is
    /// not attached, without [`TestRun::ingress`].
    /// Balancers, [`TunnelDecap`](crate::TunnelDecap) and [`PacketMonitor`](crate::PacketMonitor) pass others as
    /// [`Reason::NotForUs`](crate::Reason::NotForUs). An attached chain goes by the addresses of its interface.
    pub const OWN_MAC: [u8; 6] = TEST_MAC;

    /// Runs once on `frame`, an Ethernet frame without FCS of at least 14 bytes.
    pub fn new(frame: &'a [u8]) -> Self {
        Self { request: RunRequest { frame, repeat: 1, ingress: None, linear: None, live: None }, mac: None }
    }

    /// Runs `times` times; [`Verdict::duration`] is then the mean. What the program changes in the frame
    /// stays changed from one repetition to the next.
    pub fn repeat(mut self, times: u32) -> Self {
        self.request.repeat = times;
        self
    }

    /// The interface and receive queue that the program sees the frame come in by. Frames to its MAC address
    /// ([`Interface::mac`]) are for this host then.
    pub fn ingress(mut self, interface: &Interface, queue: u32) -> Self {
        self.request.ingress = Some((interface.index(), queue));
        self.mac = interface.mac();
        self
    }

    /// Bytes of the frame in its first buffer, as drivers hand over jumbo frames; the rest follows in others.
    pub fn linear(mut self, bytes: u32) -> Self {
        self.request.linear = Some(bytes);
        self
    }

    /// Sends the frames for real where the program says (`BPF_F_TEST_XDP_LIVE_FRAMES`, Linux 5.18), `batch`
    /// at a time (at most 256): a traffic generator. The verdict then says nothing.
    pub fn live_frames(mut self, batch: u32) -> Self {
        self.request.live = Some(batch);
        self
    }

    /// In instances that no interface runs, the first of them first.
    pub(crate) fn run<'i>(&self, instances: impl Iterator<Item = &'i Instance> + Clone) -> Result<Verdict> {
        self.run_by(instances.clone().filter_map(|instance| instance.own_macs.as_deref()), &|| {
            let first = instances.clone().next().expect("a chain has a stage");
            self.run_as_it_is(&first.program)
        })
    }

    /// Each of these has to be the frame's MAC address meanwhile.
    fn run_by<'i>(
        &self,
        mut macs: impl Iterator<Item = &'i OwnMacs>,
        run: &dyn Fn() -> Result<Verdict>,
    ) -> Result<Verdict> {
        match macs.next() {
            Some(own) => own.while_it_is(self.mac.unwrap_or(TEST_MAC), || self.run_by(macs, run)),
            None => run(),
        }
    }

    /// In an instance that may be at work.
    pub(crate) fn run_as_it_is(&self, program: &Program) -> Result<Verdict> {
        let answer = program.run(&self.request)?;
        Ok(Verdict {
            action: Action::from_code(answer.code).unwrap_or(Action::Aborted),
            frame: answer.frame,
            duration: answer.duration,
        })
    }
}

/// What a program did with a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Verdict {
    /// What becomes of it.
    pub action: Action,
    /// The frame as the program left it.
    pub frame: Vec<u8>,
    /// Time for one run, as the kernel measured it. Means something only for many repetitions.
    pub duration: Duration,
}
