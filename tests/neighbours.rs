//! Established connections through the balancers while the kernel forgets the neighbours that they lead to, and while these
//! are silent: none breaks, new ones come about afterwards, and no host ever answers with RST. Traps L11 and L19.

mod common;

use std::{
    any::Any,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    rc::Rc,
    thread,
    time::Duration,
};

use common::{
    dsr_net::{Net as DsrNet, VIP4, VIP6, Way},
    is_emulated, nat, times,
};
use xdpkit::{
    AttachOptions, DsrConfig, NatBalancer, NatConfig, NatMode, NatService, Reason, ServiceAddr, Stage as _, Stats,
};
use xdpkit_lab::{
    Namespace, PacketSocket,
    frame::{Frame, tcp},
    topology::{DsrL2, Nat},
    traffic::TcpEcho,
};

/// The router of the balancer's link, where clients are not on it.
const GATEWAY: [&str; 2] = ["192.168.178.1", "2001:db8:b::1"];

fn patience() -> Duration {
    Duration::from_secs(if is_emulated() { 120 } else { 30 })
}

/// A balancer at work, with an echo behind each target.
struct Net {
    client: Namespace,
    /// All whose TCP might answer what is not for it.
    hosts: Vec<Namespace>,
    /// Whom the balancer sends to, and the interface where they are.
    neighbours: Vec<(Namespace, &'static str, IpAddr)>,
    /// The ports of the switch where the backends are.
    cables: Vec<(Namespace, String)>,
    targets: Vec<SocketAddr>,
    stats: Box<dyn Fn() -> Stats>,
    _servers: Vec<TcpEcho>,
    _rest: Box<dyn Any>,
}

/// Services of these modes at these addresses, with an echo on each backend.
fn nat_services(
    balancer: &NatBalancer,
    vips: &[IpAddr],
    backends: &[Namespace],
    backend_addrs: &[[IpAddr; 2]],
    modes: &[NatMode],
) -> (Vec<SocketAddr>, Vec<TcpEcho>) {
    let (mut targets, mut servers) = (Vec::new(), Vec::new());
    for (number, vip) in vips.iter().enumerate() {
        for (mode, port) in modes.iter().zip(8000 + 100 * number as u16..) {
            let list: Vec<_> =
                backend_addrs.iter().map(|host| SocketAddr::new(host[usize::from(vip.is_ipv6())], port)).collect();
            servers.extend(backends.iter().zip(&list).map(|(ns, at)| TcpEcho::start(ns, *at).unwrap()));
            balancer.insert(ServiceAddr::tcp(*vip, port), &NatService::new(list).mode(*mode)).unwrap();
            targets.push((*vip, port).into());
        }
    }
    (targets, servers)
}

impl Net {
    /// A NAT balancer between two networks.
    fn nat() -> Self {
        let lab = Nat::new(1, 2).unwrap();
        let balancer = NatBalancer::load(&NatConfig::default()).unwrap();
        let attached = nat::attach(&lab, &balancer);
        let backends: Vec<_> = lab.backend_addrs.iter().map(|host| host.both()).collect();
        let modes = [NatMode::Full, NatMode::Destination];
        // One that is routed to the balancer, and one that its host has itself.
        let vips = [nat::ROUTED_VIPS.map(nat::ip), lab.front_addr.both()].concat();
        let (targets, servers) = nat_services(&balancer, &vips, &lab.backends, &backends, &modes);
        let at = |dev, addresses: Vec<[IpAddr; 2]>| {
            let balancer = lab.balancer.clone();
            addresses.into_iter().flatten().map(move |address| (balancer.clone(), dev, address))
        };
        let clients = lab.client_addrs.iter().map(|host| host.both()).collect();
        Self {
            client: lab.clients[0].clone(),
            hosts: [&lab.backends[..], &[lab.clients[0].clone(), lab.balancer.clone()]].concat(),
            neighbours: at("eth0", clients).chain(at("eth1", backends)).collect(),
            cables: (1..3).map(|port| (lab.switch.clone(), format!("backp{port}"))).collect(),
            targets,
            stats: Box::new(move || balancer.stats().unwrap()),
            _servers: servers,
            _rest: Box::new((lab, attached)),
        }
    }

