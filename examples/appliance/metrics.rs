//! Every counter of every function, in the text format of Prometheus (OpenMetrics), over HTTP.

use std::{
    fmt::{self, Debug},
    io,
    net::TcpListener,
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _, text},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};

use xdpkit::ConnectionState;

use crate::{
    interfaces::mode,
    state::{Appliance, Function},
};

/// A counter or a gauge, with its labels.
struct Sample {
    labels: Vec<(&'static str, String)>,
    value: u64,
}

/// Samples of one name.
struct Family {
    name: &'static str,
    help: &'static str,
    kind: MetricType,
    samples: Vec<Sample>,
}

impl Family {
    fn counter(name: &'static str, help: &'static str) -> Self {
        Self { name, help, kind: MetricType::Counter, samples: Vec::new() }
    }

    fn gauge(name: &'static str, help: &'static str) -> Self {
        Self { name, help, kind: MetricType::Gauge, samples: Vec::new() }
    }

    fn add(&mut self, labels: Vec<(&'static str, String)>, value: u64) {
        self.samples.push(Sample { labels, value });
    }
}

/// Everything that is counted, at this moment.
fn families(appliance: &Appliance) -> xdpkit::Result<Vec<Family>> {
    let mut packets = Family::counter("xdpkit_packets", "Packets by function, reason and action");
    let mut bytes = Family::counter("xdpkit_bytes", "Bytes of whole frames by function, reason and action");
    let mut lost = Family::counter("xdpkit_events_lost", "Events that found their ring buffer full");
    let mut rules = Family::gauge("xdpkit_firewall_rules", "Rules of a firewall, expired ones included");
    let mut limited = Family::counter("xdpkit_limited_packets", "Packets under a limit, by scope and outcome");
    let mut bans = Family::counter("xdpkit_bans", "Bans that a rate limiter has set by itself");
    let mut banned = Family::gauge("xdpkit_banned_sources", "Sources that are banned now");
    let mut connections = Family::gauge("xdpkit_connections", "Connections of a NAT balancer by state");
    let mut service_packets = Family::counter("xdpkit_service_packets", "Packets of a service");
    let mut service_bytes = Family::counter("xdpkit_service_bytes", "Bytes of whole frames of a service");
    let mut service_flows = Family::counter("xdpkit_service_flows", "New flows of a service");
    let mut backend_packets = Family::counter("xdpkit_backend_packets", "Packets given to a backend");
    let mut backend_bytes = Family::counter("xdpkit_backend_bytes", "Bytes of whole frames given to a backend");
    let mut backend_flows = Family::counter("xdpkit_backend_flows", "New flows given to a backend");
    let mut backend_weight = Family::gauge("xdpkit_backend_weight", "Weight of a backend, 0 while it is leaving");
    let mut backend_up =
        Family::gauge("xdpkit_backend_up", "1 while a backend answers its health checks, 0 while it does not");
    let mut probes = Family::counter(
        "xdpkit_health_probes",
        "Health probes by result; unsent: this host could not, and the backend stays what it was",
    );
    let mut transition = Family::gauge("xdpkit_slots_in_transition", "Slots that remember an earlier backend");
    let mut redirect_failed = Family::counter(
        "xdpkit_redirect_failed",
        "Frames that a program of the interface has sent and that were lost on the way out",
    );
    let mut attached =
        Family::gauge("xdpkit_attached", "1 while the chain is attached to the interface, 0 while it is not");
    for (name, function) in &appliance.functions {
        for line in &function.stage().stats()?.reasons {
            let labels = || {
                vec![
                    ("function", name.clone()),
                    ("kind", function.kind().to_owned()),
                    ("reason", line.reason.to_string()),
                    ("action", line.action.to_string()),
                ]
            };
            packets.add(labels(), line.count.packets);
            bytes.add(labels(), line.count.bytes);
        }
        let label = || vec![("function", name.clone())];
        match function {
            Function::Monitor(monitor) => lost.add(label(), monitor.events_lost()?),
            Function::Firewall(firewall) => {
                lost.add(label(), firewall.events_lost()?);
                rules.add(label(), firewall.len()? as u64);
            }
            Function::DsrBalancer(balancer) => {
                for service in balancer.services()? {
                    let of = || vec![("function", name.clone()), ("service", service.address.to_string())];
                    service_packets.add(of(), service.stats.received.packets);
                    service_bytes.add(of(), service.stats.received.bytes);
                    service_flows.add(of(), service.stats.new_flows);
                    transition.add(of(), service.slots_in_transition.into());
                    for backend in balancer.backends(service.address)? {
                        let of = || with_backend(of(), backend.address, backend.identity);
                        backend_packets.add(of(), backend.stats.forwarded.packets);
                        backend_bytes.add(of(), backend.stats.forwarded.bytes);
                        backend_flows.add(of(), backend.stats.new_flows);
                        backend_weight.add(of(), backend.weight.into());
                    }
                }
            }
            Function::NatBalancer(balancer) => {
                lost.add(label(), balancer.events_lost()?);
                let counts = balancer.counts()?;
                for state in ConnectionState::ALL {
                    connections
                        .add(vec![("function", name.clone()), ("state", state.to_string())], counts.state(state));
                }
                for service in balancer.services() {
                    let of = || vec![("function", name.clone()), ("service", service.to_string())];
                    let stats = balancer.service_stats(&service)?;
                    service_packets.add(of(), stats.forwarded.packets);
                    service_bytes.add(of(), stats.forwarded.bytes);
                    service_flows.add(of(), stats.opened);
                    for backend in balancer.backends(&service)? {
                        let of = || with_backend(of(), backend.address, backend.identity);
                        backend_packets.add(of(), backend.stats.forwarded.packets);
                        backend_bytes.add(of(), backend.stats.forwarded.bytes);
                        backend_flows.add(of(), backend.stats.opened);
                        backend_weight.add(of(), backend.weight.into());
                    }
                }
            }
            Function::RateLimiter(limiter) => {
                let counts = limiter.counts()?;
                lost.add(label(), counts.events_lost);
                bans.add(label(), counts.bans);
                banned.add(label(), limiter.bans().iter()?.count() as u64);
                for line in limiter.scope_stats()? {
                    for (outcome, count) in [("admitted", line.admitted), ("refused", line.refused)] {
                        let mut labels = label();
                        labels.push(("scope", line.scope.to_string()));
                        labels.push(("limit", line.limit.to_string()));
                        labels.push(("tier", line.tier.to_string()));
                        labels.push(("outcome", outcome.to_owned()));
                        limited.add(labels, count.packets);
                    }
                }
            }
        }
    }
    for (watched, up) in appliance.watch.known() {
        let backend = watched.backend;
        let backend = if backend.port() == 0 { backend.ip().to_string() } else { backend.to_string() };
        let service = watched.service.to_string();
        backend_up.add(vec![("function", watched.function), ("service", service), ("backend", backend)], up.into());
    }
    let stats = appliance.watch.stats();
    for (result, count) in [("succeeded", stats.succeeded), ("failed", stats.failed), ("unsent", stats.unsent)] {
        probes.add(vec![("result", result.to_owned())], count);
    }
    for (interface, chain) in &appliance.chains {
        let labels = vec![("interface", interface.clone()), ("mode", mode(chain))];
        attached.add(labels, chain.is_attached()?.into());
        if let Some(count) = chain.redirect_failed()? {
            redirect_failed.add(vec![("interface", interface.clone())], count);
        }
    }
    Ok(vec![
        packets,
        bytes,
        lost,
        rules,
        limited,
        bans,
        banned,
        connections,
        service_packets,
        service_bytes,
        service_flows,
        transition,
        backend_packets,
        backend_bytes,
        backend_flows,
        backend_weight,
        backend_up,
        probes,
        attached,
        redirect_failed,
    ])
}

/// The labels of a service's backend. Two hosts may have had one address, one after the other: the identity tells them apart.
fn with_backend(
    mut labels: Vec<(&'static str, String)>,
    address: impl fmt::Display,
    identity: u32,
) -> Vec<(&'static str, String)> {
    labels.push(("backend", address.to_string()));
    labels.push(("identity", identity.to_string()));
    labels
}

/// Reads the counters anew for each scrape.
struct Scrape {
    families: Vec<Family>,
}

impl Debug for Scrape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scrape").field("families", &self.families.len()).finish()
    }
}

struct Labels<'a>(&'a [(&'static str, String)]);

impl EncodeLabelSet for Labels<'_> {
    fn encode(&self, encoder: &mut prometheus_client::encoding::LabelSetEncoder<'_>) -> fmt::Result {
        self.0.iter().map(|(name, value)| (*name, value.as_str())).collect::<Vec<_>>().encode(encoder)
    }
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for family in &self.families {
            let mut metric = encoder.encode_descriptor(family.name, family.help, None, family.kind)?;
            for sample in &family.samples {
                let labels = Labels(&sample.labels);
                let encoder = metric.encode_family(&labels)?;
                match family.kind {
                    MetricType::Counter => ConstCounter::new(sample.value).encode(encoder)?,
                    _ => ConstGauge::new(sample.value as i64).encode(encoder)?,
                }
            }
        }
        Ok(())
    }
}

/// The text of one scrape.
pub(crate) fn render(appliance: &Appliance) -> Result<String, Box<dyn std::error::Error>> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Scrape { families: families(appliance)? }));
    let mut out = String::new();
    text::encode(&mut out, &registry)?;
    Ok(out)
}

/// Serves `GET /metrics` in a thread of its own, until the process ends.
pub(crate) fn serve(listener: TcpListener, appliance: Arc<Mutex<Appliance>>) -> io::Result<()> {
    const TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let server = tiny_http::Server::from_listener(listener, None).map_err(io::Error::other)?;
    thread::Builder::new().name("metrics".into()).spawn(move || {
        for request in server.incoming_requests() {
            let text = match request.url() {
                "/metrics" => render(&appliance.lock().unwrap_or_else(PoisonError::into_inner))
                    .map_err(|error| (500, error.to_string())),
                other => Err((404, format!("`{other}`: expected /metrics"))),
            };
            let (status, body, kind) = match text {
                Ok(text) => (200, text, TYPE),
                Err((status, message)) => (status, message + "\n", "text/plain; charset=utf-8"),
            };
            let mut response = tiny_http::Response::from_string(body).with_status_code(status);
            if let Ok(header) = tiny_http::Header::from_bytes("Content-Type", kind) {
                response = response.with_header(header);
            }
            // A scraper that went away is not our trouble.
            let _ = request.respond(response);
        }
    })?;
    Ok(())
}
