//! Where things are pinned, so that they survive the process.
//!
//! ```text
//! DIR/stages/NAME/abi                       fingerprint of the layouts, and the kind of stage
//! DIR/stages/NAME/MAP                       the tables of a value
//! DIR/interfaces/IFINDEX/link               the attachment
//! DIR/interfaces/IFINDEX/ID-NAME/program    an instance in the chain of that interface, by program id
//! DIR/interfaces/IFINDEX/ID-NAME/next       its slot: who comes next
//! DIR/interfaces/IFINDEX/last/ID            the caller's own program at the end, by program id
//! ```
//!
//! The order of a chain is written nowhere: the slots are the order, so that it is true at every moment, also
//! after a crash in the middle of an edit. Instances that no packet can reach are swept when the chain is next
//! taken over.

mod directory;
mod interface;

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use bytemuck::{Pod, Zeroable};
use directory::{check_directory, create_directory};
pub(crate) use interface::InterfacePins;

use crate::{
    Error, Result,
    stage::{Shared, StageKind},
    sys::{
        map::{self, Map, TypedMap},
        pin as sys_pin,
        program::Program,
    },
};

const STAGES: &str = "stages";
const INTERFACES: &str = "interfaces";
const ABI: &str = "abi";
const LINK: &str = "link";
const LAST: &str = "last";
const PROGRAM: &str = "program";
const NEXT: &str = "next";

/// The record beside a stage's maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
struct Abi {
    fingerprint: u64,
    /// Name of the kind, padded with zeros.
    kind: [u8; 24],
}

impl Abi {
    fn of(kind: &StageKind) -> Self {
        let mut name = [0; 24];
        name[..kind.name.len()].copy_from_slice(kind.name.as_bytes());
        Self { fingerprint: kind.abi, kind: name }
    }

    fn kind(&self) -> String {
        String::from_utf8_lossy(&self.kind).trim_end_matches('\0').to_owned()
    }
}

/// Names become file names, and a BPF file system takes no dots.
pub(crate) fn check_name(name: &str) -> Result<()> {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' || c == '-';
    if name.is_empty() || name.len() > 32 || !name.chars().all(fits) {
        return Err(Error::Invalid {
            what: "stage name",
            value: name.to_owned(),
            expected: "1 to 32 of a-z, 0-9, `_` and `-`",
        });
    }
    Ok(())
}

fn failure(path: &Path, operation: &'static str) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |cause| Error::Pin { path, operation, cause }
}

fn put(fd: BorrowedFd<'_>, path: &Path) -> Result<()> {
    sys_pin::put(fd, path).map_err(failure(path, "pin there"))
}

/// Removes a directory of pins. Missing is as good.
fn remove_directory(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failure(directory, "remove the pins")(error)),
        _ => Ok(()),
    }
}

fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failure(path, "remove the pin")(error)),
        _ => Ok(()),
    }
}

/// Removes everything that this crate pinned below a directory, and with it every attachment that no process
/// holds. What else lies in the directory stays.
///
/// # Errors
/// [`Error::Pin`] naming what could not be removed, [`Error::PinsLocked`]; [`Error::NotBpfFs`] when the directory is
/// an ordinary one, which is left alone; [`Error::PinsExposed`].
pub fn remove_pins(directory: impl AsRef<Path>) -> Result<()> {
    let directory = directory.as_ref();
    check_directory(directory, &[STAGES])?;
    check_directory(directory, &[INTERFACES])?;
    if !directory.exists() {
        return Ok(());
    }
    let _lock = lock(directory)?;
    // Links first: a program must not go on without its tables' names.
    remove_directory(&directory.join(INTERFACES))?;
    remove_directory(&directory.join(STAGES))
}