    /// A NAT balancer with one interface: who comes in leaves by it, too.
    fn nat_on_one_link() -> Self {
        let lab = DsrL2::new(2, VIP4.into(), VIP6.into()).unwrap();
        let balancer = NatBalancer::load(&NatConfig::default()).unwrap();
        let attached = lab.balancer.run(|| balancer.attach(&AttachOptions::new("eth0"))).unwrap();
        let backends: Vec<_> = lab.backend_addrs.iter().map(|host| host.both()).collect();
        // Answers to a client's own address would go past the balancer.
        let own = lab.balancer_addr.both();
        let (targets, servers) = nat_services(&balancer, &own, &lab.backends, &backends, &[NatMode::Full]);
        let known = backends.iter().flatten().copied().chain(GATEWAY.map(nat::ip));
        Self {
            client: lab.client.clone(),
            hosts: [&lab.backends[..], &[lab.client.clone(), lab.gateway.clone(), lab.balancer.clone()]].concat(),
            neighbours: known.map(|address| (lab.balancer.clone(), "eth0", address)).collect(),
            cables: (2..4).map(|port| (lab.switch.clone(), format!("br0p{port}"))).collect(),
            targets,
            stats: Box::new(move || balancer.stats().unwrap()),
            _servers: servers,
            _rest: Box::new((lab, attached)),
        }
    }

    fn dsr(way: Way) -> Self {
        let net = Rc::new(DsrNet::new(way, 2, &DsrConfig::default().services(4).flows(1 << 14)));
        let (mut targets, mut servers) = (Vec::new(), Vec::new());
        for family6 in [false, true] {
            net.serve(7, family6, &[(0, 1), (1, 1)]);
            let target = SocketAddr::new(DsrNet::vip(family6), 7);
            servers.extend(net.backends.iter().map(|ns| TcpEcho::start(ns, target).unwrap()));
            targets.push(target);
        }
        let backends = || net.backend_addrs.iter().flat_map(|host| host.both());
        let mut neighbours: Vec<_> = GATEWAY.map(|address| (net.balancer_ns.clone(), "eth0", nat::ip(address))).into();
        // Behind a tunnel, they are the router's neighbours.
        let (whose, dev, first) =
            if way == Way::L2 { (&net.balancer_ns, "eth0", 2) } else { (&net.gateway, "eth2", 1) };
        neighbours.extend(backends().map(|address| (whose.clone(), dev, address)));
        let routers = [net.client.clone(), net.gateway.clone(), net.balancer_ns.clone()];
        Self {
            client: net.client.clone(),
            hosts: [&net.backends[..], &routers].concat(),
            neighbours,
            cables: (first..first + 2).map(|port| (net.switch.clone(), format!("br0p{port}"))).collect(),
            targets,
            _servers: servers,
            stats: {
                let net = Rc::clone(&net);
                Box::new(move || net.balancer.stats().unwrap())
            },
            _rest: Box::new(net),
        }
    }

    fn connect(&self, target: SocketAddr) -> TcpStream {
        let stream = self.client.run(|| TcpStream::connect_timeout(&target, patience()));
        let stream = stream.unwrap_or_else(|error| panic!("{target}: {error}"));
        stream.set_read_timeout(Some(patience())).unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    }

    /// Connections to each target, to both backends of each most likely.
    fn connections(&self) -> Vec<TcpStream> {
        let mut streams: Vec<_> = (0..4).flat_map(|_| &self.targets).map(|target| self.connect(*target)).collect();
        converse(&mut streams, 0);
        streams
    }

    fn forget_neighbours(&self) {
        for (ns, dev, address) in &self.neighbours {
            ns.forget_neighbour(dev, *address).unwrap();
        }
    }

    fn unresolved(&self) -> u64 {
        (self.stats)().reason(Reason::Unresolved).packets
    }

