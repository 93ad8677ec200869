//! [`NatBalancer`]: a layer-4 balancer that translates addresses and ports.

mod config;
mod connection;
mod event;
mod rule;
mod table;

use std::{
    collections::BTreeSet,
    mem::offset_of,
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

pub use config::{NatConfig, NatMode, NatService, NatTimeouts, Scheduler};
pub use connection::{Connection, ConnectionCounts, ConnectionState, NatBackendStats, NatServiceStats};
pub use event::{NatEvent, NatEventKind};

use crate::{
    BackendState, Count, Error, Events, Result, ServiceAddr, Stage,
    abi::{
        nat_balancer::{
            self as abi, ADDRESSES_MAX, ADDRESSES_SHIFT, BY_SLOT, DESTINATION_ONLY, LEAST_LOADED, NUMBER_MAX, Settings,
        },
        service::{SERVICE_BY_SOURCE, Service},
    },
    balancer::{
        Book, Target,
        book::{backend_stats, service_stats},
    },
    flow_table::Shape,
    stage::{StageCore, StageKind, sealed::Sealed},
    sys::{self, clock::Clock, mmap::LongMapping, object::Plan},
};
use rule::NatRule;
use table::{Connections, Judge, state_of};

static KIND: StageKind = StageKind {
    name: "nat_balancer",
    abi: crate::abi::fingerprint(env!("XDPKIT_ABI_NAT_BALANCER")),
    load: |plan: &Plan<'_>| {
        let mut storage = std::mem::MaybeUninit::uninit();
        let builder = sys::skel::nat_balancer::NatBalancerSkelBuilder::default();
        sys::object::load(builder, &mut storage, "nat_balancer", plan)
    },
};

/// A backend of a service, as [`NatBalancer::backends`] lists it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct NatBackend {
    /// Where it is.
    pub address: SocketAddr,
    /// Its weight.
    pub weight: u32,
    /// What it may be given.
    pub state: BackendState,
    /// Tells it from another backend of the same address, before or after.
    pub identity: u32,
    /// What it was given.
    pub stats: NatBackendStats,
}

/// Sends connections for virtual addresses to backends, with the destination (and, in [`NatMode::Full`], the source)
/// translated both ways.
///
/// Packets for other addresses, and for ports of ours that no service has, go on untouched. A connection stays with its
/// backend whatever is done to the others. Interfaces by which clients come in and those by which backends answer are
/// both attached; they have to forward (sysctl `net.ipv4.conf.*.forwarding`, `net.ipv6.conf.all.forwarding`).
///
/// ```no_run
/// use xdpkit::{AttachOptions, NatBalancer, NatConfig, NatService, Stage as _};
///
/// # fn main() -> xdpkit::Result<()> {
/// let balancer = NatBalancer::load(&NatConfig::default())?;
/// let backends = ["192.168.178.11:8080".parse().unwrap(), "192.168.178.12:8080".parse().unwrap()];
/// balancer.insert("tcp/10.0.0.10:80".parse()?, &NatService::new(backends))?;
/// let _clients = balancer.attach(&AttachOptions::new("eth0"))?;
/// let _backends = balancer.attach(&AttachOptions::new("eth1"))?;
/// loop {
///     std::thread::sleep(std::time::Duration::from_secs(1));
///     balancer.collect()?;
///     println!("{} connections", balancer.counts()?.total());
/// }
/// # }
/// ```
///
/// A change takes effect with the next packet. While the value lives, no other process may change its services.
///
/// Needs Linux 5.18 or newer (tested from 6.1 on), `CAP_BPF`, `CAP_PERFMON` and `CAP_NET_ADMIN`.
#[derive(Debug)]
pub struct NatBalancer {
    core: StageCore,
    book: Arc<Mutex<Book<NatRule>>>,
    connections: Arc<Connections>,
}

impl Sealed for NatBalancer {
    fn core(&self) -> &StageCore {
        &self.core
    }
}

impl Stage for NatBalancer {}

