//! The balancer in plain Rust: maps and vectors, no time, no limits. Written from the documentation, not from the C.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
};

use xdpkit::{Action, Reason, ServiceAddr, ServiceProtocol, maglev};

/// Backends are numbered as the last number of their addresses; their MACs have the same number.
pub(crate) type Backend = u8;

/// Identities of a backend's address: one that was removed and came back is another.
type Identity = (Backend, u32);

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Staying,
    HalfOpen,
    Established,
    Closing,
}

#[derive(Clone, Copy, Default)]
struct Slot {
    present: Option<Identity>,
    previous: Option<Identity>,
    in_transition: bool,
}

pub(crate) struct Service {
    pub(crate) address: ServiceAddr,
    pub(crate) ipip: bool,
    by_source: bool,
    /// Of the backends' addresses in the other family than the service's.
    pub(crate) crossed: bool,
    slots: Vec<Slot>,
    backends: Vec<(Identity, u32)>,
    killed: Vec<Identity>,
    flows: HashMap<(SocketAddr, u16), (Identity, Kind)>,
}

/// What a packet is, as far as it matters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum What {
    Malformed(Reason),
    Other,
    /// Of an IPv6 datagram of another protocol.
    OtherFirst,
    Echo,
    /// The client and port of the quoted packet, its other port and protocol; `None`: nothing of ours.
    Error(Option<(SocketAddr, u16, u8)>),
    /// Ports, TCP flags (`None`: UDP), and whether it is a first fragment.
    Flow {
        client_port: u16,
        port: u16,
        flags: Option<u8>,
        first: bool,
    },
    Later {
        protocol: u8,
    },
    /// An IPv6 routing header has segments left; whether it is a first fragment.
    Routed {
        first: bool,
    },
}

/// What is to become of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Verdict {
    pub(crate) action: Action,
    pub(crate) reason: Reason,
    /// To this backend, of this service.
    pub(crate) to: Option<(usize, Backend)>,
    /// What varies by flow, where that can be known.
    pub(crate) hash: Option<u32>,
}

/// What all fragments of one have in common: source, destination, protocol (0: IPv6), identification.
type Datagram = (IpAddr, IpAddr, u8, u32);

pub(crate) struct Model {
    pub(crate) services: Vec<Service>,
    /// Where first fragments went; `None`: to the host.
    fragments: HashMap<Datagram, Option<(usize, Identity)>>,
    table_size: u32,
    seed: u64,
    identities: u32,
}

impl Model {
    pub(crate) fn new(table_size: u32, seed: u64) -> Self {
        Self { services: Vec::new(), fragments: HashMap::new(), table_size, seed, identities: 0 }
    }

    pub(crate) fn add(&mut self, address: ServiceAddr, ipip: bool, crossed: bool, by_source: bool) {
        let slots = vec![Slot::default(); self.table_size as usize];
        let (backends, killed, flows) = (Vec::new(), Vec::new(), HashMap::new());
        self.services.push(Service { address, ipip, by_source, crossed, slots, backends, killed, flows });
    }

    /// The list becomes this; `name` is what tells a backend in the table.
    pub(crate) fn set(&mut self, service: usize, list: &[(Backend, u32)], name: impl Fn(Backend) -> Vec<u8>) {
        let entry = &mut self.services[service];
        let before = std::mem::take(&mut entry.backends);
        for (backend, weight) in list {
            let identity = before.iter().find(|(identity, _)| identity.0 == *backend).map(|(identity, _)| *identity);
            let identity = identity.unwrap_or_else(|| {
                self.identities += 1;
                (*backend, self.identities)
            });
            // Another host has this address now: what its earlier one had ends.
            entry.killed.extend((0..identity.1).map(|earlier| (*backend, earlier)));
            entry.backends.push((identity, *weight));
        }
        self.rebuild(service, name);
    }

    pub(crate) fn kill(&mut self, service: usize, backend: Backend, name: impl Fn(Backend) -> Vec<u8>) {
        let entry = &mut self.services[service];
        entry.killed.extend((0..=self.identities).map(|identity| (backend, identity)));
        entry.backends.retain(|((other, _), _)| *other != backend);
        self.rebuild(service, name);
    }

