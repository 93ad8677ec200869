//! Health checks in the appliance's file: a backend whose virtual address is gone is out after its probes failed, no new
//! connection fails afterwards, and it returns.
#![cfg(all(feature = "serde", feature = "health", feature = "pcapng"))]

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use crate::common::{is_emulated, times};
use crate::process::{Place, Running, scrape};
use serde_json::Value;
use xdpkit_lab::{
    PacketSocket,
    bpffs::BpfFs,
    topology::{DsrL2, Pair},
    traffic::{HttpServer, http_get},
    veth,
};

const BACKENDS: usize = 3;
/// The one that fails.
const FAILING: usize = 1;

fn patience() -> Duration {
    Duration::from_secs(if is_emulated() { 120 } else { 60 })
}

struct Net {
    lab: DsrL2,
    direct: Vec<HttpServer>,
    translated: Vec<Option<HttpServer>>,
}

impl Net {
    /// The L2 tutorial's network, a page of each backend behind both balancers, and the way of probes.
    fn new() -> Self {
        let lab = DsrL2::new(BACKENDS, "192.168.178.100".parse().unwrap(), "2001:db8:b::100".parse().unwrap()).unwrap();
        let (mut direct, mut translated) = (Vec::new(), Vec::new());
        for (number, backend) in lab.backends.iter().enumerate() {
            let page = move |_| number.to_string();
            for vip in lab.vip.both() {
                direct.push(HttpServer::start(backend, SocketAddr::new(vip, 80), page).unwrap());
            }
            let own = SocketAddr::new(lab.backend_addrs[number].v4.into(), 9090);
            translated.push(Some(HttpServer::start(backend, own, page).unwrap()));
        }
        let ns = &lab.balancer;
        veth((ns, "h0"), (ns, "h1")).unwrap();
        ns.sysctl("net.ipv4.conf.h1.accept_local", "1").unwrap();
        let mac = ns.mac("h1").unwrap();
        for vip in lab.vip.both() {
            ns.add_onlink_route(vip.into(), "h0").unwrap();
            ns.add_neighbour("h0", vip, mac).unwrap();
        }
        Self { lab, direct, translated }
    }

    fn file(&self) -> String {
        let pace = if is_emulated() { 0.9 } else { 0.15 };
        // A busy machine answers late; but before TCP says it again.
        let health = format!("health = {{ path = '/', interval = {pace}, timeout = 0.9 }}");
        let [own4, own6] = self.lab.balancer_addr.both();
        let mut text = format!(
            "
[interface.eth0]
chain = ['direct', 'translated']
[interface.h1]
chain = ['direct']
[dsr_balancer.direct]
probes = {{ interface = 'h1', sources = ['{own4}', '{own6}'] }}
[nat_balancer.translated]
"
        );
        for family in 0..2 {
            let vip = SocketAddr::new(self.lab.vip.both()[family], 80);
            let backends = self.lab.backend_addrs.iter().map(|own| format!("'{}' = 1", own.both()[family]));
            let backends = backends.collect::<Vec<_>>().join(", ");
            text += &format!(
                "[[dsr_balancer.direct.service]]\naddress = 'tcp/{vip}'\nbackends = {{ {backends} }}\n{health}\n"
            );
        }
        let backends = self.lab.backend_addrs.iter().map(|own| format!("'{}:9090' = 1", own.v4));
        let backends = backends.collect::<Vec<_>>().join(", ");
        text + &format!(
            "[[nat_balancer.translated.service]]\naddress = 'tcp/{own4}:8080'\nbackends = {{ {backends} }}\n{health}\n"
        )
    }

    /// Fetches so many pages; answers how many came from each backend. None may fail.
    fn fetch(&self, from: SocketAddr, count: usize) -> [usize; BACKENDS] {
        let mut got = [0; BACKENDS];
        for _ in 0..count {
            let page = http_get(&self.lab.client, from, "/", patience()).unwrap();
            got[String::from_utf8(page).unwrap().parse::<usize>().unwrap()] += 1;
        }
        got
    }
}

/// The next change of health: backend, and what it is.
fn change(appliance: &mut Running) -> (String, String) {
    let event = appliance.expect("health");
    let of = |key: &str| event[key].as_str().unwrap().to_owned();
    (of("backend"), of("health"))
}

/// Waits until all backends of all services are up.
fn all_up(appliance: &mut Running) {
    let mut up = BTreeMap::new();
    while up.len() < 3 * BACKENDS {
        let event = appliance.expect("health");
        assert_eq!(event["health"], "up", "{event}");
        up.insert((event["service"].to_string(), event["backend"].to_string()), ());
    }
}

