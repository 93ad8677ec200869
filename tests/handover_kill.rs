//! `kill -9` in the middle of edits, and processes that stop or die on the way to something: the next start succeeds, what is
//! listed is what packets get, and it is told what was dropped.

mod common;

use std::{
    path::Path,
    thread,
    time::{Duration, Instant},
};

use common::{
    functions::{Function, Scene},
    owner::{Job, Process, lock_holder, obey},
};
use fastrand::Rng;

const PATIENCE: Duration = Duration::from_secs(120);

fn kill_in_edits(function: Function, test: &str) {
    obey();
    let scene = Scene::new(function);
    let mut random = Rng::with_seed(11);
    let probes = common::times(200, 1000, 50).to_string();
    let mut traffic = None;
    let (mut dropped, rounds) = (Vec::new(), common::times(2, 200, 2));
    for round in 0..=rounds {
        scene.place.more.set(round as u32 / 2 * 16);
        let mut owner = Process::start(&scene.ns, test, function, Job::Own, &scene.place, round as u64);
        let account = owner.expect("adopted");
        if account != "adopted dropped [] rebuilt []" {
            dropped.push(account);
        }
        owner.expect("ready");
        owner.order(&format!("probe {probes}"));
        owner.expect("agrees");
        let traffic = traffic.get_or_insert_with(|| scene.traffic());
        traffic.goes_on(&format!("{function:?}, round {round}"));
        // It edits without a pause: wherever it is now, it is in an edit or between two.
        thread::sleep(Duration::from_micros(random.u64(..30_000)));
        owner.kill();
    }
    traffic.expect("it was started").end();
    println!("{function:?}: {rounds} kills, {} of them left something half done: {dropped:?}", dropped.len());
}

#[test]
fn a_firewall_with_tries_survives_kills_in_edits() {
    kill_in_edits(Function::Trie, "a_firewall_with_tries_survives_kills_in_edits");
}

#[test]
fn a_firewall_with_compiled_tables_survives_kills_in_edits() {
    kill_in_edits(Function::Compiled, "a_firewall_with_compiled_tables_survives_kills_in_edits");
}

#[test]
fn a_rate_limiter_survives_kills_in_edits() {
    kill_in_edits(Function::Limiter, "a_rate_limiter_survives_kills_in_edits");
}

#[test]
fn a_nat_balancer_survives_kills_in_edits() {
    kill_in_edits(Function::Nat, "a_nat_balancer_survives_kills_in_edits");
}

#[test]
fn a_dsr_balancer_survives_kills_in_edits() {
    kill_in_edits(Function::Dsr, "a_dsr_balancer_survives_kills_in_edits");
}

#[test]
fn a_monitor_survives_kills_in_edits() {
    kill_in_edits(Function::Monitor, "a_monitor_survives_kills_in_edits");
}

/// Kills processes on the way from tables that they have made larger to packets that meet them.
fn kill_in_growth(function: Function, test: &str) {
    obey();
    let scene = Scene::new(function);
    let mut random = Rng::with_seed(12);
    let start = |round: usize| {
        scene.place.more.set(round as u32 * 16);
        Process::start(&scene.ns, test, function, Job::Own, &scene.place, round as u64)
    };
    let mut owner = start(0);
    owner.expect("ready");
    let traffic = scene.traffic();
    for round in 1..=common::times(2, 100, 1) {
        let mut upgrade = start(round);
        upgrade.expect("adopted");
        thread::sleep(Duration::from_micros(random.u64(..60_000)));
        upgrade.kill();
        // Whether the one before goes on or has given way, the next one has all of it.
        let mut successor = start(round);
        successor.expect("ready");
        successor.order("probe 100");
        successor.expect("agrees");
        traffic.goes_on(&format!("{function:?}, round {round}"));
        owner.expect("superseded");
        owner.kill();
        owner = successor;
    }
    traffic.end();
}

#[test]
fn a_firewall_with_tries_survives_kills_in_growth() {
    kill_in_growth(Function::Trie, "a_firewall_with_tries_survives_kills_in_growth");
}

