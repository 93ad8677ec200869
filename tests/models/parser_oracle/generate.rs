//! Frames: valid ones of all kinds the parser knows and some it does not, and broken ones made of them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use fastrand::Rng;
use xdpkit_lab::frame::{Frame, extension};

const TAGS: [u16; 3] = [0x8100, 0x88a8, 0x9100];
/// MPLS, PPPoE, LLDP, MACsec, one that nobody uses, and lengths of 802.3 frames.
const OTHER_ETHER_TYPES: [u16; 7] = [0x8847, 0x8864, 0x88cc, 0x88e5, 0x1234, 0x0026, 0x05dc];
/// IGMP, IPv4 and IPv6 in IP, GRE, ESP, AH, "no next header", OSPF, SCTP.
const OTHER_PROTOCOLS: [u8; 9] = [2, 4, 41, 47, 50, 51, 59, 89, 132];
const EXTENSIONS: [u8; 5] =
    [extension::HOP_BY_HOP, extension::ROUTING, extension::DESTINATION, extension::AUTHENTICATION, FRAGMENT];
const FRAGMENT: u8 = 44;

/// Where the headers are, for mutations that hit them.
struct Layout {
    version: Version,
    /// The network header.
    network: usize,
    /// IPv6 extension headers.
    extensions: Vec<usize>,
    transport: usize,
}

#[derive(Clone, Copy, PartialEq)]
enum Version {
    NotIp,
    V4,
    V6,
}

/// A frame that fits one buffer: valid, or mutated up to three times.
pub(crate) fn small(random: &mut Rng) -> Vec<u8> {
    small_of(random, &[])
}

/// As [`small`], but most packets are of these flows, each from the first to the second; half of them with its ports.
pub(crate) fn small_of(random: &mut Rng, flows: &[(SocketAddr, SocketAddr)]) -> Vec<u8> {
    let payload = if random.u8(..8) == 0 { 0 } else { random.usize(..64) };
    let (frame, layout) = valid(random, payload, flows);
    if random.u8(..3) == 0 { frame } else { broken(random, frame, &layout, true) }
}

/// A frame of up to 9000 bytes, mutated or not, but at its full length.
pub(crate) fn jumbo(random: &mut Rng) -> Vec<u8> {
    let payload = random.usize(..8900);
    let (mut frame, layout) = valid(random, payload, &[]);
    frame.truncate(9000);
    if random.bool() { frame } else { broken(random, frame, &layout, false) }
}

/// A frame longer than any wire carries, or nearly so, most of them with lengths of 0: merged by the stack ("BIG TCP").
pub(crate) fn merged(random: &mut Rng) -> Vec<u8> {
    // Around the longest that a length field tells, headers and tags included.
    let payload = if random.bool() { random.usize(65_300..65_600) } else { random.usize(64_000..68_000) };
    let (mut frame, layout) = valid(random, payload, &[]);
    let (length_at, udp_length_at) = match layout.version {
        Version::V4 => (layout.network + 2, layout.transport + 4),
        Version::V6 => (layout.network + 4, layout.transport + 4),
        Version::NotIp => return frame,
    };
    if random.u8(..8) > 0 {
        put(&mut frame, length_at, &[0, 0]);
    }
    if random.u8(..4) == 0 {
        put(&mut frame, udp_length_at, &[0, 0]);
    }
    if random.bool() { frame } else { broken(random, frame, &layout, false) }
}

