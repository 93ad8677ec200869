//! Taking tunnels apart: what comes in, what must come out, and why; and a kernel's own tunnel devices.

mod common;

use std::net::IpAddr;

use common::{dsr::fix_ipv4, judge, wait_for};
use xdpkit::{Action, AttachOptions, Error, Reason, Stage as _, TunnelDecap, TunnelDecapConfig, ipnet::IpNet};
use xdpkit_lab::{
    frame::{Frame, extension},
    packet::PacketSocket,
    topology::{Pair, add_silent_vip},
    traffic::UdpEcho,
};

const VIPS: [&str; 2] = ["192.0.2.1", "2001:db8::1"];
const CLIENTS: [&str; 2] = ["198.51.100.7", "2001:db8:c::7"];
const OUTER: [[&str; 2]; 2] = [["10.200.3.4", "172.16.0.11"], ["2001:db8:200::9", "2001:db8:d::11"]];

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn config() -> TunnelDecapConfig {
    VIPS.iter().fold(TunnelDecapConfig::default(), |config, vip| config.vip(ip(vip)))
}

fn strict() -> TunnelDecapConfig {
    OUTER.iter().fold(strict_sources(config()), |config, [_, to]| config.destination(ip(to)))
}

/// A segment for the virtual address, and a tunnel around a packet.
fn inside(family: usize) -> Frame {
    Frame::tcp((ip(CLIENTS[family]), 4000).into(), (ip(VIPS[family]), 80).into()).payload(b"0123456789")
}

fn around(outer: usize, inner: usize, packet: &[u8]) -> Frame {
    let protocol = if inner == 0 { 4 } else { 41 };
    Frame::ip(ip(OUTER[outer][0]), ip(OUTER[outer][1]), protocol).payload(packet)
}

#[test]
fn every_mix_of_families_comes_out_as_it_went_in() {
    let decap = TunnelDecap::load(&strict()).unwrap();
    for (outer, inner) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        for (what, tags) in [("untagged", 0), ("one tag", 1), ("two tags", 2)] {
            let tagged = |mut frame: Frame| {
                for tag in 0..tags {
                    frame = frame.vlan(5 + tag);
                }
                frame
            };
            let packet = inside(inner);
            for frame in [
                around(outer, inner, &packet.packet()),
                around(outer, inner, &packet.packet()).options(&[1; 8]).extension(extension::DESTINATION, &[]),
                around(outer, inner, &packet.packet()).trailer(&[0xee; 7]),
            ] {
                let frame = tagged(frame).build();
                assert_eq!(judge(&decap, &frame), (Action::Pass, Reason::Decapsulated), "{outer} {inner} {what}");
                let out = decap.test_run(&frame).unwrap().frame;
                let wanted = tagged(packet.clone()).build();
                assert_eq!(out[..wanted.len()], wanted, "{outer} {inner} {what}");
            }
        }
    }
}

#[test]
fn what_is_not_believed_is_dropped_and_what_is_not_ours_goes_on() {
    let decap = TunnelDecap::load(&strict()).unwrap();
    for (outer, inner) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let packet = inside(inner).packet();
        let protocol = if inner == 0 { 4 } else { 41 };
        let [_, to] = OUTER[outer];
        let foreign = if outer == 0 { "10.201.3.4" } else { "2001:db8:201::9" };
        let elsewhere = if outer == 0 { "172.16.0.12" } else { "2001:db8:d::12" };
        let own_source = Frame::tcp((ip(VIPS[inner]), 1).into(), (ip(VIPS[inner]), 80).into()).packet();
        let other = Frame::tcp((ip(CLIENTS[inner]), 1).into(), (ip(CLIENTS[inner]), 80).into()).packet();
        let long = if inner == 0 { inside(0).ip_length(2000) } else { inside(1).ip_length(2000) }.packet();
        let crooked = inside(inner).version(9).packet();
        for (what, frame, action, reason) in [
            ("source", Frame::ip(ip(foreign), ip(to), protocol).payload(&packet), Action::Drop, Reason::TunnelSource),
            (
                "destination",
                Frame::ip(ip(OUTER[outer][0]), ip(elsewhere), protocol).payload(&packet),
                Action::Pass,
                Reason::TunnelDestination,
            ),
            ("a VIP speaks", around(outer, inner, &own_source), Action::Drop, Reason::InnerSource),
            ("for another", around(outer, inner, &other), Action::Pass, Reason::TunnelNotVip),
            ("longer than the tunnel", around(outer, inner, &long), Action::Drop, Reason::InnerMalformed),
            ("another version", around(outer, inner, &crooked), Action::Pass, Reason::TunnelNotVip),
            ("cut short", around(outer, inner, &packet[..15]), Action::Pass, Reason::TunnelNotVip),
            ("the first part", around(outer, inner, &packet).fragment(0, true), Action::Pass, Reason::TunnelFragment),
            ("a later part", around(outer, inner, &packet).fragment(80, false), Action::Pass, Reason::TunnelFragment),
            ("no tunnel", inside(inner), Action::Pass, Reason::NotTunnel),
            (
                "malformed outside",
                around(outer, inner, &packet).version(7),
                Action::Pass,
                [Reason::Ipv4Version, Reason::Ipv6Version][outer],
            ),
        ] {
            let frame = frame.build();
            assert_eq!(judge(&decap, &frame), (action, reason), "{outer} {inner} {what}");
            if action == Action::Pass {
                assert_eq!(decap.test_run(&frame).unwrap().frame, frame, "{outer} {inner} {what}: untouched");
            }
        }
    }
}

