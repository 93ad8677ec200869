//! One owner at a time: who may change tables that are pinned. Two processes at full speed are in handover.rs.

mod common;

use std::{fs::File, net::IpAddr, path::Path, time::Duration};

use common::pins::{firewall, monitor, options};
use xdpkit::{
    Action, DsrBalancer, DsrConfig, DsrService, Error, Firewall, FirewallConfig, Loss, MonitorConfig, NatBalancer,
    NatConfig, NatService, PacketMonitor, Pipeline, Position, Protocol, Rate, RateLimiter, RateLimiterConfig, Result,
    Rule, Scope, Stage, Tier,
};
use xdpkit_lab::{bpffs::BpfFs, topology::Pair};

fn is_superseded<T: std::fmt::Debug>(result: Result<T>) -> bool {
    matches!(result, Err(Error::Superseded { .. }))
}

/// Pins a value's tables, by an attachment that stays.
fn pin(pair: &Pair, stage: &dyn Stage, directory: &Path) {
    pair.server.run(|| Pipeline::new(&[stage]).unwrap().attach(&options(directory))).unwrap();
}

#[test]
fn every_edit_of_a_superseded_value_is_refused_and_changes_nothing() {
    let bpffs = BpfFs::new().unwrap();
    let at = |name: &str| bpffs.path().join(name);
    let (pair, source) = (Pair::new().unwrap(), "192.0.2.7".parse::<IpAddr>().unwrap());

    let old = PacketMonitor::load(&MonitorConfig::default()).unwrap();
    pin(&pair, &old, &at("monitor"));
    let new = PacketMonitor::load_or_adopt(at("monitor"), &MonitorConfig::default()).unwrap();
    for edit in
        [old.set_sample(7), old.set_action(Protocol::Udp, Some(Action::Drop)), old.configure(&MonitorConfig::default())]
    {
        assert!(is_superseded(edit));
    }
    assert!(old.stats().is_ok() && old.protocols().is_ok(), "reading goes on");
    new.set_sample(3).unwrap();

    let pair = Pair::new().unwrap();
    let old = firewall();
    pin(&pair, &old, &at("firewall"));
    let new = Firewall::load_or_adopt(at("firewall"), &FirewallConfig::default()).unwrap();
    let (selector, rule) = ("192.0.2.0/24".parse().unwrap(), Rule::deny());
    assert!(is_superseded(old.insert(selector, rule)));
    assert!(is_superseded(old.insert_many([(selector, rule)])));
    assert!(is_superseded(old.remove("10.0.0.66".parse().unwrap())));
    assert!(is_superseded(old.remove_many([selector])));
    assert!(is_superseded(old.remove_expired()));
    assert!(is_superseded(old.replace_all([(selector, rule)])));
    assert!(is_superseded(old.replace_all_unless_confirmed([(selector, rule)], Duration::from_secs(1)).map(drop)));
    assert!(is_superseded(old.set_default(xdpkit::Decision::Deny)));
    assert!(is_superseded(old.set_count_only(true)));
    assert!(is_superseded(old.set_sample(1)));
    assert!(is_superseded(old.configure(&FirewallConfig::default())));
    assert_eq!((old.len().unwrap(), new.len().unwrap()), (2, 2));
    assert_eq!(new.matching(source).unwrap(), None);

    let pair = Pair::new().unwrap();
    let config = RateLimiterConfig::default().limit(Scope::All, Rate::per_second(10));
    let old = RateLimiter::load(&config).unwrap();
    pin(&pair, &old, &at("limiter"));
    let new = RateLimiter::load_or_adopt(at("limiter"), &config).unwrap();
    let prefix = "192.0.2.0/24".parse().unwrap();
    assert!(is_superseded(old.limits().insert(Scope::Tcp, Rate::per_second(1))));
    assert!(is_superseded(old.limits().remove(Scope::All)));
    assert!(is_superseded(old.tiers().insert(prefix, Tier::Blocked)));
    assert!(is_superseded(old.tiers().remove(prefix)));
    assert!(is_superseded(old.tiers().replace_all([(prefix, Tier::Blocked)])));
    assert!(is_superseded(old.bans().insert(source, None)));
    assert!(is_superseded(old.bans().lift(source)));
    assert!(is_superseded(old.bans().clear()));
    assert!(is_superseded(old.reset(source)));
    assert!(is_superseded(old.set_ban(None)));
    assert!(is_superseded(old.set_count_only(true)));
    assert!(is_superseded(old.configure(&config)));
    assert_eq!(
        (new.limits().iter().collect::<Vec<_>>(), new.tiers().len(), new.bans().len().unwrap()),
        (config.limits, 0, 0)
    );

    let pair = Pair::new().unwrap();
    let (service, backend) = ("tcp/10.0.0.100:80".parse().unwrap(), "10.0.0.11:8080".parse().unwrap());
    let old = NatBalancer::load(&NatConfig::default()).unwrap();
    old.insert(service, &NatService::new([backend])).unwrap();
    pin(&pair, &old, &at("nat"));
    let new = NatBalancer::load_or_adopt(at("nat"), &NatConfig::default()).unwrap();
    let (other, more) = ("tcp/10.0.0.101:80".parse().unwrap(), "10.0.0.12:8080".parse().unwrap());
    assert!(is_superseded(old.insert(other, &NatService::new([backend]))));
    assert!(is_superseded(old.remove(&service)));
    assert!(is_superseded(old.set_backend(&service, more, 1)));
    assert!(is_superseded(old.set_backends(&service, &[(more, 1)])));
    assert!(is_superseded(old.drain(&service, backend)));
    assert!(is_superseded(old.remove_backend(&service, backend)));
    assert!(is_superseded(old.kill(&service, backend)));
    assert!(is_superseded(old.collect()));
    assert!(is_superseded(old.set_timeouts(&Default::default())));
    assert!(is_superseded(old.set_sample(1)));
    assert!(is_superseded(old.configure(&NatConfig::default())));
    assert_eq!(new.get(&service).unwrap(), NatService::new([backend]));
    assert_eq!(old.services(), new.services());

    let pair = Pair::new().unwrap();
    let backend = backend.ip();
    let config = DsrConfig::default().check_on_link(false);
    let old = DsrBalancer::load(&config).unwrap();
    old.insert_service(service, DsrService::l2(), [(backend, 1)]).unwrap();
    pin(&pair, &old, &at("dsr"));
    let new = DsrBalancer::load_or_adopt(at("dsr"), &config).unwrap();
    assert!(is_superseded(old.insert_service(other, DsrService::l2(), [(backend, 1)])));
    assert!(is_superseded(old.remove_service(service)));
    assert!(is_superseded(old.set_backend(service, more.ip(), 1)));
    assert!(is_superseded(old.set_backends(service, [(more.ip(), 1)])));
    assert!(is_superseded(old.drain(service, backend)));
    assert!(is_superseded(old.remove_backend(service, backend)));
    assert!(is_superseded(old.kill(service, backend)));
    assert!(is_superseded(old.set_echo(xdpkit::Echo::Pass)));
    assert!(is_superseded(old.set_probe_interface(None)));
    assert!(is_superseded(old.configure(&config)));
    let listed = |balancer: &DsrBalancer| -> Vec<_> {
        balancer.backends(service).unwrap().iter().map(|entry| (entry.address, entry.weight, entry.state)).collect()
    };
    assert_eq!(listed(&new), listed(&old));
}

