//! Health checks of a DSR balancer's backends, by the virtual address and through the balancer: real connections.
#![cfg(feature = "health")]

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    sync::{Arc, Mutex, mpsc},
    time::{Duration, Instant},
};

use crate::common::{
    dsr_net::{Net, Way},
    is_emulated, times,
};
use ipnet::IpNet;
use xdpkit::{
    AttachOptions, Attachment, BackendState, DsrConfig, Health, HealthChange, HealthCheck, HealthChecks, Interface,
    Reason, ServiceAddr, Stage as _,
};
use xdpkit_lab::{packet::PacketSocket, traffic::TcpEcho, veth};

const BACKENDS: usize = 3;
/// The one that fails.
const FAILING: usize = 1;

fn patience() -> Duration {
    Duration::from_secs(if is_emulated() { 120 } else { 60 })
}

/// A busy machine answers late; but before TCP says it again.
const TIMEOUT: Duration = Duration::from_millis(900);

/// From the end of a probe to the next one.
fn pace() -> Duration {
    Duration::from_millis(if is_emulated() { 900 } else { 150 })
}

/// The balancer's own address.
fn own(family6: bool) -> IpAddr {
    if family6 { "2001:db8:b::10" } else { "192.168.178.10" }.parse().unwrap()
}

/// The way of probes to a network's balancer.
fn probe_pair(net: &Net) -> Attachment {
    let ns = &net.balancer_ns;
    veth((ns, "h0"), (ns, "h1")).unwrap();
    ns.sysctl("net.ipv4.conf.h1.accept_local", "1").unwrap();
    let mac = ns.mac("h1").unwrap();
    for family6 in [false, true] {
        let vip = Net::vip(family6);
        ns.add_onlink_route(IpNet::from(vip), "h0").unwrap();
        ns.add_neighbour("h0", vip, mac).unwrap();
    }
    ns.run(|| {
        net.balancer.set_probe_interface(Some(&Interface::by_name("h1").unwrap())).unwrap();
        net.balancer.attach(&AttachOptions::new("h1")).unwrap()
    })
}

/// Checks of the backends of one service, and who follows them.
struct Checked {
    net: Arc<Net>,
    service: ServiceAddr,
    checks: HealthChecks<usize>,
    changes: mpsc::Receiver<HealthChange<usize>>,
}

impl Checked {
    fn new(net: &Arc<Net>, service: ServiceAddr) -> Self {
        let (sender, changes) = mpsc::channel();
        let sender = Mutex::new(sender);
        let follower = Arc::clone(net);
        let family6 = service.address.is_ipv6();
        let checks = HealthChecks::new(move |change: HealthChange<usize>| {
            let backend = follower.backend(change.key, family6);
            follower.balancer.set_health(service, backend, change.health).unwrap();
            // At the end of the test, nobody listens any more.
            let _ = sender.lock().unwrap().send(change);
        });
        for number in 0..BACKENDS {
            let source = net.balancer.probe_source(service, net.backend(number, family6), own(family6)).unwrap();
            let check = HealthCheck::http(SocketAddr::new(service.address, 80), "/");
            let check = check.source(source).interval(pace()).timeout(TIMEOUT);
            net.balancer_ns.run(|| checks.insert(number, check)).unwrap();
        }
        Self { net: Arc::clone(net), service, checks, changes }
    }

    fn next(&self) -> (usize, Health) {
        let change = self.changes.recv_timeout(patience()).expect("a change in time");
        (change.key, change.health)
    }

    fn state(&self, number: usize) -> BackendState {
        let address = self.net.backend(number, self.service.address.is_ipv6());
        let backends = self.net.balancer.backends(self.service).unwrap();
        backends.iter().find(|entry| entry.address == address).unwrap().state
    }
}

/// Whether this is a SYN from a port for the virtual address, as a backend gets it.
fn is_syn(frame: &[u8], vip: IpAddr, port: u16) -> bool {
    let (destination, segment) = match vip {
        IpAddr::V4(ip) => (frame.get(30..34) == Some(&ip.octets()[..]), 34),
        IpAddr::V6(ip) => (frame.get(38..54) == Some(&ip.octets()[..]), 54),
    };
    destination
        && frame.get(segment..segment + 2) == Some(&port.to_be_bytes()[..])
        && frame.get(segment + 13).is_some_and(|flags| flags & 0x12 == 0x02)
}

/// Says something on each connection, which comes back.
fn converse(streams: &mut [TcpStream]) {
    for (number, stream) in streams.iter_mut().enumerate() {
        let word = (number as u32).to_be_bytes();
        let mut back = [0; 4];
        let said = stream.write_all(&word).and_then(|()| stream.read_exact(&mut back));
        assert!(said.is_ok() && back == word, "connection {number}: {said:?}");
    }
}

#[test]
fn an_l2_backend_without_its_virtual_address_is_out_and_returns() {
    both_families(Way::L2);
}

