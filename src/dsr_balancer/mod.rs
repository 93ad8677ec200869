//! [`DsrBalancer`]: direct server return, to neighbours or through tunnels.

mod config;
mod entry;
mod event;
mod lookup;
mod probe;
mod transition;

use std::{
    net::IpAddr,
    path::Path,
    sync::{
        Arc, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
};

pub use config::DsrConfig;
pub use entry::{DsrBackendEntry, DsrFlow, DsrService, DsrServiceEntry, Forwarding, Placement, PlacementReason};
pub use event::{DsrEvent, Way};
use ipnet::IpNet;
use transition::Transitions;

use crate::{
    Error, Events, Result, Stage,
    abi::{
        dsr_balancer::{Event, IN_TRANSITION, IPIP, OUTER_FRAGMENTS, RECORDED, Settings, UNRECORDED},
        service::{SERVICE_BY_SOURCE, SLOT_BACKEND, SLOT_PREVIOUS_SHIFT, Service},
    },
    address::Unmapped as _,
    balancer::{
        Book, Echo, ServiceAddr, Target,
        book::{self, Entry, backend_stats, service_stats},
    },
    base::{self, COPIED, Edit, Growth, Sets, StageCore, StageKind, State},
    flow_table::Shape,
    host,
    stage::sealed::Sealed,
    sys::{self, object::Plan, route::Route},
};

static KIND: StageKind = StageKind {
    name: "dsr_balancer",
    abi: crate::abi::fingerprint(env!("XDPKIT_ABI_DSR_BALANCER")),
    sized_by: &[
        ("services", &["vip_index", "service_index", "vips", "services", "service_states"]),
        ("backends", &["backends", "backend_states", "paths"]),
        ("services` and `table_size", &["slots", "transitions"]),
        ("flows", &["flows_lines", "flow_sides"]),
        ("ring_bytes", &["events"]),
    ],
    carried: &[book::CARRIED, &[("settings", COPIED), ("transitions", COPIED), ("paths", COPIED)]],
    load: |plan: &Plan<'_>| {
        let mut storage = std::mem::MaybeUninit::uninit();
        let builder = sys::skel::dsr_balancer::DsrBalancerSkelBuilder::default();
        sys::object::load(builder, &mut storage, "dsr_balancer", plan)
    },
};

/// Spreads clients' packets over backends that answer past the balancer.
///
/// A service is a virtual address with a port (or any) and TCP or UDP. Which backend a flow goes to, a Maglev table
/// ([`maglev`](crate::maglev)) says, and nothing is remembered of it: a million flows cost what one costs. Only when the
/// list of backends changes, the slots of the table whose backend changes are *in transition*: they remember the backend
/// before, and the flows that begin or go on meanwhile are recorded. A TCP SYN goes to the new backend; packets of flows
/// that are not known stay with the one before; so no flow is moved that sends at least once in
/// [`DsrConfig::idle`]. When nothing goes to the earlier backend for so long, the slot forgets it.
///
/// What cannot be known without remembering all flows: a SYN that is repeated on a live flow whose slot has just changed
/// is taken for a new flow, and a flow that is silent for longer than `idle` may be moved. UDP tells of no beginning: see
/// [`DsrConfig::udp_grace`].
///
/// ```no_run
/// use xdpkit::{AttachOptions, DsrBalancer, DsrConfig, DsrService, Stage as _};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let balancer = DsrBalancer::load(&DsrConfig::default())?;
/// let web = "tcp/192.0.2.1:80".parse()?;
/// balancer.insert_service(web, DsrService::l2(), [("192.168.178.11".parse()?, 1), ("192.168.178.12".parse()?, 3)])?;
/// let _attachment = balancer.attach(&AttachOptions::new("eth0"))?;
/// balancer.drain(web, "192.168.178.11".parse()?)?;
/// # Ok(())
/// # }
/// ```
///
/// The next hop to a backend is the kernel's choice, by its rules, routes and neighbours, made again when they change; the
/// interface that packets come in by has to forward (`net.ipv4.ip_forward`, `net.ipv6.conf.all.forwarding`). Interfaces
/// that packets leave by are found in the network namespace where the balancer is attached; routes that calls look up,
/// in that of the calling thread. What is not for a service goes on untouched.
///
/// Needs Linux 5.18 or newer (tested from 6.1 on), `CAP_BPF`, `CAP_PERFMON` and `CAP_NET_ADMIN`.
#[derive(Debug)]
pub struct DsrBalancer {
    core: StageCore,
    state: Arc<State<Book<Transitions>>>,
    check_on_link: AtomicBool,
}

