//! How a NAT balancer and its services are made: [`NatConfig`], [`NatService`].

use std::{
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    time::Duration,
};

use crate::{
    Echo, Error, Result,
    abi::nat_balancer::{ADDRESSES_MAX, BY_SLOT, LEAST_LOADED, ROUND_ROBIN, STATES, Settings},
    address::Unmapped as _,
    balancer::BookConfig,
    flow_table::Shape,
    maglev,
};

#[allow(unused_imports, reason = "for links in the documentation")]
use super::NatBalancer;

/// What a service's backends see of its clients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
pub enum NatMode {
    /// An address of the balancer and a port that it chose: answers come back by themselves.
    #[default]
    Full,
    /// The client's own address and port. The backends' routes to the clients have to lead through the balancer. A client
    /// that is a backend of the same service is refused when it would be given to itself.
    Destination,
}

/// Who gets a new connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
pub enum Scheduler {
    /// Maglev hashing of the connection's addresses and ports, by weight: the same on every balancer with the same
    /// seed, and few change hands when the list of backends changes.
    #[default]
    Maglev,
    /// Each in its turn, by weight.
    RoundRobin,
    /// The one with the fewest open connections for its weight; of more than 256 backends, of 256.
    LeastConnections,
    /// Maglev hashing of the client's address alone: a client's connections go to one backend.
    SourceHash,
}

impl Scheduler {
    pub(super) fn number(self) -> u32 {
        match self {
            Self::Maglev | Self::SourceHash => BY_SLOT,
            Self::RoundRobin => ROUND_ROBIN,
            Self::LeastConnections => LEAST_LOADED,
        }
    }
}

/// A service: what translates its connections, who gets them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct NatService {
    /// What backends see of the clients.
    pub mode: NatMode,
    /// Who gets a new connection.
    pub scheduler: Scheduler,
    /// The backends and their weights. 0: no new connections.
    pub backends: Vec<(SocketAddr, u32)>,
}

impl NatService {
    /// A service with these backends, of weight 1 each.
    pub fn new(backends: impl IntoIterator<Item = SocketAddr>) -> Self {
        Self { backends: backends.into_iter().map(|backend| (backend, 1)).collect(), ..Self::default() }
    }

    /// Adds a backend.
    #[must_use]
    pub fn backend(mut self, backend: SocketAddr, weight: u32) -> Self {
        self.backends.push((backend.unmapped(), weight));
        self
    }

    /// Sets [`NatService::mode`].
    #[must_use]
    pub fn mode(mut self, mode: NatMode) -> Self {
        self.mode = mode;
        self
    }

    /// Sets [`NatService::scheduler`].
    #[must_use]
    pub fn scheduler(mut self, scheduler: Scheduler) -> Self {
        self.scheduler = scheduler;
        self
    }
}

/// After how much silence a connection ends. Each at least a second and at most 10 days.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default, deny_unknown_fields))]
pub struct NatTimeouts {
    /// UDP that the backend has not answered; 30 s by default.
    #[cfg_attr(feature = "serde", serde(with = "crate::text::seconds"))]
    pub udp_new: Duration,
    /// UDP in both directions; 5 minutes by default (RFC 4787).
    #[cfg_attr(feature = "serde", serde(with = "crate::text::seconds"))]
    pub udp: Duration,
    /// TCP: a SYN without an answer; 30 s by default.
    #[cfg_attr(feature = "serde", serde(with = "crate::text::seconds"))]
    pub syn: Duration,
    /// TCP: answered by the backend, not yet confirmed by the client; 1 minute by default.
    #[cfg_attr(feature = "serde", serde(with = "crate::text::seconds"))]
    pub answered: Duration,
    /// TCP: established; 2 hours and 4 minutes by default (RFC 5382).
    #[cfg_attr(feature = "serde", serde(with = "crate::text::seconds"))]
    pub established: Duration,
    /// TCP: one side has sent a FIN; 4 minutes by default (RFC 5382).
    #[cfg_attr(feature = "serde", serde(with = "crate::text::seconds"))]
    pub closing: Duration,
    /// TCP: both have; 1 minute by default.
    #[cfg_attr(feature = "serde", serde(with = "crate::text::seconds"))]
    pub time_wait: Duration,
    /// TCP: one side has sent a RST; 10 s by default.
    #[cfg_attr(feature = "serde", serde(with = "crate::text::seconds"))]
    pub reset: Duration,
}

