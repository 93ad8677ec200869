//! The safe layer over libbpf and the kernel: the only place with `unsafe`.
//!
//! Nothing here knows what a firewall is; nothing outside knows a raw pointer.
#![allow(unsafe_code, reason = "the rest of the crate denies it")]

mod cgroup;
pub(crate) mod clock;
pub(crate) mod device;
pub(crate) mod grace;
pub(crate) mod link;
pub(crate) mod links;
pub(crate) mod map;
pub(crate) mod mmap;
pub(crate) mod net;
mod netlink;
pub(crate) mod notices;
pub(crate) mod object;
pub(crate) mod pin;
mod print;
pub(crate) mod privilege;
pub(crate) mod program;
pub(crate) mod redirects;
pub(crate) mod ring;
pub(crate) mod route;
#[allow(clippy::all, clippy::undocumented_unsafe_blocks, unreachable_pub, missing_docs, unused, reason = "generated")]
pub(crate) mod skel;
pub(crate) mod wake;

use std::{fs, io, time::Duration};

/// Turns libbpf's convention, a negative errno, into a result.
fn check(answer: i32) -> io::Result<i32> {
    if answer < 0 { Err(io::Error::from_raw_os_error(-answer)) } else { Ok(answer) }
}

/// The errno inside a libbpf-rs error, as an `io::Error` of its own. That crate keeps the number to itself, but
/// the standard library writes it into every message.
fn io_error(error: &libbpf_rs::Error) -> io::Error {
    let text = format!("{error:#}");
    let number = text.rsplit_once("(os error ").and_then(|(_, rest)| rest.split_once(')')?.0.parse().ok());
    number.map_or_else(|| io::Error::other(text), io::Error::from_raw_os_error)
}

/// How many files this process may have open at present (the soft `RLIMIT_NOFILE`).
#[cfg(feature = "health")]
pub(crate) fn open_files_max() -> usize {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel fills the struct in; this limit always exists.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    usize::try_from(limit.rlim_cur).unwrap_or(usize::MAX)
}

/// CPUs that there may ever be.
pub(crate) fn cpus() -> usize {
    libbpf_rs::num_possible_cpus().unwrap_or(1)
}

/// The clock that programs go by: `CLOCK_MONOTONIC`, since boot without suspend.
pub(crate) fn monotonic() -> Duration {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel fills the struct in; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32)
}

/// The kernel's tick in nanoseconds: what `bpf_jiffies64` counts, and the resolution of the coarse clocks.
pub(crate) fn tick() -> u64 {
    let mut tick = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel fills the struct in; this clock always exists.
    unsafe { libc::clock_getres(libc::CLOCK_MONOTONIC_COARSE, &raw mut tick) };
    (tick.tv_nsec as u64).clamp(1_000_000, 10_000_000)
}

/// The same clock as it was at the last tick, which programs read at half the price.
pub(crate) fn monotonic_coarse() -> Duration {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel fills the struct in; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut now) };
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32)
}

/// Fills a buffer with random bytes that nobody can guess.
pub(crate) fn fill_random(buffer: &mut [u8]) {
    let mut done = 0;
    while done < buffer.len() {
        let rest = &mut buffer[done..];
        // SAFETY: the kernel writes at most so many bytes to a live buffer.
        let got = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        // Only a signal can interrupt it, before the pool is ready or in the middle of a long read.
        done += usize::try_from(got).unwrap_or(0);
    }
}

/// The running kernel's release, such as `6.1.0-40-amd64`.
pub(crate) fn kernel_release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned()
}

/// Whether the running kernel is older than `major.minor`. Unreadable counts as new enough.
pub(crate) fn kernel_older_than(major: u32, minor: u32) -> bool {
    let release = kernel_release();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|part| part.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(a), Some(b)) => (a, b) < (major, minor),
        _ => false,
    }
}
