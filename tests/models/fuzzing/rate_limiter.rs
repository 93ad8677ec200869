//! The rate limiter as its documentation has it, as far as time does not matter: limits that are exhausted at once or never,
//! tiers, and what is no source's.

use std::collections::HashMap;

use xdpkit::{
    Action, Fragment, Limit, Network, Rate, RateLimiter, RateLimiterConfig, Reason, Scope, Tier, Transport,
    ipnet::IpNet,
};

use super::tally::Verdict;
use crate::parser_oracle::oracle::Reading;

/// No test sends so many.
const ENDLESS: u64 = 1_000_000_000;

/// What each source may send at once, next to nothing coming back in an hour.
const LIMITS: [(Scope, u64); 4] =
    [(Scope::All, ENDLESS), (Scope::TcpSyn, ENDLESS), (Scope::UdpPort(53), 40), (Scope::IcmpEcho, 3)];

const TIERS: [(&str, Option<Tier>); 7] = [
    ("203.0.113.0/24", Some(Tier::Blocked)),
    ("10.9.0.0/16", Some(Tier::Blocked)),
    ("10.9.9.9/32", Some(Tier::Exempt)),
    ("2001:db8:1::/48", Some(Tier::Blocked)),
    ("2001:db8:1:2::/64", Some(Tier::Exempt)),
    // These may send a few of each kind.
    ("10.1.2.4/32", None),
    ("fe80::/10", None),
];
const FEW: u64 = 7;

fn rate(burst: u64) -> Rate {
    if burst == ENDLESS { Rate::per_second(ENDLESS) } else { format!("1/h:{burst}").parse().unwrap() }
}

pub(crate) fn load(sources: u32) -> RateLimiter {
    let config = RateLimiterConfig::default().sources(sources);
    let config = LIMITS.iter().fold(config, |config, (scope, burst)| config.limit(*scope, rate(*burst)));
    let limiter = RateLimiter::load(&config).unwrap();
    for (prefix, tier) in TIERS {
        let tier = tier.unwrap_or_else(|| Limit::packets(rate(FEW)).into());
        limiter.tiers().insert(prefix.parse().unwrap(), tier).unwrap();
    }
    limiter
}

/// What each source has sent of each scope.
#[derive(Default)]
pub(crate) struct Model {
    sent: HashMap<(IpNet, Scope), u64>,
}

impl Model {
    pub(crate) fn judge(&mut self, reading: &Reading) -> Verdict {
        if reading.reason != Reason::None {
            return (Action::Drop, reading.reason);
        }
        let Network::Ip { source, hop_limit, .. } = reading.network else {
            return (Action::Pass, if reading.network == Network::Arp { Reason::Arp } else { Reason::NotIp });
        };
        if let Some(Transport::Icmpv6 { kind: 133..=137, code: 0 }) = reading.transport
            && hop_limit == 255
        {
            return (Action::Pass, Reason::NeighbourDiscovery);
        }
        let covering = TIERS.iter().map(|(text, tier)| (text.parse::<IpNet>().unwrap(), tier));
        let covering = covering.filter(|(prefix, _)| prefix.contains(&source));
        let tier = covering.max_by_key(|(prefix, _)| prefix.prefix_len()).map(|(_, tier)| tier);
        match tier {
            Some(Some(Tier::Exempt)) => return (Action::Pass, Reason::Exempt),
            Some(Some(_)) => return (Action::Drop, Reason::Blocked),
            _ => {}
        }
        let length = if source.is_ipv4() { 32 } else { 64 };
        let source = IpNet::new(source, length).unwrap().trunc();
        let scopes: Vec<_> = LIMITS.iter().filter(|(scope, _)| is_in(*scope, reading)).collect();
        let full = scopes.iter().any(|(scope, burst)| {
            let most = if tier.is_some() { FEW } else { *burst };
            self.sent.get(&(source, *scope)).is_some_and(|sent| *sent >= most)
        });
        // To all of them or, when one refuses, to none.
        if full {
            return (Action::Drop, Reason::OverPackets);
        }
        for (scope, _) in scopes {
            *self.sent.entry((source, *scope)).or_default() += 1;
        }
        (Action::Pass, Reason::WithinLimit)
    }
}

fn is_in(scope: Scope, reading: &Reading) -> bool {
    let Network::Ip { fragment, .. } = reading.network else { return false };
    // Later fragments have no ports, flags or types.
    let whole = reading.transport.filter(|_| fragment != Fragment::Later);
    match scope {
        Scope::All => true,
        Scope::TcpSyn => matches!(whole, Some(Transport::Tcp { flags, .. }) if flags & 0x12 == 0x02),
        Scope::UdpPort(port) => matches!(whole, Some(Transport::Udp { destination, .. }) if destination == port),
        Scope::IcmpEcho => {
            matches!(whole, Some(Transport::Icmp { kind: 8, code: 0 } | Transport::Icmpv6 { kind: 128, code: 0 }))
        }
        _ => unreachable!("no limit is about {scope}"),
    }
}
