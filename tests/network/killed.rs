//! `kill -9` of the process that owns the balancers: the data path goes on, and follows what changes all the same.

use std::{
    env, fs,
    path::Path,
    process::Child,
    thread,
    time::{Duration, Instant},
};

use xdpkit::{AttachOptions, DsrBalancer, NatBalancer};
use xdpkit_lab::bpffs::BpfFs;

use crate::{
    balancers::{attach, decapsulate, dsr_config, insert_services, nat_config},
    bench::{assert_followed, balanced, echoes, lead, losses, replies_by, within},
    lab::{FIRST_BACKEND, Host, Lab, SECOND},
    live::{change_macs, leave_first_path},
    matrix::lab_of,
};

const TASK: &str = "XDPKIT_TEST_NETWORK_OWNER";
/// Its programs take a minute to load in an emulated machine.
const PATIENCE: Duration = Duration::from_secs(300);

/// What the started process does: it owns balancers on these cards, with pins in this directory, until it is killed.
fn own(task: &str) -> ! {
    let (directory, cards) = task.split_once('|').expect("a directory and cards");
    let nat = NatBalancer::load_or_adopt(directory, &nat_config()).unwrap();
    let dsr = DsrBalancer::load_or_adopt(directory, &dsr_config()).unwrap();
    assert_eq!(insert_services(&nat, &dsr, 1), [""; 0]);
    // The first card is the one to the front.
    let attach = |(number, card)| attach(&nat, &dsr, number == 0, AttachOptions::new(card).pin(directory));
    let _chains: Vec<_> = cards.split(',').enumerate().map(attach).collect();
    fs::create_dir(Path::new(directory).join("ready")).unwrap();
    loop {
        thread::sleep(Duration::from_secs(60));
    }
}

/// A process that owns balancers; it is killed at the latest when it is dropped.
struct Owner(Child);

impl Owner {
    fn start(lab: &Lab, test: &str, directory: &Path) -> Self {
        let mut command = lab.balancer.command(env::current_exe().unwrap());
        command.args(["--exact", test, "--nocapture"]);
        command.env(TASK, format!("{}|{}", directory.display(), lab.cards.join(",")));
        let mut owner = Self(command.spawn().unwrap());
        let end = Instant::now() + PATIENCE;
        while !directory.join("ready").exists() {
            assert!(owner.0.try_wait().unwrap().is_none(), "the owner ended early");
            assert!(Instant::now() < end, "the owner is not ready");
            thread::sleep(Duration::from_millis(20));
        }
        owner
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // It may have been killed.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// MAC addresses change as soon as the owner is dead, and then the route.
fn killed(host: Host, test: &str) {
    if let Ok(task) = env::var(TASK) {
        own(&task);
    }
    let Some(lab) = lab_of(host, 1, true) else { return };
    let bpffs = BpfFs::new().unwrap();
    let directory = bpffs.path().join("app");
    fs::create_dir(&directory).unwrap();
    let _echoes = echoes(&lab);
    let _decaps = decapsulate(&lab);
    let mut owner = Owner::start(&lab, test, &directory);
    let lost = losses(&lab, balanced(), Duration::ZERO, |lab| {
        owner.kill();
        change_macs(lab);
    });
    println!("{host:?}, MAC addresses: {lost:?}");
    assert_followed(Duration::ZERO, &lost, within());
    let lost = losses(&lab, balanced(), Duration::ZERO, |lab| {
        lead(lab, SECOND, FIRST_BACKEND, None);
        replies_by(lab, SECOND);
        leave_first_path(lab);
    });
    println!("{host:?}, route: {lost:?}");
    assert_followed(Duration::ZERO, &lost, within());
}

#[test]
fn a_killed_owners_balancers_follow_changes() {
    killed(Host::Plain, "killed::a_killed_owners_balancers_follow_changes");
}

#[test]
fn a_killed_owners_balancers_follow_changes_on_vlans() {
    killed(Host::Vlan, "killed::a_killed_owners_balancers_follow_changes_on_vlans");
}