impl NatBalancer {
    /// Loads the program and creates its tables.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::MissingCapability`], [`Error::KernelTooOld`], [`Error::Verifier`], [`Error::Load`].
    pub fn load(config: &NatConfig) -> Result<Self> {
        let clock = Clock::new()?;
        let hertz = clock.hertz();
        let sizes = config.capacities(hertz)?;
        let random = || {
            let mut word = [0; 8];
            sys::fill_random(&mut word);
            u64::from_ne_bytes(word)
        };
        let settings = config.settings(hertz, std::array::from_fn(|_| random()))?;
        let core = StageCore::load(&KIND, &config.name, &sizes)?;
        let connections = Arc::new(Connections::create(&core, clock, &settings, config.shape(), random)?);
        let rule = NatRule::new(Arc::clone(&connections), LongMapping::new(core.map("backend_index"))?);
        let mut book = Book::new(&core, &config.book(hertz), rule)?;
        for address in &config.addresses {
            book.hold(*address)?;
        }
        Ok(Self { core, book: Arc::new(Mutex::new(book)), connections })
    }

    /// Takes over the tables (services, connections, counters) that an earlier process pinned under this name. To take
    /// over its attachments too, attach with the same [`AttachOptions::pin`](crate::AttachOptions::pin).
    ///
    /// The earlier process may have died at any moment: what it had begun to change is finished.
    ///
    /// # Errors
    /// [`Error::PinMissing`]; [`Error::PinMismatch`] when this build cannot understand the tables.
    pub fn adopt(directory: impl AsRef<Path>, name: &str) -> Result<Self> {
        let core = StageCore::adopt(&KIND, directory.as_ref(), name)?;
        let unusable = || Error::PinMismatch {
            path: crate::pin::map_path(directory.as_ref(), name, "flows_table"),
            what: "the flow table".into(),
            found: "of other sizes than it says".into(),
            expected: "a table that a NAT balancer has made".into(),
        };
        let connections = Arc::new(Connections::adopt(&core, Clock::new()?)?.ok_or_else(unusable)?);
        connections.heal();
        let rule = NatRule::new(Arc::clone(&connections), LongMapping::new(core.map("backend_index"))?);
        let book = Book::adopt(&core, rule)?;
        for (service, entry) in book.entries() {
            if entry.record.flags & DESTINATION_ONLY == 0 {
                continue;
            }
            for member in &entry.members {
                let number = book.backends.read(member.id.into()).function[1] as u16;
                let tuple = (service.protocol, member.target.address, member.target.port);
                book.rule.tuples().adopt(tuple, number);
            }
        }
        Ok(Self { core, book: Arc::new(Mutex::new(book)), connections })
    }

    /// Adopts what is pinned there under the configuration's name, else loads: what a process does at its start when
    /// it wants to go on where the last one ended. An adopted balancer keeps its services and settings.
    ///
    /// # Errors
    /// As [`NatBalancer::load`] and [`NatBalancer::adopt`], but for [`Error::PinMissing`]; [`Error::PinnedSetting`] where
    /// the configuration wants another value of what cannot change while the tables live, such as their sizes.
    pub fn load_or_adopt(directory: impl AsRef<Path>, config: &NatConfig) -> Result<Self> {
        let directory = directory.as_ref();
        match Self::adopt(directory, &config.name) {
            Err(Error::PinMissing { .. }) => Self::load(config),
            answer => {
                let adopted = answer?;
                adopted.was_made_with(directory, config)?;
                Ok(adopted)
            }
        }
    }

    /// Refuses a configuration that wants what cannot change any more.
    fn was_made_with(&self, directory: &Path, config: &NatConfig) -> Result<()> {
        let core = &self.core;
        let hertz = Clock::new()?.hertz();
        config.capacities(hertz)?;
        let (book, found) = (self.book(), self.connections.settings.read(0));
        let capacity = |lines| Shape::capacity_of(lines) / config::ENTRIES_A_FLOW;
        let wanted = capacity(config.shape().total());
        core.was_made_with(directory, "capacity", capacity(core.entries("flows_lines")), wanted)?;
        book.was_made_with(core, directory, &config.book(hertz))?;
        let ports = format!("{}..={}", found.first_port, found.last_port);
        core.was_made_with(directory, "ports", ports, format!("{:?}", config.ports))?;
        let held: BTreeSet<IpAddr> = config.addresses.iter().copied().collect();
        core.was_made_with(directory, "addresses", format!("{:?}", book.held), format!("{held:?}"))?;
        core.was_made_with(directory, "reset_unknown", found.reset_unknown != 0, config.reset_unknown)?;
        core.was_made_with(directory, "ring_bytes", core.entries("events"), config.ring_bytes)
    }

