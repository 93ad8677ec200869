//! The NAT balancer as its model of connections has it, for any frame: what is read of it decides, not who has made it.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use fastrand::Rng;
use xdpkit::{
    Action, Fragment, NatConfig, NatMode, NatTimeouts, Network, Reason, ServiceAddr, ServiceProtocol, Stage as _,
    TestRun, Transport,
};
use xdpkit_lab::frame::tcp;

use super::{
    fragments::{identification, is_routed, make_common},
    tally::{Tally, Verdict},
};
use crate::{
    common::{
        bytes::{echo_reply, put, set_hops, word},
        dsr::network_at,
        nat::{BACKEND_MAC, Bench, CLIENT_MAC, SERVICES, Side, at, ip, service},
    },
    nat_model::model::{BACKEND, CLIENT, Model, Packet},
    parser_oracle::{
        generate,
        oracle::{self, Oracle},
    },
};

/// A service by its number in [`SERVICES`], and a client.
type Key = (usize, SocketAddr);

/// Addresses, protocol (0: IPv6) and identification.
type Datagram = (IpAddr, IpAddr, u8, u32);

pub(crate) struct World {
    pub(crate) bench: Bench,
    mode: NatMode,
    services: Vec<(ServiceAddr, SocketAddr)>,
    connections: HashMap<Key, Model>,
    /// By the backend, the protocol, and what the backend takes for the client.
    answers: HashMap<(SocketAddr, u8, SocketAddr), Key>,
    /// Where first fragments went; whether it was a backend's. To the host: none.
    fragments: HashMap<Datagram, Option<(Key, bool)>>,
    window: u32,
}

fn config() -> NatConfig {
    let day = Duration::from_secs(24 * 60 * 60);
    let mut timeouts = NatTimeouts::default();
    for timeout in [
        &mut timeouts.udp_new,
        &mut timeouts.udp,
        &mut timeouts.syn,
        &mut timeouts.answered,
        &mut timeouts.established,
        &mut timeouts.closing,
        &mut timeouts.time_wait,
        &mut timeouts.reset,
    ] {
        *timeout = day;
    }
    NatConfig::default().capacity(1_u32 << 18).answers_per_second(u32::MAX).timeouts(timeouts)
}

/// Clients, whose neighbours are known.
fn client(random: &mut Rng, family6: bool) -> SocketAddr {
    let last = 20 + random.u8(..10);
    let address = if family6 { format!("2001:db8:a::{last}") } else { format!("10.0.0.{last}") };
    SocketAddr::new(ip(&address), 4000 + u16::from(random.u8(..8)))
}

impl World {
    pub(crate) fn new(mode: NatMode) -> Self {
        let services = SERVICES.iter().map(|(name, backend)| (service(name), at(backend))).collect();
        Self {
            bench: Bench::with_services(&config(), mode),
            mode,
            services,
            connections: HashMap::new(),
            answers: HashMap::new(),
            fragments: HashMap::new(),
            window: 0,
        }
    }

    /// Runs so many frames through the balancer and the model.
    pub(crate) fn run(&mut self, random: &mut Rng, frames: usize, all: &mut Tally, about: &str) {
        let namespace = self.bench.lab.balancer.clone();
        namespace.run(|| {
            let mut tally = Tally::default();
            let mut before = self.bench.balancer.stats().unwrap();
            for number in 0..frames {
                let (side, frame) = self.frame(random);
                let interface = if side == Side::Clients { &self.bench.front } else { &self.bench.back };
                let outcome = self.bench.balancer.run(&TestRun::new(&frame).ingress(interface, 0)).unwrap();
                let about = || format!("{about}, frame {number} from {side:?}: {frame:02x?}");
                let (verdict, wanted) = self.judge(side, &frame);
                assert_eq!(outcome.action, verdict.0, "for {}, {}", verdict.1, about());
                if verdict.0 != Action::Drop {
                    assert_eq!(outcome.frame, wanted, "{}, {}", verdict.1, about());
                }
                tally.add(verdict, &frame);
                if number % 512 == 511 {
                    tally.compare(&self.bench.balancer, &before, all, &about());
                    before = self.bench.balancer.stats().unwrap();
                }
            }
            tally.compare(&self.bench.balancer, &before, all, about);
        });
        self.states_agree(about);
    }

