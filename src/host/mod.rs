//! What this host is to its networks, followed over rtnetlink: the MAC addresses that frames to it carry.
//!
//! One thread for each network namespace in which chains are attached, as long as one is. The data path goes by what was
//! written last: when the process is gone, addresses that change are not followed any more.

mod links;

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    thread,
    time::Duration,
};

use links::{LinkTable, Requests};

use crate::{
    base::OwnMacs,
    sys::{
        links::Links,
        wake::{Sources, Tick},
    },
};

/// How often the thread looks whether somebody needs it, and reads everything again whatever it has heard.
const LOOK: Duration = Duration::from_secs(1);
/// Changes come in bursts.
const SETTLE: Duration = Duration::from_millis(5);

/// The hosts that are followed, by network namespace (device and inode of its file).
static HOSTS: Mutex<BTreeMap<(u64, u64), Weak<Host>>> = Mutex::new(BTreeMap::new());

/// The host that a network namespace is.
#[derive(Debug)]
pub(crate) struct Host {
    requests: Mutex<Requests>,
    followers: Mutex<Vec<Follower>>,
}

/// Who goes by the addresses of an interface.
#[derive(Debug)]
struct Follower {
    interface: u32,
    configured: Vec<[u8; 6]>,
    macs: Weak<OwnMacs>,
    last: Vec<[u8; 6]>,
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
        let host = Arc::new(Self { requests: Mutex::new(Requests::open()?), followers: Mutex::default() });
        let links = Links::open()?;
        links.listen()?;
        let sources = Sources::new(vec![Box::new(Arc::new(links)), Box::new(Tick::every(LOOK)?)])?;
        let followed = Arc::downgrade(&host);
        thread::Builder::new().name("xdpkit-host".into()).spawn(move || follow(&followed, &sources))?;
        hosts.insert(namespace, Arc::downgrade(&host));
        Ok(host)
    }

    /// Writes the addresses of this interface, now and whenever they change, as long as somebody else has these. `configured`
    /// are ones of this host that the kernel does not tell.
    pub(crate) fn follow(&self, interface: u32, configured: &[[u8; 6]], macs: &Arc<OwnMacs>) -> io::Result<()> {
        let table = lock(&self.requests).links()?;
        let mut follower =
            Follower { interface, configured: configured.to_vec(), macs: Arc::downgrade(macs), last: Vec::new() };
        follower.refresh(&table);
        let mut followers = lock(&self.followers);
        followers.retain(|other| !other.macs.ptr_eq(&follower.macs));
        followers.push(follower);
        Ok(())
    }

    /// From now on, these are what they are before an instance is attached.
    pub(crate) fn forget(&self, macs: &Arc<OwnMacs>) {
        let forgotten = Arc::downgrade(macs);
        lock(&self.followers).retain(|follower| !follower.macs.ptr_eq(&forgotten));
        macs.reset();
    }

    fn refresh(&self) -> io::Result<()> {
        let table = lock(&self.requests).links()?;
        lock(&self.followers).retain_mut(|follower| follower.refresh(&table));
        Ok(())
    }
}

impl Follower {
    /// False when nobody goes by it any more.
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

fn follow(host: &Weak<Host>, sources: &Sources) {
    loop {
        // An error leaves everything as it is until the next look.
        let _ = sources.wait(Duration::MAX);
        thread::sleep(SETTLE);
        let _ = sources.drain();
        match host.upgrade() {
            Some(host) => drop(host.refresh()),
            None => return,
        }
    }
}
