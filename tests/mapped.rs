//! Addresses and prefixes written as IPv4 mapped into IPv6 (`::ffff:a.b.c.d`): they are IPv4, wherever they are
//! written.

mod common;
#[cfg(all(feature = "serde", feature = "health", feature = "pcapng"))]
#[path = "appliance_process/process.rs"]
mod process;

use std::net::{IpAddr, SocketAddr};

use common::{
    judge,
    nat::{Bench, service},
    rate::{SYN, limiter, tcp},
    rules::{DEFAULT, DENIED, ENGINES, load, packet},
};
use xdpkit::{
    Action, DsrBalancer, DsrConfig, DsrFlow, DsrService, Error, NatConfig, NatService, Reason, Rule, Scope, Selector,
    ServiceAddr, ServiceProtocol, Tier, TunnelDecap, TunnelDecapConfig, ipnet::IpNet, parse_prefix, read_prefix_list,
};
use xdpkit_lab::frame::Frame;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// As written, as it is meant, a source in it and one that is not.
const PREFIXES: [(&str, &str, &str, &str); 6] = [
    ("::ffff:192.0.2.7", "192.0.2.7/32", "192.0.2.7", "192.0.2.8"),
    ("::ffff:192.0.2.7/128", "192.0.2.7/32", "192.0.2.7", "2001:db8::1"),
    ("::ffff:c000:207/120", "192.0.2.0/24", "192.0.2.200", "192.0.3.1"),
    ("::ffff:10.9.9.9/104", "10.0.0.0/8", "10.1.2.3", "11.0.0.1"),
    ("::ffff:0:0/96", "0.0.0.0/0", "8.8.8.8", "2001:db8::1"),
    // It holds other addresses, too.
    ("::fffe:0:0/95", "::fffe:0:0/95", "::fffe:1:2", "192.0.2.7"),
];

