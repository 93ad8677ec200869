//! Configurations in files: what is left out has its default, what is wrong is named.
#![cfg(feature = "serde")]

use std::{fmt::Debug, time::Duration};

use serde::de::DeserializeOwned;
use xdpkit::{
    BanPolicy, Decision, Engine, FirewallConfig, MonitorConfig, Rate, RateLimiterConfig, Selector, TableFull, XdpMode,
};

#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Holds<T> {
    value: T,
}

fn refused<T: DeserializeOwned + Debug>(text: &str, message: &str) {
    let error = toml::from_str::<T>(text).unwrap_err().to_string();
    assert!(error.contains(message), "{text}: {error}");
}

#[test]
fn what_is_left_out_has_its_default() {
    let empty: FirewallConfig = toml::from_str("").unwrap();
    assert_eq!(format!("{empty:?}"), format!("{:?}", FirewallConfig::default()));
    let some: FirewallConfig = toml::from_str("default = 'deny'\nengine = 'compiled'\nsample = 10").unwrap();
    let same = FirewallConfig::default().default_decision(Decision::Deny).engine(Engine::Compiled).sample(10);
    assert_eq!(format!("{some:?}"), format!("{same:?}"));
    let monitor: MonitorConfig = toml::from_str("name = 'watch'").unwrap();
    assert_eq!((monitor.name.as_str(), monitor.sample), ("watch", 0));
}

#[test]
fn what_is_written_is_read_again() {
    let config = FirewallConfig::default().not_ip(Decision::Deny).table_lines(20_000_u32).name("edge");
    let text = toml::to_string(&config).unwrap();
    let read: FirewallConfig = toml::from_str(&text).unwrap();
    assert_eq!(format!("{read:?}"), format!("{config:?}"), "{text}");
    let selector: Selector = "203.0.113.0/24 to 198.51.100.7 tcp/80-443".parse().unwrap();
    let text = toml::to_string(&Holds { value: selector }).unwrap();
    assert_eq!(text, "value = \"203.0.113.0/24 to 198.51.100.7/32 tcp/80-443\"\n");
    assert_eq!(toml::from_str::<Holds<Selector>>(&text).unwrap().value, selector);
    assert_eq!(toml::from_str::<Holds<XdpMode>>("value = 'auto'").unwrap().value, XdpMode::Auto);
}

#[test]
fn limits_are_written_as_text() {
    let text = "protect = 2.5\nfull = 'share 50/s'\nban = { duration = 60 }\n[limits]\ntcp-syn = '20/s:50'\nall = '1000/s and 1000000/s bytes'";
    let config: RateLimiterConfig = toml::from_str(text).unwrap();
    let limits: Vec<_> = config.limits.iter().map(|(scope, limit)| format!("{scope} {limit}")).collect();
    assert_eq!(limits, ["all 1000/s packets and 1000000/s bytes", "tcp-syn 20/s:50 packets"]);
    assert_eq!(config.full, TableFull::Share(Rate::per_second(50)));
    assert_eq!(config.ban, Some(BanPolicy::of(Duration::from_secs(60))));
    assert_eq!(config.protect, Duration::from_millis(2500));
    let read: RateLimiterConfig = toml::from_str(&toml::to_string(&config).unwrap()).unwrap();
    assert_eq!(format!("{read:?}"), format!("{config:?}"));
    refused::<RateLimiterConfig>("protect = -1", "`-1`: expected seconds, at least 0");
    refused::<RateLimiterConfig>("limits = { icmp = '1/s' }", "scope `icmp`: expected all, tcp");
    refused::<RateLimiterConfig>("limits = { all = '1/d' }", "rate `1/d`: expected N/UNIT[:BURST]");
    refused::<RateLimiterConfig>("full = 'open'", "policy of a full table `open`: expected drop, pass or share");
}

#[test]
fn what_is_wrong_is_named() {
    refused::<FirewallConfig>("engine = 'tree'", "unknown variant `tree`, expected one of `auto`, `trie`, `compiled`");
    refused::<FirewallConfig>("engin = 'trie'", "unknown field `engin`, expected one of `name`, `default`");
    refused::<FirewallConfig>("capacity = -1", "invalid value: integer `-1`, expected u32");
    refused::<Holds<Selector>>("value = '10.0.0.0/33'", "selector `10.0.0.0/33`: expected CIDR");
    refused::<Holds<Selector>>("value = 7", "invalid type: integer `7`, expected `CIDR [to CIDR]");
}
