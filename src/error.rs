//! The one error type: each variant names the object that it is about.

mod message;

use std::{io, path::PathBuf};

use message::{
    above, bytes_text, exposed, hidden_bpffs, holder_of, in_cgroup, lines, named, of_libxdp, of_setting, pin_advice,
    place,
};

use crate::XdpMode;

/// What an operation of this crate answers.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong. The message names the object (interface, program, map, pin, rule), the
/// value and what was expected; where the kernel said something, it is the error's `cause`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The process lacks a capability (capabilities(7)).
    #[error("{operation} needs {capability}, which this process lacks: run as root or grant the capability")]
    MissingCapability {
        /// What was tried.
        operation: String,
        /// The names of the capabilities that are missing.
        capability: String,
    },
    /// Something else than capabilities forbids it: a user namespace, a seccomp filter, a security module.
    #[error("{operation} was forbidden although this process has the capabilities: {by} ({cause})")]
    Forbidden {
        /// What was tried.
        operation: String,
        /// What forbids it, as far as `/proc/self/status` and `/proc/self/uid_map` tell, and the way out.
        by: String,
        /// The kernel's answer.
        cause: io::Error,
    },
    /// The running kernel is older than what the operation needs.
    #[error("{feature} needs Linux {needs} or newer, this is {found}")]
    KernelTooOld {
        /// What was tried.
        feature: String,
        /// The first kernel that has it, as `major.minor`.
        needs: &'static str,
        /// The running kernel's release.
        found: String,
    },
    /// There is no such interface in this network namespace.
    #[error("no interface `{interface}` in this network namespace")]
    UnknownInterface {
        /// The name or index that was asked for.
        interface: String,
    },
    /// Frames of this interface have no Ethernet header (TUN, WireGuard, PPP, IP-in-IP, SIT, GRE), so that programs would take
    /// other bytes for it: a guard there would pass what it should drop.
    #[error(
        "interface `{interface}` has no Ethernet header ({link_type}): XDP programs here parse Ethernet frames and would \
         misread its packets; attach to the Ethernet interface that they come in by"
    )]
    NotEthernet {
        /// The interface.
        interface: String,
        /// Its link type (`ARPHRD_*`) by name and number, and the kind of its driver.
        link_type: String,
    },
    /// The interface or its driver refuses this attach mode. [`XdpMode::Auto`] falls back to generic mode then.
    #[error("interface `{interface}` refuses XDP in {mode} mode ({hint}): {cause}")]
    ModeRefused {
        /// The interface.
        interface: String,
        /// The mode that was asked for.
        mode: XdpMode,
        /// What the kernel says of it, as far as it does; the values that matter (queues, MTU, offloads, members), and the
        /// way out.
        hint: String,
        /// The kernel's answer.
        cause: io::Error,
    },
    /// Another XDP program holds the interface. It is never replaced or removed.
    #[error(
        "interface `{interface}`{} already runs XDP program {program_id}{}, which is not ours to replace{}",
        above(member),
        named(program),
        of_libxdp(program)
    )]
    ForeignProgram {
        /// The interface.
        interface: String,
        /// Its member that was to be attached to, where the program runs on a bridge or bond: the kernel takes programs
        /// there or at the members, not both.
        member: Option<String>,
        /// The kernel's id of that program (`bpftool prog show id N`).
        program_id: u32,
        /// Its name, as far as the kernel keeps it; empty where the kernel does not tell (which takes `CAP_SYS_ADMIN`).
        /// `xdp_dispatcher` is libxdp's, see [`operations`](crate::operations).
        program: String,
    },
    /// The kernel could not attach to or query an interface.
    #[error("interface `{interface}`: cannot {operation}: {cause}")]
    Interface {
        /// The interface.
        interface: String,
        /// What was tried.
        operation: &'static str,
        /// The kernel's answer.
        cause: io::Error,
    },
    /// The kernel's verifier rejected a program, although no capability is missing. Please report it, with the log.
    #[error("the verifier rejected program `{program}`: {cause}\n{log}")]
    Verifier {
        /// The program.
        program: String,
        /// The end of the verifier's log.
        log: String,
        /// The kernel's answer.
        cause: io::Error,
    },
    /// There is not enough memory for a map.
    #[error(
        "map `{map}` of program `{program}` needs {} for {entries} entries, which the kernel does not give ({cause}): ask \
         for less{}{}",
        bytes_text(*bytes),
        of_setting(setting),
        in_cgroup(memory_limit)
    )]
    NoMemory {
        /// The program.
        program: String,
        /// The map.
        map: String,
        /// The settings of the configuration that size it, as they are called there; empty for a map of a fixed size.
        setting: &'static str,
        /// How many entries it was to have.
        entries: u32,
        /// Bytes that they take, without the kernel's own bookkeeping.
        bytes: u64,
        /// The memory control group that limits this process, and to how many bytes.
        memory_limit: Option<(String, u64)>,
        /// The kernel's answer.
        cause: io::Error,
    },
    /// A program and its maps could not be created.
    #[error("cannot load program `{program}`: {cause}{}", lines(log))]
    Load {
        /// The program.
        program: String,
        /// What libbpf says of it; may be empty.
        log: String,
        /// The kernel's answer.
        cause: io::Error,
    },
    /// An operation on a program failed.
    #[error("program `{program}`: cannot {operation}: {cause}")]
    Program {
        /// The program.
        program: String,
        /// What was tried.
        operation: &'static str,
        /// The kernel's answer.
        cause: io::Error,
    },
    /// An operation on a map failed.
    #[error("map `{map}`: cannot {operation}: {cause}")]
    Map {
        /// The map.
        map: String,
        /// What was tried.
        operation: &'static str,
        /// The kernel's answer.
        cause: io::Error,
    },
    /// A table holds as many entries as it was made for. Nothing was changed by the refused entry.
    #[error("map `{map}` is full: it holds {capacity} entries; `{entry}` was refused")]
    Full {
        /// The map.
        map: String,
        /// Its capacity in entries.
        capacity: u32,
        /// What did not fit.
        entry: String,
    },
    /// Two rules of one list are about the same packets and say different things.
    #[error("`{selector}` has two rules in one list: {first} and {second}")]
    Conflict {
        /// What both are about.
        selector: String,
        /// One of them.
        first: String,
        /// The other.
        second: String,
    },
    /// Too many rules would have to be asked for one packet. Nothing was changed.
    #[error("`{selector}`: a packet from there would have to be compared with more than {limit} rules")]
    TooManyRules {
        /// The rule that was refused.
        selector: String,
        /// The most that are possible.
        limit: usize,
    },
    /// A balancer has no such service.
    #[error("there is no service `{service}`")]
    UnknownService {
        /// The service.
        service: String,
    },
    /// A balancer has this service already.
    #[error("service `{service}` exists already")]
    ServiceExists {
        /// The service.
        service: String,
    },
    /// A service has no such backend, or it is leaving already.
    #[error("service `{service}` has no backend `{backend}`")]
    UnknownBackend {
        /// The service.
        service: String,
        /// The backend.
        backend: String,
    },
    /// The kernel's routes could not be read.
    #[error("cannot look up the route to {address}: {cause}")]
    Route {
        /// The address.
        address: std::net::IpAddr,
        /// The kernel's answer.
        cause: io::Error,
    },
    /// A list waits for its confirmation; until then, the rules cannot be changed.
    #[error("the rules of `{stage}` wait for a confirmation and cannot be changed before")]
    ListPending {
        /// The stage.
        stage: String,
    },
    /// The confirmation came too late: the earlier list is in force again.
    #[error("the rules of `{stage}` were not confirmed in time: the earlier list is in force again")]
    NotConfirmed {
        /// The stage.
        stage: String,
    },
    /// A pin in a BPF file system could not be read or written.
    #[error("pin {}: cannot {operation}: {cause}{}", path.display(), pin_advice(path, cause))]
    Pin {
        /// The path.
        path: PathBuf,
        /// What was tried.
        operation: &'static str,
        /// The kernel's answer.
        cause: io::Error,
    },
    /// The directory is not in a BPF file system, so nothing can be pinned there.
    #[error(
        "{} is not in a BPF file system: mount one with `mount -t bpf bpf DIR`{}",
        path.display(),
        hidden_bpffs(path)
    )]
    NotBpfFs {
        /// The path.
        path: PathBuf,
    },
    /// Another user owns a directory of pins or may write to it, and could put something else in the place of what is pinned.
    #[error(
        "directory of pins {} {}: another user could exchange what is pinned there; it must belong to user {user} or root \
         and be writable by its owner only (`chown {user} DIR`, `chmod 700 DIR`), or the program run as its owner",
        path.display(),
        exposed(*owner, *mode, *user)
    )]
    PinsExposed {
        /// The directory.
        path: PathBuf,
        /// The user that owns it.
        owner: u32,
        /// Its permissions.
        mode: u32,
        /// The user that this process is.
        user: u32,
    },
    /// There is nothing to adopt at this path.
    #[error("nothing is pinned at {}", path.display())]
    PinMissing {
        /// The path.
        path: PathBuf,
    },
    /// What is pinned does not fit this build or this value. It was left as it is.
    #[error("pin {}: {what} is {found}, but {expected} is expected: it was left untouched", path.display())]
    PinMismatch {
        /// The path.
        path: PathBuf,
        /// What differs.
        what: String,
        /// What the pin holds.
        found: String,
        /// What this build or value needs.
        expected: String,
    },
    /// A stage has another value of a setting than its configuration asks for, and the setting cannot change while the stage's
    /// tables live. Nothing was changed.
    #[error(
        "stage `{stage}`: it has `{setting}` {found}, and {expected} is asked for, which cannot change while its tables live: \
         ask for what it has, or for a stage of another name"
    )]
    PinnedSetting {
        /// The stage.
        stage: String,
        /// The setting, as it is called in the configuration.
        setting: &'static str,
        /// What the stage was made with.
        found: String,
        /// What the configuration asks for.
        expected: String,
    },
    /// Taking over a pinned chain would drop stages that guard the interface now. Nothing was changed.
    #[error(
        "the chain pinned at {} has the stages {}, which the new one lacks: adopt them, or allow it with `replace_chain`",
        path.display(),
        stages.join(", ")
    )]
    StagesLost {
        /// The pins of the interface.
        path: PathBuf,
        /// The stages that would go.
        stages: Vec<String>,
    },
    /// Another process has been changing what is pinned there for seconds, or is stopped in the middle of a change. Nothing
    /// was changed.
    #[error("pins at {} are locked by {}", path.display(), holder_of(*holder))]
    PinsLocked {
        /// The directory.
        path: PathBuf,
        /// The process that holds the lock, where it can be seen from here.
        holder: Option<u32>,
    },
    /// Another process has taken over what this value drives. Nothing was changed, and nothing can be changed by this value
    /// any more; reading goes on.
    #[error("{what} was taken over by another process: this value cannot change it any more")]
    Superseded {
        /// The stage or the interface.
        what: String,
    },
    /// Nothing runs this chain any more: its interface is gone, or another program has taken its link off. Nothing was
    /// changed. [`Pipeline::reattach`](crate::Pipeline::reattach) attaches it again.
    #[error("interface `{interface}` is gone, or another program has detached this chain from it: attach it again")]
    Detached {
        /// The interface.
        interface: String,
    },
    /// A program cannot stand in a chain with ours.
    #[error("program `{program}` (id {id}) cannot join the chain: {why}")]
    IncompatibleProgram {
        /// The program's name, as far as the kernel keeps it.
        program: String,
        /// The program's id.
        id: u32,
        /// What differs from our stages.
        why: &'static str,
    },
    /// A pipeline has no stage of this name.
    #[error("the pipeline has no stage `{stage}`: it holds {}", chain.join(", "))]
    UnknownStage {
        /// The name that was asked for.
        stage: String,
        /// The stages that there are, in order.
        chain: Vec<String>,
    },
    /// A pipeline would be wrong after this edit.
    #[error("pipeline: {what}")]
    Pipeline {
        /// What is wrong and what is expected.
        what: String,
    },
    /// A value is outside what is allowed.
    #[error("{what} `{value}`: expected {expected}")]
    Invalid {
        /// The parameter.
        what: &'static str,
        /// The value given.
        value: String,
        /// What is allowed.
        expected: &'static str,
    },
    /// A list file could not be read, or a line of it is wrong.
    #[error("{}: {}{problem}", path.display(), place(*line, text))]
    ListFile {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1; 0 when it is about the whole file.
        line: usize,
        /// The line's text.
        text: String,
        /// What is wrong, or what is expected.
        problem: String,
    },
    /// Events of this value are being read already: a ring buffer has one reader.
    #[error("the events of `{stage}` already have a reader")]
    EventsTaken {
        /// The stage.
        stage: String,
    },
    /// Threads could not be started.
    #[error("cannot start threads for {purpose}: {cause}")]
    Thread {
        /// What it is for.
        purpose: &'static str,
        /// The system's answer.
        cause: io::Error,
    },
    /// A packet of a test run could not be run.
    #[error("test run of program `{program}` with a frame of {length} bytes: {cause}")]
    TestRun {
        /// The program.
        program: String,
        /// The frame's length in bytes; the kernel wants at least 14.
        length: usize,
        /// The kernel's answer.
        cause: io::Error,
    },
}
