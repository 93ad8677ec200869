//! What the owner of health checks, their poll loops and their callbacks share.

use std::{
    collections::{HashMap, VecDeque},
    fs,
    hash::Hash,
    io, mem,
    os::linux::fs::MetadataExt as _,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
};

use mio::{Poll, Waker};

use super::{
    Health, HealthChange, HealthCheck, HealthStats,
    prober::{Change, Command, Owner, Prober, WAKER},
};
use crate::{Error, Result};

type Callback<K> = dyn Fn(HealthChange<K>) + Send + Sync;

/// All of it, behind one lock that nobody holds for long.
pub(super) struct Shared<K> {
    on_change: Box<Callback<K>>,
    state: Mutex<State<K>>,
    /// There is something to tell, or something was told, or workers have ended.
    news: Condvar,
}

pub(super) struct State<K> {
    pub(super) entries: HashMap<K, Entry>,
    workers: HashMap<usize, Worker<K>>,
    /// Of ended workers.
    stats: HealthStats,
    /// The next number of a check or worker.
    next_id: usize,
}

pub(super) struct Entry {
    pub(super) check: HealthCheck,
    pub(super) health: Health,
    problem: Option<String>,
    id: usize,
    worker: usize,
    /// What the callback has heard last.
    told: Health,
    /// It is among what is to be told.
    queued: bool,
}

/// The threads of a network namespace, and what they are given to do. They end when it is gone.
struct Worker<K> {
    namespace: Namespace,
    /// Checks that use it.
    checks: usize,
    waker: Waker,
    commands: Vec<Command<K>>,
    stats: HealthStats,
    /// Changes that the callback has not heard of: keys and numbers of checks.
    queue: VecDeque<(K, usize)>,
    /// The check that the callback is hearing of now.
    telling: Option<usize>,
    prober: JoinHandle<()>,
    teller: JoinHandle<()>,
}

/// Device and inode of a network namespace, which are nobody else's while a thread is in it.
type Namespace = (u64, u64);

impl<K> Shared<K> {
    pub(super) fn new(on_change: Box<Callback<K>>) -> Self {
        let state =
            State { entries: HashMap::new(), workers: HashMap::new(), stats: HealthStats::default(), next_id: 0 };
        Self { on_change, state: Mutex::new(state), news: Condvar::new() }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State<K>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State<K>>) -> MutexGuard<'a, State<K>> {
        self.news.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn stats(&self) -> HealthStats {
        let state = self.lock();
        let mut sum = state.stats.clone();
        state.workers.values().for_each(|worker| sum.add(&worker.stats));
        sum
    }

    /// Ends everything, and waits until it has.
    pub(super) fn end(&self) {
        let mut state = self.lock();
        let called_back = state.is_called_back();
        state.entries.clear();
        let workers = mem::take(&mut state.workers);
        drop(state);
        self.news.notify_all();
        // First all are told, then waited for.
        workers.values().for_each(Worker::wake);
        workers.into_values().for_each(|worker| worker.join(called_back));
    }
}

