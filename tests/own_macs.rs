//! Frames that are not addressed to this host: they pass unmodified, so that switches that flood make no storm.

mod common;

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use common::judge;
use xdpkit::{
    Action, AttachOptions, Attachment, DsrBalancer, DsrConfig, DsrService, MonitorConfig, NatBalancer, NatConfig,
    NatService, PacketMonitor, Pipeline, Protocol, Reason, Stage, TestRun, TunnelDecap, TunnelDecapConfig, XdpMode,
};
use xdpkit_lab::{
    Namespace, PacketSocket,
    frame::{Frame, SRC_MAC},
    topology::{Pair, add_silent_vip},
};

const VIPS: [&str; 2] = ["10.0.0.100", "fd00::100"];
/// Another station's, broadcast, and the multicast addresses of IPv4, IPv6 and a switch.
const OTHERS: [[u8; 6]; 5] =
    [[2, 0, 0, 0, 0, 3], [0xff; 6], [1, 0, 0x5e, 0, 0, 1], [0x33, 0x33, 0, 0, 0, 1], [1, 0x80, 0xc2, 0, 0, 0]];
const PATIENCE: Duration = Duration::from_secs(60);

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn nat() -> NatBalancer {
    let addresses = vec![ip("10.0.0.9"), ip("fd00::9")];
    let balancer = NatBalancer::load(&NatConfig::default().addresses(addresses)).unwrap();
    for (vip, backend) in VIPS.into_iter().zip(["10.0.0.1", "fd00::1"]) {
        let service = format!("udp/{}", SocketAddr::new(ip(vip), 9000)).parse().unwrap();
        balancer.insert(service, &NatService::new([SocketAddr::new(ip(backend), 9000)])).unwrap();
    }
    balancer
}

fn dsr(with: DsrService) -> DsrBalancer {
    let config = DsrConfig::default().check_on_link(false);
    let balancer = DsrBalancer::load(
        &config.outer_v4("10.200.0.0/16".parse().unwrap()).outer_v6("fd00:200::/64".parse().unwrap()),
    )
    .unwrap();
    for (vip, backend) in VIPS.into_iter().zip(["10.0.0.1", "fd00::1"]) {
        let service = format!("udp/{}", SocketAddr::new(ip(vip), 9000)).parse().unwrap();
        balancer.insert_service(service, with, [(ip(backend), 1)]).unwrap();
    }
    balancer
}

fn decap() -> TunnelDecap {
    let config = VIPS.iter().fold(TunnelDecapConfig::default(), |config, vip| config.vip(ip(vip)));
    TunnelDecap::load(&config.any_source()).unwrap()
}

fn reflector() -> PacketMonitor {
    let monitor = PacketMonitor::load(&MonitorConfig::default()).unwrap();
    monitor.set_action(Protocol::Udp, Some(Action::Tx)).unwrap();
    monitor
}

fn to_vip(family: usize) -> Frame {
    let from = SocketAddr::new(ip(["10.0.0.2", "fd00::2"][family]), 4000);
    Frame::udp(from, SocketAddr::new(ip(VIPS[family]), 9000)).payload(b"hello")
}

