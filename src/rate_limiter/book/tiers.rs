//! Tiers: prefixes and the classes that they give a source.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem::offset_of,
};

use ipnet::IpNet;

use super::{Book, NO_TIER, Plan, build, counts};
use crate::{
    Error, Result,
    abi::rate_limiter::{BLOCKED, CLASSES, EXEMPT, LEAF_LENGTH_SHIFT, Policy, Tier as Record},
    base::StageCore,
    lpm,
    rate_limiter::{Limit, Tier},
};

/// What a new list of tiers changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::rate_limiter) struct Change {
    pub(in crate::rate_limiter) added: usize,
    pub(in crate::rate_limiter) changed: usize,
    pub(in crate::rate_limiter) kept: usize,
    pub(in crate::rate_limiter) removed: usize,
}

pub(super) fn leaf(net: IpNet, class: u32) -> u32 {
    class | u32::from(net.prefix_len()) << LEAF_LENGTH_SHIFT
}

fn length_of(leaf: u32) -> u8 {
    (leaf >> LEAF_LENGTH_SHIFT) as u8
}

fn record(net: IpNet, class: u32) -> Record {
    let mut address = [0; 16];
    match net {
        IpNet::V4(net) => address[..4].copy_from_slice(&net.network().octets()),
        IpNet::V6(net) => address = net.network().octets(),
    }
    let ipv6 = matches!(net, IpNet::V6(_)).into();
    Record { address, class, length: net.prefix_len(), ipv6, used: 1, reserved: 0 }
}

fn decode(record: &Record) -> Option<(IpNet, u32)> {
    let [a, b, c, d, ..] = record.address;
    let address = if record.ipv6 == 0 { [a, b, c, d].into() } else { record.address.into() };
    let net = IpNet::new(address, record.length).ok()?;
    (record.used == 1 && (1..CLASSES as u32).contains(&record.class)).then_some((net, record.class))
}

impl Plan {
    pub(in crate::rate_limiter) fn tier(&self, class: u32) -> Option<Tier> {
        match class {
            EXEMPT => Some(Tier::Exempt),
            BLOCKED => Some(Tier::Blocked),
            class => self.classes[class as usize].map(Tier::Limited),
        }
    }

    /// The class of a tier; a new one where there is none yet. `used`: classes that prefixes have.
    fn class_of(&mut self, tier: Tier, used: &[bool; CLASSES]) -> Option<u32> {
        let limit = match tier {
            Tier::Exempt => return Some(EXEMPT),
            Tier::Blocked => return Some(BLOCKED),
            Tier::Limited(limit) => limit,
        };
        let own = NO_TIER + 1..EXEMPT as usize;
        let same = |at: &usize| self.classes[*at] == Some(limit);
        let class = own.clone().find(same).or_else(|| own.clone().find(|at| !used[*at]))?;
        self.classes[class] = Some(limit);
        Some(class as u32)
    }
}

impl Book {
    pub(super) fn tier_capacity(&self) -> u32 {
        self.tier_records.len() / 2
    }

    fn record_at(&self, bank: u32, number: u32) -> u32 {
        bank * self.tier_capacity() + number
    }

    /// The book's own view, from the records.
    pub(super) fn load_tiers(&mut self, core: &StageCore) {
        for number in (0..self.tier_capacity()).rev() {
            let found = self.tier_records.read(self.record_at(self.plan.policy.tier_bank, number));
            match decode(&found).filter(|(_, class)| self.plan.tier(*class).is_some()) {
                Some((net, class)) => drop(self.tiers.insert(net, (class, number))),
                None => {
                    if found.used != 0 {
                        core.dropped(format!("tier {number}: its record is not whole"));
                    }
                    self.free.push(number);
                }
            }
        }
    }

    fn used_classes(&self) -> [bool; CLASSES] {
        let mut used = [false; CLASSES];
        self.tiers.values().for_each(|(class, _)| used[*class as usize] = true);
        used
    }

