//! Generated frames for the balancer: flows, fragments, errors, echo requests and malformed ones, to known and unknown services.

use std::net::{IpAddr, SocketAddr};

use fastrand::Rng;
use xdpkit::Reason;
use xdpkit_lab::frame::{Frame, extension};

use super::model::What;
use crate::common::dsr::{Host, arriving, client};

const VIPS: [[&str; 2]; 3] = [
    ["192.168.178.100", "2001:db8:b::100"],
    ["192.168.178.101", "2001:db8:b::101"],
    ["203.0.113.9", "2001:db8:ffff::9"],
];
/// Sources that are not one host, or ours.
const MARTIANS: [[&str; 4]; 2] =
    [["0.1.2.3", "127.0.0.1", "239.1.2.3", "192.168.178.101"], ["::", "::1", "ff02::1", "2001:db8:b::101"]];
const PORTS: [u16; 4] = [80, 53, 443, 9999];

/// A frame, and what it is to the model.
pub(crate) struct Generated {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    /// Of fragments.
    pub(crate) identification: u32,
    pub(crate) what: What,
    /// Where the message of an echo request begins.
    pub(crate) icmp: usize,
    pub(crate) frame: Vec<u8>,
}

/// `window`: fragments are remembered for half a minute, so identifications do not stay in use for longer.
pub(crate) fn generate(random: &mut Rng, host: &Host, window: u32) -> Generated {
    let family6 = random.bool();
    let source = match random.u8(..24) {
        0 => MARTIANS[usize::from(family6)][random.usize(..4)].parse().unwrap(),
        _ => client(family6, random.u32(..40)),
    };
    let destination: IpAddr = match random.u8(..12) {
        0 => "198.51.100.1",
        n => VIPS[usize::from(n) % 3][usize::from(family6)],
    }
    .parse::<IpAddr>()
    .unwrap();
    let destination =
        if destination.is_ipv4() == source.is_ipv4() { destination } else { "2001:db8:dead::1".parse().unwrap() };
    let client_port = 1000 + random.u16(..3);
    let port = if random.u8(..40) == 0 { 0 } else { *random.choice(&PORTS[..]).unwrap() };
    let (from, to) = (SocketAddr::new(source, client_port), SocketAddr::new(destination, port));
    let length = match random.u8(..30) {
        0 => random.usize(1380..1472),
        1..10 => 0,
        _ => random.usize(..200),
    };
    let payload: Vec<u8> = (0..length).map(|_| random.u8(..)).collect();
    let identification = window % 1000 * 64 + random.u32(1..60);
    let tcp = random.bool();
    let flags = *random.choice(&[2, 2, 16, 16, 16, 24, 17, 18, 4, 20, 0, 1][..]).unwrap();
    let transport = |frame: Frame| frame.payload(&payload);
    let segment = || if tcp { Frame::tcp(from, to).flags(flags) } else { Frame::udp(from, to) };
    let flow = |first| What::Flow { client_port, port, flags: tcp.then_some(flags), first };
    let (mut frame, what) = match random.u8(..20) {
        0 => {
            let kind = if family6 { (129, 128) } else { (0, 8) };
            let echo = random.bool();
            let number = if echo { kind.1 } else { kind.0 };
            let frame = Frame::icmp(source, destination, number, 0, [1, 2, 3, 4]).payload(&payload);
            (frame, if echo { What::Echo } else { What::Other })
        }
        1 | 2 => {
            // A packet that went to a client, quoted by somebody on the way.
            let client = SocketAddr::new(client(family6, random.u32(..40)), client_port);
            let ours = random.u8(..5) > 0;
            let quoted = match (ours, tcp) {
                (true, true) => Frame::tcp(to, client),
                (true, false) => Frame::udp(to, client),
                (false, _) => Frame::udp(client, to),
            };
            let quoted = quoted.payload(&payload).packet();
            let kinds: &[u8] = if family6 { &[1, 2, 3, 4] } else { &[3, 11, 12] };
            let header = if family6 { 48 } else { 28 };
            let frame = Frame::icmp(source, destination, *random.choice(kinds).unwrap(), 0, [0; 4])
                .payload(&quoted[..random.usize(header..=quoted.len())]);
            (frame, What::Error(ours.then_some((client, port, if tcp { 6 } else { 17 }))))
        }
        3 if family6 && tcp => {
            let first = random.bool();
            let frame = transport(segment()).extension(extension::ROUTING, &[4, random.u8(1..), 0, 0, 0, 0]);
            (if first { frame.fragment(0, true) } else { frame }, What::Routed { first })
        }
        3 if family6 && flags == 2 => {
            (Frame::ip(source, destination, 47).payload(&payload).fragment(0, true), What::OtherFirst)
        }
        3 => (Frame::ip(source, destination, 47).payload(&payload), What::Other),
        4 if tcp => {
            (transport(Frame::tcp(from, to).data_offset(random.u8(..5))), What::Malformed(Reason::TcpDataOffset))
        }
        4 => (transport(Frame::udp(from, to).udp_length(7)), What::Malformed(Reason::UdpLength)),
        5 | 6 => (transport(segment()).fragment(0, true), flow(true)),
        7 | 8 => {
            let protocol = if tcp { 6 } else { 17 };
            let frame = Frame::ip(source, destination, protocol).payload(&payload).fragment(800, random.bool());
            (frame, What::Later { protocol })
        }
        _ => (transport(segment()), flow(false)),
    };
    if !matches!(what, What::Later { .. } | What::Flow { first: true, .. } | What::Routed { .. } | What::OtherFirst)
        && random.u8(..4) == 0
    {
        frame = frame.options(&[1; 4]).extension(extension::DESTINATION, &[]);
    }
    for _ in 0..random.u8(..6).saturating_sub(3) {
        frame = frame.vlan(random.u16(..4096));
    }
    if random.bool() {
        frame = frame.dont_fragment();
    }
    let ttl = *random.choice(&[0, 1, 2, 64, 64, 64, 64, 255][..]).unwrap();
    frame = frame.identification(identification).tos(random.u8(..)).ttl(ttl).trailer(&vec![0xee; random.usize(..9)]);
    let frame = arriving(host, frame).build();
    let begins = |at: &usize| {
        frame[*at..].starts_with(&[if family6 { 128 } else { 8 }, 0]) && frame[at + 4..].starts_with(&[1, 2, 3, 4])
    };
    let icmp = if what == What::Echo { (14..frame.len()).find(begins).unwrap() } else { 0 };
    Generated { source, destination, identification, what, icmp, frame }
}
