//! The kernel's tick counter, by which programs judge age: `bpf_jiffies64` costs them next to nothing.

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    ptr,
    sync::OnceLock,
};

use libbpf_rs::libbpf_sys as raw;

use super::{check, privilege};
use crate::{Error, Result};

/// Reads the counter through programs of two or three instructions.
#[derive(Debug)]
pub(crate) struct Clock {
    lower: OwnedFd,
    /// Of the upper half, once it was asked for.
    upper: OnceLock<OwnedFd>,
    hertz: u32,
}

impl Clock {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self { lower: load(false)?, upper: OnceLock::new(), hertz: hertz() })
    }

    /// Ticks in a second.
    pub(crate) fn hertz(&self) -> u32 {
        self.hertz
    }

    /// The lower half of the counter, at this moment.
    pub(crate) fn now(&self) -> Result<u32> {
        run(&self.lower)
    }

    /// The counter at this moment.
    pub(crate) fn now_whole(&self) -> Result<u64> {
        let program = match self.upper.get() {
            Some(program) => program,
            None => {
                let program = load(true)?;
                self.upper.get_or_init(|| program)
            }
        };
        let mut upper = run(program)?;
        loop {
            let lower = run(&self.lower)?;
            // The lower half may have begun again in between.
            let still = run(program)?;
            if still == upper {
                return Ok(u64::from(upper) << 32 | u64::from(lower));
            }
            upper = still;
        }
    }
}

/// A program that returns one half of the counter.
fn load(upper: bool) -> Result<OwnedFd> {
    let instruction = |code: u32, imm: i32| raw::bpf_insn { code: code as u8, imm, ..Default::default() };
    let mut program = vec![instruction(raw::BPF_JMP | raw::BPF_CALL, raw::BPF_FUNC_jiffies64 as i32)];
    if upper {
        program.push(instruction(raw::BPF_ALU64 | raw::BPF_RSH | raw::BPF_K, 32));
    }
    program.push(instruction(raw::BPF_JMP | raw::BPF_EXIT, 0));
    // SAFETY: the instructions and strings outlive the call, and their number is right; no options are given.
    let fd = check(unsafe {
        raw::bpf_prog_load(
            raw::BPF_PROG_TYPE_XDP,
            c"clock".as_ptr(),
            c"Dual BSD/GPL".as_ptr(),
            program.as_ptr(),
            program.len() as raw::size_t,
            ptr::null_mut(),
        )
    })
    .map_err(|cause| {
        let load = |cause| Error::Load { program: "clock".into(), log: String::new(), cause };
        privilege::refusal("loading program `clock`", &cause).unwrap_or_else(|| load(cause))
    })?;
    // SAFETY: the kernel has just given us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The result of a program.
fn run(program: &OwnedFd) -> Result<u32> {
    let frame = [0_u8; 14];
    let mut options = raw::bpf_test_run_opts {
        sz: size_of::<raw::bpf_test_run_opts>() as raw::size_t,
        data_in: frame.as_ptr().cast(),
        data_size_in: frame.len() as u32,
        repeat: 1,
        ..Default::default()
    };
    // SAFETY: the kernel reads the frame and writes nothing but to `options`.
    let answer = unsafe { raw::bpf_prog_test_run_opts(program.as_raw_fd(), &raw mut options) };
    let fail = |cause: io::Error| Error::TestRun { program: "clock".into(), length: frame.len(), cause };
    check(answer).map_err(fail)?;
    Ok(options.retval)
}

/// The coarse clock goes by ticks, and tells how long one is.
fn hertz() -> u32 {
    let mut tick = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel fills the struct in; this clock always exists.
    unsafe { libc::clock_getres(libc::CLOCK_MONOTONIC_COARSE, &raw mut tick) };
    let nanoseconds = u32::try_from(tick.tv_nsec).unwrap_or(0).max(1);
    (1_000_000_000 / nanoseconds).clamp(1, 10_000)
}

#[cfg(test)]
mod tests {
    //! These need root.

    use std::{
        thread,
        time::{Duration, Instant},
    };

    use super::*;

    #[test]
    fn both_halves_are_of_one_counter() {
        let clock = Clock::new().unwrap();
        let (before, whole, after) = (clock.now().unwrap(), clock.now_whole().unwrap(), clock.now().unwrap());
        assert!((whole as u32).wrapping_sub(before) <= after.wrapping_sub(before));
        // It begins 300 seconds before the lower half is full for the first time.
        let ticks = crate::sys::monotonic().as_secs_f64() * f64::from(clock.hertz());
        let expected = 2_f64.powi(32) + ticks - 300.0 * f64::from(clock.hertz());
        assert!((whole as f64 / expected - 1.0).abs() < 0.001, "{whole}, {expected} expected");
    }

    #[test]
    fn the_counter_goes_at_the_stated_rate() {
        let clock = Clock::new().unwrap();
        assert!((100..=1000).contains(&clock.hertz()), "{} Hz", clock.hertz());
        // What lies between two readings is told by the other clock, however long the machine sleeps.
        let read = || {
            let before = Instant::now();
            (before, clock.now().unwrap(), Instant::now())
        };
        let [first, last] = [read(), {
            thread::sleep(Duration::from_millis(500));
            read()
        }];
        let ticks = f64::from(last.1.wrapping_sub(first.1));
        let [least, most] =
            [last.0 - first.2, last.2 - first.0].map(|time| time.as_secs_f64() * f64::from(clock.hertz()));
        assert!(ticks > 0.9 * least - 2.0 && ticks < 1.1 * most + 2.0, "{ticks} ticks, {least} to {most} expected");
    }
}
