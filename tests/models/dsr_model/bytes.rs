//! What must come out of the balancer, byte by byte.

use std::net::IpAddr;

use xdpkit::{Action, Reason};

use super::{
    frames::Generated,
    model::{Model, Verdict, What},
};
use crate::common::{
    bytes::{echo_reply, too_big},
    dsr::{Host, fix_ipv4, mac, neighbour4, neighbour6, network_at, one_hop_further},
};

/// What must come of a frame, in bytes. Completes the verdict by what the packet's size and hop limit change.
pub(crate) fn expected(host: &Host, model: &Model, g: &Generated, verdict: &mut Verdict) -> Vec<u8> {
    if verdict.reason == Reason::EchoAnswered {
        return echo_reply(&g.frame, g.icmp);
    }
    let Some((service, backend)) = verdict.to else { return g.frame.clone() };
    let at = network_at(&g.frame);
    let family6 = g.frame[at] >> 4 == 6;
    let (ttl, length) = match family6 {
        false => (g.frame[at + 8], usize::from(u16::from_be_bytes([g.frame[at + 2], g.frame[at + 3]]))),
        true => (g.frame[at + 7], 40 + usize::from(u16::from_be_bytes([g.frame[at + 4], g.frame[at + 5]]))),
    };
    if ttl <= 1 {
        (verdict.action, verdict.reason) = (Action::Pass, Reason::HopLimit);
        return g.frame.clone();
    }
    let service = &model.services[service];
    let outer6 = family6 != service.crossed;
    let overhead = match (service.ipip, outer6) {
        (false, _) => 0,
        (true, false) => 20,
        (true, true) => 40,
    };
    if length + overhead > 1500 {
        // What no wire of this interface carries was merged, and gets no answer; nor do errors and later fragments.
        let is_answerable = length <= 1500 && !matches!(g.what, What::Later { .. } | What::Error(_));
        if !is_answerable {
            (verdict.action, verdict.reason) = (Action::Drop, Reason::TooBig);
            return g.frame.clone();
        }
        (verdict.action, verdict.reason) = (Action::Tx, Reason::TooBigAnswered);
        return too_big(&g.frame, 1500 - overhead as u16);
    }
    let moved = one_hop_further(&g.frame, mac(backend), host.mac);
    if !service.ipip {
        return moved;
    }
    let mut out = moved[..at - 2].to_vec();
    let (tos, protocol) = match family6 {
        false => (moved[at + 1], 4),
        true => (moved[at] << 4 | moved[at + 1] >> 4, 41),
    };
    let hash = verdict.hash.unwrap_or(0);
    if outer6 {
        out.extend([0x86, 0xdd]);
        out.extend((0x6000_0000 | u32::from(tos) << 20 | hash & 0xf_ffff).to_be_bytes());
        out.extend((length as u16).to_be_bytes());
        out.extend([protocol, 64, 0x20, 1, 0xd, 0xb8, 2, 0, 0, 0]);
        out.extend((u64::from(hash) << 32 | u64::from(hash)).to_ne_bytes());
        let IpAddr::V6(to) = neighbour6(backend) else { unreachable!() };
        out.extend(to.octets());
    } else {
        let start = out.len() + 2;
        out.extend([8, 0, 0x45, tos]);
        out.extend((length as u16 + 20).to_be_bytes());
        match family6 {
            true => out.extend([0, 0, 0x40, 0]),
            false => {
                // Each offset adds an amount of its own.
                let offset = u16::from_ne_bytes([moved[at + 6] & 0x1f, moved[at + 7]]);
                let identification = u16::from_ne_bytes([moved[at + 4], moved[at + 5]]);
                out.extend(identification.wrapping_add(offset.wrapping_mul(0x9e37)).to_ne_bytes());
                out.extend([0x40, 0]);
            }
        }
        out.extend([64, protocol, 0, 0, 10, 200]);
        out.extend(&hash.to_ne_bytes()[2..]);
        let IpAddr::V4(to) = neighbour4(backend) else { unreachable!() };
        out.extend(to.octets());
        fix_ipv4(&mut out, start);
    }
    out.extend(&moved[at..]);
    out
}
