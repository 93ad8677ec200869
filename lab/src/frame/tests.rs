//! Literal bytes, and a second opinion from `etherparse`.

use std::net::SocketAddr;

use etherparse::{NetSlice, SlicedPacket, TransportSlice};

use super::*;

fn v4() -> (SocketAddrV4, SocketAddrV4) {
    ("10.0.0.2:4000".parse().unwrap(), "10.0.0.1:80".parse().unwrap())
}

fn v6() -> (SocketAddrV6, SocketAddrV6) {
    ("[fd00::2]:4000".parse().unwrap(), "[fd00::1]:80".parse().unwrap())
}

fn both() -> [(SocketAddr, SocketAddr); 2] {
    [(v4().0.into(), v4().1.into()), (v6().0.into(), v6().1.into())]
}

#[test]
fn udp_over_ipv4_with_a_tag_has_these_bytes() {
    let expected = [
        &[2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1][..], // Ethernet addresses
        &[0x81, 0, 0, 100, 8, 0],                  // tag and type
        &[0x45, 0, 0, 30, 0, 0, 0, 0, 64, 17, 0x66, 0xcd, 10, 0, 0, 2, 10, 0, 0, 1],
        &[0x0f, 0xa0, 0, 80, 0, 10, 0x73, 0x7e, b'h', b'i'],
    ];
    assert_eq!(Frame::udp4(v4().0, v4().1).vlan(100).payload(b"hi").build(), expected.concat());
}

#[test]
fn tcp_over_ipv6_with_an_extension_has_these_bytes() {
    let (src, dst) = v6();
    let addresses = [src.ip().octets(), dst.ip().octets()].concat();
    let frame = Frame::tcp6(src, dst).extension(extension::DESTINATION, &[]).build();
    let expected = [
        &[2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x86, 0xdd][..],
        &[0x60, 0, 0, 0, 0, 28, 60, 64],
        &addresses,
        &[6, 0, 1, 4, 0, 0, 0, 0], // destination options: PadN
        &[0x0f, 0xa0, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff],
        &[0xa5, 0xed, 0, 0],
    ];
    assert_eq!(frame, expected.concat());
}

#[test]
fn an_arp_request_has_these_bytes() {
    let request = Frame::arp_request(SRC_MAC, *v4().0.ip(), *v4().1.ip()).build();
    let expected = [
        &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 8, 6][..],
        &[0, 1, 8, 0, 6, 4, 0, 1],
        &[2, 0, 0, 0, 0, 1, 10, 0, 0, 2],
        &[0, 0, 0, 0, 0, 0, 10, 0, 0, 1],
    ];
    assert_eq!(request, expected.concat());
}

/// Every checksum that the frame carries is the one that etherparse computes.
fn assert_checksums(frame: &[u8], what: &str) {
    let packet = SlicedPacket::from_ethernet(frame).unwrap_or_else(|error| panic!("{what}: {error}"));
    if let Some(NetSlice::Ipv4(ip)) = &packet.net {
        assert_eq!(ip.header().header_checksum(), ip.header().to_header().calc_header_checksum(), "{what}");
    }
    let (header4, header6) = match packet.net.unwrap() {
        NetSlice::Ipv4(ip) => (Some(ip.header().to_header()), None),
        NetSlice::Ipv6(ip) => (None, Some(ip.header().to_header())),
        other => panic!("{what}: {other:?}"),
    };
    let (got, expected) = match packet.transport.expect(what) {
        TransportSlice::Udp(udp) => {
            let header = udp.to_header();
            let sum = match (header4, header6) {
                (Some(ip), _) => header.calc_checksum_ipv4(&ip, udp.payload()),
                (_, Some(ip)) => header.calc_checksum_ipv6(&ip, udp.payload()),
                _ => unreachable!(),
            };
            (header.checksum, sum.unwrap())
        }
        TransportSlice::Tcp(tcp) => {
            let header = tcp.to_header();
            let sum = match (header4, header6) {
                (Some(ip), _) => header.calc_checksum_ipv4(&ip, tcp.payload()),
                (_, Some(ip)) => header.calc_checksum_ipv6(&ip, tcp.payload()),
                _ => unreachable!(),
            };
            (header.checksum, sum.unwrap())
        }
        TransportSlice::Icmpv4(icmp) => (icmp.checksum(), icmp.icmp_type().calc_checksum(icmp.payload())),
        TransportSlice::Icmpv6(icmp) => {
            let ip = header6.unwrap();
            let sum = icmp.icmp_type().calc_checksum(ip.source, ip.destination, icmp.payload());
            (icmp.checksum(), sum.unwrap())
        }
        TransportSlice::Igmp(_) => panic!("{what}: IGMP"),
    };
    assert_eq!(got, expected, "{what}");
}

