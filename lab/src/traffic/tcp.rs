//! TCP: a server that runs a handler for each connection, and the echo made of it.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::{Deadline, IDLE, is_timeout};
use crate::error::{Context, Result};
use crate::namespace::Namespace;
use crate::sys;

/// A listener with a thread for each connection; everything ends when it is dropped.
#[derive(Debug)]
pub(super) struct TcpServer {
    shared: Arc<Shared>,
    address: SocketAddr,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    listener: TcpListener,
    stopping: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    peers: Vec<SocketAddr>,
    /// Connections in progress, so that the end of the server can end them.
    live: HashMap<usize, TcpStream>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, handler: &(impl Fn(&mut TcpStream, SocketAddr) -> io::Result<()> + Sync)) {
        thread::scope(|scope| {
            while !self.stopping.load(Ordering::SeqCst) {
                let Ok((mut stream, peer)) = self.listener.accept() else {
                    // The end, or too many open files: that should pass.
                    thread::sleep(Duration::from_millis(1));
                    continue;
                };
                let id = {
                    let mut state = self.state();
                    let id = state.peers.len();
                    state.peers.push(peer);
                    if let Ok(handle) = stream.try_clone() {
                        state.live.insert(id, handle);
                    }
                    id
                };
                scope.spawn(move || {
                    // A peer that goes away is the peer's business.
                    let _ = stream.set_read_timeout(Some(IDLE));
                    let _ = stream.set_write_timeout(Some(IDLE));
                    let _ = stream.set_nodelay(true);
                    let _ = handler(&mut stream, peer);
                    self.state().live.remove(&id);
                });
            }
            for stream in self.state().live.values() {
                let _ = stream.shutdown(Shutdown::Both);
            }
        });
    }
}

impl TcpServer {
    pub(super) fn start(
        ns: &Namespace,
        address: SocketAddr,
        handler: impl Fn(&mut TcpStream, SocketAddr) -> io::Result<()> + Send + Sync + 'static,
    ) -> Result<Self> {
        let listener = ns.run(|| {
            let listener = TcpListener::bind(address)?;
            sys::socket::use_cubic(listener.as_fd())?;
            io::Result::Ok(listener)
        });
        let listener = listener.context(|| format!("namespace {}: listen on TCP {address}", ns.name()))?;
        let address = listener.local_addr().context(|| format!("read the address of {address}"))?;
        let shared = Arc::new(Shared { listener, stopping: AtomicBool::new(false), state: Mutex::default() });
        let acceptor = ns.spawn({
            let shared = shared.clone();
            move || shared.serve(&handler)
        });
        Ok(Self { shared, address, acceptor: Some(acceptor) })
    }

    pub(super) fn addr(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn peers(&self) -> Vec<SocketAddr> {
        self.shared.state().peers.clone()
    }
}

impl Drop for TcpServer {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        sys::socket::shutdown(self.shared.listener.as_fd(), Shutdown::Both);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

/// A TCP server that sends back what it receives; it stops when dropped.
#[derive(Debug)]
pub struct TcpEcho(TcpServer);

impl TcpEcho {
    /// Listens on `addr` inside the namespace; port 0 lets the kernel choose.
    pub fn start(ns: &Namespace, addr: SocketAddr) -> Result<Self> {
        let echo = |stream: &mut TcpStream, _| {
            let mut buffer = [0; 16 * 1024];
            loop {
                match stream.read(&mut buffer) {
                    Ok(0) => return Ok(()),
                    Ok(len) => stream.write_all(&buffer[..len])?,
                    // With a time-out it is, when the process was stopped for a while.
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
        };
        TcpServer::start(ns, addr, echo).map(Self)
    }

    /// The address it listens on.
    pub fn addr(&self) -> SocketAddr {
        self.0.addr()
    }

    /// Connections accepted so far.
    pub fn connections(&self) -> usize {
        self.0.shared.state().peers.len()
    }

    /// The other end of each connection, in the order of their acceptance.
    pub fn peers(&self) -> Vec<SocketAddr> {
        self.0.peers()
    }
}

/// Sends `payload` on a new connection from inside the namespace, ends its half, and returns all
/// that comes back. `timeout` bounds the whole.
pub fn tcp_echo(ns: &Namespace, addr: SocketAddr, payload: &[u8], timeout: Duration) -> io::Result<Vec<u8>> {
    let deadline = Deadline::new(timeout, addr);
    let stream = connect(ns, deadline)?;
    // Sending and receiving at once: an echo larger than the socket buffers would stand still.
    thread::scope(|scope| {
        let sender = scope.spawn(|| {
            (&stream).write_all(payload)?;
            stream.shutdown(Shutdown::Write)
        });
        let received = read_to_end(&stream, deadline);
        if received.is_err() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        let sent = sender.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        received.and_then(|received| sent.map(|()| received))
    })
}

/// Connects from inside the namespace.
pub(super) fn connect(ns: &Namespace, deadline: Deadline) -> io::Result<TcpStream> {
    let rest = deadline.rest()?;
    let stream = ns.run(|| TcpStream::connect_timeout(&deadline.peer, rest))?;
    sys::socket::use_cubic(stream.as_fd())?;
    stream.set_write_timeout(Some(rest))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Reads until the peer ends its half.
pub(super) fn read_to_end(mut stream: &TcpStream, deadline: Deadline) -> io::Result<Vec<u8>> {
    let mut received = Vec::new();
    let mut buffer = [0; 16 * 1024];
    loop {
        stream.set_read_timeout(Some(deadline.rest()?))?;
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(received),
            Ok(len) => received.extend_from_slice(&buffer[..len]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if is_timeout(&error) => {
                return Err(deadline.timed_out(&format!(" after {} bytes", received.len())));
            }
            Err(error) => return Err(error),
        }
    }
}
