//! What is in force: limits by class and scope, and the tiers; and every change to them.
//!
//! Policy and limits stand in two banks. A change of limits is written to the one that is not in force, and put in force
//! by one store; each packet goes by one of them. Tiers are edited in place, a word at a time; a new list of
//! them is built aside and comes with its policy.

pub(super) mod counts;
mod tiers;

use std::{collections::BTreeMap, io, mem::offset_of};

use bytemuck::Zeroable;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::{Limit, Meter, Rate, Scope, TableFull, config::Sizes};
use crate::{
    Error, Result,
    abi::rate_limiter::{
        CLASSES, EXEMPT, FULL_PASS, FULL_SHARE, LIMIT_EVENTS, LIMIT_SHARED, LIMITS, Limit as Encoded, METERS, Policy,
        RECORD_EVENTS, RECORD_SCOPES, RECORD_SHARED, Record, SCOPES, Shared, Tier,
    },
    base::{Records, StageCore},
    lpm::{Root, Table},
    sys::{grace::GracePeriod, mmap::Mapping},
};

/// The class of sources that no tier is about.
pub(super) const NO_TIER: usize = 0;

/// Of both families, of the tiers in force and of those that are built beside them.
const ROOTS: u32 = 4;

/// All that limits are made of.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) policy: Policy,
    pub(super) scopes: [Option<(Scope, Limit)>; SCOPES],
    /// The limit of a tier's class, in the place of each scope's.
    classes: [Option<Limit>; CLASSES],
    share: Rate,
    events: u32,
}

impl Plan {
    /// What a class is limited to in a scope.
    pub(super) fn limit(&self, class: usize, scope: usize) -> Option<Limit> {
        let (_, own) = self.scopes[scope]?;
        if class == NO_TIER { Some(own) } else { self.classes[class] }
    }

    pub(super) fn full(&self) -> TableFull {
        match self.policy.full {
            FULL_PASS => TableFull::Pass,
            FULL_SHARE => TableFull::Share(self.share),
            _ => TableFull::Drop,
        }
    }

    pub(super) fn slot_of(&self, scope: Scope) -> Option<usize> {
        self.scopes.iter().position(|used| used.is_some_and(|(used, _)| used == scope))
    }

    /// Fills in what follows from the scopes, and answers all limits.
    fn encode(&mut self) -> Result<Vec<Encoded>> {
        let tick = self.policy.tick;
        let mut limits = vec![Encoded::zeroed(); LIMITS];
        self.policy.meters = 0;
        self.policy.scope = Zeroable::zeroed();
        self.policy.scopes = self.scopes.iter().rposition(Option::is_some).map_or(0, |at| at as u32 + 1);
        for (slot, scope) in self.scopes.iter().enumerate().filter_map(|(slot, scope)| Some((slot, (*scope)?.0))) {
            self.policy.scope[slot] = scope.encode()?;
            for class in 0..CLASSES {
                let Some(limit) = self.limit(class, slot) else { continue };
                let at = (class * SCOPES + slot) * METERS;
                for meter in Meter::ALL {
                    let Some(encoded) = limit.encode(meter, tick)? else { continue };
                    self.policy.meters |= 1 << meter as u32;
                    limits[at + meter as usize] = encoded;
                    if self.policy.ban != 0 {
                        let excess = limit.encode_excess(meter, self.policy.ban_factor, tick)?;
                        limits[at + 2 + meter as usize] = excess.unwrap_or_default();
                    }
                }
            }
        }
        self.policy.single = match (self.policy.scopes, self.policy.meters) {
            (1, meters @ (1 | 2)) => meters,
            _ => 0,
        };
        self.policy.only = limits[self.policy.single.saturating_sub(1) as usize];
        limits[LIMIT_SHARED] = self.share.encode(Meter::Packets, tick)?;
        if self.events > 0 {
            limits[LIMIT_EVENTS] = Rate::per_second(self.events.into()).encode(Meter::Packets, 1 << 62)?;
        }
        Ok(limits)
    }

