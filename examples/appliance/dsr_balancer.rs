//! The appliance's DSR balancers: their table in the file, and what is done with it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::Arc,
};

use serde::Deserialize;
use xdpkit::{BackendState, DsrBackendEntry, DsrBalancer, DsrConfig, DsrService, Forwarding, Interface, ServiceAddr};

use crate::{
    config::{ConfigError, Fixed, check_name, first_of},
    health::{Balancer, HealthTable, ProbesTable, Still, Wanted, Watched, present_weight},
};

/// `[dsr_balancer.NAME]`
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct DsrTable {
    settings: DsrConfig,
    probes: Option<ProbesTable>,
    service: Vec<ServiceTable>,
}

/// `[[dsr_balancer.NAME.service]]`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ServiceTable {
    address: ServiceAddr,
    #[serde(default)]
    forwarding: Forwarding,
    #[serde(default)]
    by_source: bool,
    #[serde(default)]
    outer_fragments: bool,
    /// Weights.
    backends: BTreeMap<IpAddr, u32>,
    health: Option<HealthTable>,
}

/// A balancer with its services.
#[derive(Clone, Debug)]
pub(crate) struct DsrPlan {
    pub(crate) settings: DsrConfig,
    pub(crate) probes: Option<ProbesTable>,
    services: BTreeMap<ServiceAddr, ServicePlan>,
}

#[derive(Clone, Debug)]
struct ServicePlan {
    service: DsrService,
    backends: BTreeMap<IpAddr, u32>,
    health: Option<HealthTable>,
}

impl DsrTable {
    pub(crate) fn plan(self, file: &Path, name: &str) -> Result<DsrPlan, ConfigError> {
        check_name(file, "dsr_balancer", name, &self.settings.name, &DsrConfig::default().name)?;
        let key = format!("dsr_balancer.{name}.service");
        let mut services = BTreeMap::new();
        for table in self.service {
            let service = match table.forwarding {
                Forwarding::L2 => DsrService::l2(),
                Forwarding::IpIp => DsrService::ipip(),
            };
            if let Some(health) = &table.health {
                let key = format!("{key}: `{}`", table.address);
                health.validate(file, &key, target(&table.address))?;
                if self.probes.as_ref().and_then(|probes| probes.source(&table.address)).is_none() {
                    let problem = "health: expected the way of probes, with an address of this family: \
                                   `probes = { interface = \"h1\", sources = [\"ADDRESS\"] }`";
                    return Err(ConfigError::new(file, &key, problem));
                }
            }
            let service = service.by_source(table.by_source).outer_fragments(table.outer_fragments);
            let mut backends = BTreeMap::new();
            for (backend, weight) in table.backends {
                // As the balancer lists it.
                if backends.insert(backend.to_canonical(), weight).is_some() {
                    let problem = format!("`{}`: backend `{backend}`: expected once in a service", table.address);
                    return Err(ConfigError::new(file, &key, problem));
                }
            }
            let plan = ServicePlan { service, backends, health: table.health };
            if services.insert(table.address, plan).is_some() {
                let problem = format!("`{}`: expected once in a balancer", table.address);
                return Err(ConfigError::new(file, &key, problem));
            }
        }
        Ok(DsrPlan { settings: self.settings.name(name), probes: self.probes, services })
    }
}

impl ServicePlan {
    /// Backends with their weights as they are for now: who is down has none.
    fn present(
        &self,
        name: &str,
        address: &ServiceAddr,
        known: &[DsrBackendEntry],
        still: &Still<'_>,
    ) -> BTreeMap<IpAddr, u32> {
        let weight = |backend: &IpAddr, weight: u32| {
            let entry = known.iter().find(|entry| entry.address == *backend);
            let before = entry.and_then(|entry| present_weight(entry.state, entry.weight));
            let held = self.health.is_some() && still.holds_back(&watched(name, address, *backend), before);
            if held { 0 } else { weight }
        };
        self.backends.iter().map(|(backend, wanted)| (*backend, weight(backend, *wanted))).collect()
    }
}

impl DsrPlan {
    /// What can only be chosen when the tables are made. `None` when nothing of it differs.
    pub(crate) fn fixed_difference(&self, other: &Self) -> Option<Fixed> {
        let (a, b) = (&self.settings, &other.settings);
        first_of([
            (a.services != b.services, Fixed { key: "services", grows: b.services > a.services }),
            (a.backends != b.backends, Fixed { key: "backends", grows: b.backends > a.backends }),
            (a.table_size != b.table_size, Fixed { key: "table_size", grows: false }),
            (a.seed != b.seed, Fixed { key: "seed", grows: false }),
            (a.flows != b.flows, Fixed { key: "flows", grows: false }),
            (a.ring_bytes != b.ring_bytes, Fixed { key: "ring_bytes", grows: false }),
        ])
    }

