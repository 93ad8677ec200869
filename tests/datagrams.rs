//! Datagrams in several parts, and packets that are too long, through both balancers. Traps: P6, L6, L21.

mod common;

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use common::{
    dsr::{
        self, GATEWAY, Host, arriving, client, inner_at, mac, neighbour4, neighbour6, neighbours, network_at, segment,
        service_text, vip,
    },
    nat::{Bench, Side, at},
    nat_talk::conversations,
};
use xdpkit::{Action, DsrService, Error, NatConfig, NatMode, Reason, ServiceProtocol};
use xdpkit_lab::frame::{
    Frame,
    extension::{AUTHENTICATION, DESTINATION, HOP_BY_HOP, ROUTING},
};

/// An IPv6 datagram in parts, with these extension headers behind the fragment header of the first one.
fn parts(from: SocketAddr, to: SocketAddr, extensions: &[u8], identification: u32, size: usize) -> Vec<Frame> {
    let mut whole = Frame::udp(from, to).payload(&[9; 2500]);
    for kind in extensions {
        // Of a routing header, no segments are left.
        whole = whole.extension(*kind, &[0; 6]);
    }
    let first = extensions.first().copied().unwrap_or(17);
    let body = whole.packet()[40..].to_vec();
    let count = body.len().div_ceil(size);
    let part = |(index, part): (usize, &[u8])| {
        // What later fragments name is ignored (RFC 8200, 4.5).
        let protocol = if index == 1 { 17 } else { first };
        Frame::ip(from.ip(), to.ip(), protocol)
            .payload(part)
            .fragment((index * size) as u16, index + 1 < count)
            .identification(identification)
    };
    body.chunks(size).enumerate().map(part).collect()
}

const CHAINS: [&[u8]; 5] =
    [&[], &[DESTINATION], &[DESTINATION, DESTINATION], &[AUTHENTICATION, DESTINATION], &[HOP_BY_HOP, ROUTING]];

#[test]
fn l21_an_ipv6_datagram_with_headers_behind_the_fragment_header_is_one() {
    let host = Host::new();
    let b = host.balancer(&dsr::config());
    let backends = neighbours(true, &[11, 12, 13, 14]);
    b.service(&service_text("udp", true, "53"), DsrService::l2(), &backends);
    let bench = Bench::with_services(&NatConfig::default(), NatMode::Full);
    let mut identification = 0;
    for chain in CHAINS {
        for number in 0..8 {
            identification += 1;
            let from = SocketAddr::new(client(true, number), 6000);
            let mut went = BTreeSet::new();
            for part in parts(from, (vip(true), 53).into(), chain, identification, 800) {
                let (action, reason, out) = b.run(&arriving(&host, part).build());
                assert_eq!((action, reason), (Action::Tx, Reason::Forwarded), "{chain:?}");
                went.insert(out[5]);
            }
            assert_eq!(went.len(), 1, "{chain:?}: all to one backend");
        }
        identification += 1;
        for part in parts(at("[2001:db8:a::20]:4000"), at("[2001:db8:a::100]:53"), chain, identification, 800) {
            let outcome = bench.client_sends(&part);
            assert_eq!((outcome.action, outcome.reason), (Action::Redirect, Reason::Forwarded), "{chain:?}");
        }
        // Of no service: all to the host; without their first one: nowhere.
        identification += 1;
        for part in parts(at("[2001:db8:a::20]:4000"), at("[2001:db8:a::100]:54"), chain, identification, 800) {
            assert_eq!(bench.client_sends(&part).reason, Reason::NoService, "{chain:?}");
        }
        // Nor of another protocol, which only the first one tells.
        if let [kind, ..] = chain {
            let [from, to] = ["2001:db8:a::20", "2001:db8:a::100"].map(|text| text.parse().unwrap());
            let whole = Frame::ip(from, to, 47).payload(&[9; 1200]).extension(*kind, &[0; 6]);
            for (index, part) in whole.packet()[40..].chunks(800).enumerate() {
                let part = Frame::ip(from, to, *kind).payload(part).fragment(index as u16 * 800, index == 0);
                let part = part.identification(identification + 2000);
                assert_eq!(bench.client_sends(&part).reason, Reason::NoService, "{chain:?}");
            }
        }
        let strangers =
            parts(at("[2001:db8:a::20]:4000"), at("[2001:db8:a::100]:53"), chain, identification + 1000, 800);
        assert_eq!(bench.client_sends(&strangers[2]).reason, Reason::FragmentUnknown, "{chain:?}");
    }
}

