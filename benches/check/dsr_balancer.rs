//! What a packet costs in a DSR balancer: established flows of any number, in transition, and packets for others. In one run
//! with the kernel's own LRU_HASH, which a table of connections would be. And how soon another MAC is followed.

use std::{
    net::{IpAddr, SocketAddr},
    time::Instant,
};

use xdpkit::{Action, DsrBalancer, DsrConfig, DsrService, Reason, Stage as _};
use xdpkit_lab::{
    Namespace,
    bench::{Checks, Harness, Yardstick, random_v4, random_v6},
    frame::{Frame, tcp},
    veth,
};

/// Fixed: to go on until the bound holds would be to wait for luck.
const ROUNDS: u32 = 100;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

/// By number of flows: this many, and how it is called.
const COUNTS: [(usize, &str); 3] = [(1 << 10, "1k"), (1 << 16, "64k"), (1 << 20, "1M")];

/// Per packet with service look-up and all counters, of flows in random order. Test runs come in by `lo`: packets are
/// redirected, which costs a helper call more than sending them back.
pub(crate) fn check(checks: &mut Checks) {
    let (ns, _peer) = host();
    checks.group("dsr_balancer/established", |checks| {
        let here = Yardstick::measure(1 << 16, ROUNDS).unwrap();
        println!("{here}");
        for (family6, family) in [(false, "ipv4"), (true, "ipv6")] {
            let costs = COUNTS.map(|(flows, _)| ns.run(|| established_costs(family6, flows)));
            for (mode, name) in ["l2", "ipip"].into_iter().enumerate() {
                let group = format!("dsr_balancer/established/{family}/{name}");
                // Nanoseconds were found for IPv4.
                for ((_, count), cost) in COUNTS.iter().zip(&costs).filter(|_| !family6) {
                    checks.at_most(&format!("{group}/{count}"), "ns", cost[mode], 45.0);
                }
                checks.at_most(&format!("{group}/1M-above-1k"), "ns", costs[2][mode] - costs[0][mode], 8.0);
                checks.at_most(&format!("{group}/64k-against-one-lru-look-up"), "ns", costs[1][mode], here.look_up);
            }
        }
    });
    checks.group("dsr_balancer/in-transition", |checks| {
        let cost = ns.run(|| {
            let (balancer, harness) = in_transition(false, 1 << 16);
            let costs = harness.costs_above_empty(&[balancer.program_fd(), harness.grow()], ROUNDS).unwrap();
            costs[0].median - costs[1].median
        });
        checks.at_most("dsr_balancer/in-transition/64k", "ns", cost, 200.0);
    });
    checks.group("dsr_balancer/no-vip", |checks| {
        let cost = ns.run(|| {
            let (balancer, harness) = for_others(false, 1 << 16);
            harness.cost_above_empty(balancer.program_fd(), ROUNDS).unwrap().median
        });
        checks.at_most("dsr_balancer/no-vip", "ns", cost, 30.0);
    });
    checks.group("dsr_balancer/new-mac", |checks| {
        for (family6, family) in [(false, "ipv4"), (true, "ipv6")] {
            let name = format!("dsr_balancer/new-mac/{family}");
            checks.at_most(&name, "ms", ns.run(|| new_mac_is_followed_after(&ns, family6)), 1100.0);
        }
    });
}

/// The balancer's host, whose routes and neighbours are those of the thread's namespace that measures, and the other end of
/// its link.
pub(crate) fn host() -> (Namespace, Namespace) {
    let (ns, peer) = (Namespace::new("balancer").unwrap(), Namespace::new("peer").unwrap());
    veth((&ns, "eth0"), (&peer, "eth0")).unwrap();
    ns.add_address("eth0", "192.168.178.10/24".parse().unwrap()).unwrap();
    ns.add_address("eth0", "2001:db8:b::10/64".parse().unwrap()).unwrap();
    ns.enable_forwarding().unwrap();
    for number in 20..30 {
        for family6 in [false, true] {
            ns.add_neighbour("eth0", backend(family6, number), MAC).unwrap();
        }
    }
    (ns, peer)
}

fn vip(family6: bool) -> IpAddr {
    if family6 { "2001:db8:b::100" } else { "192.168.178.100" }.parse().unwrap()
}

fn backend(family6: bool, number: u8) -> IpAddr {
    if family6 { format!("2001:db8:b::{number}") } else { format!("192.168.178.{number}") }.parse().unwrap()
}

