//! A backend of both DSR tutorials: takes packets for virtual addresses out of their tunnels, and tells what the host's
//! settings lack.
//!
//! ```text
//!                ┌ tunnel, for a VIP inside ─► without its outer header ─┐
//!   packet ──────┤                                                      ├─► the host's stack
//!                └ all else ─────────────────► as it is ────────────────┘
//! ```
//!
//! ```sh
//! cargo run --example dsr_backend -- --interface eth0 --vip 192.168.178.100 --vip 2001:db8:b::100
//! ```

mod common;

use std::{net::IpAddr, process::ExitCode, thread, time::Duration};

use common::{Output, Session, Usage, dsr};
use serde_json::json;
use xdpkit::{Interface, TunnelDecap, TunnelDecapConfig, preflight};
use xdpkit_lab::{
    Namespace,
    topology::{Pair, add_silent_vip},
};

const ABOUT: &str = "Takes packets for virtual addresses out of their tunnels, and checks the host's settings.";
const OWN_FLAGS: &str = "  --vip ADDR             a virtual address; may be repeated\n";

fn main() -> ExitCode {
    common::exit(run())
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let mut vips: Vec<IpAddr> = Vec::new();
    let own = |flag: &str, value: &str| {
        let address = value.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(value);
        vips.push(address.parse().map_err(|_| Usage::new(flag, value, "an IPv4 or IPv6 address"))?);
        Ok(true)
    };
    let flags = common::parse(ABOUT, own, OWN_FLAGS)?;
    let output = Output { json: flags.json };
    // In the laboratory, half of what a backend needs is there: the rest shows as warnings.
    let lab = flags.lab.then(Pair::new).transpose()?;
    if let Some(lab) = &lab {
        if vips.is_empty() {
            vips.extend([IpAddr::from(dsr::VIP4), dsr::VIP6.into()]);
        }
        add_silent_vip(&lab.server, vips[0])?;
    }
    if vips.is_empty() {
        return Err(Usage::new("--vip", "", "an IPv4 or IPv6 address").into());
    }
    let decap = TunnelDecap::load(&vips.iter().fold(TunnelDecapConfig::default(), |config, vip| config.vip(*vip)))?;
    let place = lab.as_ref().map(|lab| &lab.server);
    let names = if lab.is_some() { vec!["eth0".to_owned()] } else { flags.interfaces.clone() };
    for name in &names {
        for finding in check(place, name, &vips)? {
            output.line(
                &json!({"event": "warning", "severity": finding.0, "object": finding.1, "text": finding.2}),
                || format!("{}: {}: {}", finding.0, finding.1, finding.2),
            );
        }
    }
    let session = Session::start(&flags, &decap, place)?;
    if lab.is_some() {
        session.stop().store(true, std::sync::atomic::Ordering::Relaxed);
    }
    let tick = |_| {
        thread::sleep(Duration::from_millis(50));
        Ok(false)
    };
    session.run(tick, || Ok(json!({"vips": vips.iter().map(ToString::to_string).collect::<Vec<_>>()})))
}

/// What the host lacks: severity, object and text of each finding.
fn check(place: Option<&Namespace>, name: &str, vips: &[IpAddr]) -> xdpkit::Result<Vec<(String, String, String)>> {
    let check = || preflight::dsr_backend(&Interface::by_name(name)?, vips);
    let findings = match place {
        Some(namespace) => namespace.run(check)?,
        None => check()?,
    };
    let severity = |finding: &preflight::Finding| format!("{:?}", finding.severity).to_lowercase();
    Ok(findings.into_iter().map(|finding| (severity(&finding), finding.object, finding.text)).collect())
}
