//! Tutorial 2, rate limiting: how much each source may send, decided before the kernel has spent anything on the packet.
//!
//! Each source, an IPv4 address or an IPv6 /64, has a bucket: so many packets a second, and so many at once. What is
//! beyond that is dropped; the other sources do not notice. `--match` says what traffic it is about, `--limit` gives
//! the sources in a prefix a rate of their own, `--ban` cuts off who does not stop.
//!
//! The bucket is one 64-bit number, the time at which the next packet would be due if all came evenly (GCRA). A packet is
//! admitted when that time is not too far ahead, and moves it on by one interval: one compare-and-swap, so that two
//! CPUs never admit more than the limit between them, and nothing has to be filled up by a timer.
//!
//! ```text
//!              ┌ banned, blocked ──────────────────────────► drop
//!   packet ────┤ exempt, matched by nothing ───────────────► pass
//!              └ matched: bucket of its source ┬ has room ─► pass
//!                                              └ is full ──► drop; far too full: ban
//! ```
//!
//! ```sh
//! cargo run --example rate_limiting -- --lab
//! cargo run --example rate_limiting -- --interface eth0 --match icmp-echo --rate 10/s --match tcp-syn --ban 60
//! ```

mod common;

use std::{collections::BTreeMap, process::ExitCode, time::Duration};

use common::{Flags, Output, Session, Usage, lab};
use serde_json::{Value, json};
use xdpkit::{
    BanPolicy, Error, Rate, RateEvent, RateLimiter, RateLimiterConfig, Scope, Tier, ipnet::IpNet, parse_prefix,
};

const ABOUT: &str = "Limits how many packets each source may send, and drops the rest.";
const OWN_FLAGS: &str =
    "  --rate N/UNIT[:BURST]  for every source; UNIT: s, m or h; BURST: packets at once, by default a second's worth
  --match MATCH          all (default), tcp, tcp-syn, udp, icmp-echo, tcp-port=N, udp-port=N; each is limited by itself
  --prefix-v4 N          bits of an IPv4 address that make a source; 32
  --prefix-v6 N          bits of an IPv6 address that make a source; 64
  --limit CIDR=N/UNIT[:BURST]  another rate for sources in there; may be repeated
  --exempt CIDR          no limit for sources in there; may be repeated
  --ban SECONDS          cut off who sends more than twice its limit for a second
";
const RATE: &str = "N/UNIT[:BURST] with N and BURST of at least 1 and UNIT s, m or h, such as 100/s or 10/m:3";

fn main() -> ExitCode {
    common::exit(run())
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let mut asked = Asked::default();
    let flags: Flags = common::parse(ABOUT, |flag, value| asked.take(flag, value), OWN_FLAGS)?;
    let tutorial = flags.lab && asked.rate.is_none() && asked.tiers.is_empty();
    if tutorial {
        asked.rate = Some(Rate::per_second(5));
        asked.scopes = vec![Scope::IcmpEcho];
        // The laboratory's clients are in one /64, and would be one source.
        asked.prefixes[1].get_or_insert(128);
    }

    let limiter = asked.limiter()?;
    let mut events = limiter.events()?;
    let lab = flags.lab.then(lab::Limited::build).transpose()?;
    let session = Session::start(&flags, &limiter, lab.as_ref().map(|lab| &lab.pair.server))?;
    let scenario = lab.map(|lab| lab.play(tutorial, session.stop(), Output { json: flags.json }));
    let tick = |output: Output| {
        for _ in 0..256 {
            let Some(event) = events.next_within(Duration::from_millis(50))? else { return Ok(false) };
            output.line(&to_json(&event), || format!("  {event}"));
        }
        Ok(true)
    };
    session.run(tick, || stats(&limiter))?;
    scenario.map_or(Ok(()), lab::Scenario::finish)
}

/// What the command line asks for.
#[derive(Default)]
struct Asked {
    rate: Option<Rate>,
    scopes: Vec<Scope>,
    prefixes: [Option<u8>; 2],
    tiers: BTreeMap<IpNet, Tier>,
    ban: Option<Duration>,
}

