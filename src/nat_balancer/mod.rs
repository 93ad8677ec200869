//! [`NatBalancer`]: a layer-4 balancer that translates addresses and ports.

mod config;
mod connection;
mod event;
mod lookup;
mod rule;
mod service;
mod table;

use std::{
    collections::BTreeSet,
    mem::offset_of,
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::{Arc, MutexGuard},
};

pub use config::{NatConfig, NatMode, NatService, NatTimeouts, Scheduler};
pub use connection::{Connection, ConnectionCounts, ConnectionState, NatBackendStats, NatServiceStats};
pub use event::{NatEvent, NatEventKind};

use crate::{
    BackendState, Error, Events, Result, Stage,
    abi::nat_balancer::{self as abi, DESTINATION_ONLY, STATES, Settings},
    address::Unmapped as _,
    balancer::{Book, book},
    base::{self, COPIED, Carry, Edit, Growth, Sets, StageCore, StageKind, State},
    flow_table::Shape,
    stage::sealed::Sealed,
    sys::{self, clock::Clock, mmap::LongMapping, object::Plan},
};
use rule::NatRule;
use table::Connections;

static KIND: StageKind = StageKind {
    name: "nat_balancer",
    abi: crate::abi::fingerprint(env!("XDPKIT_ABI_NAT_BALANCER")),
    sized_by: &[
        ("services", &["vip_index", "service_index", "vips", "services", "service_states"]),
        ("backends", &["backends", "backend_states", "loads", "backend_index"]),
        ("services` and `table_size", &["slots"]),
        ("capacity", &["connections", "flows_lines"]),
        ("ring_bytes", &["events"]),
    ],
    carried: &[book::CARRIED, &[("nat", COPIED), ("loads", COPIED), ("backend_index", Carry::Rebuilt)]],
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
/// both attached: the devices themselves, not VLANs on them or bridges that they are ports of. All of them have to forward (sysctl
/// `net.ipv4.conf.*.forwarding`, `net.ipv6.conf.all.forwarding`). The kernel chooses the next hop of a connection in each
/// direction, and again when links, routes, rules or neighbours change.
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
/// A change takes effect with the next packet. When another process adopts the tables, edits by this value return
/// [`Error::Superseded`].
///
/// Needs Linux 5.18 or newer (tested from 6.1 on), `CAP_BPF`, `CAP_PERFMON` and `CAP_NET_ADMIN`.
#[derive(Debug)]
pub struct NatBalancer {
    core: StageCore,
    state: Arc<State<Book<NatRule>>>,
    connections: Arc<Connections>,
}

impl Sealed for NatBalancer {
    fn core(&self) -> &StageCore {
        &self.core
    }
}

impl Stage for NatBalancer {}

/// The services, as the tables have them.
fn read_book(core: &StageCore, connections: &Arc<Connections>) -> Result<Book<NatRule>> {
    let rule = NatRule::new(Arc::clone(connections), LongMapping::new(core.map("backend_index"))?);
    let book = Book::adopt(core, rule)?;
    let mut kept = false;
    for (service, entry) in book.entries() {
        if entry.record.flags & DESTINATION_ONLY == 0 {
            continue;
        }
        kept = true;
        for member in &entry.members {
            let number = book.backends.read(member.id.into()).function[1] as u16;
            let tuple = (service.protocol, member.target.address, member.target.port);
            book.rule.tuples().adopt(tuple, number);
        }
    }
    book.rule.tuples().repair();
    connections.settings.set(0, offset_of!(Settings, destination_only), kept.into());
    Ok(book)
}

impl NatBalancer {
    /// Loads the program and creates its tables.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::MissingCapability`], [`Error::Forbidden`], [`Error::KernelTooOld`],
    /// [`Error::NoMemory`], [`Error::Verifier`], [`Error::Load`].
    pub fn load(config: &NatConfig) -> Result<Self> {
        let clock = Clock::new()?;
        let hertz = clock.hertz();
        let sizes = config.capacities()?;
        let random = || {
            let mut word = [0; 8];
            sys::fill_random(&mut word);
            u64::from_ne_bytes(word)
        };
        let settings = config.settings(hertz, std::array::from_fn(|_| random()))?;
        let core = StageCore::load(&KIND, &config.name, &sizes)?;
        let connections = Arc::new(Connections::create(&core, clock, &settings, config.shape(), random)?);
        let rule = NatRule::new(Arc::clone(&connections), LongMapping::new(core.map("backend_index"))?);
        let mut book = Book::new(&core, &config.book(), rule)?;
        for address in &config.addresses {
            book.hold(address.unmapped())?;
        }
        Ok(Self::of(core, book, connections))
    }

    /// Takes over the tables (services, connections, counters) that an earlier process pinned under this name, as they are. To
    /// take over its attachments too, attach with the same [`AttachOptions::pin`](crate::AttachOptions::pin).
    ///
    /// The earlier process may have died at any moment: what it had begun to change is finished.
    ///
    /// # Errors
    /// [`Error::PinMissing`]; [`Error::PinMismatch`] when this build cannot understand the tables; [`Error::PinsLocked`].
    pub fn adopt(directory: impl AsRef<Path>, name: &str) -> Result<Self> {
        Self::take_over(directory.as_ref(), name, None)
    }

    fn take_over(directory: &Path, name: &str, growth: Option<&Growth<'_>>) -> Result<Self> {
        let unusable = || Error::PinMismatch {
            path: base::map_path(directory, name, "flows_table"),
            what: "the flow table".into(),
            found: "of other sizes than it says".into(),
            expected: "a table that a NAT balancer has made".into(),
        };
        let (core, (book, connections)) = StageCore::adopt(&KIND, directory, name, growth, |core| {
            let connections = Arc::new(Connections::adopt(core, Clock::new()?)?.ok_or_else(unusable)?);
            connections.heal();
            Ok((read_book(core, &connections)?, connections))
        })?;
        Ok(Self::of(core, book, connections))
    }

    fn of(core: StageCore, book: Book<NatRule>, connections: Arc<Connections>) -> Self {
        let known = Arc::clone(&connections);
        let state = Arc::new(State::new(book, move |core| {
            known.heal();
            read_book(core, &known)
        }));
        Self { core, state, connections }
    }

    /// Adopts what is pinned there under the configuration's name, else loads: what a process does at its start when
    /// it wants to go on where the last one ended. An adopted balancer keeps its services and connections, and follows the
    /// configuration as by [`NatBalancer::configure`].
    ///
    /// A configuration with more services or backends makes larger tables with the same in them. They
    /// are put into every pinned chain at the first attachment, or by [`Stage::ready`]; from then on the earlier process is superseded.
    ///
    /// # Errors
    /// As [`NatBalancer::load`], [`NatBalancer::adopt`] and [`NatBalancer::configure`].
    pub fn load_or_adopt(directory: impl AsRef<Path>, config: &NatConfig) -> Result<Self> {
        base::load_or_adopt(
            directory.as_ref(),
            &config.name,
            |directory, name| {
                let fit = |sets: &Sets<'_>, core: &StageCore| {
                    config.book().fit(core)?;
                    table::fit(sets, core, config.index())
                };
                Self::take_over(directory, name, Some(&Growth { wanted: &config.capacities()?, fit: &fit }))
            },
            || Self::load(config),
            |adopted| adopted.configure(config),
        )
    }

    /// From now on, follows this configuration, whose name is passed over.
    ///
    /// # Errors
    /// [`Error::Invalid`]; [`Error::PinnedSetting`] for another value of what cannot change while the tables live: `capacity`,
    /// `services` and `backends` (of these, an adoption makes more), `table_size`, `seed`, `addresses`, `ports`, `ring_bytes`;
    /// [`Error::Superseded`]. Nothing was changed then.
    pub fn configure(&self, config: &NatConfig) -> Result<()> {
        let (core, hertz) = (&self.core, self.connections.clock.hertz());
        config.capacities()?;
        let timeouts = config.timeouts.ticks(hertz)?;
        let (book, found) = (self.edit()?, self.connections.settings.read(0));
        let capacity = |lines| Shape::capacity_of(lines) / config::ENTRIES_A_FLOW;
        core.is_fixed("capacity", capacity(core.entries("flows_lines")), capacity(config.shape().total()))?;
        book.check_fixed(core, &config.book())?;
        let ports = format!("{}..={}", found.first_port, found.last_port);
        core.is_fixed("ports", ports, format!("{:?}", config.ports))?;
        let held: BTreeSet<IpAddr> = config.addresses.iter().map(|address| address.unmapped()).collect();
        core.is_fixed("addresses", format!("{:?}", book.held), format!("{held:?}"))?;
        core.is_fixed("ring_bytes", core.entries("events"), config.ring_bytes)?;
        book.configure(&config.book());
        self.write_timeouts(timeouts);
        self.set(offset_of!(Settings, reset_unknown), config.reset_unknown.into());
        self.set(offset_of!(Settings, sample), config.sample);
        Ok(())
    }

    fn book(&self) -> MutexGuard<'_, Book<NatRule>> {
        self.state.look()
    }

    fn edit(&self) -> Result<Edit<'_, Book<NatRule>>> {
        self.state.edit(&self.core)
    }

    /// Connections that there can be: [`NatConfig::capacity`], rounded up.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        config::capacity_of(self.connections.len())
    }

    /// From now on, these timeouts hold, also for the connections that there are.
    ///
    /// # Errors
    /// [`Error::Invalid`]; [`Error::Superseded`].
    pub fn set_timeouts(&self, timeouts: &NatTimeouts) -> Result<()> {
        let ticks = timeouts.ticks(self.connections.clock.hertz())?;
        let _edit = self.edit()?;
        self.write_timeouts(ticks);
        Ok(())
    }

    fn write_timeouts(&self, ticks: [u32; STATES]) {
        for (at, ticks) in ticks.into_iter().enumerate() {
            self.set(offset_of!(Settings, timeout) + 4 * at, ticks);
        }
    }

    /// From now on, every n-th event of each CPU is reported; 0 for none.
    ///
    /// # Errors
    /// [`Error::Superseded`].
    pub fn set_sample(&self, every: u32) -> Result<()> {
        let _edit = self.edit()?;
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
        let state = Arc::clone(&self.state);
        let decode = move |record: &[u8]| {
            let event = bytemuck::try_pod_read_unaligned::<abi::Event>(record).ok()?;
            let book = state.look();
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