impl<K: Clone + Eq + Hash + Send + 'static> Shared<K> {
    pub(super) fn insert(this: &Arc<Self>, key: K, check: HealthCheck) -> Result<Option<HealthCheck>> {
        let cannot = |cause| Error::Thread { purpose: "health checks", cause };
        let namespace = namespace().map_err(cannot)?;
        let mut state = this.lock();
        let found = state.workers.iter().find(|(_, worker)| worker.namespace == namespace).map(|(id, _)| *id);
        let worker = match found {
            Some(worker) => worker,
            None => {
                let id = state.number();
                let worker = Worker::start(this, id, namespace).map_err(cannot)?;
                state.workers.insert(id, worker);
                id
            }
        };
        // From here on it stays, whatever is removed meanwhile.
        if let Some(worker) = state.workers.get_mut(&worker) {
            worker.checks += 1;
        }
        let mut earlier = None;
        while let Some(entry) = state.entries.remove(&key) {
            state = this.silence(state, &entry);
            earlier = Some(entry.check);
        }
        let id = state.number();
        let health = Health::Unknown;
        if let Some(worker) = state.workers.get_mut(&worker) {
            worker.commands.push(Command::Begin { id, key: key.clone(), check: check.clone() });
            worker.wake();
        }
        state.entries.insert(key, Entry { check, health, problem: None, id, worker, told: health, queued: false });
        Ok(earlier)
    }

    pub(super) fn remove(&self, key: &K) -> Option<HealthCheck> {
        let mut state = self.lock();
        let entry = state.entries.remove(key)?;
        drop(self.silence(state, &entry));
        Some(entry.check)
    }

    /// Lets go of a check that is no entry any more: when this returns, the callback hears of it no more. The lock is
    /// given up meanwhile.
    fn silence<'a>(&'a self, mut state: MutexGuard<'a, State<K>>, entry: &Entry) -> MutexGuard<'a, State<K>> {
        let called_back = state.is_called_back();
        if !called_back {
            while state.workers.get(&entry.worker).is_some_and(|worker| worker.telling == Some(entry.id)) {
                state = self.wait(state);
            }
        }
        let Some(worker) = state.workers.get_mut(&entry.worker) else { return state };
        worker.checks -= 1;
        if worker.checks > 0 {
            worker.commands.push(Command::End { id: entry.id });
            worker.wake();
            return state;
        }
        let Some(worker) = state.workers.remove(&entry.worker) else { return state };
        state.stats.add(&HealthStats { in_flight: 0, waiting: 0, ..worker.stats.clone() });
        drop(state);
        self.news.notify_all();
        worker.wake();
        worker.join(called_back);
        self.lock()
    }

    /// Runs the callback for one worker's checks until the worker is gone.
    fn tell(&self, worker: usize) {
        let mut state = self.lock();
        loop {
            let State { entries, workers, .. } = &mut *state;
            let Some(mine) = workers.get_mut(&worker) else { return };
            let Some((key, id)) = mine.queue.pop_front() else {
                state = self.wait(state);
                continue;
            };
            let Some(entry) = entries.get_mut(&key).filter(|entry| entry.id == id) else { continue };
            entry.queued = false;
            if entry.told == entry.health {
                continue;
            }
            entry.told = entry.health;
            let change = HealthChange { key, health: entry.health, problem: entry.problem.clone() };
            mine.telling = Some(id);
            drop(state);
            // What it panicked with, the panic hook has said.
            let _ = catch_unwind(AssertUnwindSafe(|| (self.on_change)(change)));
            state = self.lock();
            if let Some(mine) = state.workers.get_mut(&worker) {
                mine.telling = None;
            }
            self.news.notify_all();
        }
    }
}

impl<K> State<K> {
    /// Whether a callback asks: it cannot wait for itself, and two of them, in two namespaces, not for each other.
    fn is_called_back(&self) -> bool {
        let this_thread = thread::current().id();
        self.workers.values().any(|worker| worker.teller.thread().id() == this_thread)
    }

    fn number(&mut self) -> usize {
        self.next_id += 1;
        self.next_id
    }
}

/// The loop of one worker.
struct Seat<K> {
    shared: Arc<Shared<K>>,
    worker: usize,
}

impl<K: Clone + Eq + Hash> Owner<K> for Seat<K> {
    fn exchange(&self, changes: Vec<Change<K>>, stats: &HealthStats) -> Option<Vec<Command<K>>> {
        let mut state = self.shared.lock();
        let State { entries, workers, .. } = &mut *state;
        let worker = workers.get_mut(&self.worker)?;
        worker.stats.clone_from(stats);
        let news = !changes.is_empty();
        for Change { id, key, health, problem } in changes {
            let Some(entry) = entries.get_mut(&key).filter(|entry| entry.id == id) else { continue };
            (entry.health, entry.problem) = (health, problem);
            if !mem::replace(&mut entry.queued, true) {
                worker.queue.push_back((key, id));
            }
        }
        if news {
            self.shared.news.notify_all();
        }
        Some(mem::take(&mut worker.commands))
    }
}

impl<K> Worker<K> {
    fn wake(&self) {
        // The eventfd of a loop that runs takes every wake-up.
        let _ = self.waker.wake();
    }

    fn join(self, called_back: bool) {
        let _ = self.prober.join();
        if !called_back {
            let _ = self.teller.join();
        }
    }
}

impl<K: Clone + Eq + Hash + Send + 'static> Worker<K> {
    /// Starts the threads in the calling thread's namespace. The caller holds the lock, so that they find their worker;
    /// those that do not, because this fails, end.
    fn start(shared: &Arc<Shared<K>>, id: usize, namespace: Namespace) -> io::Result<Self> {
        let poll = Poll::new()?;
        let waker = Waker::new(poll.registry(), WAKER)?;
        let named = |name: &str| thread::Builder::new().name(name.into());
        let seat = Seat { shared: Arc::clone(shared), worker: id };
        let prober = named("health probes").spawn(move || Prober::new(poll).run(&seat))?;
        let shared = Arc::clone(shared);
        let teller = named("health changes").spawn(move || shared.tell(id))?;
        Ok(Self {
            namespace,
            checks: 0,
            waker,
            commands: Vec::new(),
            stats: HealthStats::default(),
            queue: VecDeque::new(),
            telling: None,
            prober,
            teller,
        })
    }
}

/// The calling thread's network namespace.
fn namespace() -> io::Result<Namespace> {
    let of_thread = fs::metadata("/proc/thread-self/ns/net")?;
    Ok((of_thread.st_dev(), of_thread.st_ino()))
}