impl Asked {
    fn take(&mut self, flag: &str, value: &str) -> Result<bool, Usage> {
        match flag {
            "--rate" => self.rate = Some(rate(flag, value, value)?),
            "--match" => {
                let expected = "all, tcp, tcp-syn, udp, icmp-echo, tcp-port=N or udp-port=N";
                let scope = value.parse().map_err(|_| Usage::new(flag, value, expected))?;
                if !self.scopes.contains(&scope) {
                    self.scopes.push(scope);
                }
                if self.scopes.len() > 8 {
                    return Err(Usage::new(flag, value, "at most 8 matches"));
                }
            }
            "--prefix-v4" => self.prefixes[0] = Some(bits(flag, value, 32)?),
            "--prefix-v6" => self.prefixes[1] = Some(bits(flag, value, 128)?),
            "--limit" => {
                let expected = format!("CIDR=RATE with RATE {RATE}");
                let (cidr, own) = value.split_once('=').ok_or_else(|| Usage::new(flag, value, expected))?;
                let own = rate(flag, value, own)?;
                self.tier(flag, value, cidr, Tier::Limited(own.into()))?;
            }
            "--exempt" => self.tier(flag, value, value, Tier::Exempt)?,
            "--ban" => {
                let seconds = value.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
                let sensible = seconds.filter(|time| !time.is_zero() && *time <= Duration::from_secs(100_000_000));
                let expected = "seconds, more than 0 and at most a hundred million";
                self.ban = Some(sensible.ok_or_else(|| Usage::new(flag, value, expected))?);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn tier(&mut self, flag: &str, value: &str, cidr: &str, tier: Tier) -> Result<(), Usage> {
        let prefix =
            parse_prefix(cidr).ok_or_else(|| Usage::new(flag, value, "an address or CIDR such as 192.0.2.0/24"))?;
        match self.tiers.insert(prefix, tier) {
            Some(other) if other != tier => {
                Err(Usage::new(flag, value, format!("one tier a prefix, but {prefix} is also {other}")))
            }
            _ => Ok(()),
        }
    }

    fn limiter(mut self) -> Result<RateLimiter, Box<dyn std::error::Error>> {
        let invalid = |error| match error {
            Error::Invalid { what, value, expected } => Usage::new(&format!("--rate: {what}"), value, expected).into(),
            error => Box::<dyn std::error::Error>::from(error),
        };
        let rate = match self.rate {
            Some(rate) => rate,
            None if self.tiers.is_empty() => return Err(Usage::new("--rate", "", RATE).into()),
            None => {
                // Only the sources that are named are limited.
                for all in ["0.0.0.0/0", "::/0"] {
                    self.tiers.entry(all.parse()?).or_insert(Tier::Exempt);
                }
                Rate::per_second(1)
            }
        };
        let [v4, v6] = self.prefixes;
        let mut config = RateLimiterConfig::default()
            .prefix_v4(v4.unwrap_or(32))
            .prefix_v6(v6.unwrap_or(64))
            .tiers(u32::try_from(self.tiers.len())?.max(1024))
            .ban(self.ban.map(BanPolicy::of));
        if self.scopes.is_empty() {
            self.scopes.push(Scope::All);
        }
        for scope in self.scopes {
            config = config.limit(scope, rate);
        }
        let limiter = RateLimiter::load(&config).map_err(invalid)?;
        limiter.tiers().replace_all(self.tiers).map_err(invalid)?;
        Ok(limiter)
    }
}

fn rate(flag: &str, value: &str, text: &str) -> Result<Rate, Usage> {
    text.parse().map_err(|_| Usage::new(flag, value, RATE))
}

fn bits(flag: &str, value: &str, most: u8) -> Result<u8, Usage> {
    let bits = value.parse().ok().filter(|bits| (1..=most).contains(bits));
    bits.ok_or_else(|| Usage::new(flag, value, format!("1 to {most} bits")))
}

fn to_json(event: &RateEvent) -> Value {
    let mut object = json!({
        "event": if event.banned { "banned" } else { "exceeded" },
        "timestamp_ns": event.packet.timestamp.as_nanos() as u64,
        "reason": event.packet.reason.name(),
    });
    if let xdpkit::Network::Ip { source, destination, .. } = event.packet.network {
        object["source"] = source.to_string().into();
        object["destination"] = destination.to_string().into();
    }
    if let (Some(scope), Some(limit)) = (event.scope, event.limit) {
        object["match"] = scope.to_string().into();
        object["limit"] = limit.to_string().into();
    }
    object
}

fn stats(limiter: &RateLimiter) -> xdpkit::Result<Value> {
    let matches = limiter.scope_stats()?.into_iter().map(|stats| {
        json!({
            "match": stats.scope.to_string(),
            "limit": stats.limit.to_string(),
            "tier": stats.tier,
            "admitted": stats.admitted.packets,
            "refused": stats.refused.packets,
        })
    });
    let top = limiter.top(5)?.into_iter().map(
        |bucket| json!({"source": bucket.source.to_string(), "match": bucket.scope.to_string(), "level": bucket.level}),
    );
    Ok(json!({
        "matches": matches.collect::<Vec<_>>(),
        "top": top.collect::<Vec<_>>(),
        "bans": limiter.bans().len()?,
    }))
}
