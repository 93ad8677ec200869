//! Health checks of a virtual address on one backend of several: the way of their probes, and what follows from them.

use std::net::{IpAddr, SocketAddr};

use super::{DsrBalancer, target};
use crate::{Error, Interface, Result, address::Unmapped as _, balancer::ServiceAddr};
#[cfg(feature = "health")]
use crate::{Health, balancer::BackendState};

impl DsrBalancer {
    /// Health checks come in by this interface from now on; `None`, the state at first: by none.
    ///
    /// A backend whose virtual address is gone still answers at its own address, so a check has to ask for the *virtual*
    /// address, on that backend. For this, the host sends probes to itself over a veth pair, and this balancer, attached to
    /// the far end, forwards them as it does with clients' packets: by MAC, or inside an outer header. A probe's source
    /// port says which backend it is for ([`DsrBalancer::probe_source`]), and backends without weight, draining or down
    /// are probed like others. The backend answers the host directly. Probes are counted by [`Reason::Probed`], and
    /// nowhere else: not as a service's packets, not as flows.
    ///
    /// What comes in by this interface for a virtual address and is no probe is dropped
    /// ([`Reason::NotAProbe`]): probes are TCP segments with a TTL or hop limit of 255, which packets that the host only
    /// forwards cannot have (RFC 5082), or resets. A backend is probed on any port, so services on UDP can be checked, too. An
    /// interface that is made anew has another index: when [`Loss`](crate::Loss) tells of its end, set `None`, and once it
    /// is attached again, set it again. Failures of checks in between say nothing of backends.
    ///
    /// The pair, for the virtual addresses 192.0.2.1 and 2001:db8::1 on a host that is 198.51.100.10 and 2001:db8:b::10 on
    /// `eth0`:
    ///
    /// ```sh
    /// ip link add h0 type veth peer name h1
    /// ethtool -K h0 tx off                              # XDP needs finished checksums
    /// sysctl -w net.ipv4.conf.h1.forwarding=1 net.ipv6.conf.h1.forwarding=1
    /// sysctl -w net.ipv4.conf.h1.accept_local=1         # the host's own packets come back while neighbours are looked for
    /// sysctl -w net.ipv4.conf.eth0.rp_filter=2          # unless it is 0: answers do not come from h0
    /// ip link set h0 up && ip link set h1 up
    /// mac=$(cat /sys/class/net/h1/address)
    /// ip route add 192.0.2.1/32 dev h0 src 198.51.100.10
    /// ip neighbour add 192.0.2.1 dev h0 lladdr $mac nud permanent
    /// ip -6 route add 2001:db8::1/128 dev h0 src 2001:db8:b::10
    /// ip -6 neighbour add 2001:db8::1 dev h0 lladdr $mac nud permanent
    /// ```
    ///
    /// The host must not have the virtual address itself: it would answer its own probes. With [`Forwarding::IpIp`],
    /// requests that do not fit the tunnel are dropped: give `h0` an MTU that leaves room for the outer header.
    ///
    /// ```no_run
    /// # #[cfg(feature = "health")]
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use std::{net::IpAddr, sync::Arc};
    /// use xdpkit::{
    ///     AttachOptions, DsrBalancer, DsrConfig, DsrService, HealthChange, HealthCheck, HealthChecks, Interface,
    ///     ServiceAddr, Stage as _,
    /// };
    ///
    /// let balancer = Arc::new(DsrBalancer::load(&DsrConfig::default())?);
    /// let web: ServiceAddr = "tcp/192.0.2.1:80".parse()?;
    /// let backends: [IpAddr; 2] = ["198.51.100.11".parse()?, "198.51.100.12".parse()?];
    /// balancer.insert_service(web, DsrService::l2(), backends.map(|backend| (backend, 1)))?;
    /// let _clients = balancer.attach(&AttachOptions::new("eth0"))?;
    /// let _probes = balancer.attach(&AttachOptions::new("h1"))?;
    /// balancer.set_probe_interface(Some(&Interface::by_name("h1")?))?;
    ///
    /// let follower = Arc::clone(&balancer);
    /// let checks = HealthChecks::new(move |change: HealthChange<(ServiceAddr, IpAddr)>| {
    ///     let (service, backend) = change.key;
    ///     if let Err(error) = follower.set_health(service, backend, change.health) {
    ///         eprintln!("{service}, {backend}: {error}");
    ///     }
    /// });
    /// for backend in backends {
    ///     let source = balancer.probe_source(web, backend, "198.51.100.10".parse()?)?;
    ///     let check = HealthCheck::http("192.0.2.1:80".parse()?, "/health").source(source);
    ///     checks.insert((web, backend), check)?;
    /// }
    /// # Ok(())
    /// # }
    /// # #[cfg(not(feature = "health"))]
    /// # fn main() {}
    /// ```
    ///
    /// [`Reason::Probed`]: crate::Reason::Probed
    /// [`Reason::NotAProbe`]: crate::Reason::NotAProbe
    /// [`Forwarding::IpIp`]: super::Forwarding::IpIp
    ///
    /// # Errors
    /// [`Error::Superseded`].
    pub fn set_probe_interface(&self, interface: Option<&Interface>) -> Result<()> {
        self.edit()?.set_probe_interface(interface.map_or(0, Interface::index));
        Ok(())
    }

