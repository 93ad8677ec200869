//! Every function once through its life, for `./x vm KERNEL --quick`: its programs load, judge a table of packets, carry a
//! real connection, are adopted by the next value, and stand in a chain that is edited meanwhile.

mod common;

use std::{
    net::{IpAddr, SocketAddr},
    path::Path,
    time::Duration,
};

use xdpkit::{
    Action, AttachOptions, DsrBalancer, DsrConfig, DsrService, Firewall, FirewallConfig, MonitorConfig, NatBalancer,
    NatConfig, NatService, PacketMonitor, Pipeline, Position, Rate, RateLimiter, RateLimiterConfig, Reason, Rule,
    Scope, ServiceAddr, Stage, Tier, TunnelDecap, TunnelDecapConfig,
};
use xdpkit_lab::{
    Namespace,
    bpffs::BpfFs,
    frame::Frame,
    topology::{DsrIpip, Nat, Pair},
    traffic::{TcpEcho, tcp_echo},
};

const PATIENCE: Duration = Duration::from_secs(60);

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn udp(from: &str, to: &str) -> Frame {
    Frame::udp((ip(from), 4000).into(), (ip(to), 53).into()).payload(&[0; 18])
}

/// What comes in, and what becomes of it.
type Packets<'a> = &'a [(&'a str, Frame, Action, Reason)];

/// What becomes of a frame, and why, as the counters tell; the kernel's own packets may come in meanwhile.
fn judge(stage: &dyn Stage, frame: &[u8]) -> (Action, Reason) {
    let before = stage.stats().unwrap();
    let action = stage.test_run(frame).unwrap().action;
    let counted = stage.stats().unwrap().since(&before);
    let own = |line: &&xdpkit::ReasonCount| line.action == action && line.reason != Reason::NeighbourDiscovery;
    (action, counted.reasons.iter().find(own).expect("it is counted").reason)
}

/// Twice, fresh and adopted: judges the packets, and carries connections alone and while another stage comes and goes.
fn lives<S: Stage + Sync>(
    ns: &Namespace,
    devices: &[&str],
    load_or_adopt: impl Fn(&Path) -> S + Sync,
    set_up: impl Fn(&S) + Sync,
    packets: Packets<'_>,
    connect: impl Fn() + Sync,
) {
    let pins = BpfFs::new().unwrap();
    let directory = pins.path().join("quick");
    ns.run(|| {
        for adopted in [false, true] {
            let stage = load_or_adopt(&directory);
            if !adopted {
                set_up(&stage);
            }
            for (what, frame, action, reason) in packets {
                assert_eq!(judge(&stage, &frame.clone().build()), (*action, *reason), "{what}, adopted {adopted}");
            }
            let attach = |device: &&str| {
                let mut chain = Pipeline::new(&[&stage]).unwrap();
                chain.attach(&AttachOptions::new(*device).pin(&directory)).unwrap();
                assert_eq!(chain.adopted(), adopted, "{device}");
                chain
            };
            let mut chains: Vec<_> = devices.iter().map(attach).collect();
            connect();
            let monitor = PacketMonitor::load_or_adopt(&directory, &MonitorConfig::default().name("guest")).unwrap();
            for chain in &mut chains {
                chain.insert(Position::First, &monitor).unwrap();
            }
            connect();
            assert!(monitor.stats().unwrap().passed().packets > 3, "the guest saw the connection");
            for chain in &mut chains {
                chain.remove("guest").unwrap();
            }
            connect();
            assert!(stage.stats().unwrap().total().packets > 9);
        }
    });
}

/// A connection to each server and back.
fn talk(client: &Namespace, servers: &[SocketAddr]) {
    let payload = [7; 20_000];
    for server in servers {
        let back = tcp_echo(client, *server, &payload, PATIENCE).unwrap_or_else(|error| panic!("{server}: {error}"));
        assert!(back == payload, "{server}");
    }
}

/// The server of a pair with this function on its interface.
fn lives_on_a_host<S: Stage + Sync>(
    load_or_adopt: impl Fn(&Path) -> S + Sync,
    set_up: impl Fn(&S) + Sync,
    packets: Packets<'_>,
) {
    let lab = Pair::new().unwrap();
    let servers = lab.server_addr.both().map(|address| SocketAddr::new(address, 7));
    let _echoes = servers.map(|server| TcpEcho::start(&lab.server, server).unwrap());
    lives(&lab.server, &["eth0"], load_or_adopt, set_up, packets, || talk(&lab.client, &servers));
}

#[test]
fn monitor() {
    let packets = [("IPv4", udp("10.0.0.2", "10.0.0.1"), Action::Pass, Reason::None)];
    let config = MonitorConfig::default();
    lives_on_a_host(|pins| PacketMonitor::load_or_adopt(pins, &config).unwrap(), |_| (), &packets);
}

#[test]
fn firewall() {
    let packets = [
        ("denied", udp("192.0.2.9", "10.0.0.1"), Action::Drop, Reason::Denied),
        ("denied, IPv6", udp("2001:db8:bad::9", "fd00::1"), Action::Drop, Reason::Denied),
        ("not listed", udp("10.0.0.2", "10.0.0.1"), Action::Pass, Reason::DefaultAction),
    ];
    let config = FirewallConfig::default();
    let deny = |firewall: &Firewall| {
        for source in ["192.0.2.0/24", "2001:db8:bad::/48"] {
            firewall.insert(source.parse().unwrap(), Rule::deny()).unwrap();
        }
    };
    lives_on_a_host(|pins| Firewall::load_or_adopt(pins, &config).unwrap(), deny, &packets);
}

#[test]
fn rate_limiter() {
    let packets = [
        ("within", udp("10.0.0.2", "10.0.0.1"), Action::Pass, Reason::WithinLimit),
        ("blocked", udp("192.0.2.9", "10.0.0.1"), Action::Drop, Reason::Blocked),
    ];
    let config = RateLimiterConfig::default().limit(Scope::All, Rate::per_second(1_000_000).burst(1_000_000));
    let block = |limiter: &RateLimiter| drop(limiter.tiers().insert("192.0.2.0/24".parse().unwrap(), Tier::Blocked));
    lives_on_a_host(|pins| RateLimiter::load_or_adopt(pins, &config).unwrap(), block, &packets);
}

#[test]
fn nat_balancer() {
    let lab = Nat::new(1, 1).unwrap();
    for via in lab.client_addrs[0].both() {
        lab.balancer.add_default_route(via).unwrap();
    }
    lab.backends[0].steer_flows("eth0").unwrap();
    let vips = ["198.51.100.10", "2001:db8:99::10"].map(ip);
    let backends = lab.backend_addrs[0].both().map(|address| SocketAddr::new(address, 8080));
    let _echoes = backends.map(|backend| TcpEcho::start(&lab.backends[0], backend).unwrap());
    let packets = [("for nobody", udp("10.0.0.20", "203.0.113.1"), Action::Pass, Reason::NotForVip)];
    let serve = |balancer: &NatBalancer| {
        for (vip, backend) in vips.into_iter().zip(backends) {
            balancer.insert(ServiceAddr::tcp(vip, 80), &NatService::new([backend])).unwrap();
        }
    };
    let config = NatConfig::default();
    let load = |pins: &Path| NatBalancer::load_or_adopt(pins, &config).unwrap();
    let servers = vips.map(|vip| SocketAddr::new(vip, 80));
    lives(&lab.balancer, &["eth0", "eth1"], load, serve, &packets, || talk(&lab.clients[0], &servers));
}

#[test]
fn dsr_balancer_and_tunnel_decap() {
    let (vip4, vip6) = ([192, 168, 178, 100].into(), [0x2001, 0xdb8, 0xb, 0, 0, 0, 0, 0x100].into());
    let lab = DsrIpip::new(1, vip4, vip6).unwrap();
    let backend = &lab.backends[0];
    backend.steer_flows("eth0").unwrap();
    let servers = [IpAddr::from(vip4), vip6.into()].map(|vip| SocketAddr::new(vip, 80));
    let _echoes = servers.map(|server| TcpEcho::start(backend, server).unwrap());
    let connect = || talk(&lab.client, &servers);
    let serve = |balancer: &DsrBalancer| {
        for (server, backend) in servers.iter().zip(lab.backend_addrs[0].both()) {
            let service = ServiceAddr::tcp(server.ip(), server.port());
            balancer.insert_service(service, DsrService::ipip(), [(backend, 1)]).unwrap();
        }
    };
    let config = TunnelDecapConfig::default().vip(vip4).vip(vip6).any_source();
    {
        let decap = TunnelDecap::load(&config).unwrap();
        let _attached = backend.run(|| decap.attach(&AttachOptions::new("eth0"))).unwrap();
        let packets = [("for nobody", udp("10.0.0.20", "203.0.113.1"), Action::Pass, Reason::NotForVip)];
        let config = DsrConfig::default().services(4);
        let load = |pins: &Path| DsrBalancer::load_or_adopt(pins, &config).unwrap();
        lives(&lab.balancer, &["eth0"], load, serve, &packets, connect);
    }
    let balancer = DsrBalancer::load(&DsrConfig::default().services(4)).unwrap();
    let _attached = lab.balancer.run(|| {
        serve(&balancer);
        balancer.attach(&AttachOptions::new("eth0")).unwrap()
    });
    let inside = Frame::tcp("10.0.0.2:4000".parse().unwrap(), servers[0]).payload(&[1; 9]);
    let tunnel = Frame::ip(ip("10.200.3.4"), ip("172.16.0.11"), 4).payload(&inside.packet());
    let packets = [
        ("a tunnel", tunnel, Action::Pass, Reason::Decapsulated),
        ("none", udp("10.0.0.20", "203.0.113.1"), Action::Pass, Reason::NotTunnel),
    ];
    let load = |pins: &Path| {
        let adopted = TunnelDecap::adopt(pins, &config.name);
        adopted.or_else(|_| TunnelDecap::load(&config)).unwrap()
    };
    lives(backend, &["eth0"], load, |_| (), &packets, connect);
}
