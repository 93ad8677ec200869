//! A rate limiter with random limits, tiers and bans.

use std::{net::IpAddr, path::Path, time::Duration};

use fastrand::Rng;
use xdpkit::{Action, Meter, RateLimiter, RateLimiterConfig, Result, Scope, Stage, Tier, ipnet::IpNet};

use super::{
    super::{rate::just, rules::packet, traffic::DENIED},
    Owned, Place,
};

pub(super) struct Limiting(RateLimiter);

const LIMITED: Scope = Scope::UdpPort(7777);

impl Limiting {
    pub(super) fn start(place: &Place) -> Result<Self> {
        let config = RateLimiterConfig::default().limit(LIMITED, just(5)).sources(100_000);
        // Bans have their table by powers of two.
        let more = place.more.get();
        let config = config.tiers(2000 + more).bans(4096 + 64 * more);
        let limiter = RateLimiter::load_or_adopt(&place.directory, &config)?;
        if limiter.tiers().is_empty() {
            limiter.tiers().replace_all(fixed_tiers())?;
        }
        Ok(Self(limiter))
    }
}

fn fixed_tiers() -> Vec<(IpNet, Tier)> {
    let net = |text: &str| text.parse::<IpAddr>().map(IpNet::from).unwrap();
    DENIED.into_iter().map(|source| (net(source), Tier::Blocked)).collect()
}

fn random_tier(random: &mut Rng) -> (IpNet, Tier) {
    let net = IpNet::new(IpAddr::from([11, random.u8(..4), random.u8(..4), 0]), random.u8(16..25)).unwrap().trunc();
    let tier = match random.u8(..3) {
        0 => Tier::Exempt,
        1 => Tier::Blocked,
        _ => Tier::Limited(just(u64::from(random.u8(1..4))).into()),
    };
    (net, tier)
}

impl Owned for Limiting {
    fn stage(&self) -> &dyn Stage {
        &self.0
    }

    fn edit(&self, random: &mut Rng) -> Result<()> {
        match random.u8(..10) {
            0 | 1 => self.0.limits().insert(LIMITED, just(u64::from(random.u8(1..9)))).map(drop),
            2 => {
                let scope = Scope::TcpPort(random.u16(1..3));
                match random.bool() {
                    true => self.0.limits().insert(scope, just(u64::from(random.u8(1..9)))).map(drop),
                    false => self.0.limits().remove(scope).map(drop),
                }
            }
            3 => {
                let mut tiers = fixed_tiers();
                for _ in 0..random.u8(..60) {
                    let (net, tier) = random_tier(random);
                    if tiers.iter().all(|(other, _)| *other != net) {
                        tiers.push((net, tier));
                    }
                }
                self.0.tiers().replace_all(tiers).map(drop)
            }
            4 | 5 => self.0.tiers().remove(random_tier(random).0).map(drop),
            6 => self.0.bans().insert([12, 0, 0, random.u8(..)].into(), Some(Duration::from_secs(3600))).map(drop),
            7 if random.u8(..8) == 0 => self.0.bans().clear().map(drop),
            _ => {
                let (net, tier) = random_tier(random);
                self.0.tiers().insert(net, tier).map(drop)
            }
        }
    }

    fn list(&self) {
        assert!(self.0.limits().get(LIMITED).is_some());
        assert!(self.0.tiers().len() >= 2);
        let _ = self.0.bans().iter().unwrap().count();
    }

    fn agrees(&self, random: &mut Rng, probes: usize) {
        let limit = self.0.limits().get(LIMITED).unwrap();
        for probe in 0..probes {
            let source = match probe % 4 {
                0 => IpAddr::from([12, 0, 0, random.u8(..)]),
                // Heard of never before, with the greatest likelihood.
                1 => IpAddr::from(random.u32(0x0d00_0000..0x7e00_0000).to_be_bytes()),
                _ => IpAddr::from([11, random.u8(..4), random.u8(..4), random.u8(..)]),
            };
            let frame = packet(&source.to_string(), "192.0.2.1", "udp/7777");
            let tier = self.0.tiers().matching(source).map(|(_, tier)| tier);
            let banned = self.0.bans().get(source).unwrap().is_some();
            let burst = match tier {
                _ if banned => Some(0),
                Some(Tier::Blocked) => Some(0),
                Some(Tier::Exempt) => None,
                Some(Tier::Limited(own)) => own.rate(Meter::Packets).map(|rate| rate.burst_size()),
                _ => limit.rate(Meter::Packets).map(|rate| rate.burst_size()),
            };
            // What it has used up is remembered.
            self.0.reset(source).unwrap();
            let passed = (0..10).filter(|_| self.0.test_run(&frame).unwrap().action == Action::Pass).count();
            assert_eq!(passed as u64, burst.map_or(10, |burst| burst.min(10)), "{source}: {tier:?}, banned: {banned}");
        }
    }
}
