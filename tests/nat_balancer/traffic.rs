//! The NAT balancer between real hosts: every byte to the right peer, also where paths have several MTUs. Traps: L4, L6, L12.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use crate::common::nat::{PATIENCE, ROUTED_VIPS as VIPS, attach, backends, ip};
use xdpkit::{
    Action, AttachOptions, Interface, NatBalancer, NatConfig, NatMode, NatService, Reason, ServiceAddr, Stage as _,
    preflight::{self, Severity},
};
use xdpkit_lab::{
    Namespace,
    topology::Nat,
    traffic::{TcpEcho, UdpEcho, tcp_echo, udp_echo},
    veth,
};

fn bytes(count: usize) -> Vec<u8> {
    (0..count).map(|n| (n.wrapping_mul(0x9e37_79b9) >> 11) as u8).collect()
}

#[test]
fn tcp_and_udp_work_in_both_modes_and_families() {
    let lab = Nat::new(2, 2).unwrap();
    for mode in [NatMode::Full, NatMode::Destination] {
        let balancer = NatBalancer::load(&NatConfig::default()).unwrap();
        let _attached = attach(&lab, &balancer);
        for (ipv6, vip) in [(false, ip(VIPS[0])), (true, ip(VIPS[1]))] {
            let hosts = || lab.backends.iter().zip(backends(&lab, ipv6, 8080));
            let echoes: Vec<_> = hosts().map(|(ns, at)| TcpEcho::start(ns, at).unwrap()).collect();
            let datagrams: Vec<_> = hosts().map(|(ns, at)| UdpEcho::start(ns, at).unwrap()).collect();
            let with = NatService::new(backends(&lab, ipv6, 8080)).mode(mode);
            balancer.insert(ServiceAddr::tcp(vip, 80), &with).unwrap();
            balancer.insert(ServiceAddr::udp(vip, 53), &with).unwrap();
            let payload = bytes(crate::common::times(2_000_000, 100_000_000, 200_000));
            for (client, address) in lab.clients.iter().zip(&lab.client_addrs) {
                let back = tcp_echo(client, (vip, 80).into(), &payload, Duration::from_secs(120)).unwrap();
                assert!(back == payload, "{mode:?} {vip}: {} of {} bytes", back.len(), payload.len());
                for n in 0..5 {
                    let sent = format!("{n} from {address:?}");
                    let back = udp_echo(client, (vip, 53).into(), sent.as_bytes(), PATIENCE).unwrap();
                    assert_eq!(String::from_utf8_lossy(&back), sent);
                }
                // Datagrams in fragments, there and back.
                let long = bytes(4000);
                let back = udp_echo(client, (vip, 53).into(), &long, PATIENCE).unwrap();
                assert!(back == long, "{mode:?} {vip}: fragments");
            }
            let peers: Vec<SocketAddr> = echoes.iter().flat_map(TcpEcho::peers).collect();
            assert_eq!(peers.len(), 2);
            assert_eq!(datagrams.iter().flat_map(UdpEcho::peers).count(), 12);
            for peer in peers {
                let clients = lab.client_addrs.iter().flat_map(|host| host.both());
                assert!(
                    if mode == NatMode::Full { peer.ip() == vip } else { { clients }.any(|ip| ip == peer.ip()) },
                    "{peer}"
                );
            }
        }
        let stats = balancer.stats().unwrap();
        let through = [Reason::Forwarded, Reason::Answered].map(|reason| stats.reason(reason).packets);
        assert!(through.iter().all(|packets| *packets > 100), "it went through the balancer: {:?}", stats.reasons);
        let dropped: Vec<_> = stats.reasons.iter().filter(|line| line.action == Action::Drop).collect();
        assert!(dropped.is_empty(), "{dropped:?}");
    }
}

/// A link of the balancer's with a backend on it, beside the two that it has.
fn third_link(lab: &Nat) -> (Namespace, [IpAddr; 2]) {
    let far = Namespace::new("far").unwrap();
    veth((&lab.balancer, "eth2"), (&far, "eth0")).unwrap();
    for (host, dev, last) in [(&lab.balancer, "eth2", 1), (&far, "eth0", 2)] {
        host.add_address(dev, format!("192.168.180.{last}/24").parse().unwrap()).unwrap();
        host.add_address(dev, format!("2001:db8:c::{last}/64").parse().unwrap()).unwrap();
    }
    lab.balancer.enable_forwarding().unwrap();
    for gateway in ["192.168.180.1", "2001:db8:c::1"] {
        far.add_default_route(ip(gateway)).unwrap();
    }
    (far, [ip("192.168.180.2"), ip("2001:db8:c::2")])
}