    fn rebuild(&mut self, service: usize, name: impl Fn(Backend) -> Vec<u8>) {
        let entry = &mut self.services[service];
        let names: Vec<Vec<u8>> = entry.backends.iter().map(|((backend, _), _)| name(*backend)).collect();
        let shares: Vec<_> = names
            .iter()
            .zip(&entry.backends)
            .map(|(name, (_, weight))| maglev::Share { name, weight: *weight })
            .collect();
        let table = maglev::table(&shares, self.table_size, self.seed).unwrap();
        for (at, slot) in entry.slots.iter_mut().enumerate() {
            let wanted = table.get(at).map(|index| entry.backends[*index as usize].0);
            if slot.present == wanted {
                continue;
            }
            let killed = slot.present.is_some_and(|present| entry.killed.contains(&present));
            if !slot.in_transition && slot.present.is_some() && !killed {
                *slot = Slot { present: wanted, previous: slot.present, in_transition: true };
            }
            slot.present = wanted;
        }
    }

    fn find(&self, protocol: u8, vip: IpAddr, port: u16) -> Option<usize> {
        let number = |service: &Service| service.address.protocol as u8;
        let of = |wanted: Option<u16>| {
            self.services.iter().position(|service| {
                number(service) == protocol && service.address.address == vip && service.address.port == wanted
            })
        };
        if port == 0 { None } else { of(Some(port)).or_else(|| of(None)) }
    }

    /// Of a frame to another host.
    pub(crate) fn judge_of_others(&self, vip: IpAddr, what: What) -> Verdict {
        let reason = match (self.services.iter().any(|service| service.address.address == vip), what) {
            (true, _) => Reason::NotForUs,
            (false, What::Malformed(reason)) => reason,
            (false, _) => Reason::NotForVip,
        };
        Verdict { action: Action::Pass, reason, to: None, hash: None }
    }

    pub(crate) fn judge(&mut self, source: IpAddr, vip: IpAddr, identification: u32, what: What) -> Verdict {
        let no = |action, reason| Verdict { action, reason, to: None, hash: None };
        if !self.services.iter().any(|service| service.address.address == vip) {
            return no(Action::Pass, if let What::Malformed(reason) = what { reason } else { Reason::NotForVip });
        }
        let forward = |service: usize, identity: Option<Identity>, reason, hash| match identity {
            None => Verdict { action: Action::Drop, reason: Reason::NoBackend, to: None, hash: None },
            Some((backend, _)) => Verdict { action: Action::Tx, reason, to: Some((service, backend)), hash },
        };
        let datagram = |protocol| (source, vip, if vip.is_ipv6() { 0 } else { protocol }, identification);
        // Later fragments have no ports; all of a datagram have the same.
        let of_fragments = hash(self.seed, source, vip, 0) as u32;
        match what {
            What::Malformed(reason) => no(Action::Drop, reason),
            What::Routed { first } => {
                if first {
                    self.fragments.insert(datagram(0), None);
                }
                no(Action::Pass, Reason::RoutingHeader)
            }
            What::Other => no(Action::Pass, Reason::NoService),
            What::OtherFirst => {
                self.fragments.insert(datagram(0), None);
                no(Action::Pass, Reason::NoService)
            }
            What::Echo if self.is_martian(source) => no(Action::Drop, Reason::MartianSource),
            What::Echo => no(Action::Tx, Reason::EchoAnswered),
            What::Later { protocol } if !may_be_of_service(vip, protocol) => no(Action::Pass, Reason::NoService),
            What::Later { protocol } => match self.fragments.get(&datagram(protocol)) {
                Some(None) => no(Action::Pass, Reason::NoService),
                Some(Some((service, identity))) if !self.services[*service].killed.contains(identity) => {
                    forward(*service, Some(*identity), Reason::Forwarded, Some(of_fragments))
                }
                _ => no(Action::Drop, Reason::FragmentUnknown),
            },
            What::Error(quoted) => {
                let found =
                    quoted.and_then(|(client, port, protocol)| Some((client, port, self.find(protocol, vip, port)?)));
                let Some((client, port, service)) = found else { return no(Action::Pass, Reason::ErrorUnknown) };
                let (slot, hash) = self.slot(service, client, port);
                let identity = self.services[service].transit(slot, client, port, None, true);
                forward(service, identity, Reason::ErrorForwarded, Some(hash))
            }
            What::Flow { client_port, port, flags, first } => {
                let protocol = if flags.is_some() { 6 } else { 17 };
                let Some(service) = self.find(protocol, vip, port) else {
                    if port == 0 {
                        return no(Action::Drop, Reason::PortZero);
                    }
                    if first {
                        self.fragments.insert(datagram(protocol), None);
                    }
                    return no(Action::Pass, Reason::NoService);
                };
                if self.is_martian(source) {
                    return no(Action::Drop, Reason::MartianSource);
                }
                let client = SocketAddr::new(source, client_port);
                let (slot, hash) = self.slot(service, client, port);
                let identity = self.services[service].transit(slot, client, port, flags, false);
                if let (true, Some(identity)) = (first, identity) {
                    self.fragments.insert(datagram(protocol), Some((service, identity)));
                }
                forward(service, identity, Reason::Forwarded, Some(if first { of_fragments } else { hash }))
            }
        }
    }

