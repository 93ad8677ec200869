//! The simplest network: clients and a server on one link.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::{Addresses, MTU, Net, Switch, eth0, namespaces};
use crate::device::{XdpPass, veth};
use crate::error::Result;
use crate::namespace::Namespace;

const NET: Net = Net { v4: Ipv4Addr::new(10, 0, 0, 0), v4_len: 24, v6: Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0) };
const SERVER: u8 = 1;
const FIRST_CLIENT: u8 = 2;

/// A server at 10.0.0.1/24 and fd00::1/64 with clients at 10.0.0.2, fd00::2 and so on, all on
/// their `eth0`.
///
/// One client is joined to the server directly, several by a bridge in a namespace of its own.
#[derive(Debug)]
pub struct Pair {
    /// The first client.
    pub client: Namespace,
    /// All clients, the first one included.
    pub clients: Vec<Namespace>,
    /// Where the program under test runs.
    pub server: Namespace,
    /// The bridge `br0`, if there is one.
    pub switch: Option<Namespace>,
    /// The first client's addresses.
    pub client_addr: Addresses,
    /// All clients' addresses.
    pub client_addrs: Vec<Addresses>,
    /// The server's addresses.
    pub server_addr: Addresses,
    _guards: Vec<XdpPass>,
}

impl Pair {
    /// One client, directly joined. Its end passes frames through native XDP.
    pub fn new() -> Result<Self> {
        let (client, server) = (Namespace::new("client")?, Namespace::new("server")?);
        veth((&client, "eth0"), (&server, "eth0"))?;
        let guards = vec![client.xdp_pass("eth0")?];
        Self::address(vec![client], server, None, guards)
    }

    /// Clients on a bridge, at least one. The bridge's ports pass frames through native XDP.
    pub fn with_clients(count: usize) -> Result<Self> {
        assert!(count > 0, "a pair needs a client");
        let server = Namespace::new("server")?;
        let clients = namespaces("client", count)?;
        let mut switch = Switch::new()?;
        let ports: Vec<_> = [(&server, "eth0")].into_iter().chain(eth0(&clients)).collect();
        switch.connect("br0", MTU, &ports)?;
        Self::address(clients, server, Some(switch.ns), switch.guards)
    }

    fn address(
        clients: Vec<Namespace>,
        server: Namespace,
        switch: Option<Namespace>,
        guards: Vec<XdpPass>,
    ) -> Result<Self> {
        NET.assign(&server, "eth0", SERVER)?;
        let mut client_addrs = Vec::new();
        for (index, client) in clients.iter().enumerate() {
            let (number, addresses) = NET.nth(FIRST_CLIENT, index);
            NET.assign(client, "eth0", number)?;
            client_addrs.push(addresses);
        }
        Ok(Self {
            client: clients[0].clone(),
            client_addr: client_addrs[0],
            client_addrs,
            clients,
            server,
            switch,
            server_addr: NET.host(SERVER),
            _guards: guards,
        })
    }
}
