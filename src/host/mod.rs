//! What this host is to its networks, followed over rtnetlink: the MAC addresses that frames to it carry, and the next hops
//! that frames leave by.
//!
//! One thread for each network namespace in which chains are attached, as long as one is. The data path goes by what was
//! written last: when the process is gone, addresses that change are not followed any more, and programs look for next hops
//! by themselves once the lease of their table has lapsed.

mod egress;
mod events;
mod features;
mod ingress;
mod link_map;
mod links;
mod neighbours;
mod requests;
mod routes;
#[cfg(test)]
mod stacked_tests;
mod state;
mod table;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    thread,
    time::Duration,
};

use events::{Events, Heard};
use state::State;

use crate::{
    base::{NextHops, OwnMacs},
    sys::wake::{Source, Sources, Tick},
};

/// How often the thread looks whether somebody needs it.
const LOOK: Duration = Duration::from_secs(1);
/// And how often while it serves tables.
const TICK: Duration = Duration::from_millis(100);
/// Changes come in bursts.
const SETTLE: Duration = Duration::from_millis(5);

/// The hosts that are followed, by network namespace (device and inode of its file).
static HOSTS: Mutex<BTreeMap<(u64, u64), Weak<Host>>> = Mutex::new(BTreeMap::new());

/// The VRFs of the calling thread's network namespace, by the indices of their interfaces.
pub(crate) fn vrfs() -> io::Result<Vec<u32>> {
    Ok(requests::Requests::open()?.links()?.vrfs().collect())
}

/// The devices that a program sends by to reach an interface of the calling thread's network namespace: those below a VLAN,
/// the ports of a bridge; else itself.
pub(crate) fn devices_below(interface: u32) -> io::Result<Vec<u32>> {
    Ok(requests::Requests::open()?.links()?.below(interface))
}

/// The host that a network namespace is.
#[derive(Debug)]
pub(crate) struct Host {
    state: Mutex<State>,
    ears: Arc<Ears>,
}

/// What the thread waits for.
#[derive(Debug)]
struct Ears {
    links: Arc<Events>,
    routes: Arc<Events>,
    features: Option<Arc<Events>>,
    tick: Arc<Tick>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Host {
    /// The one of the calling thread's network namespace.
    pub(crate) fn here() -> io::Result<Arc<Self>> {
        let file = fs::metadata("/proc/thread-self/ns/net")?;
        let namespace = (file.dev(), file.ino());
        let mut hosts = lock(&HOSTS);
        hosts.retain(|_, host| host.strong_count() > 0);
        if let Some(host) = hosts.get(&namespace).and_then(Weak::upgrade) {
            return Ok(host);
        }
        let ears = Arc::new(Ears {
            links: Events::of_links()?,
            routes: Events::of_routes()?,
            features: Events::of_features()?,
            tick: Arc::new(Tick::every(LOOK)?),
        });
        let (all, calm) = (ears.sources(true)?, ears.sources(false)?);
        let host = Arc::new(Self { state: Mutex::new(State::open()?), ears });
        let followed = Arc::downgrade(&host);
        let ears = Arc::clone(&host.ears);
        let body = move || follow(&followed, &ears, &all, &calm);
        thread::Builder::new().name("xdpkit-host".into()).spawn(body)?;
        hosts.insert(namespace, Arc::downgrade(&host));
        Ok(host)
    }

    /// Writes the addresses of this interface to all of these, now and whenever they change, as long as somebody else has
    /// them. `configured` are addresses of this host that the kernel does not tell.
    pub(crate) fn follow(&self, interface: u32, configured: &[[u8; 6]], macs: &[Arc<OwnMacs>]) -> io::Result<()> {
        if macs.is_empty() { Ok(()) } else { lock(&self.state).follow(interface, configured, macs) }
    }

    /// From now on, these are what they are before an instance is attached.
    pub(crate) fn forget(&self, macs: &Arc<OwnMacs>) {
        lock(&self.state).forget(macs);
        macs.reset();
    }

    /// Fills a next-hop table, and keeps it right as long as somebody else has it. When this returns, links are written, and
    /// the next hops of addresses that are wanted have entries; their neighbours are being asked for. Once is enough.
    pub(crate) fn serve(&self, table: &Arc<NextHops>) -> io::Result<()> {
        let mut state = lock(&self.state);
        if !state.has_resolver() {
            // What happens while the tables are read is heard of, and told again.
            self.ears.links.add_neighbours()?;
            self.ears.routes.add_routes()?;
        }
        self.ears.tick.set(TICK)?;
        state.serve(table)
    }

    /// Updates everything that what was heard concerns, and returns how long to wait for more at most.
    fn hear(&self, heard: Heard) -> Duration {
        let mut state = lock(&self.state);
        let served = state.has_tables();
        // After an error, tables are not vouched for, and all is tried again.
        let _ = state.hear(heard);
        if served && !state.has_tables() {
            let _ = self.ears.tick.set(LOOK);
        }
        state.patience()
    }
}

impl Ears {
    fn sources(&self, routes: bool) -> io::Result<Sources> {
        let mut sources: Vec<Box<dyn Source>> =
            vec![Box::new(Arc::clone(&self.links)), Box::new(Arc::clone(&self.tick))];
        sources.extend(self.features.iter().map(|features| Box::new(Arc::clone(features)) as Box<dyn Source>));
        if routes {
            sources.push(Box::new(Arc::clone(&self.routes)));
        }
        Sources::new(sources)
    }

    fn take(&self) -> Heard {
        let heard = self.links.take().and(self.routes.take());
        self.features.iter().fold(heard, |heard, features| heard.and(features.take()))
    }
}

fn follow(host: &Weak<Host>, ears: &Ears, all: &Sources, calm: &Sources) {
    let (mut routes_changed, mut patience) = (false, Duration::MAX);
    loop {
        // While a routing daemon writes a full table, every change is of no more interest than the first: they are read with
        // the next tick.
        let sources = if routes_changed { calm } else { all };
        // An error leaves everything as it is until the next look.
        let _ = sources.wait(patience);
        thread::sleep(SETTLE);
        let _ = all.drain();
        let heard = ears.take();
        routes_changed = heard.routes;
        match host.upgrade() {
            Some(host) => patience = host.hear(heard),
            None => return,
        }
    }
}
