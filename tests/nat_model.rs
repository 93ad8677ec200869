//! The NAT balancer against a model of itself in plain Rust: random packets of random conversations, each compared in
//! what becomes of it, byte by byte, and the connections' states after it.

mod common;

use std::{collections::HashMap, net::SocketAddr};

use common::nat::{Bench, Outcome, SERVICES, at, ip, service};
use fastrand::Rng;
use xdpkit::{Action, ConnectionState, NatConfig, NatMode, Reason, ServiceAddr, ServiceProtocol};
use xdpkit_lab::frame::{Frame, tcp};

/// What the model knows of a connection. RFC 9293's states, as far as a balancer needs them.
#[derive(Clone, Copy, Debug, Default)]
struct Model {
    source: Option<SocketAddr>,
    answered: bool,
    confirmed: bool,
    fins: [bool; 2],
    resets: [bool; 2],
    /// What acknowledges the backend's SYN.
    expected: u32,
    /// Where the client's sequence numbers begin. All of its segments are near, but for what somebody else forged.
    base: u32,
    /// The backend sent data before it was acknowledged.
    early: bool,
}

/// How far a client comes here.
const NEAR: u32 = 100_000;
const CLIENT: usize = 0;
const BACKEND: usize = 1;

impl Model {
    fn state(&self, protocol: ServiceProtocol) -> ConnectionState {
        match self {
            _ if protocol == ServiceProtocol::Udp && self.answered => ConnectionState::UdpAnswered,
            _ if protocol == ServiceProtocol::Udp => ConnectionState::UdpNew,
            Self { resets, .. } if resets.contains(&true) => ConnectionState::TcpReset,
            Self { fins: [true, true], .. } => ConnectionState::TcpTimeWait,
            Self { fins, .. } if fins.contains(&true) => ConnectionState::TcpClosing,
            Self { confirmed: true, .. } => ConnectionState::TcpEstablished,
            Self { answered: true, .. } => ConnectionState::TcpAnswered,
            _ => ConnectionState::TcpSyn,
        }
    }

    /// Ended by the backend, so that a SYN begins anew.
    fn is_over(&self) -> bool {
        self.resets[BACKEND] || self.fins == [true, true]
    }

    fn hear_client(&mut self, packet: &Packet) {
        let ends = packet.flags & (tcp::RST | tcp::FIN) != 0;
        if self.confirmed && ends && packet.seq.wrapping_sub(self.base) > NEAR {
            return;
        }
        if packet.flags & tcp::RST != 0 {
            self.resets[CLIENT] = true;
            return;
        }
        self.resets[CLIENT] = false;
        if packet.flags & tcp::SYN != 0 {
            return;
        }
        let beyond = packet.ack.wrapping_sub(self.expected);
        if self.answered && packet.flags & tcp::ACK != 0 && (beyond == 0 || self.early && beyond < 16_384) {
            self.confirmed = true;
        }
        self.fins[CLIENT] |= packet.flags & tcp::FIN != 0 && self.confirmed;
    }