#[test]
fn a_firewall_with_compiled_tables_survives_kills_in_growth() {
    kill_in_growth(Function::Compiled, "a_firewall_with_compiled_tables_survives_kills_in_growth");
}

#[test]
fn a_rate_limiter_survives_kills_in_growth() {
    kill_in_growth(Function::Limiter, "a_rate_limiter_survives_kills_in_growth");
}

#[test]
fn a_nat_balancer_survives_kills_in_growth() {
    kill_in_growth(Function::Nat, "a_nat_balancer_survives_kills_in_growth");
}

#[test]
fn a_dsr_balancer_survives_kills_in_growth() {
    kill_in_growth(Function::Dsr, "a_dsr_balancer_survives_kills_in_growth");
}

/// An upgrade that dies before it is ready leaves the tables to the earlier process, which obeys what it finds in them.
fn die_before_ready(function: Function, test: &str) {
    obey();
    let scene = Scene::new(function);
    let start = |seed, job| Process::start(&scene.ns, test, function, job, &scene.place, seed);
    let mut owner = start(1, Job::Own);
    owner.expect("ready");
    let traffic = scene.traffic();
    for round in 0..common::times(2, 20, 1) as u64 {
        scene.place.more.set(round as u32 * 16);
        let mut upgrade = start(2 + round, Job::Adopt);
        // It has changed something in between, and changes more until it dies.
        upgrade.expect("waiting");
        owner.expect("superseded");
        upgrade.kill();
        owner.expect("again");
        owner.order("probe 100");
        owner.expect("agrees");
        traffic.goes_on(&format!("{function:?}, round {round}"));
    }
    // The next one comes about.
    let mut successor = start(99, Job::Own);
    successor.expect("ready");
    owner.expect("superseded");
    successor.order("probe 100");
    successor.expect("agrees");
    owner.leave(99);
    traffic.end();
}

#[test]
fn a_firewall_takes_its_tries_back() {
    die_before_ready(Function::Trie, "a_firewall_takes_its_tries_back");
}

#[test]
fn a_firewall_takes_its_compiled_tables_back() {
    die_before_ready(Function::Compiled, "a_firewall_takes_its_compiled_tables_back");
}

#[test]
fn a_rate_limiter_takes_its_tables_back() {
    die_before_ready(Function::Limiter, "a_rate_limiter_takes_its_tables_back");
}

#[test]
fn a_nat_balancer_takes_its_tables_back() {
    die_before_ready(Function::Nat, "a_nat_balancer_takes_its_tables_back");
}

#[test]
fn a_dsr_balancer_takes_its_tables_back() {
    die_before_ready(Function::Dsr, "a_dsr_balancer_takes_its_tables_back");
}

#[test]
fn a_monitor_takes_its_tables_back() {
    die_before_ready(Function::Monitor, "a_monitor_takes_its_tables_back");
}

/// Stops a process that edits without a pause while it holds the lock.
fn stop_in_an_edit(process: &Process, home: &Path) {
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        process.stop();
        if lock_holder(home) == Some(process.id()) {
            return;
        }
        process.signal("CONT");
        thread::sleep(Duration::from_micros(300));
    }
    panic!("no edit of process {} locks {}", process.id(), home.display());
}

/// Who is stopped between two edits is no obstacle; who is stopped in one is waited for, named, and once it is dead followed.
fn stop_a_holder(function: Function, test: &str) {
    obey();
    let scene = Scene::new(function);
    let home = scene.place.directory.join("stages").join(function.stage_name());
    let start = |seed| Process::start(&scene.ns, test, function, Job::Own, &scene.place, seed);
    let mut first = start(1);
    first.expect("ready");
    let traffic = scene.traffic();

    // Between two edits it holds nothing, and is told when it goes on.
    first.order("pause");
    first.expect("paused");
    first.stop();
    let mut second = start(2);
    second.expect("ready");
    second.order("probe 100");
    second.expect("agrees");
    first.signal("CONT");
    first.order("on");
    first.expect("superseded");
    first.leave(1);

    // In the middle of one: nobody can take over, and the error names it.
    stop_in_an_edit(&second, &home);
    let mut third = start(3);
    let failure = third.expect_failure();
    let pid = second.id().to_string();
    let names_it = failure.split(|c: char| !c.is_ascii_digit()).any(|number| number == pid);
    assert!(failure.contains("start:") && names_it, "{failure} names process {pid}");
    traffic.goes_on("stopped");

    // It goes on as if nothing had been: it is the owner still.
    second.signal("CONT");
    second.order("probe 100");
    second.expect("agrees");
    assert!(!second.said("superseded"), "the adoption that failed has taken nothing");

    // Dead in the middle of one, it holds nothing.
    stop_in_an_edit(&second, &home);
    second.kill();
    let mut fourth = start(4);
    fourth.expect("ready");
    fourth.order("probe 100");
    fourth.expect("agrees");
    traffic.goes_on("dead");
    fourth.leave(4);
    traffic.end();
}

