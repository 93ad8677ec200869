//! The appliance as a program: all functions at work, and what it tells of them. Its file, its pins, health checks and what
//! happens to it under traffic have tests of their own (the files beside this one).
#![cfg(all(feature = "serde", feature = "health", feature = "pcapng"))]

#[path = "../common/mod.rs"]
mod common;
mod connections;
mod file;
mod guard;
mod health;
mod pins;
#[path = "../appliance_process/process.rs"]
mod process;
mod systemd;
mod traffic;

use std::{fs, net::SocketAddr, process::Command, time::Duration};

use process::{FILE, Place, Running, answers, scrape};
use serde_json::Value;
use xdpkit_lab::{
    topology::{DsrL2, Pair},
    traffic::{HttpServer, http_get, ping},
};

/// The L2 tutorial's network with the appliance on the balancer's one interface.
#[test]
fn one_interface_runs_all_functions_for_real_clients() {
    let (vip4, vip6) = ("192.168.178.100".parse().unwrap(), "2001:db8:b::100".parse().unwrap());
    let lab = DsrL2::new(2, vip4, vip6).unwrap();
    let place = Place::new("all");
    let [own4, own6] = lab.balancer_addr.both();
    let [a, b] = [lab.backend_addrs[0], lab.backend_addrs[1]];
    place.write(&format!(
        "
[interface.eth0]
chain = ['edge', 'limits', 'direct', 'translated']
[firewall.edge]
deny = ['10.0.0.20 to {vip4} tcp/81', '2001:db8:a::20 to {vip6} tcp/81']
[rate_limiter.limits]
settings.limits = {{ icmp-echo = '1/h:3', tcp = '100000/s' }}
tiers = {{ '192.168.178.0/24' = 'exempt', '2001:db8:b::/64' = 'exempt' }}
[dsr_balancer.direct]
[[dsr_balancer.direct.service]]
address = 'tcp/{vip4}:*'
backends = {{ '{}' = 1, '{}' = 1 }}
[[dsr_balancer.direct.service]]
address = 'tcp/[{vip6}]:*'
backends = {{ '{}' = 1, '{}' = 1 }}
[nat_balancer.translated]
[[nat_balancer.translated.service]]
address = 'tcp/{own4}:8080'
backends = {{ '{}:9090' = 1, '{}:9090' = 1 }}
[[nat_balancer.translated.service]]
address = 'tcp/[{own6}]:8080'
backends = {{ '[{}]:9090' = 1, '[{}]:9090' = 1 }}
",
        a.v4, b.v4, a.v6, b.v6, a.v4, b.v4, a.v6, b.v6
    ));
    let mut servers = Vec::new();
    for (number, backend) in lab.backends.iter().enumerate() {
        let page = move |kind: &'static str| move |peer: SocketAddr| format!("{kind}{number} {}", peer.ip());
        for vip in lab.vip.both() {
            for port in [80, 81] {
                servers.push(HttpServer::start(backend, SocketAddr::new(vip, port), page("dsr")).unwrap());
            }
        }
        for own in lab.backend_addrs[number].both() {
            servers.push(HttpServer::start(backend, SocketAddr::new(own, 9090), page("nat")).unwrap());
        }
    }
    let mut appliance = Running::start(&lab.balancer, &place.file(), &[]);
    appliance.expect("ready");
    let patience = Duration::from_secs(20);
    for family in 0..2 {
        let (vip, own, client) =
            (lab.vip.both()[family], lab.balancer_addr.both()[family], lab.client_addr.both()[family]);
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..30 {
            let page = http_get(&lab.client, SocketAddr::new(vip, 80), "/", patience).unwrap();
            let direct = String::from_utf8(page).unwrap();
            assert!(direct.ends_with(&format!(" {client}")), "the backend sees the client: {direct}");
            // The first ones wait until the ways to the backend and back are known.
            let page = match http_get(&lab.client, SocketAddr::new(own, 8080), "/", patience) {
                Ok(page) => page,
                Err(error) => panic!("{error}: {}", appliance.stop()),
            };
            let translated = String::from_utf8(page).unwrap();
            assert!(translated.ends_with(&format!(" {own}")), "the backend sees the balancer: {translated}");
            seen.extend([direct, translated].map(|page| page[..4].to_owned()));
        }
        assert_eq!(seen.len(), 4, "both backends of both balancers: {seen:?}");
        let denied = http_get(&lab.client, SocketAddr::new(vip, 81), "/", Duration::from_millis(700));
        assert!(denied.is_err(), "port 81 is denied to this client");
        let report = ping(&lab.client, vip, 10, Duration::ZERO, Duration::from_secs(2)).unwrap();
        assert_eq!(report.received, 3, "three at once, and then one an hour");
    }
    let stats = appliance.stop();
    let of = |function: &str, reason: &str| {
        stats["functions"][function]["reasons"].get(reason).and_then(Value::as_u64).unwrap_or(0)
    };
    let packets = |function: &str| stats["functions"][function]["packets"].as_u64().unwrap();
    let passed = |function: &str| stats["functions"][function]["passed"].as_u64().unwrap();
    assert!(of("edge", "denied") >= 2, "{stats}");
    assert_eq!(of("limits", "over_packets"), 14, "{stats}");
    assert_eq!(of("direct", "echo_answered"), 6, "{stats}");
    assert!(of("direct", "forwarded") >= 60 * 4 && of("translated", "forwarded") >= 60 * 4, "{stats}");
    assert!(of("translated", "answered") >= 60 * 3, "{stats}");
    // What a function passes is what the next one meets, and every packet ends in one place.
    for (function, next) in [("edge", "limits"), ("limits", "direct"), ("direct", "translated")] {
        assert_eq!(passed(function), packets(next), "{function} and {next}: {stats}");
    }
    assert_eq!(stats["packets"].as_u64().unwrap(), packets("edge"), "{stats}");
}

