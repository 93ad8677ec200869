//! Chains of stages on one interface, edited while packets flow.

mod attach;
mod attached;
mod edit;
mod watch;

use std::{
    fs::File,
    io,
    os::fd::{AsFd as _, BorrowedFd},
    path::PathBuf,
    sync::Arc,
};

#[allow(unused_imports, reason = "for links in the documentation")]
use crate::AttachOptions;
use crate::{
    Error, Interface, Result, Stage, TestRun, Verdict, XdpMode,
    base::{Instance, Shared, StageCore},
    pin::{InterfacePins, Undo},
    sys::{grace::GracePeriod, program::Program},
};
use attached::Attached;
pub use watch::{Loss, Watch};

/// Programs in a chain, the caller's own included: the kernel follows at most 33 tail calls.
const PROGRAMS_MAX: usize = 32;

/// Where a stage is inserted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Position<'a> {
    /// Before all others.
    First,
    /// After all other stages, before a last program of the caller's own.
    Last,
    /// Right before the stage of this name.
    Before(&'a str),
    /// Right after the stage of this name.
    After(&'a str),
}

/// Stages in a row: a packet that one passes goes to the next, after the last to a program of the caller's
/// own, if there is one, else to the network stack.
///
/// Every membership is a program instance of its own on the tables of the stage's value, so one value may stand
/// in several pipelines. Edits take effect at once and in an order that lets no packet bypass a stage that stands
/// in the chain before and after the edit. Names of stages are unique in a pipeline.
///
/// Dropping an attached pipeline detaches it, unless it is pinned ([`AttachOptions::pin`]).
#[derive(Debug)]
#[must_use = "dropping an attached pipeline detaches it"]
pub struct Pipeline {
    // Before the members: packets must stop coming in before the slots go.
    attached: Option<Attached>,
    members: Vec<Member>,
    last: Option<Program>,
    grace: Option<GracePeriod>,
}

/// A stage's place in the chain.
#[derive(Debug)]
struct Member {
    shared: Arc<Shared>,
    instance: Instance,
    pin: Option<PathBuf>,
}

impl Member {
    fn new(shared: &Arc<Shared>) -> Result<Self> {
        Ok(Self { shared: Arc::clone(shared), instance: shared.instantiate()?, pin: None })
    }

    /// Lets go of an instance that no packet is in and none will come to: the value may want another.
    fn recycle(self) {
        self.shared.recycle(self.instance);
    }

    fn name(&self) -> &str {
        &self.shared.name
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.instance.program.as_fd()
    }

    /// Names the successor; with none, the chain ends here.
    fn point_to(&self, next: Option<&Program>) -> Result<()> {
        let Some(next) = next else { return self.instance.slot.slot_clear() };
        self.instance.slot.slot_set(next.as_fd()).map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => Error::IncompatibleProgram {
                program: next.name().to_owned(),
                id: next.id(),
                why: "its `xdp.frags` setting or XDP attach type differs from our stages' (section `xdp.frags`)",
            },
            _ => self.instance.slot.error("fill the slot", error),
        })
    }
}

impl Pipeline {
    /// A chain of these stages, in this order, attached nowhere yet.
    ///
    /// # Errors
    /// [`Error::Pipeline`] when there is none, a name stands twice or there are more than 32.
    pub fn new(stages: &[&dyn Stage]) -> Result<Self> {
        let cores: Vec<&StageCore> = stages.iter().map(|stage| stage.core()).collect();
        Self::of_cores(&cores)
    }

    pub(crate) fn of_cores(cores: &[&StageCore]) -> Result<Self> {
        let shared: Vec<_> = cores.iter().map(|core| Arc::clone(&core.shared)).collect();
        let names: Vec<&str> = shared.iter().map(|stage| stage.name.as_str()).collect();
        check_chain(&names, false)?;
        Ok(Self { attached: None, members: fresh_chain(&shared, None)?, last: None, grace: None })
    }

    /// The names of the stages, in order.
    #[must_use]
    pub fn stages(&self) -> Vec<&str> {
        self.members.iter().map(Member::name).collect()
    }

    /// The interface that it was attached to last, by the name that it had then. Whether it is there, [`Pipeline::loss`]
    /// tells.
    #[must_use]
    pub fn interface(&self) -> Option<&Interface> {
        self.attached.as_ref().map(Attached::interface)
    }

    /// The mode in which an interface runs the chain. `None` when none does: it was not attached, the interface is gone, or
    /// another program has taken its place.
    #[must_use]
    pub fn mode(&self) -> Option<XdpMode> {
        self.attached.as_ref().filter(|attached| attached.check().is_ok()).map(|attached| attached.mode)
    }

