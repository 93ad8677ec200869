//! The appliance's health checks: what the file says of them, and weights that follow their results. A backend that is down
//! gets no new connections, and keeps those that it has.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use serde::Deserialize;
use serde_json::json;
use xdpkit::{
    BackendState, DsrBalancer, Health, HealthChange, HealthCheck, HealthChecks, HealthStats, Interface, NatBalancer,
    ServiceAddr,
};

use crate::{common::Output, config::ConfigError};

/// `health = { ... }` of a service.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub(crate) struct HealthTable {
    /// A page to ask for; without one, it is enough that a TCP connection is accepted.
    path: Option<String>,
    /// The `Host` header.
    host: Option<String>,
    /// Where to ask; by default the service's port, of a NAT balancer the backend's.
    port: Option<u16>,
    /// In seconds.
    interval: Option<f64>,
    timeout: Option<f64>,
    /// Probes in a row that bring a backend back, and that take it out.
    rise: Option<u32>,
    fall: Option<u32>,
}

impl HealthTable {
    /// The check of a backend. Port 0 where neither the service nor this names one.
    fn check(&self, target: SocketAddr, source: Option<SocketAddr>) -> Result<HealthCheck, String> {
        let target = SocketAddr::new(target.ip(), self.port.unwrap_or(target.port()));
        let mut check = match &self.path {
            Some(path) => HealthCheck::http(target, path),
            None => HealthCheck::tcp(target),
        };
        if let Some(host) = &self.host {
            check = check.host(host);
        }
        let seconds = |what: &str, value: f64| {
            Duration::try_from_secs_f64(value).map_err(|_| format!("{what}: `{value}`: expected seconds"))
        };
        if let Some(interval) = self.interval {
            check = check.interval(seconds("interval", interval)?);
        }
        if let Some(timeout) = self.timeout {
            check = check.timeout(seconds("timeout", timeout)?);
        }
        let (rise, fall) = (self.rise.unwrap_or(check.rise), self.fall.unwrap_or(check.fall));
        check = check.thresholds(rise, fall);
        if let Some(source) = source {
            check = check.source(source);
        }
        check.validate().map_err(|error| error.to_string())?;
        Ok(check)
    }

    /// Whether it makes sense, before anything is done.
    pub(crate) fn validate(&self, file: &Path, key: &str, target: SocketAddr) -> Result<(), ConfigError> {
        let wrong = |problem| ConfigError::new(file, key, format!("health: {problem}"));
        self.check(target, None).map(drop).map_err(wrong)
    }
}

/// `probes = { interface = "h1", sources = [...] }` of a DSR balancer: the way of its probes, see
/// [`DsrBalancer::set_probe_interface`], and this host's addresses, one of each family.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub(crate) struct ProbesTable {
    pub(crate) interface: String,
    sources: Vec<IpAddr>,
}

impl ProbesTable {
    /// This host's address for probes of a service.
    pub(crate) fn source(&self, service: &ServiceAddr) -> Option<IpAddr> {
        self.sources.iter().map(IpAddr::to_canonical).find(|source| source.is_ipv4() == service.address.is_ipv4())
    }
}

/// A backend that is checked. The port is 0 where the balancer leaves ports alone.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Watched {
    pub(crate) function: String,
    pub(crate) service: ServiceAddr,
    pub(crate) backend: SocketAddr,
}

/// Whose backend it is.
#[derive(Clone)]
pub(crate) enum Balancer {
    Dsr(Arc<DsrBalancer>),
    Nat(Arc<NatBalancer>),
}

impl Balancer {
    fn set_weight(&self, watched: &Watched, weight: u32) -> xdpkit::Result<()> {
        let (service, backend) = (watched.service, watched.backend);
        match self {
            Self::Dsr(balancer) => balancer.set_backend(service, backend.ip(), weight).map(drop),
            Self::Nat(balancer) => balancer.set_backend(&service, backend, weight).map(drop),
        }
    }
}

/// What the file wants of a backend that is checked.
pub(crate) struct Wanted {
    pub(crate) watched: Watched,
    pub(crate) weight: u32,
    pub(crate) health: HealthTable,
    pub(crate) target: SocketAddr,
    pub(crate) source: Option<SocketAddr>,
    pub(crate) balancer: Balancer,
}

/// What is known of a backend.
struct Known {
    weight: u32,
    health: Health,
    balancer: Balancer,
    /// Its health has changed, and its weight has not yet.
    owed: bool,
}

impl Known {
    /// A backend that is down has no weight.
    fn set_weight(&mut self, watched: &Watched) -> xdpkit::Result<()> {
        self.owed = false;
        self.balancer.set_weight(watched, if self.health == Health::Down { 0 } else { self.weight })
    }
}

