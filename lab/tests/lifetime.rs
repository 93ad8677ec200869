//! Nothing is left behind, whatever happens to the process; and what cannot be done is said.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use xdpkit_lab::topology::{DsrIpip, DsrL2, Nat, Pair};
use xdpkit_lab::{Error, Namespace, veth};

const VIP4: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
const VIP6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x99, 0, 0, 0, 0, 1);

/// Ties `witness` to each namespace by a veth pair: when a namespace ceases to exist, so does the
/// end here. Returns the ends' names.
fn tie<'a>(witness: &Namespace, namespaces: impl IntoIterator<Item = &'a Namespace>) -> Vec<String> {
    let tie = |(i, ns): (usize, &Namespace)| {
        let name = format!("tie{i}");
        veth((witness, &name), (ns, "tie")).unwrap();
        name
    };
    namespaces.into_iter().enumerate().map(tie).collect()
}

fn wait_for(what: &str, done: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < end, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// The interfaces of a namespace.
fn interfaces(ns: &Namespace) -> Vec<String> {
    let list = ns.run(|| std::fs::read_to_string("/proc/thread-self/net/dev").unwrap());
    list.lines().filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned())).collect()
}

/// Not a test of its own: the process that gets killed below.
#[test]
fn child() {
    if std::env::var_os("LAB_CHILD").is_none() {
        return;
    }
    let outside = Namespace::current("outside").unwrap();
    let pair = Pair::with_clients(2).unwrap();
    let nat = Nat::new(1, 1).unwrap();
    let (l2, ipip) = (DsrL2::new(1, VIP4, VIP6).unwrap(), DsrIpip::new(1, VIP4, VIP6).unwrap());
    assert_eq!(interfaces(&outside), ["lo"], "an interface was made outside");
    let _inside = nat.clients[0].spawn(|| thread::sleep(Duration::from_secs(60)));
    let namespaces = [&pair.server, &pair.clients[1], &nat.balancer, &nat.switch, &nat.clients[0]];
    let more = [&l2.balancer, &l2.gateway, &ipip.switch, &ipip.backends[0]];
    tie(&outside, namespaces.into_iter().chain(more));
    thread::sleep(Duration::from_secs(60));
}

#[test]
fn a_killed_process_leaves_no_namespace_and_no_interface() {
    let outside = Namespace::new("outside").unwrap();
    let mut command = outside.command(std::env::current_exe().unwrap());
    command.args(["--exact", "child"]).env("LAB_CHILD", "1").stdout(Stdio::null());
    let mut child = command.spawn().unwrap();
    wait_for("the child's topologies", || interfaces(&outside).len() == 10);
    child.kill().unwrap();
    child.wait().unwrap();
    wait_for("the end of the child's namespaces", || interfaces(&outside) == ["lo"]);
}

#[test]
fn dropping_a_topology_ends_its_namespaces() {
    let witness = Namespace::new("witness").unwrap();
    let nat = Nat::new(1, 1).unwrap();
    tie(&witness, [&nat.balancer, &nat.clients[0], &nat.backends[0], &nat.switch]);
    drop(nat);
    wait_for("the end of the namespaces", || interfaces(&witness) == ["lo"]);
}

#[test]
fn a_panic_inside_goes_on_outside_and_leaves_nothing() {
    let witness = Namespace::new("witness").unwrap();
    let panic = thread::spawn({
        let witness = witness.clone();
        move || {
            let ns = Namespace::new("inside").unwrap();
            tie(&witness, [&ns]);
            ns.run(|| panic!("as expected"))
        }
    });
    let panic = panic.join().unwrap_err();
    assert_eq!(panic.downcast_ref(), Some(&"as expected"));
    wait_for("the end of the namespace", || interfaces(&witness) == ["lo"]);
}

#[test]
fn the_same_topology_may_exist_many_times_at_once() {
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..3 {
                    let pair = Pair::with_clients(2).unwrap();
                    let ip = pair.server_addr.v4.into();
                    // Four networks are built at once beside it: an answer may take its time.
                    let report =
                        xdpkit_lab::traffic::ping(&pair.client, ip, 1, Duration::ZERO, Duration::from_secs(20));
                    assert_eq!(report.unwrap().received, 1);
                }
            });
        }
    });
}

#[test]
fn other_processes_enter_by_command_and_by_path() {
    let ns = Namespace::new("entered").unwrap();
    ns.add_address("lo", "192.0.2.7/32".parse().unwrap()).unwrap();
    let read = ["/proc/net/fib_trie"];
    let here = ns.command("cat").args(read).output().unwrap();
    assert!(String::from_utf8_lossy(&here.stdout).contains("192.0.2.7"));
    let by_path = format!("--net={}", ns.path().display());
    let there = std::process::Command::new("nsenter").arg(by_path).arg("cat").args(read).output();
    assert!(String::from_utf8_lossy(&there.unwrap().stdout).contains("192.0.2.7"));
}

#[test]
fn without_privileges_the_error_says_what_is_missing() {
    let error = thread::spawn(|| {
        // SAFETY: plain integers; the bare system call changes this thread's user only.
        let changed = unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
        assert_eq!(changed, 0);
        Namespace::new("forbidden").unwrap_err()
    });
    let error = error.join().unwrap();
    assert!(matches!(error, Error::Privilege { .. }), "{error:?}");
    assert!(error.to_string().contains("CAP_SYS_ADMIN"), "{error}");
}

#[test]
fn errors_name_their_object() {
    let ns = Namespace::new("lonely").unwrap();
    let unknown = ns.set_up("eth7").unwrap_err();
    assert_eq!(unknown.to_string(), "namespace lonely: no interface named eth7");
    let twice = ns.add_address("lo", "127.0.0.1/8".parse().unwrap()).unwrap_err().to_string();
    assert!(twice.contains("lonely") && twice.contains("lo") && twice.contains("127.0.0.1/8"), "{twice}");
    let nowhere = ns.add_default_route("192.0.2.1".parse().unwrap()).unwrap_err().to_string();
    assert!(nowhere.contains("192.0.2.1"), "{nowhere}");
}