    fn nobody_sent_a_reset(&self) {
        let sent: Vec<_> = self.hosts.iter().map(|host| (host.name(), host.resets_sent().unwrap())).collect();
        assert!(sent.iter().all(|(_, resets)| *resets == 0), "{sent:?}");
        let stats = (self.stats)();
        assert_eq!(stats.reason(Reason::ResetSent).packets, 0, "{stats:?}");
    }
}

/// Says something on all connections at once, which must come back.
fn converse(streams: &mut [TcpStream], word: u64) {
    let word = word.to_be_bytes();
    for stream in &mut *streams {
        stream.write_all(&word).unwrap();
    }
    for stream in streams {
        let mut back = [0; 8];
        let heard = stream.read_exact(&mut back);
        assert!(heard.is_ok() && back == word, "{stream:?}: {heard:?}, {back:?}");
    }
}

/// Longer than a balancer keeps a way.
const LIFE: Duration = Duration::from_millis(1_100);

fn survive(net: &Net, asks: bool) {
    let mut streams = net.connections();
    let before = net.unresolved();
    for round in 0..times(1, 20, 1) as u64 {
        thread::sleep(LIFE);
        net.forget_neighbours();
        converse(&mut streams, round);
    }
    // Time and again, while they talk.
    for round in 0..times(30, 300, 5) as u64 {
        net.forget_neighbours();
        converse(&mut streams, round);
    }
    assert!(!asks || net.unresolved() > before, "a neighbour was asked for");
    net.nobody_sent_a_reset();

    // Silent for longer than the kernel asks, and then gives up.
    for (switch, port) in &net.cables {
        switch.set_down(port).unwrap();
    }
    thread::sleep(LIFE);
    net.forget_neighbours();
    for stream in &mut streams {
        stream.write_all(&[7; 8]).unwrap();
    }
    thread::sleep(Duration::from_millis(4_500));
    net.nobody_sent_a_reset();
    for (switch, port) in &net.cables {
        switch.set_up(port).unwrap();
    }
    for stream in &mut streams {
        let mut back = [0; 8];
        let heard = stream.read_exact(&mut back);
        assert!(heard.is_ok() && back == [7; 8], "{stream:?}: {heard:?}, {back:?}");
    }
    streams.extend(net.connections());
    converse(&mut streams, 1);
    net.nobody_sent_a_reset();
}

#[test]
fn l11_translated_connections_survive_the_loss_of_neighbours() {
    survive(&Net::nat(), true);
}

#[test]
fn l11_translated_connections_on_one_link_survive_the_loss_of_neighbours() {
    survive(&Net::nat_on_one_link(), true);
}

#[test]
fn l11_forwarded_connections_survive_the_loss_of_neighbours() {
    survive(&Net::dsr(Way::L2), true);
}

#[test]
fn l11_tunnelled_connections_survive_the_loss_of_neighbours() {
    // The client's packets come from the only neighbour that the balancer has: it is known again at once.
    survive(&Net::dsr(Way::IpIp(1540)), false);
}

#[test]
fn l19_a_packet_at_the_end_of_its_hops_resets_nothing() {
    let net = Net::nat();
    let mut streams = net.connections();
    let wire = PacketSocket::open(&net.client, "eth0").unwrap();
    let macs = (net.client.mac("eth0").unwrap(), net.hosts[3].mac("eth0").unwrap());
    for stream in &streams {
        let (own, peer) = (stream.local_addr().unwrap(), stream.peer_addr().unwrap());
        for ttl in [0, 1] {
            let frame = Frame::tcp(own, peer).flags(tcp::ACK).ttl(ttl).macs(macs.0, macs.1).build();
            wire.send(&frame).unwrap();
        }
    }
    converse(&mut streams, 9);
    net.nobody_sent_a_reset();
    let stats = (net.stats)();
    assert_eq!(stats.reason(Reason::HopLimit).packets, 2 * streams.len() as u64, "{stats:?}");
}
