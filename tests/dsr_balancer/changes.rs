//! Real connections while the list of a DSR balancer's backends changes: neighbours and tunnels, both families, and a flood
//! of SYNs meanwhile. Traps L15 and L16.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use crate::common::{
    dsr_net::{Net, Way},
    is_emulated, times,
};
use xdpkit::{Action, BackendState, DsrConfig, Interface, Stage as _, TestRun};
use xdpkit_lab::{
    frame::{Frame, tcp},
    traffic::TcpEcho,
};

/// Room for flows in transition.
const FLOWS: u32 = 1 << 14;

fn config() -> DsrConfig {
    DsrConfig::default().services(4).table_size(4099).flows(FLOWS)
}

/// Connections to port 80 that are held, and the echoes at their other end.
struct Held<'n> {
    net: &'n Net,
    address: SocketAddr,
    streams: Vec<TcpStream>,
    echoes: Vec<TcpEcho>,
}

impl<'n> Held<'n> {
    fn new(net: &'n Net, family6: bool, connections: usize) -> Self {
        let address = SocketAddr::new(Net::vip(family6), 80);
        net.introduce();
        let echoes = net.backends.iter().map(|ns| TcpEcho::start(ns, address).unwrap()).collect();
        let mut held = Self { net, address, streams: Vec::new(), echoes };
        assert_eq!(held.open(connections), connections);
        held
    }

    /// Opens more; answers how many came about.
    fn open(&mut self, connections: usize) -> usize {
        let before = self.streams.len();
        let opened: Vec<_> = self.net.client.run(|| {
            let open = |_| TcpStream::connect_timeout(&self.address, Duration::from_secs(60)).ok();
            (0..connections).filter_map(open).collect()
        });
        for stream in opened {
            stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            stream.set_nodelay(true).unwrap();
            self.streams.push(stream);
        }
        self.streams.len() - before
    }

    /// Something that is new goes there and comes back, on each.
    fn speak(&mut self, round: u32) {
        for (number, stream) in self.streams.iter_mut().enumerate() {
            let word = [round.to_be_bytes(), (number as u32).to_be_bytes()].concat();
            let mut back = [0; 8];
            let said = stream.write_all(&word).and_then(|()| stream.read_exact(&mut back));
            assert!(said.is_ok() && back[..] == word, "connection {number} in round {round}: {said:?}");
        }
    }
}

/// Adds, drains and reweights fifty times while connections go on, then stops them and waits for the end of transitions.
fn outlives_fifty_changes(way: Way, family6: bool) {
    // Longer than any round takes.
    let idle = Duration::from_secs(times(20, 30, 60) as u64);
    let net = Net::new(way, 4, &config().idle(idle));
    let service = net.serve(80, family6, &[(0, 1), (1, 1)]);
    let connections = times(80, 1000, 20);
    let mut held = Held::new(&net, family6, connections);
    let mut random = fastrand::Rng::with_seed(9);
    let mut changes = [0; 3];
    let rounds = times(50, 50, 5) as u32;
    for round in 0..rounds {
        let number = random.usize(..4);
        let backend = net.backend(number, family6);
        let change = random.usize(..3);
        net.balancer_ns.run(|| match change {
            0 => drop(net.balancer.set_backend(service, backend, random.u32(1..5)).unwrap()),
            1 => {
                // The last one that takes new flows stays.
                let list = net.balancer.backends(service).unwrap();
                let active = list.iter().filter(|entry| entry.state == BackendState::Active).count();
                if active > 1 {
                    drop(net.balancer.drain(service, backend));
                }
            }
            _ => net.balancer.set_backends(service, (0..4).map(|n| (net.backend(n, family6), 1 + n as u32))).unwrap(),
        });
        changes[change] += 1;
        // A few new ones join at each turn; all of them speak.
        assert_eq!(held.open(4), 4, "somebody takes new ones, in round {round}");
        held.speak(round);
    }
    let entry = net.balancer.service(service).unwrap();
    assert!(entry.recorded > 0 && entry.slots_in_transition > 0 && entry.unrecorded == 0, "{entry:?}");
    println!(
        "{way:?}, IPv6 {family6}: {connections} connections and {} more, {rounds} changes {changes:?}, none broke; \
         {} flows recorded, {} slots in transition",
        held.streams.len() - connections,
        entry.recorded,
        entry.slots_in_transition,
    );
    if is_emulated() {
        return;
    }
    // Nobody says anything any more, not even that it goes.
    let _silent = held;
    let end = Instant::now() + idle + Duration::from_secs(60);
    while net.balancer.service(service).unwrap().slots_in_transition > 0 {
        assert!(Instant::now() < end, "all slots are stateless again: {:?}", net.balancer.service(service).unwrap());
        std::thread::sleep(Duration::from_millis(100));
    }
    let list = net.balancer.backends(service).unwrap();
    assert!(list.iter().all(|entry| entry.slots_leaving == 0), "{list:?}");
}

