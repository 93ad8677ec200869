//! The NAT balancer between real hosts: every byte to the right peer, with paths of several MTUs, many connections at
//! once and one after the other.

mod common;

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use common::nat::{ip, service};
use xdpkit::{
    AttachOptions, Attachment, NatBalancer, NatConfig, NatMode, NatService, NatTimeouts, Reason, ServiceAddr,
    Stage as _,
};
use xdpkit_lab::{
    Namespace,
    topology::Nat,
    traffic::{TcpEcho, UdpEcho, tcp_echo, udp_echo},
    veth,
};

/// Virtual addresses that exist nowhere: the balancer is everybody's default gateway.
const VIPS: [&str; 2] = ["198.51.100.10", "2001:db8:99::10"];
const PATIENCE: Duration = Duration::from_secs(20);

fn attach(lab: &Nat, balancer: &NatBalancer) -> Vec<Attachment> {
    ["eth0", "eth1"]
        .into_iter()
        .map(|name| lab.balancer.run(|| balancer.attach(&AttachOptions::new(name)).unwrap()))
        .collect()
}

fn backends(lab: &Nat, ipv6: bool, port: u16) -> Vec<SocketAddr> {
    lab.backend_addrs
        .iter()
        .map(|host| (if ipv6 { host.v6.into() } else { IpAddr::from(host.v4) }, port).into())
        .collect()
}

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
            let payload = bytes(common::times(2_000_000, 100_000_000, 200_000));
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
        let dropped: Vec<_> = stats.reasons.iter().filter(|line| line.action == xdpkit::Action::Drop).collect();
        assert!(dropped.is_empty(), "{dropped:?}");
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
                // Until the neighbours are known, packets go by the host's stack, which tells clients by itself.
                let first = tcp_echo(&chain.client, (vip, 80).into(), b"first", Duration::from_secs(60));
                assert_eq!(first.unwrap(), b"first");
                let payload = bytes(common::times(500_000, 10_000_000, 100_000));
                let back = tcp_echo(&chain.client, (vip, 80).into(), &payload, Duration::from_secs(60));
                let stats = balancer.stats().unwrap();
                let back = back.unwrap_or_else(|error| panic!("{narrow} {mode:?} {vip}: {error}: {:?}", stats.reasons));
                assert!(back == payload, "{narrow} {mode:?} {vip}");
            }
            let stats = balancer.stats().unwrap();
            let told = if narrow == 2 || narrow == 3 { Reason::TooBigAnswered } else { Reason::ErrorForwarded };
            // Linux remembers what it was told, so the second mode may need no telling.
            assert!(mode != NatMode::Full || stats.reason(told).packets > 0, "{narrow}: {:?}", stats.reasons);
        }
    }
}

/// Accepts connections one after the other and answers each line with its own name, the line, and who sent it, until told
/// to stop. All stay open; `rounds` lines are answered on each.
fn serve(
    ns: &Namespace,
    address: SocketAddr,
    connections: Arc<std::sync::atomic::AtomicUsize>,
) -> thread::JoinHandle<Vec<TcpStream>> {
    let listener = ns.run(|| TcpListener::bind(address).unwrap());
    listener.set_nonblocking(true).unwrap();
    thread::spawn(move || {
        let mut open = Vec::new();
        while connections.load(Ordering::SeqCst) > 0 {
            match listener.accept() {
                Ok((mut stream, _)) => {
                    stream.set_nonblocking(false).unwrap();
                    stream.set_read_timeout(Some(PATIENCE)).unwrap();
                    answer(&mut stream, address);
                    open.push(stream);
                    connections.fetch_sub(1, Ordering::SeqCst);
                }
                Err(_) => thread::sleep(Duration::from_micros(200)),
            }
        }
        open
    })
}

