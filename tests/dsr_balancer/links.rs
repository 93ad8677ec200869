//! A DSR balancer with backends on two links, and neighbours whose MAC changes, under real traffic. Traps L11 and L12.
//!
//! ```text
//! client ---- gateway eth1 ---- [switch] ---- eth0 balancer eth1 ---- [another switch]
//!                     eth2 -------- | ------------------------------------- |   |
//!                                   +-- near backend             far backend ---+
//! ```

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use crate::common::times;
use xdpkit::{
    Action, AttachOptions, Attachment, DsrBalancer, DsrConfig, DsrService, Reason, ServiceAddr, Stage as _,
    TunnelDecap, TunnelDecapConfig,
};
use xdpkit_lab::{
    Namespace, XdpPass,
    topology::{DsrL2, add_silent_vip},
    traffic::{HttpServer, TcpEcho, UdpEcho, http_get, tcp_echo},
    veth,
};

const VIP4: [u8; 4] = [192, 168, 178, 100];
const VIP6: [u16; 8] = [0x2001, 0xdb8, 0xb, 0, 0, 0, 0, 0x100];
const PATIENCE: Duration = Duration::from_secs(60);

fn vip(family6: bool) -> IpAddr {
    if family6 { VIP6.into() } else { VIP4.into() }
}

struct TwoLinks {
    near: DsrL2,
    far: Namespace,
    _switch: Namespace,
    _guards: Vec<XdpPass>,
}

impl TwoLinks {
    fn new() -> Self {
        let near = DsrL2::new(1, VIP4.into(), VIP6.into()).unwrap();
        let (far, switch) = (Namespace::new("far").unwrap(), Namespace::new("switch2").unwrap());
        let ports = ["p0", "p1", "p2"];
        let hosts = [(&near.balancer, "eth1", "10"), (&far, "eth0", "11"), (&near.gateway, "eth2", "1")];
        let mut guards = Vec::new();
        for ((host, dev, number), port) in hosts.into_iter().zip(ports) {
            veth((host, dev), (&switch, port)).unwrap();
            guards.push(switch.xdp_pass(port).unwrap());
            host.add_address(dev, format!("192.168.179.{number}/24").parse().unwrap()).unwrap();
            host.add_address(dev, format!("2001:db8:e::{number}/64").parse().unwrap()).unwrap();
        }
        switch.add_bridge("br0", &ports).unwrap();
        for family6 in [false, true] {
            far.add_default_route(if family6 { "2001:db8:e::1" } else { "192.168.179.1" }.parse().unwrap()).unwrap();
            add_silent_vip(&far, vip(family6)).unwrap();
        }
        Self { near, far, _switch: switch, _guards: guards }
    }

    fn backends(&self, family6: bool) -> [IpAddr; 2] {
        let far = if family6 { "2001:db8:e::11" } else { "192.168.179.11" };
        [self.near.backend_addrs[0].both()[usize::from(family6)], far.parse().unwrap()]
    }

    fn hosts(&self) -> [&Namespace; 2] {
        [&self.near.backends[0], &self.far]
    }
}

fn decapsulate(ns: &Namespace) -> (TunnelDecap, Attachment) {
    let decap = TunnelDecap::load(&TunnelDecapConfig::default().vip(VIP4).vip(VIP6).any_source()).unwrap();
    let attachment = ns.run(|| decap.attach(&AttachOptions::new("eth0"))).unwrap();
    (decap, attachment)
}