#[test]
fn an_adopter_that_ends_before_it_is_ready_gives_the_tables_back() {
    let (bpffs, pair) = (BpfFs::new().unwrap(), Pair::new().unwrap());
    let path = bpffs.path();
    let old = firewall();
    let mut chain = Pipeline::new(&[&old]).unwrap();
    pair.server.run(|| chain.attach(&options(path))).unwrap();
    let selector = |text: &str| text.parse().unwrap();
    let more = monitor("m");
    for round in 0..3 {
        let new = Firewall::adopt(path, "firewall").unwrap();
        new.insert(selector(&format!("198.51.100.{round}")), Rule::deny()).unwrap();
        assert!(is_superseded(old.insert(selector("192.0.2.1"), Rule::deny())));
        assert!(!old.is_superseded(), "not for good");
        assert!(is_superseded(chain.insert(Position::Last, &more)));
        drop(new);
        // With what the other has changed.
        assert_eq!(old.insert(selector(&format!("198.51.100.{round}")), Rule::deny()).unwrap(), Some(Rule::deny()));
        assert_eq!(old.len().unwrap(), 3 + round);
        chain.insert(Position::Last, &more).unwrap();
        chain.remove("m").unwrap();
    }
    // Of several, the last one is the owner; the one before it comes next.
    let one = Firewall::adopt(path, "firewall").unwrap();
    let two = Firewall::adopt(path, "firewall").unwrap();
    assert!(is_superseded(one.remove_expired()));
    drop(two);
    assert!(is_superseded(old.remove_expired()));
    assert_eq!(one.remove_expired().unwrap(), 0);
    one.ready().unwrap();
    drop(one);
    assert!(old.is_superseded() && chain.is_superseded().unwrap());
    assert!(is_superseded(old.remove_expired()));
    assert!(is_superseded(chain.insert(Position::Last, &more)));
    assert!(is_superseded(pair.server.run(|| old.attach(&options(path))).map(drop)));
}