#[test]
fn checksums_and_lengths_are_right_in_every_shape() {
    for (src, dst) in both() {
        for payload in [&b""[..], b"x", b"odd", &[0xff; 1400]] {
            let shapes = [
                ("udp", Frame::udp(src, dst)),
                ("tcp", Frame::tcp(src, dst).flags(tcp::ACK).sequence(7, 9).window(5)),
                ("tcp with options", Frame::tcp(src, dst).tcp_options(&[2, 4, 5, 0xb4, 3])),
                ("echo", Frame::echo(src.ip(), dst.ip(), 1, 2)),
                ("ip options", Frame::udp(src, dst).options(&[0x94, 4, 0, 0, 1])),
                ("two tags", Frame::udp(src, dst).tag(0x88a8, 5).vlan(6)),
                ("fields", Frame::udp(src, dst).ttl(1).tos(0xb8).identification(77).dont_fragment()),
                (
                    "extensions",
                    Frame::tcp(src, dst)
                        .extension(extension::HOP_BY_HOP, &[])
                        .extension(extension::ROUTING, &[0, 0, 0, 0, 0, 0])
                        .extension(extension::AUTHENTICATION, &[0; 22])
                        .extension(extension::DESTINATION, &[1, 4, 0, 0, 0, 0, 0]),
                ),
                ("trailer", Frame::udp(src, dst).trailer(&[9; 20])),
            ];
            for (name, frame) in shapes {
                let what = format!("{name}, {src}, {} bytes", payload.len());
                assert_checksums(&frame.payload(payload).build(), &what);
            }
        }
    }
    let solicitation = Frame::neighbour_solicitation(SRC_MAC, *v6().0.ip(), *v6().1.ip()).build();
    assert_eq!(solicitation[..6], [0x33, 0x33, 0xff, 0, 0, 1]);
    assert_checksums(&solicitation, "neighbour solicitation");
}

#[test]
fn fragments_together_are_the_message() {
    for (src, dst) in both() {
        let payload: Vec<u8> = (0..100).collect();
        let whole = Frame::udp(src, dst).identification(5).payload(&payload);
        let headers = if src.is_ipv4() { 14 + 20 } else { 14 + 40 + 8 };
        let fragments = whole.fragments(48);
        assert_eq!(fragments.len(), 3);
        let joined: Vec<u8> = fragments.iter().flat_map(|frame| frame[headers..].to_vec()).collect();
        assert_eq!(joined[..], whole.build()[if src.is_ipv4() { 34 } else { 54 }..]);
        // By hand: the second has no transport header of its own.
        let second = whole.clone().fragment(48, true).payload(&payload[40..88]);
        assert_eq!(second.build(), fragments[1]);
        for frame in fragments {
            let packet = SlicedPacket::from_ethernet(&frame).unwrap();
            assert!(packet.is_ip_payload_fragmented());
        }
    }
}

#[test]
fn overridden_fields_are_as_asked_and_only_they() {
    let (src, dst) = v4();
    let (udp, tcp) = (Frame::udp4(src, dst).payload(b"data"), Frame::tcp4(src, dst).payload(b"data"));
    // A field, the frame with it overridden, the offset of the field and its bytes.
    let rows: &[(&str, Frame, usize, &[u8])] = &[
        ("version", udp.clone().version(5), 14, &[0x55]),
        ("ihl", udp.clone().ihl(4), 14, &[0x44]),
        ("tot_len", udp.clone().ip_length(1000), 16, &[3, 0xe8]),
        ("protocol", udp.clone().protocol(50), 23, &[50]),
        ("IPv4 checksum", udp.clone().ip_checksum(0x1234), 24, &[0x12, 0x34]),
        ("UDP length", udp.clone().udp_length(7), 38, &[0, 7]),
        ("UDP checksum", udp.clone().checksum(0), 40, &[0, 0]),
        ("doff", tcp.clone().data_offset(4), 46, &[0x40]),
        ("TCP checksum", tcp.clone().checksum(0xabcd), 50, &[0xab, 0xcd]),
    ];
    for (name, frame, offset, bytes) in rows {
        let frame = frame.build();
        assert_eq!(&frame[*offset..offset + bytes.len()], *bytes, "{name}");
        assert_eq!(frame.len(), if *offset > 42 { 58 } else { 46 }, "{name}");
    }
    assert_eq!(Frame::udp6(v6().0, v6().1).ip_length(3).build()[18..20], [0, 3]);
}

#[test]
fn a_udp_checksum_of_zero_is_sent_as_ones() {
    let (src, dst) = v4();
    let sum = Frame::udp4(src, dst).payload(&[0, 0]).build();
    let sum = [sum[40], sum[41]]; // adding this much to the payload makes the sum zero
    assert_eq!(Frame::udp4(src, dst).payload(&sum).build()[40..42], [0xff, 0xff]);
}

#[test]
fn an_icmp_error_carries_the_packet_it_complains_about() {
    let (src, dst) = (v4().0, v4().1);
    let inner = Frame::udp4(src, dst).payload(b"too big").packet();
    let error = Frame::icmp((*dst.ip()).into(), (*src.ip()).into(), 3, 4, [0, 0, 5, 0xdc]);
    let error = error.payload(&inner).build();
    assert_checksums(&error, "fragmentation needed");
    assert_eq!(error[42..], inner);
    let tunnel = Frame::ip((*dst.ip()).into(), (*src.ip()).into(), 4).payload(&inner).build();
    assert_eq!((tunnel[23], &tunnel[34..]), (4, &inner[..]));
}
