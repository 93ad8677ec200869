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
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

pub use config::{NatConfig, NatMode, NatService, NatTimeouts, Scheduler};
pub use connection::{Connection, ConnectionCounts, ConnectionState, NatBackendStats, NatServiceStats};
pub use event::{NatEvent, NatEventKind};

use crate::{
    BackendState, Error, Events, Result, Stage,
    abi::nat_balancer::{self as abi, DESTINATION_ONLY, Settings},
    address::Unmapped as _,
    balancer::Book,
    flow_table::Shape,
    stage::{StageCore, StageKind, sealed::Sealed},
    sys::{self, clock::Clock, mmap::LongMapping, object::Plan},
};
use rule::NatRule;
use table::Connections;

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
/// both attached, in the same VLANs, for tags stay as they are; and they have to forward (sysctl
/// `net.ipv4.conf.*.forwarding`, `net.ipv6.conf.all.forwarding`).
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
            book.hold(address.unmapped())?;
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
        book.rule.tuples().sweep();
        connections.settings.set(0, offset_of!(Settings, destination_only), kept.into());
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
        let held: BTreeSet<IpAddr> = config.addresses.iter().map(|address| address.unmapped()).collect();
        core.was_made_with(directory, "addresses", format!("{:?}", book.held), format!("{held:?}"))?;
        core.was_made_with(directory, "reset_unknown", found.reset_unknown != 0, config.reset_unknown)?;
        core.was_made_with(directory, "ring_bytes", core.entries("events"), config.ring_bytes)
    }

    fn book(&self) -> MutexGuard<'_, Book<NatRule>> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
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
