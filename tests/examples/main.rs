//! The examples as programs: their flags, exit codes and JSON, on real interfaces.

#[path = "../common/mod.rs"]
mod common;
mod guard;
mod recipes;

use std::{
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Command, Output, Stdio},
    time::Duration,
};

use serde_json::Value;
use xdpkit_lab::{
    topology::Pair,
    traffic::{ping, udp_echo},
};

/// Cargo builds the examples beside the tests.
fn example(name: &str) -> PathBuf {
    let path = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().join("examples").join(name);
    assert!(path.exists(), "{}: build the examples first (cargo test does)", path.display());
    path
}

fn run(name: &str, arguments: &[&str]) -> Output {
    Command::new(example(name)).args(arguments).output().unwrap()
}

/// Exit code and the one line on stderr.
fn refusal(name: &str, arguments: &[&str]) -> (i32, String) {
    let output = run(name, arguments);
    assert!(output.stdout.is_empty(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stdout));
    let text = String::from_utf8(output.stderr).unwrap();
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with("libbpf:")).collect();
    assert_eq!(lines.len(), 1, "{arguments:?}: one line: {text}");
    (output.status.code().unwrap(), lines[0].to_owned())
}

fn objects(output: &[u8]) -> Vec<Value> {
    output.lines().map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect()
}

