//! The benchmark's side of the kernel: its programs loaded, test runs, the clock.
//! Beside `sys`, the only place with `unsafe`.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{MapCore, MapFlags, MapHandle, libbpf_sys as raw};

use super::layout::Layout;
use crate::sys::check;

#[allow(clippy::all, clippy::undocumented_unsafe_blocks, unreachable_pub, missing_docs, unused, reason = "generated")]
mod skel {
    include!(concat!(env!("OUT_DIR"), "/bench.skel.rs"));
}

/// Entries written in one call.
const BATCH: usize = 1 << 16;

/// `lab/bpf/bench.bpf.c`, loaded.
pub(super) struct Programs {
    pub(super) wrapper: OwnedFd,
    pub(super) empty: OwnedFd,
    pub(super) parse_only: OwnedFd,
    pub(super) grow: OwnedFd,
    #[cfg(test)]
    pub(super) mangle: OwnedFd,
    under_test: MapHandle,
    state: MapHandle,
}

impl Programs {
    /// Loads all programs, for a frame of this layout and these flows, encoded as the layout says.
    pub(super) fn load(frame: &[u8], layout: &Layout, flows: &[u8]) -> io::Result<Self> {
        let count = flows.len() / layout.flow_size();
        let mut storage = MaybeUninit::uninit();
        let mut open = skel::BenchSkelBuilder::default().open(&mut storage).map_err(io_error)?;
        let constants = open.maps.rodata_data.as_deref_mut();
        let constants = constants.expect("the object has constants");
        constants.frame_length = frame.len() as u32;
        constants.restored = layout.restored as u32;
        constants.source_at = layout.source_at as u32;
        constants.port_at = layout.port_at.unwrap_or(0) as u32;
        constants.flow_mask = (count - 1) as u32;
        constants.ipv6 = layout.ipv6;
        let table = match layout.ipv6 {
            true => &mut open.maps.flows_v6,
            false => &mut open.maps.flows_v4,
        };
        table.set_max_entries(count as u32).map_err(io_error)?;

        let loaded = open.load().map_err(io_error)?;
        let table = match layout.ipv6 {
            true => &loaded.maps.flows_v6,
            false => &loaded.maps.flows_v4,
        };
        fill(table, flows, layout.flow_size())?;
        let mut template = vec![0; loaded.maps.template.value_size() as usize];
        template[..layout.restored].copy_from_slice(&frame[..layout.restored]);
        loaded.maps.template.update(&0_u32.to_ne_bytes(), &template, MapFlags::ANY).map_err(io_error)?;

        let own = |fd: BorrowedFd<'_>| fd.try_clone_to_owned();
        Ok(Self {
            wrapper: own(loaded.progs.wrapper.as_fd())?,
            empty: own(loaded.progs.empty.as_fd())?,
            parse_only: own(loaded.progs.parse_only.as_fd())?,
            grow: own(loaded.progs.grow.as_fd())?,
            #[cfg(test)]
            mangle: own(loaded.progs.mangle.as_fd())?,
            under_test: MapHandle::try_from(&loaded.maps.under_test).map_err(io_error)?,
            state: MapHandle::try_from(&loaded.maps.state).map_err(io_error)?,
        })
    }

    /// Lets the wrapper call this program from now on.
    pub(super) fn put_under_test(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        let (key, fd) = (0_u32.to_ne_bytes(), program.as_raw_fd().to_ne_bytes());
        let put = self.under_test.update(&key, &fd, MapFlags::ANY);
        put.map_err(io_error)
    }

    /// Runs the wrapper on `repeat` packets from flow `next` on. `after` receives the last frame; it
    /// needs room for what the program adds.
    pub(super) fn run(&self, frame: &[u8], next: u64, repeat: u32, after: &mut Vec<u8>) -> io::Result<Run> {
        let state = [0, 0, next].map(u64::to_ne_bytes).concat();
        self.state.update(&0_u32.to_ne_bytes(), &state, MapFlags::ANY).map_err(io_error)?;

        let mut options = raw::bpf_test_run_opts {
            sz: size_of::<raw::bpf_test_run_opts>() as raw::size_t,
            data_in: frame.as_ptr().cast(),
            data_size_in: frame.len() as u32,
            data_out: after.as_mut_ptr().cast(),
            data_size_out: after.len() as u32,
            repeat: i32::try_from(repeat).map_err(io::Error::other)?,
            ..Default::default()
        };
        let before = cpu_time()?;
        // SAFETY: every pointer in `options` is to a live buffer whose size stands beside it.
        let ran = unsafe { raw::bpf_prog_test_run_opts(self.wrapper.as_raw_fd(), &mut options) };
        let time = cpu_time()?.saturating_sub(before);
        if ran < 0 {
            return Err(io::Error::from_raw_os_error(-ran));
        }
        after.truncate(options.data_size_out as usize);
        Ok(Run { verdict: options.retval, time, mean: Duration::from_nanos(options.duration.into()) })
    }
}

/// Runs a program `times` times on an empty frame, for what it does to its maps.
pub(super) fn repeat(program: &OwnedFd, times: u32) -> io::Result<()> {
    let frame = [0_u8; 64];
    let mut options = raw::bpf_test_run_opts {
        sz: size_of::<raw::bpf_test_run_opts>() as raw::size_t,
        data_in: frame.as_ptr().cast(),
        data_size_in: frame.len() as u32,
        repeat: times as i32,
        ..Default::default()
    };
    // SAFETY: the only pointer in `options` is to a live buffer whose size stands beside it.
    let ran = unsafe { raw::bpf_prog_test_run_opts(program.as_raw_fd(), &mut options) };
    if ran < 0 { Err(io::Error::from_raw_os_error(-ran)) } else { Ok(()) }
}

/// What a test run told.
#[derive(Debug)]
pub(super) struct Run {
    /// Of the last packet.
    pub(super) verdict: u32,
    /// All packets, and what the call costs besides.
    pub(super) time: Duration,
    /// The kernel's own figure for one packet, in whole nanoseconds.
    #[cfg_attr(not(test), expect(dead_code, reason = "too coarse but for a comparison"))]
    pub(super) mean: Duration,
}

fn fill(table: &impl MapCore, values: &[u8], value_size: usize) -> io::Result<()> {
    for (batch, values) in values.chunks(BATCH * value_size).enumerate() {
        let count = values.len() / value_size;
        let first = batch * BATCH;
        let keys: Vec<u8> = (first..first + count).flat_map(|index| (index as u32).to_ne_bytes()).collect();
        let (any, count) = (MapFlags::ANY, count as u32);
        table.update_batch(&keys, values, count, any, any).map_err(io_error)?;
    }
    Ok(())
}

/// CPU time of this thread: unlike the wall clock it stands still while others run on this CPU.
pub(super) fn cpu_time() -> io::Result<Duration> {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is the struct that the call fills.
    check(unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut now) })?;
    Ok(Duration::new(now.tv_sec as u64, now.tv_nsec as u32))
}

/// Keeps the errno inside, which tells missing privileges from the rest.
pub(super) fn io_error(error: libbpf_rs::Error) -> io::Error {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(this) = cause {
        let code = this.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
        if let Some(code) = code {
            return io::Error::from_raw_os_error(code);
        }
        cause = this.source();
    }
    io::Error::other(error.to_string())
}
