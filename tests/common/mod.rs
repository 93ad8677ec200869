//! What several tests share: counts by how thorough the run is, and a stage's answer in short.
#![allow(dead_code, reason = "not every test uses everything")]

pub(crate) mod dsr;
pub(crate) mod dsr_net;
pub(crate) mod nat;
pub(crate) mod traffic;

use std::env;

use xdpkit::{Action, Reason, Stage};

/// How often something is repeated: usually, with `./x test --full`, and in an emulated machine.
pub(crate) fn times(usual: usize, full: usize, emulated: usize) -> usize {
    if is_emulated() {
        emulated
    } else if env::var_os("XDPKIT_FULL").is_some() {
        full
    } else {
        usual
    }
}

/// Whether the kernel runs in an emulated machine, where time means nothing.
pub(crate) fn is_emulated() -> bool {
    env::var_os("XDPKIT_EMULATED").is_some()
}

/// Runs one frame and answers what became of it and why, as the counters tell: exactly one line must have moved,
/// by one packet and all its bytes.
pub(crate) fn judge(stage: &dyn Stage, frame: &[u8]) -> (Action, Reason) {
    let before = stage.stats().unwrap();
    let verdict = stage.test_run(frame).unwrap();
    let counted = stage.stats().unwrap().since(&before);
    let [line] = counted.reasons.as_slice() else { panic!("counted {:?}", counted.reasons) };
    assert_eq!(line.action, verdict.action, "the counter agrees with the verdict");
    assert_eq!((line.count.packets, line.count.bytes), (1, frame.len() as u64));
    (verdict.action, line.reason)
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
    let set = std::process::Command::new("prlimit")
        .args([format!("--pid={}", std::process::id()), format!("--nofile={hard}:")])
        .status();
    assert!(set.is_ok_and(|status| status.success()), "prlimit (util-linux) raises the limit of open files");
    hard
}
