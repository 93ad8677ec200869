//! The NAT tutorial: a balancer with a foot in the clients' network and one in the backends'.

use super::{Addresses, MTU, Net, Switch, eth0, namespaces};
use crate::device::XdpPass;
use crate::error::Result;
use crate::namespace::Namespace;

const FRONT: Net = Net::new([10, 0, 0, 0], 24, 0xa);
const BACK: Net = Net::new([192, 168, 178, 0], 24, 0xb);

const BALANCER: u8 = 10;
const FIRST_BACKEND: u8 = 11;
const FIRST_CLIENT: u8 = 20;

/// Clients and backends on two bridges, with the balancer between them.
///
/// ```text
/// client0 eth0 10.0.0.20/24 --+                                     +-- eth0 backend0 192.168.178.11/24
/// client1 eth0 10.0.0.21/24 --+-- [front] -- eth0 balancer eth1 -- [back] -- eth0 backend1 ...
///                                        10.0.0.10   192.168.178.10
/// ```
///
/// The front network is 2001:db8:a::/64, the back network 2001:db8:b::/64. The balancer is the
/// default gateway on both sides, so any address that exists nowhere may be a virtual one, and
/// backends may answer clients by their own addresses.
#[derive(Debug)]
pub struct Nat {
    /// Send the requests.
    pub clients: Vec<Namespace>,
    /// Where the program under test runs: `eth0` to the clients, `eth1` to the backends.
    pub balancer: Namespace,
    /// Answer them.
    pub backends: Vec<Namespace>,
    /// The bridges `front` and `back`.
    pub switch: Namespace,
    /// The clients' addresses.
    pub client_addrs: Vec<Addresses>,
    /// The balancer's addresses on `eth0`.
    pub front_addr: Addresses,
    /// The balancer's addresses on `eth1`.
    pub back_addr: Addresses,
    /// The backends' addresses.
    pub backend_addrs: Vec<Addresses>,
    _guards: Vec<XdpPass>,
}

impl Nat {
    /// Builds it with as many clients and backends.
    pub fn new(clients: usize, backends: usize) -> Result<Self> {
        let clients = namespaces("client", clients)?;
        let balancer = Namespace::new("balancer")?;
        let backends = namespaces("backend", backends)?;
        let mut switch = Switch::new()?;
        let side = |dev, hosts| [(&balancer, dev)].into_iter().chain(eth0(hosts)).collect();
        let (front, back): (Vec<_>, Vec<_>) = (side("eth0", &clients), side("eth1", &backends));
        switch.connect("front", MTU, &front)?;
        switch.connect("back", MTU, &back)?;
        FRONT.assign(&balancer, "eth0", BALANCER)?;
        BACK.assign(&balancer, "eth1", BALANCER)?;
        balancer.enable_forwarding()?;
        Ok(Self {
            client_addrs: configure(&clients, FRONT, FIRST_CLIENT)?,
            backend_addrs: configure(&backends, BACK, FIRST_BACKEND)?,
            clients,
            balancer,
            backends,
            switch: switch.ns,
            front_addr: FRONT.host(BALANCER),
            back_addr: BACK.host(BALANCER),
            _guards: switch.guards,
        })
    }
}

fn configure(hosts: &[Namespace], net: Net, first: u8) -> Result<Vec<Addresses>> {
    let configure = |(index, ns): (usize, &Namespace)| {
        let (number, addresses) = net.nth(first, index);
        net.assign(ns, "eth0", number)?;
        net.gateway(ns, BALANCER)?;
        Ok(addresses)
    };
    hosts.iter().enumerate().map(configure).collect()
}
