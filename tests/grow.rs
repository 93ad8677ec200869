//! Tables that grow when another process, or another value, adopts them: nothing in them is lost, no packet meets half of it.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    time::Duration,
};

use ipnet::IpNet;
use xdpkit::{
    Action, AttachOptions, Decision, DsrBalancer, DsrConfig, DsrFlow, DsrService, Engine, Error, Firewall,
    FirewallConfig, MonitorConfig, NatBalancer, NatConfig, NatMode, NatService, PacketMonitor, Pipeline, Rate,
    RateLimiter, RateLimiterConfig, Reason, Result, Rule, Scope, Selector, ServiceAddr, Stage, Tier,
};
use xdpkit_lab::{bpffs::BpfFs, frame::Frame, topology::Pair, veth};

fn is_superseded<T: std::fmt::Debug>(result: Result<T>) -> bool {
    matches!(result, Err(Error::Superseded { .. }))
}

fn is_full<T: std::fmt::Debug>(result: Result<T>) -> bool {
    matches!(result, Err(Error::Full { .. }))
}

/// A server with a link or more to a client, and pins.
struct Place {
    bpffs: BpfFs,
    pair: Pair,
}

impl Place {
    fn new(links: u8) -> Self {
        let place = Self { bpffs: BpfFs::new().unwrap(), pair: Pair::new().unwrap() };
        let (client, server) = (&place.pair.client, &place.pair.server);
        for link in 1..links {
            let name = format!("eth{link}");
            veth((client, &name), (server, &name)).unwrap();
            for (host, last) in [(server, 1), (client, 2)] {
                let [v4, v6] = addresses(link, last);
                host.add_address(&name, IpNet::new(v4, 24).unwrap()).unwrap();
                host.add_address(&name, IpNet::new(v6, 64).unwrap()).unwrap();
                host.set_up(&name).unwrap();
            }
        }
        place
    }

    fn pins(&self) -> PathBuf {
        self.bpffs.path().join("pins")
    }

    fn attach(&self, link: u8, stages: &[&dyn Stage]) -> Pipeline {
        let mut chain = Pipeline::new(stages).unwrap();
        let options = AttachOptions::new(format!("eth{link}")).pin(self.pins());
        self.pair.server.run(|| chain.attach(&options)).unwrap();
        chain
    }

    /// Whether a packet of the client gets through to the server, over IPv4 and IPv6.
    fn passes(&self, link: u8) -> [bool; 2] {
        let pair = &self.pair;
        [0, 1].map(|family| {
            let (from, to) = (addresses(link, 2)[family], addresses(link, 1)[family]);
            let receiver = pair.server.run(|| UdpSocket::bind(SocketAddr::new(to, 0)).unwrap());
            receiver.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
            let at = receiver.local_addr().unwrap();
            let sender = pair.client.run(|| UdpSocket::bind(SocketAddr::new(from, 0)).unwrap());
            // The first may have to wait for the neighbour's address.
            (0..20).any(|_| {
                pair.client.run(|| sender.send_to(b"?", at)).unwrap();
                receiver.recv(&mut [0; 8]).is_ok()
            })
        })
    }
}

fn addresses(link: u8, last: u8) -> [IpAddr; 2] {
    [[10, 0, link, last].into(), [0xfd00, 0, 0, link.into(), 0, 0, 0, last.into()].into()]
}

/// What becomes of a frame, and why, as the counters tell; the kernel's own packets come in meanwhile.
fn judge(stage: &dyn Stage, frame: &[u8]) -> (Action, Reason) {
    let before = stage.stats().unwrap();
    let action = stage.test_run(frame).unwrap().action;
    let counted = stage.stats().unwrap().since(&before);
    let line = counted.reasons.iter().find(|line| line.action == action && line.count.bytes >= frame.len() as u64);
    (action, line.expect("it is counted").reason)
}

fn aside(pins: &Path, stage: &str) -> bool {
    pins.join("stages").join(format!("{stage}+")).exists()
}

fn tcp(from: &str, to: &str) -> Vec<u8> {
    Frame::tcp(from.parse().unwrap(), to.parse().unwrap()).build()
}

fn on(text: &str) -> Selector {
    text.parse().unwrap()
}

fn rules(firewall: &Firewall) -> Vec<(Selector, Rule)> {
    firewall.iter().unwrap().map(|entry| (entry.selector, entry.rule)).collect()
}

