//! Ways to lose the guard, and what the appliance says and does:
//!
//! | what was done | what the appliance says | what packets see |
//! |---|---|---|
//! | an interface is deleted, and made again | `detached`, then `attached`; metrics 0, then 1 | unguarded until `attached` |
//! | the same, with pins | the same | the same |
//! | the file is reloaded meanwhile | `reloaded`, and `detached` instead of `ready` | the new plan once it is back |
//! | it is moved to another network namespace, and back | `detached`, then `attached` | guarded there, and here again |
//! | it is renamed | nothing | guarded |
//! | its link is detached by another program | `detached`, then `attached` | unguarded until `attached` |
//! | another program is put into its link | `superseded`, and it ends | what that program does |
//! | the pins are removed, and it is killed | `unpinned`, then `attached` | guarded |
//! | another program is faster where it is back | `attach_failed` with the program, later `attached` | what that program does |
//! | one of two interfaces is not there at the start | `detached` instead of `ready`, later `attached` | the other is guarded |
//! | the pair of a DSR balancer's probes is made anew | `detached`, then `attached`; no backend is down | all backends serve |
#![cfg(all(feature = "serde", feature = "health", feature = "pcapng"))]

use std::time::Duration;

use crate::common::guard::{Packets, make_again, packets, packets_of, until, veth_at_once};
use crate::process::{FILE, Place, Running, example, scrape};
use serde_json::Value;
use xdpkit::{pinned, remove_pins};
use xdpkit_lab::{
    Namespace,
    bpffs::BpfFs,
    topology::{DsrL2, Pair},
    traffic::{HttpServer, http_get},
    veth,
};

struct Guarded {
    pair: Pair,
    place: Place,
    pins: Option<BpfFs>,
    appliance: Running,
    metrics: String,
}

impl Guarded {
    fn start(name: &str, pins: Option<BpfFs>) -> Self {
        let (pair, place) = (Pair::new().unwrap(), Place::new(name));
        place.write(FILE);
        let directory = pins.as_ref().map(|pins| pins.path().to_str().unwrap().to_owned());
        let mut flags = vec!["--metrics", "127.0.0.1:0"];
        flags.extend(directory.iter().flat_map(|directory| ["--pin", directory]));
        let mut appliance = Running::start(&pair.server, &place.file(), &flags);
        let metrics = appliance.expect("metrics")["address"].as_str().unwrap().to_owned();
        appliance.expect("ready");
        assert_eq!(packets_of(&pair), Packets::Guarded);
        Self { pair, place, pins, appliance, metrics }
    }

    /// What the metrics say of `eth0`.
    fn attached(&self) -> (String, f64) {
        let text = scrape(&self.pair.server, &self.metrics);
        let line = text.lines().find(|line| line.starts_with("xdpkit_attached{")).unwrap();
        let mode = line.split("mode=\"").nth(1).unwrap().split('"').next().unwrap();
        (mode.to_owned(), line.rsplit(' ').next().unwrap().parse().unwrap())
    }

    fn lost(&mut self) -> Value {
        let event = self.appliance.expect("detached");
        assert_eq!(event["interface"], "eth0");
        assert!(!event["why"].as_str().unwrap().is_empty());
        event
    }

    fn back(&mut self) {
        let event = self.appliance.expect("attached");
        assert_eq!((&event["interface"], &event["mode"]), (&"eth0".into(), &"native".into()));
    }
}

#[test]
fn an_interface_is_deleted_and_made_again() {
    for pins in [None, Some(BpfFs::new().unwrap())] {
        let mut it = Guarded::start("deleted", pins);
        assert_eq!(it.attached(), ("native".into(), 1.0));
        for _ in 0..3 {
            it.pair.server.delete_link("eth0").unwrap();
            it.lost();
            assert_eq!(it.attached(), ("none".into(), 0.0));
            make_again(&it.pair);
            it.back();
            assert_eq!(it.attached(), ("native".into(), 1.0));
            assert_eq!(packets_of(&it.pair), Packets::Guarded);
        }
        // Reloads are about what is there now.
        it.appliance.reload().unwrap();
        if let Some(pins) = &it.pins {
            let index = it.pair.server.ifindex("eth0").unwrap();
            let expected = [(index, vec!["watch".to_owned(), "edge".to_owned()])];
            assert_eq!(pinned(pins.path()).unwrap().interfaces, expected);
        }
        let pinned = it.pins.is_some();
        let stats = it.appliance.stop();
        assert!(stats["functions"]["edge"]["reasons"]["denied"].as_u64().unwrap() >= 4, "counters go on: {stats}");
        assert_eq!(packets_of(&it.pair), if pinned { Packets::Guarded } else { Packets::Unguarded });
    }
}