    fn book(&self) -> MutexGuard<'_, Book<NatRule>> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a service.
    ///
    /// # Errors
    /// [`Error::ServiceExists`]; [`Error::Full`]; [`Error::Invalid`] for a service on any port, for backends of the other
    /// family or without a port, that stand twice, or at a virtual address of ours.
    pub fn insert(&self, service: ServiceAddr, with: &NatService) -> Result<()> {
        let list = targets(&service, &with.backends)?;
        let mut book = self.book();
        let kept = with.mode == NatMode::Destination;
        let mut flags = if kept { DESTINATION_ONLY } else { 0 };
        if with.scheduler == Scheduler::SourceHash {
            flags |= SERVICE_BY_SOURCE;
        }
        let mut function = [0_u64; 5];
        let pool: Vec<u16> = book.held(service.address.is_ipv4()).collect();
        for (at, number) in pool.iter().enumerate().take(ADDRESSES_MAX) {
            function[at / 4] |= u64::from(*number) << (16 * (at % 4));
        }
        flags |= (pool.len().clamp(1, ADDRESSES_MAX) as u32 - 1) << ADDRESSES_SHIFT;
        self.refuse_own(&book, &list)?;
        if kept {
            self.number_backends(&book, &service, &list)?;
        }
        let record = Service {
            flags,
            first_line: 0,
            slots: 0,
            vip: 0,
            port: 0,
            protocol: 0,
            reserved: 0,
            scheduler: with.scheduler.number(),
            function,
        };
        // Before packets can meet the service: its port must not be given to a connection any more.
        let settings = self.connections.settings.read(0);
        if service.port.is_some_and(|port| (settings.first_port..=settings.last_port).contains(&port.into())) {
            self.set(offset_of!(Settings, ports_shared), 1);
        }
        book.insert_service(&self.core, service, record, &list)?;
        if kept {
            self.set(offset_of!(Settings, destination_only), 1);
        }
        Ok(())
    }

    /// A backend at one of our own addresses would get its packets back for ever.
    fn refuse_own(&self, book: &Book<NatRule>, list: &[(Target, u32)]) -> Result<()> {
        match list.iter().find(|(target, _)| book.is_ours(target.address)) {
            None => Ok(()),
            Some((target, _)) => Err(Error::Invalid {
                what: "backend",
                value: target.to_string(),
                expected: "another address than the balancer's own",
            }),
        }
    }

    /// Answers of backends whose clients keep their addresses are found by these numbers.
    fn number_backends(&self, book: &Book<NatRule>, service: &ServiceAddr, list: &[(Target, u32)]) -> Result<()> {
        let mut tuples = book.rule.tuples();
        let tuple = |target: &Target| (service.protocol, target.address, target.port);
        for (target, _) in list {
            if tuples.add(tuple(target)).is_ok() {
                continue;
            }
            tuples.retain(|known| {
                let of = |(service, entry): (&ServiceAddr, &crate::balancer::book::Entry)| {
                    let same = |target: &Target| (service.protocol, target.address, target.port) == *known;
                    entry.record.flags & DESTINATION_ONLY != 0 && entry.members.iter().any(|m| same(&m.target))
                };
                book.entries().any(of) || list.iter().any(|(target, _)| tuple(target) == *known)
            });
            tuples.add(tuple(target))?;
        }
        Ok(())
    }

    /// Removes a service, and ends its connections. Answers what it was.
    ///
    /// # Errors
    /// [`Error::UnknownService`]; [`Error::Map`].
    pub fn remove(&self, service: &ServiceAddr) -> Result<NatService> {
        let was = self.get(service)?;
        let mut book = self.book();
        let number = book.entry(service)?.number;
        book.remove_service(&self.core, service)?;
        let judge = self.connections.judge()?;
        for (record, connection) in self.connections.live(&judge) {
            if connection.service == number {
                self.connections.end(record, &connection);
            }
        }
        let kept = book.entries().any(|(_, entry)| entry.record.flags & DESTINATION_ONLY != 0);
        self.set(offset_of!(Settings, destination_only), kept.into());
        Ok(was)
    }