#[test]
fn bad_arguments_name_the_flag_the_value_and_what_is_expected() {
    let list = std::env::temp_dir().join(format!("xdpkit-examples-{}", std::process::id()));
    std::fs::write(&list, "10.0.0.0/8\n\n10.0.0.0/99 # ten\n").unwrap();
    let file = list.to_str().unwrap();
    let rows: &[(&str, &[&str], &str)] = &[
        ("firewall", &[], "--interface: expected the name of an interface, or --lab"),
        ("firewall", &["--interface"], "--interface: expected a value"),
        ("firewall", &["--lab", "--interface", "eth0"], "--interface: `eth0`: expected not to stand beside --lab"),
        ("firewall", &["--mode", "driver"], "--mode: `driver`: expected native, generic or auto"),
        ("firewall", &["--duration", "-1"], "--duration: `-1`: expected seconds, more than 0 and at most a billion"),
        (
            "firewall",
            &["--stats-every", "1e19"],
            "--stats-every: `1e19`: expected seconds, more than 0 and at most a billion",
        ),
        (
            "firewall",
            &["--stats-every", "soon"],
            "--stats-every: `soon`: expected seconds, more than 0 and at most a billion",
        ),
        ("firewall", &["eth0"], "`eth0`: expected a flag; --help lists them"),
        (
            "firewall",
            &["--forbid", "x"],
            "`--forbid`: expected one of --deny, --allow, --deny-file, --allow-file, --default, --engine, --interface, --mode, \
             --lab, --json, --stats-every, --duration, --help",
        ),
        (
            "firewall",
            &["--deny", "10.0.0.0/33"],
            "--deny: `10.0.0.0/33`: expected an address or CIDR such as 192.0.2.0/24",
        ),
        (
            "rate_limiting",
            &["--interface", "eth0"],
            "--rate: ``: expected N/UNIT[:BURST] with N and BURST of at least 1 and UNIT s, m or h, such as 100/s or 10/m:3",
        ),
        (
            "rate_limiting",
            &["--rate", "5/d"],
            "--rate: `5/d`: expected N/UNIT[:BURST] with N and BURST of at least 1 and UNIT s, m or h, such as 100/s or 10/m:3",
        ),
        (
            "rate_limiting",
            &["--match", "sctp"],
            "--match: `sctp`: expected all, tcp, tcp-syn, udp, icmp-echo, tcp-port=N or udp-port=N",
        ),
        ("rate_limiting", &["--prefix-v6", "129"], "--prefix-v6: `129`: expected 1 to 128 bits"),
        (
            "rate_limiting",
            &["--limit", "10.0.0.0/8"],
            "--limit: `10.0.0.0/8`: expected CIDR=RATE with RATE N/UNIT[:BURST] with N and BURST of at least 1 and UNIT s, m or h, such as 100/s or 10/m:3",
        ),
        (
            "rate_limiting",
            &["--exempt", "10.0.0.1/33"],
            "--exempt: `10.0.0.1/33`: expected an address or CIDR such as 192.0.2.0/24",
        ),
        ("rate_limiting", &["--ban", "0"], "--ban: `0`: expected seconds, more than 0 and at most a hundred million"),
        (
            "rate_limiting",
            &["--exempt", "10.0.0.0/8", "--limit", "10.1.1.1/8=5/s"],
            "--limit: `10.1.1.1/8=5/s`: expected one tier a prefix, but 10.0.0.0/8 is also exempt",
        ),
        ("firewall", &["--engine", "fast"], "--engine: `fast`: expected auto, trie or compiled"),
        ("firewall", &["--default", "reject"], "--default: `reject`: expected pass or drop"),
        (
            "firewall",
            &["--deny", "10.9.9.9/8", "--allow", "10.0.0.0/8"],
            "--allow: `10.0.0.0/8`: expected one rule a prefix, but it is also to deny",
        ),
        (
            "firewall",
            &["--deny-file", file],
            &format!(
                "--deny-file: `{file}`: expected a list of CIDRs: {file}: line 3: `10.0.0.0/99 # ten`: expected an address or CIDR"
            ),
        ),
        (
            "firewall",
            &["--allow-file", "/nope"],
            "--allow-file: `/nope`: expected a list of CIDRs: /nope: cannot read it: No such file or directory (os error 2)",
        ),
        (
            "nat_balancer",
            &["--interface", "lo"],
            "--service: ``: expected at least one, such as tcp/198.51.100.10:80=192.168.178.11:8080",
        ),
        (
            "nat_balancer",
            &["--service", "tcp/198.51.100.10:80=192.168.178.11"],
            "--service: `tcp/198.51.100.10:80=192.168.178.11`: expected tcp/VIP:PORT=BACKEND:PORT[@WEIGHT],... or udp/..., \
             IPv6 addresses in brackets",
        ),
        (
            "nat_balancer",
            &["--service", "udp/[2001:db8::1]:53=[2001:db8::2]:53@many"],
            "--service: `udp/[2001:db8::1]:53=[2001:db8::2]:53@many`: expected tcp/VIP:PORT=BACKEND:PORT[@WEIGHT],... or \
             udp/..., IPv6 addresses in brackets",
        ),
        ("nat_balancer", &["--nat", "half"], "--nat: `half`: expected full or destination"),
        (
            "nat_balancer",
            &["--scheduler", "dice"],
            "--scheduler: `dice`: expected maglev, round-robin, least-connections or source-hash",
        ),
        (
            "fundamentals",
            &["--action", "tcp=reject"],
            "--action: `tcp=reject`: expected PROTO=ACTION with PROTO arp, ipv4, ipv6, tcp, udp, icmp or icmpv6 and \
             ACTION pass, drop, abort or tx",
        ),
        (
            "fundamentals",
            &["--deny", "::/0"],
            "`--deny`: expected one of --action, --interface, --mode, --lab, --json, --stats-every, --duration, --help",
        ),
        (
            "dsr_l2_balancer",
            &["--service", "tcp/192.0.2.1:80"],
            "--service: `tcp/192.0.2.1:80`: expected tcp/VIP:PORT=BACKEND[@WEIGHT],... or udp/..., with `*` for any port \
             and IPv6 addresses in brackets",
        ),
        (
            "dsr_ipip_balancer",
            &["--service", "tcp/[2001:db8::1]:80=2001:db8::2@3"],
            "--service: `tcp/[2001:db8::1]:80=2001:db8::2@3`: expected tcp/VIP:PORT=BACKEND[@WEIGHT],... or udp/..., \
             with `*` for any port and IPv6 addresses in brackets",
        ),
        ("dsr_backend", &["--vip", "www"], "--vip: `www`: expected an IPv4 or IPv6 address"),
        ("dsr_backend", &["--source", "www/8"], "--source: `www/8`: expected an IPv4 or IPv6 address or CIDR"),
    ];
    for (name, arguments, text) in rows {
        assert_eq!(refusal(name, arguments), (2, (*text).to_owned()));
    }
    std::fs::remove_file(&list).unwrap();
}

#[test]
fn run_time_failures_exit_with_1_and_name_the_interface() {
    let (code, text) = refusal("firewall", &["--interface", "nope0"]);
    assert_eq!((code, text.as_str()), (1, "error: no interface `nope0` in this network namespace"));
    let pair = Pair::new().unwrap();
    let mut busy = pair.client.command(example("fundamentals"));
    let output = busy.args(["--interface", "eth0"]).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text.contains("interface `eth0` already runs XDP program"), "{text}");
    let mut refused = pair.client.command(example("fundamentals"));
    let output = refused.args(["--interface", "lo", "--mode", "native"]).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text.contains("interface `lo` refuses XDP in native mode"), "{text}");
}

#[test]
fn help_lists_every_flag() {
    for (name, flag) in [
        ("firewall", "--deny-file FILE"),
        ("nat_balancer", "--nat MODE"),
        ("fundamentals", "--action PROTO=ACTION"),
        ("nat_balancer", "--nat MODE"),
        ("dsr_l2_balancer", "--service SERVICE"),
        ("dsr_ipip_balancer", "--service SERVICE"),
        ("dsr_backend", "--vip ADDR"),
        ("dsr_backend", "--source CIDR"),
    ] {
        let output = run(name, &["--help"]);
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(0));
        assert!(text.contains(flag) && text.contains("--stats-every SECONDS"), "{text}");
    }
}

