//! The DSR balancer under real connections: both tutorials' networks, both families, every mix of them.

use std::{net::SocketAddr, time::Duration};

use crate::common::{
    dsr_net::{Net, Way},
    times,
};
use xdpkit::{
    Action, AttachOptions, DsrBalancer, DsrConfig, DsrService, Interface, Reason, ServiceAddr, Stage as _, preflight,
};
use xdpkit_lab::{
    Namespace,
    packet::PacketSocket,
    topology::DsrIpip,
    traffic::{TcpEcho, UdpEcho, ping, tcp_echo, udp_echo},
};

const WAYS: [Way; 4] = [Way::L2, Way::IpIp(1500), Way::IpIp(1540), Way::Crossed(1540)];

fn config() -> DsrConfig {
    DsrConfig::default().services(4).flows(1 << 14)
}

#[test]
fn pages_come_from_all_backends_by_their_weights_and_past_the_balancer() {
    for way in WAYS {
        let net = Net::new(way, 3, &config());
        net.introduce();
        for family6 in [false, true] {
            let service = net.serve(80, family6, &[(0, 1), (1, 2), (2, 1)]);
            let _pages = net.pages(family6);
            let count = times(60, 10_000, 12);
            let mut got = [0_usize; 3];
            for _ in 0..count {
                let (number, peer) = net.fetch(family6);
                assert_eq!(peer, net.client_ip(family6), "the backend sees the client's address");
                got[number] += 1;
            }
            let slots: Vec<_> = net.balancer.backends(service).unwrap().iter().map(|entry| entry.slots).collect();
            for (number, share) in [0.25, 0.5, 0.25].into_iter().enumerate() {
                let of_slots = f64::from(slots[number]) / 65_537.0;
                assert!((of_slots / share - 1.0).abs() < 0.01, "slots {slots:?}");
                let of_connections = got[number] as f64 / count as f64;
                // Of a few connections, chance decides more: four to five standard deviations.
                let off = [0.35, 0.02, 0.6][times(0, 1, 2)];
                assert!((of_connections - share).abs() < off, "{way:?}: {got:?} of {count}");
            }
            let entry = net.balancer.service(service).unwrap();
            assert!(entry.stats.received.packets >= 4 * count as u64, "what comes from the client crosses it");
            assert!(entry.stats.new_flows >= count as u64);
            assert_eq!((entry.recorded, entry.slots_in_transition), (0, 0), "and nothing is remembered");
            let of_backends: u64 =
                net.balancer.backends(service).unwrap().iter().map(|b| b.stats.forwarded.packets).sum();
            assert!(of_backends <= entry.stats.received.packets);
        }
        let stats = net.balancer.stats().unwrap();
        let forwarded = stats.reason(Reason::Forwarded).packets;
        assert_eq!(stats.action(Action::Tx).packets, forwarded, "{way:?} {stats:?}");
        // Answers would be for none of its addresses. ARP and such is all that there is besides.
        assert!(stats.reason(Reason::NotForVip).packets < forwarded / 4 + 60, "{way:?} {stats:?}");
        let decapsulated: u64 =
            net.decaps.iter().map(|decap| decap.stats().unwrap().reason(Reason::Decapsulated).packets).sum();
        let unresolved = stats.reason(Reason::Unresolved).packets;
        if way != Way::L2 {
            assert!(decapsulated > 0 && decapsulated <= forwarded + unresolved, "{decapsulated} of {forwarded}");
        }
    }
}

#[test]
fn a_long_transfer_arrives_as_it_was_sent() {
    for way in WAYS {
        let net = Net::new(way, 2, &config());
        for family6 in [false, true] {
            net.serve(80, family6, &[(0, 1), (1, 1)]);
            let address = SocketAddr::new(Net::vip(family6), 80);
            let _echoes: Vec<_> = net.backends.iter().map(|ns| TcpEcho::start(ns, address).unwrap()).collect();
            let size = times(2_000_000, 100_000_000, 100_000);
            let mut word = 1_u64;
            let payload: Vec<u8> = (0..size)
                .map(|_| {
                    word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (word >> 56) as u8
                })
                .collect();
            let back = tcp_echo(&net.client, address, &payload, Duration::from_secs(120)).unwrap();
            assert!(back == payload, "{way:?}: {} bytes came back of {}", back.len(), payload.len());
        }
        let stats = net.balancer.stats().unwrap();
        if way == Way::IpIp(1500) {
            assert!(stats.reason(Reason::TooBigAnswered).packets >= 2, "full segments do not fit: {stats:?}");
        } else {
            assert_eq!(stats.reason(Reason::TooBigAnswered).packets, 0, "{way:?} {stats:?}");
        }
    }
}