fn valid(random: &mut Rng, payload: usize, flows: &[(SocketAddr, SocketAddr)]) -> (Vec<u8>, Layout) {
    let payload = bytes(random, payload);
    let mut tags = Vec::new();
    let count = match random.u8(..32) {
        0..12 => 0,
        12..20 => 1,
        20..29 => 2,
        29 | 30 => 3,
        _ => 4,
    };
    for _ in 0..count {
        tags.push((pick(random, &TAGS), random.u16(..)));
    }
    let network = 14 + 4 * tags.len();
    let mut layout = Layout { version: Version::NotIp, network, extensions: Vec::new(), transport: network };
    let mut frame = match random.u8(..20) {
        0 => Frame::arp_request([2, 0, 0, 0, 0, 7], random.u32(..).into(), random.u32(..).into()),
        1 => Frame::ethernet(pick(random, &OTHER_ETHER_TYPES)).payload(&payload),
        2..9 => ipv4(random, &payload, flows, &mut layout),
        _ => ipv6(random, &payload, flows, &mut layout),
    };
    for (ether_type, control) in tags {
        frame = frame.tag(ether_type, control);
    }
    if random.u8(..3) == 0 {
        let length = random.usize(1..46);
        frame = frame.trailer(&bytes(random, length));
    }
    let [source, destination] = [random.u64(..), random.u64(..)].map(|bits| *bits.to_be_bytes().last_chunk().unwrap());
    (frame.macs(source, destination).ttl(random.u8(..)).tos(random.u8(..)).build(), layout)
}

fn ipv4(random: &mut Rng, payload: &[u8], flows: &[(SocketAddr, SocketAddr)], layout: &mut Layout) -> Frame {
    let addresses = [random.u32(..), random.u32(..)].map(|bits| IpAddr::V4(Ipv4Addr::from(bits)));
    let ends = ends(random, addresses, flows);
    let mut frame = message(random, ends, payload);
    let options = if random.u8(..3) == 0 { random.usize(1..=40) } else { 0 };
    frame = frame.options(&bytes(random, options)).identification(random.u32(..));
    if random.bool() {
        frame = frame.dont_fragment();
    }
    if random.u8(..4) == 0 {
        frame = fragment(random, frame);
    }
    layout.version = Version::V4;
    layout.transport += 20 + options.next_multiple_of(4);
    frame
}

fn ipv6(random: &mut Rng, payload: &[u8], flows: &[(SocketAddr, SocketAddr)], layout: &mut Layout) -> Frame {
    let addresses = [random.u128(..), random.u128(..)].map(|bits| IpAddr::V6(Ipv6Addr::from(bits)));
    let ends = ends(random, addresses, flows);
    let mut frame = message(random, ends, payload).identification(random.u32(..));
    let count = match random.u8(..8) {
        0..3 => 0,
        3..6 => random.usize(1..4),
        _ => random.usize(4..=10),
    };
    let fragment_at = if random.u8(..3) == 0 { random.usize(..=count) } else { usize::MAX };
    // Headers of up to 2048 bytes exist, but one has to leave room for the others in the first buffer.
    let long_at = if random.u8(..32) == 0 { random.usize(..=count) } else { usize::MAX };
    layout.version = Version::V6;
    layout.transport += 40;
    for index in 0..=count {
        if index == fragment_at {
            frame = fragment(random, frame);
            layout.extensions.push(layout.transport);
            layout.transport += 8;
        }
        if index == count {
            break;
        }
        let first = if index == 0 { 16 } else { 1 };
        let kind = if random.u8(..32) < first { extension::HOP_BY_HOP } else { pick(random, &EXTENSIONS[1..]) };
        let body = match kind {
            // Reserved, offset and flags, identification; rarely a fragment itself.
            FRAGMENT if random.u8(..8) == 0 => bytes(random, 6),
            FRAGMENT => vec![0; 6],
            _ if index == long_at => {
                let units = random.usize(..=if kind == extension::AUTHENTICATION { 127 } else { 255 });
                bytes(random, 6 + 8 * units)
            }
            // Eight bytes are too few for an authentication header.
            extension::AUTHENTICATION if random.u8(..8) > 0 => bytes(random, 14),
            _ => {
                let units = random.usize(..3);
                bytes(random, 6 + 8 * units)
            }
        };
        frame = frame.extension(kind, &body);
        layout.extensions.push(layout.transport);
        layout.transport += 2 + body.len();
    }
    frame
}

