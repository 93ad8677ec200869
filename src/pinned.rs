//! Looking at pinned stages without taking them over.

use std::path::Path;

use crate::{Error, Result, Stats, abi::reason::Counters, base, sys::map::PerCpu};

const COUNTERS: &str = "counters";

/// Reads the counters of a stage that is pinned in a directory, without taking anything over: for programs that look on
/// while another one drives the stage. [`pinned`](crate::pinned) tells the names.
///
/// # Errors
/// [`Error::PinMissing`]; [`Error::PinMismatch`] when this build does not understand the counters; [`Error::NotBpfFs`],
/// [`Error::PinsExposed`], [`Error::Pin`], [`Error::Map`].
pub fn pinned_stats(directory: impl AsRef<Path>, name: &str) -> Result<Stats> {
    base::directory::check_name(name)?;
    let path = base::map_path(directory.as_ref(), name, COUNTERS);
    let map = base::open_map(directory.as_ref(), name, COUNTERS)?;
    let expected = format!("PercpuArray with keys of 4 and values of {} bytes", size_of::<Counters>());
    if map.shape() != expected {
        return Err(Error::PinMismatch { path, what: "the counters' map".into(), found: map.shape(), expected });
    }
    Ok(Stats::from_counters(&PerCpu::new(&map).get(0)?))
}
