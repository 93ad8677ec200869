//! The appliance's rate limiters: their table in the file, and what is done with it.

use std::{collections::BTreeMap, path::Path};

use serde::Deserialize;
use xdpkit::{RateLimiter, RateLimiterConfig, Scope, Tier, ipnet::IpNet, parse_prefix};

use crate::config::{ConfigError, Fixed, check_name, first_of};

/// `[rate_limiter.NAME]`
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct RateLimiterTable {
    settings: RateLimiterConfig,
    tiers: BTreeMap<String, Tier>,
}

/// A rate limiter with its tiers.
#[derive(Clone, Debug)]
pub(crate) struct RateLimiterPlan {
    pub(crate) settings: RateLimiterConfig,
    tiers: BTreeMap<IpNet, Tier>,
}

impl RateLimiterTable {
    pub(crate) fn plan(self, file: &Path, name: &str) -> Result<RateLimiterPlan, ConfigError> {
        check_name(file, "rate_limiter", name, &self.settings.name, &RateLimiterConfig::default().name)?;
        let key = format!("rate_limiter.{name}.tiers");
        let mut tiers = BTreeMap::new();
        for (text, tier) in self.tiers {
            let prefix = parse_prefix(&text)
                .ok_or_else(|| ConfigError::new(file, &key, format!("`{text}`: expected an address or CIDR")))?;
            if tiers.insert(prefix, tier).is_some() {
                return Err(ConfigError::new(
                    file,
                    &key,
                    format!("`{text}`: expected one tier a prefix, but {prefix} stands there twice"),
                ));
            }
        }
        let (count, most) = (tiers.len(), self.settings.tiers as usize);
        if count > most {
            let problem = format!("`{most}`: expected at least {count}, the number of tiers");
            return Err(ConfigError::new(file, &format!("rate_limiter.{name}.settings.tiers"), problem));
        }
        Ok(RateLimiterPlan { settings: self.settings.name(name), tiers })
    }
}

impl RateLimiterPlan {
    /// What can only be chosen when the tables are made. `None` when nothing of it differs.
    pub(crate) fn fixed_difference(&self, other: &Self) -> Option<Fixed> {
        let (a, b) = (&self.settings, &other.settings);
        first_of([
            (a.prefix_v4 != b.prefix_v4, Fixed { key: "prefix_v4", grows: false }),
            (a.prefix_v6 != b.prefix_v6, Fixed { key: "prefix_v6", grows: false }),
            (a.sources != b.sources, Fixed { key: "sources", grows: false }),
            (a.bans != b.bans, Fixed { key: "bans", grows: b.bans > a.bans }),
            (a.tiers != b.tiers, Fixed { key: "tiers", grows: b.tiers > a.tiers }),
            (a.ring_bytes != b.ring_bytes, Fixed { key: "ring_bytes", grows: false }),
        ])
    }

    /// Brings a limiter to this plan: what sources have used up stays.
    pub(crate) fn apply(&self, limiter: &RateLimiter) -> xdpkit::Result<()> {
        limiter.tiers().replace_all(self.tiers.iter().map(|(prefix, tier)| (*prefix, *tier)))?;
        // A configuration without limits would leave them as they are.
        let wanted: BTreeMap<Scope, _> = self.settings.limits.iter().copied().collect();
        let gone: Vec<Scope> =
            limiter.limits().iter().map(|(scope, _)| scope).filter(|scope| !wanted.contains_key(scope)).collect();
        for scope in gone {
            limiter.limits().remove(scope)?;
        }
        limiter.configure(&self.settings)
    }
}