impl Sealed for DsrBalancer {
    fn core(&self) -> &StageCore {
        &self.core
    }
}

impl Stage for DsrBalancer {}

/// The services and flows, as the tables have them.
fn read_book(core: &StageCore) -> Result<Book<Transitions>> {
    let flows = core.adopt_flow_table("flows")?;
    Book::adopt(core, Transitions::of(core, flows)?)
}

impl DsrBalancer {
    /// Loads the program and creates its tables.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::MissingCapability`], [`Error::Forbidden`], [`Error::KernelTooOld`],
    /// [`Error::NoMemory`], [`Error::Verifier`], [`Error::Load`].
    pub fn load(config: &DsrConfig) -> Result<Self> {
        let core = StageCore::load(&KIND, &config.name, &config.capacities()?)?;
        let flows = core.create_flow_table("flows", config.flow_shape())?;
        core.create_flow_table("fragments", config::fragment_shape())?;
        let rule = Transitions::of(&core, flows)?;
        rule.settings.write(0, &config.settings());
        let book = Book::new(&core, &config.book(), rule)?;
        Ok(Self::of(core, book, config.check_on_link))
    }

    /// Takes over the tables (services, backends, flows, settings, counters) that an earlier process pinned under this
    /// name, as they are. What that process was changing when it died is finished. To take over its attachments too, attach
    /// with the same [`AttachOptions::pin`](crate::AttachOptions::pin).
    ///
    /// # Errors
    /// [`Error::PinMissing`]; [`Error::PinMismatch`] when this build cannot understand the tables; [`Error::PinsLocked`].
    pub fn adopt(directory: impl AsRef<Path>, name: &str) -> Result<Self> {
        Self::take_over(directory.as_ref(), name, None)
    }

    fn take_over(directory: &Path, name: &str, growth: Option<&Growth<'_>>) -> Result<Self> {
        let (core, book) = StageCore::adopt(&KIND, directory, name, growth, |core| {
            core.adopt_flow_table("fragments")?;
            read_book(core)
        })?;
        Ok(Self::of(core, book, true))
    }

    fn of(core: StageCore, book: Book<Transitions>, check_on_link: bool) -> Self {
        let state = Arc::new(State::new(book, read_book));
        Self { core, state, check_on_link: check_on_link.into() }
    }

    /// Adopts what is pinned there under the configuration's name, else loads: what a process does at its start when
    /// it wants to go on where the last one ended. An adopted balancer keeps its services and flows, and follows the
    /// configuration as by [`DsrBalancer::configure`].
    ///
    /// A configuration with more services or backends makes larger tables with the same in them. They
    /// are put into every pinned chain at the first attachment, or by [`Stage::ready`]; from then on the earlier process is superseded.
    ///
    /// # Errors
    /// As [`DsrBalancer::load`], [`DsrBalancer::adopt`] and [`DsrBalancer::configure`].
    pub fn load_or_adopt(directory: impl AsRef<Path>, config: &DsrConfig) -> Result<Self> {
        base::load_or_adopt(
            directory.as_ref(),
            &config.name,
            |directory, name| {
                let fit = |_: &Sets<'_>, core: &StageCore| config.book().fit(core).map(|()| Vec::new());
                Self::take_over(directory, name, Some(&Growth { wanted: &config.capacities()?, fit: &fit }))
            },
            || Self::load(config),
            |adopted| adopted.configure(config),
        )
    }

    /// From now on, follows this configuration, whose name is passed over. Without `outer_v4` or `outer_v6`, outer sources
    /// stay what they are.
    ///
    /// # Errors
    /// [`Error::Invalid`]; [`Error::PinnedSetting`] for another value of what cannot change while the tables live: `services`
    /// and `backends` (of these, an adoption makes more), `table_size`, `seed`, `flows`, `ring_bytes`; [`Error::Superseded`].
    /// Nothing was changed then.
    pub fn configure(&self, config: &DsrConfig) -> Result<()> {
        let core = &self.core;
        config.capacities()?;
        let book = self.edit()?;
        book.check_fixed(core, &config.book())?;
        let flows = Shape::capacity_of(core.entries("flows_lines"));
        core.is_fixed("flows", flows, config.flow_shape().capacity())?;
        core.is_fixed("ring_bytes", core.entries("events"), config.ring_bytes)?;
        let (found, mut wanted) = (book.rule.settings.read(0), config.settings());
        // Without a prefix, they are this host's own addresses, which are found out when they are needed.
        if config.outer_v4.is_none() {
            (wanted.outer4, wanted.outer4_mask) = (found.outer4, found.outer4_mask);
        }
        if config.outer_v6.is_none() {
            (wanted.outer6, wanted.outer6_mask) = (found.outer6, found.outer6_mask);
        }
        book.rule.settings.write(0, &wanted);
        book.configure(&config.book());
        self.check_on_link.store(config.check_on_link, Ordering::Relaxed);
        Ok(())
    }

