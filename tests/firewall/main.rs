//! The firewall's rules: the traps F1, F2, F4 to F7 and F10, the table's verbs, exact counters, and real traffic.

mod adopt;
#[path = "../common/mod.rs"]
mod common;
mod lists;
mod model;
mod rules;

use std::{collections::BTreeMap, net::IpAddr, thread, time::Duration};

use common::judge;
use xdpkit::{
    Action, AttachOptions, Decision, Engine, Error, Firewall, FirewallConfig, Reason, Rule, Selector, Stage as _,
    ipnet::IpNet,
};
use xdpkit_lab::{
    PacketSocket,
    frame::{Frame, extension},
    topology::Pair,
    traffic::{HttpServer, TcpEcho, http_get, ping, tcp_echo},
};

/// The same firewall with either engine.
fn firewalls(rules: &[(&str, Rule)]) -> [Firewall; 2] {
    [Engine::Trie, Engine::Compiled].map(|engine| {
        let firewall = Firewall::load(&FirewallConfig::default().engine(engine)).unwrap();
        for (selector, rule) in rules {
            firewall.insert(selector.parse().unwrap(), *rule).unwrap();
        }
        firewall
    })
}

fn rule_of(firewall: &Firewall, selector: &str) -> Option<Rule> {
    firewall.get(on(selector)).unwrap().map(|entry| entry.rule)
}

fn on(text: &str) -> Selector {
    text.parse().unwrap()
}

fn from(source: &str) -> Vec<u8> {
    packet(source, 17).build()
}

fn packet(source: &str, protocol: u8) -> Frame {
    let source: IpAddr = source.parse().unwrap();
    let server: IpAddr = if source.is_ipv4() { "10.0.0.1" } else { "2001:db8::1" }.parse().unwrap();
    match protocol {
        17 => Frame::udp((source, 4000).into(), (server, 80).into()),
        6 => Frame::tcp((source, 4000).into(), (server, 80).into()),
        1 => Frame::echo(source, server, 1, 1),
        other => Frame::ip(source, server, other).payload(&[0; 24]),
    }
}

#[test]
fn f1_keys_are_in_network_byte_order() {
    for firewall in firewalls(&[("192.168.178.0/24", Rule::deny()), ("2001:db8:1::/48", Rule::deny())]) {
        for (source, action) in [
            ("192.168.178.7", Action::Drop),
            ("10.168.178.0", Action::Pass),
            ("178.168.192.7", Action::Pass),
            ("192.168.179.7", Action::Pass),
            ("2001:db8:1:ffff::7", Action::Drop),
            ("2001:db8:2::7", Action::Pass),
            ("db8:2001:1::7", Action::Pass),
        ] {
            assert_eq!(judge(&firewall, &from(source)).0, action, "{source}");
        }
    }
}

#[test]
fn f2_a_prefix_is_the_same_whatever_its_host_bits() {
    for firewall in firewalls(&[]) {
        assert_eq!(firewall.insert(on("10.9.9.9/8"), Rule::deny()).unwrap(), None);
        assert_eq!(
            firewall.insert(on("10.0.0.0/8"), Rule::allow()).unwrap(),
            Some(Rule::deny()),
            "told of the duplicate"
        );
        assert_eq!(rule_of(&firewall, "10.1.2.3/8"), Some(Rule::allow()));
        assert_eq!(firewall.len().unwrap(), 1);
        assert_eq!(firewall.remove(on("10.255.0.0/8")).unwrap(), Some(Rule::allow()));
        assert!(firewall.is_empty().unwrap());
    }
}