#[test]
fn the_file_is_reloaded_while_the_interface_is_gone() {
    for pins in [None, Some(BpfFs::new().unwrap())] {
        let mut it = Guarded::start("reloaded", pins);
        it.place.write(&FILE.replace("'10.0.0.66', ", ""));
        it.pair.server.delete_link("eth0").unwrap();
        it.lost();
        it.appliance.signal("HUP");
        it.appliance.expect("reloaded");
        it.lost();
        make_again(&it.pair);
        it.back();
        assert_eq!(packets_of(&it.pair), Packets::Unguarded, "as the file says now");
        // Another chain, and the earlier rules.
        it.pair.server.delete_link("eth0").unwrap();
        it.lost();
        it.place.write(&FILE.replace("['watch', 'edge']", "['edge', 'watch']"));
        it.appliance.signal("HUP");
        it.appliance.expect("reloaded");
        it.lost();
        // What is refused is refused as ever.
        it.place.write(&FILE.replace("[firewall.edge]", "[firewall.edge]\nsettings.capacity = 7"));
        it.appliance.signal("HUP");
        it.appliance.expect("reload_refused");
        make_again(&it.pair);
        it.back();
        assert_eq!(packets_of(&it.pair), Packets::Guarded);
        it.place.write(FILE);
        it.appliance.signal("HUP");
        it.appliance.expect("reloaded");
        let ready = it.appliance.expect("ready");
        assert_eq!(ready["chain"], serde_json::json!(["watch", "edge"]));
        assert_eq!(packets_of(&it.pair), Packets::Guarded);
        it.appliance.stop();
    }
}

#[test]
fn it_is_moved_to_another_namespace_and_back() {
    for pins in [None, Some(BpfFs::new().unwrap())] {
        let mut it = Guarded::start("moved", pins);
        let elsewhere = Namespace::new("elsewhere").unwrap();
        it.pair.server.move_link("eth0", &elsewhere).unwrap();
        assert!(it.lost()["why"].as_str().unwrap().contains("left this network namespace"));
        let address = |ns: &Namespace| {
            ns.set_up("eth0").unwrap();
            ns.add_address("eth0", "10.0.0.1/24".parse().unwrap()).unwrap();
        };
        address(&elsewhere);
        assert_eq!(packets((&it.pair.client, "eth0"), (&elsewhere, "eth0")), Packets::Guarded);
        elsewhere.move_link("eth0", &it.pair.server).unwrap();
        it.back();
        address(&it.pair.server);
        assert_eq!(packets_of(&it.pair), Packets::Guarded);
        it.appliance.reload().unwrap();
        it.appliance.stop();
    }
}

#[test]
fn it_is_renamed() {
    let mut it = Guarded::start("renamed", None);
    it.pair.server.rename_link("eth0", "wan").unwrap();
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(packets((&it.pair.client, "eth0"), (&it.pair.server, "wan")), Packets::Guarded);
    it.appliance.reload().unwrap();
    it.appliance.stop();
}

#[test]
fn its_link_is_detached_by_another_program() {
    for pins in [None, Some(BpfFs::new().unwrap())] {
        let mut it = Guarded::start("by-hand", pins);
        it.pair.server.detach_link("eth0").unwrap();
        it.lost();
        it.back();
        assert_eq!(packets_of(&it.pair), Packets::Guarded);
        it.appliance.stop();
    }
}

