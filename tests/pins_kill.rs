//! Pins and `kill -9`: whatever a process was at, what it leaves goes on, and the next one gets along with it.

mod common;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Child,
    time::Duration,
};

use common::{
    pins::{firewall, monitor, options},
    traffic::{Lockstep, Sent},
};
use xdpkit::{
    Action, Firewall, FirewallConfig, PacketMonitor, Pipeline, Position, Protocol, Reason, Stage as _, pinned,
    remove_pins,
};
use xdpkit_lab::{bpffs::BpfFs, topology::Pair};

const DIRECTORY: &str = "XDPKIT_TEST_PIN_DIRECTORY";

/// Runs the test of this name again, in a process of its own in the server's namespace, where
/// `child_directory` answers.
fn start_child(pair: &Pair, test: &str, directory: &Path) -> Child {
    let mut command = pair.server.command(env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env(DIRECTORY, directory);
    command.spawn().unwrap()
}

/// The pin directory, in a process that `start_child` made.
fn child_directory() -> Option<PathBuf> {
    env::var_os(DIRECTORY).map(Into::into)
}

/// Tells the parent by a file that all is set up, and waits to be killed.
fn wait_to_be_killed(directory: &Path) -> ! {
    fs::create_dir(directory.join("ready")).unwrap();
    loop {
        std::thread::sleep(Duration::from_secs(60));
    }
}

fn wait_until_ready(directory: &Path, child: &mut Child) {
    for _ in 0..6000 {
        if directory.join("ready").exists() {
            fs::remove_dir(directory.join("ready")).unwrap();
            return;
        }
        assert!(child.try_wait().unwrap().is_none(), "the child ended early");
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("the child is not ready after a minute");
}

#[test]
fn kill_9_leaves_the_chain_enforcing_and_a_second_process_adopts_it() {
    if let Some(directory) = child_directory() {
        let (monitor, firewall) = (monitor("monitor"), firewall());
        let mut chain = Pipeline::new(&[&monitor, &firewall]).unwrap();
        chain.attach(&options(&directory)).unwrap();
        wait_to_be_killed(&directory);
    }
    let pair = Pair::new().unwrap();
    let bpffs = BpfFs::new().unwrap();
    let mut sent = Sent::default();
    let directory = bpffs.path().join("app");
    fs::create_dir(&directory).unwrap();
    let mut child = start_child(&pair, "kill_9_leaves_the_chain_enforcing_and_a_second_process_adopts_it", &directory);
    wait_until_ready(&directory, &mut child);

    // From before the kill until after the upgrade: the lockstep panics if one packet slips by or is lost.
    let traffic = Lockstep::start(&pair);
    std::thread::sleep(Duration::from_millis(200));
    child.kill().unwrap();
    child.wait().unwrap();
    std::thread::sleep(Duration::from_millis(300));

    for round in 0..common::times(5, 50, 2) {
        let firewall = Firewall::adopt(&directory, "firewall").unwrap();
        let monitor = PacketMonitor::adopt(&directory, "monitor").unwrap();
        // The order of the chain may change with the upgrade.
        let mut chain = match round % 2 {
            0 => Pipeline::new(&[&firewall, &monitor]).unwrap(),
            _ => Pipeline::new(&[&monitor, &firewall]).unwrap(),
        };
        pair.server.run(|| chain.attach(&options(&directory))).unwrap();
        assert!(chain.adopted());
        assert!(traffic.is_running(), "round {round}");
        // Dropped without detaching: the next round stands for the next process.
    }
    let end = traffic.stop();
    sent.allowed += end.allowed;
    sent.denied += end.denied;

    let firewall = Firewall::adopt(&directory, "firewall").unwrap();
    let stats = firewall.stats().unwrap();
    assert_eq!(stats.reason(Reason::Denied).packets, sent.denied, "the counters went on from process to process");
    assert_eq!(firewall.iter().unwrap().count(), 2, "and so did the rules");
    assert!(sent.denied > 100, "there was traffic: {sent:?}");
    remove_pins(&directory).unwrap();
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
}

#[test]
fn kill_9_in_the_middle_of_edits_leaves_a_whole_chain() {
    if let Some(directory) = child_directory() {
        let (front, firewall, extra) = (monitor("front"), firewall(), monitor("extra"));
        let mut chain = Pipeline::new(&[&front, &firewall]).unwrap();
        chain.attach(&options(&directory)).unwrap();
        fs::create_dir(directory.join("ready")).unwrap();
        loop {
            chain.insert(Position::First, &extra).unwrap();
            chain.reorder(&["firewall", "extra", "front"]).unwrap();
            chain.remove("extra").unwrap();
            chain.reorder(&["front", "firewall"]).unwrap();
        }
    }
    let pair = Pair::new().unwrap();
    for round in 0..common::times(4, 40, 2) {
        let bpffs = BpfFs::new().unwrap();
        let directory = bpffs.path().join("app");
        fs::create_dir(&directory).unwrap();
        let mut child = start_child(&pair, "kill_9_in_the_middle_of_edits_leaves_a_whole_chain", &directory);
        wait_until_ready(&directory, &mut child);
        let traffic = Lockstep::start(&pair);
        std::thread::sleep(Duration::from_millis(150 + 37 * (round as u64 % 11)));
        child.kill().unwrap();
        child.wait().unwrap();
        std::thread::sleep(Duration::from_millis(50));
        let firewall = Firewall::adopt(&directory, "firewall").unwrap();
        let attachment = pair.server.run(|| firewall.attach(&options(&directory).replace_chain(true))).unwrap();
        assert!(attachment.adopted());
        let sent = traffic.stop();
        assert_eq!(firewall.stats().unwrap().reason(Reason::Denied).packets, sent.denied, "round {round}");
        // What the killed process left lying about is swept: the link and one instance.
        let interfaces = directory.join("interfaces");
        let home = fs::read_dir(&interfaces).unwrap().next().unwrap().unwrap().path();
        assert_eq!(fs::read_dir(&home).unwrap().count(), 2, "round {round}");
        attachment.detach().unwrap();
    }
}

#[test]
fn kill_9_in_attach_and_detach_never_blocks_the_next_start() {
    if let Some(directory) = child_directory() {
        let own = monitor("own");
        own.set_action(Protocol::Udp, Some(Action::Drop)).unwrap();
        fs::create_dir(directory.join("ready")).unwrap();
        loop {
            let firewall = Firewall::load_or_adopt(&directory, &FirewallConfig::default()).unwrap();
            let mut chain = Pipeline::new(&[&firewall]).unwrap();
            chain.attach(&options(&directory)).unwrap();
            chain.set_last(Some(own.program_fd())).unwrap();
            chain.set_last(None).unwrap();
            chain.detach().unwrap();
        }
    }
    let pair = Pair::new().unwrap();
    let bpffs = BpfFs::new().unwrap();
    let directory = bpffs.path().join("app");
    fs::create_dir(&directory).unwrap();
    for round in 0..common::times(12, 100, 3) {
        let mut child = start_child(&pair, "kill_9_in_attach_and_detach_never_blocks_the_next_start", &directory);
        wait_until_ready(&directory, &mut child);
        std::thread::sleep(Duration::from_millis(60 + 7 * (round as u64 % 13)));
        child.kill().unwrap();
        child.wait().unwrap();
        let firewall = Firewall::load_or_adopt(&directory, &FirewallConfig::default()).unwrap();
        let mut chain = Pipeline::new(&[&firewall]).unwrap();
        pair.server.run(|| chain.attach(&options(&directory))).unwrap();
        // Killed between its two calls, the other's last program goes on; it can be let go of.
        chain.set_last(None).unwrap();
        assert_eq!(pinned(&directory).unwrap().interfaces[0].1, ["firewall"], "round {round}");
        chain.detach().unwrap();
        assert_eq!(pinned(&directory).unwrap().interfaces, []);
    }
}
