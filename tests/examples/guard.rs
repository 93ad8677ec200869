//! Ways to lose the guard, and what the examples say: each ends with an event that names the interface, what was counted until
//! then, an error that says why, and exit code 1.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    path::PathBuf,
    process::Stdio,
};

use serde_json::Value;
use xdpkit_lab::{Namespace, topology::Pair};

fn example(name: &str) -> PathBuf {
    let path = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().join("examples").join(name);
    assert!(path.exists(), "{}: build the examples first (cargo test does)", path.display());
    path
}

const ALL: [(&str, &[&str]); 7] = [
    ("firewall", &["--deny", "10.0.0.66"]),
    ("fundamentals", &[]),
    ("rate_limiting", &["--rate", "10/s"]),
    ("nat_balancer", &["--service", "tcp/10.0.0.100:80=10.0.0.2:80"]),
    ("dsr_l2_balancer", &["--service", "tcp/10.0.0.100:80=10.0.0.2"]),
    ("dsr_ipip_balancer", &["--service", "tcp/10.0.0.100:80=10.0.0.2"]),
    ("dsr_backend", &["--vip", "10.0.0.100"]),
];

/// Runs an example until it is ready, lets something happen, and checks what it says then. Answers the error.
fn ends(name: &str, arguments: &[&str], happens: impl FnOnce(&Pair)) -> String {
    let pair = Pair::new().unwrap();
    let mut command = pair.server.command(example(name));
    command.args(["--interface", "eth0", "--json"]).args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = || lines.next().map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
    while next().unwrap_or_else(|| panic!("{name} ends before it is ready"))["event"] != "ready" {}
    happens(&pair);
    let said: Vec<Value> = std::iter::from_fn(next).collect();
    let events: Vec<_> = said.iter().filter(|event| event["event"] != "packet").collect();
    assert_eq!(*events[0], serde_json::json!({"event": "detached", "interface": "eth0"}), "{name}: {said:?}");
    assert_eq!((events.len(), &events[1]["event"]), (2, &"stats".into()), "{name}: {said:?}");
    assert_eq!(child.wait().unwrap().code(), Some(1), "{name}");
    let mut error = String::new();
    child.stderr.take().unwrap().read_to_string(&mut error).unwrap();
    assert!(error.starts_with("error: interface `eth0`: ") && error.lines().count() == 1, "{name}: {error}");
    error
}

#[test]
fn its_interface_is_deleted() {
    for (name, arguments) in ALL {
        let error = ends(name, arguments, |pair| pair.server.delete_link("eth0").unwrap());
        assert!(error.contains("it is gone"), "{error}");
    }
}

#[test]
fn its_interface_is_moved_to_another_namespace() {
    let elsewhere = Namespace::new("elsewhere").unwrap();
    let error = ends(ALL[0].0, ALL[0].1, |pair| pair.server.move_link("eth0", &elsewhere).unwrap());
    assert!(error.contains("it has left for another network namespace"), "{error}");
}

#[test]
fn its_link_is_detached_by_another_program() {
    let error = ends(ALL[0].0, ALL[0].1, |pair| pair.server.detach_link("eth0").unwrap());
    assert!(error.contains("another program has detached ours"), "{error}");
}

#[test]
fn another_program_is_put_into_its_link() {
    let error = ends(ALL[0].0, ALL[0].1, |pair| pair.server.exchange_program("eth0", 2).unwrap());
    assert!(error.contains("another program runs in the place of ours"), "{error}");
}
