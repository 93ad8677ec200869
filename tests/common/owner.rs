//! Processes that own a value's tables, one after the other: the test's own program, started again, does what it is told.
//!
//! What a started program says comes in lines that begin with `@`, its orders in lines on its standard input.

use std::{
    env,
    fmt::Display,
    fs,
    io::{self, BufRead as _, BufReader, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError, TryRecvError},
    thread,
    time::{Duration, Instant},
};

use fastrand::Rng;
use xdpkit::{Error, Stage};
use xdpkit_lab::Namespace;

use super::functions::{Function, Place};

const TASK: &str = "XDPKIT_TEST_TASK";
/// Nothing here is measured: only what never comes about may take so long.
const PATIENCE: Duration = Duration::from_secs(180);

/// Whether an edit was refused because another process has the tables.
pub(crate) fn is_superseded(error: &Error) -> bool {
    matches!(error, Error::Superseded { .. })
}

/// What adoption dropped or built again.
pub(crate) fn account(stage: &dyn Stage) -> String {
    let recovery = stage.recovery();
    format!("dropped {:?} rebuilt {:?}", recovery.dropped, recovery.rebuilt)
}

/// What a started process does with the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Job {
    /// Takes them over, attaches, and edits as fast as it can.
    Own,
    /// Takes them over and edits, and never says that it is ready.
    Adopt,
}

const JOBS: [(&str, Job); 2] = [("own", Job::Own), ("adopt", Job::Adopt)];

/// To be called first by each test that starts processes: in one that was started, it does its task and ends.
pub(crate) fn obey() {
    let Ok(task) = env::var(TASK) else { return };
    let parts: Vec<&str> = task.split('|').collect();
    let [function, job, seed, directory, mac, more] = parts[..] else { panic!("no task: {task}") };
    let function = Function::parse(function);
    let job = JOBS.iter().find(|(name, _)| *name == job).expect("a job").1;
    let more = more.parse::<u32>().unwrap().into();
    let place = Place { directory: PathBuf::from(directory), mac: parse_mac(mac), more };
    work(function, job, &place, &mut Rng::with_seed(seed.parse().unwrap()));
    std::process::exit(0);
}

fn parse_mac(text: &str) -> [u8; 6] {
    let mut octets = text.split(':').map(|octet| u8::from_str_radix(octet, 16).unwrap());
    std::array::from_fn(|_| octets.next().unwrap())
}

fn say(what: impl Display) {
    // The test's harness writes to the same line.
    let mut out = io::stdout().lock();
    writeln!(out, "\n@{what}").unwrap();
    out.flush().unwrap();
}

fn fail(what: impl Display) -> ! {
    say(format_args!("failed: {what}"));
    std::process::exit(1);
}

/// What the parent says, and that it is gone.
fn orders() -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in io::stdin().lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

fn work(function: Function, job: Job, place: &Place, random: &mut Rng) {
    let orders = orders();
    let owned = function.start(place).unwrap_or_else(|error| fail(format_args!("start: {error}")));
    say(format_args!("adopted {}", account(owned.stage())));
    // The tables are its own from here on.
    owned.edit(random).unwrap_or_else(|error| fail(format_args!("the first edit: {error}")));
    let _attached =
        (job == Job::Own).then(|| owned.attach(place).unwrap_or_else(|error| fail(format_args!("attach: {error}"))));
    say(if job == Job::Own { "ready" } else { "waiting" });
    let mut edits = 0_u64;
    let mut refused = 0_u64;
    loop {
        let order = match orders.try_recv() {
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => return,
            Ok(order) => Some(order),
        };
        match order.as_deref().map(|order| order.split_once(' ').unwrap_or((order, ""))) {
            None => {}
            Some(("probe", count)) => {
                owned.agrees(random, count.parse().unwrap());
                say(format_args!("agrees after {edits} edits"));
            }
            Some(("pause", _)) => {
                say("paused");
                if orders.recv().is_err() {
                    return;
                }
            }
            Some(("account", _)) => say(format_args!("account {}", account(owned.stage()))),
            Some((other, _)) => fail(format_args!("no order: {other}")),
        }
        match owned.edit(random) {
            Ok(()) if refused > 0 => {
                say(format_args!("again after {refused} refusals"));
                refused = 0;
            }
            Ok(()) => edits += 1,
            Err(error) if is_superseded(&error) => {
                if refused == 0 {
                    say(format_args!("superseded after {edits} edits: {error}"));
                }
                refused += 1;
                // Reading goes on.
                owned.stage().stats().unwrap_or_else(|error| fail(format_args!("stats: {error}")));
                owned.list();
                thread::sleep(Duration::from_millis(1));
            }
            Err(error) => fail(format_args!("edit {edits}: {error}")),
        }
    }
}

