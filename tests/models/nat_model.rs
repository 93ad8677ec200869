//! The NAT balancer against a model of itself in plain Rust: random packets of random conversations, each compared in
//! what becomes of it, byte by byte, and the connections' states after it.

pub(crate) mod model;

use std::{collections::HashMap, net::SocketAddr};

use self::model::{BACKEND, CLIENT, Model, Packet};
use crate::common::nat::{Bench, Outcome, SERVICES, at, ip, service};
use fastrand::Rng;
use xdpkit::{Action, ConnectionState, NatConfig, NatMode, Reason, ServiceAddr, ServiceProtocol};
use xdpkit_lab::frame::tcp;

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
        for _ in 0..crate::common::times(5_000, 500_000, 500) {
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
