//! The appliance as a program: its file, reloads, metrics and all functions at work. What happens to it under traffic, and
//! health checks, have files of their own.
#![cfg(all(feature = "serde", feature = "health", feature = "pcapng"))]

mod common;
#[path = "appliance_process/process.rs"]
mod process;

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use process::{FILE, Place, Running, example, scrape};
use serde_json::{Value, json};
use xdpkit::{AttachOptions, MonitorConfig, PacketMonitor, Stage as _};
use xdpkit_lab::{
    bpffs::BpfFs,
    topology::{DsrL2, Pair},
    traffic::{HttpServer, http_get, ping},
};

fn answers(lab: &Pair, to: IpAddr) -> bool {
    ping(&lab.client, to, 1, Duration::ZERO, Duration::from_millis(500)).unwrap().received == 1
}

fn refusal(place: &Place, text: &str) -> String {
    place.write(text);
    let output = Command::new(example()).arg("--config").arg(place.file()).output().unwrap();
    let lines = String::from_utf8(output.stderr).unwrap();
    let lines: Vec<_> = lines.lines().filter(|line| !line.starts_with("libbpf:")).collect();
    assert_eq!((lines.len(), output.status.code()), (1, Some(2)), "{text}: {lines:?}");
    let start = format!("{}: ", place.file().display());
    lines[0].strip_prefix(&start).unwrap_or_else(|| panic!("{}", lines[0])).to_owned()
}

