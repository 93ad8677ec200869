//! The NAT balancer with as many connections as real hosts can have: at once, and one after the other. Traps: L2, L13, L15.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::common::nat::{PATIENCE, ROUTED_VIPS as VIPS, attach, backends, ip};
use xdpkit::{NatBalancer, NatConfig, NatService, NatTimeouts, ServiceAddr, Stage as _};
use xdpkit_lab::{Audit, Namespace, own_open_files, topology::Nat};

/// A client's line, padded.
const LINE: usize = 64;
/// Clients use ports from here on, all the same.
const FIRST_PORT: usize = 20_000;

fn line(text: &str) -> [u8; LINE] {
    let mut line = [b'.'; LINE];
    line[..text.len()].copy_from_slice(text.as_bytes());
    line
}

/// What a backend says to a line: it, and who talks to whom as the backend sees it.
fn reply(line: &[u8], me: SocketAddr, peer: SocketAddr) -> [u8; 3 * LINE] {
    let mut reply = [b' '; 3 * LINE];
    reply[..LINE].copy_from_slice(line);
    let both = format!("{me} {peer}");
    reply[LINE..LINE + both.len()].copy_from_slice(both.as_bytes());
    reply
}

/// The backend's and the translated end of the connection, when what came back begins with what was sent.
fn understood(sent: &[u8], back: &[u8]) -> (SocketAddr, SocketAddr) {
    assert!(
        back.len() == 3 * LINE && back.starts_with(sent),
        "sent {:?}, got {:?}",
        String::from_utf8_lossy(sent),
        String::from_utf8_lossy(back)
    );
    let text = String::from_utf8_lossy(&back[LINE..]);
    let mut both = text.split_whitespace().map(|word| word.parse().unwrap());
    (both.next().unwrap(), both.next().unwrap())
}

fn answer(stream: &mut TcpStream, me: SocketAddr) {
    let mut line = [0; LINE];
    stream.read_exact(&mut line).unwrap();
    let reply = reply(&line, me, stream.peer_addr().unwrap());
    stream.write_all(&reply).unwrap();
}

/// A client's end of a conversation.
enum Conversation {
    Tcp(TcpStream),
    Udp(UdpSocket),
}