#[test]
fn frames_to_other_hosts_pass_unmodified() {
    let stages: [(&str, Box<dyn Stage>); 5] = [
        ("NAT", Box::new(nat())),
        ("DSR", Box::new(dsr(DsrService::l2()))),
        ("IP-in-IP", Box::new(dsr(DsrService::ipip()))),
        ("decapsulation", Box::new(decap())),
        ("reflection", Box::new(reflector())),
    ];
    for (name, stage) in stages {
        for family in [0, 1] {
            let mut frame = to_vip(family);
            if name == "decapsulation" {
                let outer = [("10.0.0.3", "10.0.0.1", 4), ("fd00::3", "fd00::1", 41)][family];
                frame = Frame::ip(ip(outer.0), ip(outer.1), outer.2).payload(&frame.packet());
            }
            for tags in 0..3 {
                if tags > 0 {
                    frame = frame.vlan(tags);
                }
                let own = frame.clone().macs(SRC_MAC, TestRun::OWN_MAC).build();
                assert_ne!(judge(&*stage, &own).1, Reason::NotForUs, "{name}");
                for other in OTHERS {
                    let frame = frame.clone().macs(SRC_MAC, other).build();
                    let before = stage.stats().unwrap();
                    let verdict = stage.test_run(&frame).unwrap();
                    let counted = stage.stats().unwrap().since(&before);
                    let expected = match other[0] & 1 {
                        1 if name == "reflection" => Reason::TxGroupAddress,
                        _ => Reason::NotForUs,
                    };
                    assert_eq!(counted.reason(expected).packets, 1, "{name}, {other:02x?}: {:?}", counted.reasons);
                    assert_eq!((verdict.action, verdict.frame), (Action::Pass, frame), "{name}, {other:02x?}");
                }
            }
        }
    }
    // What a balancer has no business with is what it was.
    let other =
        Frame::udp("10.0.0.2:1".parse().unwrap(), "10.0.0.77:2".parse().unwrap()).macs(SRC_MAC, OTHERS[0]).build();
    assert_eq!(judge(&nat(), &other), (Action::Pass, Reason::NotForVip));
    assert_eq!(judge(&dsr(DsrService::l2()), &other), (Action::Pass, Reason::NotForVip));
}

#[test]
fn a_test_run_goes_by_the_interface_that_it_names() {
    let ns = Namespace::new("ingress").unwrap();
    xdpkit_lab::veth((&ns, "eth0"), (&ns, "eth1")).unwrap();
    let interfaces = ["eth0", "eth1"].map(|name| ns.run(|| xdpkit::Interface::by_name(name).unwrap()));
    let (single, chained) = (nat(), dsr(DsrService::l2()));
    let chain = Pipeline::new(&[&reflector(), &chained]).unwrap();
    for (at, interface) in interfaces.iter().enumerate() {
        let mac = interface.mac().unwrap();
        assert_eq!(mac, ns.mac(interface.name()).unwrap());
        let frame = to_vip(0).macs(SRC_MAC, mac).build();
        let run = TestRun::new(&frame).ingress(interface, 0);
        let other = TestRun::new(&frame).ingress(&interfaces[1 - at], 0);
        for (run, count) in [(run, 0), (other, 1), (TestRun::new(&frame), 1)] {
            let before = [single.stats().unwrap(), chained.stats().unwrap()];
            ns.run(|| (single.run(&run).unwrap(), chain.run(&run).unwrap()));
            let not_ours = single.stats().unwrap().since(&before[0]).reason(Reason::NotForUs).packets;
            assert_eq!(not_ours, count, "{interface}");
        }
    }
}

/// Whether a frame to this address comes back, for a UDP datagram that is reflected.
struct Mirror<'p> {
    pair: &'p Pair,
    socket: PacketSocket,
}

impl Mirror<'_> {
    fn reflects(&self, mac: [u8; 6]) -> bool {
        let client = self.pair.client.mac("eth0").unwrap();
        let frame = to_vip(1).macs(client, mac).build();
        self.socket.send(&frame).unwrap();
        let back = |frame: &[u8]| frame[..6] == client && frame[6..12] == mac;
        self.socket.recv_matching(Duration::from_millis(300), back).unwrap().is_some()
    }

    fn becomes(&self, mac: [u8; 6], reflects: bool, about: &str) {
        let end = Instant::now() + PATIENCE;
        while self.reflects(mac) != reflects {
            assert!(Instant::now() < end, "{about}: {mac:02x?} is {}reflected", if reflects { "not " } else { "" });
        }
    }
}