#[test]
fn a_bad_file_is_refused_with_the_place_and_the_value() {
    let place = Place::new("bad");
    fs::write(place.0.join("list"), "10.0.0.0/8\n10.0.0.0/99\n").unwrap();
    let list = place.0.join("list");
    let list = list.display();
    let rows: &[(&str, &str)] = &[
        ("", "line 1: ``: missing field `interface`"),
        ("[interface]", "interface: expected at least one `[interface.NAME]`"),
        ("[interface.eth0]\nchain = []", "interface.eth0.chain: `[]`: expected at least one function"),
        ("[interface.eth0", "line 1: ``: unclosed table, expected `]`"),
        (
            "[interface.eth0]\nchain = ['edge']\n[firewall.egde]",
            "interface.eth0.chain: `edge`: expected a function of this file: egde",
        ),
        ("[interface.eth0]\nchain = ['a', 'a']\n[firewall.a]", "interface.eth0.chain: `a`: expected once in a chain"),
        (
            "[interface.eth0]\nchain = ['a']\n[firewall.a]\n[monitor.b]",
            "monitor.b: stands in no chain: packets would not meet it",
        ),
        (
            "[interface.eth0]\nchain = ['a']\n[firewall.a]\n[monitor.a]",
            "firewall.a: `a`: expected a name that no other function has, but a monitor has it",
        ),
        (
            "[interface.eth0]\nchain = ['a']\nmode = 'fast'\n[firewall.a]",
            "line 3: interface.eth0.mode: `'fast'`: unknown variant `fast`, expected one of `native`, `generic`, \
             `offload`, `auto`",
        ),
        (
            "[interface.eth0]\nchain = ['a']\n[firewall.a]\n\ndeny = ['10.0.0.0/8', '10.0.0.0/33']",
            "line 5: firewall.a.deny[1]: `'10.0.0.0/33'`: selector `10.0.0.0/33`: expected CIDR [to CIDR] \
             [PROTOCOL[/PORT[-PORT]]]",
        ),
        (
            "[interface.eth0]\nchain = ['a']\n[firewall.a]\nsettings.defualt = 'deny'",
            "line 4: firewall.a.settings.defualt: `defualt`: unknown field `defualt`, expected one of `name`, `default`, `not_ip`, \
             `unsupported`, `pass_neighbours`, `capacity`, `engine`, `table_lines`, `rule_counters`, `count_only`, \
             `sample`, `ring_bytes`",
        ),
        (
            "[interface.eth0]\nchain = ['a']\n[firewall.a]\ndeny = ['10.0.0.0/8']\nallow = ['10.1.1.1/8']",
            "firewall.a.deny: `10.0.0.0/8`: expected one rule about the same packets, but it stands there twice",
        ),
        (
            "[interface.eth0]\nchain = ['a']\n[firewall.a]\nsettings.capacity = 1\ndeny = ['10.0.0.0/8', '::/0']",
            "firewall.a.settings.capacity: `1`: expected at least 2, the number of rules",
        ),
        (
            "[interface.eth0]\nchain = ['a']\n[firewall.a]\nsettings.name = 'b'",
            "firewall.a.settings.name: `b`: expected none, or `a`: the table's name is the function's",
        ),
        (
            "[interface.eth0]\nchain = ['a']\n[dsr_balancer.a]\n[[dsr_balancer.a.service]]\naddress = 'tcp/10.0.0.1:80'\n\
             backends = {}\nhealth = {}",
            "dsr_balancer.a.service: `tcp/10.0.0.1:80`: health: expected the way of probes, with an address of this \
             family: `probes = { interface = \"h1\", sources = [\"ADDRESS\"] }`",
        ),
        (
            "[interface.eth0]\nchain = ['a']\n[dsr_balancer.a]\nprobes = { interface = 'h1', sources = [] }",
            "dsr_balancer.a.probes.interface: `h1`: expected an interface with `a` in its chain",
        ),
        (
            "[interface.eth0]\nchain = ['a']\n[dsr_balancer.a]\n[[dsr_balancer.a.service]]\naddress = 'tcp/10.0.0.1:*'\n\
             backends = {}\nhealth = {}",
            "dsr_balancer.a.service: `tcp/10.0.0.1:*`: health: target of a health check `10.0.0.1:0`: expected a port",
        ),
        (
            "[interface.eth0]\nchain = ['a']\n[nat_balancer.a]\n[[nat_balancer.a.service]]\naddress = 'tcp/10.0.0.1:80'\n\
             backends = { '10.0.0.2:80' = 1 }\nhealth = { fall = 0 }",
            "nat_balancer.a.service: `tcp/10.0.0.1:80`: health: fall of a health check `0`: expected at least 1",
        ),
        (
            "[interface.eth0]\nchain = ['a']\n[firewall.a]\ndeny_files = ['list']",
            &format!("firewall.a.deny_files: {list}: line 2: `10.0.0.0/99`: expected an address or CIDR"),
        ),
    ];
    for (text, expected) in rows {
        assert_eq!(refusal(&place, text), *expected, "{text}");
    }
}

#[test]
fn the_documented_file_is_a_right_one() {
    let lab = Pair::new().unwrap();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/appliance/appliance.toml");
    let mut appliance = Running::start(&lab.server, &file, &[]);
    appliance.expect("ready");
    appliance.stop();
}

