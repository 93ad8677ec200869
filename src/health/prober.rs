//! The poll loop: one thread for all probes that leave from one network namespace.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    io, mem,
    os::fd::AsRawFd as _,
    thread,
    time::{Duration, Instant},
};

use mio::{Events, Interest, Poll, Token, unix::SourceFd};

use super::{
    Health, HealthCheck, HealthStats, Unsent, UnsentReason,
    check::Thresholds,
    probe::{InFlight, NotBegun},
};
use crate::sys;

/// Probes under way at a time, unless descriptors allow less.
const IN_FLIGHT_MAX: usize = 8192;
/// Probes begun before results are looked at again, so that none looks late only because others begin.
const BEGUN_AT_ONCE: usize = 64;
/// What the host lacks is asked for again so soon, or when a probe has ended.
const RETRY: Duration = Duration::from_millis(100);
/// Results looked at in one go.
const EVENTS: usize = 256;

/// The token of the waker; checks count up from 0.
pub(super) const WAKER: Token = Token(usize::MAX);

/// What the owner tells the loop.
pub(super) enum Command<K> {
    Begin { id: usize, key: K, check: HealthCheck },
    End { id: usize },
}

/// A check whose state has changed.
pub(super) struct Change<K> {
    pub(super) id: usize,
    pub(super) key: K,
    pub(super) health: Health,
    /// What the last probe failed with, when it did.
    pub(super) problem: Option<String>,
}

/// Where changes go and commands come from.
pub(super) trait Owner<K> {
    /// Hands in what is new; the commands since the last time, `None` when there is nothing more to do.
    fn exchange(&self, changes: Vec<Change<K>>, stats: &HealthStats) -> Option<Vec<Command<K>>>;
}

/// The checks of a namespace.
pub(super) struct Prober<K> {
    poll: Poll,
    checks: HashMap<usize, Running<K>>,
    /// When something is to be done with a check: its probe's end, or the next one's beginning.
    timers: BTreeSet<(Instant, usize)>,
    /// Checks that are to be probed now, the first first. Some may have ended.
    due: VecDeque<usize>,
    in_flight_max: usize,
    /// Until then the host is spared.
    held_until: Option<Instant>,
    changes: Vec<Change<K>>,
    stats: HealthStats,
}

struct Running<K> {
    key: K,
    check: HealthCheck,
    thresholds: Thresholds,
    state: State,
}

enum State {
    /// For the next probe; without a time, for ever.
    Waiting(Option<Instant>),
    Due,
    Probing(InFlight, Instant),
}

impl State {
    fn timer(&self) -> Option<Instant> {
        match self {
            Self::Waiting(at) => *at,
            Self::Due => None,
            Self::Probing(_, end) => Some(*end),
        }
    }
}

impl<K: Clone> Prober<K> {
    pub(super) fn new(poll: Poll) -> Self {
        Self {
            poll,
            checks: HashMap::new(),
            timers: BTreeSet::new(),
            due: VecDeque::new(),
            in_flight_max: IN_FLIGHT_MAX,
            held_until: None,
            changes: Vec::new(),
            stats: HealthStats::default(),
        }
    }

