//! The mount system calls: a detached bpffs, sysfs or cgroup2, or a bpffs mounted the old way.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;

use super::{check, check_fd};

const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;

/// A bpffs that is mounted nowhere: it lives as long as the descriptor.
pub(crate) fn detached_bpffs() -> io::Result<OwnedFd> {
    detached(c"bpf")
}

/// A sysfs that shows the interfaces of the calling thread's network namespace, mounted nowhere.
pub(crate) fn detached_sysfs() -> io::Result<OwnedFd> {
    detached(c"sysfs")
}

/// The hierarchy of control groups, mounted nowhere.
pub(crate) fn detached_cgroups() -> io::Result<OwnedFd> {
    detached(c"cgroup2")
}

fn detached(kind: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: the file system's name is a C string that outlives the call.
    let context = check_fd(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), FSOPEN_CLOEXEC) })?;
    let (null, fd) = (ptr::null::<libc::c_char>(), context.as_raw_fd());
    // SAFETY: this command takes no key and no value; the context is open.
    let created = unsafe { libc::syscall(libc::SYS_fsconfig, fd, FSCONFIG_CMD_CREATE, null, null, 0) };
    check(created as libc::c_int)?;
    // SAFETY: the context is open; the other arguments are plain flags.
    check_fd(unsafe { libc::syscall(libc::SYS_fsmount, fd, FSMOUNT_CLOEXEC, 0) })
}

/// Mounts a new bpffs on the directory `target`.
pub(crate) fn mount_bpffs(target: &CStr) -> io::Result<()> {
    // SAFETY: all strings are terminated and outlive the call; bpffs takes no data.
    check(unsafe { libc::mount(c"bpf".as_ptr(), target.as_ptr(), c"bpf".as_ptr(), 0, ptr::null()) }).map(drop)
}

/// Takes the mount on `target` away, even while it is in use.
pub(crate) fn unmount(target: &CStr) -> io::Result<()> {
    // SAFETY: the path is terminated and outlives the call.
    check(unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) }).map(drop)
}