#[test]
fn l12_backends_and_clients_on_three_links_reach_each_other() {
    let lab = Nat::new(1, 1).unwrap();
    let (far, far_addrs) = third_link(&lab);
    let target = || {
        let findings = lab.balancer.run(|| preflight::redirect_target(&Interface::by_name("eth2").unwrap())).unwrap();
        findings.iter().any(|finding| finding.severity == Severity::Blocker)
    };
    assert_eq!(target(), !crate::common::kernel_older_than_6_3(), "frames that are redirected there would be lost");
    let _guard = far.xdp_pass("eth0").unwrap();
    assert!(!target());
    for mode in [NatMode::Full, NatMode::Destination] {
        let balancer = NatBalancer::load(&NatConfig::default()).unwrap();
        let _attached = ["eth0", "eth1", "eth2"]
            .map(|name| lab.balancer.run(|| balancer.attach(&AttachOptions::new(name)).unwrap()));
        for (ipv6, vip) in [(false, ip(VIPS[0])), (true, ip(VIPS[1]))] {
            let near = backends(&lab, ipv6, 8080)[0];
            let beyond = SocketAddr::new(far_addrs[usize::from(ipv6)], 8080);
            let hosts = [(&lab.backends[0], near, &far), (&far, beyond, &lab.backends[0])];
            for (port, (host, backend, hairpin)) in [80, 81].into_iter().zip(hosts) {
                let echo = TcpEcho::start(host, backend).unwrap();
                let name = ServiceAddr::tcp(vip, port);
                balancer.insert(name, &NatService::new([backend]).mode(mode)).unwrap();
                let payload = bytes(crate::common::times(200_000, 5_000_000, 40_000));
                // From the clients' link, and from the other backend's.
                for client in [&lab.clients[0], hairpin] {
                    let back = tcp_echo(client, (vip, port).into(), &payload, Duration::from_secs(60));
                    let back = back.unwrap_or_else(|error| panic!("{mode:?} {name}: {error}"));
                    assert!(back == payload, "{mode:?} {name}");
                }
                assert_eq!(echo.connections(), 2);
            }
            // Who comes by the link that the backend is on goes back there; in Full mode, for else it would hear itself.
            if mode == NatMode::Full {
                let _echo = TcpEcho::start(&far, beyond).unwrap();
                let back = tcp_echo(&far, (vip, 81).into(), b"to myself", PATIENCE).unwrap();
                assert_eq!(back, b"to myself");
            }
        }
        let stats = balancer.stats().unwrap();
        let through = [Action::Redirect, Action::Tx].map(|action| stats.action(action).packets);
        assert!(through[0] > 200 && (through[1] > 0 || mode != NatMode::Full), "{mode:?} {:?}", stats.reasons);
        assert_eq!(stats.dropped().packets, 0, "{:?}", stats.reasons);
    }
}

/// client - near - far - balancer - first - last - backend: seven hosts in a row, every link of 1500 bytes but for one.
struct Chain {
    client: Namespace,
    balancer: Namespace,
    backend: Namespace,
    backend_addrs: [IpAddr; 2],
    _others: Vec<Namespace>,
    _guards: Vec<xdpkit_lab::XdpPass>,
}

