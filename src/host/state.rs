//! What is known of the host, and the instances and tables that are kept up to date with it.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use super::{
    events::Heard,
    links::LinkTable,
    neighbours::{Neighbours, Place, Standing, manage, probe, release},
    requests::Requests,
    table::{Around, Served, Uses},
};
use crate::{
    base::{NextHops, OwnMacs},
    sys::{clock::Clock, grace::GracePeriod},
};

/// How often all is read again, whatever was heard.
const AGAIN: Duration = Duration::from_secs(30);
/// The kernel is asked to see to a neighbour no more often than this.
const ASK: Duration = Duration::from_secs(1);
/// The interval of looking at tables when nothing has changed.
const LOOK: Duration = Duration::from_secs(1);
/// Reading all interfaces takes at most this part of the time, however often they change.
const SHARE: u32 = 10;
/// And is not put off for longer than this.
const PUT_OFF: Duration = Duration::from_millis(500);

/// The host, as it was when it was looked at last.
#[derive(Debug)]
pub(super) struct State {
    requests: Requests,
    links: LinkTable,
    links_are_old: bool,
    /// Not before this.
    look_at_links: Instant,
    looked: Instant,
    followers: Vec<Follower>,
    /// From the first table on.
    resolver: Option<Resolver>,
}

/// What tables need beside links.
#[derive(Debug)]
struct Resolver {
    tables: Vec<Served>,
    neighbours: Neighbours,
    neighbours_are_old: bool,
    /// Something has changed since the tables were looked at last.
    changed: bool,
    tables_looked: Option<Instant>,
    clock: Clock,
    grace: GracePeriod,
    /// Neighbours that the kernel manages because of us.
    managed: BTreeSet<Place>,
    /// When the kernel was asked to see to them.
    asked: BTreeMap<Place, Instant>,
}

/// An instance that is kept up to date with the addresses of an interface.
#[derive(Debug)]
struct Follower {
    interface: u32,
    configured: Vec<[u8; 6]>,
    macs: Weak<OwnMacs>,
    last: Vec<[u8; 6]>,
}

impl State {
    /// In the network namespace of the calling thread.
    pub(super) fn open() -> io::Result<Self> {
        let now = Instant::now();
        Ok(Self {
            requests: Requests::open()?,
            links: LinkTable::default(),
            links_are_old: true,
            look_at_links: now,
            looked: now,
            followers: Vec::new(),
            resolver: None,
        })
    }

    pub(super) fn follow(&mut self, interface: u32, configured: &[[u8; 6]], all: &[Arc<OwnMacs>]) -> io::Result<()> {
        self.read_links()?;
        for macs in all {
            self.forget(macs);
            let mut follower =
                Follower { interface, configured: configured.to_vec(), macs: Arc::downgrade(macs), last: Vec::new() };
            follower.refresh(&self.links);
            self.followers.push(follower);
        }
        Ok(())
    }

    pub(super) fn forget(&mut self, macs: &Arc<OwnMacs>) {
        let forgotten = Arc::downgrade(macs);
        self.followers.retain(|follower| !follower.macs.ptr_eq(&forgotten));
    }

    /// Whether neighbours and routes are heard of.
    pub(super) fn has_resolver(&self) -> bool {
        self.resolver.is_some()
    }

    pub(super) fn has_tables(&self) -> bool {
        self.resolver.as_ref().is_some_and(|resolver| !resolver.tables.is_empty())
    }

    /// Fills a table and keeps it right from now on. Neighbours and routes must be heard of already.
    pub(super) fn serve(&mut self, table: &Arc<NextHops>) -> io::Result<()> {
        let resolver = match &mut self.resolver {
            Some(resolver) => resolver,
            none => none.insert(Resolver::new()?),
        };
        if resolver.tables.iter().any(|served| served.is(table)) {
            return Ok(());
        }
        resolver.tables.push(Served::new(table, Instant::now())?);
        resolver.neighbours_are_old = true;
        self.read_links()?;
        self.refresh_tables()
    }

    /// Updates everything that what was heard concerns.
    pub(super) fn hear(&mut self, heard: Heard) -> io::Result<()> {
        let now = Instant::now();
        let again = now - self.looked >= AGAIN;
        if again {
            self.looked = now;
        }
        self.links_are_old |= heard.links || heard.overrun || again;
        if let Some(resolver) = &mut self.resolver {
            resolver.neighbours_are_old |= heard.overrun || again;
            resolver.changed |= !heard.changes.is_empty();
            heard.changes.into_iter().for_each(|change| resolver.neighbours.apply(change));
            // What has changed and changed back was in between seen by programs.
            if heard.links || heard.routes || heard.overrun {
                resolver.tables.iter_mut().for_each(Served::routes_changed);
            }
        }
        if self.links_are_old && now >= self.look_at_links {
            self.read_links()?;
        }
        self.refresh_tables()
    }

    /// How long there is nothing to do if nothing is heard.
    pub(super) fn patience(&self) -> Duration {
        if self.links_are_old { self.look_at_links.saturating_duration_since(Instant::now()) } else { Duration::MAX }
    }

