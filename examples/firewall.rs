//! Tutorial 3, an LPM-trie firewall: allow and deny CIDRs, the longest prefix decides. Big lists go into a compiled table.
//!
//! ```text
//!              ┌ malformed ──────────────────────────────► drop
//!   packet ────┤ ARP, neighbour discovery ───────────────► pass
//!              ├ not IP ─────────────────────────────────► default
//!              └ IP: longest prefix of the source ┬ allow ► pass
//!                                                 ├ deny ─► drop
//!                                                 └ none ─► default
//! ```
//!
//! ```sh
//! cargo run --example firewall -- --lab
//! cargo run --example firewall -- --interface eth0 --deny 203.0.113.0/24 --allow 203.0.113.7 --stats-every 5
//! ```

mod common;

use std::{collections::BTreeMap, process::ExitCode, thread, time::Duration};

use common::{Flags, Output, Session, Usage, lab};
use serde_json::json;
use xdpkit::{Decision, Engine, Firewall, FirewallConfig, Rule, ipnet::IpNet, parse_prefix, read_prefix_list};

const ABOUT: &str = "Drops packets by their source address: the longest prefix that has a rule decides.";
const OWN_FLAGS: &str = "  --deny CIDR            drop packets from there; may be repeated
  --allow CIDR           let packets from there pass; may be repeated
  --deny-file FILE       a CIDR a line
  --allow-file FILE      a CIDR a line
  --default ACTION       pass (default) or drop: for sources that no rule covers
  --engine ENGINE        auto (default), trie or compiled: what finds the rules of an address
";

fn main() -> ExitCode {
    common::exit(run())
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let mut rules = Rules::default();
    let mut default = Decision::Allow;
    let mut engine = Engine::Auto;
    let own = |flag: &str, value: &str| {
        match flag {
            "--deny" => rules.one(flag, value, Rule::deny())?,
            "--allow" => rules.one(flag, value, Rule::allow())?,
            "--deny-file" => rules.file(flag, value, Rule::deny())?,
            "--allow-file" => rules.file(flag, value, Rule::allow())?,
            "--default" => {
                default = match value {
                    "pass" => Decision::Allow,
                    "drop" => Decision::Deny,
                    _ => return Err(Usage::new(flag, value, "pass or drop")),
                }
            }
            "--engine" => {
                engine = match value {
                    "auto" => Engine::Auto,
                    "trie" => Engine::Trie,
                    "compiled" => Engine::Compiled,
                    _ => return Err(Usage::new(flag, value, "auto, trie or compiled")),
                }
            }
            _ => return Ok(false),
        }
        Ok(true)
    };
    let flags: Flags = common::parse(ABOUT, own, OWN_FLAGS)?;

    let config = FirewallConfig::default().default_decision(default).engine(engine);
    let capacity = config.capacity.max(u32::try_from(rules.0.len())?);
    let firewall = Firewall::load(&config.capacity(capacity))?;
    let lab = flags.lab.then(lab::Guarded::build).transpose()?;
    let own_rules = rules.0.is_empty();
    if let Some(lab) = lab.as_ref().filter(|_| own_rules) {
        rules.0.extend(lab.rules().into_iter().map(|(selector, rule)| (selector.source(), rule)));
    }
    firewall.replace_all(rules.0.into_iter().map(|(prefix, rule)| (prefix.into(), rule)))?;
    let session = Session::start(&flags, &firewall, lab.as_ref().map(|lab| &lab.pair.server))?;
    let scenario = lab.map(|lab| lab.play(own_rules, session.stop(), Output { json: flags.json }));
    let tick = |_| {
        thread::sleep(Duration::from_millis(50));
        Ok(false)
    };
    // As the flag has it.
    let default = if default == Decision::Allow { "pass" } else { "drop" };
    session.run(tick, || Ok(json!({"default": default})))?;
    scenario.map_or(Ok(()), lab::Scenario::finish)
}

/// The rules so far, canonical.
#[derive(Default)]
struct Rules(BTreeMap<IpNet, Rule>);

impl Rules {
    fn one(&mut self, flag: &str, value: &str, rule: Rule) -> Result<(), Usage> {
        let prefix =
            parse_prefix(value).ok_or_else(|| Usage::new(flag, value, "an address or CIDR such as 192.0.2.0/24"))?;
        self.add(flag, prefix, rule)
    }

    fn file(&mut self, flag: &str, value: &str, rule: Rule) -> Result<(), Usage> {
        let prefixes =
            read_prefix_list(value).map_err(|error| Usage::new(flag, value, format!("a list of CIDRs: {error}")))?;
        prefixes.into_iter().try_for_each(|prefix| self.add(flag, prefix, rule))
    }

    fn add(&mut self, flag: &str, prefix: IpNet, rule: Rule) -> Result<(), Usage> {
        match self.0.insert(prefix, rule) {
            Some(other) if other != rule => {
                Err(Usage::new(flag, prefix, format!("one rule a prefix, but it is also to {}", other.decision)))
            }
            _ => Ok(()),
        }
    }
}