fn fragment(random: &mut Rng, frame: Frame) -> Frame {
    match random.u8(..4) {
        0 => frame.fragment(0, false), // atomic
        1 | 2 => frame.fragment(0, true),
        _ => frame.fragment(8 * random.u16(1..8192), random.bool()),
    }
}

/// Where a packet is from and to: the addresses with any ports, or those of one of the flows.
fn ends(random: &mut Rng, addresses: [IpAddr; 2], flows: &[(SocketAddr, SocketAddr)]) -> [SocketAddr; 2] {
    let mut ends = addresses.map(|address| SocketAddr::new(address, random.u16(..)));
    let same_family = |flow: &&(SocketAddr, SocketAddr)| flow.0.is_ipv4() == addresses[0].is_ipv4();
    let known = flows.iter().filter(same_family).count();
    if known > 0 && random.u8(..8) > 0 {
        let flow = flows.iter().filter(same_family).nth(random.usize(..known)).expect("as many as were counted");
        let with_ports = random.bool();
        for (end, of_flow) in ends.iter_mut().zip([flow.0, flow.1]) {
            end.set_ip(of_flow.ip());
            if with_ports {
                end.set_port(of_flow.port());
            }
        }
    }
    ends
}

fn message(random: &mut Rng, [from, to]: [SocketAddr; 2], payload: &[u8]) -> Frame {
    let [source, destination] = [from, to].map(|end| end.ip());
    let frame = match random.u8(..16) {
        0..5 => {
            let options = if random.bool() { random.usize(..=40) } else { 0 };
            Frame::tcp(from, to).flags(random.u8(..)).tcp_options(&bytes(random, options))
        }
        5..10 => Frame::udp(from, to),
        10 | 11 => Frame::echo(source, destination, random.u16(..), random.u16(..)),
        12 => {
            // Timestamps are the only messages whose length etherparse checks.
            let kind = if random.bool() { random.u8(13..=14) } else { random.u8(..) };
            Frame::icmp(source, destination, kind, random.u8(..2), [0; 4])
        }
        13 => Frame::ip(source, destination, if source.is_ipv4() { 58 } else { 1 }),
        14 => Frame::ip(source, destination, pick(random, &OTHER_PROTOCOLS)),
        _ => Frame::ip(source, destination, random.u8(..)),
    };
    frame.payload(payload)
}

fn pick<T: Copy>(random: &mut Rng, from: &[T]) -> T {
    from[random.usize(..from.len())]
}

fn bytes(random: &mut Rng, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    random.fill(&mut bytes);
    bytes
}

/// One to three mutations, most of them of a single field.
fn broken(random: &mut Rng, mut frame: Vec<u8>, layout: &Layout, truncate: bool) -> Vec<u8> {
    for _ in 0..random.u8(1..=3) {
        match random.u8(..9) {
            0 | 1 if truncate => frame.truncate(random.usize(14..=frame.len())),
            2 => cut(random, &mut frame, layout),
            3 => flips(random, &mut frame, layout),
            0 | 1 | 4 | 5 => lengths(random, &mut frame, layout),
            6 => nibbles(random, &mut frame, layout),
            7 => successors(random, &mut frame, layout),
            _ => {
                let length = random.usize(..32);
                frame.extend(bytes(random, length));
            }
        }
    }
    frame
}

/// A packet that ends, by its own length, somewhere in its extension or transport headers.
fn cut(random: &mut Rng, frame: &mut [u8], layout: &Layout) {
    let inside = match layout.version {
        Version::V6 if random.u8(..4) == 0 => layout.network + 40..layout.transport + 1,
        _ => layout.transport..layout.transport + 24,
    };
    let length = random.usize(inside) - layout.network;
    match layout.version {
        Version::V4 => put(frame, layout.network + 2, &(length as u16).to_be_bytes()),
        Version::V6 => put(frame, layout.network + 4, &(length as u16 - 40).to_be_bytes()),
        Version::NotIp => {}
    }
}