#[test]
fn a_full_firewall_takes_more_rules_after_an_adoption_with_more_room() {
    for (engine, larger) in
        [(Engine::Trie, Engine::Trie), (Engine::Compiled, Engine::Compiled), (Engine::Auto, Engine::Auto)]
    {
        let place = Place::new(1);
        let config = FirewallConfig::default().engine(engine).capacity(50_u32);
        let old = Firewall::load(&config).unwrap();
        for n in 0..50 {
            let selector = [format!("10.9.{n}.0/24"), format!("2001:db8:{n}::/48 tcp/80")][n % 2].parse().unwrap();
            old.insert(selector, Rule::deny()).unwrap();
        }
        assert!(is_full(old.insert(on("192.0.2.1"), Rule::deny())));
        let chain = place.attach(0, &[&old]);
        let frames = [tcp("10.9.48.7:1", "10.0.0.1:80"), tcp("[2001:db8:49::7]:1", "[2001:db8::1]:80")];
        let counts = |firewall: &Firewall| {
            ["10.9.48.0/24", "2001:db8:49::/48 tcp/80"]
                .map(|rule| firewall.get(on(rule)).unwrap().unwrap().count.packets)
        };
        let hit = |firewall: &Firewall| {
            for frame in &frames {
                assert_eq!(judge(firewall, frame), (Action::Drop, Reason::Denied), "{engine:?}");
            }
        };
        (0..5).for_each(|_| hit(&old));
        assert_eq!(counts(&old), [5, 5]);

        // One that ends before it attaches has changed nothing.
        let config = config.engine(larger).capacity(5000_u32);
        let unready = Firewall::load_or_adopt(place.pins(), &config).unwrap();
        assert!(is_superseded(old.insert(on("10.9.0.0/24"), Rule::allow())));
        unready.insert(on("192.0.2.1"), Rule::deny()).unwrap();
        drop(unready);
        old.insert(on("10.9.0.0/24"), Rule::allow()).unwrap();
        let before = rules(&old);

        let new = Firewall::load_or_adopt(place.pins(), &config).unwrap();
        assert_eq!(rules(&new), before, "{engine:?}");
        assert_eq!(counts(&new), [5, 5]);
        // Packets still come in by the tables of before.
        hit(&old);
        hit(&new);
        let chain_of_new = place.attach(0, &[&new]);
        assert!(chain_of_new.adopted() && !aside(&place.pins(), "firewall"));
        assert!(chain.is_superseded().unwrap() && is_superseded(old.remove(on("10.9.0.0/24"))));
        assert_eq!(counts(&new), [7, 7], "{engine:?}");
        assert_eq!(new.engine(), if larger == Engine::Trie { Engine::Trie } else { Engine::Compiled });
        hit(&new);
        assert_eq!(judge(&new, &tcp("10.9.0.7:1", "10.0.0.1:80")).0, Action::Pass);
        for n in 0..4950 {
            new.insert(on(&format!("100.{}.{}.1", n / 256, n % 256)), Rule::deny()).unwrap();
        }
        assert!(is_full(new.insert(on("192.0.2.1"), Rule::deny())));
        assert_eq!(judge(&new, &tcp("100.19.85.1:1", "10.0.0.1:80")).0, Action::Drop);

        // The next one finds all of it, and needs no more.
        let expected = rules(&new);
        let next = Firewall::load_or_adopt(place.pins(), &config).unwrap();
        assert_eq!((rules(&next), counts(&next)), (expected, [8, 8]));
        assert!(next.recovery().is_empty(), "{:?}", next.recovery());
    }
}

#[test]
fn a_list_on_trial_stays_on_trial_in_larger_tables() {
    for engine in [Engine::Trie, Engine::Compiled] {
        let place = Place::new(1);
        let config = FirewallConfig::default().engine(engine).capacity(10_u32);
        let old = Firewall::load(&config).unwrap();
        old.insert(on("192.0.2.0/24"), Rule::deny()).unwrap();
        drop(place.attach(0, &[&old]));
        let pending =
            old.replace_all_unless_confirmed([(on("198.51.100.0/24"), Rule::deny())], Duration::from_secs(3600));
        let _ = pending.unwrap();
        drop(old);
        let new = Firewall::load_or_adopt(place.pins(), &config.capacity(100_u32)).unwrap();
        let denies = |address: &str| judge(&new, &tcp(&format!("{address}:1"), "10.0.0.1:80")).0 == Action::Drop;
        assert!(denies("198.51.100.1") && !denies("192.0.2.1"));
        new.pending().unwrap().expect("it is on trial").roll_back().unwrap();
        assert!(!denies("198.51.100.1") && denies("192.0.2.1"), "{engine:?}");
    }
}

