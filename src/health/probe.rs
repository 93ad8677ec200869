//! One probe: a connection, and a question where one is to be asked. Nothing here waits.

use std::{
    io::{self, Read as _, Write as _},
    net::{Shutdown, TcpStream},
    time::Duration,
};

use socket2::{Domain, Protocol, Socket, Type};

use super::{HealthCheck, Probe, UnsentReason};

/// Of a response's first line, enough for the status.
const STATUS_BYTES: usize = 12;

/// A probe that has begun.
pub(super) struct InFlight {
    stream: TcpStream,
    phase: Phase,
}

enum Phase {
    Connecting,
    Sending { request: Vec<u8>, sent: usize },
    Reading { response: [u8; STATUS_BYTES], filled: usize },
}

/// Why a probe did not begin.
pub(super) enum NotBegun {
    /// This host lacks something: it says nothing about the target.
    Unsent(UnsentReason, io::Error),
    /// The target cannot be connected to, as the kernel knows at once.
    Failed(io::Error),
}

impl InFlight {
    /// Begins to connect.
    pub(super) fn begin(check: &HealthCheck) -> Result<Self, NotBegun> {
        let unsent = |error: io::Error| NotBegun::Unsent(UnsentReason::before_connect(&error), error);
        let socket = socket(check).map_err(unsent)?;
        match socket.connect(&check.target.into()) {
            Err(error) if !matches!(error.raw_os_error(), Some(libc::EINPROGRESS | libc::EINTR)) => {
                Err(match UnsentReason::of_connect(&error) {
                    Some(reason) => NotBegun::Unsent(reason, error),
                    None => NotBegun::Failed(error),
                })
            }
            _ => Ok(Self { stream: socket.into(), phase: Phase::Connecting }),
        }
    }

    pub(super) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Goes as far as it can without waiting; what came of the probe when it is over.
    pub(super) fn advance(&mut self, check: &HealthCheck) -> Option<io::Result<()>> {
        loop {
            match self.step(check) {
                Ok(true) => return Some(Ok(())),
                Ok(false) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Some(Err(error)),
            }
        }
    }

    /// One step; true when the probe has succeeded.
    fn step(&mut self, check: &HealthCheck) -> io::Result<bool> {
        match &mut self.phase {
            Phase::Connecting => {
                if let Some(error) = self.stream.take_error()? {
                    return Err(error);
                }
                match self.stream.peer_addr() {
                    Err(error) if error.kind() == io::ErrorKind::NotConnected => {
                        return Err(io::ErrorKind::WouldBlock.into());
                    }
                    other => other?,
                };
                let Probe::Http { path, host } = &check.probe else { return Ok(true) };
                let host = host.clone().unwrap_or_else(|| check.target.to_string());
                let request = format!(
                    "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: xdpkit\r\nAccept: */*\r\nConnection: close\r\n\r\n"
                );
                self.phase = Phase::Sending { request: request.into_bytes(), sent: 0 };
            }
            Phase::Sending { request, sent } => {
                *sent += self.stream.write(&request[*sent..])?;
                if *sent == request.len() {
                    self.phase = Phase::Reading { response: [0; STATUS_BYTES], filled: 0 };
                }
            }
            Phase::Reading { response, filled } => {
                let count = self.stream.read(&mut response[*filled..])?;
                *filled += count;
                if count == 0 || *filled == response.len() {
                    return judge(&response[..*filled]).map(|()| true);
                }
            }
        }
        Ok(false)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// A socket of the check's that does not block, bound where it should be.
fn socket(check: &HealthCheck) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(check.target), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    if let Some(mark) = check.mark {
        socket.set_mark(mark)?;
    }
    // Proves to a DSR balancer on this host that nobody has forwarded it (RFC 5082).
    match check.target.is_ipv4() {
        true => socket.set_ttl_v4(255)?,
        false => socket.set_unicast_hops_v6(255)?,
    }
    // The connection ends with a reset: probes leave nothing in TIME_WAIT, and can use one source port for ever.
    socket.set_linger(Some(Duration::ZERO))?;
    if let Some(source) = check.source {
        socket.set_reuse_address(true)?;
        socket.bind(&source.into())?;
    }
    Ok(socket)
}

fn judge(line: &[u8]) -> io::Result<()> {
    match status(line) {
        Some(200..=399) => Ok(()),
        Some(other) => Err(io::Error::other(format!("status {other}"))),
        None => Err(io::Error::other("no HTTP answer")),
    }
}

/// The status code of a response such as `HTTP/1.1 200`.
fn status(line: &[u8]) -> Option<u16> {
    let line = std::str::from_utf8(line).ok()?;
    let (version, code) = line.split_once(' ')?;
    (version.starts_with("HTTP/1.") && code.len() == 3).then(|| code.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::status;

    #[test]
    fn only_an_http_status_is_one() {
        for (line, code) in [
            ("HTTP/1.1 200", Some(200)),
            ("HTTP/1.0 503", Some(503)),
            ("HTTP/2.0 200", None),
            ("HTTP/1.1 20", None),
            ("HTTP/1.1 2x0", None),
            ("SSH-2.0-Open", None),
            ("", None),
        ] {
            assert_eq!(status(line.as_bytes()), code, "{line}");
        }
    }
}
