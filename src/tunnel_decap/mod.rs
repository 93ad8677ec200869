//! [`TunnelDecap`]: the backend's half of direct server return through tunnels.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::{
    Error, Result, Stage,
    abi::tunnel_decap::{DESTINATION, Key4, Key6, SOURCE, Settings, VIP},
    address::Unmapped as _,
    balancer::service::check_host,
    base::{StageCore, StageKind},
    stage::sealed::Sealed,
    sys::{self, object::Plan},
};

static KIND: StageKind = StageKind {
    name: "tunnel_decap",
    abi: crate::abi::fingerprint(env!("XDPKIT_ABI_TUNNEL_DECAP")),
    sized_by: &[("vips` and `sources", &["prefixes_v4", "prefixes_v6"])],
    carried: &[],
    load: |plan: &Plan<'_>| {
        let mut storage = std::mem::MaybeUninit::uninit();
        let builder = sys::skel::tunnel_decap::TunnelDecapSkelBuilder::default();
        sys::object::load(builder, &mut storage, "tunnel_decap", plan)
    },
};

/// How a [`TunnelDecap`] is made. Addresses mapped into IPv6 (`::ffff:192.0.2.7`) are the IPv4 addresses.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TunnelDecapConfig {
    /// The value's name; `tunnel_decap` by default.
    pub name: String,
    /// The virtual addresses: only packets for these are taken out of their tunnel. At least one.
    pub vips: Vec<IpAddr>,
    /// Where tunnels may begin: the balancers' outer source addresses. At least one, or [`TunnelDecapConfig::any_source`].
    /// They are the balancers' outer prefixes ([`DsrConfig::outer_v4`](crate::DsrConfig::outer_v4)); without these, their own
    /// addresses, and `192.0.0.8/32` for the first packets.
    pub sources: Vec<IpNet>,
    /// Tunnels may begin anywhere; false by default. Then anybody who reaches this host can send it packets in anybody's
    /// name, past filters that look at the outside, and it answers to those: it is a reflector.
    pub any_source: bool,
    /// Where tunnels may end: outer destination addresses, this host's own. Empty, the default: anywhere.
    pub destinations: Vec<IpAddr>,
}

impl Default for TunnelDecapConfig {
    fn default() -> Self {
        Self {
            name: "tunnel_decap".into(),
            vips: Vec::new(),
            sources: Vec::new(),
            any_source: false,
            destinations: Vec::new(),
        }
    }
}

impl TunnelDecapConfig {
    /// Sets [`TunnelDecapConfig::name`].
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// Adds to [`TunnelDecapConfig::vips`].
    #[must_use]
    pub fn vip(mut self, vip: impl Into<IpAddr>) -> Self {
        self.vips.push(vip.into());
        self
    }

    /// Adds to [`TunnelDecapConfig::sources`].
    #[must_use]
    pub fn source(mut self, prefix: impl Into<IpNet>) -> Self {
        self.sources.push(prefix.into());
        self
    }

    /// Sets [`TunnelDecapConfig::any_source`].
    #[must_use]
    pub fn any_source(mut self) -> Self {
        self.any_source = true;
        self
    }

    /// Adds to [`TunnelDecapConfig::destinations`].
    #[must_use]
    pub fn destination(mut self, address: impl Into<IpAddr>) -> Self {
        self.destinations.push(address.into());
        self
    }

    /// What each prefix is good for: its own roles, and those of the prefixes that cover it.
    fn prefixes(&self) -> Vec<(IpNet, u32)> {
        let hosts = |addresses: &[IpAddr], role| {
            addresses.iter().map(move |ip| (IpNet::from(ip.unmapped()), role)).collect::<Vec<_>>()
        };
        let mut all = hosts(&self.vips, VIP);
        all.extend(hosts(&self.destinations, DESTINATION));
        all.extend(self.sources.iter().map(|net| (net.unmapped(), SOURCE)));
        let covering = |prefix: &IpNet| {
            all.iter().filter(|(net, _)| net.contains(prefix)).fold(0, |roles, (_, role)| roles | role)
        };
        all.iter().map(|(prefix, _)| (*prefix, covering(prefix))).collect()
    }
}

