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
//! cargo run --example dsr_backend -- --lab
//! cargo run --example dsr_backend -- --interface eth0 --vip 192.168.178.100 --vip 2001:db8:b::100 \
//!     --source 192.168.178.10/32 --source 192.0.0.8/32 --source 2001:db8:b::10/128
//! ```

mod common;

use std::{net::IpAddr, process::ExitCode, thread, time::Duration};

use common::{
    Output, Session, Usage,
    dsr::{self, Tutorial},
    lab::Scenario,
};
use serde_json::json;
use xdpkit::{Interface, TunnelDecap, TunnelDecapConfig, ipnet::IpNet, parse_prefix, preflight};

const ABOUT: &str = "Takes packets for virtual addresses out of their tunnels, and checks the host's settings.";
const OWN_FLAGS: &str = "  --vip ADDR             a virtual address; may be repeated
  --source CIDR          where tunnels may begin, the balancers' outer sources; may be repeated
";

/// What is wrong without `--source`.
const OPEN: &str = "tunnels may begin anywhere: whoever reaches this host can send it packets in anybody's name, and it answers \
                    to those; name the balancers' outer sources";

fn main() -> ExitCode {
    common::exit(run())
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let (mut vips, mut sources): (Vec<IpAddr>, Vec<IpNet>) = Default::default();
    let own = |flag: &str, value: &str| {
        if flag == "--source" {
            sources
                .push(parse_prefix(value).ok_or_else(|| Usage::new(flag, value, "an IPv4 or IPv6 address or CIDR"))?);
            return Ok(true);
        }
        let address = value.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(value);
        vips.push(address.parse().map_err(|_| Usage::new(flag, value, "an IPv4 or IPv6 address"))?);
        Ok(true)
    };
    let flags = common::parse(ABOUT, own, OWN_FLAGS)?;
    let output = Output { json: flags.json };
    let lab = flags.lab.then(Tutorial::of_one_backend).transpose()?;
    if lab.is_some() {
        let tutorial = [IpAddr::from(dsr::VIP4), dsr::VIP6.into()];
        vips.extend(tutorial.into_iter().filter(|vip| !vips.contains(vip)).collect::<Vec<_>>());
        sources.extend(dsr::lab_sources());
    }
    if vips.is_empty() {
        return Err(Usage::new("--vip", "", "an IPv4 or IPv6 address").into());
    }
    let config = vips.iter().fold(TunnelDecapConfig::default(), |config, vip| config.vip(*vip));
    let config = if sources.is_empty() { config.any_source() } else { config };
    let decap = TunnelDecap::load(&sources.iter().fold(config, |config, source| config.source(*source)))?;
    if sources.is_empty() {
        common::warning(output, "any_source", "warning", "host", OPEN, Some("--source CIDR"));
    }
    let place = lab.as_ref().map(Tutorial::backend);
    let names = if lab.is_some() { vec!["eth0".to_owned()] } else { flags.interfaces.clone() };
    for name in &names {
        let check = || preflight::dsr_backend(&Interface::by_name(name)?, &vips);
        let findings = match place {
            Some(namespace) => namespace.run(check)?,
            None => check()?,
        };
        common::warn(output, findings);
    }
    let session = Session::start(&flags, &decap, place)?;
    let scenario = lab.map(|lab| lab.play(session.stop(), output));
    let tick = |_| {
        thread::sleep(Duration::from_millis(50));
        Ok(false)
    };
    session.run(tick, || Ok(json!({"vips": vips.iter().map(ToString::to_string).collect::<Vec<_>>()})))?;
    scenario.map_or(Ok(()), Scenario::finish)
}