#[test]
fn an_ipip_backend_without_its_virtual_address_is_out_and_returns() {
    both_families(Way::IpIp(1540));
}

#[test]
fn a_backend_of_the_other_family_without_its_virtual_address_is_out_and_returns() {
    both_families(Way::Crossed(1540));
}

fn both_families(way: Way) {
    let net = Arc::new(Net::new(way, BACKENDS, &DsrConfig::default().services(4).flows(1 << 14)));
    let _probes = probe_pair(&net);
    for family6 in [false, true] {
        one_failure(&net, family6);
    }
}

fn one_failure(net: &Arc<Net>, family6: bool) {
    let vip = Net::vip(family6);
    let web = net.serve(80, family6, &[(0, 1), (1, 1), (2, 1)]);
    let echo = net.serve(7, family6, &[(0, 1), (1, 1), (2, 1)]);
    let _pages = net.pages(family6);
    let echo_address = SocketAddr::new(vip, 7);
    let _echoes: Vec<_> = net.backends.iter().map(|ns| TcpEcho::start(ns, echo_address).unwrap()).collect();
    let probed = || net.balancer.stats().unwrap().reason(Reason::Probed).packets;
    let at_first = probed();

    let checked = Checked::new(net, web);
    let mut up: Vec<_> = (0..BACKENDS).map(|_| checked.next()).collect();
    up.sort_unstable_by_key(|(number, _)| *number);
    assert_eq!(up, [(0, Health::Up), (1, Health::Up), (2, Health::Up)]);
    assert!(probed() >= at_first + 3 * 4, "each probe is a SYN, an ACK, a request and a RST at least");
    let flows = net.balancer.service(web).unwrap().stats.new_flows;
    assert_eq!(flows, 0, "probes are no flows");

    // Connections of another service through the same backends, which nobody changes.
    let mut streams: Vec<TcpStream> = net.client.run(|| {
        let open = |_| {
            let stream = TcpStream::connect(echo_address).unwrap();
            stream.set_read_timeout(Some(patience())).unwrap();
            stream
        };
        (0..times(30, 200, 6)).map(open).collect()
    });
    converse(&mut streams);
    let count = times(200, 2000, 10);
    let fetch = |count: usize| {
        let mut got = [0; BACKENDS];
        (0..count).for_each(|_| got[net.fetch(family6).0] += 1);
        got
    };
    assert!(is_emulated() || fetch(60).iter().all(|got| *got > 0), "all backends serve");

    let backend = &net.backends[FAILING];
    let source = checked.checks.iter().find(|(number, ..)| *number == FAILING).unwrap().1.source.unwrap();
    let seen = PacketSocket::open(backend, "eth0").unwrap();
    backend.remove_address("lo", IpNet::from(vip)).unwrap();
    assert_eq!(checked.next(), (FAILING, Health::Down));
    let next_syn = || seen.recv_matching(Duration::ZERO, |frame| is_syn(frame, vip, source.port())).unwrap();
    let probes = std::iter::from_fn(next_syn).count();
    // How many it takes is the business of tests/health.rs: a busy machine adds some that time out, or come later.
    assert!(probes > 0, "no probe for the virtual address came to the backend");
    assert_eq!(checked.state(FAILING), BackendState::Draining);
    let got = fetch(count);
    assert_eq!(got[FAILING], 0, "{got:?}: and none has failed");
    net.backends[FAILING].add_address("lo", IpNet::from(vip)).unwrap();
    assert_eq!(checked.next(), (FAILING, Health::Up));
    assert_eq!(checked.state(FAILING), BackendState::Active);
    converse(&mut streams);
    let got = fetch(times(60, 600, 10));
    assert!(is_emulated() || got.iter().all(|got| *got > 0), "{got:?}: it serves again");
    let others = checked.changes.try_recv();
    assert!(others.is_err(), "no other backend was suspected: {others:?}");

    let not_probes = net.balancer.stats().unwrap().reason(Reason::NotAProbe).packets;
    assert_eq!(not_probes, 0, "nothing else goes that way");
    drop(checked);
    net.balancer_ns.run(|| {
        net.balancer.remove_service(web).unwrap();
        net.balancer.remove_service(echo).unwrap();
    });
}