#[test]
fn every_chain_that_is_pinned_goes_by_the_larger_tables_at_once() {
    let place = Place::new(3);
    let config = FirewallConfig::default().capacity(4_u32);
    let (old, watch) = (Firewall::load(&config).unwrap(), PacketMonitor::load(&MonitorConfig::default()).unwrap());
    // It stands first, between others and last.
    let chains = [place.attach(0, &[&old, &watch]), place.attach(1, &[&watch, &old]), place.attach(2, &[&old])];
    assert_eq!([0, 1, 2].map(|link| place.passes(link)), [[true; 2]; 3]);
    let new = Firewall::load_or_adopt(place.pins(), &config.capacity(4000_u32)).unwrap();
    // It attaches one of the three chains.
    let chain = place.attach(2, &[&new]);
    new.insert(on("10.0.0.0/16"), Rule::deny()).unwrap();
    assert_eq!([0, 1, 2].map(|link| place.passes(link)), [[false, true]; 3]);
    new.insert(on("fd00::/48"), Rule::deny()).unwrap();
    assert_eq!([0, 1, 2].map(|link| place.passes(link)), [[false, false]; 3]);
    let seen = watch.stats().unwrap().total().packets;
    assert!(seen > 0 && chains.iter().all(|chain| chain.is_superseded().unwrap()));
    // What was replaced is pinned no more, and the chains are whole.
    let pinned = xdpkit::pinned(place.pins()).unwrap();
    let stages: Vec<_> = pinned.interfaces.iter().map(|(_, stages)| stages.join(" ")).collect();
    assert_eq!(stages.len(), 3, "{pinned:?}");
    for wanted in ["firewall monitor", "monitor firewall", "firewall"] {
        assert!(stages.iter().any(|stages| stages == wanted), "{stages:?}");
    }
    for (index, stages) in &pinned.interfaces {
        let members = std::fs::read_dir(place.pins().join(format!("interfaces/{index}"))).unwrap();
        let members = members.filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().contains('-'));
        assert_eq!(members.count(), stages.len());
    }
    drop((chain, chains));
    new.remove(on("10.0.0.0/16")).unwrap();
    assert_eq!([0, 1, 2].map(|link| place.passes(link)), [[true, false]; 3]);
}

#[test]
fn a_switch_that_was_cut_short_is_finished_by_whoever_is_next() {
    let place = Place::new(2);
    let config = FirewallConfig::default().capacity(4_u32);
    let old = Firewall::load(&config).unwrap();
    let _chains = [place.attach(0, &[&old]), place.attach(1, &[&old])];
    drop(old);
    // As a process leaves it that is killed when the larger tables are in their place and no chain goes by them yet.
    let stages = place.pins().join("stages");
    let other = place.bpffs.path().join("other");
    {
        let larger = Firewall::load(&config.clone().capacity(4000_u32)).unwrap();
        let pair = Pair::new().unwrap();
        pair.server.run(|| drop(larger.attach(&AttachOptions::new("eth0").pin(&other)).unwrap()));
    }
    std::fs::rename(stages.join("firewall"), stages.join("firewall+")).unwrap();
    std::fs::rename(other.join("stages/firewall"), stages.join("firewall")).unwrap();
    let next = Firewall::load_or_adopt(place.pins(), &config.capacity(4000_u32)).unwrap();
    next.set_default(Decision::Deny).unwrap();
    assert_eq!([0, 1].map(|link| place.passes(link)), [[true; 2]; 2], "they go by the tables of before");
    let _chain = place.attach(1, &[&next]);
    assert_eq!([0, 1].map(|link| place.passes(link)), [[false; 2]; 2]);
    assert!(!aside(&place.pins(), "firewall"));
}