fn answer(stream: &mut TcpStream, me: SocketAddr) {
    let mut line = [0; 64];
    stream.read_exact(&mut line).unwrap();
    stream.write_all(&line).unwrap();
    let mut name = me.to_string().into_bytes();
    name.resize(64, b' ');
    stream.write_all(&name).unwrap();
}

fn ask(stream: &mut TcpStream, text: &str) -> String {
    let mut line = text.as_bytes().to_vec();
    line.resize(64, b'.');
    stream.write_all(&line).unwrap();
    let mut back = [0; 128];
    stream.read_exact(&mut back).unwrap();
    assert!(back[..64] == line, "sent {text:?}, got {:?}", String::from_utf8_lossy(&back[..64]));
    String::from_utf8_lossy(&back[64..]).trim().to_owned()
}

#[test]
fn l13_many_clients_that_share_ports_talk_to_the_right_backends() {
    let clients = common::times(16, 64, 4);
    let flows = common::times(1_600, 50_000, 80);
    // Both ends of each are open here.
    let flows = flows.min((common::raise_open_files() - 500) / 2);
    println!("{flows} connections at once");
    let lab = Nat::new(clients, 10).unwrap();
    let balancer = NatBalancer::load(&NatConfig::default().capacity(2 * flows as u32)).unwrap();
    let _attached = attach(&lab, &balancer);
    let vip = ip(VIPS[0]);
    let each = flows / clients;
    let left = Arc::new(std::sync::atomic::AtomicUsize::new(each * clients));
    let backends = backends(&lab, false, 8080);
    let servers: Vec<_> =
        lab.backends.iter().zip(&backends).map(|(ns, at)| serve(ns, *at, Arc::clone(&left))).collect();
    balancer.insert(ServiceAddr::tcp(vip, 80), &NatService::new(backends.iter().copied())).unwrap();

    let askers: Vec<_> = lab
        .clients
        .iter()
        .enumerate()
        .map(|(number, ns)| {
            // All use the same ports, and hardly more than they need.
            ns.sysctl("net.ipv4.ip_local_port_range", &format!("20000 {}", 20_000 + each + each / 4 + 10)).unwrap();
            let ns = ns.clone();
            ns.clone().spawn(move || {
                let open = |n: usize| {
                    let mut stream = TcpStream::connect_timeout(&(vip, 80).into(), PATIENCE).unwrap();
                    stream.set_read_timeout(Some(PATIENCE)).unwrap();
                    let backend = ask(&mut stream, &format!("client {number} connection {n}"));
                    (stream, backend)
                };
                (0..each).map(open).collect::<Vec<_>>()
            })
        })
        .collect();
    let mut connections: Vec<Vec<(TcpStream, String)>> =
        askers.into_iter().map(|asker| asker.join().unwrap()).collect();
    let mut open: Vec<Vec<TcpStream>> = servers.into_iter().map(|server| server.join().unwrap()).collect();

    // All are open now: who the balancer says talks to whom does so, and no two look the same to a backend.
    let listed = balancer.connections().unwrap();
    assert_eq!(listed.len(), each * clients);
    let by_client: BTreeMap<SocketAddr, SocketAddr> =
        listed.iter().map(|found| (found.client, found.backend)).collect();
    assert_eq!(by_client.len(), listed.len());
    let pairs: std::collections::BTreeSet<_> = listed.iter().map(|found| (found.source, found.backend)).collect();
    assert_eq!(pairs.len(), listed.len());
    for (stream, backend) in connections.iter().flatten() {
        assert_eq!(by_client[&stream.local_addr().unwrap()].to_string(), *backend);
    }
    let ports: std::collections::BTreeSet<u16> = by_client.keys().map(SocketAddr::port).collect();
    assert!(ports.len() < 2 * each + 20, "ports are shared");

    // And once more on each, all at the same time.
    let answering: Vec<_> = open
        .iter_mut()
        .zip(&backends)
        .map(|(streams, at)| {
            let (mut streams, at) = (std::mem::take(streams), *at);
            thread::spawn(move || {
                streams.iter_mut().for_each(|stream| answer(stream, at));
                streams
            })
        })
        .collect();
    for (number, streams) in connections.iter_mut().enumerate() {
        for (n, (stream, _)) in streams.iter_mut().enumerate() {
            let mut line = format!("again {number} {n}").into_bytes();
            line.resize(64, b'.');
            stream.write_all(&line).unwrap();
        }
    }
    for (number, streams) in connections.iter_mut().enumerate() {
        for (n, (stream, backend)) in streams.iter_mut().enumerate() {
            let mut back = [0; 128];
            stream.read_exact(&mut back).unwrap();
            assert!(back.starts_with(format!("again {number} {n}.").as_bytes()));
            assert_eq!(String::from_utf8_lossy(&back[64..]).trim(), *backend);
        }
    }
    let _served: Vec<_> = answering.into_iter().map(|server| server.join().unwrap()).collect();
    let stats = balancer.stats().unwrap();
    assert_eq!(stats.dropped().packets, 0, "{:?}", stats.reasons);
}