    pub(in crate::rate_limiter) fn tiers(&self) -> impl Iterator<Item = (IpNet, Tier)> + '_ {
        self.tiers.iter().filter_map(|(net, (class, _))| Some((*net, self.plan.tier(*class)?)))
    }

    pub(in crate::rate_limiter) fn tier(&self, net: IpNet) -> Option<Tier> {
        self.plan.tier(self.tiers.get(&net.trunc())?.0)
    }

    /// The longest prefix that covers this one, or equals it where `itself`.
    pub(in crate::rate_limiter) fn covering(&self, net: IpNet, itself: bool) -> Option<(IpNet, Tier)> {
        let (net, (class, _)) = self.covering_class(net, itself)?;
        Some((net, self.plan.tier(class)?))
    }

    fn covering_class(&self, net: IpNet, itself: bool) -> Option<(IpNet, (u32, u32))> {
        let longest = net.prefix_len() + u8::from(itself);
        let shorter = (0..longest).rev().filter_map(|length| IpNet::new(net.addr(), length).ok());
        shorter.map(|net| net.trunc()).find_map(|net| Some((net, *self.tiers.get(&net)?)))
    }

    fn full(&self, core: &StageCore, entry: String) -> Error {
        Error::Full { map: core.map("tiers").name().to_owned(), capacity: self.tier_capacity(), entry }
    }

    pub(in crate::rate_limiter) fn insert_tier(
        &mut self,
        core: &StageCore,
        net: IpNet,
        tier: Tier,
    ) -> Result<Option<Tier>> {
        let net = net.trunc();
        let mut plan = self.plan.clone();
        let used = self.used_classes();
        let class = plan.class_of(tier, &used).ok_or_else(|| no_class(net))?;
        let before = self.tiers.get(&net).copied();
        if before.is_none() && self.free.is_empty() {
            return Err(self.full(core, net.to_string()));
        }
        // A class that no prefix has yet gets its limits first.
        if plan.tier(class) != self.plan.tier(class) {
            plan.encode()?;
            self.wait(core)?;
            counts::begin_class(core, class as usize)?;
            self.put(core, plan)?;
        }
        self.edit(core, net, |table, roots, length| match net {
            IpNet::V4(v4) => table.insert(roots.0, v4, leaf(net, class), length),
            IpNet::V6(v6) => table.insert(roots.1, v6, leaf(net, class), length),
        })?;
        let number = match before {
            Some((_, number)) => number,
            None => self.free.pop().expect("looked at above"),
        };
        self.tier_records.write(self.record_at(self.plan.policy.tier_bank, number), &record(net, class));
        self.tiers.insert(net, (class, number));
        self.set(offset_of!(Policy, tiers), 1);
        let before = before.and_then(|(class, _)| self.plan.tier(class));
        self.forget_unused(core);
        Ok(before)
    }

    pub(in crate::rate_limiter) fn remove_tier(&mut self, core: &StageCore, net: IpNet) -> Result<Option<Tier>> {
        let net = net.trunc();
        let Some((class, number)) = self.tiers.get(&net).copied() else { return Ok(None) };
        let covering = self.covering_class(net, false).map_or(0, |(net, (class, _))| leaf(net, class));
        self.edit(core, net, |table, roots, length| match net {
            IpNet::V4(v4) => table.remove(roots.0, v4, covering, length),
            IpNet::V6(v6) => table.remove(roots.1, v6, covering, length),
        })?;
        self.tier_records.write(self.record_at(self.plan.policy.tier_bank, number), &Record::default());
        self.tiers.remove(&net);
        self.free.push(number);
        self.set(offset_of!(Policy, tiers), u32::from(!self.tiers.is_empty()));
        let before = self.plan.tier(class);
        self.forget_unused(core);
        Ok(before)
    }

    /// Where a limit that no tier has any more made packets take the long way, it goes.
    fn forget_unused(&mut self, core: &StageCore) {
        if self.plan.policy.single != 0 || self.plan.policy.scopes != 1 {
            return;
        }
        let mut plan = self.plan.clone();
        let used = self.used_classes();
        plan.classes.iter_mut().zip(used).filter(|(_, used)| !used).for_each(|(class, _)| *class = None);
        if plan.encode().is_ok() && plan.policy.single != 0 {
            // Should that fail, all is right as it is, only slower.
            let _ = self.put(core, plan);
        }
    }

    /// Changes the table in place; once more after a grace period where that makes room.
    fn edit(
        &mut self,
        core: &StageCore,
        net: IpNet,
        change: impl Fn(&mut lpm::Table<super::Mapping>, Roots, fn(u32) -> u8) -> Result<(), lpm::Error>,
    ) -> Result<()> {
        let mut done = change(&mut self.table, self.roots, length_of);
        if done == Err(lpm::Error::Quarantined) {
            self.wait(core)?;
            done = change(&mut self.table, self.roots, length_of);
        }
        done.map_err(|_| {
            let map = core.map("lpm_lines");
            Error::Full { map: map.name().to_owned(), capacity: map.capacity(), entry: net.to_string() }
        })
    }

    /// Puts these tiers in the place of all others; each packet goes by the old ones or the new ones.
    pub(in crate::rate_limiter) fn replace_tiers(
        &mut self,
        core: &StageCore,
        tiers: impl IntoIterator<Item = (IpNet, Tier)>,
    ) -> Result<Change> {
        let mut plan = self.plan.clone();
        let mut wanted: BTreeMap<IpNet, u32> = BTreeMap::new();
        // Classes of the old list are used until the new one is in force.
        let mut used = self.used_classes();
        for (net, tier) in tiers {
            let class = plan.class_of(tier, &used).ok_or_else(|| no_class(net))?;
            used[class as usize] = true;
            let before = wanted.insert(net.trunc(), class);
            if let Some(before) = before.filter(|before| *before != class) {
                let name = |class| plan.tier(class).map_or_else(String::new, |tier| tier.to_string());
                let (first, second) = (name(before), name(class));
                return Err(Error::Conflict { selector: net.trunc().to_string(), first, second });
            }
            if wanted.len() > self.tier_capacity() as usize {
                return Err(self.full(core, net.to_string()));
            }
        }
        let mut change = Change::default();
        for (net, class) in &wanted {
            match self.tiers.get(net) {
                None => change.added += 1,
                Some((old, _)) if old == class => change.kept += 1,
                Some(_) => change.changed += 1,
            }
        }
        change.removed = self.tiers.len() - change.kept - change.changed;
        let wanted: Vec<_> = wanted.into_iter().collect();
        self.put_tiers(core, plan, &wanted)?;
        Ok(change)
    }

    pub(super) fn put_tiers(&mut self, core: &StageCore, mut plan: Plan, tiers: &[(IpNet, u32)]) -> Result<()> {
        plan.encode()?;
        self.wait(core)?;
        let used: BTreeSet<_> =
            tiers.iter().map(|(_, class)| *class as usize).filter(|at| *at < EXEMPT as usize).collect();
        for class in used.into_iter().filter(|class| plan.classes[*class] != self.plan.classes[*class]) {
            counts::begin_class(core, class)?;
        }
        let roots = build(core, &mut self.table, tiers)?;
        let bank = plan.policy.tier_bank ^ 1;
        for number in 0..self.tier_capacity() {
            let new = tiers.get(number as usize).map_or_else(Record::default, |(net, class)| record(*net, *class));
            self.tier_records.write(self.record_at(bank, number), &new);
        }
        plan.policy.roots = [roots.0.line(), roots.1.line()];
        plan.policy.tiers = u32::from(!tiers.is_empty());
        plan.policy.tier_bank = bank;
        if let Err(error) = self.put(core, plan) {
            self.table.free(roots.0);
            self.table.free(roots.1);
            return Err(error);
        }
        let old = std::mem::replace(&mut self.roots, roots);
        self.table.free(old.0);
        self.table.free(old.1);
        self.tiers = tiers.iter().zip(0..).map(|((net, class), number)| (*net, (*class, number))).collect();
        self.free = (tiers.len() as u32..self.tier_capacity()).rev().collect();
        self.forget_unused(core);
        Ok(())
    }
}

type Roots = (lpm::Root<ipnet::Ipv4Net>, lpm::Root<ipnet::Ipv6Net>);

fn no_class(net: IpNet) -> Error {
    Error::Full { map: "limits".into(), capacity: EXEMPT - 1, entry: format!("{net}, with a limit of its own") }
}

/// The limit that a class stands for.
impl From<Limit> for Tier {
    fn from(limit: Limit) -> Self {
        Self::Limited(limit)
    }
}
