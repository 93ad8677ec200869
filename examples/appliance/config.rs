//! The appliance's file: read and checked as a whole before anything changes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use xdpkit::{MonitorConfig, XdpMode};

use crate::{
    dsr_balancer::{DsrPlan, DsrTable},
    firewall::{FirewallPlan, FirewallTable},
    nat_balancer::{NatPlan, NatTable},
    rate_limiter::{RateLimiterPlan, RateLimiterTable},
};

/// What is wrong with a file: one line with the file, the place in it, and the value.
#[derive(Debug)]
pub(crate) struct ConfigError(String);

impl ConfigError {
    /// `key` is written as in TOML: `firewall.edge.deny`.
    pub(crate) fn new(file: &Path, key: &str, problem: impl fmt::Display) -> Self {
        Self(format!("{}: {key}: {problem}", file.display()))
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ConfigError {}

/// The file as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    interface: BTreeMap<String, InterfaceTable>,
    #[serde(default)]
    monitor: BTreeMap<String, MonitorTable>,
    #[serde(default)]
    firewall: BTreeMap<String, FirewallTable>,
    #[serde(default)]
    rate_limiter: BTreeMap<String, RateLimiterTable>,
    #[serde(default)]
    dsr_balancer: BTreeMap<String, DsrTable>,
    #[serde(default)]
    nat_balancer: BTreeMap<String, NatTable>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct InterfaceTable {
    #[serde(default)]
    mode: XdpMode,
    chain: Vec<String>,
    last: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct MonitorTable {
    settings: MonitorConfig,
}

/// What is to be: the same for a start and a reload.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) interfaces: BTreeMap<String, InterfacePlan>,
    pub(crate) functions: BTreeMap<String, FunctionPlan>,
}

#[derive(Clone, Debug)]
pub(crate) struct InterfacePlan {
    pub(crate) mode: XdpMode,
    /// Names of functions, in the order in which packets meet them.
    pub(crate) chain: Vec<String>,
    /// Where the user's own program is pinned.
    pub(crate) last: Option<PathBuf>,
}

#[derive(Clone, Debug)]
pub(crate) enum FunctionPlan {
    Monitor(MonitorConfig),
    Firewall(Box<FirewallPlan>),
    RateLimiter(Box<RateLimiterPlan>),
    DsrBalancer(Box<DsrPlan>),
    NatBalancer(Box<NatPlan>),
}

impl FunctionPlan {
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Monitor(_) => "monitor",
            Self::Firewall(_) => "firewall",
            Self::RateLimiter(_) => "rate_limiter",
            Self::DsrBalancer(_) => "dsr_balancer",
            Self::NatBalancer(_) => "nat_balancer",
        }
    }
}

