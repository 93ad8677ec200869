//! Directories of pins: in a BPF file system, and out of the reach of other users.
//!
//! Who may rename entries of a directory can put something else in the place of what is pinned. So a directory of pins has
//! to belong to this user or to root, and nobody else may write to it; and the same holds for those above it, up to the root
//! of the file system, where the sticky bit will do, as `mount -t bpf` sets it.

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::Path,
};

use super::failure;
use crate::{
    Error, Result,
    sys::{pin as sys_pin, privilege},
};

const STICKY: u32 = 0o1000;
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// Refuses a directory of pins, with those of these names one in the other in it, that is not in a BPF file system or that
/// other users can change. What does not exist is as good: nothing is pinned there.
pub(super) fn check_directory(directory: &Path, names: &[&str]) -> Result<()> {
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
pub(super) fn create_directory(directory: &Path) -> Result<()> {
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
