//! Real connections in generic mode, whose segments the stacks at both ends merge (trap N6): no function takes what was
//! merged for malformed, and what no balancer can forward is counted. Packet by packet in `frames.rs`.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use crate::common::{
    kernel_log::KernelLog,
    kernel_older_than_6_3,
    nat::{PATIENCE, ROUTED_VIPS},
};
use xdpkit::{
    Action, AttachOptions, DsrBalancer, DsrConfig, DsrService, Engine, Firewall, FirewallConfig, Interface,
    MonitorConfig, NatBalancer, NatConfig, NatService, PacketMonitor, Pipeline, Rate, RateLimiter, RateLimiterConfig,
    Reason, Scope, ServiceAddr, Stage, TunnelDecap, TunnelDecapConfig, XdpMode,
    preflight::{self, Severity},
};
use xdpkit_lab::{
    Namespace,
    topology::Pair,
    traffic::{TcpEcho, tcp_echo},
    veth,
};

/// What the sender's TCP may hand over at once.
const BIG: u32 = 150_000;
/// Longer than any wire carries: Ethernet, IPv6 and its longest payload.
const ANY_WIRE: u32 = 14 + 40 + 65_535;

/// What all of a connection takes, however slow the machine is.
const LONG: Duration = Duration::from_secs(300);

