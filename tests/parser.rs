//! The parsing traps P1 to P8, each by a frame and what must become of it, through the firewall with either engine, which
//! may let nothing slip by, and the monitor, which sees what was parsed.

mod common;

use common::judge;
use xdpkit::{
    Action, Engine, Firewall, FirewallConfig, Fragment, MonitorConfig, Network, PacketEvent, PacketMonitor, Reason,
    Rule, Stage as _, TestRun, Transport,
};
use xdpkit_lab::frame::{Frame, extension};

const BAD4: &str = "10.9.9.9:4000";
const BAD6: &str = "[2001:db8:bad::9]:4000";
const SERVER4: &str = "10.0.0.1:80";
const SERVER6: &str = "[2001:db8::1]:80";

/// With either engine.
fn load(config: &FirewallConfig) -> [Firewall; 2] {
    [Engine::Trie, Engine::Compiled].map(|engine| Firewall::load(&config.clone().engine(engine)).unwrap())
}

/// Deny the sources that are called bad here, and nothing else.
fn firewalls() -> [Firewall; 2] {
    let firewalls = load(&FirewallConfig::default());
    for firewall in &firewalls {
        firewall.insert("10.9.0.0/16".parse().unwrap(), Rule::deny()).unwrap();
        firewall.insert("2001:db8:bad::/48".parse().unwrap(), Rule::deny()).unwrap();
    }
    firewalls
}

fn udp4() -> Frame {
    Frame::udp(BAD4.parse().unwrap(), SERVER4.parse().unwrap()).payload(b"hello")
}

fn udp6() -> Frame {
    Frame::udp(BAD6.parse().unwrap(), SERVER6.parse().unwrap()).payload(b"hello")
}

fn tcp4() -> Frame {
    Frame::tcp(BAD4.parse().unwrap(), SERVER4.parse().unwrap())
}

fn tcp6() -> Frame {
    Frame::tcp(BAD6.parse().unwrap(), SERVER6.parse().unwrap())
}

fn icmp4() -> Frame {
    Frame::echo("10.9.9.9".parse().unwrap(), "10.0.0.1".parse().unwrap(), 1, 1)
}

fn icmp6() -> Frame {
    Frame::echo("2001:db8:bad::9".parse().unwrap(), "2001:db8::1".parse().unwrap(), 1, 1)
}

fn without_end(frame: &Frame, bytes: usize) -> Vec<u8> {
    let mut frame = frame.build();
    frame.truncate(frame.len() - bytes);
    frame
}

/// The frame as the monitor reports it.
fn seen(frame: &[u8]) -> PacketEvent {
    let monitor = PacketMonitor::load(&MonitorConfig::default().sample(1)).unwrap();
    let mut events = monitor.events().unwrap();
    assert_eq!(monitor.test_run(frame).unwrap().action, Action::Pass);
    events.try_next().expect("one event a packet")
}

/// Every row: what is sent, what becomes of it at the firewall, and why.
fn check(rows: &[(&str, Vec<u8>, Action, Reason)]) {
    for firewall in firewalls() {
        for (what, frame, action, reason) in rows {
            assert_eq!(judge(&firewall, frame), (*action, *reason), "{:?}: {what}", firewall.engine());
        }
    }
}

#[test]
fn p1_vlan_tags_do_not_bypass() {
    check(&[
        ("untagged", udp4().build(), Action::Drop, Reason::Denied),
        ("802.1Q", udp4().vlan(5).build(), Action::Drop, Reason::Denied),
        ("802.1Q, IPv6", udp6().vlan(5).build(), Action::Drop, Reason::Denied),
        ("802.1ad over 802.1Q", udp4().tag(0x88a8, 7).tag(0x8100, 5).build(), Action::Drop, Reason::Denied),
        ("old QinQ type", udp6().tag(0x9100, 7).tag(0x8100, 5).build(), Action::Drop, Reason::Denied),
        ("three tags", udp4().vlan(1).vlan(2).vlan(3).build(), Action::Drop, Reason::VlanTooDeep),
        ("cut in the tag", udp4().vlan(5).build()[..16].to_vec(), Action::Drop, Reason::VlanTruncated),
    ]);
    let event = seen(&udp4().tag(0x88a8, 0x6007).tag(0x8100, 5).build());
    assert_eq!(event.vlans.iter().map(|tag| (tag.id(), tag.priority())).collect::<Vec<_>>(), [(7, 3), (5, 0)]);
    assert_eq!(event.ether_type, 0x0800);
}

#[test]
fn p1_deeper_tags_take_the_bypass_policy() {
    for firewall in load(&FirewallConfig::default().unsupported(xdpkit::Decision::Allow)) {
        let frame = udp4().vlan(1).vlan(2).vlan(3).build();
        assert_eq!(judge(&firewall, &frame), (Action::Pass, Reason::VlanTooDeep));
    }
}

