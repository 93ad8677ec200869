//! The direct-server-return tutorials: a client behind a gateway, a balancer, and backends that
//! answer the client past the balancer.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::{Addresses, MTU, Net, Switch, eth0, namespaces};
use crate::device::{XdpPass, veth};
use crate::error::Result;
use crate::namespace::Namespace;

const CLIENTS: Net = Net::new([10, 0, 0, 0], 16, 0xa);
const LAN: Net = Net::new([192, 168, 178, 0], 24, 0xb);
const REMOTE: Net = Net::new([172, 16, 0, 0], 24, 0xc);

const GATEWAY: u8 = 1;
const BALANCER: u8 = 10;
const FIRST_BACKEND: u8 = 11;
const CLIENT: u8 = 20;

/// The L2 tutorial: the balancer and its backends are neighbours.
///
/// ```text
/// client eth0 ---- eth0 gateway eth1 ---- [switch br0] ---- eth0 balancer
/// 10.0.0.20/16     10.0.0.1   192.168.178.1    |           192.168.178.10/24
/// 2001:db8:a::20                               +-- eth0 backend0 192.168.178.11, VIPs on lo
///                                              +-- eth0 backend1 192.168.178.12, ...
/// ```
///
/// The LAN is 2001:db8:b::/64. The gateway routes the virtual addresses to the balancer, whose
/// own address may be one of them.
#[derive(Debug)]
pub struct DsrL2 {
    /// Sends the requests.
    pub client: Namespace,
    /// Routes between the client and the LAN.
    pub gateway: Namespace,
    /// Where the program under test runs, on `eth0`.
    pub balancer: Namespace,
    /// Hold the virtual addresses on `lo`.
    pub backends: Vec<Namespace>,
    /// The bridge `br0`.
    pub switch: Namespace,
    /// The client's addresses.
    pub client_addr: Addresses,
    /// The balancer's addresses.
    pub balancer_addr: Addresses,
    /// The backends' own addresses.
    pub backend_addrs: Vec<Addresses>,
    /// The virtual addresses.
    pub vip: Addresses,
    _guards: Vec<XdpPass>,
}

impl DsrL2 {
    /// Builds it with as many backends.
    pub fn new(backends: usize, vip4: Ipv4Addr, vip6: Ipv6Addr) -> Result<Self> {
        let vip = Addresses { v4: vip4, v6: vip6 };
        let (client, gateway) = client_and_gateway()?;
        let balancer = Namespace::new("balancer")?;
        let backends = namespaces("backend", backends)?;
        let mut switch = Switch::new()?;
        let mut ports = vec![(&gateway, "eth1"), (&balancer, "eth0")];
        ports.extend(eth0(&backends));
        switch.connect("br0", MTU, &ports)?;
        configure_balancer(&gateway, &balancer, vip)?;
        let backend_addrs = configure_backends(&backends, LAN, vip)?;
        Ok(Self {
            client,
            gateway,
            balancer,
            backends,
            switch: switch.ns,
            client_addr: CLIENTS.host(CLIENT),
            balancer_addr: LAN.host(BALANCER),
            backend_addrs,
            vip,
            _guards: switch.guards,
        })
    }
}

/// The IP-in-IP tutorial: the backends are in a third network, which the balancer reaches through
/// the gateway.
///
/// ```text
/// client eth0 ---- eth0 gateway eth1 ---- eth0 balancer 192.168.178.10/24
/// 10.0.0.20/16          gateway eth2 ---- [switch br0] ---- eth0 backend0 172.16.0.11/24, ...
/// ```
///
/// The client's network is 2001:db8:a::/64, the balancer's 2001:db8:b::/64 and the backends'
/// 2001:db8:c::/64. The backends hold the virtual addresses on `lo`; decapsulating is theirs.
#[derive(Debug)]
pub struct DsrIpip {
    /// Sends the requests.
    pub client: Namespace,
    /// Routes between the three networks.
    pub gateway: Namespace,
    /// Where the program under test runs, on `eth0`.
    pub balancer: Namespace,
    /// Hold the virtual addresses on `lo`.
    pub backends: Vec<Namespace>,
    /// The bridge `br0`.
    pub switch: Namespace,
    /// The client's addresses.
    pub client_addr: Addresses,
    /// The balancer's addresses.
    pub balancer_addr: Addresses,
    /// The backends' own addresses.
    pub backend_addrs: Vec<Addresses>,
    /// The virtual addresses.
    pub vip: Addresses,
    _guards: Vec<XdpPass>,
}

