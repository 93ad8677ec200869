//! The balancers' book: which services and backends there are, and every change to the tables that programs read.
//!
//! Records and slots are written before what leads to them. A slot changes by one store, by a rule that is the
//! function's own ([`SlotRule`]), so that at every moment each slot names a backend of the old list or of the new one.
//! What is taken out of use is used again only after a grace period.

mod adopt;
mod edit;
mod release;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    mem::offset_of,
    net::{IpAddr, SocketAddr},
    sync::{Arc, atomic::Ordering},
};

use super::{
    BackendState, BackendStats, Echo, ServiceAddr, ServiceProtocol, ServiceStats,
    hash::{flow_hash, slot_of},
    index::{Index, size_for},
    store::{Slots, lines_of},
};
use crate::{
    Count, Error, Result,
    abi::service::{
        BACKEND_DRAINING, BACKEND_KILLED, BACKEND_REMOVED, BACKEND_USED, Backend, BackendCpu, BalancerSettings,
        SERVICE_BY_SOURCE, SLOT_LINE_WORDS, Service, ServiceCpu, Vip,
    },
    base::{COPIED, Carry, Counted, NextHops, Records, StageCore, counted_entries},
    maglev::{self, Share},
    sys::grace::GracePeriod,
};

/// How a slot goes from one backend to the next.
pub(crate) trait SlotRule: fmt::Debug + Send {
    /// The word that a slot gets when the table names `wanted` (0: none) for it. Called for every slot of a service
    /// whose list has changed, possibly more than once. `slot` counts all slots of all services.
    fn change(&self, slot: u32, word: u32, wanted: u16, is_killed: &dyn Fn(u16) -> bool) -> u32;

    /// When it is now, as records of backends that leave keep it in the first of their function's words.
    fn now(&self) -> u64;

    /// Whether something else than slots' words still leads to a backend that is leaving. `slots` are its service's,
    /// each with its word.
    fn holds(&self, id: u16, record: &Backend, slots: &mut dyn Iterator<Item = (u32, u32)>) -> bool;

    /// Who has which slot: for each, the index in `shares`; those beyond the end, and all of an empty table, are nobody's.
    ///
    /// # Errors
    /// As [`maglev::table`], which this is unless the function schedules otherwise.
    fn table(&self, _service: &Service, shares: &[Share<'_>], size: u32, seed: u64) -> Result<Vec<u32>> {
        maglev::table(shares, size, seed)
    }

    /// The function's own words of a service that is being added, on the virtual address of this number.
    fn service_words(&self, _vip: u16, service: &Service) -> [u64; 5] {
        service.function
    }

    /// What the function knows of the backend that had this number before holds no more.
    fn forget(&self, _id: u16) {}

    /// The function's own words of a backend that is being added.
    fn backend_words(&self, _protocol: ServiceProtocol, _target: Target, _service: &Service) -> [u64; 3] {
        [0; 3]
    }
}

/// The book's maps, see [`Carry`].
pub(crate) const CARRIED: &[(&str, Carry)] = &[
    ("balancer", COPIED),
    ("vip_index", Carry::Rebuilt),
    ("service_index", Carry::Rebuilt),
    ("vips", COPIED),
    ("services", COPIED),
    ("service_states", Carry::Counted),
    ("backends", COPIED),
    ("backend_states", Carry::Counted),
    ("slots", COPIED),
];

/// Sizes, and what programs are told.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BookConfig {
    pub(crate) services: u32,
    pub(crate) backends: u32,
    pub(crate) table_size: u32,
    /// Addresses that are ours without having services.
    pub(crate) held: u32,
    pub(crate) seed: u64,
    pub(crate) echo: Echo,
    /// Messages of our own, all CPUs together.
    pub(crate) answers_per_second: u32,
}

