//! Stages with pins, on `eth0`.

use std::path::Path;

use xdpkit::{AttachOptions, Firewall, FirewallConfig, MonitorConfig, PacketMonitor, Rule};

use super::traffic::DENIED;

/// Denies what the lockstep's denied packets come from.
pub(crate) fn firewall() -> Firewall {
    let firewall = Firewall::load(&FirewallConfig::default()).unwrap();
    for source in DENIED {
        firewall.insert(source.parse::<std::net::IpAddr>().unwrap().into(), Rule::deny()).unwrap();
    }
    firewall
}

pub(crate) fn monitor(name: &str) -> PacketMonitor {
    PacketMonitor::load(&MonitorConfig::default().name(name)).unwrap()
}

pub(crate) fn options(directory: &Path) -> AttachOptions {
    AttachOptions::new("eth0").pin(directory)
}