#[derive(Default)]
struct Backends {
    known: BTreeMap<Watched, Known>,
    /// Another plan is coming into force, and these are the old one's: they are owed their weights.
    changing: bool,
    /// The ways of DSR balancers' probes.
    ways: BTreeMap<String, Way>,
}

/// The interface by which a DSR balancer's probes come in. While it is away, probes fail and say nothing of backends.
struct Way {
    interface: Option<Interface>,
    /// Failures from before have to be over first.
    believed_from: Option<Instant>,
    /// A backend was said to be down meanwhile.
    disbelieved: bool,
}

impl Way {
    fn is_believed(&self) -> bool {
        // It may have gone, and come back as another one, since it was last looked at.
        let there = |interface: &Interface| Interface::by_name(interface.name()).is_ok_and(|now| now == *interface);
        self.interface.as_ref().is_some_and(there) && self.believed_from.is_none_or(|then| Instant::now() >= then)
    }
}

/// All checks of an appliance.
pub(crate) struct Watch {
    backends: Arc<Mutex<Backends>>,
    checks: HealthChecks<Watched>,
    output: Output,
    /// Probes that could not be sent, as far as this was told.
    told_unsent: AtomicU64,
}

/// While this lives, no result of a check changes a weight.
pub(crate) struct Still<'a>(MutexGuard<'a, Backends>);

impl Still<'_> {
    /// Whether a backend is to get no new connections for now: it is down, or an earlier process has left it without weight
    /// and no probe has answered yet.
    pub(crate) fn holds_back(&self, watched: &Watched, present: Option<u32>) -> bool {
        match self.0.known.get(watched).map(|known| known.health) {
            Some(Health::Up) => false,
            Some(Health::Down) => true,
            Some(Health::Unknown) | None => present == Some(0),
        }
    }
}

