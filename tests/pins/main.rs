//! Pins: what survives the value, what is adopted, and what is refused. Processes that die are in pins_kill.rs.

#[path = "../common/mod.rs"]
mod common;
mod directories;

use std::{
    env, fs,
    time::{Duration, Instant},
};

use common::{
    pins::{firewall, monitor, options},
    traffic::Lockstep,
};
use xdpkit::{
    Action, AttachOptions, Decision, Error, Firewall, FirewallConfig, PacketMonitor, Pipeline, Position, Protocol,
    Reason, Stage as _, XdpMode, pinned, remove_pins,
};
use xdpkit_lab::{
    bpffs::{BpfFs, pin_array},
    topology::Pair,
    traffic::{TcpEcho, tcp_echo},
};

#[test]
fn an_adopted_attachment_keeps_real_connections() {
    let pair = Pair::new().unwrap();
    let bpffs = BpfFs::new().unwrap();
    let firewall = firewall();
    drop(pair.server.run(|| firewall.attach(&options(bpffs.path()))).unwrap());
    drop(firewall);
    let servers: Vec<_> =
        pair.server_addr.both().map(|address| TcpEcho::start(&pair.server, (address, 7).into()).unwrap()).into();
    let payload = vec![9; 3_000_000];
    std::thread::scope(|scope| {
        let transfers: Vec<_> = servers
            .iter()
            .map(|server| scope.spawn(|| tcp_echo(&pair.client, server.addr(), &payload, Duration::from_secs(60))))
            .collect();
        for _ in 0..common::times(5, 20, 1) {
            let firewall = Firewall::adopt(bpffs.path(), "firewall").unwrap();
            drop(pair.server.run(|| firewall.attach(&options(bpffs.path()))).unwrap());
        }
        for transfer in transfers {
            assert_eq!(transfer.join().unwrap().unwrap(), payload);
        }
    });
    let firewall = Firewall::adopt(bpffs.path(), "firewall").unwrap();
    assert!(firewall.stats().unwrap().passed().bytes > 2 * payload.len() as u64);
    remove_pins(bpffs.path()).unwrap();
}

#[test]
fn pins_that_do_not_fit_are_refused_and_left_alone() {
    let pair = Pair::new().unwrap();
    let bpffs = BpfFs::new().unwrap();
    let error = Firewall::adopt(bpffs.path(), "firewall").unwrap_err();
    assert!(matches!(error, Error::PinMissing { .. }), "{error}");

    let firewall = firewall();
    let attachment = pair.server.run(|| firewall.attach(&options(bpffs.path()))).unwrap();
    let program_before = attachment.interface().clone();

    // Another kind of stage under this name.
    let error = PacketMonitor::adopt(bpffs.path(), "firewall").unwrap_err();
    assert!(error.to_string().contains("the kind of stage is firewall, but monitor is expected"), "{error}");
    // Another value than the one that is pinned.
    let other = Firewall::load(&FirewallConfig::default()).unwrap();
    let error = pair.server.run(|| other.attach(&options(bpffs.path()))).unwrap_err();
    assert!(matches!(&error, Error::PinMismatch { .. }), "{error}");
    assert!(error.to_string().contains("adopt the pinned stage"), "{error}");
    // A build with other layouts.
    let abi = bpffs.path().join("stages/firewall/abi");
    fs::rename(&abi, bpffs.path().join("kept")).unwrap();
    pin_array(&abi, 32).unwrap();
    let error = Firewall::adopt(bpffs.path(), "firewall").unwrap_err();
    assert!(matches!(&error, Error::PinMismatch { .. }), "{error}");
    fs::remove_file(&abi).unwrap();
    pin_array(&abi, 8).unwrap();
    let error = Firewall::adopt(bpffs.path(), "firewall").unwrap_err();
    assert!(
        error.to_string().contains("values of 8 bytes, but an array of one value of 32 bytes is expected"),
        "{error}"
    );
    fs::remove_file(&abi).unwrap();
    fs::rename(bpffs.path().join("kept"), &abi).unwrap();
    // A map of another shape.
    let settings = bpffs.path().join("stages/firewall/settings");
    fs::rename(&settings, bpffs.path().join("kept")).unwrap();
    let error = Firewall::adopt(bpffs.path(), "firewall").unwrap_err();
    assert!(matches!(&error, Error::PinMissing { path } if *path == settings), "{error}");
    pin_array(&settings, 4).unwrap();
    let error = Firewall::adopt(bpffs.path(), "firewall").unwrap_err();
    assert!(matches!(&error, Error::PinMismatch { path, .. } if *path == settings), "{error}");
    fs::remove_file(&settings).unwrap();
    fs::rename(bpffs.path().join("kept"), &settings).unwrap();

    // Through all of this, the firewall has been at work.
    assert_eq!(program_before, *attachment.interface());
    let traffic = Lockstep::start(&pair);
    std::thread::sleep(Duration::from_millis(50));
    let sent = traffic.stop();
    assert_eq!(firewall.stats().unwrap().reason(Reason::Denied).packets, sent.denied);
    assert!(Firewall::adopt(bpffs.path(), "firewall").is_ok());
    attachment.detach().unwrap();
}

