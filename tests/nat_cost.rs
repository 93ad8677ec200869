//! What a packet of an established connection costs in both directions, and a new connection, by how many there are:
//! against limits that were found on one machine, scaled by what memory costs on this one, in one run.

mod common;
#[path = "../benches/common/nat.rs"]
mod nat;

use nat::{balancer, establish};
use xdpkit::{NatMode, Stage as _};
use xdpkit_lab::bench::{Yardstick, random_v4, random_v6};

/// Windows of about a millisecond. Fixed: to go on until a bound holds would be to wait for luck.
const ROUNDS: u32 = 60;

#[test]
fn established_connections_cost_as_little_as_their_number_allows() {
    let _undisturbed = common::undisturbed();
    let (ns, _peer) = nat::host().unwrap();
    let mut dear = Vec::new();
    let many = common::times(1 << 16, 1 << 20, 1 << 10);
    for (flows, limit) in [(1_usize << 10, 70.0), (1 << 16, 220.0), (1 << 20, 220.0)] {
        if flows > many {
            break;
        }
        let here = Yardstick::measure(flows, if common::is_emulated() { 1 } else { ROUNDS }).unwrap();
        let most = here.scale(limit);
        println!("{here}: {limit} ns are {most:.0} here");
        for ipv6 in [false, true] {
            let clients = if ipv6 { random_v6(flows) } else { random_v4(flows) };
            let costs = ns.run(|| {
                let balancer = balancer(ipv6, NatMode::Full).unwrap();
                let (there, back) = establish(&balancer, ipv6, &clients).unwrap();
                nat::has_translated(&balancer).unwrap();
                if common::is_emulated() {
                    return None;
                }
                Some([there, back].map(|way| way.cost_above_empty(balancer.program_fd(), ROUNDS).unwrap().minimum))
            });
            let Some(costs @ [there, back]) = costs else {
                println!("the machine is emulated: only verdicts were looked at, not times");
                continue;
            };
            let family = if ipv6 { "IPv6" } else { "IPv4" };
            println!("{flows} connections, {family}: {there:.1} ns to backends, {back:.1} ns to clients");
            // The limits are about IPv4; IPv6's addresses are four times as long, in every hash and every sum.
            let most = if ipv6 { most * IPV6 } else { most };
            if costs.iter().any(|cost| *cost > most) {
                dear.push(format!("{flows} of {family}: {costs:.1?}, {most:.0} are allowed"));
            }
        }
    }
    assert_eq!(dear, Vec::<String>::new());
}

/// What IPv6 may cost more.
const IPV6: f64 = 1.5;

#[test]
fn a_new_connection_costs_less_than_two_entries_of_the_kernels_table() {
    let _undisturbed = common::undisturbed();
    if common::is_emulated() {
        return println!("the machine is emulated: its times mean nothing");
    }
    let (ns, _peer) = nat::host().unwrap();
    let here = Yardstick::measure(1 << 20, ROUNDS).unwrap();
    let most = here.scale(350.0);
    println!("{here}: 350 ns are {most:.0} here");
    for ipv6 in [false, true] {
        let cost = ns.run(|| nat::new(ipv6).unwrap());
        println!("a new connection, IPv6 {ipv6}: {cost:.1} ns");
        let most = if ipv6 { most * IPV6 } else { most };
        assert!(cost <= most && cost <= 2.0 * here.insert, "{cost:.1} ns, {most:.0} are allowed");
    }
}