    /// With [`XdpMode::Auto`], why the interface is guarded in generic mode rather than in native mode
    /// ([`Error::ModeRefused`]); `None` in native mode, in a mode that was asked for, and after a take-over.
    #[must_use]
    pub fn fallback(&self) -> Option<&Error> {
        self.attached.as_ref()?.fallback.as_ref()
    }

    /// Frames that a program of this interface has sent back or redirected (counted as forwarded), and that were lost on the way
    /// out all the same: the other device could not transmit them, or was full. Since it was attached by this process; of
    /// `XDP_TX` only with drivers that tell (`xdp_bulk_tx`: veth). `None` where the kernel does not let this process look
    /// (raw tracepoints: `CAP_PERFMON`, and a kernel with BTF).
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn redirect_failed(&self) -> Result<Option<u64>> {
        self.attached.as_ref().map_or(Ok(None), Attached::redirect_failed)
    }

    /// Whether an earlier process's attachment was taken over from its pins.
    #[must_use]
    pub fn adopted(&self) -> bool {
        self.attached.as_ref().is_some_and(|attached| attached.adopted)
    }

    /// Runs the whole chain on one frame, without any interface. See [`Stage::test_run`].
    ///
    /// # Errors
    /// [`Error::TestRun`].
    pub fn test_run(&self, frame: &[u8]) -> Result<Verdict> {
        self.run(&TestRun::new(frame))
    }

    /// Runs the whole chain as [`Pipeline::test_run`] does, with options.
    ///
    /// # Errors
    /// [`Error::TestRun`].
    pub fn run(&self, request: &TestRun<'_>) -> Result<Verdict> {
        match self.attached {
            Some(_) => request.run_as_it_is(&self.members[0].instance.program),
            None => request.run(self.members.iter().map(|member| &member.instance)),
        }
    }

