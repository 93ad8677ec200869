//! The systemd units in `docs/systemd`: systemd understands them, and they say what keeps the interface guarded.
#![cfg(all(feature = "serde", feature = "health", feature = "pcapng"))]

use std::{
    fs,
    os::{linux::net::SocketAddrExt as _, unix::net::UnixDatagram},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use crate::process::{FILE, Place, example};
use xdpkit::{AttachOptions, Error, MonitorConfig, PacketMonitor, Stage as _};
use xdpkit_lab::topology::Pair;

const UNITS: [&str; 2] = ["edge.service", "sys-fs-bpf-edge.mount"];

fn unit(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/systemd").join(name)).unwrap()
}

/// All values of a key, by words.
fn values(text: &str, key: &str) -> Vec<String> {
    let lines = text.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    lines.flat_map(|line| line.split_whitespace().map(str::to_owned)).collect()
}

#[test]
fn systemd_understands_the_units() {
    let place = Place::new("units");
    for name in UNITS {
        // What it starts is not installed here.
        let text = unit(name).replace("ExecStart=/usr/local/bin/appliance", "ExecStart=/bin/true");
        fs::write(place.0.join(name), text).unwrap();
    }
    let verify =
        Command::new("systemd-analyze").args(["verify", "--man=no"]).args(UNITS).current_dir(&place.0).output();
    let verified = verify.expect("systemd-analyze (package systemd) runs");
    let said = String::from_utf8_lossy(&verified.stderr);
    // It warns of an unknown key, and succeeds.
    assert!(verified.status.success() && said.is_empty(), "{said}");
}

#[test]
fn the_unit_guards_the_interface_before_the_network_is_configured_and_never_gives_up() {
    let text = unit("edge.service");
    let device = "sys-subsystem-net-devices-eth0.device";
    for (key, wanted, why) in [
        ("Before", "network-pre.target", "no address, no link before the chain is attached"),
        ("Wants", "network-pre.target", "it is part of a boot only if somebody wants it"),
        ("Type", "notify", "it counts as started when the chain is attached"),
        ("DefaultDependencies", "no", "or it would come after targets that come after the network"),
        ("BindsTo", device, "it ends with the interface"),
        ("After", device, "and waits for it"),
        ("WantedBy", device, "however late it comes"),
        ("Restart", "always", "whatever it ended with"),
        ("StartLimitIntervalSec", "0", "for ever"),
        ("Requires", "sys-fs-bpf-edge.mount", "the pins"),
        ("After", "sys-fs-bpf-edge.mount", "the pins"),
    ] {
        assert!(values(&text, key).iter().any(|value| value == wanted), "{key}={wanted}: {why}");
    }
    assert!(!text.contains("network-online.target") && !text.contains("network.target"));
    let pins = values(&unit("sys-fs-bpf-edge.mount"), "Where");
    assert!(text.contains(&format!("--pin {}", pins[0])));
}

#[test]
fn the_appliance_tells_the_service_manager_when_it_is_ready() {
    let lab = Pair::new().unwrap();
    let place = Place::new("notify");
    place.write(FILE);
    // Managers name such a socket in either way.
    let name = format!("xdpkit-notify-{}", std::process::id());
    let path = place.0.join("notify");
    let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
    for (socket, told) in [
        // A name without a path is one of a network namespace.
        (lab.server.run(|| UnixDatagram::bind_addr(&address)).unwrap(), format!("@{name}")),
        (UnixDatagram::bind(&path).unwrap(), path.display().to_string()),
    ] {
        socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut command = lab.server.command(example());
        command.args(["--json", "--config"]).arg(place.file()).env("NOTIFY_SOCKET", told);
        let mut child = command.stdout(Stdio::null()).spawn().unwrap();
        let mut said = [0; 64];
        let length = socket.recv(&mut said).unwrap();
        assert_eq!(&said[..length], b"READY=1");
        assert!(is_attached(&lab), "not before the chain is attached");
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

/// Whether something has the interface already.
fn is_attached(lab: &Pair) -> bool {
    let monitor = PacketMonitor::load(&MonitorConfig::default()).unwrap();
    let attached = lab.server.run(|| monitor.attach(&AttachOptions::new("eth0")));
    matches!(attached, Err(Error::ForeignProgram { .. }))
}