#[test]
fn the_virtual_address_answers_pings() {
    let net = Net::new(Way::L2, 1, &config());
    for family6 in [false, true] {
        net.serve(80, family6, &[(0, 1)]);
        let report =
            ping(&net.client, Net::vip(family6), 3, Duration::from_millis(5), Duration::from_secs(60)).unwrap();
        assert_eq!(report.received, 3);
    }
    assert_eq!(net.balancer.stats().unwrap().reason(Reason::EchoAnswered).packets, 6);
}

#[test]
fn a_neighbour_is_resolved_and_a_new_mac_followed_within_a_second() {
    let net = Net::new(Way::L2, 1, &config());
    for family6 in [false, true] {
        net.serve(80, family6, &[(0, 1)]);
        let _pages = net.pages(family6);
        // By the first packet, or before it.
        net.fetch(family6);
        let new = [2, 0, 0, 0, 0xc, u8::from(family6)];
        net.backends[0].set_mac("eth0", new).unwrap();
        // As the host would hear it by ARP or neighbour discovery.
        net.balancer_ns.add_neighbour("eth0", net.backend(0, family6), new).unwrap();
        std::thread::sleep(Duration::from_millis(1000));
        // To its old MAC, the backend would listen no more.
        net.fetch(family6);
    }
}

#[test]
fn l24_the_preflight_check_finds_what_a_backend_lacks() {
    let net = Net::new(Way::L2, 1, &config());
    let vips = [Net::vip(false), Net::vip(true)];
    let backend = &net.backends[0];
    let findings = |ns: &xdpkit_lab::Namespace| {
        ns.run(|| preflight::dsr_backend(&Interface::by_name("eth0").unwrap(), &vips)).unwrap()
    };
    assert_eq!(findings(backend), [], "the topology is right");
    let texts = |ns| findings(ns).iter().map(ToString::to_string).collect::<Vec<_>>();
    for (key, value, expected) in [
        ("net.ipv4.conf.all.arp_ignore", "0", "blocker: eth0: arp_ignore is 0"),
        ("net.ipv4.conf.all.arp_announce", "0", "warning: eth0: arp_announce is below 2"),
        ("net.ipv4.conf.all.rp_filter", "1", "warning: eth0: rp_filter is 1"),
    ] {
        let before = backend.run(|| std::fs::read_to_string(format!("/proc/sys/{}", key.replace('.', "/")))).unwrap();
        backend.sysctl(key, value).unwrap();
        let found = texts(backend);
        assert!(found.len() == 1 && found[0].starts_with(expected), "{found:?}");
        backend.sysctl(key, before.trim()).unwrap();
    }
    // The client holds no virtual address.
    let found = texts(&net.client);
    let missing = found.iter().filter(|text| text.contains("is none of its addresses")).count();
    assert_eq!(missing, 2, "{found:?}");
}

/// The kernel's own end of a tunnel, by `ip link add`, where this kernel has such devices.
fn kernel_tunnel(ns: &Namespace, kind: &[&str], local: &str) -> bool {
    let mut arguments = vec!["link", "add", "name", "tunnel", "type"];
    arguments.extend(kind);
    arguments.extend(["local", local]);
    let added = ns.command("ip").args(&arguments).output().expect("iproute2 is installed");
    if !added.status.success() {
        let text = String::from_utf8_lossy(&added.stderr).into_owned();
        assert!(!crate::common::is_emulated(), "those kernels have tunnel devices: {text}");
        println!("this kernel has no {} device ({}): see `./x vm`", kind[0], text.trim());
        return false;
    }
    ns.sysctl("net.ipv4.conf.tunnel.rp_filter", "0").unwrap();
    ns.set_up("tunnel").unwrap();
    true
}

