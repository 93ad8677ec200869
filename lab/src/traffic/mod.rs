//! Real traffic from real sockets: servers and clients inside namespaces, in both families.

mod http;
mod iperf3;
mod ping;
mod tcp;
mod udp;
mod wrk;

pub use http::{HttpServer, http_get};
pub use iperf3::Iperf3;
pub use ping::{PingReport, ping};
pub use tcp::{TcpEcho, tcp_echo};
pub use udp::{UdpEcho, udp_echo};
pub use wrk::Wrk;

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// How long a server waits for a silent client before it hangs up.
const IDLE: Duration = Duration::from_secs(60);

/// The end of an exchange as a whole, for calls that take a time-out each.
#[derive(Clone, Copy)]
struct Deadline {
    end: Instant,
    peer: SocketAddr,
}

impl Deadline {
    fn new(timeout: Duration, peer: SocketAddr) -> Self {
        Self { end: Instant::now() + timeout, peer }
    }

    /// What is left, never zero (which std would take for "no time-out").
    fn rest(&self) -> io::Result<Duration> {
        let rest = self.end.saturating_duration_since(Instant::now());
        if rest.is_zero() { Err(self.timed_out("")) } else { Ok(rest) }
    }

    fn timed_out(&self, progress: &str) -> io::Error {
        io::Error::new(io::ErrorKind::TimedOut, format!("no answer from {} in time{progress}", self.peer))
    }
}

/// Whether a socket call ended because of its time-out.
fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}
