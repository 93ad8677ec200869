//! Chains of stages on one interface, edited while packets flow.

use std::{
    fs::File,
    io,
    os::fd::{AsFd as _, BorrowedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    AttachOptions, Error, Interface, Result, Stage, TestRun, Verdict, XdpMode,
    pin::{InterfacePins, Undo},
    stage::{Instance, Shared, StageCore},
    sys::{self, grace::GracePeriod, link::Link, program::Program},
};

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

#[derive(Debug)]
struct Attached {
    link: Link,
    interface: Interface,
    mode: XdpMode,
    adopted: bool,
    pins: Option<InterfacePins>,
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

    /// The interface, once attached.
    #[must_use]
    pub fn interface(&self) -> Option<&Interface> {
        self.attached.as_ref().map(|attached| &attached.interface)
    }

    /// The mode that was chosen, once attached.
    #[must_use]
    pub fn mode(&self) -> Option<XdpMode> {
        self.attached.as_ref().map(|attached| attached.mode)
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
        request.run(&self.members[0].instance.program)
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
        let Some(attached) = &self.attached else { return Ok(false) };
        let info = attached.link.info().map_err(|cause| unreadable(&attached.interface, cause))?;
        Ok(info.interface != 0 && info.program == self.members[0].instance.program.id())
    }

    /// Attaches to an interface; at most once. With [`AttachOptions::pin`], a chain that an earlier process
    /// pinned for this interface is swapped for this one in one step; a last program pinned there goes on
    /// unless this pipeline has its own.
    ///
    /// # Errors
    /// As [`Stage::attach`], and [`Error::StagesLost`]. After an error the pipeline is as before, and so is what
    /// was pinned.
    pub fn attach(&mut self, options: &AttachOptions) -> Result<()> {
        if let Some(attached) = &self.attached {
            let what = format!("it is attached to `{}` already; one pipeline guards one interface", attached.interface);
            return Err(Error::Pipeline { what });
        }
        let interface = options.interface()?;
        let Some(directory) = options.pin_directory() else {
            let (link, mode) = options.link(&interface, self.members[0].fd())?;
            self.attached = Some(Attached { link, interface, mode, adopted: false, pins: None });
            return Ok(());
        };
        let pins = InterfacePins::new(directory, &interface)?;
        let _lock = pins.lock()?;
        pins.remove_dead()?;
        let done = match pins.link()? {
            Some(link) => self.take_over(options, link, interface, pins),
            None => self.attach_pinned(options, interface, pins),
        };
        if done.is_err() {
            self.members.iter_mut().for_each(|member| member.pin = None);
        }
        done
    }

    fn attach_pinned(&mut self, options: &AttachOptions, interface: Interface, pins: InterfacePins) -> Result<()> {
        // Remnants of an attachment that never came about.
        pins.remove()?;
        let mut undo = Undo::default();
        undo.add(pins.path().to_owned());
        self.pin_members(&pins, &mut undo)?;
        let (link, mode) = options.link(&interface, self.members[0].fd())?;
        pins.put_link(&link)?;
        undo.keep();
        self.attached = Some(Attached { link, interface, mode, adopted: false, pins: Some(pins) });
        Ok(())
    }

    /// Swaps the chain that is pinned for this one.
    fn take_over(
        &mut self,
        options: &AttachOptions,
        link: Link,
        interface: Interface,
        pins: InterfacePins,
    ) -> Result<()> {
        let mismatch = |what: &str, found: String, expected: String| Error::PinMismatch {
            path: pins.path().join("link"),
            what: what.into(),
            found,
            expected,
        };
        let now = link.info().map_err(|cause| unreadable(&interface, cause))?;
        let state = sys::net::xdp_state(interface.index()).map_err(|cause| unreadable(&interface, cause))?;
        if now.interface != interface.index() || !state.programs.contains(&now.program) {
            let found = format!("interface {} of another network namespace", now.interface);
            return Err(mismatch(
                "what the link is attached to",
                found,
                format!("`{interface}` ({})", interface.index()),
            ));
        }
        let chain = pins.chain(now.program)?;
        let Some(old) = pins.program(now.program)? else {
            return Err(mismatch("the program that runs", now.program.to_string(), "one that is pinned beside".into()));
        };
        let names = self.stages();
        let lost: Vec<String> = chain.stages.into_iter().filter(|name| !names.contains(&name.as_str())).collect();
        if !lost.is_empty() && !options.may_drop_stages() {
            return Err(Error::StagesLost { path: pins.path().to_owned(), stages: lost });
        }
        let kept = match chain.last {
            Some(id) if self.last.is_none() => Some(pins.last(id)?),
            _ => None,
        };
        let end = self.members.len() - 1;
        if kept.is_some() {
            self.members[end].point_to(kept.as_ref())?;
        }
        let mut undo = Undo::default();
        let swapped = self.pin_members(&pins, &mut undo).and_then(|()| {
            link.replace(old.as_fd(), self.members[0].fd()).map_err(|cause| unreadable(&interface, cause))
        });
        if let Err(error) = swapped {
            if kept.is_some() {
                self.members[end].point_to(None)?;
            }
            return Err(error);
        }
        undo.keep();
        self.last = kept.or(self.last.take());
        let mode = match state.programs {
            [generic, _, _] if generic == now.program => XdpMode::Generic,
            [_, _, offload] if offload == now.program => XdpMode::Offload,
            _ => XdpMode::Native,
        };
        // Packets may still be under way in the old chain, whose slots live by their pins. Where we cannot wait for
        // them, or not sweep, the next take-over will.
        if self.wait_for_readers().is_ok() {
            let _ = pins.sweep(&self.pinned_paths(), self.last.as_ref().map(Program::id));
        }
        self.attached = Some(Attached { link, interface, mode, adopted: true, pins: Some(pins) });
        Ok(())
    }

    fn pin_members(&mut self, pins: &InterfacePins, undo: &mut Undo) -> Result<()> {
        for member in &mut self.members {
            pins.stage(&member.shared, undo)?;
            member.pin = Some(pins.member(&member.shared.name, &member.instance, undo)?);
        }
        self.last.as_ref().map_or(Ok(()), |last| pins.put_last(last, undo))
    }

    fn pinned_paths(&self) -> Vec<&Path> {
        self.members.iter().filter_map(|member| member.pin.as_deref()).collect()
    }

    /// Adds a stage while packets flow.
    ///
    /// # Errors
    /// [`Error::UnknownStage`], [`Error::Pipeline`] when the name is taken or the chain too long, and
    /// whatever loading and pinning answers. The chain is then as before.
    pub fn insert(&mut self, position: Position<'_>, stage: &dyn Stage) -> Result<()> {
        let at = match position {
            Position::First => 0,
            Position::Last => self.members.len(),
            Position::Before(name) => self.index(name)?,
            Position::After(name) => self.index(name)? + 1,
        };
        let mut names = self.stages();
        names.insert(at, stage.name());
        check_chain(&names, self.last.is_some())?;
        let _lock = self.begin_edit()?;
        let mut undo = Undo::default();
        let member = self.prepare(stage.core(), at, &mut undo)?;
        self.redirect_to(at, member)?;
        undo.keep();
        Ok(())
    }

    /// Takes a stage out while packets flow, and returns when no CPU runs it any more.
    ///
    /// # Errors
    /// [`Error::UnknownStage`]; [`Error::Pipeline`] for the only stage.
    pub fn remove(&mut self, name: &str) -> Result<()> {
        let at = self.index(name)?;
        if self.members.len() == 1 {
            return Err(Error::Pipeline { what: format!("`{name}` is its only stage: detach it instead") });
        }
        let _lock = self.begin_edit()?;
        if at == 0 {
            self.set_head(&self.members[1])?;
        } else {
            self.members[at - 1].point_to(self.program_at(at + 1))?;
        }
        let removed = self.members.remove(at);
        self.retire(vec![removed])
    }

    /// Puts another stage in the place of one while packets flow: each packet meets one or the other.
    ///
    /// # Errors
    /// As [`Pipeline::insert`].
    pub fn replace(&mut self, name: &str, stage: &dyn Stage) -> Result<()> {
        let at = self.index(name)?;
        let mut names = self.stages();
        names[at] = stage.name();
        check_chain(&names, self.last.is_some())?;
        let _lock = self.begin_edit()?;
        let mut undo = Undo::default();
        let member = self.prepare(stage.core(), at + 1, &mut undo)?;
        self.redirect_to(at, member)?;
        undo.keep();
        let replaced = self.members.remove(at + 1);
        self.retire(vec![replaced])
    }

    /// Brings the stages into another order while packets flow: each packet meets all of them in the old
    /// order or in the new one.
    ///
    /// # Errors
    /// [`Error::Pipeline`] unless `names` holds exactly the names of [`Pipeline::stages`].
    pub fn reorder(&mut self, names: &[&str]) -> Result<()> {
        let (mut wanted, mut have) = (names.to_vec(), self.stages());
        wanted.sort_unstable();
        have.sort_unstable();
        if wanted != have {
            let what =
                format!("the order `{}` must name each of its stages once: {}", names.join(", "), have.join(", "));
            return Err(Error::Pipeline { what });
        }
        let mut shared = Vec::new();
        for name in names {
            shared.push(Arc::clone(&self.members[self.index(name)?].shared));
        }
        self.swap_chain(&shared)
    }

    /// Puts these stages in the place of all while packets flow: each packet meets the old chain or the new one. A
    /// last program of the caller's own stays. When nothing would change, nothing is done.
    ///
    /// # Errors
    /// As [`Pipeline::new`] and [`Pipeline::insert`]. The chain is then as before.
    pub fn set_stages(&mut self, stages: &[&dyn Stage]) -> Result<()> {
        let shared: Vec<_> = stages.iter().map(|stage| Arc::clone(&stage.core().shared)).collect();
        let names: Vec<&str> = shared.iter().map(|stage| stage.name.as_str()).collect();
        check_chain(&names, self.last.is_some())?;
        let same = |(new, old): (&Arc<Shared>, &Member)| Arc::ptr_eq(new, &old.shared);
        if shared.len() == self.members.len() && shared.iter().zip(&self.members).all(same) {
            return Ok(());
        }
        self.swap_chain(&shared)
    }

    /// Builds a chain aside and swaps the head.
    fn swap_chain(&mut self, shared: &[Arc<Shared>]) -> Result<()> {
        let _lock = self.begin_edit()?;
        let mut fresh = fresh_chain(shared, self.last.as_ref())?;
        let mut undo = Undo::default();
        for member in &mut fresh {
            self.pin_member(member, &mut undo)?;
        }
        self.set_head(&fresh[0])?;
        undo.keep();
        let old = std::mem::replace(&mut self.members, fresh);
        self.retire(old)
    }

    /// Ends the chain in an XDP program of the caller's own, or with `None` in the network stack. The
    /// program must be of section `xdp.frags`, as our stages are. While packets flow, too.
    ///
    /// The kernel follows at most 33 tail calls a packet, and lets one go on past the next: a program that makes
    /// tail calls itself must leave the chain enough of them.
    ///
    /// # Errors
    /// [`Error::IncompatibleProgram`] says what differs; the chain is then as before. After any other error the
    /// chain may end in either program.
    pub fn set_last(&mut self, program: Option<BorrowedFd<'_>>) -> Result<()> {
        let unreadable =
            |cause| Error::Program { program: "last".into(), operation: "duplicate its descriptor", cause };
        let program = match program {
            Some(fd) => Some(Program::from_fd(fd.try_clone_to_owned().map_err(unreadable)?)?),
            None => None,
        };
        if let Some(own) =
            program.as_ref().filter(|own| self.members.iter().any(|m| m.instance.program.id() == own.id()))
        {
            let (program, id) = (own.name().to_owned(), own.id());
            return Err(Error::IncompatibleProgram {
                program,
                id,
                why: "it is a stage of this chain: packets would go in circles",
            });
        }
        check_chain(&self.stages(), program.is_some())?;
        let _lock = self.begin_edit()?;
        let mut undo = Undo::default();
        if let (Some(pins), Some(last)) = (self.pins(), &program) {
            pins.put_last(last, &mut undo)?;
        }
        self.members[self.members.len() - 1].point_to(program.as_ref())?;
        undo.keep();
        let Some(old) = std::mem::replace(&mut self.last, program) else { return Ok(()) };
        if let Some(pins) = self.pins().filter(|_| self.last.as_ref().is_none_or(|last| last.id() != old.id())) {
            pins.remove_last(old.id())?;
        }
        self.wait_for_readers()
    }

    /// Detaches, also when pinned: the link and its pins go, the pins of the stages' tables stay.
    ///
    /// # Errors
    /// [`Error::Interface`], [`Error::Pin`], or [`Error::Superseded`] when another process has taken over:
    /// then nothing was done.
    pub fn detach(mut self) -> Result<()> {
        let _lock = self.begin_edit()?;
        let Some(attached) = self.attached.take() else { return Ok(()) };
        let fail = |cause| Error::Interface {
            interface: attached.interface.name().to_owned(),
            operation: "detach from it",
            cause,
        };
        // The link's pin first: if we die here, the link dies with us, and no dead link stays pinned.
        if let Some(pins) = &attached.pins {
            pins.remove_link()?;
        }
        attached.link.detach().map_err(fail)?;
        // Packets that are inside the chain still get to its end.
        let waited = self.wait_for_readers();
        if let Some(pins) = &attached.pins {
            pins.remove()?;
        }
        waited
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
    fn begin_edit(&self) -> Result<Option<File>> {
        let Some(attached) = &self.attached else { return Ok(None) };
        let lock = attached.pins.as_ref().map(InterfacePins::lock).transpose()?;
        let info = attached.link.info().map_err(|cause| unreadable(&attached.interface, cause))?;
        let expected = self.members[0].instance.program.id();
        if info.program != expected {
            let interface = attached.interface.name().to_owned();
            return Err(Error::Superseded { interface, expected, found: info.program });
        }
        Ok(lock)
    }

    /// A new member that already names its successor, the program now at `next`, and is pinned.
    fn prepare(&self, core: &StageCore, next: usize, undo: &mut Undo) -> Result<Member> {
        let mut member = Member::new(&core.shared)?;
        if let Some(next) = self.program_at(next) {
            member.point_to(Some(next))?;
        }
        self.pin_member(&mut member, undo)?;
        Ok(member)
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
        Ok(())
    }

    fn set_head(&self, head: &Member) -> Result<()> {
        let Some(attached) = &self.attached else { return Ok(()) };
        attached.link.replace(self.members[0].fd(), head.fd()).map_err(|cause| Error::Interface {
            interface: attached.interface.name().to_owned(),
            operation: "swap its first program",
            cause,
        })
    }

    /// Lets go of members that packets are no longer sent to, once none is inside them any more.
    fn retire(&mut self, members: Vec<Member>) -> Result<()> {
        if self.attached.is_none() {
            return Ok(());
        }
        if let Err(error) = self.wait_for_readers() {
            // Their slots must not empty under a packet: rather keep them for the life of the process.
            std::mem::forget(members);
            return Err(error);
        }
        for path in members.iter().filter_map(|member| member.pin.as_deref()) {
            let failed = |cause| Error::Pin { path: path.to_owned(), operation: "remove the pins", cause };
            std::fs::remove_dir_all(path).map_err(failed)?;
        }
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
}