#[test]
fn an_adopter_that_attached_and_ended_before_it_was_ready_gives_the_chain_back() {
    let (bpffs, pair) = (BpfFs::new().unwrap(), Pair::new().unwrap());
    let path = bpffs.path();
    let old = firewall();
    let mut chain = Pipeline::new(&[&old]).unwrap();
    pair.server.run(|| chain.attach(&options(path))).unwrap();
    let new = Firewall::adopt(path, "firewall").unwrap();
    let attachment = pair.server.run(|| new.attach(&options(path).announce_ready(false))).unwrap();
    assert!(!chain.is_superseded().unwrap());
    drop((attachment, new));
    chain.insert(Position::Last, &monitor("m")).unwrap();
    assert!(chain.is_attached().unwrap());
    assert_eq!(xdpkit::pinned(path).unwrap().interfaces[0].1, ["firewall", "m"]);
    assert_eq!(old.insert("192.0.2.1".parse().unwrap(), Rule::deny()).unwrap(), None);
    chain.detach().unwrap();
}

#[test]
fn attaching_says_that_the_adopter_is_ready() {
    let (bpffs, pair) = (BpfFs::new().unwrap(), Pair::new().unwrap());
    let old = firewall();
    drop(pair.server.run(|| old.attach(&options(bpffs.path()))).unwrap());
    let new = Firewall::adopt(bpffs.path(), "firewall").unwrap();
    assert!(!old.is_superseded());
    let mut watch = old.watch().unwrap();
    assert_eq!(watch.wait(Duration::ZERO).unwrap(), None);
    let waiting = std::thread::spawn(move || watch.wait(Duration::from_secs(60)).unwrap());
    let attachment = pair.server.run(|| new.attach(&options(bpffs.path()))).unwrap();
    assert!(old.is_superseded() && !new.is_superseded());
    assert_eq!(waiting.join().unwrap(), Some(Loss::Superseded { what: "stage `firewall`".into() }));
    drop(attachment);
    drop(new);
    assert!(is_superseded(old.remove_expired()), "for good");
}

#[test]
fn a_holder_that_does_not_let_go_is_named() {
    let (bpffs, pair) = (BpfFs::new().unwrap(), Pair::new().unwrap());
    let old = firewall();
    drop(pair.server.run(|| old.attach(&options(bpffs.path()))).unwrap());
    let home = File::open(bpffs.path().join("stages/firewall")).unwrap();
    home.lock().unwrap();
    let own = std::process::id();
    for refused in [Firewall::adopt(bpffs.path(), "firewall").map(drop), old.remove_expired().map(drop)] {
        assert!(matches!(&refused, Err(Error::PinsLocked { holder: Some(pid), .. }) if *pid == own), "{refused:?}");
        assert!(refused.unwrap_err().to_string().ends_with(&format!("are locked by process {own}")));
    }
    drop(home);
    assert_eq!(old.remove_expired().unwrap(), 0);
}