    /// The first program, for test runs by other means. Changes with edits at the front.
    #[must_use]
    pub fn program_fd(&self) -> BorrowedFd<'_> {
        self.members[0].fd()
    }

    /// Whether the interface is still there and runs this chain.
    ///
    /// # Errors
    /// [`Error::Interface`] when the kernel does not tell.
    pub fn is_attached(&self) -> Result<bool> {
        Ok(self.attached.is_some() && matches!(self.loss()?, None | Some(Loss::Unpinned { .. })))
    }

    /// Whether another process has taken over the interface, or the tables of a stage, for good: edits return
    /// [`Error::Superseded`] from then on.
    ///
    /// # Errors
    /// [`Error::Interface`] when the kernel does not tell.
    pub fn is_superseded(&self) -> Result<bool> {
        if self.members.iter().any(|member| member.shared.owner.is_superseded()) {
            return Ok(true);
        }
        Ok(matches!(self.loss()?, Some(Loss::Superseded { .. })))
    }

    /// What keeps packets of the interface from this chain, as the kernel tells at this moment; `None` when all is well, and
    /// for a pipeline that was not attached.
    ///
    /// # Errors
    /// [`Error::Interface`] when the kernel does not tell.
    pub fn loss(&self) -> Result<Option<Loss>> {
        self.attached.as_ref().map_or(Ok(None), Attached::loss)
    }

    /// Waits for a loss: see [`Watch`].
    ///
    /// # Errors
    /// [`Error::Pipeline`] when it was not attached; [`Error::Interface`] when the kernel refuses to notify.
    pub fn watch(&self) -> Result<Watch> {
        match &self.attached {
            Some(attached) => attached.watch(),
            None => Err(Error::Pipeline { what: "it is not attached: there is nothing to watch".into() }),
        }
    }

    fn index(&self, name: &str) -> Result<usize> {
        let found = self.members.iter().position(|member| member.name() == name);
        found.ok_or_else(|| Error::UnknownStage {
            stage: name.to_owned(),
            chain: self.stages().into_iter().map(str::to_owned).collect(),
        })
    }

    fn program_at(&self, at: usize) -> Option<&Program> {
        self.members.get(at).map(|member| &member.instance.program).or(self.last.as_ref())
    }

    fn pins(&self) -> Option<&InterfacePins> {
        self.attached.as_ref()?.pins.as_ref()
    }

    /// Locks the pins, and makes sure that what runs is still this chain.
    fn begin_edit(&mut self) -> Result<Option<File>> {
        self.refuse_superseded()?;
        let Some(attached) = &self.attached else { return Ok(None) };
        // The pins of a dead chain may be gone: that it is dead says more.
        attached.check()?;
        let Some(pins) = &attached.pins else { return Ok(None) };
        let lock = pins.lock()?;
        attached.check()?;
        // Another chain of this process with the same stages is found by the check.
        if attached.other_program()?.is_some() {
            self.take_back()?;
        }
        Ok(Some(lock))
    }

    fn refuse_superseded(&self) -> Result<()> {
        for member in &self.members {
            if member.shared.owner.refuses_edits()? {
                return Err(member.shared.owner.superseded());
            }
        }
        Ok(())
    }

    /// A new member that already names its successor, the program now at `next`, and is pinned.
    fn prepare(&self, core: &StageCore, next: usize, undo: &mut Undo) -> Result<Member> {
        let mut member = Member::new(&core.shared)?;
        self.follow_host(std::slice::from_ref(&member))?;
        if let Some(next) = self.program_at(next) {
            member.point_to(Some(next))?;
        }
        self.pin_member(&mut member, undo)?;
        Ok(member)
    }

    fn follow_host(&self, members: &[Member]) -> Result<()> {
        self.attached.as_ref().map_or(Ok(()), |attached| attached.follow_host(members))
    }

    fn pin_member(&self, member: &mut Member, undo: &mut Undo) -> Result<()> {
        if let Some(pins) = self.pins() {
            pins.stage(&member.shared, undo)?;
            member.pin = Some(pins.member(&member.shared.name, &member.instance, undo)?);
        }
        Ok(())
    }

    /// Sends packets to a prepared member instead of to what stands at `at`.
    fn redirect_to(&mut self, at: usize, member: Member) -> Result<()> {
        match at {
            0 => self.set_head(&member)?,
            _ => self.members[at - 1].point_to(Some(&member.instance.program))?,
        }
        self.members.insert(at, member);
        self.tell_watches();
        Ok(())
    }

    fn tell_watches(&self) {
        if let Some(attached) = &self.attached {
            attached.set_stages(&self.members);
        }
    }

    fn set_head(&self, head: &Member) -> Result<()> {
        let Some(attached) = &self.attached else { return Ok(()) };
        attached.set_program(self.members[0].fd(), &head.instance.program)
    }

    /// Lets go of members that packets are no longer sent to, once none is inside them any more.
    fn retire(&mut self, members: Vec<Member>) -> Result<()> {
        self.tell_watches();
        if self.attached.is_none() {
            members.into_iter().for_each(Member::recycle);
            return Ok(());
        }
        if let Err(error) = self.wait_for_readers() {
            // Their slots must not empty under a packet: rather keep them for the life of the process.
            std::mem::forget(members);
            return Err(error);
        }
        for path in members.iter().filter_map(|member| member.pin.as_deref()) {
            match std::fs::remove_dir_all(path) {
                // Somebody has removed them.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                done => {
                    done.map_err(|cause| Error::Pin { path: path.to_owned(), operation: "remove the pins", cause })?
                }
            }
        }
        members.into_iter().for_each(Member::recycle);
        Ok(())
    }

    fn wait_for_readers(&mut self) -> Result<()> {
        let fail =
            |cause: io::Error| Error::Map { map: "grace_outer".into(), operation: "wait for a grace period", cause };
        if self.grace.is_none() {
            self.grace = Some(GracePeriod::new().map_err(fail)?);
        }
        self.grace.as_ref().map_or(Ok(()), GracePeriod::wait).map_err(fail)
    }
}

/// New instances, each with its successor in its slot, from the end backwards.
fn fresh_chain(stages: &[Arc<Shared>], last: Option<&Program>) -> Result<Vec<Member>> {
    let members = stages.iter().map(Member::new).collect::<Result<Vec<_>>>()?;
    for (at, member) in members.iter().enumerate().rev() {
        if let Some(next) = members.get(at + 1).map(|next| &next.instance.program).or(last) {
            member.point_to(Some(next))?;
        }
    }
    Ok(members)
}

fn unreadable(interface: &Interface, cause: io::Error) -> Error {
    Error::Interface { interface: interface.name().to_owned(), operation: "read or change its link", cause }
}

