//! Tutorial 1, XDP fundamentals: see every packet of an interface before the kernel does, and decide what becomes of it.
//!
//! An XDP program runs once a packet, in the driver's receive path, before the kernel has allocated a buffer
//! descriptor (`sk_buff`) for it. It sees the raw frame and returns one of the actions that `--action` sets:
//!
//! * `pass`: on to the network stack, as if nothing had happened;
//! * `drop`: gone, at the lowest cost there is;
//! * `abort`: gone too, but as the program's own error, seen by the tracepoint `xdp:xdp_exception`;
//! * `tx`: sent back out of the same interface, here with MACs, addresses and ports swapped.
//!
//! `--mode` chooses where it runs. `native`: inside the driver, which has to support it. `generic`: in the stack,
//! after the buffer was allocated; works everywhere and is several times slower. `auto`: native where possible.
//!
//! What such a program cannot do: see packets that the host sends, wait, allocate memory, loop without a bound, or
//! see a TCP stream: it sees packets. The kernel's verifier proves all that before the program is loaded.
//!
//! ```sh
//! cargo run --example fundamentals -- --lab
//! cargo run --example fundamentals -- --interface eth0 --action icmp=drop --stats-every 5
//! ```

mod common;

use std::{process::ExitCode, time::Duration};

use common::{Flags, Output, Session, Usage, lab};
use serde_json::{Value, json};
use xdpkit::{Action, Fragment, MonitorConfig, Network, PacketEvent, PacketMonitor, Protocol, Transport};

const ABOUT: &str = "Watches the packets of an interface and applies XDP actions by protocol.";
const OWN_FLAGS: &str =
    "  --action PROTO=ACTION  PROTO: arp, ipv4, ipv6, tcp, udp, icmp, icmpv6; ACTION: pass, drop, abort, tx\n";

fn main() -> ExitCode {
    common::exit(run())
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let mut actions = Vec::new();
    let own = |flag: &str, value: &str| {
        actions.push(parse_action(flag, value)?);
        Ok(true)
    };
    let flags: Flags = common::parse(ABOUT, own, OWN_FLAGS)?;

    let monitor = PacketMonitor::load(&MonitorConfig::default().sample(1))?;
    for (protocol, action) in actions {
        monitor.set_action(protocol, Some(action))?;
    }
    let mut events = monitor.events()?;
    let lab = flags.lab.then(lab::Watched::build).transpose()?;
    let session = Session::start(&flags, &monitor, lab.as_ref().map(|lab| &lab.pair.server))?;
    let scenario = lab.map(|lab| lab.play(session.stop(), Output { json: flags.json }));

    let tick = |output: Output| {
        // Bounded, so that a flood cannot keep us from stopping.
        for _ in 0..256 {
            let Some(packet) = events.next_within(Duration::from_millis(50))? else { return Ok(false) };
            output.line(&to_json(&packet), || format!("  {packet}"));
        }
        Ok(true)
    };
    session.run(tick, || protocols(&monitor))?;
    scenario.map_or(Ok(()), lab::Scenario::finish)
}

fn parse_action(flag: &str, value: &str) -> Result<(Protocol, Action), Usage> {
    let expected =
        "PROTO=ACTION with PROTO arp, ipv4, ipv6, tcp, udp, icmp or icmpv6 and ACTION pass, drop, abort or tx";
    let usage = || Usage::new(flag, value, expected);
    let (protocol, action) = value.split_once('=').ok_or_else(usage)?;
    let action = match action {
        "pass" => Action::Pass,
        "drop" => Action::Drop,
        "abort" => Action::Aborted,
        "tx" => Action::Tx,
        _ => return Err(usage()),
    };
    Ok((protocol.parse().map_err(|_| usage())?, action))
}

fn protocols(monitor: &PacketMonitor) -> xdpkit::Result<Value> {
    let counts = monitor.protocols()?;
    Ok(json!({
        "protocols": {
            "arp": counts.arp.packets,
            "ipv4": counts.ipv4.packets,
            "ipv6": counts.ipv6.packets,
            "tcp": counts.tcp.packets,
            "udp": counts.udp.packets,
            "icmp": counts.icmp.packets,
            "icmpv6": counts.icmpv6.packets,
        },
        "events_lost": monitor.events_lost()?,
    }))
}

fn to_json(packet: &PacketEvent) -> Value {
    let mut object = json!({
        "event": "packet",
        "timestamp_ns": packet.timestamp.as_nanos() as u64,
        "interface": packet.interface,
        "rx_queue": packet.rx_queue,
        "bytes": packet.bytes,
        "ether_type": packet.ether_type,
        "vlans": packet.vlans.iter().map(|tag| tag.id()).collect::<Vec<_>>(),
        "reason": packet.reason.name(),
        "action": packet.action.name(),
    });
    let mut set = |key: &str, value: Value| object[key] = value;
    match packet.network {
        Network::Ip { source, destination, hop_limit, protocol, fragment } => {
            set("network", if source.is_ipv4() { "ipv4" } else { "ipv6" }.into());
            set("source", source.to_string().into());
            set("destination", destination.to_string().into());
            set("hop_limit", hop_limit.into());
            set("protocol", protocol.into());
            set("fragment", (fragment != Fragment::No).into());
        }
        Network::Arp => set("network", "arp".into()),
        _ => set("network", "other".into()),
    }
    let (name, source, destination) = match packet.transport {
        Some(Transport::Tcp { source, destination, flags }) => {
            set("tcp_flags", flags.into());
            ("tcp", source, destination)
        }
        Some(Transport::Udp { source, destination }) => ("udp", source, destination),
        Some(Transport::Icmp { kind, code }) => {
            set("icmp_type", kind.into());
            set("icmp_code", code.into());
            set("transport", "icmp".into());
            return object;
        }
        Some(Transport::Icmpv6 { kind, code }) => {
            set("icmp_type", kind.into());
            set("icmp_code", code.into());
            set("transport", "icmpv6".into());
            return object;
        }
        _ => return object,
    };
    set("transport", name.into());
    set("source_port", source.into());
    set("destination_port", destination.into());
    object
}
