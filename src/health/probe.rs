//! One probe: a connection, and a question where one is to be asked.

use std::{
    io::{self, Read as _, Write as _},
    net::{Shutdown, TcpStream},
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, Socket, Type};

use super::{HealthCheck, Probe};

/// Of an answer's first line, enough for the status.
const STATUS_BYTES: usize = 12;

pub(super) fn probe(check: &HealthCheck) -> io::Result<()> {
    let end = Instant::now() + check.timeout;
    let mut stream = connect(check)?;
    let asked = match &check.probe {
        Probe::Tcp => Ok(()),
        Probe::Http { path, host } => {
            let host = host.clone().unwrap_or_else(|| check.target.to_string());
            ask(&mut stream, path, &host, end)
        }
    };
    let _ = stream.shutdown(Shutdown::Both);
    asked
}

fn connect(check: &HealthCheck) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(check.target), Type::STREAM, Some(Protocol::TCP))?;
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
    socket.connect_timeout(&check.target.into(), check.timeout)?;
    Ok(socket.into())
}

fn ask(stream: &mut TcpStream, path: &str, host: &str, end: Instant) -> io::Result<()> {
    stream.set_write_timeout(Some(left(end)?))?;
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: xdpkit\r\nAccept: */*\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes())?;
    let mut answer = [0; STATUS_BYTES];
    let mut filled = 0;
    while filled < answer.len() {
        stream.set_read_timeout(Some(left(end)?))?;
        match stream.read(&mut answer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(timed_out()),
            Err(error) => return Err(error),
        }
    }
    match status(&answer[..filled]) {
        Some(200..=399) => Ok(()),
        Some(other) => Err(io::Error::other(format!("status {other}"))),
        None => Err(io::Error::other("no HTTP answer")),
    }
}

/// The status code of an answer such as `HTTP/1.1 200`.
fn status(line: &[u8]) -> Option<u16> {
    let line = std::str::from_utf8(line).ok()?;
    let (version, code) = line.split_once(' ')?;
    (version.starts_with("HTTP/1.") && code.len() == 3).then(|| code.parse().ok())?
}

fn left(end: Instant) -> io::Result<Duration> {
    let left = end.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(timed_out()) } else { Ok(left) }
}

fn timed_out() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "no answer in time")
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
