//! Several next hops for one destination: flows are spread over them, and each stays with its own.

use std::{
    net::{SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use xdpkit_lab::{PacketSocket, Route, traffic::UdpEcho};

use crate::{
    balancers::{Balancers, METHODS, Method, PORTS, dsr_config},
    bench::{echoes, name, two_paths},
    lab::{BACK, FAMILIES, FAR, Lab, NEAR, SECOND, ip, net},
};

const FLOWS: u64 = 32;
const DATAGRAMS: u64 = 5;
/// Of flows on a path, where half of them are to be expected; less often than once in a million by chance.
const FEW: usize = 4;

fn spread(lab: &Lab) {
    let (host, number) = (&lab.balancer, lab.number(0));
    for family6 in FAMILIES {
        let far = Route::to(ip(family6, FAR, number).into()).via_dev(ip(family6, BACK, number), "eth1");
        let far = far.via_dev(ip(family6, SECOND, number), "eth2");
        // An IPv6 route of the same metric would take the one that is there for one more next hop.
        host.replace_route(&if family6 { far.metric(10) } else { far }).unwrap();
    }
    // In IPv6, only gateways can be several.
    host.replace_route(&Route::to(net(false, NEAR)).on_link("eth1").on_link("eth2")).unwrap();
    // By ports, too.
    for family in ["ipv4", "ipv6"] {
        host.sysctl(&format!("net.{family}.fib_multipath_hash_policy"), "1").unwrap();
    }
}

/// By which of the backend's interfaces the datagrams of each flow came in.
fn paths(lab: &Lab, target: SocketAddr) -> [Vec<u64>; 2] {
    let wires = ["eth0", "eth1"].map(|dev| PacketSocket::open(&lab.backends[0], dev).unwrap());
    let open = |_| {
        let socket = UdpSocket::bind(if target.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" }).unwrap();
        socket.connect(target).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        socket
    };
    let flows: Vec<_> = lab.client.run(|| (0..FLOWS).map(open).collect());
    for _ in 0..DATAGRAMS {
        for (flow, number) in flows.iter().zip(0_u64..) {
            // Until it comes back: a neighbour may have to be found first.
            let word = (MAGIC | number).to_be_bytes();
            let end = Instant::now() + Duration::from_secs(10);
            while Instant::now() < end && flow.send(&word).is_ok() && flow.recv(&mut [0; 8]).is_err() {}
        }
    }
    wires.map(|wire| {
        let mut seen = Vec::new();
        let take = |frame: &[u8]| {
            let word = frame.last_chunk().map_or(0, |word| u64::from_be_bytes(*word));
            if word & !0xff == MAGIC {
                seen.push(word & 0xff);
            }
        };
        wire.drain(&mut Vec::new(), take).unwrap();
        seen.sort_unstable();
        seen.dedup();
        seen
    })
}

const MAGIC: u64 = 0x5eed_f10e_0000_0000;

fn judge(name: &str, [first, second]: [Vec<u64>; 2], wrong: &mut Vec<String>) {
    let both = first.iter().filter(|flow| second.contains(flow)).count();
    if first.len() + second.len() - both != FLOWS as usize {
        wrong.push(format!("{name}: of {FLOWS} flows, {first:?} and {second:?} came"));
    } else if both > 0 {
        wrong.push(format!("{name}: {both} of {FLOWS} flows changed their path"));
    } else if first.len() < FEW || second.len() < FEW {
        wrong.push(format!("{name}: {} and {} flows on the two paths", first.len(), second.len()));
    }
}

fn all(lab: &Lab, targets: impl Iterator<Item = (String, SocketAddr)>) {
    let mut wrong = Vec::new();
    for (name, target) in targets {
        // Neighbours are known afterwards.
        paths(lab, target);
        judge(&name, paths(lab, target), &mut wrong);
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

fn lab() -> (Lab, Vec<UdpEcho>) {
    let lab = two_paths();
    spread(&lab);
    let echoes = echoes(&lab);
    (lab, echoes)
}

#[test]
fn the_kernels_own_flows_are_spread() {
    let (lab, _echoes) = lab();
    let at = |family6, network| SocketAddr::new(ip(family6, network, lab.number(0)), PORTS[0]);
    let targets = [(false, FAR), (true, FAR), (false, NEAR)];
    all(&lab, targets.map(|(family6, network)| (format!("network {network}"), at(family6, network))).into_iter());
}

#[test]
fn balanced_flows_are_spread() {
    let (lab, _echoes) = lab();
    // Outer sources that differ by flow: a tunnel has no ports.
    let config = dsr_config().outer_v4("10.200.0.0/16".parse().unwrap()).outer_v6("2001:db8:200::/64".parse().unwrap());
    let _balancers = Balancers::start_with(&lab, &config);
    let cases = METHODS.into_iter().flat_map(|method| FAMILIES.map(|family6| (method, family6)));
    let cases = cases.filter(|case| *case != (Method::L2, true));
    all(&lab, cases.map(|(method, family6)| (format!("{method:?} {}", name(family6)), method.target(family6))));
}