#[test]
fn pins_need_a_bpf_file_system_and_a_fitting_name() {
    let pair = Pair::new().unwrap();
    let firewall = firewall();
    let elsewhere = env::temp_dir().join("xdpkit-not-a-bpffs");
    let error = pair.server.run(|| firewall.attach(&options(&elsewhere))).unwrap_err();
    assert!(matches!(&error, Error::NotBpfFs { .. }), "{error}");
    assert!(error.to_string().contains("mount -t bpf"), "{error}");
    assert!(!elsewhere.exists());
    let error = Firewall::load(&FirewallConfig::default().name("a.b")).unwrap_err();
    assert_eq!(error.to_string(), "stage name `a.b`: expected 1 to 32 of a-z, 0-9, `_` and `-`");
}

#[test]
fn a_value_that_was_superseded_may_not_edit_any_more() {
    let pair = Pair::new().unwrap();
    let bpffs = BpfFs::new().unwrap();
    let (a, b) = (monitor("a"), monitor("b"));
    let mut old = Pipeline::new(&[&a]).unwrap();
    pair.server.run(|| old.attach(&options(bpffs.path()))).unwrap();
    let adopted = PacketMonitor::adopt(bpffs.path(), "a").unwrap();
    let mut new = Pipeline::new(&[&adopted]).unwrap();
    pair.server.run(|| new.attach(&options(bpffs.path()))).unwrap();
    let error = old.insert(Position::Last, &b).unwrap_err();
    assert!(matches!(&error, Error::Superseded { .. }), "{error}");
    assert_eq!(old.stages(), ["a"]);
    assert!(matches!(old.detach(), Err(Error::Superseded { .. })), "nor detach what is not its own");
    new.insert(Position::Last, &b).unwrap();
    new.detach().unwrap();
    // The table's pins stay: a later start goes on with the counters.
    PacketMonitor::adopt(bpffs.path(), "a").unwrap();
}

#[test]
fn a_last_program_goes_on_through_an_adoption() {
    let pair = Pair::new().unwrap();
    let bpffs = BpfFs::new().unwrap();
    let (stage, own) = (monitor("stage"), monitor("own"));
    own.set_action(Protocol::Udp, Some(Action::Drop)).unwrap();
    let mut chain = Pipeline::new(&[&stage]).unwrap();
    chain.set_last(Some(own.program_fd())).unwrap();
    pair.server.run(|| chain.attach(&options(bpffs.path()))).unwrap();
    drop(chain);
    let adopted = PacketMonitor::adopt(bpffs.path(), "stage").unwrap();
    let mut chain = Pipeline::new(&[&adopted]).unwrap();
    pair.server.run(|| chain.attach(&options(bpffs.path()))).unwrap();
    let frame = xdpkit_lab::frame::Frame::udp("10.0.0.2:1".parse().unwrap(), "10.0.0.1:2".parse().unwrap()).build();
    assert_eq!(chain.test_run(&frame).unwrap().action, Action::Drop);
    chain.set_last(None).unwrap();
    assert_eq!(chain.test_run(&frame).unwrap().action, Action::Pass);
    chain.detach().unwrap();
}