/// Opens an XDP program that is pinned, such as one of the caller's own for [`Pipeline::set_last`](crate::Pipeline::set_last).
///
/// # Errors
/// [`Error::PinMissing`]; [`Error::PinMismatch`] when something else is pinned there; [`Error::IncompatibleProgram`] for
/// a program of another type; [`Error::Pin`].
pub fn open_program(path: impl AsRef<Path>) -> Result<OwnedFd> {
    let path = path.as_ref();
    let program = Program::open_pinned(path)?.ok_or_else(|| Error::PinMissing { path: path.to_owned() })?;
    program.as_fd().try_clone_to_owned().map_err(failure(path, "open it"))
}

/// Edits take milliseconds; who waits longer is told.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// One editor at a time; the kernel frees the lock when the process ends.
fn lock(directory: &Path) -> Result<File> {
    let file = File::open(directory).map_err(failure(directory, "open it"))?;
    let end = Instant::now() + LOCK_PATIENCE;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(fs::TryLockError::WouldBlock) if Instant::now() < end => thread::sleep(Duration::from_millis(2)),
            Err(fs::TryLockError::WouldBlock) => return Err(Error::PinsLocked { path: directory.to_owned() }),
            Err(fs::TryLockError::Error(error)) => return Err(failure(directory, "lock it")(error)),
        }
    }
}

/// Pins made on the way to something: taken away again, unless it came about.
#[derive(Debug, Default)]
pub(crate) struct Undo(Vec<PathBuf>);

impl Undo {
    pub(crate) fn add(&mut self, path: PathBuf) {
        self.0.push(path);
    }

    pub(crate) fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        for path in self.0.drain(..).rev() {
            // There is an error to report already, and what stays is swept by the next take-over.
            let _ = fs::remove_file(&path).or_else(|_| fs::remove_dir_all(&path));
        }
    }
}

/// Where a map of a pinned stage is, for who only reads it.
pub(crate) fn open_map(directory: &Path, stage: &str, name: &str) -> Result<Map> {
    check_directory(directory, &[STAGES, stage])?;
    let path = map_path(directory, stage, name);
    map::open_pinned(&path, name)?.ok_or(Error::PinMissing { path })
}

pub(crate) fn map_path(directory: &Path, stage: &str, map: &str) -> PathBuf {
    directory.join(STAGES).join(stage).join(map)
}

/// Opens the tables of a stage, after checking that this build understands them.
pub(crate) fn open_stage(directory: &Path, name: &str, kind: &'static StageKind) -> Result<Vec<Map>> {
    check_directory(directory, &[STAGES, name])?;
    let home = directory.join(STAGES).join(name);
    let path = home.join(ABI);
    let Some(record) = map::open_pinned(&path, ABI)? else {
        return Err(Error::PinMissing { path: home });
    };
    let (found, expected) = (read_abi(&record, &path)?, Abi::of(kind));
    let mismatch = |what: &str, found: String, expected: String| Error::PinMismatch {
        path: path.clone(),
        what: what.into(),
        found,
        expected,
    };
    if found.kind != expected.kind {
        return Err(mismatch("the kind of stage", found.kind(), expected.kind()));
    }
    if found.fingerprint != expected.fingerprint {
        let hex = |abi: Abi| format!("{:016x}", abi.fingerprint);
        return Err(mismatch("the ABI fingerprint", hex(found), hex(expected)));
    }
    let mut maps = Vec::new();
    for name in names_in(&home)?.into_iter().filter(|name| name != ABI) {
        maps.extend(map::open_pinned(&home.join(&name), &name)?);
    }
    Ok(maps)
}

fn read_abi(record: &Map, path: &Path) -> Result<Abi> {
    if !record.is_record_of(size_of::<Abi>()) {
        return Err(Error::PinMismatch {
            path: path.to_owned(),
            what: "the ABI record".into(),
            found: record.shape(),
            expected: format!("an array of one value of {} bytes", size_of::<Abi>()),
        });
    }
    Ok(TypedMap::<u32, Abi>::new(record).get(&0)?.unwrap_or(Abi::zeroed()))
}