    fn records(&self) -> Vec<Record> {
        let mut records: Vec<_> =
            self.classes.iter().map(|limit| limit.map_or_else(Record::default, Limit::to_record)).collect();
        let of_scope =
            |scope: &Option<(Scope, Limit)>| scope.map_or_else(Record::default, |(_, limit)| limit.to_record());
        records.extend(self.scopes.iter().map(of_scope));
        records.push(Limit::packets(self.share).to_record());
        records.push(Record { amount: [self.events.into(), 0], ..Record::default() });
        records
    }
}

#[derive(Debug)]
pub(super) struct Book {
    pub(super) plan: Plan,
    bank: u32,
    policies: Records<Policy>,
    limits: Records<Encoded>,
    shared: Records<Shared>,
    records: Records<Record>,
    tier_records: Records<Tier>,
    table: Table<Mapping>,
    roots: (Root<Ipv4Net>, Root<Ipv6Net>),
    /// By prefix: the class, and the number of the record.
    tiers: BTreeMap<IpNet, (u32, u32)>,
    /// Numbers of records that are not used, in the bank in force.
    free: Vec<u32>,
    grace: Option<GracePeriod>,
}

impl Book {
    /// Over new tables.
    pub(super) fn create(
        core: &StageCore,
        sizes: &Sizes,
        limits: &[(Scope, Limit)],
        share: Rate,
        events: u32,
    ) -> Result<Self> {
        let mut plan = Plan { policy: sizes.policy, scopes: [None; SCOPES], classes: [None; CLASSES], share, events };
        for (scope, limit) in limits {
            let slot = plan.slot_of(*scope).or_else(|| plan.scopes.iter().position(Option::is_none));
            plan.scopes[slot.expect("as many as there may be")] = Some((*scope, *limit));
        }
        let mut table = Table::with_roots(Mapping::new(core.map("lpm_lines"))?, ROOTS);
        let roots = build(core, &mut table, &[])?;
        plan.policy.roots = [roots.0.line(), roots.1.line()];
        let mut book = Self::over(core, plan, table, roots)?;
        book.free = (0..book.tier_capacity()).rev().collect();
        let plan = book.plan.clone();
        book.put(core, plan)?;
        Ok(book)
    }

    /// Over tables that an earlier process has left. What it was at is finished or undone: the records decide.
    pub(super) fn adopt(core: &StageCore) -> Result<Self> {
        let bank = Records::<Shared>::of(core, "shared")?.read(0).in_force & 1;
        let policy = Records::<Policy>::of(core, "policies")?.read(bank);
        let records = Records::<Record>::of(core, "records")?;
        let limit = |at: usize| Limit::of_record(&records.read(at as u32));
        let share = limit(RECORD_SHARED).and_then(|limit| limit.rate(Meter::Packets));
        let plan = Plan {
            policy,
            scopes: std::array::from_fn(|at| {
                let scope = Scope::decode(policy.scope[at])?;
                let whole = limit(RECORD_SCOPES + at).map(|limit| (scope, limit));
                if whole.is_none() && at < policy.scopes as usize {
                    core.dropped(format!("the limit of {scope}: its record is not whole"));
                }
                whole
            }),
            classes: std::array::from_fn(limit),
            share: share.unwrap_or(Rate::per_second(10_000)),
            events: u32::try_from(records.read(RECORD_EVENTS as u32).amount[0]).unwrap_or(0),
        };
        let roots = (Root::at(policy.roots[0]), Root::at(policy.roots[1]));
        let mut table = Table::with_roots(Mapping::new(core.map("lpm_lines"))?, ROOTS);
        let damaged = table.adopt_what_is_whole(roots.0) + table.adopt_what_is_whole(roots.1);
        if damaged > 0 {
            core.rebuilt(format!("the table of the tiers, of which {damaged} nodes were damaged"));
        }
        let mut book = Self::over(core, plan, table, roots)?;
        book.bank = bank;
        book.load_tiers(core);
        // A change may have been half done: what the records say is built anew.
        let tiers: Vec<_> = book.tiers.iter().map(|(net, (class, _))| (*net, *class)).collect();
        let plan = book.plan.clone();
        match book.put_tiers(core, plan.clone(), &tiers) {
            // Larger tables have no old one.
            Err(error) if core.is_grown() => return Err(error),
            // No room for both: the old table is right but for a change that was cut short.
            Err(Error::Full { .. }) if damaged == 0 => book.put(core, plan)?,
            Err(Error::Full { .. }) => {
                // Sources have no tier until there is room.
                book.put_tiers(core, plan.clone(), &[])?;
                book.wait(core)?;
                book.put_tiers(core, plan, &tiers)?;
            }
            done => done?,
        }
        Ok(book)
    }