#[test]
fn an_interface_that_comes_again_is_no_obstacle() {
    let pair = Pair::new().unwrap();
    let bpffs = BpfFs::new().unwrap();
    let firewall = firewall();
    let attachment = pair.server.run(|| firewall.attach(&options(bpffs.path()))).unwrap();
    assert!(attachment.is_attached().unwrap());
    pair.server.delete_link("eth0").unwrap();
    assert!(!attachment.is_attached().unwrap());
    drop((attachment, firewall));
    xdpkit_lab::veth((&pair.client, "eth0"), (&pair.server, "eth0")).unwrap();
    let firewall = Firewall::adopt(bpffs.path(), "firewall").unwrap();
    let attachment = pair.server.run(|| firewall.attach(&options(bpffs.path()))).unwrap();
    assert!(!attachment.adopted() && attachment.is_attached().unwrap());
    assert_eq!(pinned(bpffs.path()).unwrap().interfaces.len(), 1, "the pins of the old one are gone");
    assert_eq!(firewall.len().unwrap(), 2, "the rules are not");
    attachment.detach().unwrap();
}

#[test]
fn two_namespaces_may_not_share_a_directory() {
    let (one, two) = (Pair::new().unwrap(), Pair::new().unwrap());
    let bpffs = BpfFs::new().unwrap();
    let (a, b) = (monitor("a"), monitor("b"));
    let attachment = one.server.run(|| a.attach(&options(bpffs.path()))).unwrap();
    let error = two.server.run(|| b.attach(&options(bpffs.path()))).unwrap_err();
    assert!(error.to_string().contains("of another network namespace"), "{error}");
    assert!(attachment.is_attached().unwrap());
    assert_eq!(pinned(bpffs.path()).unwrap().stages, [("a".into(), "monitor".into())], "nothing of b was left");
    attachment.detach().unwrap();
}

#[test]
fn a_refused_attachment_leaves_no_pins() {
    let alone = xdpkit_lab::Namespace::new("alone").unwrap();
    let bpffs = BpfFs::new().unwrap();
    let native = AttachOptions::new("lo").pin(bpffs.path());
    let error = alone.run(|| firewall().attach(&native)).unwrap_err();
    assert!(matches!(error, Error::ModeRefused { .. }), "{error}");
    assert_eq!(pinned(bpffs.path()).unwrap(), xdpkit::Pinned::default());
    let attachment = alone.run(|| firewall().attach(&native.mode(XdpMode::Generic))).unwrap();
    attachment.detach().unwrap();
}

#[test]
fn a_take_over_does_not_drop_a_stage_unasked() {
    let pair = Pair::new().unwrap();
    let bpffs = BpfFs::new().unwrap();
    let mut chain = Pipeline::new(&[&monitor("monitor"), &firewall()]).unwrap();
    pair.server.run(|| chain.attach(&options(bpffs.path()))).unwrap();
    let index = pair.server.ifindex("eth0").unwrap();
    let pins = pinned(bpffs.path()).unwrap();
    assert_eq!(pins.interfaces, [(index, vec!["monitor".to_owned(), "firewall".to_owned()])]);
    assert_eq!(pins.stages, [("firewall".into(), "firewall".into()), ("monitor".into(), "monitor".into())]);
    drop(chain);
    let monitor = PacketMonitor::adopt(bpffs.path(), "monitor").unwrap();
    let error = pair.server.run(|| monitor.attach(&options(bpffs.path()))).unwrap_err();
    assert!(matches!(&error, Error::StagesLost { stages, .. } if stages == &["firewall"]), "{error}");
    assert_eq!(pinned(bpffs.path()).unwrap(), pins, "nothing was touched");
    let attachment = pair.server.run(|| monitor.attach(&options(bpffs.path()).replace_chain(true))).unwrap();
    assert_eq!(pinned(bpffs.path()).unwrap().interfaces, [(index, vec!["monitor".to_owned()])]);
    attachment.detach().unwrap();
}

