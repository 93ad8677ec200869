//! Another process takes a firewall over: rules, counters, lists on trial, and what a killed one had begun.

use std::{
    ffi::OsStr,
    io::{BufRead as _, BufReader},
    net::IpAddr,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use crate::common::{
    judge,
    rules::{DENIED, ENGINES, Model, agree, load, on, packet, rule, selector},
};
use fastrand::Rng;
use xdpkit::{AttachOptions, Firewall, Rule, Stage as _};
use xdpkit_lab::{bpffs::BpfFs, topology::Pair};

/// Where a process that a test has started finds the pins.
const DIRECTORY: &str = "XDPKIT_TEST_CHILD_PINS";

#[test]
fn another_process_goes_on_with_all_of_it() {
    let bpffs = BpfFs::new().unwrap();
    for engine in ENGINES {
        let pair = Pair::new().unwrap();
        let directory = bpffs.path().join(format!("{engine:?}"));
        let mut random = Rng::with_seed(5);
        let mut model = Model::default();
        let firewall = load(engine);
        for _ in 0..300 {
            let v6 = random.bool();
            let (selector, rule) = (selector(&mut random, v6), rule(&mut random));
            if firewall.insert(selector, rule).is_ok() {
                model.set(selector, rule);
            }
        }
        let frame = packet("10.192.192.3", "10.0.0.1", "tcp/80");
        firewall.insert(on("10.192.192.3"), Rule::deny()).unwrap();
        model.set(on("10.192.192.3"), Rule::deny());
        judge(&firewall, &frame);
        let options = AttachOptions::new("eth0").pin(&directory);
        drop(pair.server.run(|| firewall.attach(&options)).unwrap());
        // The pair's hosts have something to say, so counters may go on.
        let rules =
            |firewall: &Firewall| -> Vec<_> { firewall.iter().unwrap().map(|e| (e.selector, e.rule)).collect() };
        let before = rules(&firewall);
        drop(firewall);

        let firewall = Firewall::adopt(&directory, "firewall").unwrap();
        assert_eq!(firewall.engine(), engine);
        assert_eq!(rules(&firewall), before);
        assert_eq!(firewall.get(on("10.192.192.3")).unwrap().unwrap().count.packets, 1);
        agree(&firewall, &model, &mut random, 300);
        for _ in 0..300 {
            let v6 = random.bool();
            let (selector, rule) = (selector(&mut random, v6), rule(&mut random));
            if firewall.insert(selector, rule).is_ok() {
                model.set(selector, rule);
            }
        }
        agree(&firewall, &model, &mut random, 300);

        // A list that nobody confirmed, because the process is gone.
        let new = [(on("0.0.0.0/0"), Rule::deny()), (on("::/0"), Rule::deny())];
        let (mut firewall, mut trial) = (firewall, Duration::from_millis(500));
        loop {
            let _ = firewall.replace_all_unless_confirmed(new, trial).unwrap();
            drop(firewall);
            firewall = Firewall::adopt(&directory, "firewall").unwrap();
            if firewall.len().unwrap() == 2 {
                break;
            }
            // The machine is so slow that the trial is over already.
            trial *= 3;
            assert!(trial < Duration::from_secs(60), "the list on trial is lost");
        }
        drop(firewall);
        thread::sleep(trial + Duration::from_millis(50));
        let firewall = Firewall::adopt(&directory, "firewall").unwrap();
        assert_eq!(firewall.len().unwrap(), model.0.len());
        agree(&firewall, &model, &mut random, 300);
        firewall.replace_all(new).unwrap();
        assert_eq!(judge(&firewall, &packet("2001:db8::1", "2001:db8::2", "47")), DENIED);
        xdpkit::remove_pins(&directory).unwrap();
    }
}

#[test]
fn a_new_rule_has_not_counted_what_a_removed_one_had_before_the_process_ended() {
    let bpffs = BpfFs::new().unwrap();
    for engine in ENGINES {
        let pair = Pair::new().unwrap();
        let directory = bpffs.path().join(format!("{engine:?}"));
        let (old, new) = (on("192.0.2.0/24"), on("198.51.100.0/24"));
        let firewall = load(engine);
        drop(pair.server.run(|| firewall.attach(&AttachOptions::new("eth0").pin(&directory))).unwrap());
        firewall.insert(old, Rule::deny()).unwrap();
        for _ in 0..100 {
            judge(&firewall, &packet("192.0.2.1", "10.0.0.1", "47"));
        }
        assert_eq!(firewall.get(old).unwrap().unwrap().count.packets, 100);
        firewall.remove(old).unwrap();
        drop(firewall);
        let firewall = Firewall::adopt(&directory, "firewall").unwrap();
        firewall.insert(new, Rule::deny()).unwrap();
        judge(&firewall, &packet("198.51.100.1", "10.0.0.1", "47"));
        assert_eq!(firewall.get(new).unwrap().unwrap().count.packets, 1, "{engine:?}");
        xdpkit::remove_pins(&directory).unwrap();
    }
}

#[test]
fn a_list_that_was_dropped_long_ago_is_no_obstacle() {
    // Edits take the room that the first list had; nothing may lead there any more.
    let bpffs = BpfFs::new().unwrap();
    for engine in ENGINES {
        let pair = Pair::new().unwrap();
        let directory = bpffs.path().join(format!("{engine:?}"));
        let hosts = |net: u8| (0..250).map(move |n| (on(&format!("{net}.{n}.1.1")), Rule::deny()));
        {
            let firewall = load(engine);
            drop(pair.server.run(|| firewall.attach(&AttachOptions::new("eth0").pin(&directory))).unwrap());
            firewall.replace_all(hosts(20)).unwrap();
            firewall.replace_all(hosts(21)).unwrap();
            firewall.insert_many(hosts(22)).unwrap();
        }
        let firewall = Firewall::adopt(&directory, "firewall").unwrap();
        assert_eq!(firewall.len().unwrap(), 500);
        for source in ["21.7.1.1", "22.249.1.1"] {
            assert_eq!(judge(&firewall, &packet(source, "192.0.2.1", "47")), DENIED, "{engine:?}: {source}");
        }
        xdpkit::remove_pins(&directory).unwrap();
    }
}

/// Edits until it is killed.
fn edit_for_ever(directory: &OsStr) -> ! {
    let firewall = Firewall::adopt(directory, "firewall").unwrap();
    let mut random = Rng::with_seed(std::process::id().into());
    println!("editing");
    loop {
        let list: Vec<_> =
            (0..random.u8(1..200)).map(|n| (on(&format!("10.{n}.0.0/16 tcp")), rule(&mut random))).collect();
        if random.bool() {
            firewall.replace_all(list).unwrap();
        } else {
            let pending = firewall.replace_all_unless_confirmed(list, Duration::from_millis(40)).unwrap();
            match random.u8(..3) {
                0 => pending.confirm().unwrap(),
                1 => pending.roll_back().unwrap(),
                _ => thread::sleep(Duration::from_millis(50)),
            }
        }
        for n in 0..random.u8(..100) {
            firewall.insert(on(&format!("10.{n}.{n}.0/24")), rule(&mut random)).unwrap();
            firewall.remove(on(&format!("10.{}.0.0/16 tcp", random.u8(..)))).unwrap();
        }
    }
}

#[test]
fn a_process_killed_in_the_middle_leaves_nothing_half_done() {
    if let Some(directory) = std::env::var_os(DIRECTORY) {
        edit_for_ever(&directory);
    }
    let bpffs = BpfFs::new().unwrap();
    for engine in ENGINES {
        let pair = Pair::new().unwrap();
        let directory = bpffs.path().join(format!("{engine:?}"));
        drop(pair.server.run(|| load(engine).attach(&AttachOptions::new("eth0").pin(&directory))).unwrap());
        for round in 0..crate::common::times(5, 50, 1) as u64 {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "adopt::a_process_killed_in_the_middle_leaves_nothing_half_done", "--nocapture"])
                .env(DIRECTORY, &directory)
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let lines = BufReader::new(child.stdout.take().unwrap()).lines();
            assert!(lines.map_while(Result::ok).any(|line| line.contains("editing")));
            thread::sleep(Duration::from_millis(20 + 7 * round));
            child.kill().unwrap();
            child.wait().unwrap();
            let firewall = Firewall::adopt(&directory, "firewall").unwrap();
            if let Some(pending) = firewall.pending().unwrap() {
                pending.roll_back().unwrap();
            }
            let model = Model(firewall.iter().unwrap().map(|entry| (entry.selector, entry.rule)).collect());
            let mut random = Rng::with_seed(round);
            for _ in 0..200 {
                let source = IpAddr::from([10, random.u8(..210), random.u8(..110), 1]);
                let frame = packet(&source.to_string(), "192.0.2.1", "tcp/80");
                let wanted = model.verdict(source, [192, 0, 2, 1].into(), 6, Some(80));
                let action = firewall.test_run(&frame).unwrap().action;
                assert_eq!(action, wanted.0, "{engine:?} round {round}: {source}");
            }
            // And the tables are whole: they take the next lists.
            for list in 0..3 {
                let rules: Vec<_> =
                    (0..250).map(|n| (on(&format!("{}.{n}.0.0/16", 20 + list)), Rule::deny())).collect();
                firewall.replace_all(rules).unwrap();
                assert_eq!(judge(&firewall, &packet(&format!("{}.9.9.9", 20 + list), "192.0.2.1", "47")), DENIED);
                assert_eq!(firewall.len().unwrap(), 250);
            }
        }
        xdpkit::remove_pins(&directory).unwrap();
    }
}