#[test]
fn ecn_follows_rfc_6040() {
    let decap = TunnelDecap::load(&config().any_source()).unwrap();
    const NOT: u8 = 0;
    const ECT1: u8 = 1;
    const ECT0: u8 = 2;
    const CE: u8 = 3;
    for (inside_field, outside, wanted) in [
        (NOT, NOT, Some(NOT)),
        (NOT, ECT0, Some(NOT)),
        (NOT, ECT1, Some(NOT)),
        (NOT, CE, None),
        (ECT0, NOT, Some(ECT0)),
        (ECT0, ECT0, Some(ECT0)),
        (ECT0, ECT1, Some(ECT1)),
        (ECT0, CE, Some(CE)),
        (ECT1, NOT, Some(ECT1)),
        (ECT1, ECT0, Some(ECT1)),
        (ECT1, ECT1, Some(ECT1)),
        (ECT1, CE, Some(CE)),
        (CE, NOT, Some(CE)),
        (CE, ECT0, Some(CE)),
        (CE, ECT1, Some(CE)),
        (CE, CE, Some(CE)),
    ] {
        for (outer, inner) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let packet = inside(inner).tos(0xb8 | inside_field);
            let frame = around(outer, inner, &packet.packet()).tos(0x48 | outside).build();
            let what = format!("{inside_field} in {outside}, {inner} in {outer}");
            let Some(field) = wanted else {
                assert_eq!(judge(&decap, &frame), (Action::Drop, Reason::InnerEcn), "{what}");
                continue;
            };
            assert_eq!(judge(&decap, &frame), (Action::Pass, Reason::Decapsulated), "{what}");
            let mut right = packet.tos(0xb8 | field).build();
            if inner == 0 {
                fix_ipv4(&mut right, 14);
            }
            assert_eq!(decap.test_run(&frame).unwrap().frame, right, "{what}");
        }
    }
}

#[test]
fn a_decapsulator_needs_a_virtual_address() {
    let error = TunnelDecap::load(&TunnelDecapConfig::default()).unwrap_err();
    assert!(matches!(error, Error::Invalid { what: "vips", .. }), "{error}");
    let error = TunnelDecap::load(&TunnelDecapConfig::default().vip(ip("224.0.0.1"))).unwrap_err();
    assert!(error.to_string().contains("vip `224.0.0.1`"), "{error}");
}

#[test]
fn a_decapsulator_asks_where_tunnels_may_begin() {
    let net: IpNet = "10.200.0.0/16".parse().unwrap();
    for wrong in [config(), config().any_source().source(net)] {
        let error = TunnelDecap::load(&wrong).unwrap_err();
        assert!(matches!(error, Error::Invalid { what: "sources", .. }), "{error}");
        assert!(error.to_string().contains("`any_source`"), "{error}");
    }
    let foreign = around(0, 0, &inside(0).packet()).build();
    let open = TunnelDecap::load(&config().any_source()).unwrap();
    assert_eq!(judge(&open, &foreign), (Action::Pass, Reason::Decapsulated));
    let closed = TunnelDecap::load(&config().source("10.201.0.0/16".parse::<IpNet>().unwrap())).unwrap();
    assert_eq!(judge(&closed, &foreign), (Action::Drop, Reason::TunnelSource));
    let six = around(1, 0, &inside(0).packet()).build();
    assert_eq!(judge(&closed, &six), (Action::Drop, Reason::TunnelSource), "and none of the other family");
}

/// A stranger's tunnel brings a service nothing, so nobody hears from it whom it claims to ask for.
#[test]
fn a_backend_is_no_reflector() {
    let pair = Pair::new().unwrap();
    let [vip4, vip6] = VIPS.map(ip);
    add_silent_vip(&pair.server, vip4).unwrap();
    add_silent_vip(&pair.server, vip6).unwrap();
    pair.server.sysctl("net.ipv4.conf.all.rp_filter", "0").unwrap();
    let closed = strict_sources(TunnelDecapConfig::default().vip(vip4).vip(vip6));
    let decap = TunnelDecap::load(&closed).unwrap();
    let _attached = pair.server.run(|| decap.attach(&AttachOptions::new("eth0"))).unwrap();
    let wire = PacketSocket::open(&pair.client, "eth0").unwrap();
    let macs = (pair.client.mac("eth0").unwrap(), pair.server.mac("eth0").unwrap());
    for (inner, vip) in [vip4, vip6].into_iter().enumerate() {
        let echo = UdpEcho::start(&pair.server, (vip, 7).into()).unwrap();
        for outer in [0, 1] {
            let victim = pair.client_addr.both()[inner];
            let asked = Frame::udp((victim, 9).into(), (vip, 7).into()).payload(b"answer him");
            let own = pair.server_addr.both()[outer];
            let tunnel = |from: &str| {
                let protocol = if inner == 0 { 4 } else { 41 };
                Frame::ip(ip(from), own, protocol).payload(&asked.packet()).macs(macs.0, macs.1).build()
            };
            let before = (echo.datagrams(), decap.stats().unwrap().reason(Reason::TunnelSource).packets);
            wire.send(&tunnel(if outer == 0 { "10.201.3.4" } else { "2001:db8:201::9" })).unwrap();
            wait_for(|| decap.stats().unwrap().reason(Reason::TunnelSource).packets == before.1 + 1);
            wire.send(&tunnel(OUTER[outer][0])).unwrap();
            wait_for(|| echo.datagrams() > before.0);
            assert_eq!(echo.datagrams(), before.0 + 1, "{vip} in {own}: the balancer's own");
        }
    }
}

fn strict_sources(config: TunnelDecapConfig) -> TunnelDecapConfig {
    ["10.200.0.0/16", "2001:db8:200::/64"]
        .into_iter()
        .fold(config, |config, net| config.source(net.parse::<IpNet>().unwrap()))
}
