//! Directories of pins: in a BPF file system, out of the reach of other users, locked by who edits them.
//!
//! Who may rename entries of a directory can put something else in the place of what is pinned. So a directory of pins has
//! to belong to this user or to root, and nobody else may write to it; and the same holds for those above it, up to the root
//! of the file system, where the sticky bit will do, as `mount -t bpf` sets it.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::{
        fd::BorrowedFd,
        unix::fs::{DirBuilderExt as _, MetadataExt as _},
    },
    path::Path,
    thread,
    time::{Duration, Instant},
};

use crate::{
    Error, Result,
    sys::{pin as sys_pin, privilege},
};

const STICKY: u32 = 0o1000;
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// Edits take milliseconds, long lists seconds; a process that waits longer gets an error.
pub(crate) const LOCK_PATIENCE: Duration = Duration::from_secs(10);
/// Of chains; editors do not make room for each other there.
const CHAIN_PATIENCE: Duration = Duration::from_secs(30);
const LOCK_POLL: Duration = Duration::from_millis(1);

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

pub(crate) fn failure(path: &Path, operation: &'static str) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |cause| Error::Pin { path, operation, cause }
}

pub(crate) fn put(fd: BorrowedFd<'_>, path: &Path) -> Result<()> {
    sys_pin::put(fd, path).map_err(failure(path, "pin there"))
}

/// Refuses a directory of pins, with those of these names one in the other in it, that is not in a BPF file system or that
/// other users can change. What does not exist is as good: nothing is pinned there.
pub(crate) fn check_directory(directory: &Path, names: &[&str]) -> Result<()> {
    let absolute = std::path::absolute(directory).map_err(failure(directory, "look at it"))?;
    check_file_system(&absolute)?;
    for above in absolute.ancestors().skip(1) {
        if above.exists() && !is_bpf_fs(above)? {
            break;
        }
        check_owner(above, STICKY)?;
    }
    let mut path = absolute;
    check_owner(&path, 0)?;
    for name in names {
        path.push(name);
        check_owner(&path, 0)?;
    }
    Ok(())
}

/// Creates a directory of pins and those above it that are missing, for this user alone.
pub(crate) fn create_directory(directory: &Path) -> Result<()> {
    check_directory(directory, &[])?;
    let absolute = std::path::absolute(directory).map_err(failure(directory, "look at it"))?;
    let mut missing: Vec<&Path> = absolute.ancestors().take_while(|path| !path.exists()).collect();
    missing.reverse();
    for path in missing {
        match DirBuilder::new().mode(0o700).create(path) {
            // Somebody else's, if it has come about meanwhile.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => other.map_err(failure(path, "create the directory"))?,
        }
    }
    check_directory(directory, &[])
}

/// The nearest directory that exists must be in a BPF file system.
fn check_file_system(directory: &Path) -> Result<()> {
    let nearest = directory.ancestors().find(|path| path.exists()).unwrap_or(directory);
    if is_bpf_fs(nearest)? { Ok(()) } else { Err(Error::NotBpfFs { path: directory.to_owned() }) }
}

fn is_bpf_fs(directory: &Path) -> Result<bool> {
    sys_pin::is_bpf_fs(directory).map_err(failure(directory, "look at its file system"))
}

/// `excuse`: a bit of the mode that makes up for the permission to write.
fn check_owner(path: &Path, excuse: u32) -> Result<()> {
    let found = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(failure(path, "look at its owner"))?,
    };
    let (owner, mode, user) = (found.uid(), found.mode(), privilege::user());
    let exposed = mode & WRITABLE_BY_OTHERS != 0 && mode & excuse == 0;
    if (owner != 0 && owner != user) || exposed {
        return Err(Error::PinsExposed { path: path.to_owned(), owner, mode, user });
    }
    Ok(())
}

/// Removes a directory of pins. Missing is as good.
pub(crate) fn remove_directory(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failure(directory, "remove the pins")(error)),
        _ => Ok(()),
    }
}

pub(crate) fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failure(path, "remove the pin")(error)),
        _ => Ok(()),
    }
}

pub(crate) fn names_in(directory: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(failure(directory, "list it"))?,
    };
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    names.collect::<io::Result<_>>().map_err(failure(directory, "list it"))
}

pub(crate) fn open(directory: &Path) -> Result<File> {
    File::open(directory).map_err(failure(directory, "open it"))
}

/// One editor at a time; the kernel frees the lock when the process ends.
pub(crate) fn lock(directory: &Path) -> Result<File> {
    let file = open(directory)?;
    lock_file(&file, directory, CHAIN_PATIENCE, || ())?;
    Ok(file)
}

/// Locks an open directory (flock(2)). `waiting` is called each time somebody else has it.
pub(crate) fn lock_file(file: &File, directory: &Path, patience: Duration, mut waiting: impl FnMut()) -> Result<()> {
    let end = Instant::now() + patience;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(fs::TryLockError::WouldBlock) if Instant::now() < end => {
                waiting();
                thread::sleep(LOCK_POLL);
            }
            Err(fs::TryLockError::WouldBlock) => {
                let holder = sys_pin::lock_holder(file).ok().flatten();
                return Err(Error::PinsLocked { path: directory.to_owned(), holder });
            }
            Err(fs::TryLockError::Error(error)) => return Err(failure(directory, "lock it")(error)),
        }
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