#[test]
fn f4_the_longest_prefix_decides() {
    for firewall in firewalls(&[
        ("10.0.0.0/8", Rule::deny()),
        ("10.1.0.0/16", Rule::allow()),
        ("10.1.1.0/24", Rule::deny()),
        ("10.1.1.1/32", Rule::allow()),
        ("2001:db8::/32", Rule::deny()),
        ("2001:db8:0:1::/64", Rule::allow()),
        ("2001:db8:0:1::7/128", Rule::deny()),
    ]) {
        for (source, action, by) in [
            ("10.2.0.1", Action::Drop, "10.0.0.0/8"),
            ("10.1.2.1", Action::Pass, "10.1.0.0/16"),
            ("10.1.1.2", Action::Drop, "10.1.1.0/24"),
            ("10.1.1.1", Action::Pass, "10.1.1.1/32"),
            ("2001:db8:0:2::1", Action::Drop, "2001:db8::/32"),
            ("2001:db8:0:1::1", Action::Pass, "2001:db8:0:1::/64"),
            ("2001:db8:0:1::7", Action::Drop, "2001:db8:0:1::7/128"),
        ] {
            let reason = if action == Action::Pass { Reason::Allowed } else { Reason::Denied };
            assert_eq!(judge(&firewall, &from(source)), (action, reason), "{source}");
            let entry = firewall.matching(source.parse().unwrap()).unwrap().unwrap();
            let allows = entry.rule.decision == Decision::Allow;
            assert_eq!((entry.selector.to_string().as_str(), allows), (by, action == Action::Pass));
            assert_eq!(entry.count.packets, 1);
        }
        assert_eq!(judge(&firewall, &from("11.0.0.1")), (Action::Pass, Reason::DefaultAction));
        assert_eq!(firewall.matching("11.0.0.1".parse().unwrap()).unwrap(), None);
        // Without the longer rule, the next shorter one decides.
        firewall.remove(on("10.1.1.0/24")).unwrap();
        assert_eq!(judge(&firewall, &from("10.1.1.2")), (Action::Pass, Reason::Allowed));
    }
}

#[test]
fn f5_a_full_table_refuses_by_name_and_keeps_what_it_had() {
    for engine in [Engine::Trie, Engine::Compiled] {
        let firewall = Firewall::load(&FirewallConfig::default().capacity(3).engine(engine)).unwrap();
        let rules = |count: u8| (1..=count).map(|n| (on(&format!("10.{n}.0.0/16")), Rule::deny()));
        let sources = || firewall.iter().unwrap().map(|entry| entry.selector.to_string()).collect::<Vec<_>>();
        let three = ["10.1.0.0/16", "10.2.0.0/16", "10.3.0.0/16"];
        firewall.insert_many(rules(2)).unwrap();
        let error = firewall.insert_many(rules(5)).unwrap_err();
        assert_eq!(error.to_string(), "map `rules` is full: it holds 3 entries; `10.4.0.0/16` was refused");
        assert_eq!(sources(), three[..2], "nothing is half applied");
        assert_eq!(judge(&firewall, &from("10.3.0.1")), (Action::Pass, Reason::DefaultAction));

        firewall.insert_many(rules(3)).unwrap();
        let error = firewall.insert(on("10.9.9.9/16"), Rule::deny()).unwrap_err();
        assert!(matches!(&error, Error::Full { entry, .. } if entry == "10.9.0.0/16"), "{error}");
        assert_eq!(
            firewall.insert(on("10.2.0.0/16"), Rule::allow()).unwrap(),
            Some(Rule::deny()),
            "a change still fits"
        );
        let error = firewall.replace_all((1..=4).map(|n| (on(&format!("11.{n}.0.0/16")), Rule::deny()))).unwrap_err();
        assert!(matches!(&error, Error::Full { entry, .. } if entry == "11.4.0.0/16"), "{error}");
        assert_eq!(sources(), three);
        assert_eq!(judge(&firewall, &from("10.3.0.1")), (Action::Drop, Reason::Denied));
        assert_eq!(judge(&firewall, &from("11.1.0.1")), (Action::Pass, Reason::DefaultAction));
        // A list of the same size that shares nothing fits, again and again.
        for round in 0..20 {
            firewall.replace_all((1..=3).map(|n| (on(&format!("{}.{n}.0.0/16", 20 + round)), Rule::deny()))).unwrap();
            assert_eq!(judge(&firewall, &from(&format!("{}.3.0.1", 20 + round))), (Action::Drop, Reason::Denied));
        }
    }
}

