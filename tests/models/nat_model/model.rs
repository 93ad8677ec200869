//! The NAT balancer's connections in plain Rust: RFC 9293's states, as far as a balancer needs them.

use std::net::SocketAddr;

use fastrand::Rng;
use xdpkit::{ConnectionState, ServiceAddr, ServiceProtocol};
use xdpkit_lab::frame::{Frame, tcp};

/// What the model knows of a connection.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Model {
    pub(crate) source: Option<SocketAddr>,
    pub(crate) answered: bool,
    pub(crate) confirmed: bool,
    pub(crate) fins: [bool; 2],
    pub(crate) resets: [bool; 2],
    /// What acknowledges the backend's SYN.
    pub(crate) expected: u32,
    /// Where the client's sequence numbers begin. All of its segments are near, but for what somebody else forged.
    pub(crate) base: u32,
    /// The backend sent data before it was acknowledged.
    pub(crate) early: bool,
}

/// How far a client comes here.
pub(crate) const NEAR: u32 = 100_000;
pub(crate) const CLIENT: usize = 0;
pub(crate) const BACKEND: usize = 1;

impl Model {
    pub(crate) fn state(&self, protocol: ServiceProtocol) -> ConnectionState {
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
    pub(crate) fn is_over(&self) -> bool {
        self.resets[BACKEND] || self.fins == [true, true]
    }

    pub(crate) fn hear_client(&mut self, packet: &Packet) {
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

    pub(crate) fn hear_backend(&mut self, packet: &Packet) {
        if packet.flags & tcp::RST != 0 {
            self.resets[BACKEND] = true;
            return;
        }
        self.resets[BACKEND] = false;
        if packet.flags & (tcp::SYN | tcp::ACK) == tcp::SYN | tcp::ACK {
            self.answered = true;
            if self.fins != [true, true] {
                self.fins = [false, false];
            }
            if !self.confirmed {
                self.expected = packet.seq.wrapping_add(1);
            }
        }
        if self.answered {
            self.early |= !self.confirmed && packet.length > 0;
            self.fins[BACKEND] |= packet.flags & tcp::FIN != 0;
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Packet {
    pub(crate) flags: u8,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) length: usize,
    pub(crate) ttl: u8,
}

impl Packet {
    /// Mostly what hosts send, with a share of everything else.
    pub(crate) fn random(random: &mut Rng, from: usize, model: Option<&Model>) -> Self {
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

    pub(crate) fn frame(&self, service: &ServiceAddr, from: SocketAddr, to: SocketAddr) -> Frame {
        let frame = match service.protocol {
            ServiceProtocol::Tcp => Frame::tcp(from, to).flags(self.flags).sequence(self.seq, self.ack),
            ServiceProtocol::Udp => Frame::udp(from, to),
        };
        frame.payload(&vec![self.seq as u8; self.length]).ttl(self.ttl)
    }
}
