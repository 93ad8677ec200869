//! Waiting until no CPU runs a program that has been taken out of the path.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _},
};

use libbpf_rs::{MapHandle, MapType, libbpf_sys as raw};

use super::{check, io_error};

/// A map of maps whose update waits for an RCU grace period: the kernel promises there that once the call
/// returns no program still runs with what was there before. `membarrier` would do as well but is refused
/// on kernels with `nohz_full`.
#[derive(Debug)]
pub(crate) struct GracePeriod {
    outer: MapHandle,
    inner: MapHandle,
}

impl GracePeriod {
    pub(crate) fn new() -> io::Result<Self> {
        let mut options =
            raw::bpf_map_create_opts { sz: size_of::<raw::bpf_map_create_opts>() as raw::size_t, ..Default::default() };
        let create = |kind, name, options: &raw::bpf_map_create_opts| {
            MapHandle::create(kind, Some(name), 4, 4, 1, options).map_err(|error| io_error(&error))
        };
        let inner = create(MapType::Array, "grace_inner", &options)?;
        options.inner_map_fd = inner.as_fd().as_raw_fd() as u32;
        let outer = create(MapType::ArrayOfMaps, "grace_outer", &options)?;
        Ok(Self { outer, inner })
    }

    /// Returns after every CPU has left the XDP programs that it ran at the time of the call. Takes milliseconds.
    pub(crate) fn wait(&self) -> io::Result<()> {
        #[cfg(test)]
        WAITS.with(|waits| waits.set(waits.get() + 1));
        let (key, value) = (0_u32, self.inner.as_fd().as_raw_fd());
        // SAFETY: the outer map has 4-byte keys and takes a 4-byte descriptor as value; both live on the stack.
        let answer = unsafe {
            raw::bpf_map_update_elem(
                self.outer.as_fd().as_raw_fd(),
                (&raw const key).cast(),
                (&raw const value).cast(),
                0,
            )
        };
        check(answer).map(drop)
    }
}

#[cfg(test)]
thread_local! {
    /// How often this thread has waited: what is left out would not be noticed by any packet for a long time.
    pub(crate) static WAITS: std::cell::Cell<u32> = const { std::cell::Cell::new(0) };
}