/// Takes packets for virtual addresses out of their tunnels (IPv4 or IPv6 in IPv4 or IPv6) and hands them to the host's
/// stack: what a backend of an IP-in-IP balancer attaches when its kernel has no tunnel device, or a slow one.
///
/// What a tunnel's packet says inside is believed only if its outer source may send it, its inner destination is one of
/// the virtual addresses, its inner source is not, and its lengths fit. ECN follows RFC 6040. Fragments of outer packets
/// go to the stack as they are. So does everything else.
///
/// ```no_run
/// use xdpkit::{AttachOptions, Stage as _, TunnelDecap, TunnelDecapConfig};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let config = TunnelDecapConfig::default()
///     .vip("192.0.2.1".parse::<std::net::IpAddr>()?)
///     .source("10.200.0.0/16".parse::<xdpkit::ipnet::IpNet>()?);
/// let decap = TunnelDecap::load(&config)?;
/// let _attachment = decap.attach(&AttachOptions::new("eth0"))?;
/// # Ok(())
/// # }
/// ```
///
/// The host needs the virtual addresses on `lo` and some settings:
/// [`preflight::dsr_backend`](crate::preflight::dsr_backend) tells what it lacks.
///
/// Needs Linux 5.18 or newer (tested from 6.1 on), `CAP_BPF`, `CAP_PERFMON` and `CAP_NET_ADMIN`.
#[derive(Debug)]
pub struct TunnelDecap {
    core: StageCore,
}

impl Sealed for TunnelDecap {
    fn core(&self) -> &StageCore {
        &self.core
    }
}

impl Stage for TunnelDecap {}

impl TunnelDecap {
    /// Loads the program and fills its tables.
    ///
    /// # Errors
    /// [`Error::Invalid`] without a virtual address or with one that no host can have, and without sources unless any is
    /// good;
    /// [`Error::MissingCapability`], [`Error::Forbidden`], [`Error::KernelTooOld`], [`Error::NoMemory`],
    /// [`Error::Verifier`], [`Error::Load`].
    pub fn load(config: &TunnelDecapConfig) -> Result<Self> {
        if config.vips.is_empty() {
            return Err(Error::Invalid { what: "vips", value: String::new(), expected: "at least one address" });
        }
        for address in &config.vips {
            check_host("vip", address.unmapped())?;
        }
        if config.sources.is_empty() != config.any_source {
            let value = config.sources.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            return Err(Error::Invalid {
                what: "sources",
                value,
                expected: "the balancers' outer sources, or `any_source`",
            });
        }
        let prefixes = config.prefixes();
        let capacity = u32::try_from(prefixes.len()).unwrap_or(u32::MAX);
        let core = StageCore::load(&KIND, &config.name, &[("prefixes_v4", capacity), ("prefixes_v6", capacity)])?;
        for (prefix, roles) in prefixes {
            let (map, set) = match prefix {
                IpNet::V4(net) => ("prefixes_v4", core.table::<Key4, u32>("prefixes_v4").set(&net.into(), &roles)),
                IpNet::V6(net) => ("prefixes_v6", core.table::<Key6, u32>("prefixes_v6").set(&net.into(), &roles)),
            };
            set.map_err(|error| core.map(map).error("add a prefix", error))?;
        }
        let mut any = 0;
        if config.any_source {
            any |= SOURCE;
        }
        if config.destinations.is_empty() {
            any |= DESTINATION;
        }
        core.change_settings("settings", |settings: &mut Settings| settings.any = any)?;
        Ok(Self { core })
    }

    /// Takes over the tables (addresses, counters) that an earlier process pinned under this name.
    ///
    /// # Errors
    /// [`Error::PinMissing`]; [`Error::PinMismatch`] when this build cannot understand the tables.
    pub fn adopt(directory: impl AsRef<std::path::Path>, name: &str) -> Result<Self> {
        let (core, ()) = StageCore::adopt(&KIND, directory.as_ref(), name, None, |_| Ok(()))?;
        Ok(Self { core })
    }
}