#[test]
fn f5_a_full_compiled_table_keeps_what_it_had() {
    let config = FirewallConfig::default().capacity(10_000).engine(Engine::Compiled).table_lines(16_384 + 100);
    let firewall = Firewall::load(&config).unwrap();
    let hosts = |count: u32| (0..count).map(|n| (on(&format!("{}.{}.1.1", 10 + (n >> 8), n & 0xff)), Rule::deny()));
    firewall.insert_many(hosts(10)).unwrap();
    for error in [firewall.insert_many(hosts(9000)).unwrap_err(), firewall.replace_all(hosts(9000)).unwrap_err()] {
        assert!(matches!(&error, Error::Full { map, .. } if map == "lpm_lines"), "{error}");
        assert_eq!(firewall.len().unwrap(), 10);
        assert_eq!(judge(&firewall, &from("10.9.1.1")), (Action::Drop, Reason::Denied));
        assert_eq!(judge(&firewall, &from("10.10.1.1")), (Action::Pass, Reason::DefaultAction));
    }
    firewall.replace_all(hosts(20)).unwrap();
    assert_eq!(judge(&firewall, &from("10.10.1.1")), (Action::Drop, Reason::Denied));
}

#[test]
fn f6_slash_zero_matches_everything_of_its_family() {
    for firewall in firewalls(&[("0.0.0.0/0", Rule::deny())]) {
        for source in ["0.0.0.1", "10.0.0.1", "255.255.255.254"] {
            assert_eq!(judge(&firewall, &from(source)), (Action::Drop, Reason::Denied), "{source}");
        }
        assert_eq!(judge(&firewall, &from("2001:db8::9")), (Action::Pass, Reason::DefaultAction));
        firewall.insert(on("::/0"), Rule::deny()).unwrap();
        assert_eq!(judge(&firewall, &from("2001:db8::9")), (Action::Drop, Reason::Denied));
        firewall.insert(on("10.0.0.0/8"), Rule::allow()).unwrap();
        assert_eq!(judge(&firewall, &from("10.0.0.1")), (Action::Pass, Reason::Allowed));
        assert_eq!(rule_of(&firewall, "0.0.0.0/0"), Some(Rule::deny()));
        assert_eq!(rule_of(&firewall, "0.0.0.0/1"), None, "a shorter prefix's rule is no answer");
    }
}

#[test]
fn f7_rules_hold_for_every_ip_packet() {
    for firewall in firewalls(&[("10.9.0.0/16", Rule::deny()), ("2001:db8:bad::/48", Rule::deny())]) {
        const GRE: u8 = 47;
        const ESP: u8 = 50;
        const SCTP: u8 = 132;
        for source in ["10.9.9.9", "2001:db8:bad::9"] {
            for protocol in [6, 17, 1, GRE, ESP, SCTP, 4, 41, 59, 255] {
                let frame = packet(source, protocol);
                assert_eq!(judge(&firewall, &frame.build()), (Action::Drop, Reason::Denied), "{source} {protocol}");
                let mut forms = vec![
                    ("tagged", frame.clone().vlan(7)),
                    ("tagged twice", frame.clone().tag(0x88a8, 8).vlan(7)),
                    ("a first fragment", frame.clone().fragment(0, true)),
                ];
                if source.contains(':') {
                    let extended = |kind| frame.clone().extension(kind, &[0; 6]);
                    forms.extend([
                        ("behind hop-by-hop options", extended(extension::HOP_BY_HOP)),
                        ("behind destination options", extended(extension::DESTINATION)),
                        (
                            "behind both, tagged",
                            extended(extension::HOP_BY_HOP).extension(extension::DESTINATION, &[0; 6]).vlan(7),
                        ),
                    ]);
                }
                for (what, frame) in forms {
                    let verdict = judge(&firewall, &frame.build());
                    assert_eq!(verdict, (Action::Drop, Reason::Denied), "{source} {protocol}, {what}");
                }
                let later = frame.fragment(800, false).build();
                assert_eq!(judge(&firewall, &later), (Action::Drop, Reason::Denied), "{source} {protocol}, fragment");
            }
        }
    }
}

#[test]
fn f10_return_traffic_of_other_interfaces_is_not_judged() {
    // A firewall stands where it was attached: what comes in by another interface does not meet it.
    let (front, back) = (Pair::new().unwrap(), Pair::new().unwrap());
    let firewall = Firewall::load(&FirewallConfig::default().default_decision(Decision::Deny)).unwrap();
    let _attachment = front.server.run(|| firewall.attach(&AttachOptions::new("eth0"))).unwrap();
    let reached = |pair: &Pair| {
        ping(&pair.client, pair.server_addr.v4.into(), 1, Duration::ZERO, Duration::from_millis(500)).unwrap().received
    };
    assert_eq!((reached(&front), reached(&back)), (0, 1));
    // The echo request, and what the client's stack says of itself by multicast.
    assert!(firewall.stats().unwrap().reason(Reason::DefaultAction).packets >= 1);
}