/// Pins the tables of a stage, or checks that the ones pinned there are the same. Answers the directory if it is new.
fn pin_stage(directory: &Path, stage: &Shared) -> Result<Option<PathBuf>> {
    check_directory(directory, &[STAGES, &stage.name])?;
    let home = directory.join(STAGES).join(&stage.name);
    if home.exists() {
        for map in &stage.maps {
            let path = home.join(map.name());
            let pinned = map::open_pinned(&path, map.name())?.ok_or(Error::PinMissing { path: path.clone() })?;
            let (found, expected) = (pinned.id()?, map.id()?);
            if found != expected {
                return Err(Error::PinMismatch {
                    path,
                    what: format!("the table of stage `{}`", stage.name),
                    found: format!("map {found} of another value"),
                    expected: format!(
                        "map {expected} of this one (adopt the pinned stage instead of loading a new one)"
                    ),
                });
            }
        }
        return Ok(None);
    }
    // Aside first, then renamed: a crash leaves no half of a stage that could be adopted.
    let aside = directory.join(STAGES).join(format!("{}+", stage.name));
    remove_directory(&aside)?;
    create_directory(&aside)?;
    let record = Map::create_record("xdpkit_abi", size_of::<Abi>())?;
    let table = TypedMap::<u32, Abi>::new(&record);
    table.set(&0, &Abi::of(stage.kind)).map_err(|error| record.error("write the fingerprint", error))?;
    put(record.as_fd(), &aside.join(ABI))?;
    for map in &stage.maps {
        put(map.as_fd(), &aside.join(map.name()))?;
    }
    fs::rename(&aside, &home).map_err(failure(&home, "put the pins in place"))?;
    Ok(Some(home))
}

fn names_in(directory: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(failure(directory, "list it"))?,
    };
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    names.collect::<io::Result<_>>().map_err(failure(directory, "list it"))
}

/// What stands in a directory of pins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Pinned {
    /// Each stage's name and kind (`firewall`, `monitor`, ...), sorted by name.
    pub stages: Vec<(String, String)>,
    /// Each interface's index, with the names of the stages that its packets meet, in order.
    pub interfaces: Vec<(u32, Vec<String>)>,
}

/// Tells what is pinned in a directory: what a new process can adopt.
///
/// # Errors
/// [`Error::Pin`] or [`Error::PinMismatch`] naming the pin that could not be read; [`Error::NotBpfFs`] where nothing can be
/// pinned at all; [`Error::PinsExposed`]. A directory that is missing from a BPF file system holds nothing.
pub fn pinned(directory: impl AsRef<Path>) -> Result<Pinned> {
    let directory = directory.as_ref();
    check_directory(directory, &[STAGES])?;
    check_directory(directory, &[INTERFACES])?;
    let mut pinned = Pinned::default();
    // Names with `+` are half-made: a process died over them.
    for name in names_in(&directory.join(STAGES))?.into_iter().filter(|name| check_name(name).is_ok()) {
        let path = map_path(directory, &name, ABI);
        let record = open_map(directory, &name, ABI)?;
        pinned.stages.push((name, read_abi(&record, &path)?.kind()));
    }
    for name in names_in(&directory.join(INTERFACES))? {
        let Ok(index) = name.parse() else { continue };
        check_directory(directory, &[INTERFACES, &name])?;
        let pins = InterfacePins::of(directory, &name);
        if let Some(link) = pins.link()? {
            let info = link.info().map_err(failure(&pins.path().join(LINK), "read it"))?;
            pinned.interfaces.push((index, pins.chain(info.program)?.stages));
        }
    }
    pinned.stages.sort_unstable();
    pinned.interfaces.sort_unstable();
    Ok(pinned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stage_names_are_file_names_without_dots() {
        for good in ["firewall", "edge-1", "a_b"] {
            check_name(good).unwrap();
        }
        for bad in ["", "a.b", "../x", "a/b", "Firewall", "abcdefghijklmnopqrstuvwxyz0123456789"] {
            let error = check_name(bad).unwrap_err().to_string();
            assert!(error.contains(&format!("stage name `{bad}`")), "{error}");
        }
    }
}