#[test]
fn another_program_is_put_into_its_link() {
    for pins in [None, Some(BpfFs::new().unwrap())] {
        let mut it = Guarded::start("exchanged", pins);
        it.pair.server.exchange_program("eth0", 2).unwrap();
        let other = it.pair.server.xdp_program("eth0").unwrap();
        assert_eq!(it.appliance.expect("superseded")["interface"], "eth0");
        it.appliance.until("stopped");
        // Without pins, the link goes with the appliance.
        let left = it.pair.server.xdp_program("eth0").unwrap();
        assert_eq!(left, other.filter(|_| it.pins.is_some()));
    }
}

#[test]
fn the_pins_are_removed_and_it_is_killed() {
    let pins = BpfFs::new().unwrap();
    let path = pins.path().to_owned();
    let mut it = Guarded::start("unpinned", Some(pins));
    remove_pins(&path).unwrap();
    let event = it.appliance.expect("unpinned");
    assert!(event["path"].as_str().unwrap().starts_with(path.to_str().unwrap()), "{event}");
    it.back();
    it.appliance.reload().unwrap();
    it.appliance.kill();
    assert_eq!(packets_of(&it.pair), Packets::Guarded, "no process is left");
    let mut next = Running::start(&it.pair.server, &it.place.file(), &["--pin", path.to_str().unwrap()]);
    assert_eq!(next.expect("ready")["adopted"], true);
    next.stop();
    remove_pins(&path).unwrap();
}

#[test]
fn another_program_is_faster_where_it_is_back() {
    for pins in [None, Some(BpfFs::new().unwrap())] {
        let mut it = Guarded::start("foreign", pins);
        // The stranger attaches before the name is back.
        it.pair.server.delete_link("eth0").unwrap();
        it.lost();
        veth((&it.pair.client, "eth0"), (&it.pair.server, "eth9")).unwrap();
        let foreign = it.pair.server.xdp_pass("eth9").unwrap();
        it.pair.server.rename_link("eth9", "eth0").unwrap();
        let event = it.appliance.expect("attach_failed");
        let error = event["error"].as_str().unwrap();
        assert!(error.contains("already runs XDP program") && error.contains("lab_xdp_return"), "{error}");
        assert_eq!(it.attached(), ("none".into(), 0.0));
        it.appliance.signal("HUP");
        it.appliance.expect("reloaded");
        it.lost();
        drop(foreign);
        // It may have said so once more for the chain that the reload made.
        it.appliance.until("attached");
        it.pair.server.add_address("eth0", "10.0.0.1/24".parse().unwrap()).unwrap();
        assert_eq!(packets_of(&it.pair), Packets::Guarded);
        it.appliance.stop();
    }
}

#[test]
fn one_of_two_interfaces_is_not_there_at_the_start() {
    for pins in [None, Some(BpfFs::new().unwrap())] {
        let (pair, place) = (Pair::new().unwrap(), Place::new("late"));
        place.write(&format!("{FILE}\n[interface.late0]\nchain = ['edge']\n"));
        let directory = pins.as_ref().map(|pins| pins.path().to_str().unwrap().to_owned());
        let flags: Vec<&str> = directory.iter().flat_map(|directory| ["--pin", directory.as_str()]).collect();
        let mut appliance = Running::start(&pair.server, &place.file(), &flags);
        assert_eq!(appliance.expect("ready")["interface"], "eth0");
        assert_eq!(appliance.expect("detached")["interface"], "late0");
        assert_eq!(packets_of(&pair), Packets::Guarded);
        let far = Namespace::new("far").unwrap();
        veth_at_once((&far, "eth0"), (&pair.server, "late0"));
        assert_eq!(appliance.expect("attached")["interface"], "late0");
        assert!(pair.server.xdp_program("late0").unwrap().is_some());
        pair.server.delete_link("eth0").unwrap();
        assert_eq!(appliance.expect("detached")["interface"], "eth0");
        appliance.stop();
    }
    // Where there is none at all, something is wrong with the file.
    let place = Place::new("none");
    place.write(FILE);
    let mut command = Namespace::new("empty").unwrap().command(example());
    let output = command.arg("--config").arg(place.file()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().contains("no interface `eth0`"));
}

