//! The NAT tutorial: connections to a virtual address go to backends, with addresses and ports translated both ways.
//!
//! ```text
//!   client ──► VIP:PORT ─┬ known connection ──────────────► its backend, from one of our ports
//!                        └ new: the scheduler chooses one ┘
//!   client ◄── VIP:PORT ◄── the connection that has the port ◄── backend
//! ```
//!
//! ```sh
//! cargo run --example nat_balancer -- --lab
//! cargo run --example nat_balancer -- --interface eth0 --interface eth1 --stats-every 5 \
//!     --service tcp/198.51.100.10:80=192.168.178.11:8080@2,192.168.178.12:8080
//! ```

mod common;

use std::{
    net::SocketAddr,
    process::ExitCode,
    time::{Duration, Instant},
};

use common::{Flags, Output, Session, Usage, lab};
use serde_json::{Value, json};
use xdpkit::preflight::BalancerKind;
use xdpkit::{NatBalancer, NatConfig, NatEvent, NatEventKind, NatMode, NatService, Scheduler, ServiceAddr};

const ABOUT: &str = "Balances connections to virtual addresses over backends, translating addresses and ports.";
const OWN_FLAGS: &str = "  --service SERVICE      tcp/VIP:PORT=BACKEND:PORT[@WEIGHT],... or udp/...; may be repeated
  --scheduler SCHEDULER  maglev (default), round-robin, least-connections or source-hash
  --nat MODE             full (default), or destination: backends see the clients' own addresses
";

fn main() -> ExitCode {
    common::exit(run())
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let mut services: Vec<(ServiceAddr, Vec<(SocketAddr, u32)>)> = Vec::new();
    let mut scheduler = Scheduler::Maglev;
    let mut mode = NatMode::Full;
    let own = |flag: &str, value: &str| {
        match flag {
            "--service" => {
                let service = service(flag, value)?;
                if services.iter().any(|(known, _)| *known == service.0) {
                    return Err(Usage::new(flag, value, "each service once"));
                }
                services.push(service);
            }
            "--scheduler" => {
                scheduler = match value {
                    "maglev" => Scheduler::Maglev,
                    "round-robin" => Scheduler::RoundRobin,
                    "least-connections" => Scheduler::LeastConnections,
                    "source-hash" => Scheduler::SourceHash,
                    _ => {
                        return Err(Usage::new(flag, value, "maglev, round-robin, least-connections or source-hash"));
                    }
                }
            }
            "--nat" => {
                mode = match value {
                    "full" => NatMode::Full,
                    "destination" => NatMode::Destination,
                    _ => return Err(Usage::new(flag, value, "full or destination")),
                }
            }
            _ => return Ok(false),
        }
        Ok(true)
    };
    let flags: Flags = common::parse(ABOUT, own, OWN_FLAGS)?;
    if services.is_empty() && !flags.lab {
        return Err(
            Usage::new("--service", "", "at least one, such as tcp/198.51.100.10:80=192.168.178.11:8080").into()
        );
    }

    let balancer = NatBalancer::load(&NatConfig::default().sample(1))?;
    let lab = flags.lab.then(lab::Balanced::build).transpose()?;
    let own_services = services.is_empty();
    if let Some(lab) = lab.as_ref().filter(|_| own_services) {
        let weighed = |backends: Vec<SocketAddr>| backends.into_iter().map(|backend| (backend, 1)).collect();
        services.extend(lab.services().into_iter().map(|(service, backends)| (service, weighed(backends))));
    }
    let addresses = (
        services.iter().map(|(service, _)| service.address).collect(),
        services.iter().flat_map(|(_, backends)| backends).map(|(backend, _)| backend.ip()).collect(),
    );
    for (service, backends) in services {
        let with = NatService::default().mode(mode).scheduler(scheduler);
        let with = backends.into_iter().fold(with, |with, (backend, weight)| with.backend(backend, weight));
        balancer.insert(service, &with)?;
    }
    let mut events = balancer.events()?;
    let place = lab.as_ref().map(|lab| &lab.nat.balancer);
    let own: Vec<&str> = flags.interfaces.iter().map(String::as_str).collect();
    let names = if place.is_some() { &lab::Balanced::INTERFACES[..] } else { &own };
    common::warn_of_balancer(Output { json: flags.json }, place, BalancerKind::Nat, names, addresses)?;
    let session = Session::start_on(&flags, &balancer, place, &lab::Balanced::INTERFACES)?;
    let scenario = lab.map(|lab| lab.play(own_services, session.stop(), Output { json: flags.json }));
    let mut collected = Instant::now();
    let tick = |output: Output| {
        // Reads all connections: not with every event.
        if collected.elapsed() >= Duration::from_secs(1) {
            balancer.collect()?;
            collected = Instant::now();
        }
        let event = events.next_within(Duration::from_millis(50))?;
        if let Some(event) = &event {
            report(output, event);
        }
        Ok(event.is_some())
    };
    session.run(tick, || extra(&balancer))?;
    scenario.map_or(Ok(()), lab::Scenario::finish)
}