#[test]
fn a_fallback_to_generic_mode_is_told_with_its_reason() {
    let alone = xdpkit_lab::Namespace::new("alone").unwrap();
    for json in [true, false] {
        let mut command = alone.command(example("fundamentals"));
        command.args(["--interface", "lo", "--mode", "auto", "--duration", "0.1"]).args(json.then_some("--json"));
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        let text = String::from_utf8(output.stdout).unwrap();
        let first = text.lines().next().unwrap();
        if json {
            let ready: Value = serde_json::from_str(first).unwrap();
            assert_eq!((&ready["event"], &ready["mode"]), (&"ready".into(), &"generic".into()));
            assert!(ready["fallback"].as_str().unwrap().contains("refuses XDP in native mode"), "{ready}");
        } else {
            assert!(
                first.starts_with("attached to lo in generic mode: interface `lo` refuses XDP in native"),
                "{text}"
            );
        }
    }
}

#[test]
fn json_tells_ready_packets_stats_and_stopped() {
    let pair = Pair::new().unwrap();
    let mut command = pair.server.command(example("fundamentals"));
    command.args(["--interface", "eth0", "--json", "--action", "udp=tx", "--action", "icmpv6=pass"]);
    command.args(["--stats-every", "0.2", "--duration", "60"]).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let ready: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    assert_eq!(ready, serde_json::json!({"event": "ready", "interface": "eth0", "mode": "native"}));

    // UDP comes back from the program itself: nobody listens on the server. The client's own port answers.
    for address in pair.server_addr.both() {
        let echo = udp_echo(&pair.client, (address, 7).into(), b"there and back", Duration::from_secs(2)).unwrap();
        assert_eq!(echo, b"there and back");
    }
    std::thread::sleep(Duration::from_millis(300));
    let pid = child.id().to_string();
    // A bare system has no kill program, but every shell knows how.
    assert!(Command::new("sh").args(["-c", &format!("kill -TERM {pid}")]).status().unwrap().success());
    let rest: Vec<Value> = lines.map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect();
    assert_eq!(child.wait().unwrap().code(), Some(0));

    let of = |event: &str| rest.iter().filter(|object| object["event"] == event).collect::<Vec<_>>();
    assert_eq!(rest.last().unwrap(), &serde_json::json!({"event": "stopped"}));
    let reflected: Vec<_> = of("packet").into_iter().filter(|packet| packet["transport"] == "udp").collect();
    assert_eq!(reflected.len(), 2, "{reflected:?}");
    for packet in reflected {
        assert_eq!((&packet["action"], &packet["destination_port"]), (&"tx".into(), &7.into()));
    }
    assert!(of("stats").len() >= 2, "from time to time, and at the end");
    let last = of("stats").pop().unwrap();
    assert_eq!(last["protocols"]["udp"], 2);
    assert_eq!(last["reasons"]["protocol_action"].as_u64().unwrap(), 2 + last["protocols"]["icmpv6"].as_u64().unwrap());
    let sum: u64 = last["reasons"].as_object().unwrap().values().map(|count| count.as_u64().unwrap()).sum();
    assert_eq!(last["packets"].as_u64().unwrap(), sum, "every packet has one reason");
    assert_eq!(of("packet").len() as u64, sum, "and one event");
    // It is detached: the stack has the packets again.
    assert_eq!(
        ping(&pair.client, pair.server_addr.v4.into(), 1, Duration::ZERO, Duration::from_secs(20)).unwrap().received,
        1
    );
}

#[test]
fn a_duration_ends_the_run() {
    let pair = Pair::new().unwrap();
    let mut command = pair.server.command(example("firewall"));
    let output =
        command.args(["--interface", "eth0", "--json", "--duration", "0.3", "--deny", "10.0.0.2"]).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    let events: Vec<_> = objects(&output.stdout).iter().map(|object| object["event"].clone()).collect();
    assert_eq!(events, ["ready", "stats", "stopped"]);
}