/// Random bits and bytes anywhere from the EtherType to the end of the transport header.
fn flips(random: &mut Rng, frame: &mut [u8], layout: &Layout) {
    let end = frame.len().min(layout.transport + 20);
    for _ in 0..random.u8(1..=4) {
        let at = random.usize(12..end);
        frame[at] = if random.bool() { random.u8(..) } else { frame[at] ^ 1 << random.u8(..8) };
    }
}

/// A length field at one of its edges.
fn lengths(random: &mut Rng, frame: &mut [u8], layout: &Layout) {
    let left = |at: usize| frame.len().saturating_sub(at);
    let (at, header, available) = match (layout.version, random.u8(..3)) {
        (Version::V4, 0) => (layout.network + 2, layout.transport - layout.network, left(layout.network)),
        (Version::V6, 0) => (layout.network + 4, layout.transport - layout.network - 40, left(layout.network + 40)),
        (Version::V6, 1) if !layout.extensions.is_empty() => {
            let at = pick(random, &layout.extensions);
            let any = usize::from(random.u8(..));
            let units = pick(random, &[0, 1, 2, 3, 10, left(at) / 8, left(at) / 4, 255, any]);
            put(frame, at + 1, &[units.min(255) as u8]);
            return;
        }
        (Version::NotIp, _) => (layout.network - 2, 14, left(14)),
        _ => (layout.transport + 4, 8, left(layout.transport)), // UDP's
    };
    let (any, inside) = (usize::from(random.u16(..)), random.usize(..=available));
    let of_header = [0, 1, 7, header.wrapping_sub(1), header, header + 1, header + 8];
    let of_frame = [available.wrapping_sub(1), available, available + 1, 0xffff, any, inside];
    let value = if random.bool() { pick(random, &of_header) } else { pick(random, &of_frame) };
    put(frame, at, &(value as u16).to_be_bytes());
}

/// IP's version and header length, TCP's data offset, IP's fragment offset and flags.
fn nibbles(random: &mut Rng, frame: &mut [u8], layout: &Layout) {
    match random.u8(..6) {
        0 => change(frame, layout.network, |byte| byte & 0x0f | random.u8(..16) << 4),
        1 | 2 => change(frame, layout.network, |byte| byte & 0xf0 | random.u8(..16)),
        3 if layout.version == Version::V4 => put(frame, layout.network + 6, &random.u16(..).to_be_bytes()),
        _ => change(frame, layout.transport + 12, |byte| byte & 0x0f | random.u8(..16) << 4),
    }
}

/// Another type of what follows.
fn successors(random: &mut Rng, frame: &mut [u8], layout: &Layout) {
    if random.bool() {
        let ether_type =
            if random.bool() { pick(random, &TAGS) } else { pick(random, &[0x0800, 0x86dd, 0x0806, 0x88e5]) };
        // The outermost type, or the one before the network header.
        let at = if random.bool() { 12 } else { layout.network - 2 };
        return put(frame, at, &u16::to_be_bytes(ether_type));
    }
    let protocol = if random.bool() { pick(random, &EXTENSIONS) } else { pick(random, &[1, 2, 6, 17, 51, 58, 59]) };
    let at = match layout.version {
        Version::V4 => layout.network + 9,
        _ if layout.extensions.is_empty() || random.bool() => layout.network + 6,
        _ => pick(random, &layout.extensions),
    };
    put(frame, at, &[protocol]);
}

/// Writes where the frame, perhaps truncated by now, still is.
fn put(frame: &mut [u8], at: usize, value: &[u8]) {
    if let Some(field) = frame.get_mut(at..at + value.len()) {
        field.copy_from_slice(value);
    }
}

fn change(frame: &mut [u8], at: usize, change: impl FnOnce(u8) -> u8) {
    if let Some(byte) = frame.get_mut(at) {
        *byte = change(*byte);
    }
}