impl Default for NatTimeouts {
    fn default() -> Self {
        Self {
            udp_new: Duration::from_secs(30),
            udp: Duration::from_secs(300),
            syn: Duration::from_secs(30),
            answered: Duration::from_secs(60),
            established: Duration::from_secs(2 * 3600 + 4 * 60),
            closing: Duration::from_secs(240),
            time_wait: Duration::from_secs(60),
            reset: Duration::from_secs(10),
        }
    }
}

impl NatTimeouts {
    /// By `enum nat_state`, in ticks.
    pub(super) fn ticks(&self, hertz: u32) -> Result<[u32; STATES]> {
        let all = [
            ("udp_new", self.udp_new),
            ("udp", self.udp),
            ("syn", self.syn),
            ("answered", self.answered),
            ("established", self.established),
            ("closing", self.closing),
            ("time_wait", self.time_wait),
            ("reset", self.reset),
        ];
        let mut ticks = [0; STATES];
        for ((what, timeout), ticks) in all.into_iter().zip(&mut ticks) {
            if !(Duration::from_secs(1)..=Duration::from_secs(10 * 24 * 3600)).contains(&timeout) {
                return Err(Error::Invalid { what, value: format!("{timeout:?}"), expected: "1 second to 10 days" });
            }
            *ticks = (timeout.as_secs_f64() * f64::from(hertz)).ceil() as u32;
        }
        Ok(ticks)
    }
}

/// How a [`NatBalancer`] is made.
#[derive(Clone, Debug)]
#[non_exhaustive]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default, deny_unknown_fields))]
pub struct NatConfig {
    /// The value's name; `nat_balancer` by default.
    pub name: String,
    /// Connections that there can be; 65,536 by default, at most 2^26. 180 bytes each are taken at once. Up to half of
    /// them nothing is refused. Beyond, connections that are closed or not confirmed go for new ones, the oldest first;
    /// established ones stay, and what finds no room is refused and counted.
    pub capacity: u32,
    /// Services that there can be; 64 by default, at most 4096.
    pub services: u32,
    /// Backends that there can be, of all services together, those that are leaving included; 1024 by default.
    pub backends: u32,
    /// Slots of each service's table, a prime; 65,537 by default. Each takes four bytes.
    pub table_size: u32,
    /// Decides, with names and weights, who has which slot: give it to all balancers that share traffic.
    pub seed: u64,
    /// Addresses that backends see as the clients', up to 16 of each family, routed to the balancer. Empty, the
    /// default: the service's own address.
    pub addresses: Vec<IpAddr>,
    /// Ports that backends see as the clients'; 1024 to 65,535 by default. One backend can have as many connections at
    /// once as there are addresses and ports; when nearly all are taken, some are refused, for 32 are tried.
    pub ports: RangeInclusive<u16>,
    /// After how much silence connections end. Can be changed later.
    pub timeouts: NatTimeouts,
    /// What happens to ICMP echo requests for a virtual address; answered by default. [`Echo::Backend`] is refused.
    pub echo: Echo,
    /// ICMP errors, echo replies and RSTs of the balancer's own in a second, of all CPUs together; 10,000 by default. A tenth
    /// of them may be sent at once. 0: none. Can be changed later.
    pub answers_per_second: u32,
    /// Whether a TCP segment that belongs to no connection, or to one whose backend was killed, is answered with RST; false
    /// by default: it is dropped.
    pub reset_unknown: bool,
    /// Every n-th connection event of each CPU is reported, 1 for all; 0, the default, for none. Can be changed later.
    pub sample: u32,
    /// Bytes of the ring buffer for events, a power of two of at least 4096; 1 MiB by default.
    pub ring_bytes: u32,
}

impl Default for NatConfig {
    fn default() -> Self {
        Self {
            name: "nat_balancer".into(),
            capacity: 1 << 16,
            services: 64,
            backends: 1024,
            table_size: maglev::DEFAULT_SIZE,
            seed: 0,
            addresses: Vec::new(),
            ports: 1024..=u16::MAX,
            timeouts: NatTimeouts::default(),
            echo: Echo::Answer,
            answers_per_second: 10_000,
            reset_unknown: false,
            sample: 0,
            ring_bytes: 1 << 20,
        }
    }
}

