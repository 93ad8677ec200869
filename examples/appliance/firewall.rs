//! The appliance's firewalls: their table in the file, and what is done with it.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use xdpkit::{Firewall, FirewallConfig, Rule, Selector, read_prefix_list};

use crate::config::{ConfigError, Fixed, check_name, first_of};

/// `[firewall.NAME]`
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct FirewallTable {
    settings: FirewallConfig,
    allow: Vec<Selector>,
    deny: Vec<Selector>,
    allow_files: Vec<PathBuf>,
    deny_files: Vec<PathBuf>,
    count: Vec<Selector>,
}

/// A firewall with its whole list.
#[derive(Clone, Debug)]
pub(crate) struct FirewallPlan {
    pub(crate) settings: FirewallConfig,
    rules: HashMap<Selector, Rule>,
}

impl FirewallTable {
    pub(crate) fn plan(self, file: &Path, name: &str) -> Result<FirewallPlan, ConfigError> {
        let at = |key: &str| format!("firewall.{name}.{key}");
        check_name(file, "firewall", name, &self.settings.name, &FirewallConfig::default().name)?;
        let mut plan = FirewallPlan { settings: self.settings.name(name), rules: HashMap::new() };
        for (key, selectors, rule) in [
            ("allow", self.allow, Rule::allow()),
            ("deny", self.deny, Rule::deny()),
            ("count", self.count, Rule::deny().count_only()),
        ] {
            for selector in selectors {
                plan.add(selector, rule).map_err(|problem| ConfigError::new(file, &at(key), problem))?;
            }
        }
        for (key, paths, rule) in
            [("allow_files", self.allow_files, Rule::allow()), ("deny_files", self.deny_files, Rule::deny())]
        {
            for path in paths {
                // Beside the file, wherever the process was started.
                let path = file.parent().unwrap_or(Path::new("")).join(path);
                let list = read_prefix_list(&path).map_err(|error| ConfigError::new(file, &at(key), error))?;
                for prefix in list {
                    plan.add(prefix.into(), rule).map_err(|problem| {
                        ConfigError::new(file, &at(key), format!("{}: {problem}", path.display()))
                    })?;
                }
            }
        }
        let (rules, capacity) = (plan.rules.len(), plan.settings.capacity as usize);
        if rules > capacity {
            let problem = format!("`{capacity}`: expected at least {rules}, the number of rules");
            return Err(ConfigError::new(file, &at("settings.capacity"), problem));
        }
        Ok(plan)
    }
}

impl FirewallPlan {
    fn add(&mut self, selector: Selector, rule: Rule) -> Result<(), String> {
        match self.rules.insert(selector, rule) {
            Some(other) if other != rule => {
                Err(format!("`{selector}`: expected one rule about the same packets, but it stands there twice"))
            }
            _ => Ok(()),
        }
    }

    /// What can only be chosen when the tables are made. `None` when nothing of it differs.
    pub(crate) fn fixed_difference(&self, other: &Self) -> Option<Fixed> {
        let (a, b) = (&self.settings, &other.settings);
        first_of([
            (a.capacity != b.capacity, Fixed { key: "capacity", grows: b.capacity > a.capacity }),
            (a.engine != b.engine, Fixed { key: "engine", grows: true }),
            (a.table_lines != b.table_lines, Fixed { key: "table_lines", grows: b.table_lines > a.table_lines }),
            (a.rule_counters != b.rule_counters, Fixed { key: "rule_counters", grows: b.rule_counters }),
            (a.ring_bytes != b.ring_bytes, Fixed { key: "ring_bytes", grows: false }),
        ])
    }

    /// Brings a firewall to this plan: first the list, whole, then the policies.
    pub(crate) fn apply(&self, firewall: &Firewall) -> xdpkit::Result<()> {
        firewall.replace_all(self.rules.iter().map(|(selector, rule)| (*selector, *rule)))?;
        firewall.configure(&self.settings)
    }
}