#[test]
fn what_cannot_grow_is_refused_by_its_name_and_nothing_has_changed() {
    let place = Place::new(1);
    let config = FirewallConfig::default().capacity(100_u32);
    let old = Firewall::load(&config).unwrap();
    let _chain = place.attach(0, &[&old]);
    let refused = |config: FirewallConfig| {
        let error = Firewall::load_or_adopt(place.pins(), &config).unwrap_err();
        old.insert(on("192.0.2.1"), Rule::deny()).unwrap();
        old.remove(on("192.0.2.1")).unwrap();
        assert!(!aside(&place.pins(), "firewall"));
        error.to_string()
    };
    let message = refused(config.clone().capacity(99_u32));
    assert!(message.contains("`capacity` 100") && message.contains("99"), "{message}");
    let message = refused(config.clone().capacity(1000_u32).ring_bytes(4096_u32));
    assert!(message.contains("`ring_bytes`"), "{message}");
    // Rules for which the configuration leaves no room in the index.
    for n in 0..100 {
        old.insert(on(&format!("{}.{n}.7.1", 20 + n)), Rule::deny()).unwrap();
    }
    old.remove(on("20.0.7.1")).unwrap();
    let message = refused(config.capacity(1000_u32).table_lines(16_384_u32));
    assert!(message.contains("lpm_lines"), "{message}");
}

#[test]
fn a_full_limiter_takes_more_tiers_and_bans_after_an_adoption_with_more_room() {
    let place = Place::new(1);
    let config = RateLimiterConfig::default()
        .limit(Scope::All, "3/h:3".parse::<Rate>().unwrap())
        .tiers(20_u32)
        .bans(64_u32)
        .ban(None);
    let old = RateLimiter::load(&config).unwrap();
    for n in 0..20 {
        let prefix = [format!("10.9.{n}.0/24"), format!("2001:db8:{n}::/48")][n % 2].parse().unwrap();
        old.tiers().insert(prefix, if n % 3 == 0 { Tier::Blocked } else { Tier::Exempt }).unwrap();
    }
    assert!(is_full(old.tiers().insert("192.0.2.0/24".parse().unwrap(), Tier::Exempt)));
    let address =
        |n: usize| -> IpAddr { [format!("172.16.0.{n}"), format!("2001:db8:ffff:{n}::1")][n % 2].parse().unwrap() };
    for n in 0..40 {
        old.bans().insert(address(n), None).unwrap();
    }
    let _chain = place.attach(0, &[&old]);
    let from = |source: &str| {
        tcp(&format!("{source}:1"), &format!("{}:80", if source.starts_with('[') { "[fd00::1]" } else { "10.0.0.1" }))
    };
    // Two of three.
    let known = from("198.51.100.1");
    assert_eq!([0, 1].map(|_| judge(&old, &known).0), [Action::Pass; 2]);

    let grown = config.clone().tiers(2000_u32).bans(4096_u32);
    let new = RateLimiter::load_or_adopt(place.pins(), &grown).unwrap();
    let tiers = |limiter: &RateLimiter| limiter.tiers().iter().collect::<Vec<_>>();
    assert_eq!(tiers(&new), tiers(&old));
    assert_eq!(new.bans().len().unwrap(), 40);
    // One is lifted before packets meet the new tables; another one comes by the programs of before.
    new.bans().lift(address(7)).unwrap().unwrap();
    let _chain = place.attach(0, &[&new]);
    assert!(is_superseded(old.tiers().insert("10.9.0.0/24".parse().unwrap(), Tier::Exempt)));
    assert_eq!(new.bans().len().unwrap(), 39);
    assert_eq!(judge(&new, &known).0, Action::Pass, "what is left of its burst");
    assert_eq!(judge(&new, &known).0, Action::Drop);
    for n in 0..40 {
        let source = match address(n) {
            IpAddr::V4(v4) => v4.to_string(),
            IpAddr::V6(v6) => format!("[{v6}]"),
        };
        assert_eq!(judge(&new, &from(&source)).0 == Action::Drop, n != 7, "{n}");
    }
    assert_eq!(judge(&new, &from("10.9.0.5")), (Action::Drop, Reason::Blocked));
    assert_eq!([0; 5].map(|_| judge(&new, &from("[2001:db8:1::5]")).0), [Action::Pass; 5]);
    for n in 0..1980 {
        new.tiers().insert(format!("100.{}.{}.0/24", n / 256, n % 256).parse().unwrap(), Tier::Blocked).unwrap();
    }
    assert!(is_full(new.tiers().insert("192.0.2.0/24".parse().unwrap(), Tier::Exempt)));
    assert_eq!(judge(&new, &from("100.7.187.1")), (Action::Drop, Reason::Blocked));
    for n in 0..1000 {
        new.bans()
            .insert(format!("100.100.{}.{}", n / 256, n % 256).parse().unwrap(), Some(Duration::from_secs(3600)))
            .unwrap();
    }
    assert_eq!(judge(&new, &from("100.100.3.231")).0, Action::Drop);
    // What a bucket table holds cannot move.
    let error = RateLimiter::load_or_adopt(place.pins(), &grown.sources(1 << 20)).unwrap_err();
    assert!(matches!(error, Error::PinnedSetting { setting: "sources", .. }), "{error}");
    new.tiers().remove("10.9.0.0/24".parse().unwrap()).unwrap().unwrap();
}

