//! What is asked of network interfaces: indices, XDP state, offloads.

use std::{
    ffi::{CStr, CString},
    io,
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
    ptr,
};

use libbpf_rs::libbpf_sys as raw;

use super::{check, print};

pub(crate) fn index_of(name: &str) -> Option<u32> {
    let name = CString::new(name).ok()?;
    // SAFETY: the name is a C string that lives through the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    (index != 0).then_some(index)
}

pub(crate) fn name_of(index: u32) -> Option<String> {
    let mut name = [0; libc::IF_NAMESIZE];
    // SAFETY: the buffer has the size that the call demands.
    let answer = unsafe { libc::if_indextoname(index, name.as_mut_ptr()) };
    if answer.is_null() {
        return None;
    }
    // SAFETY: the call succeeded, so the buffer holds a C string.
    Some(unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned())
}

/// The XDP state of an interface.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct XdpState {
    /// 0: none. In generic, native and offload mode.
    pub(crate) programs: [u32; 3],
    /// `NETDEV_XDP_ACT_*`; `None` where the kernel does not tell (before 6.3).
    pub(crate) features: Option<u64>,
}

impl XdpState {
    pub(crate) fn program(&self) -> Option<u32> {
        self.programs.into_iter().find(|id| *id != 0)
    }
}

pub(crate) fn xdp_state(index: u32) -> io::Result<XdpState> {
    let mut options =
        raw::bpf_xdp_query_opts { sz: size_of::<raw::bpf_xdp_query_opts>() as raw::size_t, ..Default::default() };
    let index = i32::try_from(index).map_err(io::Error::other)?;
    // SAFETY: the options are a live struct with its size in it, which the call fills.
    check(print::capture(|| unsafe { raw::bpf_xdp_query(index, 0, &raw mut options) }).0)?;
    Ok(XdpState {
        programs: [options.skb_prog_id, options.drv_prog_id, options.hw_prog_id],
        features: (!super::kernel_older_than(6, 3)).then_some(options.feature_flags),
    })
}

/// What the kernel says of a refusal (its extended acknowledgement), which the call that makes a link does not pass on: the
/// same is asked for in the older way, which does. `flags`: one of `XDP_FLAGS_*_MODE`.
pub(crate) fn refusal_words(index: u32, program: BorrowedFd<'_>, flags: u32) -> Option<String> {
    let index = i32::try_from(index).ok()?;
    let program = program.as_raw_fd();
    // SAFETY: the descriptor is open, and no options are given.
    let attach =
        || unsafe { raw::bpf_xdp_attach(index, program, flags | raw::XDP_FLAGS_UPDATE_IF_NOEXIST, ptr::null()) };
    let (answer, said) = print::capture(attach);
    if answer == 0 {
        // What stood against it is gone. Nobody asked for this attachment.
        let options = raw::bpf_xdp_attach_opts {
            sz: size_of::<raw::bpf_xdp_attach_opts>() as raw::size_t,
            old_prog_fd: program,
            ..Default::default()
        };
        // SAFETY: the options are a live struct with its size and an open descriptor in it.
        unsafe { raw::bpf_xdp_detach(index, flags, &raw const options) };
        return None;
    }
    said.lines().find_map(|line| line.strip_prefix("Kernel error message: ")).map(str::to_owned)
}

/// Queues of an interface: how many there are, of at most how many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Channels {
    pub(crate) receive: (u32, u32),
    pub(crate) transmit: (u32, u32),
    pub(crate) combined: (u32, u32),
}

/// `struct ethtool_channels`.
#[repr(C)]
#[derive(Default)]
struct EthtoolChannels {
    command: u32,
    receive_most: u32,
    transmit_most: u32,
    other_most: u32,
    combined_most: u32,
    receive: u32,
    transmit: u32,
    other: u32,
    combined: u32,
}

pub(crate) fn channels(name: &str) -> io::Result<Channels> {
    let mut value = EthtoolChannels { command: 0x3c, ..Default::default() }; // ETHTOOL_GCHANNELS
    // SAFETY: the command takes a `struct ethtool_channels`, which this is.
    unsafe { ethtool(name, &mut value)? };
    Ok(Channels {
        receive: (value.receive, value.receive_most),
        transmit: (value.transmit, value.transmit_most),
        combined: (value.combined, value.combined_most),
    })
}

/// Offloads that hide packets from XDP or hand it unfinished ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Offload {
    /// Checksums are left to the device: over veth and virtio the receiver's XDP sees partial ones.
    TransmitChecksum,
    /// The device joins TCP segments.
    LargeReceive,
    /// The stack joins what is received (GRO).
    GenericReceive,
}

impl Offload {
    fn query(self) -> u32 {
        match self {
            Self::TransmitChecksum => 0x16, // ETHTOOL_GTXCSUM
            Self::LargeReceive => 0x25,     // ETHTOOL_GFLAGS
            Self::GenericReceive => 0x2b,   // ETHTOOL_GGRO
        }
    }

    fn is_on(self, answer: u32) -> bool {
        match self {
            Self::TransmitChecksum | Self::GenericReceive => answer != 0,
            Self::LargeReceive => answer & (1 << 15) != 0, // ETH_FLAG_LRO
        }
    }
}

#[repr(C)]
struct EthtoolValue {
    command: u32,
    data: u32,
}

pub(crate) fn offload_is_on(name: &str, offload: Offload) -> io::Result<bool> {
    let mut value = EthtoolValue { command: offload.query(), data: 0 };
    // SAFETY: these commands take a `struct ethtool_value`, which this is.
    unsafe { ethtool(name, &mut value)? };
    Ok(offload.is_on(value.data))
}

/// Asks a driver.
///
/// # Safety
/// `T` is the struct that the command in its first word takes.
unsafe fn ethtool<T>(name: &str, value: &mut T) -> io::Result<()> {
    let socket = datagram_socket()?;
    let mut request = request_for(name)?;
    request.ifr_ifru.ifru_data = ptr::from_mut(value).cast();
    // SAFETY: the request names an interface and points to the struct that the command takes, as the caller promises.
    let answer = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL as _, ptr::from_mut(&mut request)) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `struct ethtool_drvinfo`.
#[repr(C)]
struct EthtoolDriver {
    command: u32,
    driver: [u8; 32],
    rest: [u8; 160],
}

/// The name of an interface's driver, as `ethtool -i` tells it.
pub(crate) fn driver_of(name: &str) -> io::Result<String> {
    // ETHTOOL_GDRVINFO
    let mut info = EthtoolDriver { command: 0x3, driver: [0; 32], rest: [0; 160] };
    // SAFETY: the command takes a `struct ethtool_drvinfo`, 196 bytes.
    unsafe { ethtool(name, &mut info) }?;
    let length = info.driver.iter().position(|byte| *byte == 0).unwrap_or(info.driver.len());
    Ok(String::from_utf8_lossy(&info.driver[..length]).into_owned())
}

fn datagram_socket() -> io::Result<OwnedFd> {
    // SAFETY: no pointers are involved.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn request_for(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: all-zero is a valid value of this plain C struct.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= libc::IF_NAMESIZE {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

/// Waits until a descriptor can be read; false when the time is over.
pub(crate) fn wait_readable(fd: i32, timeout: std::time::Duration) -> io::Result<bool> {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // Rounded up: a wait of 100 µs must not become a busy loop.
    let milliseconds = i32::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
    // SAFETY: one live pollfd, and a count of one.
    match unsafe { libc::poll(&raw mut poll, 1, milliseconds) } {
        0 => Ok(false),
        n if n > 0 => Ok(true),
        _ => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(false),
            error => Err(error),
        },
    }
}
