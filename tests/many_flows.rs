//! Many flows at once through every function: each packet has its verdict, and is counted where it should be. What is looked
//! at here, `./x bench --check` measures.

mod common;
// The half that measures is the benchmark's.
#[allow(dead_code)]
#[path = "../benches/check/chain.rs"]
mod chain;
#[allow(dead_code)]
#[path = "../benches/check/dsr_balancer.rs"]
mod dsr_balancer;
#[allow(dead_code)]
#[path = "../benches/check/firewall.rs"]
mod firewall;
#[allow(dead_code)]
#[path = "../benches/common/nat.rs"]
mod nat;
#[allow(dead_code)]
#[path = "../benches/check/rate_limiter.rs"]
mod rate_limiter;

use common::times;
use firewall::Verdicts::{Denied, Mixed};
use xdpkit::{Engine, NatMode, Stage as _, ipnet::IpNet};
use xdpkit_lab::{
    bench::{random_v4, random_v6},
    prefixes::Prefixes,
};

#[test]
fn each_of_four_stages_counts_every_packet() {
    drop(chain::four_stages());
}

#[test]
fn firewall_limiter_and_balancer_in_a_chain_each_count_every_packet() {
    chain::appliance(|_, _| ());
}

#[test]
fn a_big_list_judges_every_packet_and_its_rules_count_them() {
    let Prefixes { v4, v6, .. } = Prefixes::for_tests().unwrap();
    let [most, sources] = [times(20_000, usize::MAX, 1_000), times(1 << 14, 1 << 20, 1 << 10)];
    let v4: Vec<IpNet> = v4.into_iter().take(most).map(Into::into).collect();
    let v6: Vec<IpNet> = v6.into_iter().take(most).map(Into::into).collect();
    for (nets, engine, counters, verdicts) in [
        (&v4, Engine::Trie, false, Denied),
        (&v4, Engine::Trie, true, Mixed),
        (&v4, Engine::Compiled, false, Denied),
        (&v4, Engine::Compiled, false, Mixed),
        (&v4, Engine::Compiled, true, Denied),
        (&v6, Engine::Trie, false, Denied),
        (&v6, Engine::Compiled, true, Mixed),
    ] {
        drop(firewall::listed(nets, engine, counters, verdicts, sources));
    }
}

#[test]
fn sources_within_their_limit_pass_whatever_their_number() {
    for sources in [1 << 10, times(1 << 16, 1 << 20, 1 << 10)] {
        drop(rate_limiter::known(sources));
    }
}

#[test]
fn established_connections_are_translated_in_both_directions_whatever_their_number() {
    let (ns, _peer) = nat::host().unwrap();
    for flows in [1 << 10, times(1 << 16, 1 << 20, 1 << 10)] {
        for ipv6 in [false, true] {
            let clients = if ipv6 { random_v6(flows) } else { random_v4(flows) };
            ns.run(|| {
                let balancer = nat::balancer(ipv6, NatMode::Full).unwrap();
                let (there, back) = nat::establish(&balancer, ipv6, &clients).unwrap();
                for direction in [there, back] {
                    direction.verdict(balancer.program_fd(), flows as u32).unwrap();
                }
                nat::has_translated(&balancer).unwrap();
            });
        }
    }
}

#[test]
fn established_flows_are_forwarded_and_none_is_recorded() {
    let (ns, _peer) = dsr_balancer::host();
    let flows = times(1 << 16, 1 << 20, 1 << 10);
    for family6 in [false, true] {
        ns.run(|| {
            drop(dsr_balancer::established(family6, flows));
            drop(dsr_balancer::for_others(family6, flows));
        });
    }
}

#[test]
fn in_transition_each_flow_is_recorded_once() {
    let (ns, _peer) = dsr_balancer::host();
    for family6 in [false, true] {
        ns.run(|| drop(dsr_balancer::in_transition(family6, times(1 << 16, 1 << 16, 1 << 10))));
    }
}
