//! Notices that something was made or removed in a directory (inotify(7)).

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::PathBuf,
};

use super::wake::Source;

/// A source that has news when the entries of one of these directories change.
#[derive(Debug)]
pub(crate) struct Notices(OwnedFd);

impl Notices {
    /// A directory that is gone gives no news.
    pub(crate) fn of(directories: impl Iterator<Item = PathBuf>) -> io::Result<Self> {
        // SAFETY: no pointers are involved.
        let fd = unsafe { libc::inotify_init1(libc::IN_NONBLOCK | libc::IN_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just made this descriptor, and nobody else knows it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        for directory in directories {
            let path = CString::new(directory.as_os_str().as_bytes()).map_err(io::Error::other)?;
            let what = libc::IN_CREATE | libc::IN_DELETE | libc::IN_MOVED_TO | libc::IN_DELETE_SELF;
            // SAFETY: the descriptor is open, and the path a C string that lives through the call.
            if unsafe { libc::inotify_add_watch(fd.as_raw_fd(), path.as_ptr(), what) } < 0 {
                match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::NotFound => {}
                    error => return Err(error),
                }
            }
        }
        Ok(Self(fd))
    }
}

impl AsFd for Notices {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Source for Notices {
    fn drain(&self) -> io::Result<()> {
        let mut buffer = [0_u8; 4096];
        loop {
            // SAFETY: the kernel writes at most so many bytes to a live buffer.
            let read = unsafe { libc::read(self.0.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
            if read > 0 {
                continue;
            }
            match io::Error::last_os_error() {
                error if read < 0 && error.kind() == io::ErrorKind::Interrupted => {}
                error if read < 0 && error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                _ => return Ok(()),
            }
        }
    }
}