/// One service with five backends.
fn balancer(family6: bool, service: DsrService, flows: usize) -> DsrBalancer {
    let config = DsrConfig::default().flows(2 * flows as u32).outer_v4("10.0.0.0/16".parse().unwrap());
    let balancer = DsrBalancer::load(&config).unwrap();
    let vip = vip(family6);
    let text = if family6 { format!("tcp/[{vip}]:80") } else { format!("tcp/{vip}:80") };
    let list = (20..25).map(|number| (backend(family6, number), 1));
    balancer.insert_service(text.parse().unwrap(), service, list).unwrap();
    balancer
}

fn harness(family6: bool, destination: IpAddr, flows: usize) -> Harness {
    let sources = if family6 { random_v6(flows) } else { random_v4(flows) };
    let frame = Frame::tcp(sources[0], SocketAddr::new(destination, 80)).flags(tcp::ACK).payload(&[0; 18]).build();
    Harness::new(&frame, &sources).unwrap()
}

/// By L2 and by IP-in-IP: every established flow is forwarded, and counted by stage, service and backend. Nothing is
/// remembered of them.
pub(crate) fn established(family6: bool, flows: usize) -> ([DsrBalancer; 2], Harness) {
    let balancers = [DsrService::l2(), DsrService::ipip()].map(|service| balancer(family6, service, flows));
    let harness = harness(family6, vip(family6), flows);
    for (balancer, overhead) in balancers.iter().zip([0, if family6 { 40 } else { 20 }]) {
        let (action, frame) = harness.verdict(balancer.program_fd(), flows as u32).unwrap();
        let stats = balancer.stats().unwrap();
        assert_eq!((action, stats.reason(Reason::Forwarded)), (Action::Redirect as u32, stats.total()));
        assert_eq!(stats.total().bytes, flows as u64 * (frame.len() - overhead) as u64);
        let entry = &balancer.services().unwrap()[0];
        assert_eq!((entry.stats.received, entry.recorded), (stats.total(), 0), "counted by service too, none recorded");
        let list = balancer.backends(entry.address).unwrap();
        assert!(list.iter().all(|entry| entry.stats.forwarded.packets > flows as u64 / 8), "{list:?}");
    }
    (balancers, harness)
}

/// Of L2, and of IP-in-IP above adjust_head.
fn established_costs(family6: bool, flows: usize) -> [f64; 2] {
    let ([l2, ipip], harness) = established(family6, flows);
    let programs = [l2.program_fd(), ipip.program_fd(), harness.grow()];
    let costs = harness.costs_above_empty(&programs, ROUNDS).unwrap();
    [costs[0].median, costs[1].median - costs[2].median]
}

/// All slots change hands, and all flows are recorded: then each packet finds its record, and none is lost or made twice.
pub(crate) fn in_transition(family6: bool, flows: usize) -> (DsrBalancer, Harness) {
    let balancer = balancer(family6, DsrService::ipip(), flows);
    let service = balancer.services().unwrap()[0].address;
    balancer.set_backends(service, (25..30).map(|number| (backend(family6, number), 1))).unwrap();
    let harness = harness(family6, vip(family6), flows);
    for _ in 0..2 {
        harness.verdict(balancer.program_fd(), flows as u32).unwrap();
        let entry = balancer.service(service).unwrap();
        assert_eq!((entry.slots_in_transition, entry.recorded), (entry.slots, flows as u64));
        assert_eq!(balancer.recorded_flows(), flows);
    }
    (balancer, harness)
}

/// Packets for no virtual address pass.
pub(crate) fn for_others(family6: bool, flows: usize) -> (DsrBalancer, Harness) {
    let balancer = balancer(family6, DsrService::l2(), flows);
    let harness = harness(family6, backend(family6, 20), flows);
    let (action, _) = harness.verdict(balancer.program_fd(), flows as u32).unwrap();
    let stats = balancer.stats().unwrap();
    assert_eq!((action, stats.reason(Reason::NotForVip)), (Action::Pass as u32, stats.total()));
    (balancer, harness)
}

/// Milliseconds from the change of a neighbour to the first packet that goes to its new MAC, under traffic.
fn new_mac_is_followed_after(ns: &Namespace, family6: bool) -> f64 {
    let balancer = balancer(family6, DsrService::l2(), 1 << 10);
    let harness = harness(family6, vip(family6), 1);
    let goes_to = || harness.verdict(balancer.program_fd(), 1).unwrap().1[..6].to_vec();
    assert_eq!(goes_to(), MAC);
    let new = [2, 0, 0, 0, 0, 10];
    let changed = Instant::now();
    for number in 20..25 {
        ns.add_neighbour("eth0", backend(family6, number), new).unwrap();
    }
    while goes_to() != new {
        assert!(changed.elapsed().as_secs() < 60, "packets go to the old MAC for ever");
    }
    let took = changed.elapsed();
    for number in 20..25 {
        ns.add_neighbour("eth0", backend(family6, number), MAC).unwrap();
    }
    took.as_secs_f64() * 1e3
}
