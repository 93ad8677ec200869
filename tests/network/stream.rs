//! Datagrams to an echo, and since when all of them come back.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use xdpkit_lab::Namespace;

use crate::common::is_emulated;

/// Flows of a stream, which take turns.
const FLOWS: usize = 4;

/// Between two datagrams.
fn pace() -> Duration {
    Duration::from_millis(if is_emulated() { 50 } else { 10 })
}

/// Datagrams in a row, some of each flow, that must come back before the stream is said to flow.
const IN_A_ROW: usize = 5 * FLOWS;

#[derive(Debug)]
struct Datagram {
    sent: Instant,
    answered: bool,
}

pub(crate) struct Stream {
    log: Arc<Mutex<Vec<Datagram>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Stream {
    /// Starts to send from a namespace.
    pub(crate) fn start(ns: &Namespace, target: SocketAddr) -> Self {
        let (log, stop) = (Arc::<Mutex<Vec<Datagram>>>::default(), Arc::<AtomicBool>::default());
        let open = || {
            let socket = UdpSocket::bind(if target.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" }).unwrap();
            socket.connect(target).unwrap();
            socket.set_nonblocking(true).unwrap();
            socket
        };
        let flows: [UdpSocket; FLOWS] = ns.run(|| std::array::from_fn(|_| open()));
        let thread = ns.spawn({
            let (log, stop) = (log.clone(), stop.clone());
            move || {
                for flow in flows.iter().cycle() {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let number = {
                        let mut log = log.lock().unwrap();
                        log.push(Datagram { sent: Instant::now(), answered: false });
                        log.len() as u64 - 1
                    };
                    // It may be told that nobody is there, now or about an earlier datagram: this one is lost.
                    let _ = flow.send(&number.to_be_bytes());
                    thread::sleep(pace());
                    let mut back = [0; 8];
                    for flow in &flows {
                        // An error that was told is not the end of what has arrived.
                        for _ in 0..64 {
                            match flow.recv(&mut back) {
                                Ok(8) => log.lock().unwrap()[u64::from_be_bytes(back) as usize].answered = true,
                                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                                _ => {}
                            }
                        }
                    }
                }
            }
        });
        Self { log, stop, thread: Some(thread) }
    }

    /// How long after `since` the last datagram was sent that was lost, once all flow again. `None`: they do not, within
    /// `patience`.
    pub(crate) fn outage(&self, since: Instant, patience: Duration) -> Option<Duration> {
        let end = since + patience;
        loop {
            {
                let log = self.log.lock().unwrap();
                let after = &log[log.partition_point(|datagram| datagram.sent < since)..];
                // The last one may be under way.
                let after = &after[..after.len().saturating_sub(2)];
                let lost = after.iter().rposition(|datagram| !datagram.answered);
                if after.len() - lost.map_or(0, |at| at + 1) >= IN_A_ROW {
                    return Some(lost.map_or(Duration::ZERO, |at| after[at].sent - since));
                }
            }
            if Instant::now() > end + pace() * 2 * IN_A_ROW as u32 {
                return None;
            }
            thread::sleep(pace());
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        if !thread::panicking() {
            ended.expect("it runs").expect("the stream's thread does not panic");
        }
    }
}