#[test]
fn the_pair_of_probes_is_made_anew() {
    let (vip4, vip6) = ("192.168.178.100".parse().unwrap(), "2001:db8:b::100".parse().unwrap());
    let lab = DsrL2::new(2, vip4, vip6).unwrap();
    let place = Place::new("probes");
    let own = lab.balancer_addr.v4;
    let [a, b] = [lab.backend_addrs[0].v4, lab.backend_addrs[1].v4];
    let ns = &lab.balancer;
    ns.enable_forwarding().unwrap();
    let make_pair = || {
        // Probes go on as soon as there is a `h1`: by then there has to be a route.
        veth((ns, "h0"), (ns, "unnamed")).unwrap();
        ns.sysctl("net.ipv4.conf.unnamed.accept_local", "1").unwrap();
        ns.add_onlink_route(format!("{vip4}/32").parse().unwrap(), "h0").unwrap();
        ns.add_neighbour("h0", std::net::IpAddr::V4(vip4), ns.mac("unnamed").unwrap()).unwrap();
        ns.rename_link("unnamed", "h1").unwrap();
    };
    make_pair();
    place.write(&format!(
        "
[interface.eth0]
chain = ['direct']
[interface.h1]
chain = ['direct']
[dsr_balancer.direct]
probes = {{ interface = 'h1', sources = ['{own}'] }}
[[dsr_balancer.direct.service]]
address = 'tcp/{vip4}:80'
backends = {{ '{a}' = 1, '{b}' = 1 }}
health = {{ interval = 0.1, timeout = 0.3, rise = 1, fall = 2 }}
"
    ));
    let page = |_| "here".to_owned();
    let mut servers: Vec<_> =
        lab.backends.iter().map(|backend| HttpServer::start(backend, (vip4, 80).into(), page).unwrap()).collect();
    ns.set_up("lo").unwrap();
    let mut appliance = Running::start(ns, &place.file(), &["--metrics", "127.0.0.1:0"]);
    let metrics = appliance.expect("metrics")["address"].as_str().unwrap().to_owned();
    let healthy = |said: &[Value]| said.iter().all(|event| event["event"] != "health" || event["health"] == "up");
    let up =
        || scrape(ns, &metrics).lines().filter(|l| l.starts_with("xdpkit_backend_up{") && l.ends_with(" 1")).count();
    until("both backends are up", || up() == 2);
    let fetch = || http_get(&lab.client, (vip4, 80).into(), "/", Duration::from_secs(20)).unwrap();
    fetch();
    for _ in 0..2 {
        ns.delete_link("h0").unwrap();
        let said = appliance.until("detached");
        assert_eq!(said.last().unwrap()["interface"], "h1");
        assert!(healthy(&said), "{said:?}");
        // Long enough for any number of probes to fail.
        std::thread::sleep(Duration::from_secs(2));
        assert_eq!(up(), 2, "what cannot be asked is not down");
        fetch();
        appliance.signal("HUP");
        let said = appliance.until("detached");
        assert!(healthy(&said) && said.iter().any(|event| event["event"] == "reloaded"), "{said:?}");
        make_pair();
        let said = appliance.until("attached");
        assert_eq!(said.last().unwrap()["interface"], "h1");
        assert!(healthy(&said), "{said:?}");
        fetch();
    }
    // Who really is down is found to be, and who comes back, too.
    servers.pop();
    let event = appliance.until("health").pop().unwrap();
    assert_eq!((&event["health"], &event["backend"]), (&"down".into(), &b.to_string().into()), "{event}");
    servers.push(HttpServer::start(&lab.backends[1], (vip4, 80).into(), page).unwrap());
    let event = appliance.until("health").pop().unwrap();
    assert_eq!((&event["health"], &event["backend"]), (&"up".into(), &b.to_string().into()), "{event}");
    // One that fell while nobody could ask is found, too.
    ns.delete_link("h0").unwrap();
    appliance.until("detached");
    servers.pop();
    std::thread::sleep(Duration::from_secs(1));
    make_pair();
    let event = appliance.until("health").pop().unwrap();
    assert_eq!((&event["health"], &event["backend"]), (&"down".into(), &b.to_string().into()), "{event}");
    appliance.stop();
}
