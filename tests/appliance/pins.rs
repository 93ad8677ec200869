//! The appliance with its maps pinned: who takes over whom, and what else looks at them.
#![cfg(all(feature = "serde", feature = "health", feature = "pcapng"))]

use std::{process::Command, time::Duration};

use crate::process::{FILE, Place, Running, answers, example, scrape};
use xdpkit_lab::{bpffs::BpfFs, topology::Pair, traffic::ping};

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
    assert!(String::from_utf8_lossy(&output.stderr).contains("/nope is not in a BPF file system"));
}

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

/// With another size than what is pinned has: no start, a reason, and all goes on. Under another name, it begins anew in its
/// place.
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
        ("capacity = 1000", "capacity = 500", "edge`: it has `capacity", "1000", "500"),
        ("sources = 4096", "sources = 8192", "limits`: it has `sources", "4096", "8192"),
        ("flows = 4096", "flows = 8192", "direct`: it has `flows", "4096", "8192"),
        ("\nsettings.capacity = 4096", "\nsettings.capacity = 8192", "translated`: it has `capacity", "4096", "8192"),
        (
            "capacity = 1000",
            "capacity = 2000\nsettings.ring_bytes = 4096",
            "edge`: it has `ring_bytes",
            "1048576",
            "4096",
        ),
        ("sources = 4096", "sources = 4096\nsettings.prefix_v6 = 56", "limits`: it has `prefix_v6", "64", "56"),
        ("flows = 4096", "flows = 4096\nsettings.seed = 7", "direct`: it has `seed", "of its own", "another one"),
        ("flows = 4096", "flows = 4096\nsettings.table_size = 1021", "direct`: it has `table_size", "65537", "1021"),
        (
            "\nsettings.capacity = 4096",
            "\nsettings.capacity = 4096\nsettings.ports = { start = 2000, end = 3000 }",
            "translated`: it has `ports",
            "1024..=65535",
            "2000..=3000",
        ),
    ];
    for (old, new, setting, found, wanted) in rows.into_iter().take(crate::common::times(9, 9, 1)) {
        place.write(&text.replace(old, new));
        let output = lab.server.command(example()).arg("--config").arg(place.file()).args(pin).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        let expected = format!(
            "stage `{setting}` {found}, and {wanted} is asked for, which cannot change while its tables live: ask for what it \
             has, or for a stage of another name"
        );
        assert!(error.contains(&expected), "{error}");
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(client_is_denied(), "{new}: what is pinned goes on");
    }
    // The way out.
    place.write(&text.replace("capacity = 1000", "capacity = 500").replace("edge", "edge2"));
    let mut appliance = Running::start(&lab.server, &place.file(), &pin);
    assert_eq!(appliance.expect("ready")["adopted"], true);
    assert!(client_is_denied());
    appliance.stop();
}

/// What a reload says that a restart does, a restart does, of a process that runs as well as after its end.
#[test]
fn what_is_pinned_grows_with_a_restart() {
    let (lab, place, pins) = (Pair::new().unwrap(), Place::new("grows"), BpfFs::new().unwrap());
    let directory = pins.path().join("appliance");
    let pin = ["--pin", directory.to_str().unwrap()];
    let text = |rules: u32, more: u32| {
        let networks: Vec<String> = (0..rules).map(|n| format!("'198.18.{}.{}'", n / 256, n % 256)).collect();
        format!(
            "
[interface.eth0]
chain = ['edge', 'limits', 'direct', 'translated']
[firewall.edge]
settings.capacity = {}
deny = ['10.0.0.2', {}]
[rate_limiter.limits]
settings.tiers = {more}
settings.bans = {}
[dsr_balancer.direct]
settings.services = {more}
[nat_balancer.translated]
settings.backends = {more}
",
            rules + 1,
            networks.join(", "),
            64 * more,
        )
    };
    place.write(&text(50, 16));
    let mut appliance = Running::start(&lab.server, &place.file(), &pin);
    appliance.expect("ready");
    let client_is_denied = || !answers(&lab, lab.server_addr.v4.into());
    assert!(client_is_denied());
    place.write(&text(500, 32));
    let message = appliance.reload().unwrap_err().to_string();
    let growing =
        ["edge.settings.capacity", "limits.settings.tiers", "limits.settings.bans", "direct.settings.services"];
    assert!(growing.iter().any(|key| message.contains(key)), "{message}");
    assert!(message.ends_with("it can only change with a restart"), "{message}");
    // While it runs.
    let mut new = Running::start(&lab.server, &place.file(), &pin);
    appliance.expect("superseded");
    assert_eq!(appliance.ended().1, Some(0));
    assert_eq!(new.expect("ready")["adopted"], true);
    assert!(client_is_denied());
    new.stop();
    assert!(client_is_denied());
    // After its end.
    place.write(&text(5000, 64));
    let mut new = Running::start(&lab.server, &place.file(), &pin);
    assert_eq!(new.expect("ready")["adopted"], true);
    assert!(client_is_denied());
    new.stop();
}
