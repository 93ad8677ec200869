//! Loading a skeleton: shared maps in, an instance with a slot of its own out, the verifier's log in the error.

use std::{ffi::c_char, io, mem::MaybeUninit, os::fd::AsFd as _};

use libbpf_rs::{
    AsRawLibbpf as _, MapCore as _, MapHandle, MapType, OpenObject, libbpf_sys as raw,
    skel::{OpenSkel, Skel, SkelBuilder},
};

use super::{cgroup, io_error, map::Map, print, privilege, program::Program};
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
    #[cfg(test)]
    LOADS.with(|loads| loads.set(loads.get() + 1));
    let failed = |cause, said: &str| Failure { program, cause, said, log: &[], sizes: &[] }.explain();
    let fail = |error: &libbpf_rs::Error| failed(io_error(error), "");
    let (opened, said) = print::capture(|| builder.open(storage));
    let mut open = opened.map_err(|error| failed(io_error(&error), &said))?;
    let mut sizes = Vec::new();
    for mut map in open.open_object_mut().maps_mut() {
        let name = map.name().to_string_lossy().into_owned();
        if let Some(shared) = plan.shared.iter().find(|shared| shared.name() == name) {
            same_shape(program, &map, shared)?;
            map.reuse_fd(shared.as_fd()).map_err(|error| fail(&error))?;
        } else if let Some((_, entries)) = plan.capacities.iter().find(|(other, _)| *other == name) {
            map.set_max_entries(*entries).map_err(|error| fail(&error))?;
            sizes.push(Size::of(&map, name));
        } else {
            sizes.push(Size::of(&map, name));
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
    let (loaded, said) = print::capture(|| open.load());
    let loaded = loaded.map_err(|error| {
        Failure { program, cause: io_error(&error), said: &said, log: &log, sizes: &sizes }.explain()
    })?;

    let object = loaded.object();
    let maps = object.maps().map(|map| {
        let name = map.name().to_string_lossy().into_owned();
        MapHandle::try_from(&map).map(|handle| Map::new(handle, name))
    });
    let maps = maps.collect::<Result<Vec<_>, _>>().map_err(|error| fail(&error))?;
    let handle = object.progs().next().expect("every skeleton has a program");
    let fd = handle.as_fd().try_clone_to_owned().map_err(|error| failed(error, ""))?;
    Ok(Loaded { program: Program::from_fd(fd)?, maps })
}

#[cfg(test)]
thread_local! {
    /// How often this thread has loaded a program.
    pub(crate) static LOADS: std::cell::Cell<u32> = const { std::cell::Cell::new(0) };
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

/// What a map that is to be created takes.
#[derive(Debug)]
struct Size {
    map: String,
    entries: u32,
    bytes: u64,
}

impl Size {
    fn of(map: &libbpf_rs::OpenMapMut<'_>, name: String) -> Self {
        let (kind, entries) = (map.map_type(), map.max_entries());
        let value = u64::from(map.value_size()).next_multiple_of(8);
        let of_entry = match kind {
            MapType::RingBuf => 1,
            MapType::PercpuArray => value * super::cpus() as u64,
            MapType::PercpuHash => u64::from(map.key_size()) + value * super::cpus() as u64,
            MapType::Array => value,
            _ => u64::from(map.key_size()) + value,
        };
        Self { map: name, entries, bytes: of_entry * u64::from(entries) }
    }
}

/// A load that was refused.
struct Failure<'a> {
    program: &'a str,
    cause: io::Error,
    /// What libbpf said.
    said: &'a str,
    /// What the verifier said, up to the first zero.
    log: &'a [u8],
    sizes: &'a [Size],
}

impl Failure<'_> {
    /// What stands behind it: rights, an old kernel, memory, the verifier.
    fn explain(self) -> Error {
        let program = self.program.to_owned();
        if let Some(error) = privilege::refusal(format!("loading program `{program}`"), &self.cause) {
            return error;
        }
        if super::kernel_older_than(5, 18) {
            let feature = format!("program `{program}` (xdp.frags)");
            return Error::KernelTooOld { feature, needs: "5.18", found: super::kernel_release() };
        }
        let full = matches!(self.cause.raw_os_error(), Some(libc::ENOMEM | libc::E2BIG | libc::ENOSPC));
        if let Some(size) = self.refused_map().filter(|_| full) {
            return Error::NoMemory {
                program,
                map: size.map.clone(),
                setting: "",
                entries: size.entries,
                bytes: size.bytes,
                memory_limit: cgroup::memory_limit(),
                cause: self.cause,
            };
        }
        let log = String::from_utf8_lossy(self.log.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned();
        // Without CAP_PERFMON the verifier trusts programs less, and rejects them with whatever number.
        let missing = privilege::missing_capabilities();
        if !log.is_empty() && !missing.is_empty() {
            let operation = format!("loading program `{program}`");
            return Error::MissingCapability { operation, capability: missing.join(", ") };
        }
        if log.is_empty() {
            return Error::Load { program, log: self.said.to_owned(), cause: self.cause };
        }
        let start = log.len().saturating_sub(LOG_SHOWN);
        let start = (start..log.len()).find(|at| log.is_char_boundary(*at)).unwrap_or(0);
        Error::Verifier { program, log: log[start..].to_owned(), cause: self.cause }
    }

    /// The map that libbpf could not create: nothing else tells which it was.
    fn refused_map(&self) -> Option<&Size> {
        let name = self.said.lines().find_map(|line| {
            let (name, rest) = line.strip_prefix("map \'")?.split_once('\'')?;
            rest.starts_with(": failed to create").then_some(name)
        })?;
        self.sizes.iter().find(|size| size.map == name)
    }
}
