//! Decapsulation in plain Rust, and frames for it: tunnels around generated packets, mutated outside and inside.

use std::net::{IpAddr, SocketAddr};

use fastrand::Rng;
use xdpkit::{Action, Fragment, Network, Reason, TestRun, TunnelDecap, TunnelDecapConfig, ipnet::IpNet};
use xdpkit_lab::frame::Frame;

use super::tally::Verdict;
use crate::{
    common::{bytes::put, dsr::network_at},
    parser_oracle::{generate, oracle::Oracle},
};

const VIPS: [&str; 2] = ["192.0.2.1", "2001:db8::1"];
const SOURCES: [&str; 2] = ["10.200.0.0/16", "2001:db8:200::/64"];
const DESTINATIONS: [&str; 2] = ["172.16.0.11", "2001:db8:d::11"];

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn load() -> TunnelDecap {
    let config = VIPS.iter().fold(TunnelDecapConfig::default(), |config, vip| config.vip(ip(vip)));
    let config = SOURCES.iter().fold(config, |config, net| config.source(net.parse::<IpNet>().unwrap()));
    TunnelDecap::load(&DESTINATIONS.iter().fold(config, |config, to| config.destination(ip(to)))).unwrap()
}

/// A frame: mostly a tunnel around a packet, for a virtual address or for somebody else.
pub(crate) fn frame(random: &mut Rng) -> Vec<u8> {
    let flows: Vec<(SocketAddr, SocketAddr)> = [
        ("198.51.100.7:4000", "192.0.2.1:80"),
        ("192.0.2.1:80", "192.0.2.1:80"),
        ("198.51.100.7:4000", "192.0.2.1:53"),
        ("[2001:db8:c::7]:4000", "[2001:db8::1]:80"),
        ("[2001:db8::1]:80", "[2001:db8::1]:80"),
        ("[2001:db8:c::7]:4000", "[2001:db8::1]:53"),
    ]
    .map(|(from, to)| (from.parse().unwrap(), to.parse().unwrap()))
    .into();
    let inside = generate::small_of(random, &flows);
    if random.u8(..16) == 0 {
        return inside;
    }
    // The packet in it, were it not for the mutations.
    let network = (12..inside.len() - 2).find(|at| matches!(inside[*at..at + 2], [8, 0] | [0x86, 0xdd]));
    let packet = &inside[network.map_or(14, |at| at + 2)..];
    let outer = usize::from(random.bool());
    let source = match random.u8(..8) {
        0 => ["10.201.3.4", "2001:db8:201::9"],
        _ => ["10.200.3.4", "2001:db8:200::9"],
    };
    let destination = if random.u8(..16) == 0 { ["172.16.0.12", "2001:db8:d::12"] } else { DESTINATIONS };
    let protocol = match random.u8(..16) {
        0 => 47,
        1 => random.u8(..),
        _ if packet.first().is_some_and(|octet| octet >> 4 == 6) => 41,
        _ => 4,
    };
    let mut frame = Frame::ip(ip(source[outer]), ip(destination[outer]), protocol).payload(packet).tos(random.u8(..));
    for _ in 0..random.u8(..5).saturating_sub(2) {
        frame = frame.vlan(random.u16(..4096));
    }
    if random.u8(..4) == 0 {
        frame = frame.options(&[1; 8]).extension(xdpkit_lab::frame::extension::DESTINATION, &[0; 6]);
    }
    if random.u8(..16) == 0 {
        frame = frame.fragment(8 * random.u16(..2), random.bool());
    }
    let mut frame = frame.trailer(&vec![0xee; random.usize(..8)]).build();
    if random.u8(..3) == 0 {
        for _ in 0..random.u8(1..4) {
            let at = random.usize(12..frame.len());
            frame[at] ^= 1 << random.u8(..8);
        }
    }
    super::fragments::astray(random, &mut frame);
    if random.u8(..16) == 0 {
        frame.truncate(random.usize(14..=frame.len()));
    }
    frame
}

