//! Where things are pinned, so that they survive the process.
//!
//! ```text
//! DIR/stages/NAME/abi                       fingerprint of the layouts, and the kind of stage
//! DIR/stages/NAME/MAP                       the tables of a value
//! DIR/interfaces/IFINDEX/link               the attachment
//! DIR/interfaces/IFINDEX/ID-NAME/program    an instance in the chain of that interface, by program id
//! DIR/interfaces/IFINDEX/ID-NAME/next       its slot: who comes next
//! DIR/interfaces/IFINDEX/last               the caller's own program at the end
//! ```
//!
//! The order of a chain is written nowhere: the slots are the order, so that it is true at every moment, also
//! after a crash in the middle of an edit. Instances that no packet can reach are swept at the next edit.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd as _, BorrowedFd},
    path::{Path, PathBuf},
};

use bytemuck::{Pod, Zeroable};

use crate::{
    Error, Interface, Result,
    stage::{Instance, Shared, StageKind},
    sys::{
        link::Link,
        map::{self, Map, TypedMap},
        pin as sys_pin,
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
    move |source| Error::Pin { path, operation, source }
}

fn put(fd: BorrowedFd<'_>, path: &Path) -> Result<()> {
    sys_pin::put(fd, path).map_err(failure(path, "pin there"))
}

/// Creates a directory and its parents; the nearest one that exists must be in a BPF file system.
fn create_directory(directory: &Path) -> Result<()> {
    let existing = directory.ancestors().find(|path| path.exists()).unwrap_or(directory);
    if !sys_pin::is_bpf_fs(existing).map_err(failure(existing, "look at its file system"))? {
        return Err(Error::NotBpfFs { path: directory.to_owned() });
    }
    fs::create_dir_all(directory).map_err(failure(directory, "create the directory"))
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
/// [`Error::Pin`] naming what could not be removed, [`Error::PinsLocked`].
pub fn remove_pins(directory: impl AsRef<Path>) -> Result<()> {
    let directory = directory.as_ref();
    if !directory.exists() {
        return Ok(());
    }
    let _lock = lock(directory)?;
    // Links first: a program must not go on without its tables' names.
    remove_directory(&directory.join(INTERFACES))?;
    remove_directory(&directory.join(STAGES))
}

/// One editor at a time; the kernel frees the lock when the process ends.
fn lock(directory: &Path) -> Result<File> {
    let file = File::open(directory).map_err(failure(directory, "open it"))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(Error::PinsLocked { path: directory.to_owned() }),
        Err(fs::TryLockError::Error(error)) => Err(failure(directory, "lock it")(error)),
    }
}

pub(crate) fn map_path(directory: &Path, stage: &str, map: &str) -> PathBuf {
    directory.join(STAGES).join(stage).join(map)
}

/// Opens the tables of a stage, after checking that this build understands them.
pub(crate) fn open_stage(directory: &Path, name: &str, kind: &'static StageKind) -> Result<Vec<Map>> {
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
    let handle = record.handle();
    let size = {
        use libbpf_rs::MapCore as _;
        (handle.key_size() as usize, handle.value_size() as usize)
    };
    if size != (4, size_of::<Abi>()) {
        return Err(Error::PinMismatch {
            path: path.to_owned(),
            what: "the size of the ABI record".into(),
            found: size.1.to_string(),
            expected: size_of::<Abi>().to_string(),
        });
    }
    Ok(TypedMap::<u32, Abi>::new(record).get(&0)?.unwrap_or(Abi::zeroed()))
}

/// Pins the tables of a stage, or checks that the ones pinned there are the same.
fn pin_stage(directory: &Path, stage: &Shared) -> Result<()> {
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
        return Ok(());
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
    fs::rename(&aside, &home).map_err(failure(&home, "put the pins in place"))
}

fn names_in(directory: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(failure(directory, "list it"))?,
    };
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    names.collect::<io::Result<_>>().map_err(failure(directory, "list it"))
}

/// The pins of one interface. Holds no lock: each edit takes one.
#[derive(Debug)]
pub(crate) struct InterfacePins {
    directory: PathBuf,
    home: PathBuf,
}

impl InterfacePins {
    pub(crate) fn new(directory: &Path, interface: &Interface) -> Result<Self> {
        let home = directory.join(INTERFACES).join(interface.index().to_string());
        create_directory(&home)?;
        Ok(Self { directory: directory.to_owned(), home })
    }

    pub(crate) fn lock(&self) -> Result<File> {
        lock(&self.directory)
    }

    pub(crate) fn stage(&self, stage: &Shared) -> Result<()> {
        pin_stage(&self.directory, stage)
    }

    /// Pins a new instance; answers its directory.
    pub(crate) fn member(&self, stage: &str, instance: &Instance) -> Result<PathBuf> {
        let home = self.home.join(format!("{}-{stage}", instance.program.id()));
        // A program id is never used again while the program lives, so what is here is a remnant.
        remove_directory(&home)?;
        create_directory(&home)?;
        put(instance.program.as_fd(), &home.join(PROGRAM))?;
        put(instance.slot.as_fd(), &home.join(NEXT))?;
        Ok(home)
    }

    pub(crate) fn link(&self) -> Result<Option<Link>> {
        Link::open_pinned(&self.home.join(LINK))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.home
    }

    pub(crate) fn put_link(&self, link: &Link) -> Result<()> {
        put(link.as_fd(), &self.home.join(LINK))
    }

    pub(crate) fn last(&self) -> Result<Option<crate::sys::program::Program>> {
        crate::sys::program::Program::open_pinned(&self.home.join(LAST))
    }

    /// Pins the caller's own last program, in the place of one that was there.
    pub(crate) fn put_last(&self, program: BorrowedFd<'_>) -> Result<()> {
        remove_file(&self.home.join(LAST))?;
        put(program, &self.home.join(LAST))
    }

    pub(crate) fn remove_last(&self) -> Result<()> {
        remove_file(&self.home.join(LAST))
    }

    /// Removes the pins of all instances but those of `kept`.
    pub(crate) fn sweep(&self, kept: &[&Path]) -> Result<()> {
        for name in names_in(&self.home)? {
            let path = self.home.join(&name);
            if name.contains('-') && !kept.contains(&path.as_path()) {
                remove_directory(&path)?;
            }
        }
        Ok(())
    }

    /// The program that the pinned instance of this id runs, to name it in an update.
    pub(crate) fn program(&self, id: u32) -> Result<Option<crate::sys::program::Program>> {
        let prefix = format!("{id}-");
        match names_in(&self.home)?.into_iter().find(|name| name.starts_with(&prefix)) {
            Some(name) => crate::sys::program::Program::open_pinned(&self.home.join(name).join(PROGRAM)),
            None => Ok(None),
        }
    }

    /// Removes all pins of the interface; the stages' tables stay.
    pub(crate) fn remove(&self) -> Result<()> {
        remove_directory(&self.home)
    }
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