#[test]
fn metrics_tell_every_counter_and_a_parser_reads_them() {
    let lab = Pair::new().unwrap();
    lab.server.set_up("lo").unwrap();
    let place = Place::new("metrics");
    place.write(&FILE.replace("10.0.0.66", "10.0.0.2"));
    let mut appliance = Running::start(&lab.server, &place.file(), &["--metrics", "127.0.0.1:0"]);
    let address = appliance.expect("metrics")["address"].as_str().unwrap().to_owned();
    appliance.expect("ready");
    let sent = 7;
    let report =
        ping(&lab.client, lab.server_addr.v4.into(), sent, Duration::ZERO, Duration::from_millis(300)).unwrap();
    assert_eq!(report.received, 0);
    let text = scrape(&lab.server, &address);
    assert!(text.ends_with("# EOF\n"), "{text}");
    let parsed = prometheus_parse::Scrape::parse(text.lines().map(|line| Ok(line.to_owned()))).unwrap();
    let value = |name: &str, labels: &[(&str, &str)]| {
        let samples = parsed.samples.iter().filter(|sample| {
            sample.metric == name && labels.iter().all(|(label, value)| sample.labels.get(label) == Some(value))
        });
        let values: Vec<f64> = samples
            .map(|sample| match sample.value {
                // OpenMetrics names counters without `_total` where it tells their type.
                prometheus_parse::Value::Gauge(value) | prometheus_parse::Value::Untyped(value) => value,
                ref other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(values.len(), 1, "{name} {labels:?}: {text}");
        values[0]
    };
    let denied = [("function", "edge"), ("kind", "firewall"), ("reason", "denied"), ("action", "drop")];
    assert_eq!(value("xdpkit_packets_total", &denied), f64::from(sent), "counters equal the packets sent");
    assert_eq!(value("xdpkit_bytes_total", &denied) % f64::from(sent), 0.0);
    assert_eq!(value("xdpkit_attached", &[("interface", "eth0"), ("mode", "native")]), 1.0);
    assert_eq!(value("xdpkit_firewall_rules", &[("function", "edge")]), 2.0);
    assert_eq!(value("xdpkit_events_lost_total", &[("function", "watch")]), 0.0);
    appliance.stop();
}

#[test]
fn drops_are_captured_with_their_reason_and_rule() {
    use pcap_file::pcapng::{Block, PcapNgReader, blocks::enhanced_packet::EnhancedPacketOption};
    let lab = Pair::new().unwrap();
    let place = Place::new("pcapng");
    place.write(&FILE.replace("10.0.0.66", "10.0.0.2"));
    let capture = place.0.join("drops.pcapng");
    let mut appliance = Running::start(&lab.server, &place.file(), &["--pcapng", capture.to_str().unwrap()]);
    appliance.expect("ready");
    let pings = |count| {
        let patience = Duration::from_millis(100);
        ping(&lab.client, lab.server_addr.v4.into(), count, Duration::ZERO, patience).unwrap();
    };
    pings(3);
    common::wait_for(|| fs::metadata(&capture).is_ok_and(|file| file.len() > 3 * 98));
    // As logrotate does it.
    let moved = place.0.join("drops.1.pcapng");
    fs::rename(&capture, &moved).unwrap();
    appliance.reload().unwrap();
    pings(2);
    let second = place.0.join("drops.2.pcapng");
    common::wait_for(|| fs::metadata(&capture).is_ok_and(|file| file.len() > 2 * 98));
    fs::rename(&capture, &second).unwrap();
    // Where nothing can be written, packets go on being judged.
    fs::create_dir(&capture).unwrap();
    appliance.reload().unwrap();
    assert!(appliance.expect("capture_failed")["error"].as_str().unwrap().contains("directory"));
    assert!(!answers(&lab, lab.server_addr.v4.into()));
    fs::remove_dir(&capture).unwrap();
    appliance.reload().unwrap();
    pings(1);
    appliance.stop();
    // The one that was not answered is still in the ring when the file can be written again.
    for (path, count) in [(moved, 3), (second, 2), (capture, 2)] {
        let bytes = fs::read(&path).unwrap();
        let mut reader = PcapNgReader::new(&bytes[..]).unwrap();
        let mut comments = Vec::new();
        while let Some(block) = reader.next_block() {
            if let Block::EnhancedPacket(packet) = block.unwrap().into_owned() {
                assert_eq!(packet.data[26..30], [10, 0, 0, 2], "the denied source");
                comments.extend(packet.options);
            }
        }
        let comment = EnhancedPacketOption::Comment("drop: denied, edge by rule 10.0.0.2/32".into());
        assert_eq!(comments, vec![comment; count], "{}", path.display());
        if common::times(0, 1, 0) == 1 {
            let fields = ["-T", "fields", "-e", "frame.comment", "-e", "frame.interface_name", "-e", "ip.src"];
            let output = Command::new("tshark").arg("-r").arg(&path).args(fields).output();
            let output = output.expect("tshark is installed: ./x test --full does it");
            let line = "drop: denied, edge by rule 10.0.0.2/32\teth0\t10.0.0.2\n";
            assert_eq!(String::from_utf8_lossy(&output.stdout), line.repeat(count), "{}", path.display());
        }
    }
}