    fn over(
        core: &StageCore,
        plan: Plan,
        table: Table<Mapping>,
        roots: (Root<Ipv4Net>, Root<Ipv6Net>),
    ) -> Result<Self> {
        Ok(Self {
            plan,
            bank: 1,
            policies: Records::of(core, "policies")?,
            limits: Records::of(core, "limits")?,
            shared: Records::of(core, "shared")?,
            records: Records::of(core, "records")?,
            tier_records: Records::of(core, "tiers")?,
            table,
            roots,
            tiers: BTreeMap::new(),
            free: Vec::new(),
            grace: None,
        })
    }

    /// Puts a plan in force, or leaves everything as it is.
    pub(super) fn put(&mut self, core: &StageCore, mut plan: Plan) -> Result<()> {
        let limits = plan.encode()?;
        // Packets may still go by the bank that was left last time.
        self.wait(core)?;
        let bank = self.bank ^ 1;
        for (at, limit) in limits.iter().enumerate() {
            self.limits.write(bank * LIMITS as u32 + at as u32, limit);
        }
        self.policies.write(bank, &plan.policy);
        for (at, record) in plan.records().iter().enumerate() {
            self.records.write(at as u32, record);
        }
        self.shared.set(0, offset_of!(Shared, in_force), bank);
        self.bank = bank;
        self.plan = plan;
        Ok(())
    }

    /// Sets a word of the policy in force.
    pub(super) fn set(&mut self, offset: usize, word: u32) {
        self.policies.set(self.bank, offset, word);
        self.plan.policy = self.policies.read(self.bank);
    }

    /// `forget` is told the place of a scope that was not limited: another one may have had it, and nobody uses it now.
    pub(super) fn set_limit(
        &mut self,
        core: &StageCore,
        scope: Scope,
        limit: Limit,
        forget: impl FnOnce(usize),
    ) -> Result<Option<Limit>> {
        let mut plan = self.plan.clone();
        let Some(slot) = plan.slot_of(scope).or_else(|| plan.scopes.iter().position(Option::is_none)) else {
            let entry = scope.to_string();
            return Err(Error::Full { map: "policies".into(), capacity: SCOPES as u32, entry });
        };
        let before = plan.scopes[slot].replace((scope, limit)).map(|(_, limit)| limit);
        plan.encode()?;
        if before.is_none() {
            self.wait(core)?;
            counts::begin_scope(core, slot)?;
            forget(slot);
        }
        self.put(core, plan)?;
        Ok(before)
    }

    pub(super) fn remove_limit(&mut self, core: &StageCore, scope: Scope) -> Result<Option<Limit>> {
        let mut plan = self.plan.clone();
        let Some(slot) = plan.slot_of(scope) else { return Ok(None) };
        let before = plan.scopes[slot].take().map(|(_, limit)| limit);
        self.put(core, plan)?;
        Ok(before)
    }

    /// `factor` and time in ns; 0 for no bans.
    pub(super) fn set_ban(&mut self, core: &StageCore, factor: u32, time: u64) -> Result<()> {
        let mut plan = self.plan.clone();
        (plan.policy.ban_factor, plan.policy.ban) = (factor, time);
        self.put(core, plan)
    }