    fn states_agree(&self, about: &str) {
        let counts = self.bench.balancer.counts().unwrap();
        for state in xdpkit::ConnectionState::ALL {
            let of_state =
                |((which, _), model): &(&Key, &Model)| model.state(self.services[*which].0.protocol) == state;
            let known = self.connections.iter().filter(of_state).count();
            assert_eq!(counts.state(state), known as u64, "{about}: {state}");
        }
    }

    /// A frame of a neighbour: half of them are of conversations, half are anything.
    fn frame(&mut self, random: &mut Rng) -> (Side, Vec<u8>) {
        let which = random.usize(..self.services.len());
        let (service, backend) = self.services[which];
        let from = client(random, service.address.is_ipv6());
        let vip = SocketAddr::new(service.address, service.port.unwrap());
        let model = self.connections.get(&(which, from)).copied();
        let source = model.and_then(|model| model.source);
        let (side, ends) = match source {
            Some(source) if random.bool() => (Side::Backends, (backend, source)),
            _ => (Side::Clients, (from, vip)),
        };
        let mut frame = if random.bool() {
            let from = if side == Side::Clients { CLIENT } else { BACKEND };
            let packet = Packet::random(random, from, model.as_ref());
            let mut frame = packet.frame(&service, ends.0, ends.1);
            if random.u8(..16) == 0 {
                frame = frame.fragment(0, true);
            }
            let mut frame = frame.build();
            if random.u8(..4) == 0 {
                let at = random.usize(12..frame.len());
                frame[at] ^= 1 << random.u8(..8);
            }
            frame
        } else {
            generate::small_of(random, &[ends])
        };
        let (macs_from, macs_to) = match side {
            Side::Clients => self.bench.macs_of_clients(),
            Side::Backends => self.bench.macs_of_backends(),
        };
        frame[..6].copy_from_slice(&macs_to);
        frame[6..12].copy_from_slice(&macs_from);
        super::fragments::astray(random, &mut frame);
        from_a_neighbour(&mut frame, ends.0.ip());
        near(random, &mut frame, side);
        make_common(random, &mut frame, self.window);
        (side, frame)
    }

    /// What becomes of a frame, and its bytes then. The balancer is only asked for the port that a new connection got.
    fn judge(&mut self, side: Side, frame: &[u8]) -> (Verdict, Vec<u8>) {
        let left_alone = |reason| ((Action::Pass, reason), frame.to_vec());
        let dropped = |reason| ((Action::Drop, reason), frame.to_vec());
        let oracle = oracle::read(frame);
        let reading = &oracle.reading;
        let own = if side == Side::Clients { self.bench.macs_of_clients().1 } else { self.bench.macs_of_backends().1 };
        let is_for_us = frame[..6] == own;
        if reading.reason != Reason::None {
            let is_ours = |ip| self.services.iter().any(|(service, _)| service.address == ip);
            return match reading.network {
                Network::Ip { destination, .. } if is_ours(destination) && !is_for_us => left_alone(Reason::NotForUs),
                Network::Ip { destination, .. } if is_ours(destination) => dropped(reading.reason),
                _ => left_alone(reading.reason),
            };
        }
        let Network::Ip { source, destination, hop_limit, protocol, fragment } = reading.network else {
            return left_alone(Reason::NotForVip);
        };
        let for_vip = self.services.iter().any(|(service, _)| service.address == destination);
        if !for_vip && self.mode == NatMode::Full {
            return left_alone(Reason::NotForVip);
        }
        if !is_for_us {
            return left_alone(Reason::NotForUs);
        }
        let ours = |reason| if for_vip { reason } else { Reason::NotForVip };
        let name = if source.is_ipv6() { 0 } else { protocol };
        let datagram = (source, destination, name, identification(frame, &oracle));
        if is_routed(frame, &oracle) {
            if for_vip && fragment == Fragment::First {
                self.fragments.insert(datagram, None);
            }
            return left_alone(ours(Reason::RoutingHeader));
        }
        let ports = match (fragment, reading.transport) {
            (Fragment::Later, _) => match self.fragments.get(&datagram) {
                Some(None) => return left_alone(Reason::NoService),
                None if for_vip && !may_be_of_service(source, protocol) => return left_alone(Reason::NoService),
                None if for_vip => return dropped(Reason::FragmentUnknown),
                None => return left_alone(Reason::NotForVip),
                Some(_) if hop_limit <= 1 => return left_alone(Reason::HopLimit),
                Some(Some((key, from_backend))) => return self.on_its_way(side, frame, &oracle, *key, *from_backend),
            },
            (_, Some(Transport::Tcp { source, destination, .. } | Transport::Udp { source, destination })) => {
                [source, destination]
            }
            // What is quoted in them is random, so it is nobody's. See tests/nat_balancer/ for the others.
            (Fragment::No, Some(Transport::Icmp { kind: 3 | 11 | 12, .. } | Transport::Icmpv6 { kind: 1..=4, .. })) => {
                return left_alone(ours(Reason::ErrorUnknown));
            }
            (Fragment::No, Some(Transport::Icmp { kind: 8, code: 0 } | Transport::Icmpv6 { kind: 128, code: 0 }))
                if for_vip =>
            {
                return ((Action::Tx, Reason::EchoAnswered), echo_reply(frame, oracle.at()));
            }
            _ => {
                if for_vip && source.is_ipv6() && fragment == Fragment::First {
                    self.fragments.insert(datagram, None);
                }
                return left_alone(ours(Reason::NoService));
            }
        };
        let (from, to) = (SocketAddr::new(source, ports[0]), SocketAddr::new(destination, ports[1]));
        let is_of = |(service, _): &(ServiceAddr, SocketAddr)| {
            service.protocol as u8 == protocol && (service.address, service.port) == (to.ip(), Some(to.port()))
        };
        let packet = packet(frame, &oracle, hop_limit);
        let (key, from_backend) = match self.services.iter().position(is_of) {
            Some(_) if hop_limit <= 1 => return left_alone(Reason::HopLimit),
            Some(which) => {
                if !self.hear_client((which, from), &packet, frame) {
                    return dropped(Reason::NoConnection);
                }
                ((which, from), false)
            }
            None => {
                let Some(key) = self.answers.get(&(from, protocol, to)).copied() else {
                    if for_vip && fragment == Fragment::First && datagram.3 != 0 {
                        self.fragments.insert(datagram, None);
                    }
                    return left_alone(ours(Reason::NoService));
                };
                if hop_limit <= 1 {
                    return left_alone(Reason::HopLimit);
                }
                let model = self.connections.get_mut(&key).unwrap();
                match protocol {
                    6 => model.hear_backend(&packet),
                    _ => model.answered = true,
                }
                (key, true)
            }
        };
        if fragment == Fragment::First && datagram.3 != 0 {
            self.fragments.insert(datagram, Some((key, from_backend)));
        }
        self.on_its_way(side, frame, &oracle, key, from_backend)
    }