    fn hear_backend(&mut self, packet: &Packet) {
        if packet.flags & tcp::RST != 0 {
            self.resets[BACKEND] = true;
            return;
        }
        self.resets[BACKEND] = false;
        if packet.flags & (tcp::SYN | tcp::ACK) == tcp::SYN | tcp::ACK && !self.answered {
            self.answered = true;
            self.expected = packet.seq.wrapping_add(1);
        }
        if self.answered {
            self.early |= !self.confirmed && packet.length > 0;
            self.fins[BACKEND] |= packet.flags & tcp::FIN != 0;
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Packet {
    flags: u8,
    seq: u32,
    ack: u32,
    length: usize,
    ttl: u8,
}

impl Packet {
    /// Mostly what hosts send, with a share of everything else.
    fn random(random: &mut Rng, from: usize, model: Option<&Model>) -> Self {
        let usual = [tcp::SYN, tcp::SYN | tcp::ACK, tcp::ACK, tcp::ACK | tcp::PSH, tcp::FIN | tcp::ACK, tcp::RST];
        let flags = if random.u8(..10) == 0 { random.u8(..32) } else { usual[random.usize(..usual.len())] };
        let (expected, base) = model.map_or((0, 0), |model| (model.expected, model.base));
        let near = base.wrapping_add(random.u32(..NEAR));
        let (seq, ack) = if from == CLIENT {
            // Forged ones are well out of the window, by how much it may have moved. Who confirms knows enough to be believed.
            let confirmed = model.is_some_and(|model| model.confirmed);
            let forged = confirmed && flags & (tcp::RST | tcp::FIN) != 0 && random.bool();
            let seq = if forged { base.wrapping_add(random.u32(1 << 25..0xff00_0000)) } else { near };
            let ack = match random.u8(..8) {
                0 => random.u32(..),
                1 => expected.wrapping_add(random.u32(..20_000)),
                _ => expected,
            };
            (seq, ack)
        } else {
            (random.u32(..), near)
        };
        Self { flags, seq, ack, length: random.usize(..40), ttl: if random.u8(..50) == 0 { 1 } else { 64 } }
    }

    fn frame(&self, service: &ServiceAddr, from: SocketAddr, to: SocketAddr) -> Frame {
        let frame = match service.protocol {
            ServiceProtocol::Tcp => Frame::tcp(from, to).flags(self.flags).sequence(self.seq, self.ack),
            ServiceProtocol::Udp => Frame::udp(from, to),
        };
        frame.payload(&vec![self.seq as u8; self.length]).ttl(self.ttl)
    }
}

struct World {
    bench: Bench,
    mode: NatMode,
    random: Rng,
    models: HashMap<(usize, SocketAddr), Model>,
}

impl World {
    fn step(&mut self) {
        let which = self.random.usize(..SERVICES.len());
        let (name, backend) = (service(SERVICES[which].0), at(SERVICES[which].1));
        let last = 20 + self.random.u8(..10);
        let address = if name.address.is_ipv4() { format!("10.0.0.{last}") } else { format!("2001:db8:a::{last}") };
        let client = SocketAddr::new(ip(&address), 4000 + u16::from(self.random.u8(..4)));
        let model = self.models.get(&(which, client)).copied();
        let from = if self.random.bool() { CLIENT } else { BACKEND };
        let packet = Packet::random(&mut self.random, from, model.as_ref());
        if from == CLIENT {
            self.client_sends(which, &name, client, backend, packet);
        } else {
            self.backend_sends(which, &name, client, backend, packet);
        }
        let known = self.models.get(&(which, client)).map(|model| model.state(name.protocol));
        let found = self.bench.balancer.find(client, &name).unwrap().map(|found| found.state);
        assert_eq!(found, known, "{client} -> {name} after {packet:?}, before it {model:?}");
    }

    fn client_sends(
        &mut self,
        which: usize,
        name: &ServiceAddr,
        client: SocketAddr,
        backend: SocketAddr,
        packet: Packet,
    ) {
        let vip = SocketAddr::new(name.address, name.port.unwrap());
        let outcome = self.bench.client_sends(&packet.frame(name, client, vip));
        let tcp = name.protocol == ServiceProtocol::Tcp;
        if packet.ttl <= 1 {
            return assert_eq!((outcome.action, outcome.reason), (Action::Pass, Reason::HopLimit));
        }
        let syn = packet.flags & (tcp::SYN | tcp::ACK | tcp::RST) == tcp::SYN;
        let opens = !tcp || packet.flags & (tcp::SYN | tcp::ACK | tcp::RST | tcp::FIN) == tcp::SYN;
        let known = self.models.get(&(which, client)).copied();
        let known = known.filter(|model| {
            let anew = tcp && syn && model.is_over();
            if anew {
                self.models.remove(&(which, client));
            }
            !anew
        });
        let mut model = match known {
            Some(model) => model,
            None if !opens => {
                return assert_eq!(
                    (outcome.action, outcome.reason),
                    (Action::Drop, Reason::NoConnection),
                    "{packet:?}"
                );
            }
            None => {
                let found = self.bench.balancer.find(client, name).unwrap().expect("it was opened");
                let wanted = if self.mode == NatMode::Full { vip.ip() } else { client.ip() };
                assert_eq!((found.source.ip(), found.backend), (wanted, backend));
                Model { source: Some(found.source), base: self.random.u32(..), ..Model::default() }
            }
        };
        match (known.is_some(), tcp) {
            (true, true) => model.hear_client(&packet),
            (true, false) => model.confirmed |= model.answered,
            (false, _) => {}
        }
        let wanted = Packet { ttl: packet.ttl - 1, ..packet }.frame(name, model.source.unwrap(), backend);
        assert_eq!(outcome, self.bench.to_backend(&wanted), "{packet:?} {model:?}");
        self.models.insert((which, client), model);
    }

    fn backend_sends(
        &mut self,
        which: usize,
        name: &ServiceAddr,
        client: SocketAddr,
        backend: SocketAddr,
        packet: Packet,
    ) {
        let vip = SocketAddr::new(name.address, name.port.unwrap());
        let source = self.models.get(&(which, client)).and_then(|model| model.source);
        let Some((source, model)) = source.zip(self.models.get_mut(&(which, client))) else {
            // To a port that no connection has, or to a client that has none.
            let to = if self.mode == NatMode::Full { SocketAddr::new(vip.ip(), 999) } else { client };
            let outcome = self.bench.backend_sends(&packet.frame(name, backend, to));
            let reason = if self.mode == NatMode::Full { Reason::NoService } else { Reason::NotForVip };
            return assert_eq!((outcome.action, outcome.reason), (Action::Pass, reason));
        };
        let outcome = self.bench.backend_sends(&packet.frame(name, backend, source));
        if packet.ttl <= 1 {
            return assert_eq!((outcome.action, outcome.reason), (Action::Pass, Reason::HopLimit));
        }
        match name.protocol {
            ServiceProtocol::Tcp => model.hear_backend(&packet),
            ServiceProtocol::Udp => model.answered = true,
        }
        let wanted = Packet { ttl: packet.ttl - 1, ..packet }.frame(name, vip, client);
        assert_eq!(outcome, Outcome { ..self.bench.to_client(&wanted) }, "{packet:?}");
    }
}

#[test]
fn the_data_path_and_the_model_agree_on_random_conversations() {
    let seed = 6;
    for mode in [NatMode::Full, NatMode::Destination] {
        let bench = Bench::with_services(&NatConfig::default(), mode);
        let mut world = World { bench, mode, random: Rng::with_seed(seed), models: HashMap::new() };
        for _ in 0..common::times(10_000, 500_000, 500) {
            world.step();
        }
        let counts = world.bench.balancer.counts().unwrap();
        assert_eq!(counts.total(), world.models.len() as u64);
        for state in ConnectionState::ALL {
            let known = world
                .models
                .iter()
                .filter(|((which, _), model)| model.state(service(SERVICES[*which].0).protocol) == state);
            assert_eq!(counts.state(state), known.count() as u64, "{state}");
        }
    }
}
