//! [`PacketMonitor`]: the fundamentals of XDP as a network function.

use std::{path::Path, str::FromStr};

use crate::{
    Action, Count, Error, Events, PacketEvent, Result, Stage,
    abi::{
        event::Event,
        monitor::{PROTOCOLS, Settings},
    },
    base::{self, StageCore, StageKind},
    stage::sealed::Sealed,
    sys::{self, object::Plan},
};

static KIND: StageKind = StageKind {
    name: "monitor",
    abi: crate::abi::fingerprint(env!("XDPKIT_ABI_MONITOR")),
    sized_by: &[("ring_bytes", &["events"])],
    carried: &[],
    load: |plan: &Plan<'_>| {
        let mut storage = std::mem::MaybeUninit::uninit();
        sys::object::load(sys::skel::monitor::MonitorSkelBuilder::default(), &mut storage, "monitor", plan)
    },
};

/// How a [`PacketMonitor`] is made.
#[derive(Clone, Debug)]
#[non_exhaustive]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default, deny_unknown_fields))]
pub struct MonitorConfig {
    /// The value's name; `monitor` by default.
    pub name: String,
    /// Every n-th packet of each CPU becomes an event, 1 for all; 0, the default, for none. Can be changed later.
    pub sample: u32,
    /// Bytes of the ring buffer for events, a power of two of at least 4096; 1 MiB by default. An event takes 232.
    pub ring_bytes: u32,
}

impl Default for MonitorConfig {
    fn default() -> Self {
        Self { name: "monitor".into(), sample: 0, ring_bytes: 1 << 20 }
    }
}

impl MonitorConfig {
    /// Sets [`MonitorConfig::name`].
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// Sets [`MonitorConfig::sample`].
    #[must_use]
    pub fn sample(mut self, every: u32) -> Self {
        self.sample = every;
        self
    }

    /// Sets [`MonitorConfig::ring_bytes`].
    #[must_use]
    pub fn ring_bytes(mut self, bytes: u32) -> Self {
        self.ring_bytes = bytes;
        self
    }

    fn check(&self) -> Result<()> {
        if self.ring_bytes.is_power_of_two() && self.ring_bytes >= 4096 {
            return Ok(());
        }
        let expected = "a power of two of at least 4096";
        Err(Error::Invalid { what: "ring_bytes", value: self.ring_bytes.to_string(), expected })
    }
}

/// A protocol that packets are counted by and that an action can be set for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
#[repr(u8)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
pub enum Protocol {
    /// ARP (RFC 826).
    Arp = 1,
    /// IPv4, whatever it carries.
    Ipv4 = 2,
    /// IPv6, whatever it carries.
    Ipv6 = 3,
    /// TCP over either.
    Tcp = 4,
    /// UDP over either.
    Udp = 5,
    /// ICMP over IPv4.
    Icmp = 6,
    /// ICMPv6 over IPv6.
    Icmpv6 = 7,
}

impl Protocol {
    /// All of them.
    pub const ALL: [Self; 7] = [Self::Arp, Self::Ipv4, Self::Ipv6, Self::Tcp, Self::Udp, Self::Icmp, Self::Icmpv6];

    /// Lower-case name: `arp`, `ipv4`, `ipv6`, `tcp`, `udp`, `icmp`, `icmpv6`.
    #[must_use]
    pub fn name(self) -> &'static str {
        ["arp", "ipv4", "ipv6", "tcp", "udp", "icmp", "icmpv6"][self as usize - 1]
    }
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Protocol {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|protocol| protocol.name() == text).ok_or_else(|| Error::Invalid {
            what: "protocol",
            value: text.to_owned(),
            expected: "arp, ipv4, ipv6, tcp, udp, icmp or icmpv6",
        })
    }
}

/// Well-formed packets by protocol. A TCP packet counts under `ipv4` or `ipv6` and under `tcp`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProtocolCounts {
    /// Frames that are neither ARP nor IP.
    pub other: Count,
    /// ARP.
    pub arp: Count,
    /// IPv4.
    pub ipv4: Count,
    /// IPv6.
    pub ipv6: Count,
    /// TCP over either.
    pub tcp: Count,
    /// UDP over either.
    pub udp: Count,
    /// ICMP over IPv4.
    pub icmp: Count,
    /// ICMPv6 over IPv6.
    pub icmpv6: Count,
    /// IP with any other protocol.
    pub other_transport: Count,
}

impl ProtocolCounts {
    /// What was counted since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            other: self.other.since(&earlier.other),
            arp: self.arp.since(&earlier.arp),
            ipv4: self.ipv4.since(&earlier.ipv4),
            ipv6: self.ipv6.since(&earlier.ipv6),
            tcp: self.tcp.since(&earlier.tcp),
            udp: self.udp.since(&earlier.udp),
            icmp: self.icmp.since(&earlier.icmp),
            icmpv6: self.icmpv6.since(&earlier.icmpv6),
            other_transport: self.other_transport.since(&earlier.other_transport),
        }
    }
}

/// Watches packets: counts them by protocol, reports samples of them as typed events, and can apply any XDP
/// action to a protocol.
///
/// An observer: what is malformed or deeper than the parser looks is counted under its [`Reason`](crate::Reason)
/// and goes on.
///
/// ```no_run
/// use xdpkit::{AttachOptions, MonitorConfig, PacketMonitor, Stage as _};
///
/// # fn main() -> xdpkit::Result<()> {
/// let monitor = PacketMonitor::load(&MonitorConfig::default().sample(1))?;
/// let _attachment = monitor.attach(&AttachOptions::new("eth0"))?;
/// let mut events = monitor.events()?;
/// while let Some(packet) = events.next_within(std::time::Duration::from_secs(1))? {
///     println!("{packet}");
/// }
/// # Ok(())
/// # }
/// ```
///
/// Needs Linux 5.18 or newer (tested from 6.1 on), `CAP_BPF`, `CAP_PERFMON` and `CAP_NET_ADMIN`.
#[derive(Debug)]
pub struct PacketMonitor {
    core: StageCore,
}