/// A process that was started.
pub(crate) struct Process {
    child: Child,
    orders: Option<ChildStdin>,
    lines: Receiver<String>,
    /// What it has said and nobody has waited for.
    heard: Vec<String>,
}

impl Process {
    /// Starts the test of this name again, to do this in a namespace.
    pub(crate) fn start(ns: &Namespace, test: &str, function: Function, job: Job, place: &Place, seed: u64) -> Self {
        let job = JOBS.iter().find(|(_, other)| *other == job).expect("a job").0;
        let mac: Vec<String> = place.mac.iter().map(|octet| format!("{octet:02x}")).collect();
        let (directory, mac, more) = (place.directory.display(), mac.join(":"), place.more.get());
        let task = format!("{}|{job}|{seed}|{directory}|{mac}|{more}", function.name());
        let mut command = ns.command(env::current_exe().unwrap());
        command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(TASK, task);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (sender, lines) = mpsc::channel();
        let out = BufReader::new(child.stdout.take().unwrap());
        thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                if let Some(said) = line.strip_prefix('@')
                    && sender.send(said.to_owned()).is_err()
                {
                    return;
                }
            }
        });
        let orders = child.stdin.take();
        Self { child, orders, lines, heard: Vec::new() }
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Tells it to do something.
    pub(crate) fn order(&mut self, order: &str) {
        let to = self.orders.as_mut().expect("it was not left");
        writeln!(to, "{order}").unwrap_or_else(|error| panic!("order {order}: {error}; heard {:?}", self.heard));
    }

    /// Waits until it says something that begins so, and returns it.
    pub(crate) fn expect(&mut self, what: &str) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            match self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) if line.starts_with(what) => return line,
                Ok(line) if line.starts_with("failed") => panic!("waiting for `{what}`: the process {line}"),
                Ok(line) => self.heard.push(line),
                Err(RecvTimeoutError::Timeout) => panic!("never `{what}`; heard {:?}", self.heard),
                Err(RecvTimeoutError::Disconnected) => panic!("ended before `{what}`; heard {:?}", self.heard),
            }
        }
    }

    /// Waits until its start or an edit of it fails, and returns how.
    pub(crate) fn expect_failure(&mut self) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            match self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) if line.starts_with("failed") => return line,
                Ok(line) => self.heard.push(line),
                Err(error) => panic!("it never failed ({error}); heard {:?}", self.heard),
            }
        }
    }

    /// Whether it has said something that begins so.
    pub(crate) fn said(&mut self, what: &str) -> bool {
        self.heard.extend(self.lines.try_iter());
        if let Some(line) = self.heard.iter().find(|line| line.starts_with("failed")) {
            panic!("the process {line}");
        }
        self.heard.iter().any(|line| line.starts_with(what))
    }

    /// `kill -NAME`.
    pub(crate) fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([format!("-{name}"), self.id().to_string()]).status();
        assert!(sent.is_ok_and(|status| status.success()), "kill -{name} (procps) reaches process {}", self.id());
    }

    /// Sends SIGSTOP and waits until it stands.
    pub(crate) fn stop(&self) {
        self.signal("STOP");
        let path = format!("/proc/{}/stat", self.id());
        let end = Instant::now() + PATIENCE;
        while fs::read_to_string(&path).unwrap().rsplit_once(')').unwrap().1.split_whitespace().next() != Some("T") {
            assert!(Instant::now() < end, "process {} does not stop", self.id());
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// `kill -9`, and waits for its end.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Lets it end by itself, without another word.
    pub(crate) fn leave(mut self, round: usize) {
        assert!(!self.said("again"), "round {round}: an edit of the superseded process was done");
        self.orders = None;
        let status = self.child.wait().unwrap();
        assert!(status.success(), "round {round}: {status}; heard {:?}", self.heard);
        assert!(!self.said("again"), "round {round}: an edit of the superseded process was done");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Which process holds the lock (flock) on a directory, as the kernel tells.
pub(crate) fn lock_holder(directory: &Path) -> Option<u32> {
    let inode = format!(":{}", fs::metadata(directory).unwrap().ino());
    let locks = fs::read_to_string("/proc/locks").unwrap();
    // 1: FLOCK  ADVISORY  WRITE 4711 00:2d:3 0 EOF; who waits has an arrow.
    let held = locks.lines().filter(|line| line.contains("FLOCK") && !line.contains("->"));
    held.map(|line| line.split_whitespace().collect::<Vec<_>>())
        .find(|fields| fields.get(5).is_some_and(|place| place.ends_with(&inode)))
        .and_then(|fields| fields[4].parse().ok())
}