impl Conversation {
    /// The n-th of a client. Of ten, one is UDP over each family, and the others are TCP.
    fn open(n: usize) -> Self {
        let vip = ip(VIPS[n % 2]);
        if n % 10 >= 2 {
            let stream = TcpStream::connect_timeout(&(vip, 80).into(), PATIENCE).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.set_nodelay(true).unwrap();
            return Self::Tcp(stream);
        }
        let any: IpAddr = ip(if vip.is_ipv4() { "0.0.0.0" } else { "::" });
        let socket = UdpSocket::bind((any, (FIRST_PORT + n) as u16)).unwrap();
        socket.connect((vip, 53)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self::Udp(socket)
    }

    fn local(&self) -> SocketAddr {
        match self {
            Self::Tcp(stream) => stream.local_addr().unwrap(),
            Self::Udp(socket) => socket.local_addr().unwrap(),
        }
    }

    fn say(&mut self, text: &str) {
        match self {
            Self::Tcp(stream) => stream.write_all(&line(text)).unwrap(),
            Self::Udp(socket) => assert_eq!(socket.send(&line(text)).unwrap(), LINE),
        }
    }

    /// What came back to what was said.
    fn hear(&mut self, text: &str) -> (SocketAddr, SocketAddr) {
        let mut back = [0; 3 * LINE];
        let length = match self {
            Self::Tcp(stream) => stream.read_exact(&mut back).map(|()| back.len()),
            Self::Udp(socket) => socket.recv(&mut back),
        };
        let length = length.unwrap_or_else(|error| panic!("{text}, from {}: {error}", self.local()));
        understood(&line(text), &back[..length])
    }

    /// The last thing that is said, and what came back. Datagrams are said again when there is no answer: the queues of
    /// the lab's interfaces are short, and all talk at once.
    fn say_and_hear(&mut self, text: &str) -> (SocketAddr, SocketAddr) {
        if let Self::Udp(socket) = self {
            socket.set_read_timeout(Some(PATIENCE / 60)).unwrap();
            for _ in 0..60 {
                assert_eq!(socket.send(&line(text)).unwrap(), LINE);
                let mut back = [0; 3 * LINE];
                if let Ok(length) = socket.recv(&mut back) {
                    return understood(&line(text), &back[..length]);
                }
            }
        }
        self.hear(text)
    }
}

/// A conversation as its client tells of it: is it TCP, the client's end, the backend, and whom that sees.
type Told = (bool, SocketAddr, SocketAddr, SocketAddr);

/// A client with so many conversations, all of them open until the end. Tells of them once they are, and again when each
/// has said another line, all at the same time.
fn client(
    ns: &Namespace,
    number: usize,
    flows: usize,
    told: mpsc::Sender<Vec<Told>>,
    go_on: mpsc::Receiver<()>,
) -> JoinHandle<()> {
    ns.spawn(move || {
        own_open_files().unwrap();
        let mut open = Vec::new();
        let mut list = Vec::new();
        for n in 0..flows {
            let text = format!("client {number} conversation {n}");
            let mut conversation = Conversation::open(n);
            conversation.say(&text);
            let (backend, source) = conversation.hear(&text);
            list.push((matches!(conversation, Conversation::Tcp(_)), conversation.local(), backend, source));
            open.push(conversation);
        }
        if told.send(list.clone()).is_err() || go_on.recv().is_err() {
            return;
        }
        let text = |n| format!("again {number} {n}");
        let tcp = |conversation: &Conversation| matches!(conversation, Conversation::Tcp(_));
        for (n, conversation) in open.iter_mut().enumerate().filter(|(_, conversation)| tcp(conversation)) {
            conversation.say(&text(n));
        }
        for (n, conversation) in open.iter_mut().enumerate() {
            let (backend, source) = conversation.say_and_hear(&text(n));
            assert_eq!((list[n].2, list[n].3), (backend, source), "a conversation stays where it is");
        }
        let _ = told.send(list);
        // Nobody hangs up before all have heard.
        let _ = go_on.recv();
    })
}

/// Accepts as many connections as `left` says, together with others, and answers two lines on each: the first at once, the
/// second when all are there.
fn serve_tcp(ns: &Namespace, me: SocketAddr, left: Arc<AtomicUsize>) -> JoinHandle<()> {
    let (ready, is_ready) = mpsc::channel();
    let thread = ns.spawn(move || {
        own_open_files().unwrap();
        let listener = TcpListener::bind(me).unwrap();
        listener.set_nonblocking(true).unwrap();
        ready.send(()).unwrap();
        let mut open = Vec::new();
        while left.load(Ordering::SeqCst) > 0 {
            let Ok((mut stream, _)) = listener.accept() else {
                thread::sleep(Duration::from_millis(1));
                continue;
            };
            stream.set_nonblocking(false).unwrap();
            stream.set_read_timeout(Some(3 * PATIENCE)).unwrap();
            answer(&mut stream, me);
            open.push(stream);
            left.fetch_sub(1, Ordering::SeqCst);
        }
        open.iter_mut().for_each(|stream| answer(stream, me));
        // The clients hang up.
        open.iter_mut().for_each(|stream| drop(stream.read(&mut [0])));
    });
    is_ready.recv().unwrap();
    thread
}

fn serve_udp(ns: &Namespace, me: SocketAddr, stop: Arc<AtomicBool>) -> JoinHandle<()> {
    let socket = ns.run(|| UdpSocket::bind(me).unwrap());
    socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    thread::spawn(move || {
        let mut line = [0; 2 * LINE];
        while !stop.load(Ordering::SeqCst) {
            if let Ok((length, peer)) = socket.recv_from(&mut line) {
                socket.send_to(&reply(&line[..length], me, peer), peer).unwrap();
            }
        }
    })
}

#[test]
fn l13_many_clients_that_share_ports_talk_to_the_right_backends() {
    let clients = crate::common::times(16, 64, 4);
    // No host has more than its tenth, and each has a table of open files for itself.
    // Not too few in an emulated machine, or chance leaves a backend without any.
    let flows = crate::common::times(1_600, 50_000, 400).min(10 * (crate::common::raise_open_files() - 1000));
    let each = flows.div_ceil(clients);
    let lab = Nat::new(clients, 10).unwrap();
    let balancer = NatBalancer::load(&NatConfig::default().capacity(2 * flows as u32)).unwrap();
    let _attached = attach(&lab, &balancer);
    let hosts: Vec<_> = lab.clients.iter().chain(&lab.backends).collect();
    let audits: Vec<_> = hosts.iter().map(|host| Audit::start(host, "eth0").unwrap()).collect();

    let of_tcp = (0..each).filter(|n| n % 10 >= 2).count() * clients;
    let left = Arc::new(AtomicUsize::new(of_tcp));
    let stop = Arc::new(AtomicBool::new(false));
    let mut servers = Vec::new();
    for ipv6 in [false, true] {
        for (ns, at) in lab.backends.iter().zip(backends(&lab, ipv6, 8080)) {
            servers.push(serve_tcp(ns, at, Arc::clone(&left)));
            servers.push(serve_udp(ns, at, Arc::clone(&stop)));
        }
        let with = NatService::new(backends(&lab, ipv6, 8080));
        let vip = ip(VIPS[usize::from(ipv6)]);
        balancer.insert(ServiceAddr::tcp(vip, 80), &with).unwrap();
        balancer.insert(ServiceAddr::udp(vip, 53), &with).unwrap();
    }
    let began = Instant::now();
    let (tell, told) = mpsc::channel();
    let (go_on, threads): (Vec<_>, Vec<_>) = lab
        .clients
        .iter()
        .enumerate()
        .map(|(number, ns)| {
            // All use the same ports, and hardly more than they need.
            let last = FIRST_PORT + each + each / 4 + 10;
            ns.sysctl("net.ipv4.ip_local_port_range", &format!("{FIRST_PORT} {last}")).unwrap();
            let (go_on, may_go_on) = mpsc::channel();
            (go_on, client(ns, number, each, tell.clone(), may_go_on))
        })
        .unzip();
    drop(tell);
    let all = |what: &str| -> Vec<Told> {
        let lists: Vec<_> = (0..clients).map_while(|_| told.recv_timeout(6 * PATIENCE).ok()).collect();
        assert_eq!(lists.len(), clients, "{what}: each client tells: {:?}", balancer.stats().unwrap().reasons);
        lists.concat()
    };
    let conversations = all("opening");
    println!("{} conversations of {clients} clients after {:?}", conversations.len(), began.elapsed());
    assert_eq!(conversations.len(), each * clients);

    // All are open now. Who the balancer says talks to whom does so, and no two look the same to a backend.
    let listed = balancer.connections().unwrap();
    assert_eq!(listed.len(), conversations.len());
    let is_tcp = |addr: &ServiceAddr| addr.protocol == xdpkit::ServiceProtocol::Tcp;
    let known: BTreeMap<(bool, SocketAddr), _> =
        listed.iter().map(|found| ((is_tcp(&found.service), found.client), (found.backend, found.source))).collect();
    for (tcp, client, backend, source) in &conversations {
        assert_eq!(known[&(*tcp, *client)], (*backend, *source), "{client}");
    }
    let seen: BTreeSet<_> = conversations.iter().map(|(tcp, _, backend, source)| (tcp, source, backend)).collect();
    assert_eq!(seen.len(), conversations.len());
    let ports: BTreeSet<u16> = conversations.iter().map(|(_, client, ..)| client.port()).collect();
    assert!(ports.len() < 2 * each + 20, "ports are shared: {}", ports.len());
    let backends: BTreeSet<_> = conversations.iter().map(|(_, _, backend, _)| backend).collect();
    assert_eq!(backends.len(), 20, "10 hosts, by both families");

    // And once more on each, all at the same time.
    go_on.iter().for_each(|go_on| go_on.send(()).unwrap());
    assert_eq!(all("going on").len(), conversations.len());
    println!("all have said two lines after {:?}", began.elapsed());
    let stats = balancer.stats().unwrap();
    assert_eq!(stats.dropped().packets, 0, "{:?}", stats.reasons);
    drop(go_on);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    stop.store(true, Ordering::SeqCst);
    servers.into_iter().for_each(|server| server.join().unwrap());

    // At both ends, every packet of every conversation arrived with the right checksums, and no other.
    let reports: Vec<_> = audits.into_iter().map(|audit| audit.finish().unwrap()).collect();
    for (host, report) in hosts.iter().zip(&reports) {
        assert_eq!(report.lost, 0, "{}", host.name());
        assert_eq!(report.wrong, Vec::<String>::new(), "{}", host.name());
    }
    let (of_clients, of_backends) = reports.split_at(clients);
    let packets = |reports: &[xdpkit_lab::AuditReport]| reports.iter().map(|report| report.right).sum::<usize>();
    println!("{} packets at clients, {} at backends", packets(of_clients), packets(of_backends));
    let wanted = |tcp: &bool, from: SocketAddr, to: SocketAddr| (if *tcp { 6 } else { 17 }, from, to);
    let vip = |tcp: &bool, client: &SocketAddr| {
        SocketAddr::new(ip(VIPS[usize::from(client.is_ipv6())]), if *tcp { 80 } else { 53 })
    };
    let at_clients: BTreeSet<_> = of_clients.iter().flat_map(|report| report.flows.iter().copied()).collect();
    let at_backends: BTreeSet<_> = of_backends.iter().flat_map(|report| report.flows.iter().copied()).collect();
    assert!(
        at_clients == conversations.iter().map(|(tcp, client, ..)| wanted(tcp, vip(tcp, client), *client)).collect(),
        "{} flows at clients",
        at_clients.len()
    );
    assert!(
        at_backends == conversations.iter().map(|(tcp, _, backend, source)| wanted(tcp, *source, *backend)).collect(),
        "{} flows at backends",
        at_backends.len()
    );
}

#[test]
fn connections_come_and_go_and_leave_nothing_behind() {
    let total = crate::common::times(4_000, 100_000, 100);
    let clients = 8;
    let lab = Nat::new(clients, 3).unwrap();
    let mut timeouts = NatTimeouts::default();
    timeouts.time_wait = Duration::from_secs(1);
    timeouts.reset = Duration::from_secs(1);
    let balancer = Arc::new(NatBalancer::load(&NatConfig::default().timeouts(timeouts)).unwrap());
    let _attached = attach(&lab, &balancer);
    let stop = Arc::new(AtomicBool::new(false));
    let mut servers = Vec::new();
    for ipv6 in [false, true] {
        let backends = backends(&lab, ipv6, 8080);
        for (ns, at) in lab.backends.iter().zip(&backends) {
            let listener = ns.run(|| TcpListener::bind(*at).unwrap());
            listener.set_nonblocking(true).unwrap();
            let (stop, at) = (Arc::clone(&stop), *at);
            servers.push(thread::spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    match listener.accept() {
                        Ok((mut stream, _)) => {
                            stream.set_nonblocking(false).unwrap();
                            answer(&mut stream, at);
                        }
                        Err(_) => thread::sleep(Duration::from_micros(200)),
                    }
                }
            }));
        }
        balancer.insert(ServiceAddr::tcp(ip(VIPS[usize::from(ipv6)]), 80), &NatService::new(backends)).unwrap();
    }
    // All the while, the dead are collected and connections are listed, as often as it goes.
    let (collector, stopping) = (Arc::clone(&balancer), Arc::clone(&stop));
    servers.push(thread::spawn(move || {
        while !stopping.load(Ordering::SeqCst) {
            collector.collect().unwrap();
            let listed = collector.connections().unwrap();
            assert!(listed.iter().all(|found| found.source.ip() == found.service.address), "no half-written one");
            thread::sleep(Duration::from_millis(5));
        }
    }));
    let began = Instant::now();
    let workers: Vec<_> = lab
        .clients
        .iter()
        .enumerate()
        .map(|(number, ns)| {
            ns.spawn(move || {
                let mut ports = BTreeSet::new();
                for n in 0..total / clients {
                    let vip = ip(VIPS[number % 2]);
                    let mut stream = TcpStream::connect_timeout(&(vip, 80).into(), PATIENCE)
                        .unwrap_or_else(|error| panic!("client {number}, connection {n}: {error}"));
                    stream.set_read_timeout(Some(PATIENCE)).unwrap();
                    ports.insert(stream.local_addr().unwrap().port());
                    let text = format!("client {number} connection {n}");
                    stream.write_all(&line(&text)).unwrap();
                    let mut back = [0; 3 * LINE];
                    stream.read_exact(&mut back).unwrap();
                    understood(&line(&text), &back);
                }
                ports.len()
            })
        })
        .collect();
    let ports: usize = workers.into_iter().map(|worker| worker.join().unwrap()).sum();
    let total = total / clients * clients;
    println!("{total} connections from {ports} ports in {:?}", began.elapsed());
    stop.store(true, Ordering::SeqCst);
    servers.into_iter().for_each(|server| server.join().unwrap());

    let services = balancer.services();
    let (mut opened, mut active) = (0, 0);
    for service in &services {
        let stats = balancer.service_stats(service).unwrap();
        assert_eq!((stats.refused, stats.no_backend), (0, 0), "{service}");
        opened += stats.opened;
    }
    assert_eq!(opened, total as u64, "each was one of its own, also from a port used before");
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end && !balancer.is_empty().unwrap() {
        thread::sleep(Duration::from_millis(500));
        balancer.collect().unwrap();
    }
    assert!(balancer.is_empty().unwrap(), "{:?}", balancer.counts().unwrap());
    for service in &services {
        active += balancer.backends(service).unwrap().iter().map(|backend| backend.stats.active).sum::<u64>();
    }
    assert_eq!(active, 0);
}
