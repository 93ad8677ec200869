//! The network functions as tests of their owners see them: random edits, and whether packets get what is listed.

mod dsr;
mod firewall;
mod limiter;
mod monitor;
mod nat;
mod scene;

use std::{net::IpAddr, path::PathBuf};

use dsr::Spreading;
use fastrand::Rng;
use firewall::{Guard, Scrubber};
use limiter::Limiting;
use monitor::Watching;
use nat::Translating;
pub(crate) use scene::Scene;
use xdpkit::{AttachOptions, Attachment, Engine, Error, Pipeline, Result, Stage};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Function {
    Trie,
    Compiled,
    Limiter,
    Nat,
    Dsr,
    Monitor,
    /// Firewalls whose one edit is to reload a list of 60,000 lines.
    LongTrie,
    LongCompiled,
}

const NAMES: [(&str, Function); 8] = [
    ("long_trie", Function::LongTrie),
    ("long_compiled", Function::LongCompiled),
    ("trie", Function::Trie),
    ("compiled", Function::Compiled),
    ("limiter", Function::Limiter),
    ("nat", Function::Nat),
    ("dsr", Function::Dsr),
    ("monitor", Function::Monitor),
];

/// Where a process finds what it needs.
pub(crate) struct Place {
    /// Of pins.
    pub(crate) directory: PathBuf,
    /// That packets for its host go to.
    pub(crate) mac: [u8; 6],
    /// For how many rules, tiers, services and backends more than at first a process that starts has room.
    pub(crate) more: std::cell::Cell<u32>,
}

/// A value whose tables this process owns.
pub(crate) trait Owned {
    fn stage(&self) -> &dyn Stage;

    /// Attaches with pins, which says that this process is ready.
    fn attach(&self, place: &Place) -> Result<Vec<Attached>> {
        let attachment = self.stage().attach(&AttachOptions::new("eth0").pin(&place.directory))?;
        Ok(vec![Attached::Alone(attachment)])
    }

    /// Changes something, of any table.
    fn edit(&self, random: &mut Rng) -> Result<()>;

    /// Reads what is listed.
    fn list(&self);

    /// Panics when packets get anything else than what is listed.
    fn agrees(&self, random: &mut Rng, probes: usize);
}

/// What has to live as long as packets are judged.
pub(crate) enum Attached {
    Alone(#[allow(dead_code, reason = "kept")] Attachment),
    Chain(#[allow(dead_code, reason = "kept")] Pipeline),
}

impl Function {
    pub(crate) fn name(self) -> &'static str {
        NAMES.iter().find(|(_, function)| *function == self).expect("all are there").0
    }

    pub(crate) fn parse(name: &str) -> Self {
        NAMES.iter().find(|(other, _)| *other == name).expect("one of the names").1
    }

    /// What the pins call it.
    pub(crate) fn stage_name(self) -> &'static str {
        match self {
            Self::Trie | Self::Compiled | Self::LongTrie | Self::LongCompiled => "firewall",
            Self::Limiter => "rate_limiter",
            Self::Nat => "nat_balancer",
            Self::Dsr => "dsr_balancer",
            Self::Monitor => "monitor",
        }
    }

    /// Takes the tables over, or makes them.
    pub(crate) fn start(self, place: &Place) -> Result<Box<dyn Owned>> {
        Ok(match self {
            Self::Trie => Box::new(Guard::start(place, Engine::Trie)?),
            Self::Compiled => Box::new(Guard::start(place, Engine::Compiled)?),
            Self::Limiter => Box::new(Limiting::start(place)?),
            Self::Nat => Box::new(Translating::start(place)?),
            Self::Dsr => Box::new(Spreading::start(place)?),
            Self::Monitor => Box::new(Watching::start(place)?),
            Self::LongTrie => Box::new(Scrubber::start(place, Engine::Trie)?),
            Self::LongCompiled => Box::new(Scrubber::start(place, Engine::Compiled)?),
        })
    }
}

/// Made-up hosts, of which a service's backends come and go.
fn made_up(number: u8) -> IpAddr {
    [192, 168, 178, 60 + number].into()
}

const MADE_UP: u8 = 8;

fn made_up_mac(number: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0xcc, number]
}

/// An edit that other edits make impossible is none; one that finds no room because of what is still draining, too.
fn possible(done: Result<()>) -> Result<()> {
    match done {
        Err(Error::UnknownBackend { .. } | Error::Full { .. } | Error::ServiceExists { .. }) => Ok(()),
        Err(Error::UnknownService { .. }) => Ok(()),
        other => other,
    }
}