    /// The virtual addresses, and the backends that packets are forwarded to so.
    pub(crate) fn addresses(&self, forwarding: Forwarding) -> (Vec<IpAddr>, Vec<IpAddr>) {
        let services = || self.services.iter().filter(|(_, plan)| plan.service.forwarding == forwarding);
        let backends = services().flat_map(|(_, plan)| plan.backends.keys().copied());
        (services().map(|(service, _)| service.address).collect(), backends.collect())
    }

    /// Does what can be refused, before anything is taken away: adds services, and backends, for now without weight. A
    /// backend that is taken out and put back is another one, so who undid that would end connections.
    pub(crate) fn add(&self, name: &str, balancer: &DsrBalancer, still: &Still<'_>) -> xdpkit::Result<()> {
        for (address, plan) in &self.services {
            let known = match balancer.backends(*address) {
                Err(xdpkit::Error::UnknownService { .. }) => {
                    balancer.insert_service(*address, plan.service, plan.present(name, address, &[], still))?;
                    continue;
                }
                present => present?,
            };
            let staying = known.iter().filter_map(|entry| {
                let weight = present_weight(entry.state, entry.weight)?;
                Some((entry.address, if entry.state == BackendState::Active { weight } else { 0 }))
            });
            let mut list: BTreeMap<_, _> = staying.collect();
            let before = list.len();
            for backend in plan.backends.keys() {
                list.entry(*backend).or_insert(0);
            }
            if list.len() > before {
                balancer.set_backends(*address, list)?;
            }
        }
        Ok(())
    }

    /// Brings a balancer to this plan. Backends that are no more in it are drained; flows stay where they are. Who is down
    /// gets no weight.
    pub(crate) fn apply(&self, name: &str, balancer: &DsrBalancer, still: &Still<'_>) -> xdpkit::Result<()> {
        // One that is not there is waited for.
        let probes = self.probes.as_ref().and_then(|probes| Interface::by_name(&probes.interface).ok());
        let present: BTreeMap<_, _> = balancer.services()?.into_iter().map(|entry| (entry.address, entry)).collect();
        for (address, plan) in &self.services {
            let known = if present.contains_key(address) { balancer.backends(*address)? } else { Vec::new() };
            let backends = plan.present(name, address, &known, still);
            match present.get(address) {
                Some(entry) if entry.service == plan.service => balancer.set_backends(*address, backends)?,
                Some(_) => {
                    // Another way of forwarding is another service.
                    balancer.remove_service(*address)?;
                    balancer.insert_service(*address, plan.service, backends)?;
                }
                None => balancer.insert_service(*address, plan.service, backends)?,
            }
        }
        let wanted: BTreeSet<_> = self.services.keys().collect();
        for address in present.keys().filter(|address| !wanted.contains(address)) {
            balancer.remove_service(*address)?;
        }
        balancer.set_probe_interface(probes.as_ref())?;
        balancer.configure(&self.settings)
    }

    /// The backends that are to be checked, once the balancer has them.
    pub(crate) fn checks(&self, name: &str, balancer: &Arc<DsrBalancer>) -> xdpkit::Result<Vec<Wanted>> {
        let mut all = Vec::new();
        for (address, plan) in &self.services {
            let Some((health, probes)) = plan.health.as_ref().zip(self.probes.as_ref()) else { continue };
            let Some(host) = probes.source(address) else { continue };
            for (backend, weight) in &plan.backends {
                all.push(Wanted {
                    watched: watched(name, address, *backend),
                    weight: *weight,
                    health: health.clone(),
                    target: target(address),
                    source: Some(balancer.probe_source(*address, *backend, host)?),
                    balancer: Balancer::Dsr(Arc::clone(balancer)),
                });
            }
        }
        Ok(all)
    }
}

/// Probes ask for the virtual address.
fn target(service: &ServiceAddr) -> SocketAddr {
    SocketAddr::new(service.address, service.port.unwrap_or(0))
}

fn watched(function: &str, service: &ServiceAddr, backend: IpAddr) -> Watched {
    Watched { function: function.to_owned(), service: *service, backend: SocketAddr::new(backend, 0) }
}
