//! One next-hop table that is kept right: its links, its entries, its lease.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use super::{
    egress::{Transmit, leaving},
    link_map::LinkMap,
    links::LinkTable,
    neighbours::{Neighbours, Place},
    requests::Requests,
    routes::next_hops_of,
};
use crate::{
    abi::next_hop::{NEXT_HOP_CLAIMED, NEXT_HOP_LEAVING, NEXT_HOP_USED, NEXT_HOPS, NextHopKey, mac_word},
    base::{Hop, NextHops},
    sys::grace::GracePeriod,
};

/// How long the table is vouched for, each time.
const LEASE: Duration = Duration::from_millis(500);
/// How often the whole table is looked at, whether or not programs say that they have made entries.
const SCAN: Duration = Duration::from_secs(1);
/// Generations follow each other no faster, and no slower.
const GENERATION_LEAST: Duration = Duration::from_millis(500);
const GENERATION_MOST: Duration = Duration::from_secs(60);
/// Entries that were last used longer ago than this leave, and the shortest interval of doing so.
const UNUSED: Duration = Duration::from_secs(60);
const LEAVE: Duration = Duration::from_secs(60);
/// Asking for the routes to all addresses that are wanted takes at most this part of the time, however often routes change:
/// where a packet goes that comes first, its program asks.
const SHARE: u32 = 20;

/// What there is to fill tables with.
#[derive(Debug)]
pub(super) struct Around<'a> {
    pub(super) links: &'a LinkTable,
    pub(super) neighbours: &'a Neighbours,
    pub(super) now: Instant,
    /// The kernel's tick counter, and its ticks in a second.
    pub(super) jiffies: u64,
    pub(super) hertz: u32,
}

impl Around<'_> {
    fn ticks(&self, time: Duration) -> u64 {
        time.as_millis() as u64 * u64::from(self.hertz) / 1000
    }
}

/// Neighbours that something uses, and whether a bridge has yet to learn where they are.
pub(super) type Uses = BTreeMap<Place, bool>;

/// A table that somebody serves programs with.
#[derive(Debug)]
pub(super) struct Served {
    table: Weak<NextHops>,
    /// Programs go on with it when nobody has it any more.
    pinned: bool,
    transmit: Transmit,
    links: LinkMap,
    links_are_old: bool,
    used: BTreeMap<u32, NextHopKey>,
    /// What is to be resolved whether or not a program asks, in which version, and its entries.
    wanted: Vec<IpAddr>,
    version: u64,
    wanted_are_old: bool,
    /// The kernel is not asked for their routes before this.
    ask_for_routes: Instant,
    kept: BTreeSet<u32>,
    made_by_programs: u32,
    scanned: Option<Instant>,
    raised: Option<Instant>,
    /// Flows and backends are to choose again.
    due: bool,
    claimed: BTreeMap<u32, Instant>,
    departure: Option<Departure>,
    departed: Instant,
}

/// Entries that leave together.
#[derive(Debug)]
struct Departure {
    numbers: Vec<u32>,
    /// In which they were found last.
    generation: u32,
    waited: bool,
}

impl Served {
    pub(super) fn new(table: &Arc<NextHops>, now: Instant) -> io::Result<Self> {
        Ok(Self {
            table: Arc::downgrade(table),
            pinned: table.is_pinned(),
            transmit: transmit_of(table),
            links: LinkMap::of(table)?,
            links_are_old: true,
            used: BTreeMap::new(),
            wanted: Vec::new(),
            version: 0,
            wanted_are_old: false,
            ask_for_routes: now,
            kept: BTreeSet::new(),
            made_by_programs: 0,
            scanned: None,
            raised: None,
            due: true,
            claimed: BTreeMap::new(),
            departure: None,
            departed: now,
        })
    }

    pub(super) fn is(&self, table: &Arc<NextHops>) -> bool {
        std::ptr::eq(self.table.as_ptr(), Arc::as_ptr(table))
    }

    pub(super) fn is_alive(&self) -> bool {
        self.table.strong_count() > 0
    }