/// A routing header whose segments are not used up: the address in the packet is a way station. With none left, it is
/// the destination.
#[test]
fn p5_a_packet_with_segments_left_goes_on_untouched() {
    let host = Host::new();
    let b = host.balancer(&dsr::config());
    let bench = Bench::with_services(&NatConfig::default(), NatMode::Full);
    let routed = |frame: Frame, left: u8| frame.extension(ROUTING, &[4, left, 0, 0, 0, 0]);
    for protocol in ["tcp", "udp"] {
        b.service(&service_text(protocol, true, "80"), DsrService::l2(), &neighbours(true, &[11]));
    }
    let (from, to) = (SocketAddr::new(client(true, 1), 6000), SocketAddr::new(vip(true), 80));
    for frame in [Frame::tcp(from, to), Frame::udp(from, to), Frame::echo(from.ip(), to.ip(), 1, 2)] {
        for before in [&[][..], &[HOP_BY_HOP], &[DESTINATION]] {
            let frame = before.iter().fold(frame.clone(), |frame, kind| frame.extension(*kind, &[]));
            for (left, passes) in [(1, true), (255, true), (0, false)] {
                let frame = arriving(&host, routed(frame.clone(), left)).build();
                let (action, reason, out) = b.run(&frame);
                assert_eq!((action, reason) == (Action::Pass, Reason::RoutingHeader), passes, "{left} {reason}");
                assert!(!passes || out == frame, "untouched");
            }
        }
    }
    for (name, client, vip, _) in conversations().filter(|(_, client, ..)| client.is_ipv6()) {
        let frame = match name.protocol {
            ServiceProtocol::Tcp => Frame::tcp(client, vip),
            _ => Frame::udp(client, vip),
        };
        let (from, to) = bench.macs_of_clients();
        let sent = routed(frame.clone(), 1).macs(from, to).build();
        let outcome = bench.run(Side::Clients, &sent);
        assert_eq!((outcome.action, outcome.reason), (Action::Pass, Reason::RoutingHeader));
        assert_eq!(outcome.frame, sent);
        assert_eq!(bench.client_sends(&routed(frame, 0)).reason, Reason::Forwarded);
    }
    // All parts of one go the same way, wherever the header stands.
    for (from, to) in [(from, to), (at("[2001:db8:a::20]:4000"), at("[2001:db8:a::100]:53"))] {
        let dsr = from.port() == 6000;
        let reasons = |frames: Vec<Vec<u8>>| -> Vec<Reason> {
            let run = |frame: &Vec<u8>| if dsr { b.run(frame).1 } else { bench.run(Side::Clients, frame).reason };
            frames.iter().map(run).collect()
        };
        let macs = |frame: Frame| {
            let macs = if dsr { (mac(GATEWAY), host.mac) } else { bench.macs_of_clients() };
            frame.macs(macs.0, macs.1)
        };
        let datagram = Frame::udp(from, to).payload(&[7; 2000]).identification(5);
        let before = macs(routed(datagram, 1)).fragments(1000);
        assert_eq!(reasons(before), [Reason::RoutingHeader; 3]);
        let body = routed(Frame::udp(from, to).payload(&[7; 1200]), 1).packet()[40..].to_vec();
        let behind = body.chunks(800).enumerate().map(|(index, part)| {
            let frame = Frame::ip(from.ip(), to.ip(), ROUTING).payload(part).identification(6);
            macs(frame.fragment(index as u16 * 800, index == 0)).build()
        });
        assert_eq!(reasons(behind.collect()), [Reason::RoutingHeader, Reason::NoService]);
    }
}

