//! Which datagram a fragment is of: where it says so, and saying something else there.

use std::ops::Range;

use fastrand::Rng;
use xdpkit::{Fragment, Network, Reason};

use crate::{
    common::dsr::network_at,
    parser_oracle::oracle::{self, Oracle},
};

/// What the extension headers of an IPv6 packet say: where the fragment header is that makes it a fragment, and whether a
/// routing header before the transport header has segments left.
fn walk(frame: &[u8]) -> (Option<usize>, bool) {
    let at = network_at(frame);
    let (mut next, mut at, mut fragment, mut routed) = (frame[at + 6], at + 40, None, false);
    while matches!(next, 0 | 43 | 44 | 51 | 60) {
        let length = match next {
            44 => {
                let bits = u16::from_be_bytes([frame[at + 2], frame[at + 3]]);
                if bits & 0xfff9 != 0 {
                    fragment = Some(at);
                }
                if bits & 0xfff8 != 0 {
                    break;
                }
                8
            }
            51 => (usize::from(frame[at + 1]) + 2) * 4,
            _ => (usize::from(frame[at + 1]) + 1) * 8,
        };
        routed |= next == 43 && frame[at + 3] != 0;
        next = frame[at];
        at += length;
    }
    (fragment, routed)
}

/// Whether a packet's destination is not its last one.
pub(crate) fn is_routed(frame: &[u8], oracle: &Oracle<'_>) -> bool {
    let ipv6 = matches!(oracle.reading.network, Network::Ip { source, .. } if source.is_ipv6());
    ipv6 && oracle.reading.reason == Reason::None && walk(frame).1
}

/// Where the identification of a fragment stands.
pub(crate) fn identification_at(frame: &[u8], oracle: &Oracle<'_>) -> Option<Range<usize>> {
    let Network::Ip { source, fragment, .. } = oracle.reading.network else { return None };
    if fragment == Fragment::No || oracle.reading.reason != Reason::None {
        return None;
    }
    if source.is_ipv4() {
        let at = network_at(frame);
        return Some(at + 4..at + 6);
    }
    walk(frame).0.map(|at| at + 4..at + 8)
}

/// The identification, 0 of what has none.
pub(crate) fn identification(frame: &[u8], oracle: &Oracle<'_>) -> u32 {
    let bytes = identification_at(frame, oracle).map_or(&[][..], |at| &frame[at]);
    bytes.iter().fold(0, |number, byte| number << 8 | u32::from(*byte))
}

/// Makes a fragment one of few datagrams, so that later fragments meet their first ones. What is remembered of a
/// datagram is forgotten after half a minute: no window is used for that long, or again.
pub(crate) fn make_common(random: &mut Rng, frame: &mut [u8], window: u32) {
    let Some(at) = identification_at(frame, &oracle::read(frame)) else { return };
    let number = window * 64 + random.u32(1..16);
    let bytes = number.to_be_bytes();
    frame[at.clone()].copy_from_slice(&bytes[4 - at.len()..]);
}

/// Has a few frames go to another host.
pub(crate) fn astray(random: &mut Rng, frame: &mut [u8]) {
    if random.u8(..32) == 0 {
        frame[random.usize(..6)] ^= 1 << random.u8(..8);
    }
}
