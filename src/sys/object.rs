//! Loading a skeleton: shared maps in, an instance with a slot of its own out, the verifier's log in the error.

use std::{ffi::c_char, io, mem::MaybeUninit, os::fd::AsFd as _};

use libbpf_rs::{
    AsRawLibbpf as _, MapCore as _, MapHandle, OpenObject, libbpf_sys as raw,
    skel::{OpenSkel, Skel, SkelBuilder},
};

use super::{io_error, map::Map, program::Program};
use crate::{Error, Result};

/// Room for the end of the verifier's log. Only touched when a program is rejected.
const LOG_SIZE: usize = 1 << 22;
/// What of it goes into an error: the last lines say what is wrong.
const LOG_SHOWN: usize = 4000;

/// How to load: which maps to take over, and how large to make the others.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Plan<'a> {
    /// Maps to use instead of new ones, by name.
    pub(crate) shared: &'a [Map],
    /// Entries of maps whose size the user chooses, by name.
    pub(crate) capacities: &'a [(&'a str, u32)],
}

/// A loaded object: its program, and all its maps by their names in C.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) program: Program,
    pub(crate) maps: Vec<Map>,
}

/// Loads a skeleton and lets go of it: what remains are descriptors.
pub(crate) fn load<'o, B>(
    builder: B,
    storage: &'o mut MaybeUninit<OpenObject>,
    program: &str,
    plan: &Plan<'_>,
) -> Result<Loaded>
where
    B: SkelBuilder<'o>,
    B::Output: OpenSkel<'o>,
    <B::Output as OpenSkel<'o>>::Output: Skel<'o>,
{
    let fail = |error: &libbpf_rs::Error| load_error(program, io_error(error), &[]);
    let mut open = builder.open(storage).map_err(|error| fail(&error))?;
    for mut map in open.open_object_mut().maps_mut() {
        let name = map.name().to_string_lossy().into_owned();
        if let Some(shared) = plan.shared.iter().find(|shared| shared.name() == name) {
            same_shape(program, &map, shared)?;
            map.reuse_fd(shared.as_fd()).map_err(|error| fail(&error))?;
        } else if let Some((_, entries)) = plan.capacities.iter().find(|(other, _)| *other == name) {
            map.set_max_entries(*entries).map_err(|error| fail(&error))?;
        }
    }

    let mut log = vec![0_u8; LOG_SIZE];
    for program in open.open_object_mut().progs_mut() {
        // SAFETY: the program is alive, and `log` outlives the load below, which is the only user of the buffer:
        // nothing else loads this program, and the skeleton is gone before `log` is.
        unsafe {
            raw::bpf_program__set_log_buf(
                program.as_libbpf_object().as_ptr(),
                log.as_mut_ptr().cast::<c_char>(),
                log.len() as raw::size_t,
            );
        }
    }
    let loaded = open.load().map_err(|error| load_error(program, io_error(&error), &log))?;

    let object = loaded.object();
    let maps = object.maps().map(|map| {
        let name = map.name().to_string_lossy().into_owned();
        MapHandle::try_from(&map).map(|handle| Map::new(handle, name))
    });
    let maps = maps.collect::<Result<Vec<_>, _>>().map_err(|error| fail(&error))?;
    let handle = object.progs().next().expect("every skeleton has a program");
    let fd = handle.as_fd().try_clone_to_owned().map_err(|error| load_error(program, error, &[]))?;
    Ok(Loaded { program: Program::from_fd(fd)?, maps })
}

fn same_shape(program: &str, ours: &libbpf_rs::OpenMapMut<'_>, shared: &Map) -> Result<()> {
    let mismatch = |what: &str, found: u32, expected: u32| Error::PinMismatch {
        path: shared.name().into(),
        what: format!("the {what} of this map of program `{program}`"),
        found: found.to_string(),
        expected: expected.to_string(),
    };
    let handle = shared.handle();
    for (what, found, expected) in [
        ("type", handle.map_type().into(), ours.map_type().into()),
        ("key size", handle.key_size(), ours.key_size()),
        ("value size", handle.value_size(), ours.value_size()),
    ] {
        if found != expected {
            return Err(mismatch(what, found, expected));
        }
    }
    Ok(())
}

/// Says what stands behind a refused load: a missing capability, an old kernel, the verifier.
fn load_error(program: &str, cause: io::Error, log: &[u8]) -> Error {
    let missing = super::missing_capabilities();
    if cause.raw_os_error() == Some(libc::EPERM) && !missing.is_empty() {
        let operation = format!("loading program `{program}`");
        return Error::MissingCapability { operation, capability: missing.join(", ") };
    }
    if super::kernel_older_than(5, 18) {
        let feature = format!("program `{program}` (xdp.frags)");
        return Error::KernelTooOld { feature, needs: "5.18", found: super::kernel_release() };
    }
    let log = String::from_utf8_lossy(log.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned();
    if log.is_empty() {
        return Error::Load { program: program.to_owned(), cause };
    }
    let start = log.len().saturating_sub(LOG_SHOWN);
    let start = (start..log.len()).find(|at| log.is_char_boundary(*at)).unwrap_or(0);
    Error::Verifier { program: program.to_owned(), log: log[start..].to_owned(), cause }
}