#[test]
fn the_addresses_of_an_interface_and_of_what_stands_on_it_are_followed() {
    for mode in [XdpMode::Native, XdpMode::Generic] {
        let pair = Pair::new().unwrap();
        let (server, monitor) = (&pair.server, reflector());
        let configured = [2, 0, 0, 0, 0x77, 1];
        let options = AttachOptions::new("eth0").mode(mode).own_mac(configured);
        let mut chain = Pipeline::new(&[&monitor]).unwrap();
        server.run(|| chain.attach(&options)).unwrap();
        let mirror = Mirror { pair: &pair, socket: PacketSocket::open(&pair.client, "eth0").unwrap() };
        let first = server.mac("eth0").unwrap();
        assert!(mirror.reflects(first) && mirror.reflects(configured), "{mode}");
        assert!(!mirror.reflects([2, 0, 0, 0, 0x77, 2]) && !mirror.reflects([0xff; 6]), "{mode}");

        let second = [2, 0, 0, 0, 0x77, 3];
        server.set_mac("eth0", second).unwrap();
        mirror.becomes(second, true, "changed");
        assert!(!mirror.reflects(first) && mirror.reflects(configured), "{mode}");

        // A virtual router of VRRP.
        let router = [0, 0, 0x5e, 0, 1, 51];
        server.add_macvlan("vrrp51", "eth0", router).unwrap();
        mirror.becomes(router, true, "a macvlan");
        server.delete_link("vrrp51").unwrap();
        mirror.becomes(router, false, "a macvlan that is gone");

        server.add_bridge("br0", &["eth0"]).unwrap();
        let bridge = [2, 0, 0, 0, 0x77, 4];
        server.set_mac("br0", bridge).unwrap();
        mirror.becomes(bridge, true, "a bridge");
        server.add_macvlan("vrrp52", "br0", router).unwrap();
        mirror.becomes(router, true, "a macvlan on the bridge");

        // Programs that come into the chain later know them too.
        let other = PacketMonitor::load(&MonitorConfig::default().name("other")).unwrap();
        other.set_action(Protocol::Udp, Some(Action::Tx)).unwrap();
        chain.replace("monitor", &other).unwrap();
        for mac in [second, router, bridge, configured] {
            assert!(mirror.reflects(mac), "{mode}: {mac:02x?}");
        }
        server.delete_link("br0").unwrap();
        mirror.becomes(bridge, false, "a bridge that is gone");
        assert!(mirror.reflects(second), "{mode}");
        chain.detach().unwrap();
    }
}

/// Two balancers for the same addresses, a client and a backend on one switch. Every frame that comes to one of them comes to
/// both, until the switch knows where its stations are.
struct Flooded {
    pair: Pair,
    _attached: Vec<Attachment>,
}

const CLIENT: usize = 0;
const BALANCERS: [usize; 2] = [1, 2];
const DATAGRAMS: usize = 10;

impl Flooded {
    fn new(hub: bool, stages: [&dyn Stage; 2], at_backend: Option<&TunnelDecap>, mode: XdpMode) -> Self {
        let pair = Pair::with_clients(3).unwrap();
        let switch = pair.switch.as_ref().unwrap();
        if hub {
            switch.make_hub("br0").unwrap();
        }
        let options = AttachOptions::new("eth0").mode(mode);
        let mut attached = Vec::new();
        for (at, stage) in BALANCERS.into_iter().zip(stages) {
            let host = &pair.clients[at];
            host.enable_forwarding().unwrap();
            for (own, net) in [("10.0.0.9", "10.0.0.1"), ("fd00::9", "fd00::1")] {
                if at == BALANCERS[0] {
                    host.add_address("eth0", ip(own).into()).unwrap();
                }
                host.add_neighbour("eth0", ip(net), pair.server.mac("eth0").unwrap()).unwrap();
                let client = if ip(own).is_ipv4() { pair.client_addr.v4.into() } else { pair.client_addr.v6.into() };
                host.add_neighbour("eth0", client, pair.client.mac("eth0").unwrap()).unwrap();
            }
            attached.push(host.run(|| stage.attach(&options)).unwrap());
        }
        for vip in VIPS {
            let first = pair.clients[BALANCERS[0]].mac("eth0").unwrap();
            pair.clients[CLIENT].add_neighbour("eth0", ip(vip), first).unwrap();
            pair.server.add_neighbour("eth0", ip(vip), first).unwrap();
        }
        for own in ["10.0.0.9", "fd00::9"] {
            pair.server.add_neighbour("eth0", ip(own), pair.clients[BALANCERS[0]].mac("eth0").unwrap()).unwrap();
        }
        if let Some(decap) = at_backend {
            attached.push(pair.server.run(|| decap.attach(&options)).unwrap());
        }
        Self { pair, _attached: attached }
    }

