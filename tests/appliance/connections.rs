//! Live connections through an appliance's balancers, of both kinds and families, while it is killed, upgraded and reloaded:
//! none breaks, new ones come about all the time, and nothing from a denied source gets through.
#![cfg(all(feature = "serde", feature = "health", feature = "pcapng"))]

use std::{
    fmt::Write as _,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crate::common::{is_emulated, times};
use crate::process::{Place, Running};
use xdpkit_lab::{Namespace, PacketSocket, bpffs::BpfFs, frame::Frame, frame::tcp, topology::DsrL2, traffic::TcpEcho};

/// Connections that last, of each kind and family.
const LASTING: usize = 8;
const CHAIN: [&str; 4] = ["edge", "limits", "direct", "translated"];
/// On the client's link, so that the gateway forwards them.
const DENIED: [&str; 2] = ["10.0.0.66", "2001:db8:a::66"];

fn patience() -> Duration {
    Duration::from_secs(if is_emulated() { 120 } else { 60 })
}

/// The L2 tutorial's network with an echo behind both balancers, and the addresses that clients connect to.
struct Net {
    lab: DsrL2,
    _servers: Vec<TcpEcho>,
    targets: Vec<SocketAddr>,
}

impl Net {
    fn new() -> Self {
        let lab = DsrL2::new(2, "192.168.178.100".parse().unwrap(), "2001:db8:b::100".parse().unwrap()).unwrap();
        let mut servers = Vec::new();
        for (backend, own) in lab.backends.iter().zip(&lab.backend_addrs) {
            for (vip, own) in lab.vip.both().into_iter().zip(own.both()) {
                servers.push(TcpEcho::start(backend, SocketAddr::new(vip, 7)).unwrap());
                servers.push(TcpEcho::start(backend, SocketAddr::new(own, 9090)).unwrap());
            }
        }
        let direct = lab.vip.both().map(|vip| SocketAddr::new(vip, 7));
        let translated = lab.balancer_addr.both().map(|own| SocketAddr::new(own, 8080));
        lab.backends.iter().for_each(|backend| backend.steer_flows("eth0").unwrap());
        Self { targets: [direct, translated].concat(), _servers: servers, lab }
    }

    /// A file with these functions in the chain, in this order, and the backends with these weights.
    fn file(&self, chain: &[&str], weights: &[u32]) -> String {
        let mut text = format!(
            "
[interface.eth0]
chain = {chain:?}
[firewall.edge]
deny = {DENIED:?}
[rate_limiter.limits]
settings.limits = {{ tcp = '1000000/s' }}
[dsr_balancer.direct]
settings.table_size = 1021
[nat_balancer.translated]
settings.capacity = 65536
settings.table_size = 1021
"
        );
        for family in 0..2 {
            let list = |port: &str| {
                let name = |number: usize| match (self.lab.backend_addrs[number].both()[family], port) {
                    (own, "") => own.to_string(),
                    (IpAddr::V6(own), port) => format!("[{own}]{port}"),
                    (own, port) => format!("{own}{port}"),
                };
                let entry = |(number, weight)| format!("'{}' = {weight}", name(number));
                let list: Vec<_> = weights.iter().enumerate().map(entry).collect();
                list.join(", ")
            };
            let [direct, translated] = [self.targets[family], self.targets[2 + family]];
            write!(
                text,
                "[[dsr_balancer.direct.service]]\naddress = 'tcp/{direct}'\nbackends = {{ {} }}\n\
                 [[nat_balancer.translated.service]]\naddress = 'tcp/{translated}'\nbackends = {{ {} }}\n",
                list(""),
                list(":9090")
            )
            .unwrap();
        }
        text
    }

    fn usual_file(&self) -> String {
        self.file(&CHAIN, &[1, 1])
    }
}

/// Says something on a connection, which must come back.
fn converse(stream: &mut TcpStream, word: u64) {
    let (word, mut back) = (word.to_be_bytes(), [0; 8]);
    let (peer, own) = (stream.peer_addr(), stream.local_addr());
    let said = stream.write_all(&word).and_then(|()| stream.read_exact(&mut back));
    assert!(said.is_ok() && back == word, "{own:?} to {peer:?}: {said:?}, {back:?}");
}

fn connect(to: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect_timeout(&to, patience()).unwrap_or_else(|error| panic!("{to}: {error}"));
    stream.set_read_timeout(Some(patience())).unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// Clients at work: connections that last, and in each round a new one of each kind; and somebody who is denied.
struct Clients {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: JoinHandle<u64>,
    /// Sees what comes to each backend.
    seen: Vec<PacketSocket>,
    hosts: Vec<Namespace>,
}

impl Clients {
    fn start(net: &Net) -> Self {
        let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let seen = net.lab.backends.iter().map(|backend| PacketSocket::open(backend, "eth0").unwrap()).collect();
        let denied = PacketSocket::open(&net.lab.client, "eth0").unwrap();
        let macs = (net.lab.client.mac("eth0").unwrap(), net.lab.gateway.mac("eth0").unwrap());
        let targets = net.targets.clone();
        let (stopping, counting) = (Arc::clone(&stop), Arc::clone(&rounds));
        let thread = net.lab.client.spawn(move || {
            let mut lasting: Vec<_> =
                (0..LASTING).flat_map(|_| targets.clone()).map(|target| (connect(target), 0)).collect();
            let mut sent = 0;
            let mut round = 0;
            while !stopping.load(Ordering::Relaxed) {
                round += 1;
                for target in &targets {
                    let from = SocketAddr::new(DENIED[usize::from(target.is_ipv6())].parse().unwrap(), 4000);
                    denied.send(&Frame::tcp(from, *target).flags(tcp::SYN).macs(macs.0, macs.1).build()).unwrap();
                    sent += 1;
                }
                for (stream, said) in &mut lasting {
                    *said += 1;
                    converse(stream, *said);
                }
                for target in &targets {
                    converse(&mut connect(*target), round);
                }
                counting.store(round, Ordering::Relaxed);
            }
            sent
        });
        // The backends first.
        let mut hosts = net.lab.backends.clone();
        hosts.extend([&net.lab.client, &net.lab.gateway, &net.lab.balancer].map(Namespace::clone));
        let clients = Self { stop, rounds, thread, seen, hosts };
        clients.go_on();
        clients
    }

    /// None of the packets that came to the backends since the last look (or as many of them as are kept) is of a denied
    /// source; that each was dropped, the counter tells in the end.
    fn nothing_denied_came(&self) {
        for seen in &self.seen {
            let denied = |frame: &[u8]| {
                let v4: std::net::Ipv4Addr = DENIED[0].parse().unwrap();
                let v6: std::net::Ipv6Addr = DENIED[1].parse().unwrap();
                frame.get(26..30) == Some(&v4.octets()[..]) || frame.get(22..38) == Some(&v6.octets()[..])
            };
            assert_eq!(seen.recv_matching(Duration::ZERO, denied).unwrap(), None, "a denied packet came through");
        }
    }

    /// How many RSTs each host has sent.
    fn resets(&self) -> Vec<(&str, u64)> {
        self.hosts.iter().map(|host| (host.name(), host.resets_sent().unwrap())).collect()
    }

    /// Waits until all connections have said something.
    fn go_on(&self) {
        let before = self.rounds.load(Ordering::Relaxed);
        while self.rounds.load(Ordering::Relaxed) < before + 2 {
            assert!(
                !self.thread.is_finished(),
                "a connection broke, its thread has said why; RSTs: {:?}",
                self.resets()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        self.nothing_denied_came();
    }

    /// Ends the traffic. Answers rounds, and packets that were to be denied.
    fn stop(self) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        while !self.thread.is_finished() {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.nothing_denied_came();
        // The client's last ACK of each connection came to the backend that waits for it.
        let (backends, others) = self.hosts.split_at(self.seen.len());
        for backend in backends {
            let end = Instant::now() + patience();
            while last_acks_awaited(backend) != 0 {
                assert!(
                    Instant::now() < end,
                    "{}: {} last ACKs are missing",
                    backend.name(),
                    last_acks_awaited(backend)
                );
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        // Where a FIN was sent again, it was acknowledged again, to a socket that may have gone by then.
        let repeated = |host: &Namespace| host.segments_repeated().unwrap();
        let allowed = |backend: &Namespace| repeated(backend) + others.iter().map(repeated).sum::<u64>();
        let resets = self.resets();
        let unexpected = |host: &Namespace| host.resets_sent().unwrap();
        assert!(others.iter().all(|host| unexpected(host) == 0), "{resets:?}");
        for backend in backends {
            assert!(unexpected(backend) <= allowed(backend), "{resets:?}, {} may be", allowed(backend));
        }
        let sent = self.thread.join().expect("no connection broke");
        (self.rounds.load(Ordering::Relaxed), sent)
    }
}

/// Connections of a host for which it still waits for the last ACK.
fn last_acks_awaited(host: &Namespace) -> usize {
    const LAST_ACK: &str = "09";
    host.run(|| {
        let tables =
            ["tcp", "tcp6"].map(|name| std::fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap());
        let states =
            tables.iter().flat_map(|table| table.lines().skip(1)).filter_map(|line| line.split_whitespace().nth(3));
        states.filter(|state| *state == LAST_ACK).count()
    })
}

fn start(place: &Namespace, file: &Place, pin: &BpfFs) -> Running {
    Running::start(place, &file.file(), &["--pin", pin.path().join("appliance").to_str().unwrap()])
}

/// What is wrong shows only when the backends of other services have been changed. Who is taken out and put back would be
/// another backend.
#[test]
fn a_reload_that_is_undone_breaks_no_connection() {
    let net = Net::new();
    let place = Place::new("undone");
    place.write(&net.usual_file());
    let mut appliance = Running::start(&net.lab.balancer, &place.file(), &[]);
    appliance.expect("ready");
    let clients = Clients::start(&net);
    for wrong in ["tcp/198.51.100.1:80'\nbackends = { '[2001:db8::1]:80' = 1 }", "tcp/198.51.100.1:*'\nbackends = {}"] {
        // The second backend is missing everywhere.
        let text = net.file(&CHAIN, &[1]) + "[[nat_balancer.translated.service]]\naddress = '" + wrong + "\n";
        place.write(&text);
        let error = appliance.reload().unwrap_err();
        assert!(error.starts_with("`translated`: ") && !error.contains("not all went back"), "{error}");
        clients.go_on();
    }
    clients.stop();
    appliance.stop();
}

#[test]
fn connections_survive_kills_and_upgrades() {
    let net = Net::new();
    let (place, pins) = (Place::new("connections"), BpfFs::new().unwrap());
    place.write(&net.usual_file());
    let mut appliance = start(&net.lab.balancer, &place, &pins);
    appliance.expect("ready");
    let clients = Clients::start(&net);
    let rounds = times(2, 100, 1);
    for round in 0..rounds {
        // Killed: nobody is there for a while. Upgraded: the new process takes over while the old one lives.
        appliance.kill();
        clients.go_on();
        let mut next = start(&net.lab.balancer, &place, &pins);
        assert_eq!(next.expect("ready")["adopted"], true, "after kill {round}");
        clients.go_on();
        let old = next;
        appliance = start(&net.lab.balancer, &place, &pins);
        assert_eq!(appliance.expect("ready")["adopted"], true, "upgrade {round}");
        clients.go_on();
        old.kill();
        clients.go_on();
    }
    let (conversations, denied) = clients.stop();
    println!("{rounds} kills and {rounds} upgrades in {conversations} rounds of {} connections", 4 * LASTING);
    let stats = appliance.stop();
    assert_eq!(stats["functions"]["edge"]["reasons"]["denied"].as_u64().unwrap(), denied, "{stats}");
    all_at_work(&stats);
}

#[test]
fn connections_survive_reloads() {
    let net = Net::new();
    let place = Place::new("reconnections");
    let usual = net.usual_file();
    place.write(&usual);
    let mut appliance = Running::start(&net.lab.balancer, &place.file(), &[]);
    appliance.expect("ready");
    let clients = Clients::start(&net);
    let files = [
        (true, net.file(&["limits", "edge", "translated", "direct"], &[1, 1])),
        (true, net.file(&CHAIN, &[5, 1])),
        (false, "not toml".into()),
        // Without weight, a backend gets no new connections, and keeps those that it has.
        (true, net.file(&CHAIN, &[1, 0])),
        (false, usual.replace("'tcp/192.168.178.100:7'", "'tcp/192.168.178.100:77777'")),
        (true, net.file(&CHAIN, &[0, 1])),
        (false, usual.replace("capacity = 65536", "capacity = 8192")),
        (true, net.file(&["edge", "direct", "translated", "limits"], &[2, 1])),
        (false, usual.replace("9090' = 1", "9090' = -1")),
        (true, usual.clone()),
    ];
    let reloads = times(10, 1000, 10);
    for reload in 0..reloads {
        let (valid, text) = &files[reload % files.len()];
        place.write(text);
        let answer = appliance.reload();
        assert_eq!(answer.is_ok(), *valid, "reload {reload}: {answer:?}: {text}");
        clients.go_on();
    }
    // Who is taken out of the file keeps its connections, too.
    place.write(&net.file(&CHAIN, &[1]));
    appliance.reload().unwrap();
    for _ in 0..5 {
        clients.go_on();
    }
    let (conversations, denied) = clients.stop();
    println!("{reloads} reloads in {conversations} rounds of {} connections", 4 * LASTING);
    let stats = appliance.stop();
    assert_eq!(stats["functions"]["edge"]["reasons"]["denied"].as_u64().unwrap(), denied, "{stats}");
    all_at_work(&stats);
}

/// Every function has had its share.
fn all_at_work(stats: &serde_json::Value) {
    for (function, reason) in
        [("limits", "within_limit"), ("direct", "forwarded"), ("translated", "forwarded"), ("translated", "answered")]
    {
        let packets = stats["functions"][function]["reasons"][reason].as_u64().unwrap_or(0);
        assert!(packets > 100, "{function}: {reason}: {stats}");
    }
}
