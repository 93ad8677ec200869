//! UDP: an echo server and its client.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::{Deadline, IDLE, is_timeout};
use crate::error::{Context, Result};
use crate::namespace::Namespace;
use crate::sys;

/// A UDP server that sends back what it receives; it stops when dropped.
///
/// Bound to a wildcard address it answers from the address that routing prefers; bind it to the
/// address that clients ask.
#[derive(Debug)]
pub struct UdpEcho {
    shared: Arc<Shared>,
    address: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    socket: UdpSocket,
    stopping: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    datagrams: usize,
    peers: Vec<SocketAddr>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        let mut buffer = vec![0; 65_536];
        while !self.stopping.load(Ordering::SeqCst) {
            // The socket does not block: a receive that a shutdown ends has no sender, which std does not expect.
            let Ok((len, peer)) = self.socket.recv_from(&mut buffer) else {
                let _ = sys::socket::wait_readable(self.socket.as_fd(), IDLE);
                continue;
            };
            {
                let mut state = self.state();
                state.datagrams += 1;
                if !state.peers.contains(&peer) {
                    state.peers.push(peer);
                }
            }
            // A peer that went away is reported by the next call; it is no reason to stop.
            while self.socket.send_to(&buffer[..len], peer).is_err_and(|error| is_timeout(&error)) {
                thread::yield_now();
            }
        }
    }
}

impl UdpEcho {
    /// Listens on `addr` inside the namespace; port 0 lets the kernel choose.
    pub fn start(ns: &Namespace, addr: SocketAddr) -> Result<Self> {
        let socket = ns.run(|| UdpSocket::bind(addr).and_then(|socket| socket.set_nonblocking(true).map(|()| socket)));
        let socket = socket.context(|| format!("namespace {}: listen on UDP {addr}", ns.name()))?;
        let address = socket.local_addr().context(|| format!("read the address of {addr}"))?;
        let shared = Arc::new(Shared { socket, stopping: AtomicBool::new(false), state: Mutex::default() });
        let thread = ns.spawn({
            let shared = shared.clone();
            move || shared.serve()
        });
        Ok(Self { shared, address, thread: Some(thread) })
    }

    /// The address it listens on.
    pub fn addr(&self) -> SocketAddr {
        self.address
    }

    /// Datagrams received so far.
    pub fn datagrams(&self) -> usize {
        self.shared.state().datagrams
    }

    /// The senders seen so far, each once.
    pub fn peers(&self) -> Vec<SocketAddr> {
        self.shared.state().peers.clone()
    }
}

impl Drop for UdpEcho {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        sys::socket::shutdown(self.shared.socket.as_fd(), Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Sends one datagram from inside the namespace and returns the first that comes back. It is not
/// sent again: a lost datagram is a time-out.
pub fn udp_echo(ns: &Namespace, addr: SocketAddr, payload: &[u8], timeout: Duration) -> io::Result<Vec<u8>> {
    let deadline = Deadline::new(timeout, addr);
    let any: IpAddr = match addr {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = ns.run(|| {
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(addr)?;
        io::Result::Ok(socket)
    })?;
    socket.send(payload)?;
    let mut buffer = vec![0; 65_536];
    socket.set_read_timeout(Some(deadline.rest()?))?;
    match socket.recv(&mut buffer) {
        Ok(len) => {
            buffer.truncate(len);
            Ok(buffer)
        }
        Err(error) if is_timeout(&error) => Err(deadline.timed_out("")),
        Err(error) => Err(error),
    }
}
