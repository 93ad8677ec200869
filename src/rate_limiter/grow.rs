//! Larger tables of tiers and bans at adoption.

use std::sync::atomic::Ordering;

use super::{BANNED_UNTIL, ban::Carried, book, config::Sizes};
use crate::{
    Result,
    base::{Sets, Settle, StageCore},
    flow_table::FlowTable,
    sys::mmap::LongMapping,
};

/// Brings larger tables to their sizes. The table of the tiers is built again from their records.
pub(super) fn fit(sets: &Sets<'_>, core: &StageCore, sizes: &Sizes) -> Result<Vec<Settle>> {
    book::begin_tiers(core)?;
    let mut settles: Vec<Settle> = vec![Box::new(announce_bans)];
    if let Some(mut bans) = bans(sets, core, sizes)? {
        bans.carry();
        settles.push(Box::new(move |_| {
            bans.carry();
            Ok(())
        }));
    }
    Ok(settles)
}

fn bans(sets: &Sets<'_>, core: &StageCore, sizes: &Sizes) -> Result<Option<Carried>> {
    let maps = (sets.smaller("bans_lines"), sets.smaller("bans_table"), sets.smaller("ban_addresses"));
    let (Some(lines), Some(header), Some(addresses)) = maps else { return Ok(None) };
    let new = core.create_flow_table("bans", sizes.bans)?;
    let Some(old) = FlowTable::open(LongMapping::new(lines)?, LongMapping::new(header)?) else {
        core.dropped("all bans: their table is not whole");
        return Ok(None);
    };
    let addresses = (LongMapping::new(addresses)?, LongMapping::new(core.map("ban_addresses"))?);
    Ok(Some(Carried::of((old, addresses.0), (new, addresses.1))))
}

/// Until when there are bans, the programs of before may have said since.
fn announce_bans(sets: &Sets<'_>) -> Result<()> {
    let Some(old) = sets.smaller("shared") else { return Ok(()) };
    let (old, new) = (LongMapping::new(old)?, LongMapping::new(sets.larger("shared"))?);
    new.as_ref()[BANNED_UNTIL].fetch_max(old.as_ref()[BANNED_UNTIL].load(Ordering::SeqCst), Ordering::SeqCst);
    Ok(())
}
