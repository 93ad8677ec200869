//! HTTP/1.1, as little as pages and downloads need: one request a connection.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use super::Deadline;
use super::tcp::{TcpServer, connect, read_to_end};
use crate::error::Result;
use crate::namespace::Namespace;

/// A small HTTP server; it stops when dropped.
///
/// `GET /bytes/N` answers with N bytes, anything else with the page made for the peer.
#[derive(Debug)]
pub struct HttpServer(TcpServer);

impl HttpServer {
    /// Listens on `addr` inside the namespace; `page` makes the body for each peer.
    pub fn start(
        ns: &Namespace,
        addr: SocketAddr,
        page: impl Fn(SocketAddr) -> String + Send + Sync + 'static,
    ) -> Result<Self> {
        TcpServer::start(ns, addr, move |stream, peer| answer(stream, || page(peer))).map(Self)
    }

    /// The address it listens on.
    pub fn addr(&self) -> SocketAddr {
        self.0.addr()
    }

    /// The other end of each connection, in the order of their acceptance.
    pub fn peers(&self) -> Vec<SocketAddr> {
        self.0.peers()
    }
}

fn answer(stream: &mut TcpStream, page: impl FnOnce() -> String) -> io::Result<()> {
    let mut request = BufReader::new(stream.try_clone()?);
    let mut first = String::new();
    request.read_line(&mut first)?;
    let mut header = String::new();
    // Headers are read so that closing does not reset the connection, and ignored.
    while request.read_line(&mut header)? > 0 && header != "\r\n" {
        header.clear();
    }
    let path = first.split(' ').nth(1).unwrap_or_default();
    let body = match path.strip_prefix("/bytes/").map(str::parse) {
        Some(Ok(count)) => vec![b'x'; count],
        Some(Err(_)) => {
            return stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n");
        }
        None => page().into_bytes(),
    };
    let len = body.len();
    // In one piece: each write to a socket is a segment of its own.
    let mut response = format!("HTTP/1.1 200 OK\r\nContent-Length: {len}\r\nConnection: close\r\n\r\n").into_bytes();
    response.extend(body);
    stream.write_all(&response)
}

/// Fetches `path` from inside the namespace and returns the body. Another status than 200 and a
/// body of another length than announced are errors. `timeout` bounds the whole.
pub fn http_get(ns: &Namespace, addr: SocketAddr, path: &str, timeout: Duration) -> io::Result<Vec<u8>> {
    let deadline = Deadline::new(timeout, addr);
    let mut stream = connect(ns, deadline)?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut response = read_to_end(&stream, deadline)?;
    let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("{addr}{path}: {what}"));
    let end = response.windows(4).position(|window| window == b"\r\n\r\n");
    let end = end.ok_or_else(|| invalid("the answer has no headers"))?;
    let body = response.split_off(end + 4);
    let head = String::from_utf8_lossy(&response);
    if !head.starts_with("HTTP/1.1 200 ") {
        return Err(invalid(head.lines().next().unwrap_or_default()));
    }
    let announced = head.lines().find_map(|line| line.strip_prefix("Content-Length: ")?.parse().ok());
    match announced {
        Some(len) if body.len() == len => Ok(body),
        Some(len) => Err(invalid(&format!("{} bytes of {len} arrived", body.len()))),
        None => Err(invalid("the answer has no Content-Length")),
    }
}