#[test]
fn connections_come_and_go_and_leave_nothing_behind() {
    let total = common::times(4_000, 100_000, 100);
    let clients = 8;
    let lab = Nat::new(clients, 3).unwrap();
    let mut timeouts = NatTimeouts::default();
    timeouts.time_wait = Duration::from_secs(1);
    timeouts.reset = Duration::from_secs(1);
    let balancer = NatBalancer::load(&NatConfig::default().timeouts(timeouts)).unwrap();
    let _attached = attach(&lab, &balancer);
    let vip = ip(VIPS[0]);
    let backends = backends(&lab, false, 8080);
    let stop = Arc::new(AtomicBool::new(false));
    let servers: Vec<_> = lab
        .backends
        .iter()
        .zip(&backends)
        .map(|(ns, at)| {
            let listener = ns.run(|| TcpListener::bind(*at).unwrap());
            listener.set_nonblocking(true).unwrap();
            let (stop, at) = (Arc::clone(&stop), *at);
            thread::spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    match listener.accept() {
                        Ok((mut stream, _)) => {
                            stream.set_nonblocking(false).unwrap();
                            answer(&mut stream, at);
                        }
                        Err(_) => thread::sleep(Duration::from_micros(100)),
                    }
                }
            })
        })
        .collect();
    balancer.insert(ServiceAddr::tcp(vip, 80), &NatService::new(backends)).unwrap();
    let workers: Vec<_> = lab
        .clients
        .iter()
        .enumerate()
        .map(|(number, ns)| {
            ns.spawn(move || {
                for n in 0..total / clients {
                    let mut stream = TcpStream::connect_timeout(&(vip, 80).into(), PATIENCE)
                        .unwrap_or_else(|error| panic!("client {number}, connection {n}: {error}"));
                    stream.set_read_timeout(Some(PATIENCE)).unwrap();
                    ask(&mut stream, &format!("client {number} connection {n}"));
                }
            })
        })
        .collect();
    workers.into_iter().for_each(|worker| worker.join().unwrap());
    stop.store(true, Ordering::SeqCst);
    servers.into_iter().for_each(|server| server.join().unwrap());

    let stats = balancer.service_stats(&ServiceAddr::tcp(vip, 80)).unwrap();
    assert_eq!((stats.refused, stats.no_backend), (0, 0));
    assert!(stats.opened >= (total / clients * clients) as u64 / 2, "{stats:?}");
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end && !balancer.is_empty().unwrap() {
        thread::sleep(Duration::from_millis(500));
        balancer.collect().unwrap();
    }
    assert!(balancer.is_empty().unwrap(), "{:?}", balancer.counts().unwrap());
    let active: u64 = balancer.backends(&service("tcp/198.51.100.10:80")).unwrap().iter().map(|b| b.stats.active).sum();
    assert_eq!(active, 0);
}