    /// The neighbours that programs go on with when nobody has the table any more.
    pub(super) fn left_to_programs(&self) -> impl Iterator<Item = Place> {
        self.used.values().filter(|_| self.pinned).map(|key| (key.interface, key.address))
    }

    /// Interfaces have changed.
    pub(super) fn links_changed(&mut self) {
        self.links_are_old = true;
        self.due = true;
    }

    /// Something has changed by which packets are routed.
    pub(super) fn routes_changed(&mut self) {
        self.due = true;
    }

    /// Whether there is more to do than to renew the lease.
    pub(super) fn is_busy(&self, around: &Around<'_>) -> bool {
        self.table.upgrade().is_some_and(|table| {
            self.links_are_old
                || self.departure.as_ref().is_some_and(|departure| departure.generation != table.generation())
                || self.asks_for_routes(around)
                || self.raises_generation(&table, around)
                || table.made_by_programs() != self.made_by_programs
                || table.is_wanted_since(self.version)
                || table.is_pinned() != self.pinned
                || transmit_of(&table) != self.transmit
        })
    }

    fn asks_for_routes(&self, around: &Around<'_>) -> bool {
        self.wanted_are_old && around.now >= self.ask_for_routes
    }

    fn raises_generation(&self, table: &NextHops, around: &Around<'_>) -> bool {
        // A generation that was chosen in before the lease had lapsed may be of any age.
        let lapsed = around.jiffies >= table.lease();
        let Some(raised) = self.raised else { return true };
        let age = around.now - raised;
        lapsed || age >= GENERATION_MOST || self.due && age >= GENERATION_LEAST
    }

    /// Vouches for the table as it is.
    pub(super) fn renew_lease(&self, around: &Around<'_>) {
        if let Some(table) = self.table.upgrade() {
            table.renew_lease(around.jiffies + around.ticks(LEASE));
        }
    }

    /// Does what is to be done now, and adds the neighbours that the table's entries use. After an error, the table is not
    /// vouched for until the next time.
    pub(super) fn refresh(
        &mut self,
        around: &Around<'_>,
        requests: &mut Requests,
        grace: &GracePeriod,
        uses: &mut Uses,
    ) -> io::Result<()> {
        let Some(table) = self.table.upgrade() else { return Ok(()) };
        self.pinned = table.is_pinned();
        if transmit_of(&table) != self.transmit {
            self.transmit = transmit_of(&table);
            self.links_changed();
        }
        if self.links_are_old {
            self.links.write(&table, around.links, self.transmit)?;
            self.links_are_old = false;
        }
        let raises = self.raises_generation(&table, around);
        self.wanted_are_old |= raises;
        if let Some(wanted) = table.wanted_since(self.version) {
            (self.wanted, self.version) = (wanted.addresses, wanted.version);
            (self.wanted_are_old, self.ask_for_routes) = (true, around.now);
        }
        if self.asks_for_routes(around) {
            let start = Instant::now();
            self.resolve_wanted(&table, around, requests)?;
            (self.wanted_are_old, self.ask_for_routes) = (false, around.now + start.elapsed() * SHARE);
        }
        self.scan(&table, around);
        self.write_hops(&table, around, uses);
        if raises {
            table.raise_generation();
            (self.raised, self.due) = (Some(around.now), false);
        }
        self.depart(&table, grace)?;
        self.renew_lease(around);
        Ok(())
    }

    /// Has an entry for the next hop of every address that is wanted.
    fn resolve_wanted(&mut self, table: &NextHops, around: &Around<'_>, requests: &mut Requests) -> io::Result<()> {
        self.kept.clear();
        for address in &self.wanted {
            for key in next_hops_of(*address, around.links, requests)? {
                if let Some(number) = table.find_or_make(&key, around.jiffies as u32) {
                    self.kept.insert(number);
                    self.used.insert(number, key);
                }
            }
        }
        Ok(())
    }

