//! What a packet of an established connection costs in both directions, and a new connection, by how many there are:
//! against limits that were found on one machine, scaled by what memory costs on this one, in one run.

use xdpkit::{NatMode, Stage as _};
use xdpkit_lab::bench::{Checks, Yardstick, random_v4, random_v6};

use crate::nat::{balancer, establish, has_translated, host, new};

/// Windows of about a millisecond. Fixed: to go on until a bound holds would be to wait for luck.
const ROUNDS: u32 = 60;

/// What IPv6 may cost more: the limits are about IPv4, and its addresses are four times as long, in every hash and every sum.
const IPV6: f64 = 1.5;

pub(crate) fn check(checks: &mut Checks) {
    let (ns, _peer) = host().unwrap();
    checks.group("nat_balancer/established", |checks| {
        for (flows, count, limit) in [(1_usize << 10, "1k", 70.0), (1 << 16, "64k", 220.0), (1 << 20, "1M", 220.0)] {
            let here = Yardstick::measure(flows, ROUNDS).unwrap();
            println!("{here}");
            for (ipv6, family, more) in [(false, "ipv4", 1.0), (true, "ipv6", IPV6)] {
                let clients = if ipv6 { random_v6(flows) } else { random_v4(flows) };
                let costs = ns.run(|| {
                    let balancer = balancer(ipv6, NatMode::Full).unwrap();
                    let (there, back) = establish(&balancer, ipv6, &clients).unwrap();
                    has_translated(&balancer).unwrap();
                    [there, back].map(|way| way.cost_above_empty(balancer.program_fd(), ROUNDS).unwrap().minimum)
                });
                for (direction, cost) in ["to-backend", "to-client"].into_iter().zip(costs) {
                    let name = format!("nat_balancer/established/{family}/{count}/{direction}");
                    checks.at_most(&name, "ns", cost, here.scale(limit) * more);
                }
            }
        }
    });
    checks.group("nat_balancer/new", |checks| {
        let here = Yardstick::measure(1 << 20, ROUNDS).unwrap();
        println!("{here}");
        for (ipv6, family, more) in [(false, "ipv4", 1.0), (true, "ipv6", IPV6)] {
            let cost = ns.run(|| new(ipv6).unwrap());
            checks.at_most(&format!("nat_balancer/new/{family}"), "ns", cost, here.scale(350.0) * more);
            // Two entries of the kernel's table are what others keep of a connection.
            checks.at_most(
                &format!("nat_balancer/new/{family}/against-two-lru-entries"),
                "ns",
                cost,
                2.0 * here.insert,
            );
        }
    });
}