/// Whether this is a SYN of the balancer's host for a virtual address: what else it asks this backend does not count.
fn is_probe(frame: &[u8], own: IpAddr, vip: IpAddr) -> bool {
    let (addresses, flags) = match (own, vip) {
        (IpAddr::V4(own), IpAddr::V4(vip)) => {
            (frame.get(26..34) == Some(&[own.octets(), vip.octets()].concat()[..]), 47)
        }
        (IpAddr::V6(own), IpAddr::V6(vip)) => {
            (frame.get(22..54) == Some(&[own.octets(), vip.octets()].concat()[..]), 67)
        }
        _ => (false, 0),
    };
    addresses && frame.get(flags) == Some(&2)
}

#[test]
fn a_backend_whose_virtual_address_is_gone_is_out_and_returns() {
    let net = Net::new();
    let (place, pins) = (Place::new("health"), BpfFs::new().unwrap());
    place.write(&net.file());
    let pin = pins.path().join("appliance");
    let pin = ["--pin", pin.to_str().unwrap()];
    let mut appliance = Running::start(&net.lab.balancer, &place.file(), &pin);
    appliance.expect_both_ready();
    all_up(&mut appliance);
    let backend = &net.lab.backends[FAILING];
    for family in 0..2 {
        let (vip, own) = (net.lab.vip.both()[family], net.lab.balancer_addr.both()[family]);
        let page = SocketAddr::new(vip, 80);
        let name = net.lab.backend_addrs[FAILING].both()[family].to_string();
        assert!(net.fetch(page, times(60, 60, 12)).iter().all(|got| *got > 0), "all backends serve");

        let seen = PacketSocket::open(backend, "eth0").unwrap();
        backend.remove_address("lo", vip.into()).unwrap();
        assert_eq!(change(&mut appliance), (name.clone(), "down".into()));
        let next = || seen.recv_matching(Duration::ZERO, |frame| is_probe(frame, own, vip)).unwrap();
        let probes = std::iter::from_fn(next).count();
        // How many it takes is the business of tests/health.rs: a busy machine adds some that time out, or come later.
        assert!(probes > 0, "no probe came to the backend");
        let got = net.fetch(page, times(60, 1000, 10));
        assert_eq!(got[FAILING], 0, "{got:?}: and none has failed");

        // A reload does not bring it back, nor does the next process before it has asked.
        appliance.reload_all(2).unwrap();
        assert_eq!(net.fetch(page, 20)[FAILING], 0, "after a reload");
        if family == 0 {
            appliance.kill();
            appliance = Running::start(&net.lab.balancer, &place.file(), &pin);
            assert_eq!(appliance.expect_both_ready()["adopted"], true);
            assert_eq!(net.fetch(page, 20)[FAILING], 0, "after a restart");
            // What the new process finds out first: all but one are up, and that one is down after three probes.
            let mut found = BTreeMap::new();
            while found.len() < 3 * BACKENDS {
                let event = appliance.expect("health");
                let key = (event["service"].to_string(), event["backend"].as_str().unwrap().to_owned());
                found.insert(key, event["health"].as_str().unwrap().to_owned());
            }
            let down: Vec<_> = found.iter().filter(|(_, health)| *health == "down").map(|((_, who), _)| who).collect();
            assert_eq!(down, [&name], "{found:?}");
            assert_eq!(net.fetch(page, 20)[FAILING], 0, "it stayed without weight");
        }

        backend.add_address("lo", vip.into()).unwrap();
        assert_eq!(change(&mut appliance), (name, "up".into()));
        assert!(net.fetch(page, times(60, 60, 12)).iter().all(|got| *got > 0), "it serves again");
    }
    let stats = appliance.stop();
    let reasons = &stats["functions"]["direct"]["reasons"];
    assert!(reasons["probed"].as_u64().is_some_and(|packets| packets > 40), "{reasons}");
    assert_eq!(net.direct.len(), 2 * BACKENDS);
}