    /// Looks for entries that programs have made, and for those that nobody uses any more.
    fn scan(&mut self, table: &NextHops, around: &Around<'_>) {
        let made_by_programs = table.made_by_programs();
        let recent = self.scanned.is_some_and(|scanned| around.now - scanned < SCAN);
        if recent && made_by_programs == self.made_by_programs {
            return;
        }
        self.made_by_programs = made_by_programs;
        self.scanned = Some(around.now);
        self.used.clear();
        let (mut leave, mut left) = (Vec::new(), Vec::new());
        let mut claimed = BTreeMap::new();
        let unused = around.ticks(UNUSED);
        for number in 1..NEXT_HOPS {
            let (state, last_used) = table.state(number);
            match state {
                NEXT_HOP_USED => {
                    let idle = (around.jiffies as u32).wrapping_sub(last_used);
                    // What was used after the counter was read is in the future.
                    if idle as i32 > unused as i32 && !self.kept.contains(&number) {
                        leave.push(number);
                    }
                    self.used.extend(table.key(number).map(|key| (number, key)));
                }
                NEXT_HOP_CLAIMED => {
                    let since = *self.claimed.get(&number).unwrap_or(&around.now);
                    claimed.insert(number, since);
                    if around.now - since >= SCAN {
                        leave.push(number);
                    }
                }
                NEXT_HOP_LEAVING => left.push(number),
                _ => {}
            }
        }
        self.claimed = claimed;
        if self.departure.is_none() && around.now - self.departed >= LEAVE {
            self.departed = around.now;
            leave.retain(|number| table.leave(*number));
            self.used.retain(|number, _| !leave.contains(number));
            // Some may be there since a resolver has ended in the middle of this.
            leave.extend(left);
            if !leave.is_empty() {
                self.departure = Some(Departure { numbers: leave, generation: table.generation(), waited: false });
                self.due = true;
            }
        }
    }

    /// Frees entries that have left, once nobody can have them any more.
    fn depart(&mut self, table: &NextHops, grace: &GracePeriod) -> io::Result<()> {
        let Some(departure) = &mut self.departure else { return Ok(()) };
        // Programs that have much to choose again go by the generation before for a while: one is not enough.
        if departure.generation == table.generation() {
            return Ok(());
        }
        if departure.waited {
            grace.wait()?;
            departure.numbers.iter().for_each(|number| table.free(*number));
            self.departure = None;
        } else {
            (departure.generation, departure.waited) = (table.generation(), true);
        }
        Ok(())
    }

    /// Brings every entry in use up to date.
    fn write_hops(&mut self, table: &NextHops, around: &Around<'_>, uses: &mut Uses) {
        for (number, key) in &self.used {
            let (hop, unlearnt) = hop_of(key, around, self.transmit);
            let before = table.hop(*number);
            if hop != before {
                table.set_hop(*number, hop);
                let moved = |before: u64, now: u64| before != 0 && now != 0 && before != now;
                self.due |= moved(before.to, hop.to);
                self.due |= moved(before.egress & u64::from(u32::MAX), hop.egress & u64::from(u32::MAX));
            }
            *uses.entry((key.interface, key.address)).or_default() |= unlearnt;
        }
    }
}

fn transmit_of(table: &NextHops) -> Transmit {
    if table.is_generic() { Transmit::Generic } else { Transmit::Native }
}

fn hop_of(key: &NextHopKey, around: &Around<'_>, transmit: Transmit) -> (Hop, bool) {
    let Some(link) = around.links.get(key.interface) else { return (Hop::default(), false) };
    let mac = around.neighbours.get((key.interface, key.address)).and_then(|neighbour| neighbour.mac);
    // Where it is not known, bridges on the path know nothing of it.
    let leaving = leaving(around.links, around.neighbours, key.interface, Some(mac.unwrap_or_default()), transmit);
    let hop = Hop {
        to: mac_word(mac.unwrap_or_default()),
        from: mac_word(link.mac.unwrap_or_default()),
        egress: leaving.egress.word(),
    };
    (hop, leaving.unlearnt && mac.is_some())
}

#[cfg(test)]
mod tests {
    //! These need root.

    use super::*;
    use crate::{abi::next_hop::NEXT_HOP_FREE, base::next_hops};

    const HERTZ: u32 = 100;
    /// Not long after a boot.
    const START: u64 = (1 << 32) - 30_000;

    struct Bed {
        table: Arc<NextHops>,
        served: Served,
        links: LinkTable,
        requests: Requests,
        grace: GracePeriod,
        start: Instant,
    }