#[test]
fn a_kernels_own_tunnel_device_is_a_backend() {
    let (vip4, vip6) = (crate::common::dsr_net::VIP4.into(), crate::common::dsr_net::VIP6.into());
    for (kind, family6, outer6) in [
        (&["ipip"][..], false, false),
        (&["sit"], true, false),
        (&["ip6tnl", "mode", "ip6ip6", "remote", "any"], true, true),
        (&["ip6tnl", "mode", "ipip6", "remote", "any"], false, true),
    ] {
        let topology = DsrIpip::with_mtu(1, vip4, vip6, 1540).unwrap();
        let local = topology.backend_addrs[0].both()[usize::from(outer6)];
        if !kernel_tunnel(&topology.backends[0], kind, &local.to_string()) {
            continue;
        }
        let balancer = DsrBalancer::load(&config()).unwrap();
        let vip = Net::vip(family6);
        let _attachment = topology.balancer.run(|| {
            let list = [(local, 1)];
            balancer.insert_service(ServiceAddr::tcp(vip, 80), DsrService::ipip(), list).unwrap();
            balancer.attach(&AttachOptions::new("eth0")).unwrap()
        });
        let address = SocketAddr::new(vip, 80);
        let echo = TcpEcho::start(&topology.backends[0], address).unwrap();
        let payload = vec![7; times(300_000, 3_000_000, 30_000)];
        let back = tcp_echo(&topology.client, address, &payload, Duration::from_secs(60))
            .unwrap_or_else(|error| panic!("{kind:?}: {error}; {:?}", balancer.stats()));
        assert!(back == payload, "{kind:?}");
        assert_eq!(echo.peers()[0].ip(), topology.client_addr.both()[usize::from(family6)]);
        assert!(balancer.stats().unwrap().reason(Reason::Forwarded).packets > 10);
    }
}

/// Packets that may be fragmented and do not fit the tunnel: the balancer's host makes fragments of the outer packets, and a
/// tunnel device, where this kernel has one, puts them together.
#[test]
fn l6_outer_packets_are_fragmented_where_a_service_says_that_its_backends_can_tell() {
    let topology =
        DsrIpip::with_mtu(1, crate::common::dsr_net::VIP4.into(), crate::common::dsr_net::VIP6.into(), 1500).unwrap();
    let (backend, local) = (&topology.backends[0], topology.backend_addrs[0].v4);
    let has_tunnel = kernel_tunnel(backend, &["ipip"], &local.to_string());
    let balancer = DsrBalancer::load(&config()).unwrap();
    let service = ServiceAddr::udp(Net::vip(false), 53);
    let _attachment = topology.balancer.run(|| {
        let kind = DsrService::ipip().outer_fragments(true);
        balancer.insert_service(service, kind, [(local.into(), 1)]).unwrap();
        balancer.attach(&AttachOptions::new("eth0")).unwrap()
    });
    let report = ping(&topology.balancer, local.into(), 1, Duration::ZERO, Duration::from_secs(60)).unwrap();
    assert_eq!(report.received, 1);
    // Its datagrams may be fragmented.
    topology.client.sysctl("net.ipv4.ip_no_pmtu_disc", "1").unwrap();
    let wire = PacketSocket::open(backend, "eth0").unwrap();
    let address = SocketAddr::new(Net::vip(false), 53);
    let payload: Vec<u8> = (0..1472_u32).map(|n| (n * 7) as u8).collect();
    if has_tunnel {
        let _echo = UdpEcho::start(backend, address).unwrap();
        assert!(udp_echo(&topology.client, address, &payload, Duration::from_secs(60)).unwrap() == payload);
    } else {
        topology.client.run(|| {
            let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.send_to(&payload, address).unwrap();
        });
    }
    let mut parts: Vec<Vec<u8>> = Vec::new();
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while parts.len() < 2 {
        let mut buffer = Vec::new();
        let is_outer = |frame: &[u8]| frame[12..14] == [8, 0] && frame[23] == 4;
        wire.drain(&mut buffer, |frame| parts.extend(is_outer(frame).then(|| frame.to_vec()))).unwrap();
        assert!(std::time::Instant::now() < deadline, "{parts:02x?}; {:?}", balancer.stats());
        std::thread::sleep(Duration::from_millis(10));
    }
    // More follow, then none do; of one source and identification.
    assert_eq!((parts[0][20] & 0xe0, parts[1][20] & 0xe0), (0x20, 0));
    assert_eq!((&parts[0][18..20], &parts[0][26..34]), (&parts[1][18..20], &parts[1][26..34]));
    let stats = balancer.stats().unwrap();
    assert_eq!((stats.reason(Reason::TooBig).packets, stats.action(Action::Drop).packets), (1, 0));
    assert_eq!(balancer.backends(service).unwrap()[0].stats.forwarded.packets, 1);
}