#[test]
fn a_full_nat_balancer_takes_more_services_and_backends_after_an_adoption_with_more_room() {
    for mode in [NatMode::Full, NatMode::Destination] {
        let place = Place::new(1);
        let config = NatConfig::default()
            .table_size(1021)
            .services(3)
            .backends(6)
            .capacity(1000)
            .addresses(vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()]);
        let old = NatBalancer::load(&config).unwrap();
        let service = |n: usize| -> ServiceAddr {
            [format!("tcp/10.7.0.{n}:80"), format!("tcp/[fd07::{n}]:80")][n % 2].parse().unwrap()
        };
        let backend = |n: usize, which: usize| -> SocketAddr {
            [format!("10.0.0.2:{}", 8000 + 10 * n + which), format!("[fd00::2]:{}", 8000 + 10 * n + which)][n % 2]
                .parse()
                .unwrap()
        };
        let wanted = |n| NatService::new([backend(n, 0), backend(n, 1)]).mode(mode);
        for n in 0..3 {
            old.insert(service(n), &wanted(n)).unwrap();
        }
        assert!(is_full(old.insert(service(3), &wanted(3))));
        assert!(is_full(old.set_backend(&service(0), backend(0, 2), 1)));
        let _chain = place.attach(0, &[&old]);
        let opens = |balancer: &NatBalancer, n: usize, port: u16| {
            let client: SocketAddr = [format!("10.0.0.9:{port}"), format!("[fd00::9]:{port}")][n % 2].parse().unwrap();
            let vip: SocketAddr = [format!("10.7.0.{n}:80"), format!("[fd07::{n}]:80")][n % 2].parse().unwrap();
            balancer.test_run(&Frame::tcp(client, vip).build()).unwrap();
            balancer.find(client, &service(n)).unwrap().map(|found| found.backend)
        };
        let ports = 1000..1040;
        let mut chosen: Vec<_> = ports
            .clone()
            .map(|port| opens(&old, usize::from(port % 3), port).unwrap_or_else(|| panic!("{mode:?} {port}")))
            .collect();
        let state = |balancer: &NatBalancer| {
            let services =
                (0..3).map(|n| (balancer.service_stats(&service(n)).unwrap(), balancer.backends(&service(n)).unwrap()));
            format!("{:?}", services.collect::<Vec<_>>())
        };
        let before = state(&old);
        let grown = config.clone().services(12).backends(5000);
        let new = NatBalancer::load_or_adopt(place.pins(), &grown).unwrap();
        assert_eq!(state(&new), before, "{mode:?}");
        // One more comes by the programs of before.
        chosen.push(opens(&old, 1, 1040).unwrap());
        let _chain = place.attach(0, &[&new]);
        assert!(is_superseded(old.remove(&service(0))));
        let active = |balancer: &NatBalancer| {
            let all = (0..3).flat_map(|n| balancer.backends(&service(n)).unwrap());
            all.map(|backend| backend.stats.active).sum::<u64>()
        };
        assert_eq!(active(&new), 41, "{mode:?}");
        for (port, chosen) in (1000..=1040).zip(&chosen) {
            let n = if port == 1040 { 1 } else { usize::from(port % 3) };
            assert_eq!(opens(&new, n, port), Some(*chosen), "{mode:?}, {port}");
        }
        for n in 3..12 {
            new.insert(service(n), &wanted(n)).unwrap();
            assert!(opens(&new, n, 5000).is_some_and(|found| [backend(n, 0), backend(n, 1)].contains(&found)));
        }
        assert!(is_full(new.insert(service(12), &wanted(12))));
        for port in 0..100 {
            new.set_backend(&service(2), SocketAddr::new("10.0.0.2".parse().unwrap(), 20_000 + port), 1).unwrap();
        }
        let error = NatBalancer::load_or_adopt(place.pins(), &grown.clone().capacity(2000)).unwrap_err();
        assert!(matches!(error, Error::PinnedSetting { setting: "capacity", .. }), "{error}");
        let next = NatBalancer::load_or_adopt(place.pins(), &grown).unwrap();
        assert_eq!(next.services().len(), 12);
        assert_eq!(next.backends(&service(2)).unwrap().len(), 102);
    }
}