    fn book(&self) -> MutexGuard<'_, Book<Transitions>> {
        self.state.look()
    }

    fn edit(&self) -> Result<Edit<'_, Book<Transitions>>> {
        self.state.edit(&self.core)
    }

    /// From now on, does this with ICMP echo requests for virtual addresses.
    ///
    /// # Errors
    /// [`Error::Superseded`].
    pub fn set_echo(&self, echo: Echo) -> Result<()> {
        self.edit()?.set_echo(echo);
        Ok(())
    }

    /// Adds a service with its backends, each with a weight. Packets find it when all is in place.
    ///
    /// # Errors
    /// [`Error::ServiceExists`]; [`Error::Full`]; [`Error::Invalid`] for addresses that no service or backend can have,
    /// a backend that is the service's own address, [`DsrService::outer_fragments`] of a service without outer packets, or an
    /// L2 backend that is not on a link of this host ([`DsrConfig::check_on_link`]). Nothing was changed then.
    pub fn insert_service(
        &self,
        address: ServiceAddr,
        service: DsrService,
        backends: impl IntoIterator<Item = (IpAddr, u32)>,
    ) -> Result<()> {
        let address = address.unmapped();
        let list = self.checked(&address, service.forwarding, backends)?;
        let mut flags = 0;
        if service.forwarding == Forwarding::IpIp {
            flags |= IPIP;
        }
        if service.by_source {
            flags |= SERVICE_BY_SOURCE;
        }
        if service.outer_fragments {
            if service.forwarding != Forwarding::IpIp {
                let expected = "a service of `Forwarding::IpIp`: others have no outer packets";
                return Err(Error::Invalid { what: "outer_fragments", value: address.to_string(), expected });
            }
            flags |= OUTER_FRAGMENTS;
        }
        let record = Service { flags, ..bytemuck::Zeroable::zeroed() };
        self.edit()?.insert_service(&self.core, address, record, &list)
    }

    /// Removes a service: packets for it are none of ours any more.
    ///
    /// # Errors
    /// [`Error::UnknownService`]; [`Error::Map`].
    pub fn remove_service(&self, service: ServiceAddr) -> Result<()> {
        let service = service.unmapped();
        self.edit()?.remove_service(&self.core, &service)
    }

    /// Adds a backend, or gives one that is there a weight and new flows (0: no new flows, as [`DsrBalancer::drain`]).
    /// Answers the weight that it had, 0 when it was draining.
    ///
    /// One of the same address that is leaving is taken for another host: it is killed.
    ///
    /// # Errors
    /// [`Error::UnknownService`]; else as [`DsrBalancer::insert_service`].
    pub fn set_backend(&self, service: ServiceAddr, backend: IpAddr, weight: u32) -> Result<Option<u32>> {
        let service = service.unmapped();
        let forwarding = forwarding_of(self.book().entry(&service)?);
        let list = self.checked(&service, forwarding, [(backend, weight)])?;
        let (target, weight) = list[0];
        self.edit()?.set_backend(&self.core, &service, target, weight)
    }

    /// Makes this the service's list of backends, with one change of its table: those that are not in it are removed as by
    /// [`DsrBalancer::remove_backend`].
    ///
    /// # Errors
    /// As [`DsrBalancer::set_backend`]. Nothing was changed then.
    pub fn set_backends(&self, service: ServiceAddr, backends: impl IntoIterator<Item = (IpAddr, u32)>) -> Result<()> {
        let service = service.unmapped();
        let forwarding = forwarding_of(self.book().entry(&service)?);
        let list = self.checked(&service, forwarding, backends)?;
        self.edit()?.set_backends(&self.core, &service, &list)
    }

    /// Gives a backend no new flows; those that it has stay. [`DsrBalancer::set_backend`] brings it back.
    ///
    /// # Errors
    /// [`Error::UnknownService`], [`Error::UnknownBackend`].
    pub fn drain(&self, service: ServiceAddr, backend: IpAddr) -> Result<()> {
        let service = service.unmapped();
        self.edit()?.drain(&self.core, &service, target(backend))
    }

    /// Drains a backend, and forgets it when all its slots have forgotten it. Added again, it is another backend.
    ///
    /// # Errors
    /// As [`DsrBalancer::drain`].
    pub fn remove_backend(&self, service: ServiceAddr, backend: IpAddr) -> Result<()> {
        let service = service.unmapped();
        self.edit()?.remove_backend(&self.core, &service, target(backend))
    }

    /// Takes a backend out at once, with all flows that it has: their next packets go to other backends, which know
    /// nothing of them. For a host that is dead.
    ///
    /// # Errors
    /// As [`DsrBalancer::drain`].
    pub fn kill(&self, service: ServiceAddr, backend: IpAddr) -> Result<()> {
        let service = service.unmapped();
        self.edit()?.kill(&self.core, &service, target(backend))
    }

    /// All services, in the order of protocol and address.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn services(&self) -> Result<Vec<DsrServiceEntry>> {
        let book = self.settled()?;
        book.entries().map(|(address, entry)| self.service_entry(&book, *address, entry)).collect()
    }

    /// One service.
    ///
    /// # Errors
    /// [`Error::UnknownService`]; [`Error::Map`].
    pub fn service(&self, service: ServiceAddr) -> Result<DsrServiceEntry> {
        let service = service.unmapped();
        let book = self.settled()?;
        self.service_entry(&book, service, book.entry(&service)?)
    }

    fn service_entry(&self, book: &Book<Transitions>, address: ServiceAddr, entry: &Entry) -> Result<DsrServiceEntry> {
        let (stats, own) = service_stats(&self.core, entry.number)?;
        let in_transition = book.words(entry).filter(|(_, word)| word >> SLOT_PREVIOUS_SHIFT != 0).count();
        Ok(DsrServiceEntry {
            address,
            service: DsrService {
                forwarding: forwarding_of(entry),
                by_source: entry.record.flags & SERVICE_BY_SOURCE != 0,
                outer_fragments: entry.record.flags & OUTER_FRAGMENTS != 0,
            },
            slots: entry.record.slots,
            slots_in_transition: in_transition as u32,
            stats,
            packets_in_transition: own[IN_TRANSITION],
            recorded: own[RECORDED],
            unrecorded: own[UNRECORDED],
        })
    }

    /// The backends of a service, in the order in which they were added; those that are leaving, too.
    ///
    /// # Errors
    /// [`Error::UnknownService`]; [`Error::Map`].
    pub fn backends(&self, service: ServiceAddr) -> Result<Vec<DsrBackendEntry>> {
        let service = service.unmapped();
        let book = self.settled()?;
        let entry = book.entry(&service)?;
        let (mut present, mut previous) = (vec![0; 1 << 16], vec![0; 1 << 16]);
        for (_, word) in book.words(entry) {
            present[(word & SLOT_BACKEND) as usize] += 1;
            previous[(word >> SLOT_PREVIOUS_SHIFT) as usize] += 1;
        }
        let list = entry.members.iter().map(|member| {
            Ok(DsrBackendEntry {
                address: member.target.address,
                weight: member.weight,
                state: member.state,
                identity: member.identity,
                slots: present[usize::from(member.id)],
                slots_leaving: previous[usize::from(member.id)],
                stats: backend_stats(&self.core, member.id)?.0,
            })
        });
        list.collect()
    }

    /// The reader of changes of the ways to backends.
    ///
    /// # Errors
    /// [`Error::EventsTaken`] while another reader of these events lives in this process.
    pub fn events(&self) -> Result<Events<DsrEvent>> {
        let state = Arc::clone(&self.state);
        let decode = move |record: &[u8]| {
            let event = bytemuck::try_pod_read_unaligned::<Event>(record).ok()?;
            let book = state.look();
            let member = book.member(event.backend as u16).filter(|(_, member)| member.identity == event.identity);
            DsrEvent::decode(&event, member.map(|(service, member)| (*service, member.target.address)))
        };
        Events::open(self.name(), self.core.map("events"), Box::new(decode))
    }

    /// Flows that are recorded at the moment, those that are idle among them.
    #[must_use]
    pub fn recorded_flows(&self) -> usize {
        self.book().rule.recorded()
    }

    /// What there is after [`DsrBalancer::settle`], or without it where another process has taken over.
    fn settled(&self) -> Result<MutexGuard<'_, Book<Transitions>>> {
        match self.state.try_edit(&self.core) {
            Ok(mut book) => self.settle(&mut book)?,
            Err(Error::Superseded { .. } | Error::PinsLocked { .. }) => {}
            Err(error) => return Err(error),
        }
        Ok(self.book())
    }

    /// Ends the transitions whose time is over in slots that no packet came to, and forgets backends that are gone. All
    /// that lists or changes does so, too.
    fn settle(&self, book: &mut Book<Transitions>) -> Result<()> {
        let now = transition::now();
        for (_, entry) in book.entries() {
            let words = book.slots.range(entry.record.first_line, entry.record.slots);
            for (slot, word) in (entry.first_slot()..).zip(words) {
                let is_over = |word: u32| word >> SLOT_PREVIOUS_SHIFT != 0 && book.rule.is_over(slot, now);
                let _ = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
                    is_over(word).then_some(word & SLOT_BACKEND)
                });
            }
        }
        book.release(&self.core)
    }

    /// The list as the book takes it, after a look at the routes.
    fn checked(
        &self,
        service: &ServiceAddr,
        forwarding: Forwarding,
        backends: impl IntoIterator<Item = (IpAddr, u32)>,
    ) -> Result<Vec<(Target, u32)>> {
        let mut list = Vec::new();
        for (backend, weight) in backends {
            let backend = backend.unmapped();
            self.check_backend(service, forwarding, backend)?;
            list.push((target(backend), weight));
        }
        Ok(list)
    }

    fn check_backend(&self, service: &ServiceAddr, forwarding: Forwarding, backend: IpAddr) -> Result<()> {
        let refuse = |expected| Err(Error::Invalid { what: "backend", value: backend.to_string(), expected });
        match forwarding {
            Forwarding::L2 if backend.is_ipv4() != service.address.is_ipv4() => {
                refuse("an address of the service's family: L2 forwarding leaves packets as they are")
            }
            Forwarding::L2 if self.check_on_link.load(Ordering::Relaxed) => {
                match find_route(backend, |route| !route.gateway)? {
                    Some(Route { local: true, .. }) => refuse("another host"),
                    Some(_) => Ok(()),
                    None => refuse("a neighbour on a link of this host: L2 forwarding does not reach through a router"),
                }
            }
            Forwarding::L2 => Ok(()),
            Forwarding::IpIp => self.choose_outer(backend),
        }
    }

    /// Where no outer source is configured, it is the address that this host sends from.
    fn choose_outer(&self, backend: IpAddr) -> Result<()> {
        let book = self.edit()?;
        let mut settings: Settings = book.rule.settings.read(0);
        let missing = if backend.is_ipv4() { settings.outer4 == 0 } else { settings.outer6 == [0; 2] };
        if !missing {
            return Ok(());
        }
        let Some(source) = find_route(backend, |route| route.source.is_some())?.and_then(|route| route.source) else {
            let expected = "an address that this host has a route to, or a configured `outer_v4` or `outer_v6`";
            return Err(Error::Invalid { what: "backend", value: backend.to_string(), expected });
        };
        config::set_outer(&mut settings, IpNet::from(source));
        book.rule.settings.write(0, &settings);
        Ok(())
    }
}

fn target(backend: IpAddr) -> Target {
    Target { address: backend.unmapped(), port: 0 }
}

fn forwarding_of(entry: &Entry) -> Forwarding {
    if entry.record.flags & IPIP != 0 { Forwarding::IpIp } else { Forwarding::L2 }
}

/// A route that is so: of the host's own, then of its VRFs. By which of them a packet will go, its interface decides.
fn find_route(address: IpAddr, is_wanted: impl Fn(&Route) -> bool) -> Result<Option<Route>> {
    let unknown = |cause| Error::Route { address, cause };
    let route = sys::route::route_to(address).map_err(unknown)?.filter(&is_wanted);
    if route.is_some() {
        return Ok(route);
    }
    for vrf in host::vrfs().map_err(unknown)? {
        let route = sys::route::route_in(address, Some(vrf)).map_err(unknown)?.filter(&is_wanted);
        if route.is_some() {
            return Ok(route);
        }
    }
    Ok(None)
}
