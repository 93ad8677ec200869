//! The appliance's NAT balancers: their table in the file, and what is done with it.

use std::{collections::BTreeMap, net::SocketAddr, path::Path};

use serde::Deserialize;
use xdpkit::{NatBalancer, NatConfig, NatMode, NatService, Scheduler, ServiceAddr};

use crate::config::{ConfigError, check_name};

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
}

/// A balancer with its services.
#[derive(Clone, Debug)]
pub(crate) struct NatPlan {
    pub(crate) settings: NatConfig,
    services: BTreeMap<ServiceAddr, NatService>,
}

impl NatTable {
    pub(crate) fn plan(self, file: &Path, name: &str) -> Result<NatPlan, ConfigError> {
        check_name(file, "nat_balancer", name, &self.settings.name, &NatConfig::default().name)?;
        let mut services = BTreeMap::new();
        for table in self.service {
            let service = NatService::default().mode(table.mode).scheduler(table.scheduler);
            let service = table.backends.into_iter().fold(service, |service, (to, weight)| service.backend(to, weight));
            if services.insert(table.address, service).is_some() {
                let problem = format!("`{}`: expected once in a balancer", table.address);
                return Err(ConfigError::new(file, &format!("nat_balancer.{name}.service"), problem));
            }
        }
        Ok(NatPlan { settings: self.settings.name(name), services })
    }
}

impl NatPlan {
    /// What can only be chosen when the tables are made. `None` when nothing of it differs.
    pub(crate) fn fixed_difference(&self, other: &Self) -> Option<&'static str> {
        let mut settings = other.settings.clone();
        settings.timeouts = self.settings.timeouts;
        settings.sample = self.settings.sample;
        (format!("{settings:?}") != format!("{:?}", self.settings)).then_some("*")
    }

    /// Brings a balancer to this plan. Backends that are no more in it keep the connections that they have.
    pub(crate) fn apply(&self, balancer: &NatBalancer) -> xdpkit::Result<()> {
        for (address, service) in &self.services {
            match balancer.get(address) {
                Ok(old) if (old.mode, old.scheduler) == (service.mode, service.scheduler) => {
                    balancer.set_backends(address, &service.backends)?;
                }
                Ok(_) => {
                    // Another way of translating is another service.
                    balancer.remove(address)?;
                    balancer.insert(*address, service)?;
                }
                Err(xdpkit::Error::UnknownService { .. }) => balancer.insert(*address, service)?,
                Err(error) => return Err(error),
            }
        }
        for address in balancer.services().iter().filter(|address| !self.services.contains_key(address)) {
            balancer.remove(address)?;
        }
        balancer.set_timeouts(&self.settings.timeouts)?;
        balancer.set_sample(self.settings.sample)
    }
}
