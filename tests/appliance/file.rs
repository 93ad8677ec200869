//! The appliance's file: what is wrong in one is refused, and what a reload brings into force.
#![cfg(all(feature = "serde", feature = "health", feature = "pcapng"))]

use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use crate::process::{FILE, Place, Running, answers, example, scrape};
use serde_json::json;
use xdpkit::{AttachOptions, MonitorConfig, PacketMonitor, Stage as _};
use xdpkit_lab::topology::Pair;

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
    crate::common::wait_for(|| knows("state=\"udp_new\"} 1"));
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
