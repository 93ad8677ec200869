//! What a packet costs in a DSR balancer: established flows of any number, in transition, and packets for others. In one run
//! with the kernel's own LRU_HASH, which a table of connections would be.

mod common;

use std::net::{IpAddr, SocketAddr};

use common::is_emulated;
use xdpkit::{Action, DsrBalancer, DsrConfig, DsrService, Reason, Stage as _};
use xdpkit_lab::{
    Namespace,
    bench::{Harness, Yardstick, random_v4, random_v6},
    frame::{Frame, tcp},
    veth,
};

/// Fixed: to go on until the bound holds would be to wait for luck.
const ROUNDS: u32 = 100;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

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

/// What is established costs the same at any number of flows: nothing is remembered of them.
fn established(family6: bool, flows: usize) -> [f64; 2] {
    let [l2, ipip] = [DsrService::l2(), DsrService::ipip()].map(|service| balancer(family6, service, flows));
    let harness = harness(family6, vip(family6), flows);
    for (balancer, overhead) in [(&l2, 0), (&ipip, if family6 { 40 } else { 20 })] {
        let (action, frame) = harness.verdict(balancer.program_fd(), flows as u32).unwrap();
        let stats = balancer.stats().unwrap();
        assert_eq!((action, stats.reason(Reason::Forwarded)), (Action::Redirect as u32, stats.total()));
        assert_eq!(stats.total().bytes, flows as u64 * (frame.len() - overhead) as u64);
        let entry = &balancer.services().unwrap()[0];
        assert_eq!((entry.stats.received, entry.recorded), (stats.total(), 0), "counted by service too, none recorded");
        let list = balancer.backends(entry.address).unwrap();
        assert!(list.iter().all(|entry| entry.stats.forwarded.packets > flows as u64 / 8), "{list:?}");
    }
    if is_emulated() {
        return [0.0; 2];
    }
    let programs = [l2.program_fd(), ipip.program_fd(), harness.grow()];
    let costs = harness.costs_above_empty(&programs, ROUNDS).unwrap();
    let [l2, ipip, grow] = [costs[0].median, costs[1].median, costs[2].median];
    println!("IPv6 {family6}, {flows} flows: L2 {l2:.1} ns, IP-in-IP {ipip:.1} ns, of which adjust_head {grow:.1}");
    [l2, ipip - grow]
}

/// All slots change hands, and all flows are recorded: then each packet finds its record.
fn in_transition(family6: bool, flows: usize) -> f64 {
    let balancer = balancer(family6, DsrService::ipip(), flows);
    let service = balancer.services().unwrap()[0].address;
    balancer.set_backends(service, (25..30).map(|number| (backend(family6, number), 1))).unwrap();
    let harness = harness(family6, vip(family6), flows);
    harness.verdict(balancer.program_fd(), flows as u32).unwrap();
    let entry = balancer.service(service).unwrap();
    assert_eq!((entry.slots_in_transition, entry.recorded), (entry.slots, flows as u64));
    assert_eq!(balancer.recorded_flows(), flows);
    if is_emulated() {
        return 0.0;
    }
    let costs = harness.costs_above_empty(&[balancer.program_fd(), harness.grow()], ROUNDS).unwrap();
    let cost = costs[0].median - costs[1].median;
    println!("IPv6 {family6}, {flows} flows in transition: {cost:.1} ns above adjust_head");
    assert_eq!(balancer.service(service).unwrap().recorded, flows as u64, "no record was lost or made twice");
    cost
}

fn for_others(family6: bool) -> f64 {
    let balancer = balancer(family6, DsrService::l2(), 1 << 16);
    let harness = harness(family6, backend(family6, 20), 1 << 16);
    let (action, _) = harness.verdict(balancer.program_fd(), 1 << 16).unwrap();
    let stats = balancer.stats().unwrap();
    assert_eq!((action, stats.reason(Reason::NotForVip)), (Action::Pass as u32, stats.total()));
    if is_emulated() {
        return 0.0;
    }
    let cost = harness.cost_above_empty(balancer.program_fd(), ROUNDS).unwrap().median;
    println!("IPv6 {family6}, for no virtual address: {cost:.1} ns");
    cost
}

/// Per packet with service look-up and all counters, of flows in random order. Test runs come in by `lo`: packets are
/// redirected, which costs a helper call more than sending them back.
#[test]
fn established_flows_cost_the_same_at_any_number_and_less_than_a_table_of_them() {
    // The routes and neighbours of this thread's namespace are the program's.
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
    ns.run(|| {
        let counts = if is_emulated() { vec![1 << 10] } else { vec![1 << 10, 1 << 16, 1 << 20] };
        let costs: Vec<[f64; 2]> = counts.iter().map(|flows| established(false, *flows)).collect();
        let costs6: Vec<[f64; 2]> = counts.iter().map(|flows| established(true, *flows)).collect();
        let flows = if is_emulated() { 1 << 10 } else { 1 << 16 };
        let changing = [in_transition(false, flows), in_transition(true, flows)];
        let others = [for_others(false), for_others(true)];
        if is_emulated() {
            println!("the machine is emulated: only verdicts and counters were compared, not times");
            return;
        }
        let here = Yardstick::measure(1 << 16, ROUNDS).unwrap();
        println!("{here}");
        // A machine that others use at the same time adds its own: only the full run is strict.
        let strict = common::times(0, 1, 0) == 1;
        let most = if strict { 45.0 } else { 65.0 };
        for (flows, cost) in counts.iter().zip(&costs) {
            for (what, cost) in ["L2", "IP-in-IP"].into_iter().zip(cost) {
                assert!(*cost <= most, "{what}, {flows} flows: {cost:.1} ns, allowed are {most}");
            }
        }
        for costs in [&costs, &costs6] {
            for mode in [0, 1] {
                let (few, many) = (costs[0][mode], costs[2][mode]);
                assert!(many <= few + 8.0, "{few:.1} ns with 1,024 flows, {many:.1} with a million");
                assert!(
                    costs[1][mode] < here.look_up,
                    "one look-up of a connection costs more: {:.1} ns",
                    here.look_up
                );
            }
        }
        assert!(changing[0] <= 200.0, "in transition: {:.1} ns, allowed are 200", changing[0]);
        assert!(others[0] <= 30.0, "for no virtual address: {:.1} ns, allowed are 30", others[0]);
    });
}