#[test]
fn what_is_not_ip_follows_the_default_unless_told_otherwise() {
    let lldp = Frame::ethernet(0x88cc).payload(&[0; 46]).build();
    let deny = FirewallConfig::default().default_decision(Decision::Deny);
    for (config, action) in [
        (FirewallConfig::default(), Action::Pass),
        (deny.clone(), Action::Drop),
        (deny.clone().not_ip(Decision::Allow), Action::Pass),
        (FirewallConfig::default().not_ip(Decision::Deny), Action::Drop),
    ] {
        let firewall = Firewall::load(&config).unwrap();
        assert_eq!(judge(&firewall, &lldp), (action, Reason::NotIp), "{config:?}");
    }
    // The default changes: what follows it follows.
    let firewall = Firewall::load(&FirewallConfig::default()).unwrap();
    firewall.set_default(Decision::Deny).unwrap();
    assert_eq!(judge(&firewall, &lldp), (Action::Drop, Reason::NotIp));
    firewall.configure(&deny.not_ip(Decision::Allow)).unwrap();
    assert_eq!(judge(&firewall, &lldp), (Action::Pass, Reason::NotIp));
}

#[test]
fn the_default_is_changed_while_packets_flow() {
    for firewall in firewalls(&[]) {
        assert_eq!(judge(&firewall, &from("10.0.0.9")), (Action::Pass, Reason::DefaultAction));
        firewall.set_default(Decision::Deny).unwrap();
        assert_eq!(judge(&firewall, &from("10.0.0.9")), (Action::Drop, Reason::DefaultAction));
    }
}

#[test]
fn rules_are_listed_in_order_and_many_at_once() {
    for firewall in firewalls(&[]) {
        // In both families, in no order.
        let scattered = |n: u32| n.wrapping_mul(0x9e37_79b9);
        let rules: Vec<(Selector, Rule)> = (0..common::times(20_000, 20_000, 3_000) as u32)
            .map(|n| {
                let rule = if n % 3 == 0 { Rule::allow() } else { Rule::deny() };
                let address: IpAddr = match n % 2 {
                    0 => std::net::Ipv4Addr::from(scattered(n)).into(),
                    _ => std::net::Ipv6Addr::from((u128::from(scattered(n)) << 96) | 1).into(),
                };
                (IpNet::new(address, 8 + (n % 25) as u8).unwrap().into(), rule)
            })
            .collect();
        let done = firewall.insert_many(rules.iter().copied()).unwrap();
        let expected: BTreeMap<IpNet, Rule> = rules.iter().map(|(selector, rule)| (selector.source(), *rule)).collect();
        assert_eq!((done.added, done.changed + done.duplicates), (expected.len(), rules.len() - expected.len()));
        let listed = firewall.iter().unwrap().map(|entry| (entry.selector.source(), entry.rule));
        assert!(listed.eq(expected.iter().map(|(prefix, rule)| (*prefix, *rule))));
        for (prefix, rule) in expected.iter().step_by(7) {
            assert_eq!(firewall.get((*prefix).into()).unwrap().unwrap().rule, *rule);
            assert_eq!(firewall.remove((*prefix).into()).unwrap(), Some(*rule));
            assert_eq!(firewall.remove((*prefix).into()).unwrap(), None);
        }
        assert_eq!(firewall.len().unwrap(), expected.len() - expected.len().div_ceil(7));
    }
}

