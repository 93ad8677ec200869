//! Clients that keep many connections busy for as long as something else is done to the balancer.

use std::{
    collections::BTreeMap,
    io::{self, ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::Instant,
};

use xdpkit_lab::{Namespace, traffic::tcp_echo};

use super::nat::PATIENCE;

/// One host's connections to echo servers: each says something, again and again, and wants to hear it.
pub(crate) struct Busy {
    /// The clients' ends of all connections.
    pub(crate) clients: Vec<SocketAddr>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    rounds: AtomicUsize,
    /// Connections that broke, and how.
    broken: Mutex<BTreeMap<SocketAddr, ErrorKind>>,
}

impl Busy {
    /// So many connections, to each of the services in turn.
    pub(crate) fn start(ns: &Namespace, services: &[SocketAddr], connections: usize) -> Self {
        let mut open: Vec<(SocketAddr, TcpStream)> = ns.run(|| {
            let connect = |n: usize| {
                let stream = TcpStream::connect_timeout(&services[n % services.len()], PATIENCE).unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                stream.set_nodelay(true).unwrap();
                (stream.local_addr().unwrap(), stream)
            };
            (0..connections).map(connect).collect()
        });
        let clients = open.iter().map(|(client, _)| *client).collect();
        let shared = Arc::new(Shared::default());
        let told = Arc::clone(&shared);
        let thread = thread::spawn(move || {
            while !told.stop.load(Ordering::SeqCst) {
                let round = told.rounds.load(Ordering::SeqCst);
                open.retain_mut(|(client, stream)| match exchange(stream, &format!("{client} {round}")) {
                    Ok(()) => true,
                    Err(error) => {
                        told.broken.lock().unwrap().insert(*client, error.kind());
                        false
                    }
                });
                told.rounds.fetch_add(1, Ordering::SeqCst);
            }
        });
        Self { clients, shared, thread: Some(thread) }
    }

    /// Waits until each connection has said and heard something that was begun after this was called.
    pub(crate) fn all_go_on(&self) {
        let enough = self.shared.rounds.load(Ordering::SeqCst) + 2;
        let end = Instant::now() + 4 * PATIENCE;
        while self.shared.rounds.load(Ordering::SeqCst) < enough {
            assert!(Instant::now() < end, "the clients stand still; broken: {:?}", self.broken());
            thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    pub(crate) fn broken(&self) -> BTreeMap<SocketAddr, ErrorKind> {
        self.shared.broken.lock().unwrap().clone()
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn exchange(stream: &mut TcpStream, text: &str) -> io::Result<()> {
    stream.write_all(text.as_bytes())?;
    let mut back = vec![0; text.len()];
    stream.read_exact(&mut back)?;
    // Anything else is another's: no error that a network may make.
    assert_eq!(String::from_utf8_lossy(&back), text);
    Ok(())
}

/// One host that connects, says something and hangs up, over and over.
pub(crate) struct Visitor {
    shared: Arc<Visits>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Visits {
    stop: AtomicBool,
    done: AtomicUsize,
    failed: Mutex<Vec<String>>,
}

impl Visitor {
    pub(crate) fn start(ns: &Namespace, services: &[SocketAddr]) -> Self {
        let shared = Arc::new(Visits::default());
        let (told, ns, services) = (Arc::clone(&shared), ns.clone(), services.to_vec());
        let thread = thread::spawn(move || {
            for service in services.iter().cycle() {
                if told.stop.load(Ordering::SeqCst) {
                    return;
                }
                match tcp_echo(&ns, *service, b"a visit", PATIENCE) {
                    Ok(back) if back == b"a visit" => _ = told.done.fetch_add(1, Ordering::SeqCst),
                    other => told.failed.lock().unwrap().push(format!("{service}: {other:?}")),
                }
            }
        });
        Self { shared, thread: Some(thread) }
    }

    pub(crate) fn done(&self) -> usize {
        self.shared.done.load(Ordering::SeqCst)
    }

    /// Visits that failed since this was last asked.
    pub(crate) fn failed(&self) -> Vec<String> {
        std::mem::take(&mut *self.shared.failed.lock().unwrap())
    }
}

impl Drop for Visitor {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