fn payload() -> Vec<u8> {
    (0..8_u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// TCP segments that a host has sent, and those of them that it has sent again.
fn sent(host: &Namespace) -> [u64; 2] {
    let text = host.run(|| fs::read_to_string("/proc/thread-self/net/snmp").unwrap());
    let mut lines = text.lines().filter(|line| line.starts_with("Tcp:"));
    let [names, values] = [lines.next(), lines.next()].map(|line| line.unwrap().split_whitespace());
    let of = |name| names.clone().zip(values.clone()).find(|(found, _)| *found == name).unwrap().1.parse().unwrap();
    ["OutSegs", "RetransSegs"].map(of)
}

/// Sends megabytes there and back; all arrive, and losses are not what the time is spent with.
fn transfer(pair: &Pair, server: SocketAddr, what: &str) {
    let payload = payload();
    let before = sent(&pair.client);
    let echo = tcp_echo(&pair.client, server, &payload, LONG).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(echo == payload, "{what}: {} bytes of {} came back as they went", echo.len(), payload.len());
    let after = sent(&pair.client);
    let [segments, again] = [0, 1].map(|at| after[at] - before[at]);
    assert!(again * 2 < segments, "{what}: {again} of {segments} segments were sent again");
}

fn is_malformed(stage: &dyn Stage) -> bool {
    stage.stats().unwrap().reasons.iter().any(|line| line.reason.is_malformed() || line.reason.is_unsupported())
}

#[test]
fn n6_big_tcp_passes_every_function_in_generic_mode() {
    let log = KernelLog::from_now();
    let pair = Pair::new().unwrap();
    pair.client.set_offload("eth0", true).unwrap();
    pair.client.set_big_tcp("eth0", BIG).unwrap();
    let servers = pair.server_addr.both().map(|address| TcpEcho::start(&pair.server, (address, 7).into()).unwrap());

    // What a program that passes everything does.
    let pass = pair.server.xdp_pass_generic("eth0").unwrap();
    servers.iter().for_each(|server| transfer(&pair, server.addr(), "XDP_PASS"));
    drop(pass);

    let monitor = PacketMonitor::load(&MonitorConfig::default().sample(1)).unwrap();
    let mut events = monitor.events().unwrap();
    let firewall = |engine, name: &str| Firewall::load(&FirewallConfig::default().engine(engine).name(name)).unwrap();
    let (tries, compiled) = (firewall(Engine::Trie, "tries"), firewall(Engine::Compiled, "compiled"));
    let limit = Rate::per_second(1_000_000_000);
    let limiter = RateLimiter::load(&RateLimiterConfig::default().limit(Scope::All, limit)).unwrap();
    let nat = NatBalancer::load(&NatConfig::default()).unwrap();
    let dsr = DsrBalancer::load(&DsrConfig::default()).unwrap();
    let vip: IpAddr = ROUTED_VIPS[0].parse().unwrap();
    let decap = TunnelDecap::load(&TunnelDecapConfig::default().vip(vip).any_source()).unwrap();
    // Each has something to do, but not with these packets.
    let service: ServiceAddr = format!("tcp/{vip}:7").parse().unwrap();
    nat.insert(service, &NatService::new(["10.0.0.9:7".parse().unwrap()])).unwrap();
    let backend: IpAddr = "10.0.0.9".parse().unwrap();
    pair.server.run(|| dsr.insert_service(service, DsrService::l2(), [(backend, 1)])).unwrap();
    let stages: [&dyn Stage; 7] = [&monitor, &tries, &compiled, &limiter, &nat, &dsr, &decap];
    let options = AttachOptions::new("eth0").mode(XdpMode::Generic);
    let mut chain = Pipeline::new(&stages).unwrap();
    pair.server.run(|| chain.attach(&options)).unwrap();

    let expected = if kernel_older_than_6_3() { &servers[1..] } else { &servers[..] };
    for server in &servers {
        let started = Instant::now();
        let mut longest = 0;
        loop {
            transfer(&pair, server.addr(), "all functions");
            while let Some(event) = events.try_next() {
                longest = longest.max(event.bytes);
            }
            if longest > ANY_WIRE || !expected.iter().any(|expected| expected.addr() == server.addr()) {
                break;
            }
            assert!(started.elapsed() < LONG, "no frame of {} was longer than {longest} bytes", server.addr());
        }
    }
    for stage in stages {
        let stats = stage.stats().unwrap();
        assert!(!is_malformed(stage), "{}: {:?}", stage.name(), stats.reasons);
        assert_eq!(stats.action(Action::Pass), stats.total(), "{}: {:?}", stage.name(), stats.reasons);
    }
    chain.detach().unwrap();
    log.assert_quiet();
}

/// The longest frame that a monitor sees in generic mode on an interface while a client sends its segments one by one.
fn longest_at(server: &Namespace, dev: &str, client: &Namespace, to: IpAddr, until: u32) -> u32 {
    let monitor = PacketMonitor::load(&MonitorConfig::default().sample(1)).unwrap();
    let mut events = monitor.events().unwrap();
    let options = AttachOptions::new(dev).mode(XdpMode::Generic);
    let _attachment = server.run(|| monitor.attach(&options)).unwrap();
    let echo = TcpEcho::start(server, (to, 7).into()).unwrap();
    let (payload, mut longest) = (vec![7; 1 << 20], 0);
    let started = Instant::now();
    loop {
        assert!(tcp_echo(client, echo.addr(), &payload, LONG).unwrap() == payload);
        while let Some(event) = events.try_next() {
            longest = longest.max(event.bytes);
        }
        if longest >= until || started.elapsed() > LONG {
            return longest;
        }
    }
}

/// The kernel leaves GRO out where a program is attached in generic mode, not at the interfaces below.
#[test]
fn n6_preflight_tells_where_packets_come_in_merged() {
    let [client, server] = ["client", "server"].map(|name| Namespace::new(name).unwrap());
    veth((&client, "eth0"), (&server, "port0")).unwrap();
    client.add_address("eth0", "10.0.0.2/24".parse().unwrap()).unwrap();
    server.add_address("port0", "10.0.0.1/24".parse().unwrap()).unwrap();
    let findings = |dev| server.run(|| preflight::generic_mode(&Interface::by_name(dev).unwrap())).unwrap();
    let [uncut] = &findings("port0")[..] else { panic!("{:?}", findings("port0")) };
    assert!(uncut.severity == Severity::Advice && uncut.to_string().contains("tso off"), "{uncut}");
    server.set_gro("port0", true).unwrap();
    let [_, gro] = &findings("port0")[..] else { panic!("{:?}", findings("port0")) };
    assert!(gro.severity == Severity::Advice && gro.text.contains("GRO is on"), "{gro}");
    let to = "10.0.0.1".parse().unwrap();
    assert_eq!(longest_at(&server, "port0", &client, to, 1514), 1514, "nothing is merged");

    server.remove_address("port0", "10.0.0.1/24".parse().unwrap()).unwrap();
    server.add_bridge("br0", &["port0"]).unwrap();
    server.add_address("br0", "10.0.0.1/24".parse().unwrap()).unwrap();
    let merged = findings("br0").into_iter().find(|finding| finding.severity == Severity::Warning);
    assert!(merged.as_ref().is_some_and(|finding| finding.to_string().contains("LOWER gro off")), "{merged:?}");
    let longest = longest_at(&server, "br0", &client, to, 2000);
    assert!(longest >= 2000, "what the port has merged comes to the bridge: {longest}");
}

/// A client, a balancer and a backend, in a row, whose ends are free: no native program keeps the client from merging.
struct Row {
    client: Namespace,
    balancer: Namespace,
    backend: Namespace,
}

impl Row {
    fn new() -> Self {
        let [client, balancer, backend] = ["client", "balancer", "backend"].map(|name| Namespace::new(name).unwrap());
        for (host, dev, net4, net6) in
            [(&client, "eth0", "10.0.0", "2001:db8:a"), (&backend, "eth1", "192.168.178", "2001:db8:b")]
        {
            veth((host, "eth0"), (&balancer, dev)).unwrap();
            for (ns, dev, number) in [(&balancer, dev, 10), (host, "eth0", 20)] {
                ns.add_address(dev, format!("{net4}.{number}/24").parse().unwrap()).unwrap();
                ns.add_address(dev, format!("{net6}::{number}/64").parse().unwrap()).unwrap();
            }
            host.add_default_route(format!("{net4}.10").parse().unwrap()).unwrap();
            host.add_default_route(format!("{net6}::10").parse().unwrap()).unwrap();
        }
        balancer.enable_forwarding().unwrap();
        for via in ["10.0.0.20", "2001:db8:a::20"] {
            balancer.add_default_route(via.parse().unwrap()).unwrap();
        }
        client.set_offload("eth0", true).unwrap();
        client.set_big_tcp("eth0", BIG).unwrap();
        Self { client, balancer, backend }
    }
}

/// Nothing that is longer than the way's MTU leaves a balancer; single segments do, and the rest is counted.
#[test]
fn n6_a_balancer_counts_merged_frames_as_too_big() {
    let log = KernelLog::from_now();
    let row = Row::new();
    let balancer = NatBalancer::load(&NatConfig::default()).unwrap();
    let _attached = ["eth0", "eth1"].map(|name| {
        let options = AttachOptions::new(name).mode(XdpMode::Generic);
        row.balancer.run(|| balancer.attach(&options)).unwrap()
    });
    for (vip, backend) in ROUTED_VIPS.iter().zip(["192.168.178.20:8080", "[2001:db8:b::20]:8080"]) {
        let vip = SocketAddr::new(vip.parse().unwrap(), 80);
        let backend: SocketAddr = backend.parse().unwrap();
        let _server = TcpEcho::start(&row.backend, backend).unwrap();
        let service: ServiceAddr = format!("tcp/{vip}").parse().unwrap();
        balancer.insert(service, &NatService::new([backend])).unwrap();
        let hello = || tcp_echo(&row.client, vip, b"hello", PATIENCE).unwrap();
        assert_eq!(hello(), b"hello");
        let before = balancer.stats().unwrap();
        let too_big = || balancer.stats().unwrap().since(&before).reason(Reason::TooBig).packets;
        let started = Instant::now();
        while too_big() == 0 {
            assert!(started.elapsed() < LONG, "no merged segments to {vip} were seen");
            // Some of it arrives, segment by segment.
            let _ = tcp_echo(&row.client, vip, &[7; 1 << 20], Duration::from_secs(1));
        }
        assert_eq!(hello(), b"hello");
    }
    assert!(!is_malformed(&balancer), "{:?}", balancer.stats().unwrap().reasons);
    log.assert_quiet();
}
