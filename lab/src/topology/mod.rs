//! The tutorials' networks, ready made: namespaces joined, addressed and routed in both families.
//!
//! Hosts have one interface, `eth0`. A balancer's interface to its clients is `eth0`, too, and it
//! forwards what its program leaves to the kernel. Every port at which a balancer's transmitted
//! or redirected frames arrive has a native XDP_PASS program, without which veth would lose them;
//! the balancer's own interfaces and the backends' are free.

mod dsr;
mod nat;
mod pair;

pub use dsr::{DsrIpip, DsrL2, add_silent_vip};
pub use nat::Nat;
pub use pair::Pair;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::device::{XdpPass, veth};
use crate::error::Result;
use crate::namespace::Namespace;

/// A host's address in each family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address; its last group reads like the last number of the IPv4 address.
    pub v6: Ipv6Addr,
}

impl Addresses {
    /// Both, for loops over the families.
    pub fn both(self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }
}

/// A link's network in each family.
#[derive(Clone, Copy)]
struct Net {
    v4: Ipv4Addr,
    v4_len: u8,
    v6: Ipv6Addr,
}

impl Net {
    /// `v6` is the third group of a network below 2001:db8::/32.
    const fn new([a, b, c, d]: [u8; 4], v4_len: u8, v6: u16) -> Self {
        Self { v4: Ipv4Addr::new(a, b, c, d), v4_len, v6: Ipv6Addr::new(0x2001, 0xdb8, v6, 0, 0, 0, 0, 0) }
    }

    fn host(&self, number: u8) -> Addresses {
        let group = u16::from_str_radix(&number.to_string(), 16).expect("digits are hex digits");
        Addresses {
            v4: (u32::from(self.v4) + u32::from(number)).into(),
            v6: (u128::from(self.v6) + u128::from(group)).into(),
        }
    }

    /// The host `index` of a kind that is numbered from `first`.
    fn nth(&self, first: u8, index: usize) -> (u8, Addresses) {
        let number = u8::try_from(usize::from(first) + index).ok().filter(|number| *number < 255);
        let number = number.expect("too many hosts for one network");
        (number, self.host(number))
    }

    /// Gives `dev` the addresses of the host `number`.
    fn assign(&self, ns: &Namespace, dev: &str, number: u8) -> Result<()> {
        let Addresses { v4, v6 } = self.host(number);
        ns.add_address(dev, IpNet::new_assert(v4.into(), self.v4_len))?;
        ns.add_address(dev, IpNet::new_assert(v6.into(), 64))
    }

    /// Makes the host `number` the default gateway of `ns`.
    fn gateway(&self, ns: &Namespace, number: u8) -> Result<()> {
        self.host(number).both().into_iter().try_for_each(|via| ns.add_default_route(via))
    }
}

/// A namespace of bridges, whose ports all receive native XDP's frames.
struct Switch {
    ns: Namespace,
    guards: Vec<XdpPass>,
}

impl Switch {
    fn new() -> Result<Self> {
        Ok(Self { ns: Namespace::new("switch")?, guards: Vec::new() })
    }

    /// Creates the interfaces and joins them by the bridge `name`, with ports `name`p0, ...
    fn connect(&mut self, name: &str, mtu: u32, hosts: &[(&Namespace, &str)]) -> Result<()> {
        let ports: Vec<String> = (0..hosts.len()).map(|i| format!("{name}p{i}")).collect();
        for (&(host, dev), port) in hosts.iter().zip(&ports) {
            veth((host, dev), (&self.ns, port))?;
            host.set_mtu(dev, mtu)?;
            self.ns.set_mtu(port, mtu)?;
            self.guards.push(self.ns.xdp_pass(port)?);
        }
        let ports: Vec<&str> = ports.iter().map(String::as_str).collect();
        self.ns.add_bridge(name, &ports)
    }
}

/// The usual size of an Ethernet payload.
const MTU: u32 = 1500;

/// Creates the namespaces `prefix`0, `prefix`1, ...
fn namespaces(prefix: &str, count: usize) -> Result<Vec<Namespace>> {
    (0..count).map(|i| Namespace::new(&format!("{prefix}{i}"))).collect()
}

/// Each namespace's `eth0`.
fn eth0(hosts: &[Namespace]) -> impl Iterator<Item = (&Namespace, &str)> {
    hosts.iter().map(|host| (host, "eth0"))
}