fn check_chain(names: &[&str], with_last: bool) -> Result<()> {
    if names.is_empty() {
        return Err(Error::Pipeline { what: "it needs at least one stage".into() });
    }
    if let Some(name) = names.iter().enumerate().find_map(|(at, name)| names[..at].contains(name).then_some(name)) {
        let what = format!("two stages are named `{name}`: give each value a name of its own");
        return Err(Error::Pipeline { what });
    }
    if names.len() + usize::from(with_last) > PROGRAMS_MAX {
        let what = format!(
            "{} programs are too many: at most {PROGRAMS_MAX} fit a chain",
            names.len() + usize::from(with_last)
        );
        return Err(Error::Pipeline { what });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys;

    #[test]
    fn chains_have_unique_names_and_a_length() {
        check_chain(&["a", "b"], true).unwrap();
        let refused = |names: &[&str], last| check_chain(names, last).unwrap_err().to_string();
        assert!(refused(&[], false).contains("at least one stage"));
        assert!(refused(&["a", "b", "a"], false).contains("two stages are named `a`"));
        let many: Vec<String> = (0..32).map(|n| format!("s{n}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        check_chain(&many, false).unwrap();
        assert!(refused(&many, true).contains("33 programs are too many"));
    }

    /// Needs root. The order of these steps is what keeps a packet that is inside a stage from falling out of the
    /// chain; the window is too short for traffic to show it.
    #[test]
    fn what_packets_may_be_inside_of_is_let_go_only_after_a_grace_period() {
        use xdpkit_lab::topology::Pair;

        use crate::{MonitorConfig, PacketMonitor};
        let stage = |name: &str| PacketMonitor::load(&MonitorConfig::default().name(name)).expect("needs root");
        let (a, b, c) = (stage("a"), stage("b"), stage("c"));
        let pair = Pair::new().unwrap();
        let mut chain = Pipeline::new(&[&a, &b]).unwrap();
        pair.server.run(|| chain.attach(&AttachOptions::new("eth0"))).unwrap();
        let waits = |edit: &mut dyn FnMut(&mut Pipeline)| {
            let before = sys::grace::WAITS.get();
            edit(&mut chain);
            sys::grace::WAITS.get() - before
        };
        let mut waits = waits;
        assert_eq!(waits(&mut |chain| chain.insert(Position::First, &c).unwrap()), 0, "nothing was let go");
        assert_eq!(waits(&mut |chain| chain.remove("b").unwrap()), 1);
        assert_eq!(waits(&mut |chain| chain.replace("a", &b).unwrap()), 1);
        assert_eq!(waits(&mut |chain| chain.reorder(&["b", "c"]).unwrap()), 1);
        assert_eq!(waits(&mut |chain| chain.set_last(Some(a.program_fd())).unwrap()), 0);
        assert_eq!(waits(&mut |chain| chain.set_last(None).unwrap()), 1);
        let before = sys::grace::WAITS.get();
        chain.detach().unwrap();
        assert_eq!(sys::grace::WAITS.get() - before, 1);
    }

    /// Needs root. Loading takes up to a second a program.
    #[test]
    fn no_program_is_loaded_that_is_at_hand() {
        use xdpkit_lab::{frame::Frame, topology::Pair};

        use crate::{MonitorConfig, PacketMonitor};
        let loads = |work: &mut dyn FnMut()| {
            let before = sys::object::LOADS.get();
            work();
            sys::object::LOADS.get() - before
        };
        let stage = |name: &str| PacketMonitor::load(&MonitorConfig::default().name(name)).expect("needs root");
        let pair = Pair::new().unwrap();
        let (a, b) = (stage("a"), stage("b"));
        let mut chain = None;
        assert_eq!(loads(&mut || chain = Some(Pipeline::new(&[&a, &b]).unwrap())), 0, "as they were loaded");
        let mut chain = chain.unwrap();
        pair.server.run(|| chain.attach(&AttachOptions::new("eth0"))).unwrap();
        assert_eq!(loads(&mut || chain.reorder(&["b", "a"]).unwrap()), 2, "the old chain runs until then");
        assert_eq!(loads(&mut || chain.reorder(&["a", "b"]).unwrap()), 0, "from the chain before");
        let frame = Frame::udp("10.0.0.2:1".parse().unwrap(), "10.0.0.1:2".parse().unwrap()).build();
        // What one was let go of is taken for test runs: it has no successor any more.
        assert_eq!(loads(&mut || drop(a.test_run(&frame).unwrap())), 0);
        assert_eq!(loads(&mut || drop(a.test_run(&frame).unwrap())), 0, "the same as before");
        assert_eq!(
            (a.protocols().unwrap().udp.packets, b.protocols().unwrap().udp.packets),
            (2, 0),
            "it leads nowhere"
        );
        assert_eq!(loads(&mut || chain.reorder(&["b", "a"]).unwrap()), 1, "there was one of `b`");
        chain.detach().unwrap();
        let mut fresh = None;
        assert_eq!(loads(&mut || fresh = Some(Pipeline::new(&[&a, &b]).unwrap())), 0);
    }
}