    /// Brings a connection forward, or opens one. False: there is none, and none is opened.
    fn hear_client(&mut self, key: Key, packet: &Packet, frame: &[u8]) -> bool {
        let (service, backend) = self.services[key.0];
        let is_tcp = service.protocol == ServiceProtocol::Tcp;
        let syn = packet.flags & (tcp::SYN | tcp::ACK | tcp::RST) == tcp::SYN;
        if let Some(model) = self.connections.get(&key)
            && is_tcp
            && syn
            && model.is_over()
        {
            // Another one begins in its place. Fragments of the earlier one are nobody's.
            let model = self.connections.remove(&key).unwrap();
            self.answers.remove(&(backend, service.protocol as u8, model.source.unwrap()));
            self.fragments.retain(|_, went| went.is_none_or(|(other, _)| other != key));
            self.window += 1;
        }
        if let Some(model) = self.connections.get_mut(&key) {
            match is_tcp {
                true => model.hear_client(packet),
                false => model.confirmed |= model.answered,
            }
            return true;
        }
        if is_tcp && (!syn || packet.flags & tcp::FIN != 0) {
            return false;
        }
        // Its first packet says no more than that it is there.
        let source = match self.mode {
            NatMode::Full => {
                // One that is too big is answered instead: the balancer tells.
                let found = self.bench.balancer.find(key.1, &service).unwrap();
                found.unwrap_or_else(|| panic!("it was opened: {frame:02x?}")).source
            }
            _ => key.1,
        };
        let earlier = self.answers.insert((backend, service.protocol as u8, source), key);
        assert_eq!(earlier, None, "{source} is one connection's only");
        self.connections.insert(key, Model { source: Some(source), ..Model::default() });
        true
    }

