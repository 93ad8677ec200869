//! Owned program handles and test runs.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
    path::Path,
    time::Duration,
};

use libbpf_rs::libbpf_sys as raw;

use super::{check, pin};
use crate::{Error, Result};

/// `struct xdp_md` as a test run takes it.
#[derive(Clone, Copy)]
#[repr(C)]
struct XdpMd {
    data: u32,
    data_end: u32,
    data_meta: u32,
    ingress_ifindex: u32,
    rx_queue_index: u32,
    egress_ifindex: u32,
}

/// A loaded XDP program.
#[derive(Debug)]
pub(crate) struct Program {
    fd: OwnedFd,
    name: String,
    id: u32,
}

/// What a test run is asked to do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RunRequest<'a> {
    pub(crate) frame: &'a [u8],
    pub(crate) repeat: u32,
    /// Interface index and receive queue.
    pub(crate) ingress: Option<(u32, u32)>,
    /// Bytes of the frame in its first buffer; the rest goes to further ones.
    pub(crate) linear: Option<u32>,
    /// Frames a batch; the frames are really sent where the program says.
    pub(crate) live: Option<u32>,
}

pub(crate) struct RunAnswer {
    pub(crate) code: u32,
    pub(crate) frame: Vec<u8>,
    pub(crate) duration: Duration,
}

impl Program {
    /// Takes a descriptor over, if it is one of an XDP program.
    pub(crate) fn from_fd(fd: OwnedFd) -> Result<Self> {
        let mut info = raw::bpf_prog_info::default();
        let mut size = size_of_val(&info) as u32;
        // SAFETY: `info` is a plain C struct of `size` bytes, zeroed, so that the kernel follows no pointer in it.
        let answer = unsafe { raw::bpf_prog_get_info_by_fd(fd.as_raw_fd(), &raw mut info, &raw mut size) };
        let unreadable = |cause| Error::Program { program: "?".into(), operation: "read its description", cause };
        check(answer).map_err(unreadable)?;
        // SAFETY: the kernel ends the name with a zero inside the array, which was zeroed before.
        let name = unsafe { CStr::from_ptr(info.name.as_ptr()) }.to_string_lossy().into_owned();
        if info.type_ != raw::BPF_PROG_TYPE_XDP {
            return Err(Error::IncompatibleProgram { program: name, id: info.id, why: "it is not an XDP program" });
        }
        Ok(Self { fd, name, id: info.id })
    }

    /// Opens a pinned program; `Ok(None)` when nothing is pinned there.
    pub(crate) fn open_pinned(path: &Path) -> Result<Option<Self>> {
        let fail = |cause| Error::Pin { path: path.to_owned(), operation: "open it", cause };
        match pin::kind_of(path).map_err(fail)? {
            None => Ok(None),
            Some(pin::Kind::Program) => Self::from_fd(pin::get(path).map_err(fail)?).map(Some),
            Some(other) => Err(other.mismatch(path, pin::Kind::Program)),
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    pub(crate) fn run(&self, request: &RunRequest<'_>) -> Result<RunAnswer> {
        let fail = |cause| Error::TestRun { program: self.name.clone(), length: request.frame.len(), cause };
        // Room for the headers that a program may prepend.
        let mut out = vec![0_u8; if request.live.is_some() { 0 } else { request.frame.len() + 512 }];
        let length = u32::try_from(request.frame.len()).map_err(|_| fail(io::ErrorKind::InvalidInput.into()))?;
        let (interface, queue) = request.ingress.unwrap_or((0, 0));
        let mut context = XdpMd {
            data: 0,
            data_end: request.linear.unwrap_or(length).min(length),
            data_meta: 0,
            ingress_ifindex: interface,
            rx_queue_index: queue,
            egress_ifindex: 0,
        };
        let mut options = raw::bpf_test_run_opts {
            sz: size_of::<raw::bpf_test_run_opts>() as raw::size_t,
            data_in: request.frame.as_ptr().cast(),
            data_size_in: length,
            repeat: i32::try_from(request.repeat).map_err(|_| fail(io::ErrorKind::InvalidInput.into()))?,
            ..Default::default()
        };
        if request.ingress.is_some() || request.linear.is_some() {
            options.ctx_in = (&raw mut context).cast();
            options.ctx_size_in = size_of::<XdpMd>() as u32;
        }
        if let Some(batch) = request.live {
            options.flags = raw::BPF_F_TEST_XDP_LIVE_FRAMES;
            options.batch_size = batch;
        } else {
            options.data_out = out.as_mut_ptr().cast();
            options.data_size_out = out.len() as u32;
        }
        // SAFETY: every pointer in `options` is to a live buffer with its size beside it; the kernel writes at
        // most `data_size_out` bytes to `data_out`.
        let answer = unsafe { raw::bpf_prog_test_run_opts(self.fd.as_raw_fd(), &raw mut options) };
        check(answer).map_err(fail)?;
        out.truncate(options.data_size_out as usize);
        let duration = Duration::from_nanos(options.duration.into());
        Ok(RunAnswer { code: options.retval, frame: out, duration })
    }
}

/// The name of a program by its id, as far as the kernel keeps it; empty when it does not tell: that takes CAP_SYS_ADMIN.
pub(crate) fn name_of(id: u32) -> String {
    // SAFETY: no pointers are involved.
    let fd = unsafe { raw::bpf_prog_get_fd_by_id(id) };
    if fd < 0 {
        return String::new();
    }
    // SAFETY: the kernel just made this descriptor, and nobody else knows it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    match Program::from_fd(fd) {
        Ok(program) => program.name,
        Err(_) => String::new(),
    }
}

impl AsFd for Program {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
