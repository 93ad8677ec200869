//! Mutated frames in the words of the DSR balancer's model.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use fastrand::Rng;
use xdpkit::{Fragment, Network, Reason, Transport};

use super::fragments::{identification, identification_at, is_routed, make_common};
use crate::{
    common::dsr::{GATEWAY, Host, client, mac},
    dsr_model::{frames::Generated, model::What, world::SERVICES},
    parser_oracle::{
        generate,
        oracle::{self, Oracle},
    },
};

/// What most packets belong to: a few flows of each service, and of a virtual address' ports without one.
pub(crate) fn flows() -> Vec<(SocketAddr, SocketAddr)> {
    let mut flows = Vec::new();
    for (text, ..) in SERVICES {
        let service: xdpkit::ServiceAddr = text.parse().unwrap();
        for number in 0..4 {
            let from = SocketAddr::new(client(service.address.is_ipv6(), number), 1000 + number as u16 % 3);
            flows.push((from, SocketAddr::new(service.address, service.port.unwrap_or(9999))));
        }
    }
    flows
}

/// A frame from the gateway, and what it is to the model.
pub(crate) fn mutated(random: &mut Rng, host: &Host, flows: &[(SocketAddr, SocketAddr)], window: u32) -> Generated {
    let mut frame = generate::small_of(random, flows);
    frame[..6].copy_from_slice(&host.mac);
    frame[6..12].copy_from_slice(&mac(GATEWAY));
    super::fragments::astray(random, &mut frame);
    make_common(random, &mut frame, window);
    let oracle = oracle::read(&frame);
    let unspecified = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    let (source, destination) = match oracle.reading.network {
        Network::Ip { source, destination, .. } => (source, destination),
        _ => (unspecified, unspecified),
    };
    let what = what(&frame, &oracle);
    let (identification, icmp) = (identification(&frame, &oracle), oracle.at());
    Generated { source, destination, identification, what, icmp, frame }
}

fn what(frame: &[u8], oracle: &Oracle<'_>) -> What {
    let reading = &oracle.reading;
    if reading.reason != Reason::None {
        return What::Malformed(reading.reason);
    }
    let Network::Ip { destination, protocol, fragment, .. } = reading.network else { return What::Other };
    let first = fragment == Fragment::First && identification_at(frame, oracle).is_some();
    if is_routed(frame, oracle) {
        return What::Routed { first };
    }
    match (fragment, reading.transport) {
        (Fragment::Later, _) => What::Later { protocol },
        (_, Some(Transport::Tcp { source, destination, flags })) => {
            What::Flow { client_port: source, port: destination, flags: Some(flags), first }
        }
        (_, Some(Transport::Udp { source, destination })) => {
            What::Flow { client_port: source, port: destination, flags: None, first }
        }
        (Fragment::First, _) if destination.is_ipv6() => What::OtherFirst,
        (Fragment::First, _) => What::Other,
        (_, Some(Transport::Icmp { kind: 8, code: 0 } | Transport::Icmpv6 { kind: 128, code: 0 })) => What::Echo,
        (_, Some(Transport::Icmp { kind: 3 | 11 | 12, .. } | Transport::Icmpv6 { kind: 1..=4, .. })) => {
            What::Error(quoted(frame, oracle.at() + 8, destination))
        }
        _ => What::Other,
    }
}

/// The flow of the packet that an error to `vip` quotes, from the view of its client. Quotations that begin behind 127
/// bytes of headers, or whose ports are behind 511, are nobody's.
fn quoted(frame: &[u8], mut at: usize, vip: IpAddr) -> Option<(SocketAddr, u16, u8)> {
    if at > 0x7f {
        return None;
    }
    let octet = |at: usize| frame.get(at).copied();
    let word = |at: usize| Some(u16::from_be_bytes([octet(at)?, octet(at + 1)?]));
    let (from, client, mut protocol): (IpAddr, IpAddr, u8);
    if vip.is_ipv4() {
        let header: &[u8; 20] = frame.get(at..at + 20)?.try_into().unwrap();
        if header[0] >> 4 != 4 || header[0] & 15 < 5 || word(at + 6)? & 0x1fff != 0 {
            return None;
        }
        from = <[u8; 4]>::try_from(&header[12..16]).unwrap().into();
        client = <[u8; 4]>::try_from(&header[16..20]).unwrap().into();
        protocol = header[9];
        at += usize::from(header[0] & 15) * 4;
    } else {
        let header: &[u8; 40] = frame.get(at..at + 40)?.try_into().unwrap();
        if header[0] >> 4 != 6 {
            return None;
        }
        from = <[u8; 16]>::try_from(&header[8..24]).unwrap().into();
        client = <[u8; 16]>::try_from(&header[24..40]).unwrap().into();
        protocol = header[6];
        at += 40;
        for walked in 0.. {
            if !matches!(protocol, 0 | 43 | 44 | 51 | 60) {
                break;
            }
            if walked == 8 {
                return None;
            }
            let length = match protocol {
                44 if word(at + 2)? & 0xfff8 != 0 => return None,
                44 => frame.get(at..at + 8)?.len(),
                51 => (usize::from(octet(at + 1)?) + 2) * 4,
                _ => (usize::from(octet(at + 1)?) + 1) * 8,
            };
            protocol = octet(at)?;
            at += length;
        }
    }
    if from != vip || !matches!(protocol, 6 | 17) || at > 0x1ff || frame.len() < at + 8 {
        return None;
    }
    Some((SocketAddr::new(client, word(at + 2)?), word(at)?, protocol))
}