#[test]
fn l12_backends_on_two_links_serve_pages_and_long_transfers() {
    for kind in [DsrService::l2(), DsrService::ipip()] {
        let net = TwoLinks::new();
        let balancer = DsrBalancer::load(&DsrConfig::default().services(4)).unwrap();
        let _attached = net.near.balancer.run(|| balancer.attach(&AttachOptions::new("eth0"))).unwrap();
        let ipip = kind == DsrService::ipip();
        let decaps: Vec<_> = if ipip { net.hosts().map(decapsulate).into() } else { Vec::new() };
        for family6 in [false, true] {
            let service = ServiceAddr::tcp(vip(family6), 80);
            let list = net.backends(family6).map(|backend| (backend, 1));
            net.near.balancer.run(|| balancer.insert_service(service, kind, list)).unwrap();
            let address = SocketAddr::new(vip(family6), 80);
            let serve = |(number, ns): (usize, &Namespace)| {
                HttpServer::start(ns, address, move |peer| format!("{number} {}", peer.ip())).unwrap()
            };
            let servers: Vec<_> = net.hosts().into_iter().enumerate().map(serve).collect();
            let fetch = |count: usize| {
                let mut got = [0_u64; 2];
                for _ in 0..count {
                    let page = String::from_utf8(http_get(&net.near.client, address, "/", PATIENCE).unwrap()).unwrap();
                    let (number, peer) = page.split_once(' ').unwrap();
                    assert_eq!(peer, net.near.client_addr.both()[usize::from(family6)].to_string());
                    got[number.parse::<usize>().unwrap()] += 1;
                }
                got
            };
            // The first ones are for the host's stack, which finds the neighbours out.
            fetch(12);
            std::thread::sleep(Duration::from_millis(50));
            let before = balancer.stats().unwrap();
            let got = fetch(times(60, 1000, 12));
            assert!(got.iter().all(|pages| *pages > 0), "{got:?}");
            let stats = balancer.stats().unwrap().since(&before);
            // SYN, acknowledgement, request and FIN at least, each by the interface that its backend is on.
            for (action, pages) in [(Action::Tx, got[0]), (Action::Redirect, got[1])] {
                assert!(stats.action(action).packets >= 4 * pages, "{action:?} {got:?} {stats:?}");
            }
            drop(servers);

            // All of it to the far one, in both directions.
            let far = [(net.backends(family6)[1], 1)];
            net.near.balancer.run(|| {
                balancer.remove_service(service).unwrap();
                balancer.insert_service(service, kind, far).unwrap();
            });
            let echo = TcpEcho::start(&net.far, address).unwrap();
            let payload: Vec<u8> = (0..times(500_000, 20_000_000, 40_000)).map(|n| (n % 251) as u8).collect();
            let back = tcp_echo(&net.near.client, address, &payload, Duration::from_secs(60)).unwrap();
            assert!(back == payload, "{} of {} bytes", back.len(), payload.len());
            assert_eq!(echo.connections(), 1);
        }
        let forwarded = balancer.stats().unwrap().reason(Reason::Forwarded).packets;
        for (decap, _) in &decaps {
            let decapsulated = decap.stats().unwrap().reason(Reason::Decapsulated).packets;
            assert!(decapsulated > 0 && decapsulated < forwarded);
        }
    }
}

/// Waits for answers after a backend got another MAC and said so, as hosts do (a gratuitous ARP, an unsolicited neighbour
/// advertisement), under traffic. The longest time between two answers.
fn silence(net: &TwoLinks, host: &Namespace, family6: bool, new: [u8; 6]) -> Duration {
    let address = SocketAddr::new(vip(family6), 53);
    let any: SocketAddr = if family6 { "[::]:0" } else { "0.0.0.0:0" }.parse().unwrap();
    let socket = net.near.client.run(|| UdpSocket::bind(any)).unwrap();
    socket.connect(address).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
    let (start, mut last, mut longest, mut changed) = (Instant::now(), None, Duration::ZERO, false);
    let (mut answers, mut after) = (0, 0);
    while after < 20 {
        assert!(start.elapsed() < 6 * PATIENCE, "{answers} answers, {after} of them after the change");
        // Fails once for each message that somebody on the way sends back.
        let _ = socket.send(b"?");
        let mut buffer = [0; 8];
        if socket.recv(&mut buffer).is_ok() {
            if let Some(last) = last.replace(Instant::now()) {
                longest = longest.max(last.elapsed());
            }
            answers += 1;
            after += u32::from(changed);
            std::thread::sleep(Duration::from_millis(2));
        }
        if answers == 50 && !changed {
            host.set_mac("eth0", new).unwrap();
            assert_eq!(host.mac("eth0").unwrap(), new);
            changed = true;
            longest = Duration::ZERO;
        }
    }
    longest
}

#[test]
fn l11_a_new_mac_is_followed_under_traffic() {
    let net = TwoLinks::new();
    let balancer = DsrBalancer::load(&DsrConfig::default().services(4)).unwrap();
    let _attached = net.near.balancer.run(|| balancer.attach(&AttachOptions::new("eth0"))).unwrap();
    for family6 in [false, true] {
        let service = ServiceAddr::udp(vip(family6), 53);
        let mut last = None;
        for (number, (host, backend)) in net.hosts().into_iter().zip(net.backends(family6)).enumerate() {
            host.sysctl("net.ipv4.conf.eth0.arp_notify", "1").unwrap();
            host.sysctl("net.ipv6.conf.eth0.ndisc_notify", "1").unwrap();
            let _echo = UdpEcho::start(host, SocketAddr::new(vip(family6), 53)).unwrap();
            net.near.balancer.run(|| {
                if last.replace(backend).is_some() {
                    balancer.remove_service(service).unwrap();
                }
                balancer.insert_service(service, DsrService::l2(), [(backend, 1)]).unwrap();
            });
            let silence = silence(&net, host, family6, [2, 0, 0, 0, 0xd, 2 * number as u8 + u8::from(family6)]);
            println!("{backend}: {silence:?} without an answer");
        }
    }
}
