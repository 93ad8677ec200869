//! Socket options, ioctls and batch calls that std does not offer.

use std::fs::File;
use std::io;
use std::mem;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::time::Duration;

use super::{check, check_fd, check_len};

const SIOCETHTOOL: libc::c_ulong = 0x8946;
/// `ETHTOOL_STXCSUM`, `ETHTOOL_STSO`, `ETHTOOL_SGSO`, `ETHTOOL_SGRO`: segmentation needs checksums.
pub(crate) const OFFLOADS: [u32; 4] = [0x17, 0x1f, 0x24, GRO];
/// `ETHTOOL_SGRO`.
pub(crate) const GRO: u32 = 0x2c;

/// Sets one of [`OFFLOADS`] of an interface in the socket's namespace.
pub(crate) fn set_offload(socket: BorrowedFd<'_>, dev: &str, cmd: u32, on: bool) -> io::Result<()> {
    // struct ethtool_value.
    ethtool(socket, dev, &mut [cmd, on.into()])
}

/// One request about an interface in the socket's namespace, which begins with its command; the answer is in its place. It is
/// as long as the command and the counts in it say.
pub(super) fn ethtool(socket: BorrowedFd<'_>, dev: &str, words: &mut [u32]) -> io::Result<()> {
    let mut request = request_for(dev)?;
    request.ifr_ifru.ifru_data = words.as_mut_ptr().cast();
    // SAFETY: the request names words that outlive the call; its callers, all in `sys`, make them as long as the kernel
    // takes them to be.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL as _, &raw mut request) }).map(drop)
}

/// Makes an open `/dev/net/tun` a TUN device of this name, whose packets have nothing before them.
pub(crate) fn make_tun(file: &File, dev: &str) -> io::Result<()> {
    let mut request = request_for(dev)?;
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the request is an ifreq that outlives the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) }).map(drop)
}

/// A request about an interface.
fn request_for(dev: &str) -> io::Result<libc::ifreq> {
    // SAFETY: ifreq is plain data, for which zeroes are valid.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    if dev.len() >= request.ifr_name.len() {
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(dev.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

/// Opens a socket of the calling thread's namespace.
pub(crate) fn open(family: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes plain integers.
    check_fd(unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) }.into())
}

/// Sets a socket option. `T` is the option's C type, without padding.
pub(crate) fn set_option<T: Copy>(socket: BorrowedFd<'_>, level: i32, name: i32, value: T) -> io::Result<()> {
    let (value, len) = ((&raw const value).cast(), size_of::<T>() as libc::socklen_t);
    // SAFETY: the kernel reads `len` bytes of a value that outlives the call.
    check(unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, value, len) }).map(drop)
}

/// Makes cubic the congestion control of a TCP socket (and of what it accepts), so that results do
/// not depend on the host's default.
pub(crate) fn use_cubic(socket: BorrowedFd<'_>) -> io::Result<()> {
    set_option(socket, libc::IPPROTO_TCP, libc::TCP_CONGESTION, *b"cubic")
}

/// Shuts a socket down; wakes threads that wait on it, listening and unconnected sockets too.
pub(crate) fn shutdown(socket: BorrowedFd<'_>, how: Shutdown) {
    let how = match how {
        Shutdown::Read => libc::SHUT_RD,
        Shutdown::Write => libc::SHUT_WR,
        Shutdown::Both => libc::SHUT_RDWR,
    };
    // An unconnected datagram socket answers ENOTCONN, yet its readers wake up: nothing to report.
    // SAFETY: the socket is open; the call takes plain integers.
    unsafe { libc::shutdown(socket.as_raw_fd(), how) };
}

/// Waits until the socket is readable; false when the time is over.
pub(crate) fn wait_readable(socket: BorrowedFd<'_>, timeout: Duration) -> io::Result<bool> {
    let mut poll = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // Rounded up, so that a short rest does not become a busy loop.
    let ms = timeout.as_micros().div_ceil(1000).min(i32::MAX as u128) as i32;
    // SAFETY: one pollfd that outlives the call.
    match check(unsafe { libc::poll(&raw mut poll, 1, ms) }) {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(false),
        ready => Ok(ready? > 0),
    }
}

/// Binds a packet socket to an interface and starts its reception of every protocol.
pub(crate) fn bind_packet(socket: BorrowedFd<'_>, ifindex: u32) -> io::Result<()> {
    // SAFETY: sockaddr_ll is plain data, for which zeroes are valid.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = ifindex as i32;
    let len = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the address outlives the call and `len` is its size.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) }).map(drop)
}

/// How many frames a packet socket had no room for since this was last asked.
pub(crate) fn packet_drops(socket: BorrowedFd<'_>) -> io::Result<u32> {
    // struct tpacket_stats: frames, and drops among them.
    let mut stats = [0_u32; 2];
    let mut len = size_of_val(&stats) as libc::socklen_t;
    let (level, name) = (libc::SOL_PACKET, libc::PACKET_STATISTICS);
    // SAFETY: the kernel writes at most `len` bytes into `stats`, which outlives the call.
    check(unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, stats.as_mut_ptr().cast(), &raw mut len) })?;
    Ok(stats[1])
}

/// What the kernel says next to a received frame (`struct tpacket_auxdata`).
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct AuxData {
    pub(crate) status: u32,
    len: u32,
    snaplen: u32,
    mac: u16,
    net: u16,
    pub(crate) vlan_tci: u16,
    pub(crate) vlan_tpid: u16,
}

/// Receives one frame without waiting, with its auxiliary data. `WouldBlock` when there is none.
pub(crate) fn recv_frame(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Option<AuxData>)> {
    let mut control = [0u64; 16]; // aligned as cmsghdr wants it
    let mut iov = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: msghdr is plain data, for which zeroes are valid.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &raw mut iov;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control) as _;
    let flags = libc::MSG_DONTWAIT | libc::MSG_TRUNC;
    // SAFETY: the message's buffers outlive the call and have the lengths stated.
    let len = check_len(unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) })?;
    // SAFETY: the kernel has filled `message` and its control buffer, which the CMSG macros walk.
    let aux = unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (!header.is_null() && (*header).cmsg_level == libc::SOL_PACKET && (*header).cmsg_type == libc::PACKET_AUXDATA)
            .then(|| libc::CMSG_DATA(header).cast::<AuxData>().read_unaligned())
    };
    Ok((len, aux))
}

/// Sends as many of the frames as the socket takes at once; returns how many.
pub(crate) fn send_frames(socket: BorrowedFd<'_>, frames: &[&[u8]]) -> io::Result<usize> {
    let mut iovs: Vec<libc::iovec> = frames
        .iter()
        .map(|frame| libc::iovec { iov_base: frame.as_ptr().cast_mut().cast(), iov_len: frame.len() })
        .collect();
    let mut messages: Vec<libc::mmsghdr> = iovs
        .iter_mut()
        .map(|iov| {
            // SAFETY: mmsghdr is plain data, for which zeroes are valid.
            let mut message: libc::mmsghdr = unsafe { mem::zeroed() };
            message.msg_hdr.msg_iov = ptr::from_mut(iov);
            message.msg_hdr.msg_iovlen = 1;
            message
        })
        .collect();
    let (list, count) = (messages.as_mut_ptr(), messages.len() as libc::c_uint);
    // SAFETY: `list` holds `count` messages; frames and vectors outlive the call, and sending
    // only reads the frames.
    check(unsafe { libc::sendmmsg(socket.as_raw_fd(), list, count, 0) }).map(|sent| sent as usize)
}