#[test]
fn connections_outlive_fifty_changes_of_the_list() {
    let kinds: Vec<_> = [Way::L2, Way::IpIp(1540), Way::Crossed(1540)].map(|way| [(way, false), (way, true)]).concat();
    for kinds in kinds.chunks(if is_emulated() { 1 } else { kinds.len() }) {
        std::thread::scope(|scope| {
            for (way, family6) in kinds {
                scope.spawn(|| outlives_fifty_changes(*way, *family6));
            }
        });
    }
}

#[test]
fn removing_one_of_ten_breaks_no_connection_to_the_others() {
    for (way, family6) in [(Way::L2, false), (Way::IpIp(1540), true)] {
        let net = Net::new(way, 10, &config().idle(Duration::from_secs(60)));
        let all: Vec<_> = (0..10).map(|number| (number, 1)).collect();
        let service = net.serve(80, family6, &all);
        let connections = times(200, 1000, 40);
        let mut held = Held::new(&net, family6, connections);
        held.speak(0);
        let of = |held: &Held<'_>| held.echoes.iter().map(TcpEcho::connections).collect::<Vec<_>>();
        let before = of(&held);
        assert!(before.iter().all(|count| *count > 0), "{before:?}");
        net.balancer.remove_backend(service, net.backend(0, family6)).unwrap();
        held.speak(1);
        let table = net.balancer.backends(service).unwrap();
        assert_eq!((table[0].slots, table[0].state), (0, BackendState::Leaving));
        assert_eq!(held.open(connections), connections);
        held.speak(2);
        let after = of(&held);
        assert_eq!(after[0], before[0], "no new ones come to it");
        assert!(
            after[1..].iter().zip(&before[1..]).all(|(after, before)| after > before),
            "{before:?}, then {after:?}"
        );
    }
}

#[test]
fn a_flood_of_syns_breaks_no_connection() {
    for (way, family6) in [(Way::L2, false), (Way::IpIp(1540), true)] {
        let net = Net::new(way, 3, &config().idle(Duration::from_secs(300)));
        let service = net.serve(80, family6, &[(0, 1)]);
        let connections = times(200, 1000, 20);
        let mut held = Held::new(&net, family6, connections / 2);
        let change = |number| {
            let list = [(net.backend(number, family6), 1)];
            net.balancer_ns.run(|| net.balancer.set_backends(service, list)).unwrap();
        };
        // Half of them are unknown when the flood comes, half have begun in the transition.
        change(1);
        assert_eq!(held.open(connections - connections / 2), connections - connections / 2);
        change(2);
        // Packets of test runs go nowhere: by a real one, the last backend's neighbours are found out.
        assert_eq!(held.open(1), 1);
        std::thread::sleep(Duration::from_millis(50));
        let count = times(40_000, 10_000_000, 2_000) as u32;
        let from = |n: u32| -> SocketAddr {
            let port = (n >> 8) as u16 | 1;
            match family6 {
                false => SocketAddr::new(
                    (0x3000_0000 + n.wrapping_mul(0x9e37_79b9) % 0x1000_0000).to_be_bytes().into(),
                    port,
                ),
                true => SocketAddr::new(((0x2001_0db8_00ff_u128 << 80) + u128::from(n)).to_be_bytes().into(), port),
            }
        };
        let eth0 = net.balancer_ns.run(|| Interface::by_name("eth0")).unwrap();
        let mut flooded = 0;
        for start in (0..count).step_by(10_000) {
            let end = count.min(start + 10_000);
            flooded += net.balancer_ns.run(|| {
                let run = |n: &u32| {
                    let frame = Frame::tcp(from(*n), SocketAddr::new(Net::vip(family6), 80)).flags(tcp::SYN);
                    let frame = frame.macs(xdpkit_lab::frame::SRC_MAC, eth0.mac().unwrap()).build();
                    net.balancer.run(&TestRun::new(&frame).ingress(&eth0, 0)).unwrap().action == Action::Tx
                };
                (start..end).filter(run).count()
            });
            // Some speak in between.
            if start % 1_000_000 == 0 {
                held.speak(start);
            }
        }
        assert_eq!(flooded, count as usize, "every SYN was one for a backend");
        held.speak(u32::MAX);
        let entry = net.balancer.service(service).unwrap();
        println!(
            "{way:?}, IPv6 {family6}: {connections} connections outlived {count} SYNs; {} flows recorded",
            entry.recorded
        );
        assert!(entry.recorded > u64::from(FLOWS) || is_emulated(), "too few for the table: {entry:?}");
    }
}