    /// Brings what can change to a configuration; `forget` as in [`Book::set_limit`]. No limits: those that there are stay.
    pub(super) fn configure(
        &mut self,
        core: &StageCore,
        wanted: &Policy,
        limits: &[(Scope, Limit)],
        (share, events): (Rate, u32),
        forget: impl Fn(usize),
    ) -> Result<()> {
        let mut plan = Plan { share, events, ..self.plan.clone() };
        plan.policy = Policy {
            count_only: wanted.count_only,
            unsupported: wanted.unsupported,
            neighbours: wanted.neighbours,
            full: wanted.full,
            events: wanted.events,
            protect: wanted.protect,
            ban: wanted.ban,
            ban_factor: wanted.ban_factor,
            ..plan.policy
        };
        let mut new = Vec::new();
        if !limits.is_empty() {
            for scope in &mut plan.scopes {
                if scope.is_some_and(|(scope, _)| limits.iter().all(|(wanted, _)| *wanted != scope)) {
                    *scope = None;
                }
            }
            let kept = Plan { scopes: plan.scopes, ..self.plan.clone() };
            for (scope, limit) in limits {
                let unused = |at: &usize| plan.scopes[*at].is_none();
                // A place that no packet is charged in, if there is one.
                let free = (0..SCOPES).find(|at| unused(at) && self.plan.scopes[*at].is_none());
                let at = plan.slot_of(*scope).or(free).or_else(|| (0..SCOPES).find(unused));
                let at = at.expect("a configuration has at most as many");
                if kept.scopes[at].is_none() {
                    new.push(at);
                }
                plan.scopes[at] = Some((*scope, *limit));
            }
            plan.clone().encode()?;
            if new.iter().any(|at| self.plan.scopes[*at].is_some()) {
                self.put(core, kept)?;
            }
        }
        plan.clone().encode()?;
        if !new.is_empty() {
            self.wait(core)?;
            for at in new {
                counts::begin_scope(core, at)?;
                forget(at);
            }
        }
        self.put(core, plan)
    }

    /// Waits until no packet goes by what was in force before, and makes use of what that frees.
    pub(super) fn wait(&mut self, core: &StageCore) -> Result<()> {
        let fail = |source: io::Error| core.map("policies").error("wait for a grace period", source);
        let grace = match self.grace.take() {
            Some(grace) => grace,
            None => GracePeriod::new().map_err(fail)?,
        };
        grace.wait().map_err(fail)?;
        self.grace = Some(grace);
        self.table.release();
        Ok(())
    }
}

/// Begins a new table of tiers, which are built into it from their records.
pub(super) fn begin_tiers(core: &StageCore) -> Result<()> {
    let mut table = Table::with_roots(Mapping::new(core.map("lpm_lines"))?, ROOTS);
    let roots = build(core, &mut table, &[])?;
    let policies = Records::<Policy>::of(core, "policies")?;
    for bank in 0..policies.len() {
        policies.write(bank, &Policy { roots: [roots.0.line(), roots.1.line()], ..policies.read(bank) });
    }
    Ok(())
}

/// Builds tables of both families aside.
fn build(
    core: &StageCore,
    table: &mut Table<Mapping>,
    tiers: &[(IpNet, u32)],
) -> Result<(Root<Ipv4Net>, Root<Ipv6Net>)> {
    let full = |_| {
        let map = core.map("lpm_lines");
        let entry = tiers.last().map_or_else(String::new, |(net, _)| net.to_string());
        Error::Full { map: map.name().to_owned(), capacity: map.capacity(), entry }
    };
    let (mut v4, mut v6) = (Vec::new(), Vec::new());
    for (net, class) in tiers {
        match net {
            IpNet::V4(net) => v4.push((*net, tiers::leaf(IpNet::V4(*net), *class))),
            IpNet::V6(net) => v6.push((*net, tiers::leaf(IpNet::V6(*net), *class))),
        }
    }
    // The order in which a table is built: by bits, the shorter first.
    v4.sort_unstable_by_key(|(net, _)| (net.network().octets(), net.prefix_len()));
    v6.sort_unstable_by_key(|(net, _)| (net.network().octets(), net.prefix_len()));
    let root4 = table.build(&v4).map_err(full)?;
    match table.build(&v6) {
        Ok(root6) => Ok((root4, root6)),
        Err(error) => {
            table.free(root4);
            Err(full(error))
        }
    }
}

const _: () = assert!(CLASSES > EXEMPT as usize && offset_of!(Policy, tiers) % 4 == 0);