#[test]
fn a_nat_balancers_backend_that_does_not_answer_is_out_and_returns() {
    let mut net = Net::new();
    let place = Place::new("nathealth");
    place.write(&net.file());
    let mut appliance = Running::start(&net.lab.balancer, &place.file(), &[]);
    appliance.expect_both_ready();
    all_up(&mut appliance);
    let page = SocketAddr::new(net.lab.balancer_addr.v4.into(), 8080);
    let own = SocketAddr::new(net.lab.backend_addrs[FAILING].v4.into(), 9090);
    assert!(net.fetch(page, times(60, 60, 12)).iter().all(|got| *got > 0), "all backends serve");
    net.translated[FAILING] = None;
    assert_eq!(change(&mut appliance), (own.to_string(), "down".into()));
    let got = net.fetch(page, times(60, 1000, 10));
    assert_eq!(got[FAILING], 0, "{got:?}: and none has failed");
    let backend = &net.lab.backends[FAILING];
    net.translated[FAILING] = Some(HttpServer::start(backend, own, |_| FAILING.to_string()).unwrap());
    assert_eq!(change(&mut appliance), (own.to_string(), "up".into()));
    assert!(net.fetch(page, times(60, 60, 12)).iter().all(|got| *got > 0), "it serves again");
    let stats: Value = appliance.stop();
    assert!(stats["functions"]["translated"]["packets"].as_u64().unwrap() > 0);
}

/// An address to probe from that is not this host's takes no backend out, and is told.
#[test]
fn probes_that_this_host_cannot_send_are_told_and_take_no_backend_down() {
    let net = Net::new();
    let place = Place::new("unsent");
    let own = net.lab.balancer_addr.v4.to_string();
    place.write(&net.file().replace(&format!("sources = ['{own}'"), "sources = ['192.168.178.77'"));
    let mut appliance = Running::start(&net.lab.balancer, &place.file(), &["--metrics", "127.0.0.1:9108"]);
    let event = appliance.await_event("health_unsent");
    assert!(event["probes"].as_u64().unwrap() > 0, "{event}");
    let problem = event["problem"].as_str().unwrap();
    assert!(problem.contains("the address to connect from has to be one of this host's"), "{problem}");
    let page = SocketAddr::new(net.lab.vip.v4.into(), 80);
    assert!(net.fetch(page, times(60, 60, 12)).iter().all(|got| *got > 0), "all backends serve");
    let text = scrape(&net.lab.balancer, "127.0.0.1:9108");
    let line = text.lines().find(|line| line.starts_with("xdpkit_health_probes_total{result=\"unsent\"}"));
    assert!(line.is_some_and(|line| !line.ends_with(" 0")), "{text}");
    assert!(!text.lines().any(|line| line.starts_with("xdpkit_backend_up") && line.ends_with(" 0")), "{text}");
    appliance.kill();
}

/// What a check finds out while a reload is at work changes no weight that the reload has just taken away.
#[test]
fn a_backend_that_was_taken_out_does_not_come_back_by_its_check() {
    let lab = Pair::new().unwrap();
    lab.server.set_up("lo").unwrap();
    let place = Place::new("flapping");
    // Another chain each time: building it takes a while.
    let file = |chain: &str, backends: &str| {
        format!(
            "[interface.eth0]\nchain = [{chain}]\n[monitor.watch]\n[firewall.edge]\n[nat_balancer.web]\n\
             [[nat_balancer.web.service]]\naddress = 'tcp/10.0.0.1:80'\nbackends = {{ {backends} }}\n\
             health = {{ interval = 0.001, timeout = 1, rise = 1, fall = 1 }}\n"
        )
    };
    let with = file("'watch', 'edge', 'web'", "'10.0.0.2:9090' = 1");
    let without = file("'edge', 'watch', 'web'", "");
    place.write(&without);
    let mut appliance = Running::start(&lab.server, &place.file(), &["--metrics", "127.0.0.1:9108"]);
    appliance.expect("metrics");
    appliance.expect("ready");
    // It is up and down all the time.
    let stop = Arc::new(AtomicBool::new(false));
    let flapping = lab.client.spawn({
        let stop = Arc::clone(&stop);
        move || {
            let mut ups = 0;
            while !stop.load(Ordering::Relaxed) {
                match std::net::TcpListener::bind("10.0.0.2:9090") {
                    Ok(listening) => {
                        ups += 1;
                        std::thread::sleep(Duration::from_millis(10));
                        drop(listening);
                    }
                    // A check's connection is not quite gone.
                    Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse),
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            ups
        }
    });
    for round in 0..times(10, 100, 2) {
        place.write(&with);
        appliance.reload_past_health();
        place.write(&without);
        appliance.reload_past_health();
        let metrics = scrape(&lab.server, "127.0.0.1:9108");
        assert!(!metrics.contains("backend=\"10.0.0.2:9090\""), "round {round}: {metrics}");
    }
    stop.store(true, Ordering::Relaxed);
    assert!(flapping.join().unwrap() > 10, "it went up and down");
    appliance.kill();
}
