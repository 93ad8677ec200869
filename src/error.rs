//! The one error type: each variant names the object that it is about.

use std::{io, path::PathBuf};

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
    /// The interface or its driver refuses this attach mode.
    #[error("interface `{interface}` refuses XDP in {mode} mode ({hint}): {cause}")]
    ModeRefused {
        /// The interface.
        interface: String,
        /// The mode that was asked for.
        mode: XdpMode,
        /// What is usually the reason, and the way out.
        hint: &'static str,
        /// The kernel's answer.
        cause: io::Error,
    },
    /// Another XDP program holds the interface. It is never replaced or removed.
    #[error(
        "interface `{interface}` already runs XDP program {program_id}{}, which is not ours to replace{}",
        named(program),
        of_libxdp(program)
    )]
    ForeignProgram {
        /// The interface.
        interface: String,
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
    /// The kernel's verifier rejected a program. Please report it, with the log.
    #[error("the verifier rejected program `{program}`: {cause}\n{log}")]
    Verifier {
        /// The program.
        program: String,
        /// The end of the verifier's log.
        log: String,
        /// The kernel's answer.
        cause: io::Error,
    },
    /// A program and its maps could not be created.
    #[error("cannot load program `{program}`: {cause}")]
    Load {
        /// The program.
        program: String,
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
    #[error("pin {}: cannot {operation}: {cause}", path.display())]
    Pin {
        /// The path.
        path: PathBuf,
        /// What was tried.
        operation: &'static str,
        /// The kernel's answer.
        cause: io::Error,
    },
    /// The directory is not in a BPF file system, so nothing can be pinned there.
    #[error("{} is not in a BPF file system: mount one with `mount -t bpf bpf DIR`", path.display())]
    NotBpfFs {
        /// The path.
        path: PathBuf,
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
    /// What is pinned was made with another value of a setting that cannot change while it lives. It was left as it is.
    #[error(
        "stage `{stage}` pinned in {}: it has `{setting}` {found}, and {expected} is asked for, which cannot change: ask for \
         what it has, or for a stage of another name",
        path.display()
    )]
    PinnedSetting {
        /// The directory of pins.
        path: PathBuf,
        /// The stage.
        stage: String,
        /// The setting, as it is called in the configuration.
        setting: &'static str,
        /// What the stage was made with.
        found: String,
        /// What the configuration wants.
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
    /// Another process is editing these pins at this moment.
    #[error("pins at {} are being edited by another process, for seconds already", path.display())]
    PinsLocked {
        /// The directory.
        path: PathBuf,
    },
    /// Another process has taken over what this value had attached; this value may not edit it any more.
    #[error("interface `{interface}` now runs program {found}, not our {expected}: another process took over")]
    Superseded {
        /// The interface.
        interface: String,
        /// The id of the program that this value attached.
        expected: u32,
        /// The id of the program that runs now; 0 for none.
        found: u32,
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

fn named(program: &str) -> String {
    if program.is_empty() { String::new() } else { format!(" (`{program}`)") }
}

/// What libxdp attaches for others.
const DISPATCHER: &str = "xdp_dispatcher";

fn of_libxdp(program: &str) -> &'static str {
    match program {
        DISPATCHER => {
            ": it is libxdp's dispatcher, which we do not join; `xdp-loader unload` takes its programs off, and one of \
             section `xdp.frags` can stand at the end of our chain"
        }
        _ => "",
    }
}

fn place(line: usize, text: &str) -> String {
    if line == 0 { String::new() } else { format!("line {line}: `{text}`: ") }
}
