//! The appliance under traffic: reloads, kills and upgrades, one after the other or in any order. Nothing that is denied
//! passes, nothing that is allowed is lost, and each packet is counted once.
#![cfg(all(feature = "serde", feature = "health", feature = "pcapng"))]

mod common;
#[path = "appliance_process/process.rs"]
mod process;

use std::time::Duration;

use common::{times, traffic::Lockstep};
use process::{FILE, Place, Running};
use xdpkit_lab::{bpffs::BpfFs, topology::Pair};

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
    let lab = Pair::new().unwrap();
    let place = Place::new("kills");
    place.write(FILE);
    let pins = BpfFs::new().unwrap();
    let pin = pins.path().join("appliance");
    let pin = ["--pin", pin.to_str().unwrap()];
    let mut appliance = Running::start(&lab.server, &place.file(), &pin);
    assert_eq!(appliance.expect("ready")["adopted"], false);
    let traffic = Lockstep::start(&lab);
    let rounds = times(6, 100, 2);
    for round in 0..rounds {
        // Killed: the data path stays. Upgraded: the new process takes over while the old one lives.
        let upgraded = round % 2 == 1;
        let old = if upgraded {
            Some(appliance)
        } else {
            appliance.kill();
            None
        };
        appliance = Running::start(&lab.server, &place.file(), &pin);
        assert_eq!(appliance.expect("ready")["adopted"], true);
        if let Some(old) = old {
            old.kill();
        }
        assert!(traffic.is_running(), "round {round}");
    }
    let sent = traffic.stop();
    assert!(sent.denied > rounds as u64, "{sent:?}");
    let stats = appliance.stop();
    let denied = stats["functions"]["edge"]["reasons"]["denied"].as_u64().unwrap();
    assert_eq!(denied, sent.denied, "counters go on over all of it");
}

/// What `./x soak` runs for a time of your choice: whatever may happen to an appliance, in any order. Nothing denied passes,
/// nothing allowed is lost, and every denied packet is counted once.
#[test]
fn soak_reloads_kills_and_upgrades_in_any_order_under_traffic() {
    let seconds = std::env::var("XDPKIT_SOAK_SECONDS");
    let seconds = seconds.map_or(times(4, 60, 2) as u64, |text| text.parse().expect("XDPKIT_SOAK_SECONDS: seconds"));
    let lab = Pair::new().unwrap();
    let place = Place::new("soak");
    place.write(FILE);
    let pins = BpfFs::new().unwrap();
    let pin = pins.path().join("appliance");
    let pin = ["--pin", pin.to_str().unwrap()];
    let mut appliance = Running::start(&lab.server, &place.file(), &pin);
    appliance.expect("ready");
    let traffic = Lockstep::start(&lab);
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
            place.write(&if invalid { text.replace("fd00::66", "fd00::66/129") } else { text.clone() });
            assert_eq!(appliance.reload().is_err(), invalid, "{text}");
            if invalid {
                // So that the next start finds a right one.
                place.write(&text);
                appliance.reload().unwrap();
            }
            reloads += 1;
        } else {
            let old = if random.bool() {
                Some(appliance)
            } else {
                appliance.kill();
                None
            };
            appliance = Running::start(&lab.server, &place.file(), &pin);
            assert_eq!(appliance.expect("ready")["adopted"], true);
            drop(old);
            restarts += 1;
        }
        assert!(traffic.is_running(), "after {reloads} reloads and {restarts} restarts");
    }
    let sent = traffic.stop();
    println!("{reloads} reloads, {restarts} restarts, {sent:?}");
    let stats = appliance.stop();
    assert_eq!(stats["functions"]["edge"]["reasons"]["denied"].as_u64().unwrap(), sent.denied, "{stats}");
}