#[test]
fn a_stopped_holder_of_tries_is_named() {
    stop_a_holder(Function::Trie, "a_stopped_holder_of_tries_is_named");
}

#[test]
fn a_stopped_holder_of_compiled_tables_is_named() {
    stop_a_holder(Function::Compiled, "a_stopped_holder_of_compiled_tables_is_named");
}

#[test]
fn a_stopped_holder_of_a_rate_limiter_is_named() {
    stop_a_holder(Function::Limiter, "a_stopped_holder_of_a_rate_limiter_is_named");
}

#[test]
fn a_stopped_holder_of_a_nat_balancer_is_named() {
    stop_a_holder(Function::Nat, "a_stopped_holder_of_a_nat_balancer_is_named");
}

#[test]
fn a_stopped_holder_of_a_dsr_balancer_is_named() {
    stop_a_holder(Function::Dsr, "a_stopped_holder_of_a_dsr_balancer_is_named");
}

#[test]
fn a_stopped_holder_of_a_monitor_is_named() {
    stop_a_holder(Function::Monitor, "a_stopped_holder_of_a_monitor_is_named");
}

/// A list of 60,000 lines (fewer in the usual run) is reloaded without a pause. From the sixth upgrade on, none succeeded once.
fn reload_and_upgrade(function: Function, test: &str, rounds: usize) {
    obey();
    let scene = Scene::new(function);
    let start = |seed: u64| Process::start(&scene.ns, test, function, Job::Own, &scene.place, seed);
    let mut owner = start(0);
    owner.expect("ready");
    let traffic = scene.traffic();
    let mut random = Rng::with_seed(3);
    for round in 1..=common::times(rounds, 40, 2) {
        thread::sleep(Duration::from_millis(random.u64(..300)));
        let mut successor = start(round as u64);
        successor.expect("ready");
        owner.expect("superseded");
        successor.order("probe 2000");
        successor.expect("agrees");
        traffic.goes_on(&format!("round {round}"));
        // Every other one ends by itself, the others wherever they are.
        let mut earlier = std::mem::replace(&mut owner, successor);
        if round % 2 == 0 { earlier.kill() } else { earlier.leave(round) }
    }
    traffic.end();
}

#[test]
fn a_long_list_in_tries_is_reloaded_while_new_processes_take_over() {
    reload_and_upgrade(Function::LongTrie, "a_long_list_in_tries_is_reloaded_while_new_processes_take_over", 2);
}

#[test]
fn a_long_compiled_list_is_reloaded_while_new_processes_take_over() {
    reload_and_upgrade(Function::LongCompiled, "a_long_compiled_list_is_reloaded_while_new_processes_take_over", 2);
}

/// What the kernel says of a lock is what the tests above go by.
#[test]
fn the_holder_of_a_lock_is_found() {
    let directory = std::env::temp_dir().join(format!("xdpkit-lock-{}", std::process::id()));
    std::fs::create_dir(&directory).unwrap();
    assert_eq!(lock_holder(&directory), None);
    let file = std::fs::File::open(&directory).unwrap();
    file.try_lock().unwrap();
    assert_eq!(lock_holder(&directory), Some(std::process::id()));
    drop(file);
    assert_eq!(lock_holder(&directory), None);
    std::fs::remove_dir(&directory).unwrap();
}
