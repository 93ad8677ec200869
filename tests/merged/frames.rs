//! Frames that the stack merged, as generic mode sees them (trap N6): longer than any wire carries, with an IP length of 0
//! ("BIG TCP"). Packet by packet, through every function; with real sockets in `traffic.rs`.

use std::net::IpAddr;

use crate::common::{
    bytes::too_big,
    dsr::{self, Host, arriving, inner_at, neighbour4, neighbour6, neighbours, one_hop_further, service_text},
    judge,
    nat::{Bench, Side, at},
    nat_talk::{conversations, open, segment},
    rate::just,
};
use xdpkit::{
    Action, DsrService, Engine, Firewall, FirewallConfig, Interface, Limit, MonitorConfig, NatConfig, NatMode,
    PacketMonitor, Rate, RateLimiter, RateLimiterConfig, Reason, Rule, Scope, ServiceProtocol, Stage as _, TableFull,
    TestRun, Transport, TunnelDecap, TunnelDecapConfig,
};
use xdpkit_lab::{
    Namespace,
    frame::{Frame, extension, tcp},
    veth,
};

/// The longest packet that a length field tells.
const LONGEST: usize = 65_535;

/// A packet of this length, Ethernet header not included, that says 0 of it; `header`: all bytes before the payload.
fn merged(frame: Frame, header: usize, length: usize) -> Frame {
    frame.payload(&vec![7; length - header]).ip_length(0)
}

/// The jumbo option (RFC 2675, section 2) before the rest.
fn with_jumbo_option(frame: Frame, length: usize) -> Frame {
    let length = (length - 40) as u32;
    frame.extension(extension::HOP_BY_HOP, &[&[0xc2, 4][..], &length.to_be_bytes()].concat())
}

fn tcp4() -> Frame {
    Frame::tcp(at("10.9.9.9:4000"), at("10.0.0.1:80")).flags(tcp::ACK)
}

fn tcp6() -> Frame {
    Frame::tcp(at("[2001:db8:bad::9]:4000"), at("[2001:db8::1]:80")).flags(tcp::ACK)
}

fn udp4() -> Frame {
    Frame::udp(at("10.9.9.9:4000"), at("10.0.0.1:80"))
}