#[test]
fn two_threads_edit_two_interfaces_in_one_directory() {
    let hub = Pair::new().unwrap();
    let far = xdpkit_lab::Namespace::new("far").unwrap();
    xdpkit_lab::veth((&hub.server, "eth1"), (&far, "eth0")).unwrap();
    let bpffs = BpfFs::new().unwrap();
    // On a busy machine, the other one's edits take longer than anybody waits for the lock; who is told so has changed nothing.
    let again = |edit: &mut dyn FnMut() -> xdpkit::Result<()>| {
        let end = Instant::now() + Duration::from_secs(120);
        loop {
            match edit() {
                Err(Error::PinsLocked { .. }) if Instant::now() < end => {}
                done => return done.unwrap(),
            }
        }
    };
    let edits = |interface: &str| {
        let (a, b) = (monitor(&format!("{interface}-a")), monitor(&format!("{interface}-b")));
        let mut chain = Pipeline::new(&[&a]).unwrap();
        let options = AttachOptions::new(interface).pin(bpffs.path());
        again(&mut || hub.server.run(|| chain.attach(&options)));
        for _ in 0..common::times(10, 50, 2) {
            again(&mut || chain.insert(Position::Last, &b));
            again(&mut || chain.remove(b.name()).map(drop));
        }
        chain
    };
    let chains = std::thread::scope(|scope| {
        ["eth0", "eth1"]
            .map(|interface| {
                let edits = &edits;
                scope.spawn(move || edits(interface))
            })
            .map(|thread| thread.join().unwrap())
    });
    chains.into_iter().for_each(|chain| chain.detach().unwrap());
}

#[test]
fn pins_are_adopted_without_cap_sys_admin() {
    use xdpkit_lab::capability::{BPF, NET_ADMIN, PERFMON};
    let pair = Pair::new().unwrap();
    let bpffs = BpfFs::new().unwrap();
    let path = bpffs.path();
    pair.server.run(|| {
        xdpkit_lab::keep_capabilities(&[BPF, NET_ADMIN, PERFMON]).unwrap();
        let mut chain = Pipeline::new(&[&monitor("monitor"), &firewall()]).unwrap();
        chain.attach(&options(path)).unwrap();
        drop(chain);
        let (monitor, firewall) =
            (PacketMonitor::adopt(path, "monitor").unwrap(), Firewall::adopt(path, "firewall").unwrap());
        let mut chain = Pipeline::new(&[&monitor, &firewall]).unwrap();
        chain.attach(&options(path)).unwrap();
        assert!(chain.adopted());
        chain.reorder(&["firewall", "monitor"]).unwrap();
        assert_eq!(firewall.len().unwrap(), 2);
        assert!(monitor.events().unwrap().try_next().is_none());
        assert_eq!(pinned(path).unwrap().interfaces[0].1, ["firewall", "monitor"]);
        chain.detach().unwrap();
    });
}

#[test]
fn a_value_and_its_adopted_twin_share_one_reader() {
    let pair = Pair::new().unwrap();
    let bpffs = BpfFs::new().unwrap();
    let one = monitor("monitor");
    let attachment = pair.server.run(|| one.attach(&options(bpffs.path()))).unwrap();
    let twin = PacketMonitor::adopt(bpffs.path(), "monitor").unwrap();
    let events = one.events().unwrap();
    assert!(matches!(twin.events(), Err(Error::EventsTaken { .. })));
    drop(events);
    assert!(twin.events().is_ok());
    drop(twin);
    attachment.detach().unwrap();
}

#[test]
fn ordinary_directories_are_not_taken_for_pins() {
    let directory = env::temp_dir().join(format!("xdpkit-ordinary-{}", std::process::id()));
    fs::create_dir_all(directory.join("stages/raw")).unwrap();
    fs::write(directory.join("stages/raw/important"), "x").unwrap();
    assert!(matches!(remove_pins(&directory), Err(Error::NotBpfFs { .. })));
    assert_eq!(fs::read_to_string(directory.join("stages/raw/important")).unwrap(), "x");
    fs::remove_dir_all(&directory).unwrap();
}

#[test]
fn settings_survive_in_the_pins() {
    let pair = Pair::new().unwrap();
    let bpffs = BpfFs::new().unwrap();
    let firewall = Firewall::load(&FirewallConfig::default().default_decision(Decision::Deny).name("edge")).unwrap();
    let attachment = pair.server.run(|| firewall.attach(&options(bpffs.path()))).unwrap();
    drop((firewall, attachment));
    let adopted = Firewall::adopt(bpffs.path(), "edge").unwrap();
    let frame = xdpkit_lab::frame::Frame::udp("10.0.0.2:1".parse().unwrap(), "10.0.0.1:2".parse().unwrap()).build();
    assert_eq!(adopted.test_run(&frame).unwrap().action, Action::Drop);
    remove_pins(bpffs.path()).unwrap();
}
