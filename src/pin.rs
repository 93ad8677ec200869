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

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use bytemuck::{Pod, Zeroable};

use crate::{
    Error, Interface, Result,
    stage::{Instance, Shared, StageKind},
    sys::{
        link::Link,
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

/// Creates a directory and its parents; the nearest one that exists must be in a BPF file system.
fn create_directory(directory: &Path) -> Result<()> {
    check_bpf_fs(directory.ancestors().find(|path| path.exists()).unwrap_or(directory))?;
    fs::create_dir_all(directory).map_err(failure(directory, "create the directory"))
}

fn check_bpf_fs(directory: &Path) -> Result<()> {
    match sys_pin::is_bpf_fs(directory).map_err(failure(directory, "look at its file system"))? {
        true => Ok(()),
        false => Err(Error::NotBpfFs { path: directory.to_owned() }),
    }
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
/// an ordinary one, which is left alone.
pub fn remove_pins(directory: impl AsRef<Path>) -> Result<()> {
    let directory = directory.as_ref();
    if !directory.exists() {
        return Ok(());
    }
    check_bpf_fs(directory)?;
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

/// What packets meet on an interface, as its pinned slots tell.
#[derive(Debug, Default)]
pub(crate) struct PinnedChain {
    /// Names of the stages, in order.
    pub(crate) stages: Vec<String>,
    /// Id of the caller's own program at the end.
    pub(crate) last: Option<u32>,
}

/// The pins of one interface. Holds no lock: each edit takes one.
#[derive(Debug)]
pub(crate) struct InterfacePins {
    directory: PathBuf,
    home: PathBuf,
}

impl InterfacePins {
    pub(crate) fn new(directory: &Path, interface: &Interface) -> Result<Self> {
        create_directory(directory)?;
        let home = directory.join(INTERFACES).join(interface.index().to_string());
        Ok(Self { directory: directory.to_owned(), home })
    }

    pub(crate) fn lock(&self) -> Result<File> {
        lock(&self.directory)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.home
    }

    /// Pins a stage's tables, unless they are.
    pub(crate) fn stage(&self, stage: &Shared, undo: &mut Undo) -> Result<()> {
        if let Some(home) = pin_stage(&self.directory, stage)? {
            undo.add(home);
        }
        Ok(())
    }

    /// Pins a new instance; answers its directory.
    pub(crate) fn member(&self, stage: &str, instance: &Instance, undo: &mut Undo) -> Result<PathBuf> {
        let home = self.home.join(format!("{}-{stage}", instance.program.id()));
        // A program id is never used again while the program lives, so what is here is a remnant.
        remove_directory(&home)?;
        create_directory(&home)?;
        undo.add(home.clone());
        put(instance.program.as_fd(), &home.join(PROGRAM))?;
        put(instance.slot.as_fd(), &home.join(NEXT))?;
        Ok(home)
    }

    /// Removes the pins of attachments whose interface is gone, this one's among them.
    pub(crate) fn remove_dead(&self) -> Result<()> {
        let interfaces = self.directory.join(INTERFACES);
        for name in names_in(&interfaces)? {
            let home = interfaces.join(name);
            if let Some(link) = Link::open_pinned(&home.join(LINK))?
                && link.info().map_err(failure(&home.join(LINK), "read it"))?.interface == 0
            {
                remove_directory(&home)?;
            }
        }
        Ok(())
    }

    pub(crate) fn link(&self) -> Result<Option<Link>> {
        Link::open_pinned(&self.home.join(LINK))
    }

    pub(crate) fn put_link(&self, link: &Link) -> Result<()> {
        put(link.as_fd(), &self.home.join(LINK))
    }

    pub(crate) fn remove_link(&self) -> Result<()> {
        remove_file(&self.home.join(LINK))
    }

    /// Pins the caller's own last program. Beside the one before, so that at no moment the one in force is without.
    pub(crate) fn put_last(&self, program: &Program, undo: &mut Undo) -> Result<()> {
        let path = self.last_path(program.id());
        if path.exists() {
            return Ok(());
        }
        create_directory(&self.home.join(LAST))?;
        put(program.as_fd(), &path)?;
        undo.add(path);
        Ok(())
    }

    pub(crate) fn last(&self, id: u32) -> Result<Program> {
        let path = self.last_path(id);
        Program::open_pinned(&path)?.ok_or(Error::PinMissing { path })
    }

    pub(crate) fn remove_last(&self, id: u32) -> Result<()> {
        remove_file(&self.last_path(id))
    }

    fn last_path(&self, id: u32) -> PathBuf {
        self.home.join(LAST).join(id.to_string())
    }

    /// Follows the slots from the program that the link runs; an empty chain when that is not one of ours.
    pub(crate) fn chain(&self, head: u32) -> Result<PinnedChain> {
        let mut chain = PinnedChain::default();
        let mut next = Some(head);
        while let Some(id) = next {
            let Some((name, home)) = self.find_member(id)? else {
                chain.last = Some(id).filter(|_| !chain.stages.is_empty());
                break;
            };
            chain.stages.push(name);
            let path = home.join(NEXT);
            let slot = map::open_pinned(&path, NEXT)?.ok_or(Error::PinMissing { path })?;
            next = slot.slot_program()?;
        }
        Ok(chain)
    }

    /// The program that the pinned instance of this id runs, to name it in an update.
    pub(crate) fn program(&self, id: u32) -> Result<Option<Program>> {
        match self.find_member(id)? {
            Some((_, home)) => Program::open_pinned(&home.join(PROGRAM)),
            None => Ok(None),
        }
    }

    fn find_member(&self, id: u32) -> Result<Option<(String, PathBuf)>> {
        let prefix = format!("{id}-");
        let names = names_in(&self.home)?;
        Ok(names.iter().find_map(|name| Some((name.strip_prefix(&prefix)?.to_owned(), self.home.join(name)))))
    }

    /// Removes the pins of all instances and last programs that are not of this chain.
    pub(crate) fn sweep(&self, members: &[&Path], last: Option<u32>) -> Result<()> {
        for name in names_in(&self.home)?.iter().filter(|name| name.contains('-')) {
            let path = self.home.join(name);
            if !members.contains(&path.as_path()) {
                remove_directory(&path)?;
            }
        }
        for name in names_in(&self.home.join(LAST))? {
            if last.is_none_or(|id| name != id.to_string()) {
                remove_file(&self.home.join(LAST).join(name))?;
            }
        }
        Ok(())
    }

    /// Removes all pins of the interface; the stages' tables stay.
    pub(crate) fn remove(&self) -> Result<()> {
        remove_directory(&self.home)
    }
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
/// [`Error::Pin`] or [`Error::PinMismatch`] naming the pin that could not be read.
pub fn pinned(directory: impl AsRef<Path>) -> Result<Pinned> {
    let directory = directory.as_ref();
    let mut pinned = Pinned::default();
    // Names with `+` are half-made: a process died over them.
    for name in names_in(&directory.join(STAGES))?.into_iter().filter(|name| check_name(name).is_ok()) {
        let path = map_path(directory, &name, ABI);
        let record = map::open_pinned(&path, ABI)?.ok_or(Error::PinMissing { path: path.clone() })?;
        pinned.stages.push((name, read_abi(&record, &path)?.kind()));
    }
    for name in names_in(&directory.join(INTERFACES))? {
        let Ok(index) = name.parse() else { continue };
        let pins = InterfacePins { directory: directory.to_owned(), home: directory.join(INTERFACES).join(&name) };
        if let Some(link) = pins.link()? {
            let info = link.info().map_err(failure(&pins.home.join(LINK), "read it"))?;
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
