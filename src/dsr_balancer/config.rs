//! How a balancer is made: [`DsrConfig`].

use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::transition::length;
use crate::{
    Error, Result,
    abi::dsr_balancer::Settings,
    balancer::{BookConfig, Echo, hash::halves},
    flow_table::Shape,
    maglev,
};

#[allow(unused_imports, reason = "for links in the documentation")]
use super::{DsrBalancer, Forwarding};

/// How a [`DsrBalancer`] is made.
#[derive(Clone, Debug)]
#[non_exhaustive]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default, deny_unknown_fields))]
pub struct DsrConfig {
    /// The value's name; `dsr_balancer` by default.
    pub name: String,
    /// Services that there can be; 32 by default, at most 4,095. Each takes 12 bytes for each slot of its table, at once.
    pub services: u32,
    /// Backends of all services together; 1,024 by default, at most 65,534. Those that are leaving count.
    pub backends: u32,
    /// Slots of each service's Maglev table, a prime; 65,537 by default.
    pub table_size: u32,
    /// Decides which slot a flow has, and the tables. Balancers that share flows (anycast, ECMP) need the same one; 0 by
    /// default. Whoever knows it can aim many flows at one backend: make it a secret.
    pub seed: u64,
    /// Flows that can be remembered while slots are in transition; 131,072 by default, at most 2^28. Up to half of it,
    /// none is refused. 48 bytes each are taken at once.
    pub flows: u32,
    /// A flow that is silent for longer may be moved when the list of backends changes; 15 minutes by default.
    #[cfg_attr(feature = "serde", serde(with = "crate::text::seconds"))]
    pub idle: Duration,
    /// The longest time that a slot remembers its earlier backend; 24 hours by default. Flows that last longer may then be
    /// moved.
    #[cfg_attr(feature = "serde", serde(with = "crate::text::seconds"))]
    pub longest_transition: Duration,
    /// For so long after a change, an unknown UDP flow is taken for an old one and stays with the earlier backend; later
    /// on, it is a new one. 30 seconds by default. Datagrams do not tell.
    #[cfg_attr(feature = "serde", serde(with = "crate::text::seconds"))]
    pub udp_grace: Duration,
    /// Where the outer source addresses of [`Forwarding::IpIp`] come from, for backends with IPv4 addresses. Varied by
    /// flow, so that the backend's network card spreads flows over its queues. `None`, the default: this host's own (and
    /// 192.0.0.8, RFC 7600, for what its stack has to forward while the next hop's MAC is not known).
    pub outer_v4: Option<Ipv4Net>,
    /// The same for backends with IPv6 addresses. Only the last 64 bits vary.
    pub outer_v6: Option<Ipv6Net>,
    /// What happens to ICMP echo requests; answered by default. Can be changed later.
    pub echo: Echo,
    /// Echo replies, Fragmentation Needed and Packet Too Big messages of the balancer's own in a second, of all CPUs together;
    /// 10,000 by default. A tenth of them may be sent at once. 0: none. Can be changed later.
    pub answers_per_second: u32,
    /// Whether a backend of [`Forwarding::L2`] is refused when this host has no direct link to it; true by default. The
    /// program notices in any case.
    pub check_on_link: bool,
    /// Bytes of the ring buffer for events, a power of two of at least 4096; 64 KiB by default.
    pub ring_bytes: u32,
}

impl Default for DsrConfig {
    fn default() -> Self {
        Self {
            name: "dsr_balancer".into(),
            services: 32,
            backends: 1024,
            table_size: maglev::DEFAULT_SIZE,
            seed: 0,
            flows: 1 << 17,
            idle: Duration::from_secs(15 * 60),
            longest_transition: Duration::from_secs(24 * 60 * 60),
            udp_grace: Duration::from_secs(30),
            outer_v4: None,
            outer_v6: None,
            echo: Echo::Answer,
            answers_per_second: 10_000,
            check_on_link: true,
            ring_bytes: 1 << 16,
        }
    }
}