impl BookConfig {
    /// Entries of the maps of `service.h`.
    pub(crate) fn capacities(&self) -> Result<Vec<(&'static str, u32)>> {
        let wrong = |what, value: u32, expected| Err(Error::Invalid { what, value: value.to_string(), expected });
        if !(1..=4096).contains(&self.services) {
            return wrong("services", self.services, "1 to 4096");
        }
        if !(1..=65_534).contains(&self.backends) {
            return wrong("backends", self.backends, "1 to 65534");
        }
        maglev::check_size(self.table_size)?;
        let lines = u64::from(self.services) * u64::from(lines_of(self.table_size));
        let Ok(lines) = u32::try_from(lines * SLOT_LINE_WORDS as u64).map(|_| lines as u32) else {
            return wrong("services", self.services, "fewer services for tables of this size");
        };
        Ok(vec![
            ("vip_index", size_for(self.services + self.held)),
            ("service_index", size_for(self.services)),
            ("vips", self.services + self.held + 1),
            ("services", self.services + 1),
            ("service_states", counted_entries(self.services + 1)),
            ("backends", self.backends + 1),
            ("backend_states", counted_entries(self.backends + 1)),
            ("slots", lines),
        ])
    }

    /// Brings larger tables to their sizes. The indices are built again from the records.
    pub(crate) fn fit(&self, core: &StageCore) -> Result<()> {
        let settings = Records::<BalancerSettings>::of(core, "balancer")?;
        let BalancerSettings { vip_mask, service_mask, probe_base, .. } = self.settings();
        settings.write(0, &BalancerSettings { vip_mask, service_mask, probe_base, ..settings.read(0) });
        Ok(())
    }

    fn settings(&self) -> BalancerSettings {
        BalancerSettings {
            seed: self.seed,
            vip_mask: size_for(self.services + self.held) - 1,
            service_mask: size_for(self.services) - 1,
            echo: self.echo as u32,
            answers_per_second: self.answers_per_second,
            next_identity: 1,
            probe_interface: 0,
            // Above the ports that Linux gives to connections, where all backends find room there.
            probe_base: (65_535 - self.backends).min(61_000),
            table_size: self.table_size,
            reserved: 0,
            vip_filter: 0,
        }
    }
}

/// Where a backend is. Port 0 where the function leaves ports alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Target {
    pub(crate) address: IpAddr,
    pub(crate) port: u16,
}

impl Target {
    /// What tells it from others in a Maglev table.
    fn name(&self) -> Vec<u8> {
        let mut name = match self.address {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        if self.port != 0 {
            name.extend(self.port.to_be_bytes());
        }
        name
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            0 => write!(f, "{}", self.address),
            port => write!(f, "{}", SocketAddr::new(self.address, port)),
        }
    }
}

/// A backend in the book. Its record in the kernel says the same.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Member {
    pub(crate) id: u16,
    pub(crate) target: Target,
    pub(crate) weight: u32,
    pub(crate) state: BackendState,
    pub(crate) identity: u32,
}

impl Member {
    /// Its weight for new flows.
    fn share(&self) -> u32 {
        if self.state == BackendState::Active { self.weight } else { 0 }
    }

    fn is_staying(&self) -> bool {
        matches!(self.state, BackendState::Active | BackendState::Draining)
    }
}

fn flags_of(state: BackendState) -> u32 {
    match state {
        BackendState::Active => 0,
        BackendState::Draining => BACKEND_DRAINING,
        BackendState::Leaving => BACKEND_DRAINING | BACKEND_REMOVED,
        BackendState::Killed => BACKEND_DRAINING | BACKEND_REMOVED | BACKEND_KILLED,
    }
}

/// A service in the book.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) number: u16,
    pub(crate) record: Service,
    pub(crate) members: Vec<Member>,
}

impl Entry {
    /// The first of its slots, among all.
    pub(crate) fn first_slot(&self) -> u32 {
        self.record.first_line * SLOT_LINE_WORDS as u32
    }

    /// The backend there that is not leaving.
    pub(crate) fn staying(&self, target: Target) -> Option<&Member> {
        self.members.iter().find(|member| member.target == target && member.is_staying())
    }
}