#[test]
fn flows_of_other_backends_do_not_notice() {
    let net = Arc::new(Net::new(Way::L2, BACKENDS, &DsrConfig::default().services(4).flows(1 << 14)));
    let _probes = probe_pair(&net);
    let service = net.serve(80, false, &[(0, 1), (1, 1), (2, 1)]);
    let address = SocketAddr::new(Net::vip(false), 80);
    let mut servers: Vec<_> = net.backends.iter().map(|ns| TcpEcho::start(ns, address).unwrap()).collect();
    let checks = {
        let net = Arc::clone(&net);
        HealthChecks::new(move |change: HealthChange<usize>| {
            net.balancer.set_health(service, net.backend(change.key, false), change.health).unwrap();
        })
    };
    for number in 0..BACKENDS {
        let source = net.balancer.probe_source(service, net.backend(number, false), own(false)).unwrap();
        let check = HealthCheck::tcp(address).source(source).interval(pace() / 5).timeout(TIMEOUT);
        net.balancer_ns.run(|| checks.insert(number, check)).unwrap();
    }
    // What the checks found, and that the callback has told the balancer so.
    let wait_for = |health| {
        let end = Instant::now() + patience();
        let failing = net.backend(FAILING, false);
        let is_told = || {
            let list = net.balancer.backends(service).unwrap();
            let entry = list.iter().find(|entry| entry.address == failing).unwrap();
            (entry.state == BackendState::Active) == (health == Health::Up)
        };
        while checks.get(&FAILING) != Some(health) || !is_told() {
            assert!(Instant::now() < end, "not {health} in time");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    wait_for(Health::Up);
    let mut streams: Vec<TcpStream> = net.client.run(|| {
        let open = |_| {
            let stream = TcpStream::connect(address).unwrap();
            stream.set_read_timeout(Some(patience())).unwrap();
            stream
        };
        (0..times(60, 600, 9)).map(open).collect()
    });
    converse(&mut streams);
    // This time the server goes, with the connections that it has.
    let failing = servers.remove(FAILING);
    let peers = failing.peers();
    drop(failing);
    let is_gone = |stream: &TcpStream| peers.contains(&stream.local_addr().unwrap());
    streams.retain(|stream| !is_gone(stream));
    assert!(!streams.is_empty());
    wait_for(Health::Down);
    converse(&mut streams);
    for _ in 0..times(200, 2000, 10) {
        let stream = net.client.run(|| TcpStream::connect_timeout(&address, patience())).unwrap();
        streams.push(stream);
    }
    converse(&mut streams);
    servers.insert(FAILING, TcpEcho::start(&net.backends[FAILING], address).unwrap());
    wait_for(Health::Up);
    converse(&mut streams);
}

#[test]
fn a_host_forwards_nobody_to_the_way_of_probes() {
    let net = Net::new(Way::L2, 1, &DsrConfig::default().services(4).flows(1 << 14));
    let _probes = probe_pair(&net);
    for family6 in [false, true] {
        let service = net.serve(80, family6, &[(0, 1)]);
        let port = net.balancer.probe_source(service, net.backend(0, family6), own(family6)).unwrap().port();
        // A port on the backend that is no service, from the port that probes of this backend have.
        let hidden = SocketAddr::new(Net::vip(family6), 9000);
        let server = TcpEcho::start(&net.backends[0], hidden).unwrap();
        let before = net.balancer.stats().unwrap().reason(Reason::NotAProbe).packets;
        let outcome = net.client.run(|| {
            let domain = socket2::Domain::for_address(hidden);
            let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None).unwrap();
            if family6 {
                socket.set_unicast_hops_v6(255).unwrap()
            } else {
                socket.set_ttl_v4(255).unwrap()
            };
            socket.bind(&SocketAddr::new(net.client_ip(family6), port).into()).unwrap();
            socket.connect_timeout(&hidden.into(), Duration::from_millis(300))
        });
        assert!(outcome.is_err());
        assert_eq!(server.connections(), 0);
        let after = net.balancer.stats().unwrap().reason(Reason::NotAProbe).packets;
        assert!(after > before, "the host's stack has sent it there, and it was dropped");
    }
}

#[test]
fn a_backend_whose_answers_were_lost_returns_with_the_next_probes() {
    let net = Net::new(Way::L2, 1, &DsrConfig::default().services(4).flows(1 << 14));
    let _probes = probe_pair(&net);
    for family6 in [false, true] {
        let service = net.serve(80, family6, &[(0, 1)]);
        let address = SocketAddr::new(Net::vip(family6), 80);
        let _server = TcpEcho::start(&net.backends[0], address).unwrap();
        let own = own(family6);
        let source = net.balancer.probe_source(service, net.backend(0, family6), own).unwrap();
        let (sender, changes) = mpsc::channel();
        let sender = Mutex::new(sender);
        let checks = HealthChecks::new(move |change: HealthChange<()>| {
            sender.lock().unwrap().send(change.health).unwrap_or_default()
        });
        let check = HealthCheck::tcp(address).source(source).interval(pace()).timeout(TIMEOUT);
        net.balancer_ns.run(|| checks.insert((), check)).unwrap();
        assert_eq!(changes.recv_timeout(patience()), Ok(Health::Up));
        // Its SYN-ACKs go astray: it is left with half of a connection from the port of the probes.
        net.backends[0].add_neighbour("eth0", own, [2, 0, 0, 0, 0xdd, 0xdd]).unwrap();
        assert_eq!(changes.recv_timeout(patience()), Ok(Health::Down));
        net.backends[0].add_neighbour("eth0", own, net.balancer_ns.mac("eth0").unwrap()).unwrap();
        assert_eq!(changes.recv_timeout(patience()), Ok(Health::Up), "the host rejects what is left of it");
    }
}