#[test]
fn counters_equal_the_packets_sent_from_two_cpus() {
    let sources = [("10.9.9.9", "10.9.0.0/16"), ("2001:db8:bad::9", "2001:db8:bad::/48")];
    for firewall in firewalls(&sources.map(|(_, prefix)| (prefix, Rule::deny()))) {
        // No bridge between, which would lose frames in places that we do not count.
        let pairs = [Pair::new().unwrap(), Pair::new().unwrap()];
        let attach = |pair: &Pair| pair.server.run(|| firewall.attach(&AttachOptions::new("eth0"))).unwrap();
        let _attachments = pairs.each_ref().map(attach);
        let each = common::times(10_000, 200_000, 1_000);
        let senders = pairs.each_ref().map(|Pair { client, server, .. }| {
            let socket = PacketSocket::open(client, "eth0").unwrap();
            let (from, to) = (client.mac("eth0").unwrap(), server.mac("eth0").unwrap());
            let frames = sources.map(|(source, _)| packet(source, 17).macs(from, to).payload(b"0123456789").build());
            thread::spawn(move || {
                for _ in 0..each {
                    frames.iter().for_each(|frame| socket.send(frame).unwrap());
                }
                frames.map(|frame| frame.len() as u64)
            })
        });
        let lengths = senders.into_iter().map(|sender| sender.join().unwrap()).last().unwrap();
        let wanted = 4 * each as u64;
        // What veth itself lost on the way never met the program.
        let denied = || firewall.stats().unwrap().reason(Reason::Denied);
        let lost = || pairs.iter().map(|pair| pair.server.run(common::received_drops)).sum::<u64>();
        let seen = || denied().packets + lost();
        common::wait_for(|| seen() == wanted);
        assert_eq!(seen(), wanted);
        // And so do the rules' own counters.
        let rules = sources.map(|(_, prefix)| firewall.get(on(prefix)).unwrap().unwrap().count);
        for (rule, length) in rules.into_iter().zip(lengths) {
            assert_eq!(rule.bytes, rule.packets * length);
        }
        assert_eq!(rules[0] + rules[1], denied());
    }
}

#[test]
fn a_denied_client_is_cut_off_and_an_allowed_one_inside_the_denied_range_goes_on() {
    for firewall in firewalls(&[("10.0.0.0/24", Rule::deny()), ("fd00::/64", Rule::deny())]) {
        cut_off_one_of_two(&firewall);
    }
}

fn cut_off_one_of_two(firewall: &Firewall) {
    let pair = Pair::with_clients(2).unwrap();
    for address in pair.client_addrs[0].both() {
        firewall.insert(address.into(), Rule::allow()).unwrap();
    }
    let servers = pair.server_addr.both().map(|address| TcpEcho::start(&pair.server, (address, 7).into()).unwrap());
    let web = HttpServer::start(&pair.server, (pair.server_addr.v4, 80).into(), |_| String::new()).unwrap();
    // What answers may be slow on a busy machine; what does not has to be waited for.
    let (long, short) = (Duration::from_secs(10), Duration::from_millis(500));
    let reach = |client: usize, wait: Duration| {
        let client = &pair.clients[client];
        let tcp = servers.each_ref().map(|server| tcp_echo(client, server.addr(), b"hello", wait).is_ok());
        let pinged = pair
            .server_addr
            .both()
            .map(|address| ping(client, address, 1, Duration::ZERO, wait).unwrap().received == 1);
        (tcp, pinged)
    };
    assert_eq!((reach(0, long), reach(1, long)), (([true; 2], [true; 2]), ([true; 2], [true; 2])), "before");

    // A download runs while the firewall is put in place.
    let download = {
        let (client, address) = (pair.clients[0].clone(), web.addr());
        thread::spawn(move || http_get(&client, address, "/bytes/30000000", Duration::from_secs(60)).unwrap().len())
    };
    let attachment = pair.server.run(|| firewall.attach(&AttachOptions::new("eth0"))).unwrap();
    assert_eq!(reach(0, long), ([true; 2], [true; 2]), "allowed inside the denied range");
    assert_eq!(reach(1, short), ([false; 2], [false; 2]), "denied");
    assert_eq!(download.join().unwrap(), 30_000_000, "its connection was not disturbed");
    // The rule is lifted at once.
    for address in pair.client_addrs[1].both() {
        firewall.insert(address.into(), Rule::allow()).unwrap();
    }
    assert_eq!(reach(1, long), ([true; 2], [true; 2]));
    attachment.detach().unwrap();
    let stats = firewall.stats().unwrap();
    assert!(stats.reason(Reason::Denied).packets >= 4 && stats.dropped() == stats.reason(Reason::Denied), "{stats:?}");
}
