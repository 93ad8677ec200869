//! The appliance's NAT balancers: their table in the file, and what is done with it.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::Arc,
};

use serde::Deserialize;
use xdpkit::{NatBackend, NatBalancer, NatConfig, NatMode, NatService, Scheduler, ServiceAddr};

use crate::{
    config::{ConfigError, Fixed, check_name, first_of},
    health::{Balancer, HealthTable, Still, Wanted, Watched, present_weight},
};

/// `[nat_balancer.NAME]`
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct NatTable {
    settings: NatConfig,
    service: Vec<ServiceTable>,
}

/// `[[nat_balancer.NAME.service]]`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ServiceTable {
    address: ServiceAddr,
    #[serde(default)]
    mode: NatMode,
    #[serde(default)]
    scheduler: Scheduler,
    /// Weights.
    backends: BTreeMap<SocketAddr, u32>,
    health: Option<HealthTable>,
}

/// A balancer with its services.
#[derive(Clone, Debug)]
pub(crate) struct NatPlan {
    pub(crate) settings: NatConfig,
    services: BTreeMap<ServiceAddr, ServicePlan>,
}

#[derive(Clone, Debug)]
struct ServicePlan {
    service: NatService,
    health: Option<HealthTable>,
}

impl NatTable {
    pub(crate) fn plan(self, file: &Path, name: &str) -> Result<NatPlan, ConfigError> {
        check_name(file, "nat_balancer", name, &self.settings.name, &NatConfig::default().name)?;
        let mut services = BTreeMap::new();
        for table in self.service {
            if let Some(health) = &table.health {
                let key = format!("nat_balancer.{name}.service: `{}`", table.address);
                for backend in table.backends.keys() {
                    health.validate(file, &key, *backend)?;
                }
            }
            let service = NatService::default().mode(table.mode).scheduler(table.scheduler);
            let service = table.backends.into_iter().fold(service, |service, (to, weight)| service.backend(to, weight));
            if services.insert(table.address, ServicePlan { service, health: table.health }).is_some() {
                let problem = format!("`{}`: expected once in a balancer", table.address);
                return Err(ConfigError::new(file, &format!("nat_balancer.{name}.service"), problem));
            }
        }
        Ok(NatPlan { settings: self.settings.name(name), services })
    }
}

impl ServicePlan {
    /// With weights as they are for now: who is down has none.
    fn present(&self, name: &str, address: &ServiceAddr, known: &[NatBackend], still: &Still<'_>) -> NatService {
        let mut service = self.service.clone();
        for (backend, weight) in &mut service.backends {
            let entry = known.iter().find(|entry| entry.address == *backend);
            let before = entry.and_then(|entry| present_weight(entry.state, entry.weight));
            if self.health.is_some() && still.holds_back(&watched(name, address, *backend), before) {
                *weight = 0;
            }
        }
        service
    }
}

impl NatPlan {
    /// What can only be chosen when the tables are made. `None` when nothing of it differs.
    pub(crate) fn fixed_difference(&self, other: &Self) -> Option<Fixed> {
        let (a, b) = (&self.settings, &other.settings);
        first_of([
            (a.capacity != b.capacity, Fixed { key: "capacity", grows: false }),
            (a.services != b.services, Fixed { key: "services", grows: b.services > a.services }),
            (a.backends != b.backends, Fixed { key: "backends", grows: b.backends > a.backends }),
            (a.table_size != b.table_size, Fixed { key: "table_size", grows: false }),
            (a.seed != b.seed, Fixed { key: "seed", grows: false }),
            (a.addresses != b.addresses, Fixed { key: "addresses", grows: false }),
            (a.ports != b.ports, Fixed { key: "ports", grows: false }),
            (a.ring_bytes != b.ring_bytes, Fixed { key: "ring_bytes", grows: false }),
        ])
    }

    /// The virtual addresses, and the backends.
    pub(crate) fn addresses(&self) -> (Vec<IpAddr>, Vec<IpAddr>) {
        let backends = self.services.values().flat_map(|plan| &plan.service.backends);
        (
            self.services.keys().map(|service| service.address).collect(),
            backends.map(|(backend, _)| backend.ip()).collect(),
        )
    }

    /// Does what can be refused, before anything is taken away: adds services, and backends, for now without weight. A
    /// backend that is taken out and put back is another one, so who undid that would end connections.
    pub(crate) fn add(&self, name: &str, balancer: &NatBalancer, still: &Still<'_>) -> xdpkit::Result<()> {
        for (address, plan) in &self.services {
            let mut list = match balancer.get(address) {
                Err(xdpkit::Error::UnknownService { .. }) => {
                    balancer.insert(*address, &plan.present(name, address, &[], still))?;
                    continue;
                }
                present => present?.backends,
            };
            let before = list.len();
            for (backend, _) in &plan.service.backends {
                if !list[..before].iter().any(|(known, _)| known == backend) {
                    list.push((*backend, 0));
                }
            }
            if list.len() > before {
                balancer.set_backends(address, &list)?;
            }
        }
        Ok(())
    }

    /// Brings a balancer to this plan. Backends that are no more in it keep the connections that they have. Who is down gets
    /// no weight.
    pub(crate) fn apply(&self, name: &str, balancer: &NatBalancer, still: &Still<'_>) -> xdpkit::Result<()> {
        let present = balancer.services();
        for (address, plan) in &self.services {
            let known = if present.contains(address) { balancer.backends(address)? } else { Vec::new() };
            let service = plan.present(name, address, &known, still);
            match balancer.get(address) {
                Ok(old) if (old.mode, old.scheduler) == (service.mode, service.scheduler) => {
                    balancer.set_backends(address, &service.backends)?;
                }
                Ok(_) => {
                    // Another way of translating is another service.
                    balancer.remove(address)?;
                    balancer.insert(*address, &service)?;
                }
                Err(xdpkit::Error::UnknownService { .. }) => balancer.insert(*address, &service)?,
                Err(error) => return Err(error),
            }
        }
        for address in present.iter().filter(|address| !self.services.contains_key(address)) {
            balancer.remove(address)?;
        }
        balancer.configure(&self.settings)
    }

    /// The backends that are to be checked, at their own addresses.
    pub(crate) fn checks(&self, name: &str, balancer: &Arc<NatBalancer>) -> Vec<Wanted> {
        let mut all = Vec::new();
        for (address, plan) in &self.services {
            let Some(health) = &plan.health else { continue };
            for (backend, weight) in &plan.service.backends {
                all.push(Wanted {
                    watched: watched(name, address, *backend),
                    weight: *weight,
                    health: health.clone(),
                    target: *backend,
                    source: None,
                    balancer: Balancer::Nat(Arc::clone(balancer)),
                });
            }
        }
        all
    }
}

fn watched(function: &str, service: &ServiceAddr, backend: SocketAddr) -> Watched {
    Watched { function: function.to_owned(), service: *service, backend }
}