#[test]
fn p6_what_is_malformed_is_dropped_by_both_balancers_for_the_same_reason() {
    let host = Host::new();
    let b = host.balancer(&dsr::config());
    let bench = Bench::with_services(&NatConfig::default(), NatMode::Full);
    for family6 in [false, true] {
        for protocol in ["tcp", "udp"] {
            b.service(&service_text(protocol, family6, "53"), DsrService::l2(), &neighbours(family6, &[11]));
        }
        let (own, foreign) = if family6 {
            (["2001:db8:a::20", "2001:db8:a::100"], "2001:db8:77::1")
        } else {
            (["10.0.0.20", "10.0.0.100"], "10.77.0.1")
        };
        let [from, nat_vip, foreign]: [IpAddr; 3] = [own[0], own[1], foreign].map(|text| text.parse().unwrap());
        let frames = |from: IpAddr, to: IpAddr| {
            let (from, to) = (SocketAddr::new(from, 4000), SocketAddr::new(to, 53));
            let datagram = Frame::udp(from, to).payload(&[1; 40]);
            [
                (Reason::UdpLength, datagram.clone().udp_length(49)),
                (Reason::UdpLength, datagram.clone().udp_length(u16::MAX)),
                (Reason::UdpLength, datagram.clone().udp_length(7)),
                (Reason::UdpLength, datagram.udp_length(0)),
                (Reason::UdpTruncated, Frame::ip(from.ip(), to.ip(), 17).payload(&[1; 7])),
                (Reason::TcpDataOffset, Frame::tcp(from, to).data_offset(4)),
                (Reason::TcpDataOffset, Frame::tcp(from, to).data_offset(15)),
                (Reason::TcpTruncated, Frame::ip(from.ip(), to.ip(), 6).payload(&[1; 19])),
            ]
        };
        for (reason, frame) in frames(client(family6, 1), vip(family6)) {
            let (action, found, _) = b.run(&arriving(&host, frame).build());
            assert_eq!((action, found), (Action::Drop, reason));
        }
        for (reason, frame) in frames(from, nat_vip) {
            let outcome = bench.client_sends(&frame);
            assert_eq!((outcome.action, outcome.reason), (Action::Drop, reason));
        }
        for (reason, frame) in frames(from, foreign) {
            let outcome = bench.client_sends(&frame);
            assert_eq!((outcome.action, outcome.reason), (Action::Pass, reason), "others' are not ours to drop");
            let (action, found, _) = b.run(&arriving(&host, frame).build());
            assert_eq!((action, found), (Action::Pass, reason));
        }
    }
}

/// The outer IPv4 header: source, identification, and whether it may be fragmented.
fn outer4(frame: &[u8]) -> ([u8; 4], u16, bool) {
    let ip = &frame[network_at(frame)..];
    (ip[12..16].try_into().unwrap(), u16::from_be_bytes([ip[4], ip[5]]), ip[6] & 0x40 == 0)
}