#[test]
fn a_full_dsr_balancer_takes_more_services_and_backends_after_an_adoption_with_more_room() {
    let place = Place::new(1);
    let config = DsrConfig::default().services(2_u32).backends(4_u32).table_size(251_u32).check_on_link(false);
    let old = DsrBalancer::load(&config).unwrap();
    let service = |n: usize| -> ServiceAddr {
        [format!("tcp/10.7.0.{n}:80"), format!("udp/[fd07::{n}]:80")][n % 2].parse().unwrap()
    };
    let backend = |n: usize, which: usize| -> IpAddr {
        [format!("10.0.0.{}", 10 + which), format!("fd00::{}", 10 + which)][n % 2].parse().unwrap()
    };
    let wanted = |n| [(backend(n, 0), 1), (backend(n, 1), 2)];
    (0..2).for_each(|n| old.insert_service(service(n), DsrService::l2(), wanted(n)).unwrap());
    assert!(is_full(old.insert_service(service(2), DsrService::l2(), wanted(2))));
    assert!(is_full(old.set_backend(service(0), backend(0, 2), 1)));
    let _chain = place.attach(0, &[&old]);
    let client = |n: usize, port: u16| -> SocketAddr {
        [format!("10.0.0.2:{port}"), format!("[fd00::2]:{port}")][n % 2].parse().unwrap()
    };
    let placed = |balancer: &DsrBalancer, n: usize, port: u16| {
        let (protocol, destination) = (service(n).protocol, SocketAddr::new(service(n).address, 80));
        balancer.place(DsrFlow { protocol, client: client(n, port), destination, opens: false }).unwrap().backend
    };
    for port in 1..=30 {
        old.test_run(&Frame::tcp(client(0, port), "10.7.0.0:80".parse().unwrap()).build()).unwrap();
    }
    // A change that is under way stays so.
    old.drain(service(0), backend(0, 0)).unwrap();
    let state = |balancer: &DsrBalancer| {
        let services = (0..2).map(|n| (balancer.service(service(n)).unwrap(), balancer.backends(service(n)).unwrap()));
        format!("{:?}", services.collect::<Vec<_>>())
    };
    let before = (state(&old), (1..200).map(|port| placed(&old, port as usize % 2, port)).collect::<Vec<_>>());
    let grown = config.clone().services(60_u32).backends(6000_u32);
    let new = DsrBalancer::load_or_adopt(place.pins(), &grown).unwrap();
    let after = (state(&new), (1..200).map(|port| placed(&new, port as usize % 2, port)).collect::<Vec<_>>());
    assert_eq!(after, before);
    old.test_run(&Frame::tcp(client(0, 31), "10.7.0.0:80".parse().unwrap()).build()).unwrap();
    let _chain = place.attach(0, &[&new]);
    assert!(is_superseded(old.remove_service(service(0))));
    assert_eq!(new.service(service(0)).unwrap().stats.received.packets, 31);
    for n in 2..60 {
        new.insert_service(service(n), DsrService::l2(), wanted(n)).unwrap();
        assert!(wanted(n).iter().any(|(backend, _)| Some(*backend) == placed(&new, n, 9)), "{n}");
    }
    assert!(is_full(new.insert_service(service(60), DsrService::l2(), wanted(60))));
    for n in 0..200 {
        new.set_backend(service(2), format!("10.0.1.{n}").parse().unwrap(), 1).unwrap();
    }
    let error = DsrBalancer::load_or_adopt(place.pins(), &grown.clone().flows(1_u32 << 20)).unwrap_err();
    assert!(matches!(error, Error::PinnedSetting { setting: "flows", .. }), "{error}");
    let next = DsrBalancer::load_or_adopt(place.pins(), &grown).unwrap();
    assert_eq!(next.services().unwrap().len(), 60);
    assert_eq!(next.backends(service(2)).unwrap().len(), 202);
}