    /// Probes until the owner has enough.
    pub(super) fn run(mut self, owner: &impl Owner<K>) {
        let mut events = Events::with_capacity(EVENTS);
        loop {
            self.stats.waiting = self.due.len();
            let Some(commands) = owner.exchange(mem::take(&mut self.changes), &self.stats) else { return };
            commands.into_iter().for_each(|command| self.obey(command));
            match self.poll.poll(&mut events, self.patience(Instant::now())) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // The kernel tells no reason for which this could be; results are looked for all the same.
                Err(_) => thread::sleep(RETRY),
            }
            for event in events.iter().filter(|event| event.token() != WAKER) {
                self.advance(event.token().0);
            }
            self.expire(Instant::now());
            self.begin_due();
        }
    }

    fn obey(&mut self, command: Command<K>) {
        match command {
            Command::Begin { id, key, check } => {
                let thresholds = Thresholds::new(&check);
                self.checks.insert(id, Running { key, check, thresholds, state: State::Due });
                self.due.push_back(id);
            }
            Command::End { id } => {
                self.enter(id, State::Waiting(None));
                self.checks.remove(&id);
            }
        }
    }

    /// How long there is nothing to do but to wait for events; without a time, for ever.
    fn patience(&self, now: Instant) -> Option<Duration> {
        let may_begin = !self.due.is_empty() && self.stats.in_flight < self.in_flight_max;
        let beginning = may_begin.then(|| self.held_until.unwrap_or(now));
        let timer = self.timers.first().map(|(at, _)| *at);
        let next = [beginning, timer].into_iter().flatten().min()?;
        Some(next.saturating_duration_since(now))
    }

    /// Goes on with a probe whose socket can.
    fn advance(&mut self, id: usize) {
        if let Some(Running { check, state: State::Probing(probe, _), .. }) = self.checks.get_mut(&id)
            && let Some(outcome) = probe.advance(check)
        {
            self.conclude(id, outcome);
        }
    }

    /// Ends probes whose time is up, and queues those whose time has come.
    fn expire(&mut self, now: Instant) {
        while let Some(&(at, id)) = self.timers.first()
            && at <= now
        {
            match self.checks.get_mut(&id) {
                Some(Running { check, state: State::Probing(probe, _), .. }) => {
                    // What came in time counts, even when this loop comes late.
                    let late = || Err(io::Error::new(io::ErrorKind::TimedOut, "no answer in time"));
                    let outcome = probe.advance(check).unwrap_or_else(late);
                    self.conclude(id, outcome);
                }
                Some(_) => {
                    self.enter(id, State::Due);
                    self.due.push_back(id);
                }
                None => drop(self.timers.pop_first()),
            }
        }
    }

    /// Begins probes that are due, as many as may be under way.
    fn begin_due(&mut self) {
        if self.held_until.is_some_and(|until| Instant::now() < until) {
            return;
        }
        self.held_until = None;
        // The other half is for the program around it.
        self.in_flight_max = (sys::open_files_max() / 2).clamp(1, IN_FLIGHT_MAX);
        for _ in 0..BEGUN_AT_ONCE {
            if self.stats.in_flight >= self.in_flight_max || self.held_until.is_some() {
                return;
            }
            let Some(id) = self.due.pop_front() else { return };
            self.begin(id);
        }
    }

    fn begin(&mut self, id: usize) {
        let Some(running) = self.checks.get_mut(&id) else { return };
        let begun = InFlight::begin(&running.check).and_then(|probe| {
            let fd = probe.stream().as_raw_fd();
            let registered =
                self.poll.registry().register(&mut SourceFd(&fd), Token(id), Interest::READABLE | Interest::WRITABLE);
            match registered {
                Ok(()) => Ok(probe),
                Err(error) => Err(NotBegun::Unsent(UnsentReason::before_connect(&error), error)),
            }
        });
        match begun {
            Ok(probe) => {
                let end = Instant::now() + running.check.timeout;
                self.enter(id, State::Probing(probe, end));
            }
            Err(NotBegun::Unsent(reason, error)) => self.unsent(id, reason, &error),
            Err(NotBegun::Failed(error)) => self.conclude(id, Err(error)),
        }
    }

    /// Counts a probe, and waits for the next one.
    fn conclude(&mut self, id: usize, outcome: io::Result<()>) {
        if let Err(error) = &outcome
            && let Some(reason) = UnsentReason::of_host(error)
        {
            return self.unsent(id, reason, error);
        }
        let Some(running) = self.checks.get_mut(&id) else { return };
        match outcome {
            Ok(()) => self.stats.succeeded += 1,
            Err(_) => self.stats.failed += 1,
        }
        if running.thresholds.count(outcome.is_ok()) {
            self.changes.push(Change {
                id,
                key: running.key.clone(),
                health: running.thresholds.health(),
                problem: outcome.err().map(|error| error.to_string()),
            });
        }
        let next = Instant::now().checked_add(running.check.interval);
        self.enter(id, State::Waiting(next));
        // A descriptor is free now.
        self.held_until = None;
    }

    /// A probe that this host could not send says nothing about its target.
    fn unsent(&mut self, id: usize, reason: UnsentReason, error: &io::Error) {
        let Some(Running { check, .. }) = self.checks.get(&id) else { return };
        let interval = check.interval;
        self.stats.unsent += 1;
        self.stats.last_unsent = Some(Unsent { target: check.target, reason, cause: error.to_string() });
        let now = Instant::now();
        if reason.is_everybodys() {
            self.enter(id, State::Due);
            self.due.push_front(id);
            self.held_until = Some(now + RETRY);
        } else {
            self.enter(id, State::Waiting(now.checked_add(interval.max(RETRY))));
        }
    }

    /// Puts a check into a state, with its timer. A probe that it leaves is over.
    fn enter(&mut self, id: usize, state: State) {
        let Some(running) = self.checks.get_mut(&id) else { return };
        if let Some(at) = running.state.timer() {
            self.timers.remove(&(at, id));
        }
        if let Some(at) = state.timer() {
            self.timers.insert((at, id));
        }
        self.stats.in_flight += usize::from(matches!(state, State::Probing(..)));
        let before = mem::replace(&mut running.state, state);
        self.stats.in_flight -= usize::from(matches!(before, State::Probing(..)));
    }
}