impl Chain {
    /// `narrow`: the number of the link whose MTU is 1400, from the client's on.
    fn new(narrow: usize) -> Self {
        let names = ["client", "near", "far", "balancer", "first", "last", "backend"];
        let hosts = names.map(|name| Namespace::new(name).unwrap());
        for (link, pair) in hosts.windows(2).enumerate() {
            let mtu = if link == narrow { 1400 } else { 1500 };
            veth((&pair[0], "right"), (&pair[1], "left")).unwrap();
            for (host, dev, last) in [(&pair[0], "right", 1), (&pair[1], "left", 2)] {
                host.set_mtu(dev, mtu).unwrap();
                host.add_address(dev, format!("10.9.{link}.{last}/24").parse().unwrap()).unwrap();
                host.add_address(dev, format!("2001:db8:{link}::{last}/64").parse().unwrap()).unwrap();
            }
        }
        for (at, host) in hosts.iter().enumerate() {
            host.enable_forwarding().unwrap();
            // Everything that is not known goes to the balancer, and from there to the side that it is on.
            if at < 3 {
                for via in [format!("10.9.{at}.2"), format!("2001:db8:{at}::2")] {
                    host.add_default_route(ip(&via)).unwrap();
                }
            } else if at > 3 {
                let link = at - 1;
                for via in [format!("10.9.{link}.1"), format!("2001:db8:{link}::1")] {
                    host.add_default_route(ip(&via)).unwrap();
                }
            }
            for link in 0..6 {
                let beyond = if at <= 3 { link + 1 < at } else { link > at };
                let beyond = beyond || (at == 3 && link > at);
                if !beyond {
                    continue;
                }
                let (dev, last) = if link < at { (at - 1, 1) } else { (at, 2) };
                host.add_route(format!("10.9.{link}.0/24").parse().unwrap(), ip(&format!("10.9.{dev}.{last}")))
                    .unwrap();
                host.add_route(
                    format!("2001:db8:{link}::/64").parse().unwrap(),
                    ip(&format!("2001:db8:{dev}::{last}")),
                )
                .unwrap();
            }
        }
        let guards = vec![hosts[2].xdp_pass("right").unwrap(), hosts[4].xdp_pass("left").unwrap()];
        let [client, near, far, balancer, first, last, backend] = hosts;
        Self {
            client,
            balancer,
            backend,
            backend_addrs: [ip("10.9.5.2"), ip("2001:db8:5::2")],
            _others: vec![near, far, first, last],
            _guards: guards,
        }
    }
}

#[test]
fn l4_path_mtu_discovery_works_with_narrow_hops_before_behind_and_at_the_balancer() {
    // Link 1 is two hops before the balancer, 4 two hops behind it, 2 and 3 are its own.
    for narrow in [1, 4, 2, 3] {
        let chain = Chain::new(narrow);
        for mode in [NatMode::Full, NatMode::Destination] {
            let balancer = NatBalancer::load(&NatConfig::default()).unwrap();
            let _attached = ["left", "right"]
                .map(|name| chain.balancer.run(|| balancer.attach(&AttachOptions::new(name)).unwrap()));
            for (vip, backend) in [ip(VIPS[0]), ip(VIPS[1])].into_iter().zip(chain.backend_addrs) {
                let _echo = TcpEcho::start(&chain.backend, (backend, 8080).into()).unwrap();
                let with = NatService::new([SocketAddr::new(backend, 8080)]).mode(mode);
                balancer.insert(ServiceAddr::tcp(vip, 80), &with).unwrap();
                // Until the neighbours are known, packets go by the host's stack, errors among them, and for a tick of its
                // clock after that: what a CPU did not find it asks for with the next one.
                let unresolved = || balancer.stats().unwrap().reason(Reason::Unresolved).packets;
                let is_by_itself = || {
                    let before = unresolved();
                    let first = tcp_echo(&chain.client, (vip, 80).into(), b"first", Duration::from_secs(60));
                    assert_eq!(first.unwrap(), b"first");
                    unresolved() == before
                };
                crate::common::wait_for(|| is_by_itself() && is_by_itself());
                let before = balancer.stats().unwrap();
                let payload = bytes(crate::common::times(500_000, 10_000_000, 100_000));
                let back = tcp_echo(&chain.client, (vip, 80).into(), &payload, Duration::from_secs(60));
                let stats = balancer.stats().unwrap();
                let back = back.unwrap_or_else(|error| panic!("{narrow} {mode:?} {vip}: {error}: {:?}", stats.reasons));
                assert!(back == payload, "{narrow} {mode:?} {vip}");
                let told = if narrow == 2 || narrow == 3 { Reason::TooBigAnswered } else { Reason::ErrorForwarded };
                // Linux remembers what it was told, so the second mode may need no telling.
                let told = stats.since(&before).reason(told).packets;
                assert!(mode != NatMode::Full || told > 0, "{narrow} {vip}: {:?}", stats.reasons);
            }
        }
    }
}