#[test]
fn the_rate_limiters_laboratory_limits_one_client() {
    let output = run("rate_limiting", &["--lab", "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let told = objects(&output.stdout);
    let count = |event: &str| told.iter().filter(|line| line["event"] == event).count();
    // Both clients in both families; the fast one is told of in each.
    assert_eq!((count("ready"), count("stopped")), (1, 1), "{told:?}");
    assert!(count("exceeded") >= 2, "{told:?}");
    let stats = told.iter().find(|line| line["event"] == "stats").unwrap();
    assert!(stats["reasons"]["over_packets"].as_u64().unwrap() >= 2, "{stats}");
}

#[test]
fn the_laboratories_play_their_tutorials() {
    let output = run("firewall", &["--lab", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let objects = objects(&output.stdout);
    let worked = |client: &str| {
        let of_client = objects.iter().filter(|object| object["event"] == "lab" && object["client"] == client);
        of_client.map(|object| object["worked"].as_bool().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(worked("10.0.0.2"), [true; 4]);
    assert_eq!(worked("10.0.0.3"), [false; 4]);
    let output = run("fundamentals", &["--lab", "--json"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(self::objects(&output.stdout).iter().any(|object| object["transport"] == "tcp"));

    for arguments in
        [&["--lab", "--json"][..], &["--lab", "--json", "--nat", "destination", "--scheduler", "round-robin"]]
    {
        let output = run("nat_balancer", arguments);
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        let objects = self::objects(&output.stdout);
        let of = |event: &str| objects.iter().filter(|object| object["event"] == event).collect::<Vec<_>>();
        assert_eq!((of("ready").len(), of("lab").len()), (2, 16));
        assert!(of("lab").iter().all(|page| page["worked"] == true), "{objects:?}");
        let new = of("connection").iter().filter(|event| event["what"] == "new").count();
        assert_eq!(new, 16);
        let last = of("stats").pop().unwrap();
        for service in last["services"].as_object().unwrap().values() {
            assert_eq!(service["opened"], 8);
            assert_eq!(service["backends"].as_object().unwrap().len(), 2);
        }
    }
}

#[test]
fn both_dsr_tutorials_fetch_pages_from_two_backends() {
    for name in ["dsr_l2_balancer", "dsr_ipip_balancer"] {
        let output = run(name, &["--lab", "--json"]);
        assert_eq!(output.status.code(), Some(0), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        let objects = objects(&output.stdout);
        let of = |event: &str| objects.iter().filter(|object| object["event"] == event).collect::<Vec<_>>();
        assert_eq!((of("ready").len(), of("backend").len(), of("lab").len()), (1, 4, 16), "{name}");
        assert!(of("lab").iter().any(|page| page["page"] == "backend0 to 10.0.0.20"), "{name}: the client is seen");
        let stats = of("stats")[0];
        // As long as a neighbour is not known, the host forwards: how many packets that are is a matter of time.
        let packets = |reason: &str| stats["reasons"][reason].as_u64().unwrap_or(0);
        assert!(packets("forwarded") > 16, "{name}: {stats}");
        assert!(packets("forwarded") + packets("unresolved") > 60, "{name}: {stats}");
        assert_eq!(stats["services"].as_array().unwrap().len(), 2);
        assert_eq!(objects.last().unwrap()["event"], "stopped");
    }
}

#[test]
fn a_dsr_backend_answers_from_tunnels_and_warns_of_what_its_host_lacks() {
    let output = run("dsr_backend", &["--lab", "--json", "--vip", "192.0.2.77"]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let objects = self::objects(&output.stdout);
    let of = |event: &str| objects.iter().filter(|object| object["event"] == event).collect::<Vec<_>>();
    let warnings = of("warning");
    assert_eq!(warnings.len(), 1, "{objects:?}");
    assert!(warnings[0]["text"].as_str().unwrap().contains("192.0.2.77 is none of its addresses"));
    assert_eq!((of("ready").len(), of("lab").len()), (1, 16));
    for (page, client) in [(of("lab")[0], "10.0.0.20"), (of("lab")[15], "2001:db8:a::20")] {
        assert_eq!(page["page"], format!("backend0 to {client}"));
    }
    let stats = of("stats")[0];
    assert!(stats["reasons"]["decapsulated"].as_u64().unwrap() > 60, "{stats}");
    assert_eq!(stats["vips"].as_array().unwrap().len(), 3);
    assert_eq!(objects.last().unwrap()["event"], "stopped");

    // A host as it comes, outside of the laboratory.
    let pair = Pair::new().unwrap();
    let mut bare = pair.server.command(example("dsr_backend"));
    let output = bare.args(["--interface", "eth0", "--vip", "192.0.2.1", "--duration", "0.2"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{text}");
    for lacking in [
        "192.0.2.1 is none of its addresses",
        "arp_ignore is 0",
        "arp_announce is below 2",
        "tunnels may begin anywhere",
    ] {
        assert!(text.contains(lacking), "{text}");
    }
    let mut told = pair.server.command(example("dsr_backend"));
    told.args(["--interface", "eth0", "--vip", "192.0.2.1", "--duration", "0.2"]);
    let output = told.args(["--source", "10.200.0.0/16", "--source", "2001:db8:200::/64"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && !text.contains("tunnels may begin anywhere"), "{text}");
}