/// What becomes of a frame, and its bytes then.
pub(crate) fn model(frame: &[u8], oracle: &Oracle<'_>) -> (Verdict, Vec<u8>) {
    let left_alone = |reason| ((Action::Pass, reason), frame.to_vec());
    let dropped = |reason| ((Action::Drop, reason), frame.to_vec());
    let reading = &oracle.reading;
    if reading.reason != Reason::None {
        return left_alone(reading.reason);
    }
    let Network::Ip { source, destination, protocol, fragment, .. } = reading.network else {
        return left_alone(Reason::NotTunnel);
    };
    if !matches!(protocol, 4 | 41) {
        return left_alone(Reason::NotTunnel);
    }
    if frame[..6] != TestRun::OWN_MAC {
        return left_alone(Reason::NotForUs);
    }
    if fragment != Fragment::No {
        return left_alone(Reason::TunnelFragment);
    }
    let at = oracle.at();
    let end = oracle.network_end.expect("an IP packet has an end");
    let Some(inside) = Inside::read(frame, at, protocol == 4) else { return left_alone(Reason::TunnelNotVip) };
    let is_vip = |address| VIPS.iter().any(|vip| ip(vip) == address);
    if !is_vip(inside.destination) {
        return left_alone(Reason::TunnelNotVip);
    }
    if !DESTINATIONS.iter().any(|to| ip(to) == destination) {
        return left_alone(Reason::TunnelDestination);
    }
    if !SOURCES.iter().any(|net| net.parse::<IpNet>().unwrap().contains(&source)) {
        return dropped(Reason::TunnelSource);
    }
    if inside.length < inside.header || at + inside.length > end {
        return dropped(Reason::InnerMalformed);
    }
    if is_vip(inside.source) {
        return dropped(Reason::InnerSource);
    }
    let network = network_at(frame);
    let outside = if source.is_ipv4() { frame[network + 1] } else { frame[network + 1] >> 4 } & 3;
    // RFC 6040, section 4.2.
    let ecn = match (outside, inside.ecn) {
        (3, 0) => return dropped(Reason::InnerEcn),
        (3, _) => 3,
        (1, 2) => 1,
        (_, inner) => inner,
    };
    let mut out = frame[..network - 2].to_vec();
    out.extend(if protocol == 4 { [8, 0] } else { [0x86, 0xdd] });
    out.extend(&frame[at..]);
    // Too short for any transport header behind IPv4.
    if out.len() < 42 {
        return dropped(Reason::NoRoom);
    }
    if ecn != inside.ecn && protocol == 4 {
        let word = [out[network], out[network + 1] & !3 | ecn];
        put(&mut out, network, &word, &[network + 10]);
    } else if ecn != inside.ecn {
        out[network + 1] = out[network + 1] & !(3 << 4) | ecn << 4;
    }
    ((Action::Pass, Reason::Decapsulated), out)
}

/// What the header inside says.
struct Inside {
    source: IpAddr,
    destination: IpAddr,
    ecn: u8,
    header: usize,
    /// Of the packet, by its own word.
    length: usize,
}

impl Inside {
    fn read(frame: &[u8], at: usize, ipv4: bool) -> Option<Self> {
        if ipv4 {
            let header: &[u8; 20] = frame.get(at..at + 20)?.try_into().unwrap();
            if header[0] >> 4 != 4 || header[0] & 15 < 5 {
                return None;
            }
            let address = |from: usize| <[u8; 4]>::try_from(&header[from..from + 4]).unwrap().into();
            return Some(Self {
                source: address(12),
                destination: address(16),
                ecn: header[1] & 3,
                header: usize::from(header[0] & 15) * 4,
                length: u16::from_be_bytes([header[2], header[3]]).into(),
            });
        }
        let header: &[u8; 40] = frame.get(at..at + 40)?.try_into().unwrap();
        if header[0] >> 4 != 6 {
            return None;
        }
        let address = |from: usize| <[u8; 16]>::try_from(&header[from..from + 16]).unwrap().into();
        Some(Self {
            source: address(8),
            destination: address(24),
            ecn: header[1] >> 4 & 3,
            header: 40,
            length: 40 + usize::from(u16::from_be_bytes([header[4], header[5]])),
        })
    }
}