    /// Where probes of this backend come from: `host`, an address of this host, and the port by which the balancer knows
    /// the backend. Ports begin at 61,001, above those that Linux gives to connections by itself; balancers for more than
    /// 4,535 backends ([`DsrConfig::backends`](super::DsrConfig::backends)) begin lower. Nothing else on this host may use
    /// them.
    ///
    /// It is the backend's until that is removed or killed, and may then become another's: end its check before.
    ///
    /// # Errors
    /// [`Error::UnknownService`], [`Error::UnknownBackend`]; [`Error::Invalid`] for a host of the other family than the
    /// service's.
    pub fn probe_source(&self, service: ServiceAddr, backend: IpAddr, host: IpAddr) -> Result<SocketAddr> {
        let (service, host) = (service.unmapped(), host.unmapped());
        if host.is_ipv4() != service.address.is_ipv4() {
            let expected = "an address of the service's family";
            return Err(Error::Invalid { what: "source of probes", value: host.to_string(), expected });
        }
        let book = self.book();
        let Some(member) = book.entry(&service)?.staying(target(backend)) else {
            return Err(Error::UnknownBackend { service: service.to_string(), backend: backend.to_string() });
        };
        // The base leaves room for all backends.
        let port = book.settings.read(0).probe_base as u16 + member.id;
        Ok(SocketAddr::new(host, port))
    }

    /// Does what a health check says: a backend that is down is drained, one that was drained and is up gets new flows by
    /// the weight that it had. [`Health::Unknown`] changes nothing, nor does `Up` for a backend that is active.
    ///
    /// Down means that no new flow goes there from now on; flows that the backend has stay with it, so a false alarm cuts
    /// none. When a host is known to be dead, [`DsrBalancer::kill`] lets other backends reject its flows, so that clients
    /// learn at once; to come back, it has to be added and checked again. When all backends are down, the service has none:
    /// keep the last one by not calling this, where that is better. To drain a backend for other reasons, end its check
    /// before, or it will be brought back.
    ///
    /// # Errors
    /// [`Error::UnknownService`]; [`Error::UnknownBackend`] also for one that is leaving: nothing brings it back.
    #[cfg(feature = "health")]
    pub fn set_health(&self, service: ServiceAddr, backend: IpAddr, health: Health) -> Result<()> {
        let service = service.unmapped();
        let mut book = self.edit()?;
        let Some(member) = book.entry(&service)?.staying(target(backend)).copied() else {
            return Err(Error::UnknownBackend { service: service.to_string(), backend: backend.to_string() });
        };
        match health {
            Health::Down if member.state == BackendState::Active => book.drain(&self.core, &service, member.target),
            Health::Up if member.state == BackendState::Draining => {
                book.set_backend(&self.core, &service, member.target, member.weight).map(drop)
            }
            _ => Ok(()),
        }
    }
}