/// `tcp/VIP:PORT=BACKEND:PORT[@WEIGHT],...`
fn service(flag: &str, value: &str) -> Result<(ServiceAddr, Vec<(SocketAddr, u32)>), Usage> {
    let wrong =
        || Usage::new(flag, value, "tcp/VIP:PORT=BACKEND:PORT[@WEIGHT],... or udp/..., IPv6 addresses in brackets");
    let (service, backends) = value.split_once('=').ok_or_else(wrong)?;
    let service: ServiceAddr = service.parse().map_err(|_| wrong())?;
    if service.port.is_none() {
        return Err(wrong());
    }
    let backend = |text: &str| {
        let (address, weight) = text.split_once('@').unwrap_or((text, "1"));
        let address: SocketAddr = address.parse().map_err(|_| wrong())?;
        let weight = weight.parse().map_err(|_| wrong())?;
        if address.port() == 0 || address.is_ipv4() != service.address.is_ipv4() {
            return Err(wrong());
        }
        Ok((address, weight))
    };
    let backends = backends.split(',').map(backend).collect::<Result<Vec<_>, _>>()?;
    Ok((service, backends))
}

fn report(output: Output, event: &NatEvent) {
    let (kind, reason) = match event.kind {
        NatEventKind::New => ("new", None),
        NatEventKind::Closed => ("closed", None),
        NatEventKind::Refused(reason) => ("refused", Some(reason.name())),
        _ => return,
    };
    let object = json!({
        "event": "connection",
        "what": kind,
        "reason": reason,
        "client": event.client.to_string(),
        "service": event.service.map(|service| service.to_string()),
        "backend": event.backend.map(|backend| backend.to_string()),
    });
    output.line(&object, || event.to_string());
}

fn extra(balancer: &NatBalancer) -> xdpkit::Result<Value> {
    let mut services = serde_json::Map::new();
    for service in balancer.services() {
        let stats = balancer.service_stats(&service)?;
        let backends: serde_json::Map<_, _> = balancer
            .backends(&service)?
            .into_iter()
            .map(|backend| {
                let object = json!({
                    "weight": backend.weight,
                    "state": backend.state.name(),
                    "packets": backend.stats.forwarded.packets,
                    "opened": backend.stats.opened,
                    "active": backend.stats.active,
                });
                (backend.address.to_string(), object)
            })
            .collect();
        let object = json!({
            "forwarded": stats.forwarded.packets,
            "answered": stats.answered.packets,
            "opened": stats.opened,
            "refused": stats.refused,
            "no_backend": stats.no_backend,
            "backends": backends,
        });
        services.insert(service.to_string(), object);
    }
    Ok(json!({"connections": balancer.counts()?.total(), "services": services}))
}