#[test]
fn p2_ipv4_options_and_lengths() {
    check(&[
        ("options", udp4().options(&[1; 8]).build(), Action::Drop, Reason::Denied),
        ("as many options as there can be", udp4().options(&[1; 40]).build(), Action::Drop, Reason::Denied),
        ("IHL 4", udp4().ihl(4).build(), Action::Drop, Reason::Ipv4HeaderLength),
        ("IHL 0", udp4().ihl(0).build(), Action::Drop, Reason::Ipv4HeaderLength),
        ("version 5", udp4().version(5).build(), Action::Drop, Reason::Ipv4Version),
        (
            "total length below the header",
            udp4().options(&[1; 8]).ip_length(20).build(),
            Action::Drop,
            Reason::Ipv4TotalLength,
        ),
        ("total length 0", udp4().ip_length(0).build(), Action::Drop, Reason::Ipv4TotalLength),
        ("total length beyond the frame", udp4().ip_length(34).build(), Action::Drop, Reason::Ipv4TotalLength),
        ("cut in the header", udp4().build()[..33].to_vec(), Action::Drop, Reason::Ipv4Truncated),
        ("cut in the options", udp4().options(&[1; 8]).build()[..40].to_vec(), Action::Drop, Reason::Ipv4TotalLength),
        ("IPv6: version 4", udp6().version(4).build(), Action::Drop, Reason::Ipv6Version),
        ("IPv6: cut in the header", udp6().build()[..53].to_vec(), Action::Drop, Reason::Ipv6Truncated),
        ("IPv6: payload beyond the frame", udp6().ip_length(14).build(), Action::Drop, Reason::Ipv6PayloadLength),
    ]);
    let event = seen(&udp4().options(&[1; 40]).build());
    assert_eq!(event.transport, Some(Transport::Udp { source: 4000, destination: 80 }), "ports behind the options");
}

#[test]
fn p3_padding_is_not_part_of_the_packet() {
    check(&[
        // Headers that would only fit with the padding's help are cut short.
        ("TCP cut", tcp4().ip_length(39).trailer(&[0; 20]).build(), Action::Drop, Reason::TcpTruncated),
        ("UDP cut", udp6().ip_length(7).trailer(&[0; 20]).build(), Action::Drop, Reason::UdpTruncated),
        // Ordinary padding changes nothing, and counts as bytes of the frame (`judge` checks that).
        ("padded", udp4().trailer(&[0; 13]).build(), Action::Drop, Reason::Denied),
    ]);
}

#[test]
fn p4_later_fragments_have_no_ports() {
    for frame in [udp4().fragment(1480, true).build(), udp6().fragment(1480, false).build()] {
        let event = seen(&frame);
        assert_eq!(event.transport, None, "whatever stands there is payload");
        assert!(matches!(event.network, Network::Ip { protocol: 17, fragment: Fragment::Later, .. }), "{event:?}");
    }
    for frame in [udp4().fragment(0, true).build(), udp6().fragment(0, true).build()] {
        let event = seen(&frame);
        assert_eq!(event.transport, Some(Transport::Udp { source: 4000, destination: 80 }));
        assert!(matches!(event.network, Network::Ip { fragment: Fragment::First, .. }), "{event:?}");
    }
    // RFC 6946: a fragment header without fragmentation.
    let atomic = seen(&udp6().fragment(0, false).build());
    assert!(matches!(atomic.network, Network::Ip { fragment: Fragment::No, .. }), "{atomic:?}");
    check(&[
        ("IPv4 later fragment", udp4().fragment(8, false).build(), Action::Drop, Reason::Denied),
        ("IPv6 later fragment", udp6().fragment(8, false).build(), Action::Drop, Reason::Denied),
        (
            "first fragment, UDP length of the whole",
            udp4().fragment(0, true).udp_length(3000).build(),
            Action::Drop,
            Reason::Denied,
        ),
    ]);
}

#[test]
fn p5_ipv6_extension_headers_are_walked_and_bounded() {
    let chain = |frame: Frame, n: usize| (0..n).fold(frame, |frame, _| frame.extension(extension::DESTINATION, &[]));
    let all = udp6()
        .extension(extension::HOP_BY_HOP, &[0; 14])
        .extension(extension::ROUTING, &[0; 22])
        .extension(extension::AUTHENTICATION, &[0; 22])
        .extension(extension::DESTINATION, &[]);
    check(&[
        ("one of each", all.build(), Action::Drop, Reason::Denied),
        ("eight", chain(udp6(), 8).build(), Action::Drop, Reason::Denied),
        ("nine", chain(udp6(), 9).build(), Action::Drop, Reason::Ipv6ExtensionChain),
        (
            "cut in an extension",
            without_end(&chain(udp6(), 1).ip_length(4), 17),
            Action::Drop,
            Reason::Ipv6ExtensionTruncated,
        ),
    ]);
    for frame in [all, chain(udp6(), 8), udp6().extension(extension::DESTINATION, &[0; 254 * 8])] {
        let event = seen(&frame.build());
        assert_eq!(event.transport, Some(Transport::Udp { source: 4000, destination: 80 }));
    }
    // The fragment header has a fixed size: its second byte is Reserved, not a length.
    let mut frame = udp6().fragment(0, true).build();
    frame[14 + 40 + 1] = 7;
    assert_eq!(seen(&frame).transport, Some(Transport::Udp { source: 4000, destination: 80 }));
}