#[test]
fn a_reload_brings_the_new_file_into_force_and_a_wrong_one_changes_nothing() {
    let lab = Pair::new().unwrap();
    let place = Place::new("reload");
    place.write(FILE);
    let mut appliance = Running::start(&lab.server, &place.file(), &[]);
    assert_eq!(
        appliance.expect("ready"),
        json!({"event": "ready", "interface": "eth0", "mode": "native", "chain": ["watch", "edge"], "adopted": false})
    );
    let both = lab.server_addr.both();
    assert_eq!(both.map(|to| answers(&lab, to)), [true; 2]);

    place.write(&FILE.replace("10.0.0.66", "10.0.0.2").replace("fd00::66", "fd00::2"));
    appliance.reload().unwrap();
    assert_eq!(both.map(|to| answers(&lab, to)), [false; 2]);

    for (text, problem) in [
        ("[firewall.edge]", "line 1: ``: missing field `interface`"),
        (
            &FILE.replace("sample = 1", "capacity = 7"),
            "firewall.edge.settings.capacity: `changed`: expected its value as before: it can only change with a restart",
        ),
        (
            &FILE.replace("[monitor.watch]", "[firewall.watch]"),
            "firewall.watch: `firewall`: expected a monitor as before: it can only change with a restart",
        ),
        (&FILE.replace("[monitor", "last = '/nope'\n[monitor"), "nothing is pinned at /nope"),
        (
            &FILE.replace("[monitor", "mode = 'generic'\n[monitor"),
            "interface.eth0.mode: `generic`: expected the mode as before",
        ),
        (
            &FILE.replace("[monitor", "[interface.none]\nchain = ['more']\n[firewall.more]\n[monitor"),
            "no interface `none`",
        ),
    ] {
        place.write(text);
        let error = appliance.reload().unwrap_err();
        assert!(error.contains(problem), "{error}");
        assert_eq!(both.map(|to| answers(&lab, to)), [false; 2], "{problem}: as before");
    }

    // Another chain: a second firewall, without the monitor.
    place.write("[interface.eth0]\nchain = ['edge', 'more']\n[firewall.edge]\n[firewall.more]\ndeny = ['10.0.0.2']");
    appliance.reload().unwrap();
    assert_eq!(both.map(|to| answers(&lab, to)), [false, true]);
    let stats = appliance.stop();
    assert!(stats["functions"]["more"]["reasons"]["denied"].as_u64().unwrap() > 0, "{stats}");
    assert!(stats["functions"].get("watch").is_none(), "{stats}");
    assert_eq!(both.map(|to| answers(&lab, to)), [true; 2], "detached");
}

#[test]
fn a_reload_that_fails_halfway_is_undone() {
    let lab = Pair::new().unwrap();
    let place = Place::new("halfway");
    let more = "[interface.eth1]\nchain = ['edge']\n";
    let one = "[nat_balancer.web]\nsettings.services = 1\n[[nat_balancer.web.service]]\naddress = 'tcp/10.9.0.1:80'\n\
               backends = { '10.9.0.2:80' = 1 }\n";
    let two = one.to_owned()
        + "[[nat_balancer.web.service]]\naddress = 'tcp/10.9.0.1:81'\nbackends = { '10.9.0.2:80' = 1 }\n";
    let file = FILE.replace("'edge'", "'edge', 'web'").replace("10.0.0.66", "10.0.0.2");
    xdpkit_lab::veth((&lab.server, "eth1"), (&lab.client, "eth1")).unwrap();
    place.write(&(file.clone() + one));
    let mut appliance = Running::start(&lab.server, &place.file(), &[]);
    appliance.expect("ready");
    let both = lab.server_addr.both();
    assert_eq!(both.map(|to| answers(&lab, to)), [false, true]);

    // The second service shows that there is no room only when the first firewall's rules and an interface are changed.
    place.write(&(file.replace("10.0.0.2", "10.0.0.66").replace("fd00::66", "fd00::2") + more + &two));
    let error = appliance.reload().unwrap_err();
    assert!(error.contains("`web`: ") && error.contains("services"), "{error}");
    assert!(!error.contains("not all went back"), "{error}");
    assert_eq!(both.map(|to| answers(&lab, to)), [false, true], "the rules are the old ones");
    let monitor = PacketMonitor::load(&MonitorConfig::default()).unwrap();
    let attachment =
        lab.server.run(|| monitor.attach(&AttachOptions::new("eth1"))).expect("the new interface is free again");
    drop(attachment);
    // And the file that was right before is right again.
    place.write(&(file + more + one));
    appliance.reload_all(2).unwrap();
    appliance.stop();
}

