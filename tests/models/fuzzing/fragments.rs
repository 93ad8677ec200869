//! Which datagram a fragment is of: where it says so, and saying something else there.

use std::ops::Range;

use fastrand::Rng;
use xdpkit::{Fragment, Network, Reason};

use crate::{
    common::dsr::network_at,
    parser_oracle::oracle::{self, Oracle},
};

/// Where the identification of a fragment stands, as balancers look for it: in IPv6 in the eight bytes before what is
/// fragmented, when these name its protocol.
pub(crate) fn identification_at(frame: &[u8], oracle: &Oracle<'_>) -> Option<Range<usize>> {
    let Network::Ip { source, protocol, fragment, .. } = oracle.reading.network else { return None };
    if fragment == Fragment::No || oracle.reading.reason != Reason::None {
        return None;
    }
    if source.is_ipv4() {
        let at = network_at(frame);
        return Some(at + 4..at + 6);
    }
    let at = oracle.at();
    (at <= 0x7ff && frame[at - 8] == protocol).then(|| at - 4..at)
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