#[test]
fn n6_a_frame_longer_than_any_wire_carries_is_judged_by_its_length_and_others_of_length_0_are_malformed() {
    use Reason::{
        Denied, Ipv4TotalLength, Ipv6ExtensionTruncated, Ipv6PayloadLength, TcpDataOffset, TcpTruncated, UdpLength,
    };
    let jumbo = |length| with_jumbo_option(merged(tcp6(), 68, length), length);
    let rows = [
        ("IPv4", merged(tcp4(), 40, LONGEST + 1), Denied),
        ("IPv4, 70 kB", merged(tcp4(), 40, 70_000), Denied),
        ("IPv4, one tag", merged(tcp4(), 40, LONGEST + 1).vlan(5), Denied),
        ("IPv4, two tags", merged(tcp4(), 40, LONGEST + 1).tag(0x88a8, 7).vlan(5), Denied),
        ("IPv4, options", merged(tcp4().options(&[1; 8]), 48, LONGEST + 1), Denied),
        ("IPv4, UDP", merged(udp4(), 28, LONGEST + 21).udp_length(0), Denied),
        ("IPv4, no transport", merged(Frame::ip(ip("10.9.9.9"), ip("10.0.0.1"), 50), 20, LONGEST + 1), Denied),
        ("IPv6", merged(tcp6(), 60, 40 + LONGEST + 1), Denied),
        ("IPv6, one tag", merged(tcp6(), 60, 40 + LONGEST + 1).vlan(5), Denied),
        ("IPv6, jumbo option", jumbo(40 + LONGEST + 1), Denied),
        // A wire may carry these: the length is a lie.
        ("IPv4, as long as can be", merged(tcp4(), 40, LONGEST), Ipv4TotalLength),
        ("IPv4, as long as can be, two tags", merged(tcp4(), 40, LONGEST).vlan(1).vlan(2), Ipv4TotalLength),
        ("IPv4, a jumbo frame", merged(tcp4(), 40, 9000), Ipv4TotalLength),
        ("IPv4, short", merged(tcp4(), 40, 60), Ipv4TotalLength),
        ("IPv6, as long as can be", merged(tcp6(), 60, 40 + LONGEST), TcpTruncated),
        ("IPv6, short", merged(tcp6(), 60, 80), TcpTruncated),
        ("IPv6, as long as can be, jumbo option", jumbo(40 + LONGEST), Ipv6ExtensionTruncated),
        ("IPv6, short, jumbo option", jumbo(120), Ipv6ExtensionTruncated),
        // A length other than 0 counts, however long the frame is.
        ("IPv4, a length below the header's", merged(tcp4(), 40, 70_000).ip_length(19), Ipv4TotalLength),
        ("IPv4, a length of its own", merged(tcp4(), 40, 70_000).ip_length(40), Denied),
        ("IPv4, the TCP header is cut by it", merged(tcp4(), 40, 70_000).ip_length(39), TcpTruncated),
        ("IPv6, the TCP header is cut by it", merged(tcp6(), 60, 70_000).ip_length(19), TcpTruncated),
        ("IPv6, a length beyond the frame", merged(tcp6(), 60, 9000).ip_length(9000), Ipv6PayloadLength),
        // What is inside is checked as ever.
        ("TCP's data offset", merged(tcp4(), 40, 70_000).data_offset(4), TcpDataOffset),
        ("a UDP length of 0, but it could be told", merged(udp4(), 28, LONGEST + 20).udp_length(0), UdpLength),
        ("a UDP length of 7", merged(udp4(), 28, 70_000).udp_length(7), UdpLength),
    ];
    for engine in [Engine::Trie, Engine::Compiled] {
        let firewall = Firewall::load(&FirewallConfig::default().engine(engine)).unwrap();
        for (what, frame, reason) in &rows {
            // Without a rule, what is not malformed passes.
            let wanted =
                if *reason == Denied { (Action::Pass, Reason::DefaultAction) } else { (Action::Drop, *reason) };
            assert_eq!(judge(&firewall, &frame.build()), wanted, "{engine:?}: {what}");
        }
        firewall.insert("10.9.0.0/16 tcp/80".parse().unwrap(), Rule::deny()).unwrap();
        firewall.insert("10.9.0.0/16 udp/80".parse().unwrap(), Rule::deny()).unwrap();
        firewall.insert("10.9.0.0/16 50".parse().unwrap(), Rule::deny()).unwrap();
        firewall.insert("2001:db8:bad::/48 tcp/80".parse().unwrap(), Rule::deny()).unwrap();
        for (what, frame, reason) in &rows {
            assert_eq!(judge(&firewall, &frame.build()), (Action::Drop, *reason), "{engine:?}: {what}");
        }
    }
}

