//! Echo requests from raw sockets.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::process;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use crate::error::{Context, Result};
use crate::frame::checksum;
use crate::namespace::Namespace;
use crate::sys::socket;

/// The outcome of a series of echo requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PingReport {
    /// Requests sent.
    pub sent: u16,
    /// Requests that were answered, each counted once.
    pub received: u16,
}

/// Sends `count` echo requests from inside the namespace, one every `interval`, and waits for the
/// missing answers for at most `timeout` after the last.
pub fn ping(ns: &Namespace, dst: IpAddr, count: u16, interval: Duration, timeout: Duration) -> Result<PingReport> {
    let ping = || Pinger::open(dst)?.run(count, interval, timeout);
    ns.run(ping).context(|| format!("namespace {}: ping {dst}", ns.name()))
}

struct Pinger {
    /// A raw socket; std's UDP type has just the calls it needs.
    socket: UdpSocket,
    dst: IpAddr,
    id: u16,
    answered: HashSet<u16>,
}

impl Pinger {
    fn open(dst: IpAddr) -> io::Result<Self> {
        // Raw sockets see each other's answers, so every series has an identifier of its own.
        static SERIES: AtomicU16 = AtomicU16::new(0);
        let series = SERIES.fetch_add(1, Ordering::Relaxed);
        let (family, protocol) = match dst {
            IpAddr::V4(_) => (libc::AF_INET, libc::IPPROTO_ICMP),
            IpAddr::V6(_) => (libc::AF_INET6, libc::IPPROTO_ICMPV6),
        };
        let socket = UdpSocket::from(socket::open(family, libc::SOCK_RAW, protocol)?);
        socket.set_nonblocking(true)?;
        Ok(Self { socket, dst, id: (process::id() as u16).wrapping_add(series), answered: HashSet::new() })
    }

    fn run(mut self, count: u16, interval: Duration, timeout: Duration) -> io::Result<PingReport> {
        for seq in 0..count {
            self.send(seq)?;
            let last = seq + 1 == count;
            self.collect(if last { timeout } else { interval }, last.then_some(count))?;
        }
        Ok(PingReport { sent: count, received: self.answered.len() as u16 })
    }

    fn send(&self, seq: u16) -> io::Result<()> {
        let kind = if self.dst.is_ipv4() { 8 } else { 128 };
        let mut message = vec![kind, 0, 0, 0];
        message.extend(self.id.to_be_bytes());
        message.extend(seq.to_be_bytes());
        message.extend((0..56u8).map(|i| i + b' '));
        if self.dst.is_ipv4() {
            // For ICMPv6 the kernel does it: the sum covers the source address it chooses.
            let sum = checksum(&message).to_be_bytes();
            message[2..4].copy_from_slice(&sum);
        }
        self.socket.send_to(&message, SocketAddr::new(self.dst, 0)).map(drop)
    }

    /// Takes answers for as long as `time`, or until `enough` have come.
    fn collect(&mut self, time: Duration, enough: Option<u16>) -> io::Result<()> {
        let end = Instant::now() + time;
        let mut buffer = [0; 2048];
        while enough != Some(self.answered.len() as u16) {
            match self.socket.recv_from(&mut buffer) {
                Ok((len, from)) if from.ip() == self.dst => {
                    if let Some(seq) = self.answer(&buffer[..len]) {
                        self.answered.insert(seq);
                    }
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let rest = end.saturating_duration_since(Instant::now());
                    if rest.is_zero() {
                        return Ok(());
                    }
                    socket::wait_readable(self.socket.as_fd(), rest)?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The sequence number, if the packet answers one of ours.
    fn answer(&self, packet: &[u8]) -> Option<u16> {
        let (message, kind) = match self.dst {
            // Only IPv4's raw sockets deliver the IP header.
            IpAddr::V4(_) => (packet.get(usize::from(packet.first()? & 15) * 4..)?, 0),
            IpAddr::V6(_) => (packet, 129),
        };
        let &[reply, 0, _, _, id_hi, id_lo, seq_hi, seq_lo, ..] = message else {
            return None;
        };
        let ours = reply == kind && u16::from_be_bytes([id_hi, id_lo]) == self.id;
        ours.then_some(u16::from_be_bytes([seq_hi, seq_lo]))
    }
}
