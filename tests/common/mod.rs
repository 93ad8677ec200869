//! What several tests share: counts by how thorough the run is, and a stage's answer in short.
#![allow(dead_code, unused_imports, reason = "not every test uses everything")]

pub(crate) mod busy;
pub(crate) mod bytes;
pub(crate) mod dsr;
pub(crate) mod dsr_net;
pub(crate) mod functions;
pub(crate) mod guard;
pub(crate) mod kernel_log;
pub(crate) mod nat;
pub(crate) mod nat_talk;
pub(crate) mod owner;
pub(crate) mod pins;
pub(crate) mod rate;
pub(crate) mod rules;
pub(crate) mod traffic;

use std::{
    env,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use xdpkit::{Action, Reason, Stage};
pub(crate) use xdpkit_lab::counts::times;

/// Cases of a comparison with a model, each made of its number alone: a fixed count of them from a fixed start, or with
/// `./x fuzz` as many as the time allows, from a start that no run had before. `XDPKIT_CASE=N` is only that one.
pub(crate) struct Cases {
    next: u64,
    left: u64,
    end: Option<Instant>,
    /// Of how many cases the clock is asked before the first.
    stride: u64,
}

impl Cases {
    /// The same where each case takes a good part of a second.
    pub(crate) fn long(usual: usize, full: usize, emulated: usize) -> Self {
        Self { stride: 1, ..Self::new(usual, full, emulated) }
    }

    pub(crate) fn new(usual: usize, full: usize, emulated: usize) -> Self {
        let number =
            |name| env::var(name).ok().map(|text| text.parse::<u64>().unwrap_or_else(|_| panic!("{name}: {text}")));
        let stride = 256;
        if let Some(case) = number("XDPKIT_CASE") {
            return Self { next: case, left: 1, end: None, stride };
        }
        match number("XDPKIT_FUZZ_SECONDS") {
            None => Self { next: 0, left: times(usual, full, emulated) as u64, end: None, stride },
            Some(seconds) => {
                let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is right");
                let start = since.as_micros() as u64;
                let end = Some(Instant::now() + Duration::from_secs(seconds));
                Self { next: start, left: u64::MAX, end, stride }
            }
        }
    }
}

impl Iterator for Cases {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        let over = self.next.is_multiple_of(self.stride) && self.end.is_some_and(|end| Instant::now() >= end);
        if self.left == 0 || over {
            return None;
        }
        self.left -= 1;
        self.next += 1;
        Some(self.next - 1)
    }
}

/// Whether the kernel runs in an emulated machine, where time means nothing.
pub(crate) fn is_emulated() -> bool {
    env::var_os("XDPKIT_EMULATED").is_some()
}

/// Runs one frame and answers what became of it and why, as the counters tell: exactly one line must have moved,
/// by one packet and all its bytes.
pub(crate) fn judge(stage: &dyn Stage, frame: &[u8]) -> (Action, Reason) {
    // Loaded by now, or packets of the host's own come in while it is.
    stage.program_fd();
    let before = stage.stats().unwrap();
    let verdict = stage.test_run(frame).unwrap();
    let counted = stage.stats().unwrap().since(&before);
    let [line] = counted.reasons.as_slice() else { panic!("counted {:?}", counted.reasons) };
    assert_eq!(line.action, verdict.action, "the counter agrees with the verdict");
    assert_eq!((line.count.packets, line.count.bytes), (1, frame.len() as u64));
    (verdict.action, line.reason)
}

/// Frames that `eth0` of this thread's namespace dropped before its program saw them.
pub(crate) fn received_drops() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let line = text.lines().find(|line| line.trim_start().starts_with("eth0:")).unwrap();
    line.split_whitespace().nth(4).unwrap().parse().unwrap()
}

/// Waits until something holds, for a minute at most: the caller asserts it.
pub(crate) fn wait_for(holds: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !holds() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Whether the kernel cannot tell what an interface's driver is able to do.
pub(crate) fn kernel_older_than_6_3() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map(|part| part.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap(), numbers.next().unwrap()) < (6, 3)
}

/// Lets this process have as many files open as it may, and answers how many.
pub(crate) fn raise_open_files() -> usize {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let hard: usize = line.split_whitespace().nth(4).unwrap().parse().unwrap_or(1 << 20);
    limit_open_files(hard);
    hard
}

/// Lets this process have so many files open, at most as many as it may.
pub(crate) fn limit_open_files(count: usize) {
    let set = std::process::Command::new("prlimit")
        .args([format!("--pid={}", std::process::id()), format!("--nofile={count}:")])
        .status();
    assert!(set.is_ok_and(|status| status.success()), "prlimit (util-linux) sets the limit of open files");
}
