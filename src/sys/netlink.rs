//! One question to rtnetlink, one reply: what routes and interfaces are asked with.

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

const HEADER: usize = 16;

/// Asks in the network namespace of the calling thread; answers the first message without its header. The kernel's refusal
/// is an error with its number.
pub(crate) fn ask(kind: u16, body: &[u8]) -> io::Result<Vec<u8>> {
    // SAFETY: no pointers are involved.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_ROUTE) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor, and nobody else knows it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut request = Vec::with_capacity(HEADER + body.len());
    request.extend(((HEADER + body.len()) as u32).to_ne_bytes());
    request.extend(kind.to_ne_bytes());
    request.extend((libc::NLM_F_REQUEST as u16).to_ne_bytes());
    request.extend([0; 8]); // sequence number and port: there is one answer, to this socket
    request.extend(body);
    // SAFETY: the kernel reads so many bytes of a live buffer. Unbound and unconnected, a netlink socket talks to it.
    let sent = unsafe { libc::send(socket.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut answer = vec![0_u8; 1 << 16];
    // SAFETY: the kernel writes at most so many bytes to a live buffer.
    let length = unsafe { libc::recv(socket.as_raw_fd(), answer.as_mut_ptr().cast(), answer.len(), 0) };
    answer.truncate(usize::try_from(length).map_err(|_| io::Error::last_os_error())?);
    let short = || io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer is cut short");
    let word = |at: usize| u32_of(answer.get(at..at + 4).unwrap_or_default()).ok_or_else(short);
    if answer.get(4..6) == Some(&(libc::NLMSG_ERROR as u16).to_ne_bytes()) {
        return Err(io::Error::from_raw_os_error((word(HEADER)? as i32).wrapping_neg()));
    }
    let end = word(0)? as usize;
    answer.get(HEADER..end).map(<[u8]>::to_vec).ok_or_else(short)
}

/// The attributes in a stretch of a message, each with its kind.
pub(crate) fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let (length, kind) = (u16_of(rest)?, u16_of(rest.get(2..)?)?);
        let value = rest.get(4..usize::from(length))?;
        rest = rest.get(usize::from(length).next_multiple_of(4)..).unwrap_or_default();
        Some((kind & !(libc::NLA_F_NESTED | libc::NLA_F_NET_BYTEORDER) as u16, value))
    })
}

/// Appends an attribute.
pub(crate) fn put(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    message.extend(((4 + value.len()) as u16).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(value);
    message.resize(message.len().next_multiple_of(4), 0);
}

fn u16_of(bytes: &[u8]) -> Option<u16> {
    bytes.first_chunk().copied().map(u16::from_ne_bytes)
}

pub(crate) fn u32_of(bytes: &[u8]) -> Option<u32> {
    bytes.first_chunk().copied().map(u32::from_ne_bytes)
}