    /// Whether a source is not one host, or one of the virtual addresses.
    fn is_martian(&self, source: IpAddr) -> bool {
        let is_no_host = match source {
            IpAddr::V4(ip) => matches!(ip.octets()[0], 0 | 127 | 224..),
            IpAddr::V6(ip) => ip.is_unspecified() || ip.is_loopback() || ip.is_multicast(),
        };
        is_no_host || self.services.iter().any(|service| service.address.address == source)
    }

    /// A flow's slot, and what else varies by flow.
    fn slot(&self, service: usize, client: SocketAddr, port: u16) -> (usize, u32) {
        let entry = &self.services[service];
        let ports = if entry.by_source { 0 } else { u64::from(port.to_be()) << 16 | u64::from(client.port().to_be()) };
        let hash = hash(self.seed, client.ip(), entry.address.address, ports << 8 | entry.address.protocol as u64);
        ((((hash >> 32) * u64::from(self.table_size)) >> 32) as usize, hash as u32)
    }
}

impl Service {
    /// `flags`: TCP. `look`: an error about the flow, which leaves no trace.
    fn transit(
        &mut self,
        slot: usize,
        client: SocketAddr,
        port: u16,
        flags: Option<u8>,
        look: bool,
    ) -> Option<Identity> {
        let slot = self.slots[slot];
        if !slot.in_transition {
            return slot.present;
        }
        let is_alive = |identity: &Identity| !self.killed.contains(identity);
        let previous = slot.previous.filter(is_alive);
        let udp = self.address.protocol == ServiceProtocol::Udp;
        let flags = flags.unwrap_or(0);
        let (fin, syn, rst, ack) = (flags & 1 != 0, flags & 2 != 0, flags & 4 != 0, flags & 16 != 0);
        let opens = !udp && syn && !ack;
        let ends = !udp && !opens && (fin || rst);
        let known = self.flows.get(&(client, port)).copied().filter(|(identity, _)| is_alive(identity));
        if let Some((identity, kind)) = known.filter(|(_, kind)| !(opens && *kind == Kind::Closing)) {
            let kind = match kind {
                _ if ends => Kind::Closing,
                Kind::HalfOpen if !opens => Kind::Established,
                kind => kind,
            };
            if !look {
                self.flows.insert((client, port), (identity, kind));
            }
            return Some(identity);
        }
        if look {
            return previous.or(slot.present);
        }
        let (identity, kind) = match previous {
            Some(previous) if !opens => (Some(previous), Kind::Staying),
            _ => (slot.present, if opens { Kind::HalfOpen } else { Kind::Established }),
        };
        if let Some(identity) = identity {
            self.flows.insert((client, port), (identity, kind));
        }
        identity
    }
}

/// Whether a later fragment's datagram can be TCP or UDP. Behind IPv6's fragment header, other extensions may stand.
fn may_be_of_service(vip: IpAddr, protocol: u8) -> bool {
    matches!(protocol, 6 | 17) || vip.is_ipv6() && matches!(protocol, 0 | 43 | 44 | 51 | 60)
}

fn mix(mut x: u64) -> u64 {
    x = (x ^ x >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    x = (x ^ x >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ x >> 33
}

/// The hash that two balancers must agree about; see `bpf/include/service.h`.
fn hash(seed: u64, client: IpAddr, vip: IpAddr, rest: u64) -> u64 {
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    match (client, vip) {
        (IpAddr::V4(client), IpAddr::V4(vip)) => {
            let raw = |ip: std::net::Ipv4Addr| u64::from(u32::from_ne_bytes(ip.octets()));
            let a = raw(client) << 32 | raw(vip);
            mix((a ^ seed).wrapping_mul(GOLDEN) ^ rest ^ a >> 32)
        }
        (IpAddr::V6(client), IpAddr::V6(vip)) => {
            let half = |ip: std::net::Ipv6Addr, at: usize| {
                u64::from_ne_bytes(ip.octets()[8 * at..8 * at + 8].try_into().unwrap())
            };
            let a = mix(half(client, 0) ^ seed) ^ half(client, 1);
            let b = mix(half(vip, 0).wrapping_add(half(vip, 1).wrapping_mul(GOLDEN))) ^ rest;
            mix(mix(a).wrapping_add(b))
        }
        _ => panic!("{client} and {vip} are of different families"),
    }
}