macro_rules! setters {
    ($($field:ident: $kind:ty;)+) => {
        $(
            #[doc = concat!("Sets [`NatConfig::", stringify!($field), "`].")]
            #[must_use]
            pub fn $field(mut self, $field: $kind) -> Self {
                self.$field = $field.into();
                self
            }
        )+
    };
}

/// Connections take a record each; with two for each, a free one is found at the first or second place.
const RECORDS_A_FLOW: u32 = 2;
/// Where clients keep their address, a connection has two entries; and a table of ways is as good as empty up to half.
pub(super) const ENTRIES_A_FLOW: u32 = 3;
/// Fragmented datagrams that are followed at once, at least.
pub(super) const FRAGMENTS: u32 = 1 << 14;
/// As in the balancers' indices.
const SPREAD: u32 = 16;

impl NatConfig {
    /// Sets [`NatConfig::name`].
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    setters! {
        capacity: u32;
        services: u32;
        backends: u32;
        table_size: u32;
        seed: u64;
        addresses: Vec<IpAddr>;
        ports: RangeInclusive<u16>;
        timeouts: NatTimeouts;
        echo: Echo;
        answers_per_second: u32;
        reset_unknown: bool;
        sample: u32;
        ring_bytes: u32;
    }

    pub(super) fn book(&self) -> BookConfig {
        BookConfig {
            services: self.services,
            backends: self.backends,
            table_size: self.table_size,
            held: 2 * ADDRESSES_MAX as u32,
            seed: self.seed,
            echo: self.echo,
            answers_per_second: self.answers_per_second,
        }
    }

    fn check(&self) -> Result<()> {
        let wrong = |what, value: String, expected| Err(Error::Invalid { what, value, expected });
        if !(1..=1 << 26).contains(&self.capacity) {
            return wrong("capacity", self.capacity.to_string(), "1 to 67108864 connections");
        }
        if self.ports.is_empty() || *self.ports.start() == 0 {
            return wrong("ports", format!("{:?}", self.ports), "a range from 1 on, the lower port first");
        }
        for ipv4 in [true, false] {
            if self.addresses.iter().filter(|address| address.unmapped().is_ipv4() == ipv4).count() > ADDRESSES_MAX {
                return wrong("addresses", self.addresses.len().to_string(), "at most 16 of each family");
            }
        }
        if self.echo == Echo::Backend {
            return wrong("echo", "Backend".into(), "Answer or Pass: an echo request has no port to be translated");
        }
        if !self.ring_bytes.is_power_of_two() || self.ring_bytes < 4096 {
            return wrong("ring_bytes", self.ring_bytes.to_string(), "a power of two of at least 4096");
        }
        Ok(())
    }

    /// Entries of all maps.
    pub(super) fn capacities(&self) -> Result<Vec<(&'static str, u32)>> {
        self.check()?;
        let mut all = self.book().capacities()?;
        all.extend([
            ("connections", self.records()),
            ("flows_lines", Shape::of_capacity(self.capacity * ENTRIES_A_FLOW).total()),
            ("fragments_lines", Shape::of_capacity(FRAGMENTS).total()),
            ("loads", self.backends + 1),
            ("backend_index", self.index()),
            ("events", self.ring_bytes),
        ]);
        Ok(all)
    }

    fn records(&self) -> u32 {
        (self.capacity * RECORDS_A_FLOW).next_power_of_two().max(64)
    }

    /// Entries of `backend_index`.
    pub(super) fn index(&self) -> u32 {
        (self.backends * SPREAD).next_power_of_two().max(64)
    }

    pub(super) fn shape(&self) -> Shape {
        Shape::of_capacity(self.capacity * ENTRIES_A_FLOW)
    }

    pub(super) fn settings(&self, hertz: u32, secret: [u64; 4]) -> Result<Settings> {
        Ok(Settings {
            secret,
            records_mask: self.records() - 1,
            timeout: self.timeouts.ticks(hertz)?,
            first_port: (*self.ports.start()).into(),
            last_port: (*self.ports.end()).into(),
            second: hertz,
            ports_shared: 0,
            destination_only: 0,
            backend_mask: self.index() - 1,
            reset_unknown: self.reset_unknown.into(),
            sample: self.sample,
            reserved: 0,
        })
    }
}

/// The capacity that so many records were made for, at most.
pub(super) fn capacity_of(records: u32) -> u32 {
    records / RECORDS_A_FLOW
}