    impl Bed {
        fn new(links: LinkTable) -> Self {
            let table = Arc::new(next_hops());
            let start = Instant::now();
            let served = Served::new(&table, start).unwrap();
            Self {
                table,
                served,
                links,
                requests: Requests::open().unwrap(),
                grace: GracePeriod::new().unwrap(),
                start,
            }
        }

        /// What happens this number of milliseconds after the start.
        fn at(&mut self, milliseconds: u32) -> Uses {
            let around = Around {
                links: &self.links,
                neighbours: &Neighbours::default(),
                now: self.start + Duration::from_millis(milliseconds.into()),
                jiffies: START + u64::from(milliseconds / (1000 / HERTZ)),
                hertz: HERTZ,
            };
            let mut uses = Uses::new();
            self.served.refresh(&around, &mut self.requests, &self.grace, &mut uses).unwrap();
            uses
        }
    }

    fn key() -> NextHopKey {
        NextHopKey { interface: 7, address: IpAddr::from([192, 0, 2, 1]), mtu: 1500 }
    }

    #[test]
    fn an_entry_that_nobody_uses_is_free_when_two_generations_have_passed() {
        let mut bed = Bed::new(LinkTable::default());
        let number = bed.table.find_or_make(&key(), START as u32).unwrap();
        bed.at(0);
        // Once a minute at most: what is in use then is looked at a minute later.
        let last = bed.table.find_or_make(&key(), START as u32).unwrap();
        assert_eq!(bed.at(60_000).len(), 1, "not longer than a minute ago");
        assert_eq!((last, bed.table.state(number).0), (number, NEXT_HOP_USED));
        let generation = bed.table.generation();
        assert!(bed.at(121_000).is_empty());
        assert_eq!(bed.table.state(number).0, NEXT_HOP_LEAVING);
        assert_ne!(bed.table.generation(), generation);
        bed.at(121_100);
        bed.at(121_400);
        assert_eq!(bed.table.state(number).0, NEXT_HOP_LEAVING, "programs may go by the generation before");
        bed.at(181_000);
        bed.at(181_100);
        assert_eq!(bed.table.state(number).0, NEXT_HOP_FREE);
    }

    #[test]
    fn entries_that_a_resolver_left_behind_are_freed() {
        let mut bed = Bed::new(LinkTable::default());
        let leaving = bed.table.find_or_make(&key(), START as u32).unwrap();
        bed.table.leave(leaving);
        let claimed = bed.table.find_or_make(&key(), START as u32).unwrap();
        bed.table.leave(claimed);
        bed.table.claim_as_if_to_free(claimed);
        bed.at(0);
        for at in [59_000, 60_500, 61_600, 61_700, 61_800, 122_000, 122_100, 183_000, 183_100] {
            bed.at(at);
        }
        assert_eq!([leaving, claimed].map(|number| bed.table.state(number).0), [NEXT_HOP_FREE; 2]);
    }

    #[test]
    fn generations_keep_a_distance_while_much_changes() {
        let mut bed = Bed::new(LinkTable::default());
        bed.at(0);
        let first = bed.table.generation();
        for at in (100..=1000).step_by(100) {
            bed.served.routes_changed();
            bed.at(at);
        }
        assert_eq!(bed.table.generation(), first + 2);
        bed.at(1600);
        let quiet = bed.table.generation();
        for at in (1700..61_600).step_by(300) {
            bed.at(at);
        }
        assert_eq!(bed.table.generation(), quiet, "nothing has changed");
        bed.at(61_600);
        assert_eq!(bed.table.generation(), quiet + 1, "but a minute has passed");
    }

    #[test]
    fn a_lease_that_has_lapsed_begins_with_a_generation() {
        let mut bed = Bed::new(LinkTable::default());
        bed.at(0);
        let generation = bed.table.generation();
        assert_eq!(bed.table.lease(), START + u64::from(HERTZ / 2));
        bed.at(490);
        assert_eq!((bed.table.generation(), bed.table.lease()), (generation, START + 49 + u64::from(HERTZ / 2)));
        bed.at(2000);
        assert_eq!(bed.table.generation(), generation + 1);
    }
}
