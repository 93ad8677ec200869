//! XDP links: made with a mode, updated atomically, pinned.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
    path::Path,
};

use libbpf_rs::libbpf_sys as raw;

use super::{check, pin};
use crate::{Error, Result};

/// The attachment of a program to an interface. Ends with its last descriptor or pin.
#[derive(Debug)]
pub(crate) struct Link {
    fd: OwnedFd,
}

/// What a link says of itself.
pub(crate) struct LinkInfo {
    /// 0 once the interface is gone.
    pub(crate) interface: u32,
    pub(crate) program: u32,
}

impl Link {
    /// `flags`: one of `XDP_FLAGS_*_MODE`.
    pub(crate) fn create(program: BorrowedFd<'_>, interface: u32, flags: u32) -> io::Result<Self> {
        let target = i32::try_from(interface).map_err(io::Error::other)?;
        let options = raw::bpf_link_create_opts {
            sz: size_of::<raw::bpf_link_create_opts>() as raw::size_t,
            flags,
            ..Default::default()
        };
        // SAFETY: the descriptor is open and the options a live struct with its size in it.
        let answer = unsafe { raw::bpf_link_create(program.as_raw_fd(), target, raw::BPF_XDP, &raw const options) };
        let fd = check(answer)?;
        // SAFETY: the kernel just made this descriptor, and nobody else knows it.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// Opens a pinned link; `Ok(None)` when nothing is pinned there.
    pub(crate) fn open_pinned(path: &Path) -> Result<Option<Self>> {
        let fail = |cause| Error::Pin { path: path.to_owned(), operation: "open it", cause };
        match pin::kind_of(path).map_err(fail)? {
            None => Ok(None),
            Some(pin::Kind::Link) => Ok(Some(Self { fd: pin::get(path).map_err(fail)? })),
            Some(other) => Err(other.mismatch(path, pin::Kind::Link)),
        }
    }

    pub(crate) fn info(&self) -> io::Result<LinkInfo> {
        let mut info = raw::bpf_link_info::default();
        let mut size = size_of_val(&info) as u32;
        // SAFETY: `info` is a plain C struct of `size` bytes, zeroed, so that the kernel follows no pointer in it.
        check(unsafe { raw::bpf_link_get_info_by_fd(self.fd.as_raw_fd(), &raw mut info, &raw mut size) })?;
        if info.type_ != raw::BPF_LINK_TYPE_XDP {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the link is not one of XDP"));
        }
        // SAFETY: the kernel fills the `xdp` member for a link of this type, and it is plain data.
        let interface = unsafe { info.__bindgen_anon_1.xdp.ifindex };
        Ok(LinkInfo { interface, program: info.prog_id })
    }

    /// Swaps the program in one step, if `old` is still the one that runs.
    pub(crate) fn replace(&self, old: BorrowedFd<'_>, new: BorrowedFd<'_>) -> io::Result<()> {
        let options = raw::bpf_link_update_opts {
            sz: size_of::<raw::bpf_link_update_opts>() as raw::size_t,
            flags: raw::BPF_F_REPLACE,
            old_prog_fd: u32::try_from(old.as_raw_fd()).map_err(io::Error::other)?,
            ..Default::default()
        };
        // SAFETY: all descriptors are open and the options a live struct with its size in it.
        let answer = unsafe { raw::bpf_link_update(self.fd.as_raw_fd(), new.as_raw_fd(), &raw const options) };
        check(answer).map(drop)
    }

    /// Ends the attachment although descriptors or pins remain.
    pub(crate) fn detach(&self) -> io::Result<()> {
        // SAFETY: the descriptor is open.
        check(unsafe { raw::bpf_link_detach(self.fd.as_raw_fd()) }).map(drop)
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