fn lock(backends: &Mutex<Backends>) -> MutexGuard<'_, Backends> {
    backends.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watch {
    pub(crate) fn new(output: Output) -> Self {
        let backends = Arc::new(Mutex::new(Backends::default()));
        let following = Arc::clone(&backends);
        let on_change = move |change: HealthChange<Watched>| {
            follow(&following, &change.key, change.health, change.problem, output);
        };
        Self { backends, checks: HealthChecks::new(on_change), output, told_unsent: AtomicU64::new(0) }
    }

    /// From now until [`Watch::set`], health is noted and changes no weight.
    pub(crate) fn still(&self) -> Still<'_> {
        let mut backends = lock(&self.backends);
        backends.changing = true;
        Still(backends)
    }

    /// Ends that without another plan: what there is goes on.
    pub(crate) fn go_on(&self) {
        lock(&self.backends).changing = false;
    }

    /// Whether a backend answers, of those of which it is known.
    pub(crate) fn known(&self) -> Vec<(Watched, bool)> {
        let backends = lock(&self.backends);
        let known = backends.known.iter().filter(|(_, known)| known.health != Health::Unknown);
        known.map(|(watched, known)| (watched.clone(), known.health == Health::Up)).collect()
    }

    /// The ways of probes from now on, by function; without an interface where that is not there.
    pub(crate) fn set_ways(&self, ways: BTreeMap<String, Option<Interface>>) {
        let mut backends = lock(&self.backends);
        let mut before = std::mem::take(&mut backends.ways);
        for (function, interface) in ways {
            let way = match before.remove(&function) {
                Some(same) if same.interface == interface => same,
                other => Way { interface, disbelieved: other.is_some_and(|way| way.disbelieved), believed_from: None },
            };
            backends.ways.insert(function, way);
        }
    }

    /// Probes of this function fail from now on, whatever its backends do.
    pub(crate) fn lose_way(&self, function: &str) {
        let mut backends = lock(&self.backends);
        let disbelieved = backends.ways.get(function).is_some_and(|way| way.disbelieved);
        backends.ways.insert(function.to_owned(), Way { interface: None, believed_from: None, disbelieved });
    }

    /// Probes of this function arrive again. What failed before is not believed.
    pub(crate) fn regain_way(&self, function: &str, interface: Interface) {
        let of_function = self.checks.iter().filter(|(watched, ..)| watched.function == function);
        let settles =
            of_function.map(|(_, check, _)| (check.interval + check.timeout).saturating_mul(check.fall)).max();
        let mut backends = lock(&self.backends);
        let disbelieved = backends.ways.get(function).is_some_and(|way| way.disbelieved);
        let believed_from = settles.and_then(|time| Instant::now().checked_add(time));
        backends.ways.insert(function.to_owned(), Way { interface: Some(interface), believed_from, disbelieved });
    }

    /// Backends that were said to be down while it meant nothing, and still are, count as down once it means something.
    pub(crate) fn believe(&self) {
        let mut backends = lock(&self.backends);
        let due = backends.ways.iter_mut().filter(|(_, way)| way.disbelieved && way.is_believed());
        let due: Vec<String> = due.map(|(function, way)| (way.disbelieved = false, function.clone()).1).collect();
        let doubted = backends
            .known
            .iter()
            .filter(|(watched, known)| due.contains(&watched.function) && known.health != Health::Down);
        let keys: Vec<Watched> = doubted.map(|(watched, _)| watched.clone()).collect();
        drop(backends);
        for key in keys {
            if self.checks.get(&key) == Some(Health::Down) {
                follow(&self.backends, &key, Health::Down, None, self.output);
            }
        }
    }

    /// What became of all probes.
    pub(crate) fn stats(&self) -> HealthStats {
        self.checks.stats()
    }

    /// Says that this host could not send probes, when there are new ones: their backends stay what they were.
    pub(crate) fn tell_unsent(&self) {
        let stats = self.stats();
        let before = self.told_unsent.swap(stats.unsent, Ordering::Relaxed);
        if let Some(last) = stats.last_unsent.filter(|_| stats.unsent > before) {
            let probes = stats.unsent - before;
            let line = json!({"event": "health_unsent", "probes": probes, "problem": last.to_string()});
            self.output.line(&line, || format!("{probes} health probes could not be sent: {last}"));
        }
    }

    /// Begins the checks that are wanted, and ends the others.
    pub(crate) fn set(&self, wanted: Vec<Wanted>) -> Result<(), Box<dyn std::error::Error>> {
        let mut known = BTreeMap::new();
        let mut checks = BTreeMap::new();
        let mut present = lock(&self.backends);
        for entry in wanted {
            let check = entry.health.check(entry.target, entry.source)?;
            let before = present.known.get(&entry.watched);
            let health = before.map_or(Health::Unknown, |known| known.health);
            let owed = before.is_some_and(|known| known.owed);
            checks.insert(entry.watched.clone(), check);
            known.insert(entry.watched, Known { weight: entry.weight, health, balancer: entry.balancer, owed });
        }
        (present.known, present.changing) = (known, false);
        for (watched, known) in present.known.iter_mut().filter(|(_, known)| known.owed) {
            known.set_weight(watched)?;
        }
        // Checks that end are waited for, and they may wait for this lock.
        drop(present);
        let running: BTreeMap<_, _> = self.checks.iter().map(|(watched, check, _)| (watched, check)).collect();
        for gone in running.keys().filter(|watched| !checks.contains_key(watched)) {
            self.checks.remove(gone);
        }
        for (watched, check) in checks {
            if running.get(&watched) != Some(&check) {
                self.checks.insert(watched, check)?;
            }
        }
        Ok(())
    }
}

/// What a change means: weight or none.
fn follow(backends: &Mutex<Backends>, key: &Watched, health: Health, problem: Option<String>, output: Output) {
    let mut backends = lock(backends);
    if health == Health::Down
        && let Some(way) = backends.ways.get_mut(&key.function).filter(|way| !way.is_believed())
    {
        way.disbelieved = true;
        return;
    }
    let (changing, may_be_old_news) = (backends.changing, backends.ways.contains_key(&key.function));
    let Some(known) = backends.known.get_mut(key) else { return };
    // What ends here may be a failure that was not believed: nobody has heard of it.
    let is_news = !may_be_old_news || known.health != health;
    known.health = health;
    known.owed = true;
    let set = if changing { Ok(()) } else { known.set_weight(key) };
    let problem = match set {
        Ok(()) => problem,
        Err(error) => Some(error.to_string()),
    };
    if !is_news && problem.is_none() {
        return;
    }
    let Watched { function, service, backend } = key;
    let backend = if backend.port() == 0 { backend.ip().to_string() } else { backend.to_string() };
    let line = json!({
        "event": "health",
        "function": function,
        "service": service.to_string(),
        "backend": backend,
        "health": health.to_string(),
        "problem": problem,
    });
    output.line(&line, || {
        let why = problem.map_or_else(String::new, |problem| format!(": {problem}"));
        format!("{function}: {service}: backend {backend} is {health}{why}")
    });
}

/// The weight that a backend has in a table, if it is not leaving.
pub(crate) fn present_weight(state: BackendState, weight: u32) -> Option<u32> {
    matches!(state, BackendState::Active | BackendState::Draining).then_some(weight)
}