#[test]
fn p6_transport_headers_that_lie_are_malformed() {
    check(&[
        ("TCP data offset 4", tcp4().data_offset(4).build(), Action::Drop, Reason::TcpDataOffset),
        ("TCP data offset past the end", tcp6().data_offset(6).build(), Action::Drop, Reason::TcpDataOffset),
        ("TCP cut", tcp4().ip_length(39).build(), Action::Drop, Reason::TcpTruncated),
        ("UDP length 7", udp4().udp_length(7).build(), Action::Drop, Reason::UdpLength),
        ("UDP length past the end", udp6().udp_length(14).build(), Action::Drop, Reason::UdpLength),
        ("UDP cut", udp4().ip_length(27).build(), Action::Drop, Reason::UdpTruncated),
        ("ICMP cut", icmp4().ip_length(27).build(), Action::Drop, Reason::IcmpTruncated),
        ("ICMPv6 cut", icmp6().ip_length(7).build(), Action::Drop, Reason::Icmpv6Truncated),
    ]);
}

#[test]
fn p7_arp_and_neighbour_discovery_survive_default_deny() {
    let (mac, us4, us6) = ([2, 0, 0, 0, 0, 1], "10.0.0.2".parse().unwrap(), "2001:db8::2".parse().unwrap());
    let arp = Frame::arp_request(mac, us4, "10.0.0.1".parse().unwrap()).build();
    let solicitation = Frame::neighbour_solicitation(mac, us6, "2001:db8::1".parse().unwrap());
    let deny = FirewallConfig::default().default_decision(xdpkit::Decision::Deny);
    for firewall in load(&deny) {
        // Even when a rule denies who asks.
        for prefix in ["10.0.0.0/8", "2001:db8::/32"] {
            assert_eq!(judge(&firewall, &arp), (Action::Pass, Reason::Arp));
            assert_eq!(judge(&firewall, &solicitation.build()), (Action::Pass, Reason::NeighbourDiscovery));
            firewall.insert(prefix.parse().unwrap(), Rule::deny()).unwrap();
        }
        assert_eq!(judge(&firewall, &solicitation.build()), (Action::Pass, Reason::NeighbourDiscovery));
        firewall.replace_all([]).unwrap();
        // A router has touched it: it does not come from the link (RFC 4861, section 6.1).
        assert_eq!(judge(&firewall, &solicitation.clone().ttl(254).build()), (Action::Drop, Reason::DefaultAction));
        assert_eq!(
            judge(&firewall, &icmp6().build()),
            (Action::Drop, Reason::DefaultAction),
            "an echo is no discovery"
        );
    }
    for strict in load(&deny.clone().pass_neighbours(false)) {
        assert_eq!(judge(&strict, &arp), (Action::Drop, Reason::Arp));
        assert_eq!(judge(&strict, &solicitation.build()), (Action::Drop, Reason::DefaultAction));
    }
}

#[test]
fn p8_frames_of_several_buffers_are_parsed_and_counted_whole() {
    firewalls().iter().for_each(count_whole);
}

fn count_whole(firewall: &Firewall) {
    for source in [udp4(), udp6()] {
        let frame = source.payload(&[7; 8000]).build();
        let before = firewall.stats().unwrap();
        let verdict = firewall.run(&TestRun::new(&frame).linear(200)).unwrap();
        assert_eq!(verdict.action, Action::Drop);
        let counted = firewall.stats().unwrap().since(&before);
        assert_eq!(counted.reason(Reason::Denied).bytes, frame.len() as u64, "not only the first buffer's");
    }
    // Headers behind the first buffer are out of reach, which is not the packet's fault.
    for linear in [14, 30, 38] {
        let before = firewall.stats().unwrap();
        firewall.run(&TestRun::new(&udp4().payload(&[7; 8000]).build()).linear(linear)).unwrap();
        let counted = firewall.stats().unwrap().since(&before);
        assert_eq!((counted.reason(Reason::HeadersSplit).packets, counted.dropped().packets), (1, 1), "{linear}");
    }
    let beyond = udp6().extension(extension::DESTINATION, &[0; 400]).payload(&[7; 4000]).build();
    let before = firewall.stats().unwrap();
    firewall.run(&TestRun::new(&beyond).linear(60)).unwrap();
    assert_eq!(firewall.stats().unwrap().since(&before).reason(Reason::HeadersSplit).packets, 1);
    // A short frame whose padding lies in a second buffer is counted whole.
    let padded = udp4().trailer(&[0; 20]).build();
    let before = firewall.stats().unwrap();
    firewall.run(&TestRun::new(&padded).linear(47)).unwrap();
    assert_eq!(firewall.stats().unwrap().since(&before).total().bytes, padded.len() as u64);
    // Not IP: there is no header to tell where the frame ends.
    let other = Frame::ethernet(0x88cc).payload(&[0; 6000]).build();
    let before = firewall.stats().unwrap();
    firewall.run(&TestRun::new(&other).linear(100)).unwrap();
    assert_eq!(firewall.stats().unwrap().since(&before).reason(Reason::NotIp).bytes, other.len() as u64);
}