#[test]
fn rules_and_lists_about_mapped_prefixes_are_about_ipv4() {
    let path = std::env::temp_dir().join(format!("xdpkit-mapped-{}", std::process::id()));
    for (written, meant, inside, outside) in PREFIXES {
        std::fs::write(&path, format!("{written}\n")).unwrap();
        let listed = read_prefix_list(&path).unwrap();
        assert_eq!(listed, [net(meant)], "{written}");
        assert_eq!(parse_prefix(written), Some(net(meant)));
        let parsed: Selector = written.parse().unwrap();
        assert_eq!(parsed, Selector::new(net(meant)), "{written}");
        let raw: IpNet = written.parse().unwrap_or_else(|_| ip(written).into());
        assert_eq!(Selector::new(raw), parsed, "not only as text");
        for engine in ENGINES {
            let firewall = load(engine);
            for selector in [parsed, raw.into(), listed[0].into()] {
                firewall.insert(selector, Rule::deny()).unwrap();
                let verdict = |source: &str| {
                    let destination = if ip(source).is_ipv4() { "198.51.100.1" } else { "2001:db8:9::1" };
                    judge(&firewall, &packet(source, destination, "tcp/80"))
                };
                assert_eq!((verdict(inside), verdict(outside)), (DENIED, DEFAULT), "{written} {engine:?}");
                let mapped = match ip(inside) {
                    IpAddr::V4(v4) => v4.to_ipv6_mapped().into(),
                    v6 => v6,
                };
                for asked in [ip(inside), mapped] {
                    assert_eq!(firewall.matching(asked).unwrap().unwrap().selector, parsed, "{written}");
                    let explained = firewall.explain(asked, mapped, 6, Some(80)).unwrap();
                    assert_eq!(explained.unwrap().selector, parsed, "{written}");
                }
                assert!(firewall.get(raw.into()).unwrap().is_some());
                assert!(firewall.remove(raw.into()).unwrap().is_some());
                assert!(firewall.is_empty().unwrap());
            }
        }
    }
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn mapped_destinations_are_ipv4_and_may_stand_beside_ipv4_sources() {
    for engine in ENGINES {
        let firewall = load(engine);
        let selector: Selector = "10.0.0.0/8 to ::ffff:192.0.2.0/120 tcp/80".parse().unwrap();
        assert_eq!(selector.to_string(), "10.0.0.0/8 to 192.0.2.0/24 tcp/80");
        assert_eq!(
            selector,
            Selector::new(net("::ffff:10.0.0.0/104"))
                .to(net("192.0.2.0/24"))
                .unwrap()
                .protocol(6)
                .unwrap()
                .ports(80..=80)
                .unwrap()
        );
        firewall.insert(selector, Rule::deny()).unwrap();
        assert_eq!(judge(&firewall, &packet("10.0.0.1", "192.0.2.7", "tcp/80")), DENIED);
        assert_eq!(judge(&firewall, &packet("10.0.0.1", "192.0.3.7", "tcp/80")), DEFAULT);
        let mixed = Selector::new(net("2001:db8::/32")).to(net("::ffff:192.0.2.0/120"));
        assert!(matches!(mixed, Err(Error::Invalid { .. })), "{mixed:?}");
    }
}

#[test]
fn bans_tiers_and_lookups_of_mapped_sources_are_those_of_the_ipv4_source() {
    let limiter = limiter(&[(Scope::All, 100)]);
    let (plain, mapped) = (ip("192.0.2.1"), ip("::ffff:192.0.2.1"));
    let frame = tcp("192.0.2.1", 1, SYN).build();
    // The neighbour in the same /64 of mapped addresses is another source.
    let other = tcp("192.0.2.2", 1, SYN).build();
    let bans = limiter.bans();
    assert_eq!(bans.insert(mapped, None).unwrap(), None);
    assert_eq!(judge(&limiter, &frame), (Action::Drop, Reason::Banned));
    assert_eq!(judge(&limiter, &other).1, Reason::WithinLimit);
    for asked in [plain, mapped] {
        assert_eq!(bans.get(asked).unwrap().unwrap().source, net("192.0.2.1/32"));
    }
    assert!(bans.insert(plain, None).unwrap().is_some(), "the same");
    assert!(bans.lift(mapped).unwrap().is_some() && bans.is_empty().unwrap());

    assert_eq!(judge(&limiter, &frame).1, Reason::WithinLimit);
    assert_eq!(limiter.source(mapped).unwrap()[0].source, net("192.0.2.1/32"));
    assert!(limiter.reset(mapped).unwrap() && limiter.source(plain).unwrap().is_empty());

    let tiers = limiter.tiers();
    for (written, meant, inside, outside) in PREFIXES {
        let raw: IpNet = written.parse().unwrap_or_else(|_| ip(written).into());
        let rows = [(net("2001:db8:9::/48"), Tier::Exempt), (raw, Tier::Blocked)];
        for replace in [false, true] {
            match replace {
                true => assert_eq!(tiers.replace_all(rows).unwrap().added, 1, "{written}"),
                false => assert_eq!(tiers.insert(raw, Tier::Blocked).unwrap(), None),
            }
            assert_eq!(tiers.get(net(meant)), Some(Tier::Blocked));
            assert_eq!(tiers.get(raw), Some(Tier::Blocked));
            assert_eq!(tiers.matching(ip(inside)), Some((net(meant), Tier::Blocked)));
            assert_eq!(tiers.matching(ip(outside)), None, "{written}");
            assert_eq!(judge(&limiter, &tcp(inside, 1, SYN).build()).1, Reason::Blocked, "{written}");
            assert_ne!(judge(&limiter, &tcp(outside, 1, SYN).build()).1, Reason::Blocked, "{written}");
            if !replace {
                tiers.insert(net("2001:db8:9::/48"), Tier::Exempt).unwrap();
            }
            assert_eq!(tiers.remove(raw).unwrap(), Some(Tier::Blocked));
        }
        tiers.replace_all([]).unwrap();
    }
    let twice = tiers.replace_all([(net("192.0.2.0/24"), Tier::Exempt), (net("::ffff:192.0.2.0/120"), Tier::Blocked)]);
    assert!(matches!(twice, Err(Error::Conflict { .. })), "{twice:?}");
}

#[test]
fn tunnels_may_end_and_begin_at_mapped_addresses() {
    let config = TunnelDecapConfig::default()
        .vip(ip("::ffff:192.0.2.1"))
        .source(net("::ffff:10.200.0.0/112"))
        .destination(ip("::ffff:172.16.0.11"));
    let decap = TunnelDecap::load(&config).unwrap();
    let inner = Frame::tcp(at("198.51.100.7:4000"), at("192.0.2.1:80")).packet();
    let tunnel = |from: &str, to: &str| Frame::ip(ip(from), ip(to), 4).payload(&inner).build();
    assert_eq!(judge(&decap, &tunnel("10.200.3.4", "172.16.0.11")), (Action::Pass, Reason::Decapsulated));
    assert_ne!(judge(&decap, &tunnel("10.201.3.4", "172.16.0.11")).1, Reason::Decapsulated);
    assert_ne!(judge(&decap, &tunnel("10.200.3.4", "172.16.0.12")).1, Reason::Decapsulated);
    let wrong = TunnelDecap::load(&TunnelDecapConfig::default().vip(ip("::ffff:127.0.0.1")));
    assert!(matches!(wrong, Err(Error::Invalid { .. })), "{wrong:?}");
}

#[test]
fn a_nat_balancers_mapped_services_and_backends_are_ipv4() {
    let bench = Bench::new(&NatConfig::default());
    let balancer = &bench.balancer;
    let plain = service("tcp/10.0.0.100:80");
    // Not by the constructors, which write the IPv4 address.
    let mapped = ServiceAddr { address: ip("::ffff:10.0.0.100"), ..plain };
    let (backend, second) = (at("[::ffff:192.168.178.11]:8080"), at("[::ffff:192.168.178.12]:8080"));
    balancer.insert(mapped, &NatService::new([backend])).unwrap();
    assert!(matches!(balancer.insert(plain, &NatService::new([backend])), Err(Error::ServiceExists { .. })));
    assert_eq!(balancer.services(), [plain]);
    assert_eq!(balancer.set_backend(&mapped, second, 2).unwrap(), None);
    assert_eq!(balancer.set_backend(&plain, at("192.168.178.12:8080"), 1).unwrap(), Some(2), "the same");
    let listed: Vec<_> = balancer.backends(&mapped).unwrap().iter().map(|entry| entry.address).collect();
    assert_eq!(listed, [at("192.168.178.11:8080"), at("192.168.178.12:8080")]);
    let twice = balancer.set_backends(&plain, &[(backend, 1), (at("192.168.178.11:8080"), 1)]);
    assert!(matches!(twice, Err(Error::Invalid { .. })), "{twice:?}");
    balancer.drain(&mapped, second).unwrap();
    balancer.remove_backend(&mapped, second).unwrap();

    let client = at("10.0.0.20:4000");
    let connection = common::nat_talk::open(&bench, &plain, client);
    let asked = at("[::ffff:10.0.0.20]:4000");
    assert_eq!(balancer.find(asked, &mapped).unwrap().unwrap(), balancer.find(client, &plain).unwrap().unwrap());
    assert_eq!(balancer.find_by_backend(backend, connection.source).unwrap().len(), 1);
    balancer.kill(&mapped, backend).unwrap();
    assert_eq!(balancer.service_stats(&mapped).unwrap(), balancer.service_stats(&plain).unwrap());
    balancer.remove(&mapped).unwrap();
    assert!(balancer.services().is_empty());
}

#[test]
fn a_dsr_balancers_mapped_services_and_backends_are_ipv4() {
    let balancer = DsrBalancer::load(&DsrConfig::default().services(4).flows(1 << 10).check_on_link(false)).unwrap();
    let plain = ServiceAddr::tcp(ip("192.0.2.1"), 80);
    let mapped = ServiceAddr { address: ip("::ffff:192.0.2.1"), ..plain };
    let (backend, meant) = (ip("::ffff:10.0.0.11"), ip("10.0.0.11"));
    balancer.insert_service(mapped, DsrService::l2(), [(backend, 1)]).unwrap();
    assert_eq!(balancer.service(mapped).unwrap().address, plain);
    assert_eq!(balancer.set_backend(plain, meant, 3).unwrap(), Some(1), "the same");
    assert_eq!(balancer.backends(mapped).unwrap()[0].address, meant);
    for family in ["", "::ffff:"] {
        let flow = DsrFlow {
            protocol: ServiceProtocol::Tcp,
            client: SocketAddr::new(ip(&format!("{family}198.51.100.7")), 4000),
            destination: SocketAddr::new(ip(&format!("{family}192.0.2.1")), 80),
            opens: true,
        };
        assert_eq!(balancer.place(flow).unwrap().backend, Some(meant));
    }
    let source = balancer.probe_source(mapped, backend, ip("::ffff:10.0.0.1")).unwrap();
    assert_eq!(source.ip(), ip("10.0.0.1"));
    balancer.drain(mapped, backend).unwrap();
    balancer.set_backends(mapped, [(backend, 1)]).unwrap();
    balancer.kill(mapped, backend).unwrap();
    balancer.remove_service(mapped).unwrap();
    assert!(balancer.services().unwrap().is_empty());
}

/// What the file writes, the balancer lists in another way: a reload finds the same backends.
#[cfg(all(feature = "serde", feature = "health", feature = "pcapng"))]
#[test]
fn an_appliances_file_may_be_written_in_mapped_addresses() {
    let lab = xdpkit_lab::topology::Pair::new().unwrap();
    let place = process::Place::new("mapped");
    let file = |weight: u32, dsr: &str| {
        format!(
            "[interface.eth0]\nchain = ['edge', 'limits', 'direct', 'web']\n\
             [firewall.edge]\ndeny = ['::ffff:10.0.0.66']\n\
             [rate_limiter.limits.tiers]\n'::ffff:192.0.2.0/120' = 'blocked'\n\
             [nat_balancer.web]\n[[nat_balancer.web.service]]\naddress = 'tcp/[::ffff:10.0.0.1]:80'\n\
             backends = {{ '[::ffff:10.0.0.2]:9090' = {weight} }}\n\
             [dsr_balancer.direct]\n[[dsr_balancer.direct.service]]\naddress = 'tcp/192.0.2.80:80'\n\
             backends = {{ {dsr} }}\n"
        )
    };
    place.write(&file(1, "'::ffff:10.0.0.2' = 1"));
    let mut appliance = process::Running::start(&lab.server, &place.file(), &["--metrics", "127.0.0.1:9108"]);
    appliance.await_event("ready");
    let backend = |weight: u32| {
        let text = process::scrape(&lab.server, "127.0.0.1:9108");
        let wanted = |line: &&str| line.starts_with("xdpkit_backend_weight") && line.contains("10.0.0.2:9090");
        let lines: Vec<_> = text.lines().filter(wanted).collect();
        assert!(lines.len() == 1 && lines[0].ends_with(&format!(" {weight}")), "{text}");
        assert!(lines[0].contains("tcp/10.0.0.1:80") && !text.contains("ffff"), "{text}");
        let (_, identity) = lines[0].split_once("identity=").unwrap();
        identity.split(['}', ',']).next().unwrap().to_owned()
    };
    let identity = backend(1);
    place.write(&file(3, "'10.0.0.2' = 1"));
    appliance.reload().unwrap();
    assert_eq!(backend(3), identity, "not another one");
    place.write(&file(3, "'10.0.0.2' = 1, '::ffff:10.0.0.2' = 2"));
    let refused = appliance.reload().unwrap_err();
    assert!(refused.contains("backend `::ffff:10.0.0.2`: expected once in a service"), "{refused}");
    appliance.kill();
}
