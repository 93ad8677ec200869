//! The appliance under traffic: reloads, kills and upgrades, one after the other or in any order. Nothing that is denied
//! passes, nothing that is allowed is lost, and each packet is counted once.
#![cfg(all(feature = "serde", feature = "health", feature = "pcapng"))]

use std::time::Duration;

use crate::common::{
    times,
    traffic::{Lockstep, Sent},
};
use crate::process::{FILE, Place, Running};
use xdpkit_lab::{bpffs::BpfFs, topology::Pair};

/// An appliance at work that others may take over.
struct Pinned {
    lab: Pair,
    place: Place,
    pins: BpfFs,
    traffic: Lockstep,
    /// The one that is at it; `None` where nobody is.
    appliance: Option<Running>,
}

impl Pinned {
    fn start(name: &str) -> Self {
        let (lab, place, pins) = (Pair::new().unwrap(), Place::new(name), BpfFs::new().unwrap());
        place.write(FILE);
        let mut appliance = run(&lab, &place, &pins);
        assert_eq!(appliance.expect("ready")["adopted"], false);
        let traffic = Lockstep::start(&lab);
        Self { lab, place, pins, traffic, appliance: Some(appliance) }
    }

    /// Kills it before the next one starts, or (an upgrade) when the next one has taken over.
    fn restart(&mut self, upgraded: bool) {
        let old = self.appliance.take().filter(|_| upgraded);
        let mut next = run(&self.lab, &self.place, &self.pins);
        assert_eq!(next.expect("ready")["adopted"], true);
        drop(old);
        self.appliance = Some(next);
    }

    fn reload(&mut self) -> Result<(), String> {
        self.appliance.as_mut().expect("somebody is at it").reload()
    }

    /// Answers what was sent, after a look at the counters: each denied packet is counted once.
    fn stop(self) -> Sent {
        let sent = self.traffic.stop();
        let stats = self.appliance.expect("somebody is at it").stop();
        let denied = stats["functions"]["edge"]["reasons"]["denied"].as_u64().unwrap();
        assert_eq!(denied, sent.denied, "counters go on over all of it: {stats}");
        sent
    }
}

fn run(lab: &Pair, place: &Place, pins: &BpfFs) -> Running {
    let pin = pins.path().join("appliance");
    Running::start(&lab.server, &place.file(), &["--pin", pin.to_str().unwrap()])
}

#[test]
fn reloads_under_traffic_lose_nothing_and_let_nothing_by() {
    let lab = Pair::new().unwrap();
    let place = Place::new("reloads");
    place.write(FILE);
    let mut appliance = Running::start(&lab.server, &place.file(), &[]);
    appliance.expect("ready");
    let traffic = Lockstep::start(&lab);
    let files = [
        FILE.to_owned(),
        FILE.replace("'watch', 'edge'", "'edge', 'watch'"),
        "not toml".into(),
        FILE.replace("deny = [", "allow = ['10.0.0.0/24']\ndeny = ["),
        FILE.replace("'watch', 'edge'", "'edge'").replace("[monitor.watch]", ""),
        FILE.replace("10.0.0.66", "10.0.0.66/33"),
        FILE.replace("'watch', 'edge'", "'watch', 'more', 'edge'")
            + "[firewall.more]\ndeny = ['10.0.0.0/8 to 9.9.9.9']",
        FILE.replace("sample = 1", "capacity = 3"),
    ];
    let reloads = times(40, 1000, 8);
    for reload in 0..reloads {
        let text = &files[reload * 5 % files.len()];
        place.write(text);
        let invalid = ["not toml", "/33", "capacity"].iter().any(|mark| text.contains(mark));
        assert_eq!(appliance.reload().is_err(), invalid, "{text}");
        assert!(traffic.is_running(), "reload {reload}: {text}");
    }
    let sent = traffic.stop();
    assert!(sent.denied > reloads as u64, "{sent:?}");
    let stats = appliance.stop();
    let denied = stats["functions"]["edge"]["reasons"]["denied"].as_u64().unwrap();
    assert_eq!(denied, sent.denied, "each denied packet met that firewall once");
}

#[test]
fn kills_and_upgrades_under_traffic_lose_nothing_and_let_nothing_by() {
    let mut pinned = Pinned::start("kills");
    let rounds = times(6, 100, 2);
    for round in 0..rounds {
        pinned.restart(round % 2 == 1);
        assert!(pinned.traffic.is_running(), "round {round}");
    }
    let sent = pinned.stop();
    assert!(sent.denied > rounds as u64, "{sent:?}");
}

/// What `./x soak` runs for a time of your choice: whatever may happen to an appliance, in any order. Nothing denied passes,
/// nothing allowed is lost, and every denied packet is counted once.
#[test]
fn soak_reloads_kills_and_upgrades_in_any_order_under_traffic() {
    let seconds = std::env::var("XDPKIT_SOAK_SECONDS");
    let seconds = seconds.map_or(times(4, 60, 2) as u64, |text| text.parse().expect("XDPKIT_SOAK_SECONDS: seconds"));
    let mut pinned = Pinned::start("soak");
    let mut random = fastrand::Rng::new();
    println!("seed {}", random.get_seed());
    let end = std::time::Instant::now() + Duration::from_secs(seconds);
    let (mut reloads, mut restarts) = (0, 0);
    while std::time::Instant::now() < end || reloads == 0 || restarts == 0 {
        if random.u8(..4) > 0 {
            let mut chain = vec!["'edge'"];
            let (watched, limited) = (random.bool(), random.bool());
            let mut more = String::new();
            if watched {
                chain.insert(random.usize(..2), "'watch'");
                more += &format!("[monitor.watch]\nsettings.sample = {}\n", random.u8(..3));
            }
            if limited {
                chain.insert(random.usize(..=chain.len()), "'limits'");
                more +=
                    &format!("[rate_limiter.limits]\nsettings.limits = {{ all = '{}000000/s' }}\n", random.u32(1..100));
            }
            let own: Vec<String> =
                (0..random.usize(..50)).map(|_| format!("'198.51.{}.0/24'", random.u8(..))).collect();
            let text = format!(
                "[interface.eth0]\nchain = [{}]\n{more}[firewall.edge]\ndeny = ['10.0.0.66', 'fd00::66']\ncount = [{}]\n",
                chain.join(", "),
                own.join(", ")
            );
            let invalid = random.u8(..5) == 0;
            pinned.place.write(&if invalid { text.replace("fd00::66", "fd00::66/129") } else { text.clone() });
            assert_eq!(pinned.reload().is_err(), invalid, "{text}");
            if invalid {
                // So that the next start finds a right one.
                pinned.place.write(&text);
                pinned.reload().unwrap();
            }
            reloads += 1;
        } else {
            pinned.restart(random.bool());
            restarts += 1;
        }
        assert!(pinned.traffic.is_running(), "after {reloads} reloads and {restarts} restarts");
    }
    let sent = pinned.stop();
    println!("{reloads} reloads, {restarts} restarts, {sent:?}");
}