/// Where packets are sent to.
fn addresses_of(backends: &Records<Backend>) -> Vec<IpAddr> {
    let used = (1..backends.len()).filter(|id| backends.get(*id, offset_of!(Backend, flags)) & BACKEND_USED != 0);
    let mut addresses: Vec<IpAddr> = used
        .filter_map(|id| {
            let record = backends.read(id);
            record.address.get(record.family)
        })
        .collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

#[derive(Debug)]
pub(crate) struct Book<R> {
    pub(crate) rule: R,
    pub(crate) settings: Records<BalancerSettings>,
    pub(crate) slots: Slots,
    pub(crate) backends: Records<Backend>,
    services: Records<Service>,
    vips: Records<Vip>,
    vip_index: Index,
    service_index: Index,
    entries: BTreeMap<ServiceAddr, Entry>,
    /// Numbers of virtual addresses.
    addresses: BTreeMap<IpAddr, u16>,
    /// Those that stay when their last service goes.
    pub(crate) held: BTreeSet<IpAddr>,
    /// Backend numbers that were never used start here.
    fresh: u16,
    free: Vec<u16>,
    table_size: u32,
    grace: Option<GracePeriod>,
    next_hops: Arc<NextHops>,
}

impl<R: SlotRule> Book<R> {
    /// Over new tables.
    pub(crate) fn new(core: &StageCore, config: &BookConfig, rule: R) -> Result<Self> {
        let book = Self::open(core, rule, config.table_size)?;
        book.settings.write(0, &config.settings());
        Ok(book)
    }

    fn open(core: &StageCore, rule: R, table_size: u32) -> Result<Self> {
        let backends = Records::<Backend>::of(core, "backends")?;
        core.next_hops().want(move || addresses_of(&backends));
        Ok(Self {
            rule,
            settings: Records::of(core, "balancer")?,
            slots: Slots::of(core)?,
            backends: Records::of(core, "backends")?,
            services: Records::of(core, "services")?,
            vips: Records::of(core, "vips")?,
            vip_index: Index::of(core, "vip_index")?,
            service_index: Index::of(core, "service_index")?,
            entries: BTreeMap::new(),
            addresses: BTreeMap::new(),
            held: BTreeSet::new(),
            fresh: 1,
            free: Vec::new(),
            table_size,
            grace: None,
            next_hops: Arc::clone(core.next_hops()),
        })
    }

    /// Refuses another value of what cannot change while the tables live.
    pub(crate) fn check_fixed(&self, core: &StageCore, config: &BookConfig) -> Result<()> {
        core.is_fixed("services", core.entries("services") - 1, config.services)?;
        core.is_fixed("backends", core.entries("backends") - 1, config.backends)?;
        core.is_fixed("table_size", self.table_size, config.table_size)?;
        if self.settings.read(0).seed != config.seed {
            // It is a secret.
            core.is_fixed("seed", "of its own", "another one")?;
        }
        Ok(())
    }

    /// Follows what can change of a configuration.
    pub(crate) fn configure(&self, config: &BookConfig) {
        self.set_echo(config.echo);
        self.settings.set(0, std::mem::offset_of!(BalancerSettings, answers_per_second), config.answers_per_second);
    }

    /// Tells programs that packets from an address like this may be from one of ours: before it is.
    fn expect_vip(&self, address: IpAddr) {
        let last = match address {
            IpAddr::V4(ip) => ip.octets()[3],
            IpAddr::V6(ip) => ip.octets()[15],
        };
        let filter = self.settings.read(0).vip_filter | 1 << (last & 63);
        let offset = std::mem::offset_of!(BalancerSettings, vip_filter);
        // Either half has bits only added to it.
        for (half, word) in bytemuck::cast::<u64, [u32; 2]>(filter).into_iter().enumerate() {
            self.settings.set(0, offset + 4 * half, word);
        }
    }

    /// All services, in the order of their addresses.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (&ServiceAddr, &Entry)> {
        self.entries.iter()
    }

    /// # Errors
    /// [`Error::UnknownService`].
    pub(crate) fn entry(&self, service: &ServiceAddr) -> Result<&Entry> {
        self.entries.get(service).ok_or_else(|| unknown(service))
    }

    /// The service that packets to this address and port belong to.
    pub(crate) fn find(&self, service: &ServiceAddr) -> Option<(&ServiceAddr, &Entry)> {
        self.entries.get_key_value(service).or_else(|| self.entries.get_key_value(&service.any_port()))
    }

    /// Numbers of the addresses of a family that were made ours by [`Book::hold`].
    pub(crate) fn held(&self, ipv4: bool) -> impl Iterator<Item = u16> {
        let of_family = self.held.iter().filter(move |address| address.is_ipv4() == ipv4);
        of_family.filter_map(|address| self.addresses.get(address).copied())
    }

    /// Whether packets to this address are ours.
    pub(crate) fn is_ours(&self, address: IpAddr) -> bool {
        self.addresses.contains_key(&address)
    }

    /// The virtual address of this number.
    pub(crate) fn address(&self, number: u16) -> Option<IpAddr> {
        self.addresses.iter().find(|(_, known)| **known == number).map(|(address, _)| *address)
    }

    /// The backend of this number.
    pub(crate) fn member(&self, id: u16) -> Option<(&ServiceAddr, &Member)> {
        self.entries.iter().find_map(|(service, entry)| {
            let member = entry.members.iter().find(|member| member.id == id)?;
            Some((service, member))
        })
    }

    /// A slot of this service, among all slots, for a client; `None` when the families differ.
    pub(crate) fn slot(&self, service: &ServiceAddr, entry: &Entry, client: SocketAddr, port: u16) -> Option<u32> {
        let by_source = entry.record.flags & SERVICE_BY_SOURCE != 0;
        let ports = if by_source { (0, 0) } else { (client.port(), port) };
        let seed = self.settings.read(0).seed;
        let hash = flow_hash(seed, client.ip(), service.address, ports, service.protocol as u8)?;
        Some(entry.first_slot() + slot_of(entry.record.slots, hash))
    }

    /// A service's slots, each with its word.
    pub(crate) fn words(&self, entry: &Entry) -> impl Iterator<Item = (u32, u32)> {
        let words = self.slots.range(entry.record.first_line, entry.record.slots);
        (entry.first_slot()..).zip(words.iter().map(|word| word.load(Ordering::Acquire)))
    }

    /// The word of a slot.
    pub(crate) fn word(&self, slot: u32) -> u32 {
        let line = SLOT_LINE_WORDS as u32;
        self.slots.range(slot / line, slot % line + 1)[(slot % line) as usize].load(Ordering::Acquire)
    }

    /// Health checks come in by this interface; 0: none do.
    pub(crate) fn set_probe_interface(&self, index: u32) {
        self.settings.set(0, std::mem::offset_of!(BalancerSettings, probe_interface), index);
    }

    /// Whether an ICMP echo is answered, and what else programs are told, may change at any time.
    pub(crate) fn set_echo(&self, echo: Echo) {
        self.settings.set(0, std::mem::offset_of!(BalancerSettings, echo), echo as u32);
    }
}