#[test]
fn n6_the_monitor_reads_and_counts_merged_frames() {
    let monitor = PacketMonitor::load(&MonitorConfig::default().sample(1)).unwrap();
    let mut events = monitor.events().unwrap();
    let length = 72_000;
    for frame in
        [merged(tcp4(), 40, length), merged(tcp6(), 60, length), with_jumbo_option(merged(tcp6(), 68, length), length)]
    {
        let frame = frame.build();
        assert_eq!(judge(&monitor, &frame), (Action::Pass, Reason::None));
        let event = events.try_next().expect("one event a packet");
        let wanted = Transport::Tcp { source: 4000, destination: 80, flags: tcp::ACK };
        assert_eq!((event.transport, event.bytes as usize), (Some(wanted), length + 14));
    }
    let protocols = monitor.protocols().unwrap();
    assert_eq!((protocols.ipv4.packets, protocols.ipv6.packets, protocols.tcp.packets), (1, 2, 3));
    // Sent back, it stays what it is.
    monitor.set_action(xdpkit::Protocol::Tcp, Some(Action::Tx)).unwrap();
    let verdict = monitor.test_run(&merged(tcp4(), 40, length).build()).unwrap();
    let back = Frame::tcp(at("10.0.0.1:80"), at("10.9.9.9:4000")).flags(tcp::ACK);
    let back = back.macs(xdpkit_lab::frame::DST_MAC, xdpkit_lab::frame::SRC_MAC);
    assert_eq!((verdict.action, verdict.frame), (Action::Tx, merged(back, 40, length).build()));
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn n6_merged_tunnel_packets_come_out_whole() {
    let config = ["192.0.2.1", "2001:db8::1"].iter().fold(TunnelDecapConfig::default(), |c, vip| c.vip(ip(vip)));
    let decap = TunnelDecap::load(&config.any_source()).unwrap();
    let length = 70_000;
    for (outer, header) in [(["10.200.3.4", "172.16.0.11"], 20), (["2001:db8:200::9", "2001:db8:d::11"], 40)] {
        let tunnel = |protocol, packet: &Frame| {
            Frame::ip(ip(outer[0]), ip(outer[1]), protocol).payload(&packet.packet()).ip_length(0).build()
        };
        let inside = Frame::tcp(at("198.51.100.7:4000"), at("192.0.2.1:80")).flags(tcp::ACK);
        let (inside4, lying) =
            (merged(inside.clone(), 40, length - header), inside.payload(&vec![7; 70_000]).ip_length(19));
        let inside6 = Frame::tcp(at("[2001:db8:c::7]:4000"), at("[2001:db8::1]:80")).flags(tcp::ACK);
        let inside6 = merged(inside6, 60, length - header);
        for (protocol, packet) in [(4, &inside4), (41, &inside6)] {
            let frame = tunnel(protocol, packet);
            assert_eq!(judge(&decap, &frame), (Action::Pass, Reason::Decapsulated), "{header}, {protocol}");
            assert_eq!(decap.test_run(&frame).unwrap().frame, packet.build(), "{header}, {protocol}");
        }
        assert_eq!(judge(&decap, &tunnel(4, &lying)), (Action::Drop, Reason::InnerMalformed), "{header}");
        // In a packet that a wire may carry, 0 is a lie.
        let short = Frame::ip(ip(outer[0]), ip(outer[1]), 4).payload(&merged(lying.clone(), 40, 100).packet()).build();
        assert_eq!(judge(&decap, &short), (Action::Drop, Reason::InnerMalformed), "{header}");
    }
}

/// No way on takes such a packet: it is too big, as any that is longer than the way's MTU. But no message tells its sender,
/// whose packets were shorter; and it would be sent with all that the stack has noted of what it has merged.
#[test]
fn n6_balancers_do_not_forward_merged_frames() {
    let length = 66_000;
    for mode in [NatMode::Full, NatMode::Destination] {
        let bench = Bench::with_services(&NatConfig::default(), mode);
        for (name, client, vip, backend) in conversations() {
            let source = open(&bench, &name, client).source;
            let long = |from, to| {
                let header = if client.is_ipv4() { 20 } else { 40 };
                match name.protocol {
                    ServiceProtocol::Tcp => {
                        merged(segment(&name, from, to).flags(tcp::ACK).sequence(2, 1001), header + 20, length)
                    }
                    _ => merged(segment(&name, from, to), header + 8, length).udp_length(0),
                }
            };
            let went = bench.client_sends(&long(client, vip).dont_fragment());
            assert_eq!((went.action, went.reason), (Action::Drop, Reason::TooBig), "{name}");
            let came = bench.backend_sends(&long(backend, source).dont_fragment());
            assert_eq!((came.action, came.reason), (Action::Drop, Reason::TooBig), "{name}");
            if client.is_ipv4() {
                // The host's stack may cut it.
                let went = bench.client_sends(&long(client, vip));
                assert_eq!((went.action, went.reason), (Action::Pass, Reason::TooBig), "{name}");
            }
            let elsewhere = if client.is_ipv4() { at("10.0.0.2:22") } else { at("[2001:db8:a::2]:22") };
            let passed = bench.client_sends(&long(client, elsewhere));
            assert_eq!((passed.action, passed.reason), (Action::Pass, Reason::NotForVip), "{name}");
        }
    }
    let host = Host::new();
    let b = host.balancer(&dsr::config());
    for (family6, ipip) in [(false, false), (true, false), (false, true), (true, true)] {
        let mode = if ipip { DsrService::ipip() } else { DsrService::l2() };
        let service = b.service(&service_text("tcp", family6, "80"), mode, &neighbours(family6, &[11]));
        let of = |length| {
            let header = if family6 { 60 } else { 40 };
            arriving(&host, merged(dsr::segment(family6, 7, 7000).flags(tcp::ACK), header, length))
        };
        for frame in [of(length), of(length).dont_fragment()] {
            let (action, reason, _) = b.run(&frame.build());
            assert_eq!((action, reason), (Action::Drop, Reason::TooBig), "{family6} {ipip}");
        }
        host.ns.run(|| b.balancer.remove_service(service)).unwrap();
    }
}

/// What the wire carries is answered, as long as it may be. The message keeps the packet's other buffers, as padding.
#[test]
fn n6_jumbo_frames_that_do_not_fit_the_way_on_are_answered() {
    let bench = Bench::with_services(&NatConfig::default(), NatMode::Full);
    bench.lab.balancer.set_mtu("eth0", 9000).unwrap();
    let (from, to) = bench.macs_of_clients();
    for (name, client, vip, _) in conversations().filter(|(name, ..)| name.protocol == ServiceProtocol::Tcp) {
        open(&bench, &name, client);
        for (payload, buffers) in [(3000, 1), (8000, 2)] {
            let frame = segment(&name, client, vip).flags(tcp::ACK).sequence(2, 1001).dont_fragment();
            let frame = frame.payload(&vec![7; payload]).macs(from, to).build();
            let outcome = bench.run(Side::Clients, &frame);
            assert_eq!((outcome.action, outcome.reason), (Action::Tx, Reason::TooBigAnswered), "{name} {payload}");
            let wanted = too_big(&frame, 1500);
            assert_eq!(outcome.frame[..wanted.len()], wanted, "{name} {payload}");
            assert_eq!(outcome.frame.len() > wanted.len(), buffers > 1, "{name} {payload}");
        }
    }
}

/// The host's stack is asked to find out a neighbour, but never with an outer header that cannot tell the length.
#[test]
fn n6_no_outer_header_lies_about_the_length_where_the_neighbour_is_unknown() {
    let host = Host::new();
    let b = host.balancer(&dsr::config());
    for (family6, unknown, overhead) in [
        (false, neighbour4(200), 20),
        (true, neighbour6(200), 40),
        (false, neighbour6(200), 40),
        (true, neighbour4(200), 20),
    ] {
        let of = |length: usize| {
            let header = if family6 { 60 } else { 40 };
            let frame = dsr::segment(family6, 7, 7000).flags(tcp::ACK).payload(&vec![7; length - header]);
            arriving(&host, if length > LONGEST { frame.ip_length(0) } else { frame }).build()
        };
        let service = b.service(&service_text("tcp", family6, "80"), DsrService::ipip(), &[unknown]);
        let fits = of(LONGEST - overhead);
        let (action, reason, out) = b.run(&fits);
        assert_eq!((action, reason), (Action::Pass, Reason::Unresolved), "{unknown}");
        assert_eq!(out[inner_at(&out)..], one_hop_further(&fits, [0; 6], [0; 6])[14..]);
        for length in [LONGEST - overhead + 1, 70_000] {
            let (action, reason, _) = b.run(&of(length));
            assert_eq!((action, reason), (Action::Drop, Reason::TooBig), "{unknown}, {length}");
        }
        host.ns.run(|| b.balancer.remove_service(service)).unwrap();
        // No request to a neighbour is made of it, with all that the stack has noted of what it has merged.
        let service = b.service(&service_text("tcp", family6, "80"), DsrService::l2(), &neighbours(family6, &[200]));
        for (length, action) in [(70_000, Action::Drop), (1501, Action::Drop), (1500, Action::Pass)] {
            let (went, reason, _) = b.run(&of(length));
            assert_eq!((went, reason), (action, Reason::Unresolved), "{unknown}, {length}");
        }
        host.ns.run(|| b.balancer.remove_service(service)).unwrap();
    }
}

#[test]
fn n6_no_reset_answers_a_merged_frame() {
    let bench = Bench::with_services(&NatConfig::default().reset_unknown(true), NatMode::Full);
    for name in ["10.0.0.100:80", "[2001:db8:a::100]:80"] {
        let client = if name.starts_with('[') { "[2001:db8:a::30]:4000" } else { "10.0.0.30:4000" };
        let frame = Frame::tcp(at(client), at(name)).flags(tcp::ACK);
        let short = bench.client_sends(&frame);
        assert_eq!((short.action, short.reason), (Action::Tx, Reason::ResetSent), "{name}");
        let frame = if name.starts_with('[') { with_jumbo_option(frame, 70_000) } else { frame };
        let long = bench.client_sends(&frame.payload(&vec![7; 69_900]).ip_length(0));
        assert_eq!((long.action, long.reason), (Action::Drop, Reason::NoConnection), "{name}");
        let two = bench.client_sends(&Frame::tcp(at(client), at(name)).flags(tcp::ACK).payload(&[7; 2000]));
        assert_eq!((two.action, two.reason), (Action::Drop, Reason::NoConnection), "{name}");
    }
}

/// An interface whose MTU decides what a frame is charged for.
struct Link {
    ns: Namespace,
    eth0: Interface,
}

impl Link {
    fn of_mtu(mtu: u32) -> Self {
        let ns = Namespace::new("limiter").unwrap();
        veth((&ns, "eth0"), (&ns, "eth1")).unwrap();
        ns.set_mtu("eth0", mtu).unwrap();
        let eth0 = ns.run(|| Interface::by_name("eth0").unwrap());
        Self { ns, eth0 }
    }

    fn run(&self, limiter: &RateLimiter, frame: &Frame) -> Action {
        let frame = frame.build();
        self.ns.run(|| limiter.run(&TestRun::new(&frame).ingress(&self.eth0, 0)).unwrap().action)
    }
}

/// Charged by what came over the wire at least: as many packets of the interface's MTU as carry the same.
#[test]
fn n6_packet_limits_charge_merged_frames_by_segments() {
    let [ordinary, jumbo, narrow] = [1500, 9000, 1280].map(Link::of_mtu);
    let udp = |length: usize| udp4().payload(&vec![7; length - 28]);
    let of4 = |length: usize| tcp4().payload(&vec![7; length - 40]);
    let of6 = |length: usize| tcp6().payload(&vec![7; length - 60]);
    let burst = 50;
    let with_timestamps = |length: usize| tcp4().tcp_options(&[1; 12]).payload(&vec![7; length - 52]);
    let rows = [
        ("a full packet", &ordinary, of4(1500), 1),
        ("a byte more", &ordinary, of4(1501), 2),
        ("padding is no packet", &ordinary, of4(1500).trailer(&[0; 1500]), 1),
        ("tags are no packet", &ordinary, of4(1500).vlan(1).vlan(2), 1),
        ("two full ones", &ordinary, of4(40 + 2 * 1460), 2),
        ("two full ones with timestamps", &ordinary, with_timestamps(52 + 2 * 1448), 2),
        ("two full ones with timestamps, and a byte", &ordinary, with_timestamps(52 + 2 * 1448 + 1), 3),
        ("two full ones by IPv6", &ordinary, of6(60 + 2 * 1440), 2),
        ("two full ones by IPv6, and a byte", &ordinary, of6(60 + 2 * 1440 + 1), 3),
        ("UDP", &ordinary, udp(28 + 10 * 1472), 10),
        ("another protocol", &ordinary, Frame::ip(ip("10.9.9.9"), ip("10.0.0.1"), 50).payload(&[0; 3 * 1480]), 3),
        ("64 kB", &ordinary, of4(LONGEST), 45),
        ("BIG TCP", &ordinary, merged(tcp4(), 40, 70_000), 48),
        ("BIG TCP by IPv6", &ordinary, merged(tcp6(), 60, 70_000), 49),
        ("a jumbo frame of the MTU", &jumbo, of4(9000), 1),
        ("jumbo frames, merged", &jumbo, of4(40 + 3 * 8960), 3),
        ("what is no more than ordinary Ethernet's MTU is one packet", &narrow, of4(1500), 1),
        ("more than that", &narrow, of4(1501), 2),
    ];
    let alone = Limit::packets(just(burst));
    for (how, limit) in [("alone", alone), ("and bytes", alone.and_bytes(Rate::per_second(1_000_000)))] {
        let limiter = RateLimiter::load(&RateLimiterConfig::default().limit(Scope::All, limit)).unwrap();
        for (what, link, frame, packets) in &rows {
            let before = limiter.stats().unwrap();
            assert_eq!(link.run(&limiter, frame), Action::Pass, "{what}, {how}");
            // What is left of the burst.
            let (one, source) = if what.contains("IPv6") { (tcp6(), "2001:db8:bad::9") } else { (tcp4(), "10.9.9.9") };
            let left = (0..=burst).take_while(|_| link.run(&limiter, &one) == Action::Pass).count() as u64;
            assert_eq!(burst - left, *packets, "{what}, {how}");
            // Counted as what it is, a frame.
            let counted = limiter.stats().unwrap().since(&before);
            assert_eq!(counted.reason(Reason::WithinLimit).packets, 1 + left, "{what}, {how}");
            assert!(limiter.reset(ip(source)).unwrap(), "{what}, {how}");
        }
    }
}

#[test]
fn n6_a_merged_frame_of_more_segments_than_the_burst_does_not_pass() {
    let link = Link::of_mtu(1500);
    let (long, short) = (tcp4().payload(&[7; 2 * 1460]), tcp4());
    let limiter = RateLimiter::load(&RateLimiterConfig::default().limit(Scope::All, just(1))).unwrap();
    assert_eq!([&long, &long, &short, &short].map(|frame| link.run(&limiter, frame)), {
        [Action::Drop, Action::Drop, Action::Pass, Action::Drop]
    });
    // The slowest limit, and as many segments as can be counted: no overflow lets it pass.
    let slowest = Rate::new(1, std::time::Duration::from_secs(24 * 3600)).burst(1);
    let limiter = RateLimiter::load(&RateLimiterConfig::default().limit(Scope::All, slowest)).unwrap();
    link.ns.set_mtu("eth0", 68).unwrap();
    assert_eq!(link.run(&limiter, &merged(tcp4(), 40, 70_000)), Action::Drop);
    link.ns.set_mtu("eth0", 1500).unwrap();
    // Sources without a place share an allowance, charged in the same way.
    let config = RateLimiterConfig::default().sources(1).full(TableFull::Share(just(3)));
    let limiter = RateLimiter::load(&config.limit(Scope::All, just(1000))).unwrap();
    let udp = |n: u32| Frame::udp((IpAddr::from(n.to_be_bytes()), 1).into(), at("10.0.0.1:2"));
    let unknown = (0x0a00_0000..0x0a01_0000).find(|n| {
        let before = limiter.stats().unwrap();
        link.run(&limiter, &udp(*n));
        limiter.stats().unwrap().since(&before).reason(Reason::UnknownSource).packets > 0
    });
    let n = unknown.expect("the table is full at last");
    let three = udp(n).payload(&[7; 3 * 1472]);
    assert_eq!(link.run(&limiter, &three), Action::Drop, "one of three is used up");
    let two = udp(n).payload(&[7; 2 * 1472]);
    assert_eq!([&two, &udp(n)].map(|frame| link.run(&limiter, frame)), [Action::Pass, Action::Drop]);
}