impl DsrIpip {
    /// Builds it with as many backends and 1500-byte links: a full segment does not fit a tunnel.
    pub fn new(backends: usize, vip4: Ipv4Addr, vip6: Ipv6Addr) -> Result<Self> {
        Self::with_mtu(backends, vip4, vip6, MTU)
    }

    /// The same with another MTU on the links from the balancer to the backends: 1520 makes room
    /// for an outer IPv4 header, 1540 for IPv6. The client's link keeps 1500.
    pub fn with_mtu(backends: usize, vip4: Ipv4Addr, vip6: Ipv6Addr, mtu: u32) -> Result<Self> {
        let vip = Addresses { v4: vip4, v6: vip6 };
        let (client, gateway) = client_and_gateway()?;
        let balancer = Namespace::new("balancer")?;
        let backends = namespaces("backend", backends)?;
        veth((&gateway, "eth1"), (&balancer, "eth0"))?;
        gateway.set_mtu("eth1", mtu)?;
        balancer.set_mtu("eth0", mtu)?;
        let mut switch = Switch::new()?;
        let mut ports = vec![(&gateway, "eth2")];
        ports.extend(eth0(&backends));
        switch.connect("br0", mtu, &ports)?;
        switch.guards.push(gateway.xdp_pass("eth1")?);
        configure_balancer(&gateway, &balancer, vip)?;
        REMOTE.assign(&gateway, "eth2", GATEWAY)?;
        let backend_addrs = configure_backends(&backends, REMOTE, vip)?;
        Ok(Self {
            client,
            gateway,
            balancer,
            backends,
            switch: switch.ns,
            client_addr: CLIENTS.host(CLIENT),
            balancer_addr: LAN.host(BALANCER),
            backend_addrs,
            vip,
            _guards: switch.guards,
        })
    }
}

fn client_and_gateway() -> Result<(Namespace, Namespace)> {
    let (client, gateway) = (Namespace::new("client")?, Namespace::new("gateway")?);
    veth((&client, "eth0"), (&gateway, "eth0"))?;
    CLIENTS.assign(&client, "eth0", CLIENT)?;
    CLIENTS.gateway(&client, GATEWAY)?;
    CLIENTS.assign(&gateway, "eth0", GATEWAY)?;
    gateway.enable_forwarding()?;
    Ok((client, gateway))
}

/// Addresses the LAN's two routers and leads the virtual addresses to the balancer.
fn configure_balancer(gateway: &Namespace, balancer: &Namespace, vip: Addresses) -> Result<()> {
    LAN.assign(gateway, "eth1", GATEWAY)?;
    LAN.assign(balancer, "eth0", BALANCER)?;
    LAN.gateway(balancer, GATEWAY)?;
    balancer.enable_forwarding()?;
    for (vip, via) in vip.both().into_iter().zip(LAN.host(BALANCER).both()) {
        if vip != via {
            gateway.add_route(IpNet::from(vip), via)?;
        }
    }
    Ok(())
}

fn configure_backends(backends: &[Namespace], net: Net, vip: Addresses) -> Result<Vec<Addresses>> {
    let configure = |(index, ns): (usize, &Namespace)| {
        let (number, addresses) = net.nth(FIRST_BACKEND, index);
        net.assign(ns, "eth0", number)?;
        net.gateway(ns, GATEWAY)?;
        vip.both().into_iter().try_for_each(|vip| add_silent_vip(ns, vip))?;
        Ok(addresses)
    };
    backends.iter().enumerate().map(configure).collect()
}

/// Lets a namespace accept a virtual address without claiming it on the link, as every backend of
/// a direct-server-return balancer must.
pub fn add_silent_vip(ns: &Namespace, vip: IpAddr) -> Result<()> {
    // Otherwise the backend answers ARP for the address on `lo`, and clients bypass the balancer.
    // IPv6 answers for the interface's own addresses only.
    ns.sysctl("net.ipv4.conf.all.arp_ignore", "1")?;
    ns.sysctl("net.ipv4.conf.all.arp_announce", "2")?;
    ns.add_address("lo", IpNet::from(vip))
}