    /// A service with the backends that get or may get new connections.
    ///
    /// # Errors
    /// [`Error::UnknownService`].
    pub fn get(&self, service: &ServiceAddr) -> Result<NatService> {
        let book = self.book();
        let entry = book.entry(service)?;
        let staying = |state| matches!(state, BackendState::Active | BackendState::Draining);
        let share = |member: &crate::balancer::book::Member| {
            let weight = if member.state == BackendState::Active { member.weight } else { 0 };
            (SocketAddr::new(member.target.address, member.target.port), weight)
        };
        Ok(NatService {
            mode: if entry.record.flags & DESTINATION_ONLY != 0 { NatMode::Destination } else { NatMode::Full },
            scheduler: match (entry.record.scheduler, entry.record.flags & SERVICE_BY_SOURCE) {
                (BY_SLOT, 0) => Scheduler::Maglev,
                (BY_SLOT, _) => Scheduler::SourceHash,
                (LEAST_LOADED, _) => Scheduler::LeastConnections,
                _ => Scheduler::RoundRobin,
            },
            backends: entry.members.iter().filter(|member| staying(member.state)).map(share).collect(),
        })
    }

    /// All services, sorted.
    #[must_use]
    pub fn services(&self) -> Vec<ServiceAddr> {
        self.book().entries().map(|(service, _)| *service).collect()
    }

    /// All backends of a service, those included that are leaving.
    ///
    /// # Errors
    /// [`Error::UnknownService`]; [`Error::Map`].
    pub fn backends(&self, service: &ServiceAddr) -> Result<Vec<NatBackend>> {
        let book = self.book();
        let entry = book.entry(service)?;
        let listed = entry.members.iter().map(|member| {
            let (stats, answers) = backend_stats(&self.core, member.id)?;
            let active = self.connections.active(member.id);
            let stats = NatBackendStats { forwarded: stats.forwarded, answers, opened: stats.new_flows, active };
            let address = SocketAddr::new(member.target.address, member.target.port);
            let (weight, state, identity) = (member.weight, member.state, member.identity);
            Ok(NatBackend { address, weight, state, identity, stats })
        });
        listed.collect()
    }

    /// Adds a backend, or gives one a weight and new connections. Answers the weight that it had. 0: no new connections.
    ///
    /// # Errors
    /// [`Error::UnknownService`], [`Error::Full`], [`Error::Invalid`].
    pub fn set_backend(&self, service: &ServiceAddr, backend: SocketAddr, weight: u32) -> Result<Option<u32>> {
        let list = targets(service, &[(backend, weight)])?;
        let mut book = self.book();
        self.prepare(&book, service, &list)?;
        book.set_backend(&self.core, service, list[0].0, weight)
    }

    /// Makes this the list of backends, with one change of the table: who is not in it gets no new connections, and goes
    /// when it has none left.
    ///
    /// # Errors
    /// As [`NatBalancer::set_backend`]. Nothing was changed then.
    pub fn set_backends(&self, service: &ServiceAddr, backends: &[(SocketAddr, u32)]) -> Result<()> {
        let list = targets(service, backends)?;
        let mut book = self.book();
        self.prepare(&book, service, &list)?;
        book.set_backends(&self.core, service, &list)
    }

    fn prepare(&self, book: &Book<NatRule>, service: &ServiceAddr, list: &[(Target, u32)]) -> Result<()> {
        self.refuse_own(book, list)?;
        if book.entry(service)?.record.flags & DESTINATION_ONLY != 0 {
            self.number_backends(book, service, list)?;
        }
        Ok(())
    }

    /// Gives a backend no new connections; those that it has stay. Setting its weight brings it back.
    ///
    /// # Errors
    /// [`Error::UnknownService`], [`Error::UnknownBackend`].
    pub fn drain(&self, service: &ServiceAddr, backend: SocketAddr) -> Result<()> {
        self.book().drain(&self.core, service, target(backend))
    }

    /// As [`NatBalancer::drain`]; the backend goes when it has no connection left. Added again before, it is
    /// another one, and what the old one still had ends.
    ///
    /// # Errors
    /// As [`NatBalancer::drain`].
    pub fn remove_backend(&self, service: &ServiceAddr, backend: SocketAddr) -> Result<()> {
        self.book().remove_backend(&self.core, service, target(backend))
    }

