//! The appliance's DSR balancers: their table in the file, and what is done with it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::Path,
};

use serde::Deserialize;
use xdpkit::{DsrBalancer, DsrConfig, DsrService, Forwarding, ServiceAddr};

use crate::config::{ConfigError, check_name};

/// `[dsr_balancer.NAME]`
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct DsrTable {
    settings: DsrConfig,
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
    /// Weights.
    backends: BTreeMap<IpAddr, u32>,
}

/// A balancer with its services.
#[derive(Clone, Debug)]
pub(crate) struct DsrPlan {
    pub(crate) settings: DsrConfig,
    services: BTreeMap<ServiceAddr, ServicePlan>,
}

#[derive(Clone, Debug)]
struct ServicePlan {
    service: DsrService,
    backends: BTreeMap<IpAddr, u32>,
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
            let plan = ServicePlan { service: service.by_source(table.by_source), backends: table.backends };
            if services.insert(table.address, plan).is_some() {
                let problem = format!("`{}`: expected once in a balancer", table.address);
                return Err(ConfigError::new(file, &key, problem));
            }
        }
        Ok(DsrPlan { settings: self.settings.name(name), services })
    }
}

impl DsrPlan {
    /// What can only be chosen when the tables are made. `None` when nothing of it differs.
    pub(crate) fn fixed_difference(&self, other: &Self) -> Option<&'static str> {
        // All but how echo requests are answered.
        let mut settings = other.settings.clone();
        settings.echo = self.settings.echo;
        (format!("{settings:?}") != format!("{:?}", self.settings)).then_some("*")
    }

    /// Brings a balancer to this plan. Backends that are no more in it are drained; flows stay where they are.
    pub(crate) fn apply(&self, balancer: &DsrBalancer) -> xdpkit::Result<()> {
        let present: BTreeMap<_, _> = balancer.services()?.into_iter().map(|entry| (entry.address, entry)).collect();
        for (address, plan) in &self.services {
            let backends = plan.backends.iter().map(|(backend, weight)| (*backend, *weight));
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
        balancer.set_echo(self.settings.echo);
        Ok(())
    }
}