macro_rules! setters {
    ($($field:ident: $kind:ty;)+) => {
        $(
            #[doc = concat!("Sets [`DsrConfig::", stringify!($field), "`].")]
            #[must_use]
            pub fn $field(mut self, $field: $kind) -> Self {
                self.$field = $field.into();
                self
            }
        )+
    };
}

impl DsrConfig {
    setters! {
        name: impl Into<String>;
        services: u32;
        backends: u32;
        table_size: u32;
        seed: u64;
        flows: u32;
        idle: Duration;
        longest_transition: Duration;
        udp_grace: Duration;
        outer_v4: Ipv4Net;
        outer_v6: Ipv6Net;
        echo: Echo;
        answers_per_second: u32;
        check_on_link: bool;
        ring_bytes: u32;
    }

    pub(super) fn book(&self) -> BookConfig {
        BookConfig {
            held: 0,
            services: self.services,
            backends: self.backends,
            table_size: self.table_size,
            seed: self.seed,
            echo: self.echo,
            answers_per_second: self.answers_per_second,
        }
    }

    pub(super) fn flow_shape(&self) -> Shape {
        Shape::of_capacity(self.flows)
    }

    /// Entries of all maps.
    pub(super) fn capacities(&self) -> Result<Vec<(&'static str, u32)>> {
        let wrong = |what, value: String, expected| Err(Error::Invalid { what, value, expected });
        if self.services > 4095 {
            return wrong("services", self.services.to_string(), "1 to 4095");
        }
        if !(1..=Shape::CAPACITY_MAX).contains(&self.flows) {
            return wrong("flows", self.flows.to_string(), "1 to 268435456");
        }
        if !self.ring_bytes.is_power_of_two() || self.ring_bytes < 4096 {
            return wrong("ring_bytes", self.ring_bytes.to_string(), "a power of two of at least 4096");
        }
        if self.idle.is_zero() || self.idle > self.longest_transition {
            return wrong("idle", format!("{:?}", self.idle), "more than 0 and at most `longest_transition`");
        }
        if self.longest_transition > Duration::from_secs(365 * 24 * 60 * 60) {
            return wrong("longest_transition", format!("{:?}", self.longest_transition), "at most a year");
        }
        let mut capacities = self.book().capacities()?;
        let lines = capacities.iter().find(|(name, _)| *name == "slots").map_or(0, |(_, lines)| *lines);
        let Some(slots) = lines.checked_mul(16) else {
            return wrong("services", self.services.to_string(), "fewer services for tables of this size");
        };
        capacities.extend([
            ("events", self.ring_bytes),
            ("transitions", slots),
            ("paths", self.backends + 1),
            ("flows_lines", self.flow_shape().total()),
            ("flow_sides", self.flow_shape().slots()),
            ("fragments_lines", fragment_shape().total()),
        ]);
        Ok(capacities)
    }

    pub(super) fn settings(&self) -> Settings {
        let mut settings = Settings {
            idle: length(self.idle),
            longest: length(self.longest_transition),
            udp_grace: if self.udp_grace.is_zero() { 0 } else { length(self.udp_grace) },
            reserved: 0,
            outer4: 0,
            outer4_mask: 0,
            outer6: [0; 2],
            outer6_mask: 0,
        };
        if let Some(net) = self.outer_v4 {
            set_outer(&mut settings, net.into());
        }
        if let Some(net) = self.outer_v6 {
            set_outer(&mut settings, net.into());
        }
        settings
    }
}

/// First fragments that are remembered at a time.
pub(super) fn fragment_shape() -> Shape {
    Shape::of_capacity(1 << 14)
}

/// Outer sources from this prefix.
pub(super) fn set_outer(settings: &mut Settings, net: IpNet) {
    match net {
        IpNet::V4(net) => {
            settings.outer4 = u32::from_ne_bytes(net.network().octets());
            settings.outer4_mask = u32::from_ne_bytes(net.hostmask().octets());
        }
        IpNet::V6(net) => {
            settings.outer6 = halves(net.network());
            settings.outer6_mask = halves(net.hostmask())[1];
        }
    }
}