impl Sealed for PacketMonitor {
    fn core(&self) -> &StageCore {
        &self.core
    }
}

impl Stage for PacketMonitor {}

impl PacketMonitor {
    /// Loads the program and creates its tables.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::MissingCapability`], [`Error::Forbidden`], [`Error::KernelTooOld`],
    /// [`Error::NoMemory`], [`Error::Verifier`], [`Error::Load`].
    pub fn load(config: &MonitorConfig) -> Result<Self> {
        config.check()?;
        let monitor = Self { core: StageCore::load(&KIND, &config.name, &[("events", config.ring_bytes)])? };
        monitor.set_sample(config.sample)?;
        Ok(monitor)
    }

    /// Takes over the tables (counters, settings, events) that an earlier process pinned under this name, as they are. To
    /// take over its attachments too, attach with the same [`AttachOptions::pin`](crate::AttachOptions::pin).
    ///
    /// # Errors
    /// [`Error::PinMissing`]; [`Error::PinMismatch`] when this build cannot understand the tables; [`Error::PinsLocked`].
    pub fn adopt(directory: impl AsRef<Path>, name: &str) -> Result<Self> {
        let (core, ()) = StageCore::adopt(&KIND, directory.as_ref(), name, None, |_| Ok(()))?;
        Ok(Self { core })
    }

    /// Adopts what is pinned there under the configuration's name, else loads: what a process does at its start when
    /// it wants to go on where the last one ended. An adopted monitor keeps its actions and counters, and follows the
    /// configuration as by [`PacketMonitor::configure`].
    ///
    /// # Errors
    /// As [`PacketMonitor::load`], [`PacketMonitor::adopt`] and [`PacketMonitor::configure`].
    pub fn load_or_adopt(directory: impl AsRef<Path>, config: &MonitorConfig) -> Result<Self> {
        base::load_or_adopt(
            directory.as_ref(),
            &config.name,
            |directory, name| Self::adopt(directory, name),
            || Self::load(config),
            |adopted| adopted.configure(config),
        )
    }

    /// From now on, follows this configuration, whose name is passed over.
    ///
    /// # Errors
    /// [`Error::Invalid`]; [`Error::PinnedSetting`] for another value of what cannot change while the tables live: `ring_bytes`;
    /// [`Error::Superseded`]. Nothing was changed then.
    pub fn configure(&self, config: &MonitorConfig) -> Result<()> {
        config.check()?;
        self.core.is_fixed("ring_bytes", self.core.entries("events"), config.ring_bytes)?;
        self.set_sample(config.sample)
    }

    /// From now on, every n-th packet of each CPU becomes an event; 0 for none.
    ///
    /// # Errors
    /// [`Error::Map`]; [`Error::Superseded`].
    pub fn set_sample(&self, every: u32) -> Result<()> {
        self.change(|settings| settings.sample = every)
    }

    /// From now on, does this with well-formed packets of a protocol; `None` leaves them alone. The action for
    /// TCP, UDP, ICMP or ICMPv6 goes before the one for IPv4 or IPv6. Fragments behind the first go by their
    /// protocol, too.
    ///
    /// [`Action::Tx`] swaps MACs, IP addresses and ports and sends the frame back; frames to a group address
    /// (broadcast, multicast) or from one go on instead. Two hosts that both send packets back keep each other busy
    /// with a single one: a tool for looking, not for production.
    ///
    /// # Errors
    /// [`Error::Invalid`] for [`Action::Redirect`], which needs a target; [`Error::Map`]; [`Error::Superseded`].
    pub fn set_action(&self, protocol: Protocol, action: Option<Action>) -> Result<()> {
        if action == Some(Action::Redirect) {
            return Err(Error::Invalid {
                what: "action",
                value: Action::Redirect.to_string(),
                expected: "pass, drop, aborted or tx",
            });
        }
        let code = action.map_or(0, |action| action as u8 + 1);
        self.change(|settings| settings.action[protocol as usize] = code)
    }

    fn change(&self, change: impl FnOnce(&mut Settings)) -> Result<()> {
        self.core.change_settings("settings", change)
    }

    /// Well-formed packets by protocol since the tables were created.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn protocols(&self) -> Result<ProtocolCounts> {
        let mut sums = [Count::default(); PROTOCOLS];
        for cpu in &self.core.counters()? {
            for (sum, count) in sums.iter_mut().zip(cpu.own) {
                *sum += count.into();
            }
        }
        let [other, arp, ipv4, ipv6, tcp, udp, icmp, icmpv6, other_transport, ..] = sums;
        Ok(ProtocolCounts { other, arp, ipv4, ipv6, tcp, udp, icmp, icmpv6, other_transport })
    }

    /// The reader of the packets that were sampled.
    ///
    /// # Errors
    /// [`Error::EventsTaken`] while another reader of these events lives in this process.
    pub fn events(&self) -> Result<Events<PacketEvent>> {
        let decode =
            |record: &[u8]| bytemuck::try_pod_read_unaligned::<Event>(record).ok().and_then(PacketEvent::decode);
        Events::open(self.name(), self.core.map("events"), Box::new(decode))
    }

    /// Sampled packets that were not reported because the ring buffer was full.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn events_lost(&self) -> Result<u64> {
        self.core.events_lost()
    }
}
