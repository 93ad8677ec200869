//! What programs do to frames, byte by byte, in plain Rust: checksums that follow a change, and ICMP messages of their own.
//! A checksum that was right is computed anew; one that was wrong stays as wrong as it was (RFC 1624, equation 3).

use std::net::IpAddr;

use xdpkit_lab::frame::{Frame, checksum};

use super::dsr::{fix_ipv4, network_at};

/// A checksum after one 16-bit word under it has changed.
pub(crate) fn updated(check: u16, before: u16, after: u16) -> u16 {
    let sum = u32::from(!check) + u32::from(!before) + u32::from(after);
    let sum = (sum & 0xffff) + (sum >> 16);
    !(((sum & 0xffff) + (sum >> 16)) as u16)
}

pub(crate) fn word(frame: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([frame[at], frame[at + 1]])
}

/// Changes words at even offsets from `at` on, and the checksums that stand at `checks` with them.
pub(crate) fn put(frame: &mut [u8], at: usize, value: &[u8], checks: &[usize]) {
    for (index, pair) in value.chunks(2).enumerate() {
        let at = at + 2 * index;
        let (before, after) = (word(frame, at), u16::from_be_bytes([pair[0], pair[1]]));
        for check in checks {
            let sum = updated(word(frame, *check), before, after);
            frame[*check..check + 2].copy_from_slice(&sum.to_be_bytes());
        }
        frame[at..at + 2].copy_from_slice(pair);
    }
}

/// Sets the TTL of an IPv4 header or the hop limit of an IPv6 header.
pub(crate) fn set_hops(frame: &mut [u8], at: usize, hops: u8) {
    if frame[at] >> 4 == 6 {
        frame[at + 7] = hops;
        return;
    }
    let right = checksum(&frame[at..at + usize::from(frame[at] & 15) * 4]) == 0;
    let protocol = frame[at + 9];
    put(frame, at + 8, &[hops, protocol], &[at + 10]);
    if right {
        fix_ipv4(frame, at);
    }
}

/// The frame goes back to where it came from: MACs and IP addresses are exchanged.
pub(crate) fn reflect(frame: &mut [u8], at: usize) {
    let (first, second) = frame[..12].split_at_mut(6);
    first.swap_with_slice(second);
    let (addresses, size) = if frame[at] >> 4 == 6 { (at + 8, 16) } else { (at + 12, 4) };
    let (first, second) = frame[addresses..addresses + 2 * size].split_at_mut(size);
    first.swap_with_slice(second);
}

/// The reply to an echo request whose message begins at `icmp`.
pub(crate) fn echo_reply(frame: &[u8], icmp: usize) -> Vec<u8> {
    let mut out = frame.to_vec();
    let at = network_at(&out);
    reflect(&mut out, at);
    set_hops(&mut out, at, 64);
    let kind = if out[at] >> 4 == 6 { 129 } else { 0 };
    let code = out[icmp + 1];
    put(&mut out, icmp, &[kind, code], &[icmp + 2]);
    // The equation does not know the checksum of nothing: where it was right, what is right now decides.
    if icmp_checksum(frame, icmp) == word(frame, icmp + 2) {
        let sum = icmp_checksum(&out, icmp);
        out[icmp + 2..icmp + 4].copy_from_slice(&sum.to_be_bytes());
    }
    out
}

/// The checksum of an ICMP message from scratch (RFC 1071, RFC 4443).
fn icmp_checksum(frame: &[u8], icmp: usize) -> u16 {
    let at = network_at(frame);
    let (end, mut bytes) = match frame[at] >> 4 {
        4 => (at + usize::from(word(frame, at + 2)), Vec::new()),
        _ => {
            let end = at + 40 + usize::from(word(frame, at + 4));
            let length = (end - icmp) as u32;
            (end, [&frame[at + 8..at + 40], &length.to_be_bytes(), &[0, 0, 0, 58]].concat())
        }
    };
    bytes.extend([frame[icmp], frame[icmp + 1], 0, 0]);
    bytes.extend(&frame[icmp + 4..end]);
    checksum(&bytes)
}

/// What tells the sender of a frame that the way on takes packets of `mtu` bytes only.
pub(crate) fn too_big(frame: &[u8], mtu: u16) -> Vec<u8> {
    let at = network_at(frame);
    let address = |from: usize, size: usize| -> IpAddr {
        match size {
            4 => <[u8; 4]>::try_from(&frame[from..from + 4]).unwrap().into(),
            _ => <[u8; 16]>::try_from(&frame[from..from + 16]).unwrap().into(),
        }
    };
    let [high, low] = mtu.to_be_bytes();
    let (answer, quote) = match frame[at] >> 4 {
        4 => {
            let answer = Frame::icmp(address(at + 16, 4), address(at + 12, 4), 3, 4, [0, 0, high, low]);
            (answer.dont_fragment().tos(frame[at + 1]), 504)
        }
        _ => (Frame::icmp(address(at + 24, 16), address(at + 8, 16), 2, 0, [0, 0, high, low]), 1184),
    };
    let built = answer.payload(&frame[at..at + quote]).build();
    [&frame[6..12], &frame[..6], &frame[12..at - 2], &built[12..]].concat()
}