    /// Datagrams that reach the backend of those that the client sends.
    fn delivered(&self, family: usize, at: IpAddr) -> usize {
        let receiver = self.pair.server.run(|| UdpSocket::bind(SocketAddr::new(at, 9000)).unwrap());
        receiver.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        let client = &self.pair.clients[CLIENT];
        let any = ["0.0.0.0:0", "[::]:0"][family];
        let sender = client.run(|| UdpSocket::bind(any).unwrap());
        let to = SocketAddr::new(ip(VIPS[family]), 9000);
        for _ in 0..DATAGRAMS {
            client.run(|| sender.send_to(b"hello", to)).unwrap();
            thread::sleep(Duration::from_millis(2));
        }
        let mut count = 0;
        while receiver.recv(&mut [0; 64]).is_ok() {
            count += 1;
            assert!(count < 1000, "a storm");
        }
        count
    }
}

#[test]
fn two_balancers_on_a_switch_that_floods_deliver_each_datagram_once() {
    for (hub, mode) in [(true, XdpMode::Native), (false, XdpMode::Native), (true, XdpMode::Generic)] {
        let about = |name: &str, family| format!("{name}, {}, hub {hub}, {mode}", ["IPv4", "IPv6"][family]);
        let not_ours = |stage: &dyn Stage| stage.stats().unwrap().reason(Reason::NotForUs).packets;

        let (first, second) = (dsr(DsrService::l2()), dsr(DsrService::l2()));
        let net = Flooded::new(hub, [&first, &second], None, mode);
        VIPS.iter().for_each(|vip| add_silent_vip(&net.pair.server, ip(vip)).unwrap());
        for family in [0, 1] {
            assert_eq!(net.delivered(family, ip(VIPS[family])), DATAGRAMS, "{}", about("DSR", family));
        }
        let forwarded = |balancer: &DsrBalancer| balancer.stats().unwrap().reason(Reason::Forwarded).packets;
        assert_eq!([forwarded(&first), forwarded(&second)], [2 * DATAGRAMS as u64, 0]);
        assert!(!hub || not_ours(&second) >= 2 * DATAGRAMS as u64, "every frame came to both");
        drop(net);

        let (first, second, decap) = (dsr(DsrService::ipip()), dsr(DsrService::ipip()), decap());
        let net = Flooded::new(hub, [&first, &second], Some(&decap), mode);
        VIPS.iter().for_each(|vip| add_silent_vip(&net.pair.server, ip(vip)).unwrap());
        for family in [0, 1] {
            assert_eq!(net.delivered(family, ip(VIPS[family])), DATAGRAMS, "{}", about("IP-in-IP", family));
        }
        assert_eq!([forwarded(&first), forwarded(&second)], [2 * DATAGRAMS as u64, 0]);
        drop(net);

        let (first, second) = (nat(), nat());
        let net = Flooded::new(hub, [&first, &second], None, mode);
        for family in [0, 1] {
            let server = [IpAddr::from(net.pair.server_addr.v4), net.pair.server_addr.v6.into()][family];
            assert_eq!(net.delivered(family, server), DATAGRAMS, "{}", about("NAT", family));
        }
        assert!(!hub || not_ours(&second) >= 2 * DATAGRAMS as u64, "every frame came to both");
    }
}
