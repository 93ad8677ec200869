//! One owner at a time: a process takes over from another while both edit as fast as they can, under traffic.

mod common;

use common::{
    functions::{Function, Scene},
    owner::{Job, Process, obey},
};

/// Hands the function's tables from process to process.
fn hand_over(function: Function, test: &str) {
    obey();
    let scene = Scene::new(function);
    let start = |round: usize, job| {
        // Every other one asks for more room.
        scene.place.more.set(round as u32 / 2 * 16);
        Process::start(&scene.ns, test, function, job, &scene.place, round as u64)
    };
    let probes = common::times(200, 2000, 50).to_string();
    let mut owner = start(0, Job::Own);
    owner.expect("ready");
    let traffic = scene.traffic();
    for round in 1..=common::times(2, 200, 2) {
        let mut successor = start(round, Job::Own);
        successor.expect("ready");
        owner.expect("superseded");
        successor.order(&format!("probe {probes}"));
        successor.expect("agrees");
        traffic.goes_on(&format!("{function:?}, round {round}"));
        std::mem::replace(&mut owner, successor).leave(round);
    }
    traffic.end();
}

#[test]
fn a_firewall_with_tries_is_handed_over() {
    hand_over(Function::Trie, "a_firewall_with_tries_is_handed_over");
}

#[test]
fn a_firewall_with_compiled_tables_is_handed_over() {
    hand_over(Function::Compiled, "a_firewall_with_compiled_tables_is_handed_over");
}

#[test]
fn a_rate_limiter_is_handed_over() {
    hand_over(Function::Limiter, "a_rate_limiter_is_handed_over");
}

#[test]
fn a_nat_balancer_is_handed_over() {
    hand_over(Function::Nat, "a_nat_balancer_is_handed_over");
}

#[test]
fn a_dsr_balancer_is_handed_over() {
    hand_over(Function::Dsr, "a_dsr_balancer_is_handed_over");
}

#[test]
fn a_monitor_is_handed_over() {
    hand_over(Function::Monitor, "a_monitor_is_handed_over");
}
