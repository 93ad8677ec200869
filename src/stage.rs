//! Stages: what all network functions have in common.

use std::os::fd::BorrowedFd;

#[allow(unused_imports, reason = "for links in the documentation")]
use crate::Error;
use crate::{AttachOptions, Attachment, Pipeline, Recovery, Result, Stats, TestRun, Verdict, Watch, pin};

/// A network function: one XDP program and its tables, alone on an interface or in a [`Pipeline`].
///
/// The value owns file descriptors, nothing else: dropping it leaves what is attached or pinned at work.
/// Its tables may be changed while packets flow, from any thread.
pub trait Stage: sealed::Sealed + Send + Sync {
    /// The name of this value, unique in a pipeline and in a pin directory.
    fn name(&self) -> &str {
        &self.core().shared.name
    }

    /// Attaches to an interface, alone. May be called for several interfaces: they share the tables.
    ///
    /// # Errors
    /// [`Error::UnknownInterface`], [`Error::NotEthernet`], [`Error::ForeignProgram`], [`Error::ModeRefused`],
    /// [`Error::MissingCapability`], [`Error::Forbidden`]; with [`AttachOptions::pin`] also the `Pin...` variants.
    fn attach(&self, options: &AttachOptions) -> Result<Attachment> {
        let mut pipeline = Pipeline::of_cores(&[self.core()])?;
        pipeline.attach(options)?;
        Ok(Attachment::new(pipeline))
    }

    /// What became of the packets so far, by reason.
    ///
    /// # Errors
    /// [`Error::Map`] when the kernel refuses to read the counters.
    fn stats(&self) -> Result<Stats> {
        Ok(Stats::from_counters(&self.core().counters()?))
    }

    /// Runs the program on one frame, without any interface, and says what it did with it.
    ///
    /// The tables are the real ones: a test run counts, and spends what a limit allows.
    ///
    /// # Errors
    /// [`Error::TestRun`], for one when the frame is shorter than an Ethernet header (14 bytes).
    fn test_run(&self, frame: &[u8]) -> Result<Verdict> {
        self.run(&TestRun::new(frame))
    }

    /// Runs the program as [`Stage::test_run`] does, with options.
    ///
    /// # Errors
    /// [`Error::TestRun`].
    fn run(&self, request: &TestRun<'_>) -> Result<Verdict> {
        request.run(std::iter::once(self.core().own()?))
    }

    /// Says that this process goes on for good with the tables that it has adopted. From then on, whichever process had them
    /// before is superseded: it can be waited for, and cannot take them back. Attaching says so by itself, unless
    /// [`AttachOptions::announce_ready`] is off; does nothing for tables of one's own.
    ///
    /// Between adoption and this, the earlier process cannot change anything either; but if this one ends, it takes its tables
    /// back.
    ///
    /// # Errors
    /// [`Error::Superseded`] when yet another process has adopted them;
    /// [`Error::Pin`], [`Error::PinsLocked`].
    fn ready(&self) -> Result<()> {
        pin::make_ready(&self.core().shared)
    }

    /// Whether another process has taken over the tables for good: edits return
    /// [`Error::Superseded`] from then on, reading goes on.
    fn is_superseded(&self) -> bool {
        self.core().owner().is_superseded()
    }

    /// Waits until another process has taken over the tables for good: see [`Watch`]. Other losses are those of attachments.
    ///
    /// # Errors
    /// [`Error::Interface`] when the kernel refuses to notify.
    fn watch(&self) -> Result<Watch> {
        Watch::of_stage(&self.core().shared)
    }

    /// What adoption had to drop or build again, because the earlier process ended in the middle of a change.
    fn recovery(&self) -> Recovery {
        self.core().recovery()
    }

    /// A program instance that is attached nowhere and has no successor: for test runs by other means, and
    /// for use in program arrays of the caller's own. It is always the same. The first call may have to load it; should
    /// that fail, it is the one that was attached first.
    fn program_fd(&self) -> BorrowedFd<'_> {
        self.core().program_fd()
    }
}

pub(crate) mod sealed {
    /// Keeps [`super::Stage`] ours: a stage has to follow the chaining protocol of `bpf/include/stage.h`.
    pub trait Sealed {
        fn core(&self) -> &crate::base::StageCore;
    }
}