    /// The frame with the addresses and ports of the other side.
    fn on_its_way(
        &self,
        side: Side,
        frame: &[u8],
        oracle: &Oracle<'_>,
        key: Key,
        from_backend: bool,
    ) -> (Verdict, Vec<u8>) {
        let (service, backend) = self.services[key.0];
        let (at, network_end) = (network_at(frame), oracle.network_end.unwrap());
        if network_end - at > 1500 {
            // No wire of these interfaces carries it: it was merged, and gets no answer.
            return ((Action::Drop, Reason::TooBig), frame.to_vec());
        }
        let (source, destination) = match from_backend {
            true => (SocketAddr::new(service.address, service.port.unwrap()), key.1),
            false => (self.connections[&key].source.unwrap(), backend),
        };
        let mut out = frame.to_vec();
        let Network::Ip { hop_limit, protocol, fragment, .. } = oracle.reading.network else { unreachable!() };
        let transport = oracle.at();
        let check = transport + if protocol == 6 { 16 } else { 6 };
        let sums = fragment != Fragment::Later && (protocol == 6 || word(frame, check) != 0);
        let mut checks = if sums { vec![check] } else { Vec::new() };
        match [source.ip(), destination.ip()] {
            [IpAddr::V4(source), IpAddr::V4(destination)] => {
                checks.push(at + 10);
                put(&mut out, at + 12, &[source.octets(), destination.octets()].concat(), &checks);
                checks.pop();
            }
            [IpAddr::V6(source), IpAddr::V6(destination)] => {
                put(&mut out, at + 8, &[source.octets(), destination.octets()].concat(), &checks);
            }
            _ => unreachable!("both are of one family"),
        }
        if fragment != Fragment::Later {
            let ports = [source.port().to_be_bytes(), destination.port().to_be_bytes()].concat();
            put(&mut out, transport, &ports, &checks);
        }
        if sums && protocol == 17 && word(&out, check) == 0 {
            out[check..check + 2].fill(0xff);
        }
        set_hops(&mut out, at, hop_limit - 1);
        let back = ["192.168.178.", "2001:db8:b:"].iter().any(|net| destination.to_string().contains(net));
        let (own, neighbour, out_by) = match back {
            true => (self.bench.macs_to_backends().0, BACKEND_MAC, Side::Backends),
            false => (self.bench.macs_to_clients().0, CLIENT_MAC, Side::Clients),
        };
        out[..6].copy_from_slice(&neighbour);
        out[6..12].copy_from_slice(&own);
        let action = if out_by == side { Action::Tx } else { Action::Redirect };
        ((action, if from_backend { Reason::Answered } else { Reason::Forwarded }), out)
    }
}

/// Whether a later fragment's datagram can be TCP or UDP. Behind IPv6's fragment header, other extensions may stand.
fn may_be_of_service(source: IpAddr, protocol: u8) -> bool {
    matches!(protocol, 6 | 17) || source.is_ipv6() && matches!(protocol, 0 | 43 | 44 | 51 | 60)
}

/// Gives an IP packet this source unless it has another neighbour's: nobody answers for others here.
fn from_a_neighbour(frame: &mut [u8], source: IpAddr) {
    let Network::Ip { source: found, .. } = oracle::read(frame).reading.network else { return };
    if found == source || found.is_ipv4() != source.is_ipv4() {
        return;
    }
    let at = network_at(frame);
    match source {
        IpAddr::V4(source) => frame[at + 12..at + 16].copy_from_slice(&source.octets()),
        IpAddr::V6(source) => frame[at + 8..at + 24].copy_from_slice(&source.octets()),
    }
}

/// Lets a client's sequence numbers stay near to where they begin, and the backend acknowledge what is near: how far off a
/// client may be is for tests/models/nat_model.rs.
fn near(random: &mut Rng, frame: &mut [u8], side: Side) {
    let oracle = oracle::read(frame);
    if let (Reason::None, Some(Transport::Tcp { .. })) = (oracle.reading.reason, oracle.reading.transport) {
        let at = oracle.at() + if side == Side::Clients { 4 } else { 8 };
        frame[at..at + 4].copy_from_slice(&random.u32(..100_000).to_be_bytes());
    }
}

/// What the model wants to know of a segment.
fn packet(frame: &[u8], oracle: &Oracle<'_>, ttl: u8) -> Packet {
    let Some(Transport::Tcp { flags, .. }) = oracle.reading.transport else {
        return Packet { flags: 0, seq: 0, ack: 0, length: 0, ttl };
    };
    let at = oracle.at();
    let number = |at: usize| u32::from_be_bytes(frame[at..at + 4].try_into().unwrap());
    let length = oracle.network_end.unwrap() - at - usize::from(frame[at + 12] >> 4) * 4;
    Packet { flags, seq: number(at + 4), ack: number(at + 8), length, ttl }
}