/// Reads the file, and the lists that it names.
pub(crate) fn read(path: &Path) -> Result<Plan, ConfigError> {
    let text = fs::read_to_string(path).map_err(|error| ConfigError(format!("{}: {error}", path.display())))?;
    let file = parse(path, &text)?;
    let mut functions = BTreeMap::new();
    let mut add = |name: &str, plan: FunctionPlan| {
        let kind = plan.kind();
        match functions.insert(name.to_owned(), plan) {
            None => Ok(()),
            Some(other) => {
                let problem =
                    format!("`{name}`: expected a name that no other function has, but a {} has it", other.kind());
                Err(ConfigError::new(path, &format!("{kind}.{name}"), problem))
            }
        }
    };
    for (name, table) in file.monitor {
        let settings = table.settings;
        check_name(path, "monitor", &name, &settings.name, &MonitorConfig::default().name)?;
        add(&name, FunctionPlan::Monitor(settings.name(&name)))?;
    }
    for (name, table) in file.firewall {
        add(&name, FunctionPlan::Firewall(table.plan(path, &name)?.into()))?;
    }
    for (name, table) in file.rate_limiter {
        add(&name, FunctionPlan::RateLimiter(table.plan(path, &name)?.into()))?;
    }
    for (name, table) in file.dsr_balancer {
        add(&name, FunctionPlan::DsrBalancer(table.plan(path, &name)?.into()))?;
    }
    for (name, table) in file.nat_balancer {
        add(&name, FunctionPlan::NatBalancer(table.plan(path, &name)?.into()))?;
    }
    let mut interfaces = BTreeMap::new();
    if file.interface.is_empty() {
        return Err(ConfigError::new(path, "interface", "expected at least one `[interface.NAME]`"));
    }
    let mut used = BTreeSet::new();
    for (name, table) in file.interface {
        let key = format!("interface.{name}.chain");
        if table.chain.is_empty() {
            return Err(ConfigError::new(path, &key, "`[]`: expected at least one function"));
        }
        let mut seen = BTreeSet::new();
        for function in &table.chain {
            if !functions.contains_key(function) {
                let known: Vec<_> = functions.keys().map(String::as_str).collect();
                let problem = format!("`{function}`: expected a function of this file: {}", known.join(", "));
                return Err(ConfigError::new(path, &key, problem));
            }
            if !seen.insert(function) {
                return Err(ConfigError::new(path, &key, format!("`{function}`: expected once in a chain")));
            }
            used.insert(function.clone());
        }
        interfaces.insert(name, InterfacePlan { mode: table.mode, chain: table.chain, last: table.last });
    }
    for (name, plan) in &functions {
        let FunctionPlan::DsrBalancer(plan) = plan else { continue };
        let Some(probes) = &plan.probes else { continue };
        let on_it = |interface: &InterfacePlan| interface.chain.contains(name);
        if !interfaces.get(&probes.interface).is_some_and(on_it) {
            let problem = format!("`{}`: expected an interface with `{name}` in its chain", probes.interface);
            return Err(ConfigError::new(path, &format!("dsr_balancer.{name}.probes.interface"), problem));
        }
    }
    if let Some((name, plan)) = functions.iter().find(|(name, _)| !used.contains(*name)) {
        let problem = "stands in no chain: packets would not meet it";
        return Err(ConfigError::new(path, &format!("{}.{name}", plan.kind()), problem));
    }
    Ok(Plan { interfaces, functions })
}

fn parse(path: &Path, text: &str) -> Result<File, ConfigError> {
    let wrong = |key: &str, error: &toml::de::Error| {
        let span = error.span().unwrap_or_default();
        let line = text[..span.start.min(text.len())].matches('\n').count() + 1;
        let value = text.get(span).unwrap_or_default().lines().next().unwrap_or_default();
        let key = if key == "." { String::new() } else { format!(" {key}:") };
        ConfigError(format!("{}: line {line}:{key} `{value}`: {}", path.display(), error.message().replace('\n', " ")))
    };
    let document = toml::Deserializer::parse(text).map_err(|error| wrong(".", &error))?;
    serde_path_to_error::deserialize(document).map_err(|error| wrong(&error.path().to_string(), error.inner()))
}

/// A function is named by its table, so that chains can name it.
pub(crate) fn check_name(file: &Path, kind: &str, table: &str, name: &str, default: &str) -> Result<(), ConfigError> {
    if name == default || name == table {
        return Ok(());
    }
    let problem = format!("`{name}`: expected none, or `{table}`: the table's name is the function's");
    Err(ConfigError::new(file, &format!("{kind}.{table}.settings.name"), problem))
}

/// A setting that no reload changes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fixed {
    pub(crate) key: &'static str,
    /// Whether a process that adopts the tables can make it what it is to be.
    pub(crate) grows: bool,
}

/// The first of those that differ.
pub(crate) fn first_of(settings: impl IntoIterator<Item = (bool, Fixed)>) -> Option<Fixed> {
    settings.into_iter().find_map(|(differs, setting)| differs.then_some(setting))
}