#[test]
fn top_shows_a_pinned_appliance_and_leaves_it_alone() {
    let lab = Pair::new().unwrap();
    lab.server.set_up("lo").unwrap();
    let place = Place::new("top");
    place.write(&FILE.replace("10.0.0.66", "10.0.0.2"));
    let pins = BpfFs::new().unwrap();
    let pin = pins.path().join("appliance");
    let pin = pin.to_str().unwrap();
    let mut appliance = Running::start(&lab.server, &place.file(), &["--pin", pin, "--metrics", "127.0.0.1:0"]);
    let metrics = appliance.expect("metrics")["address"].as_str().unwrap().to_owned();
    appliance.expect("ready");
    ping(&lab.client, lab.server_addr.v4.into(), 5, Duration::ZERO, Duration::from_millis(100)).unwrap();
    let mut top = lab.server.command(example().with_file_name("top"));
    let output = top.args(["--pin", pin, "--metrics", &metrics, "--once"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let line = |words: &[&str]| {
        let found = text.lines().any(|line| line.split_whitespace().collect::<Vec<_>>().starts_with(words));
        assert!(found, "{words:?}: {text}");
    };
    line(&["function", "kind", "packets/s"]);
    line(&["watch", "monitor"]);
    line(&["edge", "denied", "drop", "0", "5"]);
    line(&["firewall_rules", "function=edge", "2"]);
    line(&["attached", "interface=eth0", "mode=native", "1"]);
    appliance.reload().unwrap();
    appliance.stop();
    let output = Command::new(example().with_file_name("top")).args(["--pin", "/nope", "--once"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("nothing is pinned at /nope"));
}

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
        let report = ping(&lab.client, vip, 10, Duration::ZERO, Duration::from_millis(500)).unwrap();
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
fn a_backend_that_left_is_forgotten_when_its_connections_are_over() {
    let lab = Pair::new().unwrap();
    lab.server.set_up("lo").unwrap();
    let place = Place::new("leaving");
    let file = |backend| {
        format!(
            "[interface.eth0]\nchain = ['web']\n[nat_balancer.web]\nsettings.timeouts.udp_new = 1\n\
             [[nat_balancer.web.service]]\naddress = 'udp/10.0.0.1:53'\nbackends = {{ '{backend}:53' = 1 }}\n"
        )
    };
    place.write(&file("10.0.0.3"));
    let mut appliance = Running::start(&lab.server, &place.file(), &["--metrics", "127.0.0.1:0"]);
    let address = appliance.expect("metrics")["address"].as_str().unwrap().to_owned();
    appliance.expect("ready");
    lab.client.run(|| std::net::UdpSocket::bind("10.0.0.2:0").unwrap().send_to(b"?", "10.0.0.1:53")).unwrap();
    let knows = |text| scrape(&lab.server, &address).contains(text);
    common::wait_for(|| knows("state=\"udp_new\"} 1"));
    place.write(&file("10.0.0.4"));
    appliance.reload().unwrap();
    assert!(knows("10.0.0.4:53") && knows("10.0.0.3:53"), "it is kept for its connection");
    let end = Instant::now() + Duration::from_secs(60);
    while knows("10.0.0.3:53") {
        assert!(Instant::now() < end, "it is still there");
        std::thread::sleep(Duration::from_millis(100));
    }
    appliance.stop();
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

/// With another size than what is pinned has: no start, a reason, and all goes on. Under another name, it begins anew in its
/// place.
/// The new build takes over with the very same command line; two processes at the same tables would undo each other's changes.
#[test]
fn who_is_taken_over_ends_and_leaves_the_metrics_to_the_next() {
    let (lab, place, pins) = (Pair::new().unwrap(), Place::new("upgrade"), BpfFs::new().unwrap());
    lab.server.set_up("lo").unwrap();
    place.write(FILE);
    let pin = pins.path().join("appliance");
    let flags = ["--pin", pin.to_str().unwrap(), "--metrics", "127.0.0.1:9108"];
    let mut old = Running::start(&lab.server, &place.file(), &flags);
    old.expect("metrics");
    old.expect("ready");
    let mut new = Running::start(&lab.server, &place.file(), &flags);
    assert_eq!(old.expect("superseded")["interface"], "eth0");
    assert_eq!(old.ended().1, Some(0));
    new.expect("metrics");
    assert_eq!(new.expect("ready")["adopted"], true);
    assert!(scrape(&lab.server, "127.0.0.1:9108").contains("xdpkit_attached"));
    assert_eq!(lab.server_addr.both().map(|to| answers(&lab, to)), [true, true]);
    new.stop();

    // Without pins nobody is taken over: nothing is attached where nobody could be told of it.
    let mut other = Running::start(&lab.client, &place.file(), &["--metrics", "192.0.2.1:9108"]);
    assert_eq!(other.ended(), (Vec::new(), Some(1)));
}

#[test]
fn another_size_than_what_is_pinned_has_is_refused_with_the_way_out() {
    let lab = Pair::new().unwrap();
    let place = Place::new("sizes");
    let pins = BpfFs::new().unwrap();
    let directory = pins.path().join("appliance");
    let pin = ["--pin", directory.to_str().unwrap()];
    let text = "
[interface.eth0]
chain = ['edge', 'limits', 'direct', 'translated']
[firewall.edge]
settings.capacity = 1000
deny = ['10.0.0.2']
[rate_limiter.limits]
settings.sources = 4096
[dsr_balancer.direct]
settings.flows = 4096
[nat_balancer.translated]
settings.capacity = 4096
";
    place.write(text);
    let mut appliance = Running::start(&lab.server, &place.file(), &pin);
    appliance.expect("ready");
    appliance.kill();
    let client_is_denied = || !answers(&lab, lab.server_addr.v4.into());
    assert!(client_is_denied());
    let rows = [
        ("capacity = 1000", "capacity = 2000", "edge` pinned in {}: it has `capacity", "1000", "2000"),
        ("sources = 4096", "sources = 8192", "limits` pinned in {}: it has `sources", "4096", "8192"),
        ("flows = 4096", "flows = 8192", "direct` pinned in {}: it has `flows", "4096", "8192"),
        (
            "\nsettings.capacity = 4096",
            "\nsettings.capacity = 8192",
            "translated` pinned in {}: it has `capacity",
            "4096",
            "8192",
        ),
        (
            "capacity = 1000",
            "capacity = 1000\nsettings.engine = 'trie'",
            "edge` pinned in {}: it has `engine",
            "compiled",
            "trie",
        ),
        (
            "sources = 4096",
            "sources = 4096\nsettings.prefix_v6 = 56",
            "limits` pinned in {}: it has `prefix_v6",
            "64",
            "56",
        ),
        (
            "flows = 4096",
            "flows = 4096\nsettings.seed = 7",
            "direct` pinned in {}: it has `seed",
            "of its own",
            "another one",
        ),
        (
            "flows = 4096",
            "flows = 4096\nsettings.table_size = 1021",
            "direct` pinned in {}: it has `table_size",
            "65552",
            "1024",
        ),
        (
            "\nsettings.capacity = 4096",
            "\nsettings.capacity = 4096\nsettings.ports = { start = 2000, end = 3000 }",
            "translated` pinned in {}: it has `ports",
            "1024..=65535",
            "2000..=3000",
        ),
    ];
    for (old, new, setting, found, wanted) in rows.into_iter().take(common::times(4, 9, 1)) {
        place.write(&text.replace(old, new));
        let output = lab.server.command(example()).arg("--config").arg(place.file()).args(pin).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        let setting = setting.replace("{}", directory.to_str().unwrap());
        let expected = format!(
            "stage `{setting}` {found}, and {wanted} is asked for, which cannot change: ask for what it has, or for a stage of another name"
        );
        assert!(error.contains(&expected), "{error}");
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(client_is_denied(), "{new}: what is pinned goes on");
    }
    // The way out.
    place.write(&text.replace("capacity = 1000", "capacity = 2000").replace("edge", "edge2"));
    let mut appliance = Running::start(&lab.server, &place.file(), &pin);
    assert_eq!(appliance.expect("ready")["adopted"], true);
    assert!(client_is_denied());
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