    /// Ends a backend and all its connections at once. With [`NatConfig::reset_unknown`], their next packets are answered
    /// with RST.
    ///
    /// # Errors
    /// As [`NatBalancer::drain`].
    pub fn kill(&self, service: &ServiceAddr, backend: SocketAddr) -> Result<()> {
        let mut book = self.book();
        let wanted = target(backend);
        let ids: Vec<u16> = book.entry(service)?.members.iter().filter(|m| m.target == wanted).map(|m| m.id).collect();
        book.kill(&self.core, service, wanted)?;
        // No program gives it a connection any more.
        book.wait(&self.core)?;
        let judge = self.connections.judge()?;
        for (record, connection) in self.connections.live(&judge) {
            if ids.contains(&connection.backend) {
                self.connections.end(record, &connection);
            }
        }
        book.release(&self.core)
    }

    /// What was counted for a service.
    ///
    /// # Errors
    /// [`Error::UnknownService`]; [`Error::Map`].
    pub fn service_stats(&self, service: &ServiceAddr) -> Result<NatServiceStats> {
        let number = self.book().entry(service)?.number;
        let (stats, [answers, answered_bytes, refused]) = service_stats(&self.core, number)?;
        Ok(NatServiceStats {
            forwarded: stats.received,
            answered: Count { packets: answers, bytes: answered_bytes },
            opened: stats.new_flows,
            no_backend: stats.no_backend,
            refused,
            too_big: stats.too_big,
        })
    }

    /// All connections: reads every record, some 50 ms for a capacity of a million.
    ///
    /// # Errors
    /// [`Error::TestRun`] when the kernel's clock cannot be read.
    pub fn connections(&self) -> Result<Vec<Connection>> {
        let judge = self.connections.judge()?;
        let book = self.book();
        Ok(self.connections.live(&judge).filter_map(|(at, raw)| self.resolve(&book, &judge, at, raw)).collect())
    }

    /// How many connections there are, by state. Reads every record.
    ///
    /// # Errors
    /// As [`NatBalancer::connections`].
    pub fn counts(&self) -> Result<ConnectionCounts> {
        let judge = self.connections.judge()?;
        let mut counts = ConnectionCounts::default();
        for (_, connection) in self.connections.live(&judge) {
            counts.0[state_of(table::flags_of(connection.word))] += 1;
        }
        Ok(counts)
    }

    /// The connection of a client to a service.
    ///
    /// # Errors
    /// [`Error::UnknownService`]; as [`NatBalancer::connections`].
    pub fn find(&self, client: SocketAddr, service: &ServiceAddr) -> Result<Option<Connection>> {
        let judge = self.connections.judge()?;
        let book = self.book();
        let number = book.entry(service)?.number;
        let Some(record) = self.connections.find(client, number) else { return Ok(None) };
        let found = self.connections.read(record, &judge).and_then(|raw| self.resolve(&book, &judge, record, raw));
        Ok(found.filter(|found| found.client == client && found.service == *service))
    }

    /// The connection whose packets a backend sends from `backend` to `destination`. Reads the records.
    ///
    /// # Errors
    /// As [`NatBalancer::connections`].
    pub fn find_by_backend(&self, backend: SocketAddr, destination: SocketAddr) -> Result<Vec<Connection>> {
        let mut all = self.connections()?;
        all.retain(|connection| connection.backend == backend && connection.source == destination);
        Ok(all)
    }

    fn resolve(&self, book: &Book<NatRule>, judge: &Judge, record: u32, raw: abi::Connection) -> Option<Connection> {
        let (service, member) = book.member(raw.backend).filter(|(_, member)| member.identity == raw.identity)?;
        let flags = table::flags_of(raw.word);
        let family = if flags & abi::IPV6 != 0 { 3 } else { 2 };
        let client = SocketAddr::new(raw.client.get(family)?, u16::from_be(raw.client_port));
        let address = if flags & abi::KEPT_SOURCE != 0 { client.ip() } else { book.address(raw.address)? };
        let hertz = f64::from(self.connections.clock.hertz());
        Some(Connection {
            service: *service,
            client,
            source: SocketAddr::new(address, u16::from_be(raw.port)),
            backend: SocketAddr::new(member.target.address, member.target.port),
            state: ConnectionState::ALL[state_of(flags)],
            idle: Duration::from_secs_f64(f64::from(judge.idle(raw.word)) / hertz),
            record,
            raw,
        })
    }

