//! Counts by scope and class, and how they begin anew when another limit takes the place of one that is gone.

use bytemuck::Zeroable as _;

use super::NO_TIER;
use crate::{
    Count, Result,
    abi::rate_limiter::{CLASSES, OWN_SCOPES, SCOPES, ScopeCount},
    base::StageCore,
};

const MAP: &str = "scope_counts";

fn index(class: usize, slot: usize) -> u32 {
    (class * SCOPES + slot) as u32
}

fn sum(cpus: &[ScopeCount]) -> [Count; 2] {
    cpus.iter().fold([Count::default(); 2], |[admitted, refused], cpu| {
        [admitted + cpu.admitted.into(), refused + cpu.refused.into()]
    })
}

/// What all CPUs have counted of the sources without a tier, ever.
fn own(core: &StageCore, slot: usize) -> Result<[Count; 2]> {
    let at = OWN_SCOPES + 2 * slot;
    let cpus = core.counters()?;
    let cpus: Vec<_> = cpus.iter().map(|cpu| ScopeCount { admitted: cpu.own[at], refused: cpu.own[at + 1] }).collect();
    Ok(sum(&cpus))
}

/// What was admitted, and what was refused.
pub(in crate::rate_limiter) fn of(core: &StageCore, class: usize, slot: usize) -> Result<[Count; 2]> {
    let counts = sum(&core.per_cpu::<ScopeCount>(MAP).get(index(class, slot))?);
    if class != NO_TIER {
        return Ok(counts);
    }
    let ([admitted, refused], before) = (own(core, slot)?, counts);
    Ok([admitted.since(&before[0]), refused.since(&before[1])])
}

/// Before a scope takes a place. No packet is counted there meanwhile.
pub(super) fn begin_scope(core: &StageCore, slot: usize) -> Result<()> {
    let [admitted, refused] = own(core, slot)?.map(Into::into);
    set(core, NO_TIER, slot, &ScopeCount { admitted, refused })?;
    (NO_TIER + 1..CLASSES).try_for_each(|class| set(core, class, slot, &ScopeCount::zeroed()))
}

/// Before a class stands for another limit. No source is in it meanwhile.
pub(super) fn begin_class(core: &StageCore, class: usize) -> Result<()> {
    (0..SCOPES).try_for_each(|slot| set(core, class, slot, &ScopeCount::zeroed()))
}

fn set(core: &StageCore, class: usize, slot: usize, counts: &ScopeCount) -> Result<()> {
    let set = core.per_cpu::<ScopeCount>(MAP).set_sum(index(class, slot), counts);
    set.map_err(|error| core.map(MAP).error("begin its counts anew", error))
}