fn unknown(service: &ServiceAddr) -> Error {
    Error::UnknownService { service: service.to_string() }
}

/// What was counted of a backend, and the function's own counter.
pub(crate) fn backend_stats(core: &StageCore, id: u16) -> Result<(BackendStats, u64)> {
    let cpus = Counted::<BackendCpu>::of(core, "backend_states").get(id.into())?;
    let stats = cpus.iter().fold(BackendStats::default(), |sum, cpu| BackendStats {
        forwarded: sum.forwarded + Count { packets: cpu.packets, bytes: cpu.bytes },
        new_flows: sum.new_flows + cpu.flows,
    });
    Ok((stats, cpus.iter().map(|cpu| cpu.function).sum()))
}

/// What was counted of a service, and the function's own counters.
pub(crate) fn service_stats(core: &StageCore, number: u16) -> Result<(ServiceStats, [u64; 3])> {
    let mut own = [0; 3];
    let mut sum = ServiceStats::default();
    for cpu in Counted::<ServiceCpu>::of(core, "service_states").get(number.into())? {
        sum.received += Count { packets: cpu.packets, bytes: cpu.bytes };
        sum.new_flows += cpu.flows;
        sum.too_big += cpu.too_big;
        sum.no_backend += cpu.no_backend;
        own.iter_mut().zip(cpu.function).for_each(|(sum, count)| *sum += count);
    }
    Ok((sum, own))
}