    /// Ends a connection: packets of it are of none from now on. False when it had ended already.
    ///
    /// # Errors
    /// None at present.
    pub fn end(&self, connection: &Connection) -> Result<bool> {
        Ok(self.connections.end(connection.record, &connection.raw))
    }

    /// Frees the places of connections that have been silent for too long, and forgets backends that are leaving and
    /// have none left. Answers how many connections those were. The data path uses such places again by itself; calling
    /// this every second or minute keeps lists and counts true. Nothing waits meanwhile.
    ///
    /// # Errors
    /// [`Error::Map`], [`Error::TestRun`].
    pub fn collect(&self) -> Result<usize> {
        let collected = self.connections.collect(&self.connections.judge()?);
        self.book().release(&self.core)?;
        Ok(collected)
    }

    /// Whether nothing of any connection is left anywhere, dead ones included. For tests and the curious: reads all tables.
    ///
    /// # Errors
    /// As [`NatBalancer::connections`].
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.counts()?.total() == 0 && self.connections.entries() == 0)
    }

    /// Connections that there can be: [`NatConfig::capacity`], rounded up.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        config::capacity_of(self.connections.len())
    }

    /// From now on, these timeouts hold, also for the connections that there are.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn set_timeouts(&self, timeouts: &NatTimeouts) -> Result<()> {
        let ticks = timeouts.ticks(self.connections.clock.hertz())?;
        for (at, ticks) in ticks.into_iter().enumerate() {
            self.set(offset_of!(Settings, timeout) + 4 * at, ticks);
        }
        Ok(())
    }

    /// From now on, every n-th event of each CPU is reported; 0 for none.
    ///
    /// # Errors
    /// None at present.
    pub fn set_sample(&self, every: u32) -> Result<()> {
        self.set(offset_of!(Settings, sample), every);
        Ok(())
    }

    fn set(&self, offset: usize, word: u32) {
        self.connections.settings.set(0, offset, word);
    }

    /// Connections that were closed or not confirmed and went for new ones.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn evicted(&self) -> Result<u64> {
        const EVICTED: usize = 0;
        Ok(self.core.counters()?.iter().map(|cpu| cpu.own[EVICTED].packets).sum())
    }

    /// The reader of what was reported of connections.
    ///
    /// # Errors
    /// [`Error::EventsTaken`] while another reader of these events lives in this process.
    pub fn events(&self) -> Result<Events<NatEvent>> {
        let book = Arc::clone(&self.book);
        let decode = move |record: &[u8]| {
            let event = bytemuck::try_pod_read_unaligned::<abi::Event>(record).ok()?;
            let book = book.lock().unwrap_or_else(PoisonError::into_inner);
            let service = book.entries().find(|(_, entry)| entry.number == event.service).map(|(service, _)| *service);
            let member = book.member(event.backend).filter(|(_, member)| member.identity == event.identity);
            let backend = member.map(|(_, member)| SocketAddr::new(member.target.address, member.target.port));
            NatEvent::decode(&event, service, backend)
        };
        Events::open(self.name(), self.core.map("events"), Box::new(decode))
    }

    /// Events that were not reported because the ring buffer was full.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn events_lost(&self) -> Result<u64> {
        self.core.events_lost()
    }
}

fn target(backend: SocketAddr) -> Target {
    Target { address: backend.ip(), port: backend.port() }
}

/// Refuses what cannot be translated.
fn targets(service: &ServiceAddr, backends: &[(SocketAddr, u32)]) -> Result<Vec<(Target, u32)>> {
    if service.port.is_none() {
        let expected = "one port: others are for the connections to backends";
        return Err(Error::Invalid { what: "service", value: service.to_string(), expected });
    }
    let wrong =
        |backend: &SocketAddr, expected| Err(Error::Invalid { what: "backend", value: backend.to_string(), expected });
    for (backend, _) in backends {
        if backend.is_ipv4() != service.address.is_ipv4() {
            return wrong(backend, "an address of the service's family");
        }
        if backend.port() == 0 {
            return wrong(backend, "a port from 1 to 65535");
        }
    }
    Ok(backends.iter().map(|(backend, weight)| (target(*backend), *weight)).collect())
}

/// Numbers of services fit a key.
const _: () = assert!(NUMBER_MAX > 4096);
