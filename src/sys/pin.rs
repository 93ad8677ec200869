//! Pins: objects with a path in a BPF file system.

use std::{
    ffi::CString,
    fmt, fs, io,
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    },
    path::Path,
    ptr,
};

use libbpf_rs::libbpf_sys as raw;

use super::check;
use crate::Error;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Map,
    Program,
    Link,
    Other,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Map => "a map",
            Self::Program => "a program",
            Self::Link => "a link",
            Self::Other => "something else",
        })
    }
}

impl Kind {
    pub(crate) fn mismatch(self, path: &Path, expected: Self) -> Error {
        Error::PinMismatch {
            path: path.to_owned(),
            what: "the pinned object".into(),
            found: self.to_string(),
            expected: expected.to_string(),
        }
    }
}

/// What is pinned at a path; `Ok(None)` when nothing is.
pub(crate) fn kind_of(path: &Path) -> io::Result<Option<Kind>> {
    match get(path) {
        Ok(fd) => kind_of_fd(&fd).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The kernel names the file behind each descriptor; the `info` calls do not tell the kinds apart.
fn kind_of_fd(fd: &OwnedFd) -> io::Result<Kind> {
    let target = fs::read_link(format!("/proc/thread-self/fd/{}", fd.as_raw_fd()))?;
    Ok(match target.as_os_str().as_bytes() {
        b"anon_inode:bpf-map" => Kind::Map,
        b"anon_inode:bpf-prog" => Kind::Program,
        b"anon_inode:bpf_link" | b"anon_inode:bpf-link" => Kind::Link,
        _ => Kind::Other,
    })
}

/// A descriptor of the object pinned at a path.
pub(crate) fn get(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    // SAFETY: the path is a C string that lives through the call.
    let fd = check(unsafe { raw::bpf_obj_get(path.as_ptr()) })?;
    // SAFETY: the kernel just made this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Pins an object. Fails when the path exists.
pub(crate) fn put(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    // SAFETY: the path is a C string that lives through the call; the descriptor is open.
    check(unsafe { raw::bpf_obj_pin(fd.as_raw_fd(), path.as_ptr()) }).map(drop)
}

/// Exchanges two entries of a file system in one step (renameat2(2)).
pub(crate) fn exchange(one: &Path, other: &Path) -> io::Result<()> {
    let (one, other) = (c_path(one)?, c_path(other)?);
    // SAFETY: both paths are C strings that live through the call.
    let answer =
        unsafe { libc::renameat2(libc::AT_FDCWD, one.as_ptr(), libc::AT_FDCWD, other.as_ptr(), libc::RENAME_EXCHANGE) };
    check(answer).map(drop)
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// Whether a directory lies in a BPF file system.
pub(crate) fn is_bpf_fs(directory: &Path) -> io::Result<bool> {
    let path = c_path(directory)?;
    // SAFETY: all-zero is a valid value of this plain C struct, which the call overwrites.
    let mut answer: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the path is a C string and the answer a struct of the right type, both alive.
    if unsafe { libc::statfs(path.as_ptr(), ptr::from_mut(&mut answer)) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(i128::from(answer.f_type) == i128::from(libc::BPF_FS_MAGIC))
}

/// The process that holds the lock (flock(2)) of this file; `None` when nobody does, or a process of another PID namespace.
pub(crate) fn lock_holder(file: &fs::File) -> io::Result<Option<u32>> {
    let metadata = file.metadata()?;
    let (device, inode) = (metadata.dev(), metadata.ino());
    // As the kernel prints it: major and minor number of the device in hexadecimal digits, inode.
    let object = format!("{:02x}:{:02x}:{inode}", libc::major(device), libc::minor(device));
    let locks = fs::read_to_string("/proc/locks")?;
    let holder = locks.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let of_it = words.clone().any(|word| word == object) && words.clone().any(|word| word == "FLOCK");
        // A line with an arrow is of one who waits.
        (of_it && !line.contains("->")).then(|| words.nth(4)?.parse().ok())?
    });
    Ok(holder.filter(|pid| *pid != 0))
}
