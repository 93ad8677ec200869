//! Health checks of backends by TCP and HTTP: feature `health`. Threads only, no runtime.

mod check;
mod probe;

use std::{
    collections::HashMap,
    fmt,
    hash::Hash,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use check::Thresholds;
pub use check::{Health, HealthCheck, Probe};

use crate::{Error, Result};

/// A check needs a socket and a little text.
const STACK_BYTES: usize = 128 << 10;

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

/// Checks of backends, each in a thread of its own, by keys of the caller's choice. Dropping it ends them all.
///
/// A probe connects as any client would. Ask a NAT balancer's backend at its own address and port. Ask a backend of a
/// DSR balancer for the *VIP*, or a host whose VIP is gone would look well:
/// [`DsrBalancer::set_probe_interface`](crate::DsrBalancer::set_probe_interface) shows the way there. Probes leave with a
/// TTL or hop limit of 255.
///
/// The callback runs in the check's thread: changes of one key come in order, those of several at the same time.
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
    running: Mutex<HashMap<K, Running>>,
    on_change: Arc<Callback<K>>,
}

type Callback<K> = dyn Fn(HealthChange<K>) + Send + Sync;

/// One check at work.
struct Running {
    check: HealthCheck,
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

/// What a check's thread and its owner both see.
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
}

struct State {
    health: Health,
    stop: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Clone + Eq + Hash + Send + 'static> HealthChecks<K> {
    /// No checks yet. `on_change` hears of every change; the first result of a check is one, too.
    pub fn new(on_change: impl Fn(HealthChange<K>) + Send + Sync + 'static) -> Self {
        Self { running: Mutex::default(), on_change: Arc::new(on_change) }
    }

    /// Begins a check, in the network namespace of the calling thread. One that had this key ends, and nothing is heard
    /// of it after this returns, unless this is called by its own callback.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the check's numbers make no sense; [`Error::Thread`] when there can be no more threads.
    pub fn insert(&self, key: K, check: HealthCheck) -> Result<Option<HealthCheck>> {
        check.validate()?;
        let earlier = self.remove(&key);
        let shared = Arc::new(Shared {
            state: Mutex::new(State { health: Health::Unknown, stop: false }),
            wake: Condvar::new(),
        });
        let work = {
            let (key, check, shared) = (key.clone(), check.clone(), Arc::clone(&shared));
            let on_change = Arc::clone(&self.on_change);
            move || run(&key, &check, &shared, &*on_change)
        };
        let builder = thread::Builder::new().name(format!("health {}", check.target)).stack_size(STACK_BYTES);
        // Held from before it begins, so that its callback finds it.
        let mut running = self.running();
        let thread = builder.spawn(work).map_err(|cause| Error::Thread { purpose: "a health check", cause })?;
        let other = running.insert(key, Running { check, shared, thread });
        // Another thread may have used the key meanwhile. Its end is waited for without the lock.
        drop(running);
        Ok(other.map(Running::end).or(earlier))
    }

    /// Ends a check, and answers what it was. Nothing is heard of it after this returns, unless this is called by its
    /// own callback.
    pub fn remove(&self, key: &K) -> Option<HealthCheck> {
        let running = self.running().remove(key)?;
        Some(running.end())
    }

    /// What a check says at the moment; `None` when there is none of this key.
    pub fn get(&self, key: &K) -> Option<Health> {
        self.running().get(key).map(|running| running.shared.state().health)
    }

    /// All checks, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (K, HealthCheck, Health)> + use<K> {
        let running = self.running();
        let all: Vec<_> = running
            .iter()
            .map(|(key, running)| (key.clone(), running.check.clone(), running.shared.state().health))
            .collect();
        all.into_iter()
    }

    /// How many checks there are.
    pub fn len(&self) -> usize {
        self.running().len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.running().is_empty()
    }
}

impl<K> HealthChecks<K> {
    fn running(&self) -> MutexGuard<'_, HashMap<K, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Running {
    fn end(self) -> HealthCheck {
        self.tell();
        // The callback may end its own check: it cannot wait for itself.
        if self.thread.thread().id() != thread::current().id() {
            // A callback that panicked has said so itself.
            let _ = self.thread.join();
        }
        self.check
    }

    fn tell(&self) {
        self.shared.state().stop = true;
        self.shared.wake.notify_all();
    }
}

impl<K> Drop for HealthChecks<K> {
    fn drop(&mut self) {
        let running: Vec<Running> = self.running().drain().map(|(_, running)| running).collect();
        // First all are told, then waited for: their probes end at the same time.
        running.iter().for_each(Running::tell);
        running.into_iter().for_each(|running| drop(running.end()));
    }
}

impl<K> fmt::Debug for HealthChecks<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HealthChecks").field("len", &self.running().len()).finish_non_exhaustive()
    }
}

fn run<K: Clone>(key: &K, check: &HealthCheck, shared: &Shared, on_change: &Callback<K>) {
    let mut thresholds = Thresholds::new(check);
    loop {
        let outcome = probe::probe(check);
        let problem = outcome.as_ref().err().map(ToString::to_string);
        let changed = thresholds.count(outcome.is_ok());
        {
            let mut state = shared.state();
            if state.stop {
                return;
            }
            state.health = thresholds.health();
        }
        if changed {
            on_change(HealthChange { key: key.clone(), health: thresholds.health(), problem });
        }
        if waits_in_vain(shared, check.interval) {
            return;
        }
    }
}

/// Waits for the time of the next probe; true when there is none.
fn waits_in_vain(shared: &Shared, interval: Duration) -> bool {
    let (state, _) = shared
        .wake
        .wait_timeout_while(shared.state(), interval, |state| !state.stop)
        .unwrap_or_else(PoisonError::into_inner);
    state.stop
}