    fn read_links(&mut self) -> io::Result<()> {
        let start = Instant::now();
        let links = self.requests.links()?;
        self.links_are_old = false;
        self.look_at_links = Instant::now() + (start.elapsed() * SHARE).min(PUT_OFF);
        if links != self.links {
            let bridges = links.has_bridges() && !self.links.has_bridges();
            self.links = links;
            if let Some(resolver) = &mut self.resolver {
                resolver.tables.iter_mut().for_each(Served::links_changed);
                resolver.neighbours_are_old |= bridges;
                resolver.changed = true;
            }
        }
        let links = &self.links;
        self.followers.retain_mut(|follower| follower.refresh(links));
        Ok(())
    }

    fn refresh_tables(&mut self) -> io::Result<()> {
        self.resolver.as_mut().map_or(Ok(()), |resolver| resolver.refresh(&self.links, &mut self.requests))
    }
}

impl Resolver {
    fn new() -> io::Result<Self> {
        Ok(Self {
            tables: Vec::new(),
            neighbours: Neighbours::default(),
            neighbours_are_old: true,
            changed: true,
            tables_looked: None,
            clock: Clock::new().map_err(io::Error::other)?,
            grace: GracePeriod::new()?,
            managed: BTreeSet::new(),
            asked: BTreeMap::new(),
        })
    }

    fn refresh(&mut self, links: &LinkTable, requests: &mut Requests) -> io::Result<()> {
        for served in self.tables.extract_if(.., |served| !served.is_alive()) {
            let left: BTreeSet<_> = served.left_to_programs().collect();
            self.managed.retain(|place| !left.contains(place));
        }
        if self.tables.is_empty() {
            self.see_to(&Uses::new(), links, requests, Instant::now());
            return Ok(());
        }
        if self.neighbours_are_old {
            self.neighbours = Neighbours::of(requests.neighbours(links)?);
            self.neighbours_are_old = false;
            self.changed = true;
        }
        let around = Around {
            links,
            neighbours: &self.neighbours,
            now: Instant::now(),
            jiffies: self.clock.now_whole().map_err(io::Error::other)?,
            hertz: self.clock.hertz(),
        };
        let idle = !self.changed && self.tables_looked.is_some_and(|looked| around.now - looked < LOOK);
        if idle && !self.tables.iter().any(|table| table.is_busy(&around)) {
            self.tables.iter().for_each(|table| table.renew_lease(&around));
            return Ok(());
        }
        let mut uses = Uses::new();
        let mut done = Ok(());
        for table in &mut self.tables {
            // One that fails does not keep the others from going on.
            done = done.and(table.refresh(&around, requests, &self.grace, &mut uses));
        }
        let now = around.now;
        self.see_to(&uses, links, requests, now);
        (self.changed, self.tables_looked) = (done.is_err(), Some(now));
        done
    }

    /// Has the kernel confirm the neighbours that are used, and leave the others alone.
    fn see_to(&mut self, uses: &Uses, links: &LinkTable, requests: &mut Requests, now: Instant) {
        self.asked.retain(|place, asked| uses.contains_key(place) && now - *asked < ASK);
        for (place, unlearnt) in uses {
            if self.asked.contains_key(place) || !links.get(place.0).is_some_and(|link| link.up) {
                continue;
            }
            // What the kernel refuses (the interface may have gone) is asked for again.
            let told = match self.neighbours.get(*place) {
                Some(neighbour) if neighbour.standing == Standing::Fixed => continue,
                Some(neighbour) if neighbour.standing == Standing::Confirmed && neighbour.managed => {
                    if !unlearnt {
                        continue;
                    }
                    probe(requests, *place)
                }
                _ => manage(requests, *place),
            };
            if told.is_ok() {
                self.managed.insert(*place);
            }
            self.asked.insert(*place, now);
        }
        let unused: Vec<Place> = self.managed.iter().filter(|place| !uses.contains_key(place)).copied().collect();
        for place in unused {
            self.managed.remove(&place);
            if self.neighbours.get(place).is_some_and(|neighbour| neighbour.managed) {
                let _ = release(requests, place);
            }
        }
    }
}

impl Drop for State {
    fn drop(&mut self) {
        let Some(resolver) = &mut self.resolver else { return };
        for served in resolver.tables.drain(..) {
            let left: BTreeSet<_> = served.left_to_programs().collect();
            resolver.managed.retain(|place| !left.contains(place));
        }
        resolver.see_to(&Uses::new(), &self.links, &mut self.requests, Instant::now());
    }
}

impl Follower {
    /// False when the instance is gone.
    fn refresh(&mut self, table: &LinkTable) -> bool {
        let Some(macs) = self.macs.upgrade() else { return false };
        let mut now = table.own_macs(self.interface);
        // An interface that is gone takes its programs with it; one that has left keeps what it had.
        if now.is_empty() {
            return true;
        }
        now.extend(self.configured.iter().filter(|mac| !now.contains(mac)).copied().collect::<Vec<_>>());
        if now != self.last {
            macs.set(&now);
            self.last = now;
        }
        true
    }
}