#[test]
fn l21_the_fragments_of_a_datagram_leave_with_one_outer_source_and_distinct_identifications() {
    for outer_fragments in [false, true] {
        let host = Host::new();
        let b = host.balancer(&dsr::config());
        for (family6, crossed) in [(false, false), (true, false), (false, true), (true, true)] {
            let backends: Vec<_> =
                [11, 12].map(|n| if family6 != crossed { neighbour6(n) } else { neighbour4(n) }).into();
            let kind = DsrService::ipip().outer_fragments(outer_fragments);
            let service = b.service(&service_text("udp", family6, "53"), kind, &backends);
            assert_eq!(b.balancer.service(service).unwrap().service, kind);
            let mut sources = BTreeSet::new();
            for number in 0..50_u32 {
                let from = SocketAddr::new(client(family6, number % 10), 6000 + number as u16);
                let datagram = Frame::udp(from, (vip(family6), 53).into()).payload(&[9; 9000]);
                let parts = arriving(&host, datagram.identification(900 + number)).fragments(1400);
                let (mut of_one, mut seen) = (BTreeSet::new(), BTreeSet::new());
                for part in &parts {
                    let (action, reason, out) = b.run(part);
                    assert_eq!((action, reason), (Action::Tx, Reason::Forwarded));
                    assert_eq!(out[inner_at(&out)] >> 4, part[14] >> 4);
                    if family6 != crossed {
                        let at = network_at(&out);
                        of_one.insert([&out[at..at + 4], &out[at + 8..at + 24]].concat());
                        continue;
                    }
                    let (source, identification, may_be) = outer4(&out);
                    of_one.insert(source.to_vec());
                    assert_eq!(may_be, outer_fragments && !family6, "{family6}");
                    // Of an IPv6 packet, none is ever fragmented, so none is needed (RFC 6864, 4.1).
                    assert!(seen.insert(identification) || family6, "{identification} twice");
                }
                assert_eq!(of_one.len(), 1, "one outer source and flow label");
                sources.extend(of_one);
            }
            assert!(sources.len() > 5, "{sources:?}: it still varies by client");
            host.ns.run(|| b.balancer.remove_service(service)).unwrap();
        }
    }
}

#[test]
fn l6_what_may_be_fragmented_is_answered_too_unless_backends_put_it_together() {
    let host = Host::new();
    let b = host.balancer(&dsr::config());
    for (kind, backend, overhead) in [
        (DsrService::ipip(), neighbour4(11), 20),
        (DsrService::ipip(), neighbour6(11), 40),
        (DsrService::ipip().outer_fragments(true), neighbour6(11), 40),
    ] {
        let service = b.service(&service_text("tcp", false, "80"), kind, &[backend]);
        let frame = arriving(&host, segment(false, 7, 7000).payload(&[5; 1460])).build();
        let (action, reason, out) = b.run(&frame);
        assert_eq!((action, reason), (Action::Tx, Reason::TooBigAnswered));
        let [high, low] = (1500 - overhead as u16).to_be_bytes();
        let answer = Frame::icmp(vip(false), client(false, 7), 3, 4, [0, 0, high, low]).dont_fragment();
        assert_eq!(out, answer.payload(&frame[14..14 + 504]).macs(host.mac, mac(GATEWAY)).build());
        host.ns.run(|| b.balancer.remove_service(service)).unwrap();
    }
    // By IPv4, the host's stack puts it into fragments.
    let kind = DsrService::ipip().outer_fragments(true);
    b.service(&service_text("tcp", false, "80"), kind, &[neighbour4(11)]);
    let sent = segment(false, 7, 7000).payload(&[5; 1460]).identification(77);
    let frame = arriving(&host, sent.clone()).build();
    let (action, reason, out) = b.run(&frame);
    assert_eq!((action, reason), (Action::Pass, Reason::TooBig));
    let (source, _, may_be) = outer4(&out);
    assert!(may_be && source[..2] == [10, 200], "{source:?}");
    assert_eq!(out[..12], frame[..12], "to the host");
    assert_eq!(out[34..], sent.ttl(63).packet());
    let frame = arriving(&host, segment(false, 7, 7000).payload(&[5; 1460]).dont_fragment()).build();
    assert_eq!(b.run(&frame).1, Reason::TooBigAnswered, "what may not be is answered all the same");
    let short = arriving(&host, segment(false, 7, 7000).dont_fragment()).build();
    assert!(!outer4(&b.run(&short).2).2, "and stays so outside");
    let of_l2 = DsrService::l2().outer_fragments(true);
    let text = service_text("tcp", false, "81").parse().unwrap();
    let error = host.ns.run(|| b.balancer.insert_service(text, of_l2, [(neighbour4(11), 1)])).unwrap_err();
    assert!(matches!(error, Error::Invalid { what: "outer_fragments", .. }), "{error}");
}
