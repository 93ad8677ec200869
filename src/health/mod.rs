//! Health checks of backends by TCP and HTTP: feature `health`. One poll loop for all of them, no runtime.

mod check;
mod probe;
mod prober;
mod shared;
mod stats;

use std::{fmt, hash::Hash, sync::Arc};

pub use check::{Health, HealthCheck, Probe};
use shared::Shared;
pub use stats::{HealthStats, Unsent, UnsentReason};

use crate::{Result, address::Unmapped};

/// What became of a check: given to the callback whenever it changes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HealthChange<K> {
    /// The check's key, such as a backend's address.
    pub key: K,
    /// What it is from now on.
    pub health: Health,
    /// What the last probe failed with, when it did.
    pub problem: Option<String>,
}

/// Checks of backends, by keys of the caller's choice. Dropping it ends them all.
///
/// A probe connects as any client would. Ask a NAT balancer's backend at its own address and port. Ask a backend of a
/// DSR balancer for the *VIP*, or a host whose VIP is gone would look well:
/// [`DsrBalancer::set_probe_interface`](crate::DsrBalancer::set_probe_interface) shows the way there. Probes leave with
/// a TTL or hop limit of 255.
///
/// However many checks there are, two threads do the work: one polls the sockets of all probes, one runs the callback.
/// They begin with the first check and end with the last, and are in the network namespace of the thread that inserted
/// it; checks inserted from another namespace have two threads there. At most 8,192 probes are under way at a time in a
/// namespace, and at most half as many as the process may have files open (`RLIMIT_NOFILE`); others wait for their
/// turn.
///
/// **What this host lacks is no fault of a backend's.** A probe that cannot be sent (no descriptor, memory or source
/// port left, or a source address that is not this host's) is repeated: the check stays what it was.
/// [`HealthChecks::stats`] counts such probes, with the reason of the last one.
///
/// **The callback** hears of one change of a namespace's checks at a time. It delays no probe. While it runs, a check
/// may change several times: it then hears of what the check is in the end, if that differs from what it heard last. A
/// callback that panics has missed that change; the checks go on.
///
/// ```no_run
/// use std::time::Duration;
/// use xdpkit::{Health, HealthCheck, HealthChecks};
///
/// # fn main() -> xdpkit::Result<()> {
/// let checks = HealthChecks::new(|change| println!("{}: {}", change.key, change.health));
/// for backend in ["10.0.0.5:8080", "[2001:db8::5]:8080"] {
///     let check = HealthCheck::http(backend.parse().unwrap(), "/health").interval(Duration::from_secs(1));
///     checks.insert(backend, check)?;
/// }
/// # Ok(())
/// # }
/// ```
pub struct HealthChecks<K> {
    shared: Arc<Shared<K>>,
}

impl<K: Clone + Eq + Hash + Send + 'static> HealthChecks<K> {
    /// No checks yet. `on_change` hears of every change; the first result of a check is one, too.
    pub fn new(on_change: impl Fn(HealthChange<K>) + Send + Sync + 'static) -> Self {
        Self { shared: Arc::new(Shared::new(Box::new(on_change))) }
    }

    /// Begins a check, in the network namespace of the calling thread. One that had this key ends, and nothing is heard
    /// of it after this returns, unless this is called by the callback.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) when the check's numbers make no sense;
    /// [`Error::Thread`](crate::Error::Thread) when the first check of a namespace cannot have its threads, or what
    /// they wait with. Nothing has changed then.
    pub fn insert(&self, key: K, mut check: HealthCheck) -> Result<Option<HealthCheck>> {
        check.target = check.target.unmapped();
        check.source = check.source.map(Unmapped::unmapped);
        check.validate()?;
        Shared::insert(&self.shared, key, check)
    }

    /// Ends a check, and answers what it was. Nothing is heard of it after this returns, unless this is called by the
    /// callback.
    pub fn remove(&self, key: &K) -> Option<HealthCheck> {
        self.shared.remove(key)
    }

    /// What a check says at the moment; `None` when there is none of this key.
    pub fn get(&self, key: &K) -> Option<Health> {
        self.shared.lock().entries.get(key).map(|entry| entry.health)
    }

    /// All checks, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (K, HealthCheck, Health)> + use<K> {
        let state = self.shared.lock();
        let all: Vec<_> =
            state.entries.iter().map(|(key, entry)| (key.clone(), entry.check.clone(), entry.health)).collect();
        all.into_iter()
    }

    /// How many checks there are.
    pub fn len(&self) -> usize {
        self.shared.lock().entries.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.shared.lock().entries.is_empty()
    }
}

impl<K> HealthChecks<K> {
    /// What became of all probes so far, and what this host lacked for some.
    pub fn stats(&self) -> HealthStats {
        self.shared.stats()
    }
}

impl<K> Drop for HealthChecks<K> {
    fn drop(&mut self) {
        self.shared.end();
    }
}

impl<K> fmt::Debug for HealthChecks<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HealthChecks").field("len", &self.shared.lock().entries.len()).finish_non_exhaustive()
    }
}
