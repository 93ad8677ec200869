//! Recomputes the checksums of all that arrives at a host, by code that shares nothing with the programs under test.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::error::Result;
use crate::namespace::Namespace;
use crate::packet::PacketSocket;

const TCP: u8 = 6;
const UDP: u8 = 17;
/// How often captured frames are looked at.
const PAUSE: Duration = Duration::from_millis(5);

/// A capture on one interface that judges every TCP and UDP packet as it arrives.
#[derive(Debug)]
pub struct Audit {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<AuditReport>>>,
}

/// What a capture has seen.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct AuditReport {
    /// TCP and UDP packets of either family, all of whose checksums were right.
    pub right: usize,
    /// What was wrong with others, in words; the first hundred.
    pub wrong: Vec<String>,
    /// Who talked to whom by what protocol, as the packets say.
    pub flows: BTreeSet<(u8, SocketAddr, SocketAddr)>,
    /// Frames that the capture lost: 0, or the report is not about all.
    pub lost: u32,
}

impl Audit {
    /// Begins to capture.
    pub fn start(ns: &Namespace, dev: &str) -> Result<Self> {
        let socket = PacketSocket::open(ns, dev)?;
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = ns.spawn(move || {
            let (mut report, mut buffer) = (AuditReport::default(), Vec::new());
            loop {
                let last = told.load(Ordering::SeqCst);
                socket.drain(&mut buffer, |frame| report.judge(frame))?;
                if last {
                    report.lost = socket.lost()?;
                    return Ok(report);
                }
                std::thread::sleep(PAUSE);
            }
        });
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Ends it, after all that has arrived.
    pub fn finish(mut self) -> Result<AuditReport> {
        self.stop.store(true, Ordering::SeqCst);
        let thread = self.thread.take().expect("it is joined once");
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Audit {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
    }
}

impl AuditReport {
    fn judge(&mut self, frame: &[u8]) {
        match checked(frame) {
            Ok(None) => {}
            Ok(Some(flow)) => {
                self.right += 1;
                self.flows.insert(flow);
            }
            Err(what) if self.wrong.len() < 100 => self.wrong.push(what),
            Err(_) => {}
        }
    }
}

/// The flow of an untagged frame's TCP or UDP packet when all of its checksums are right (RFC 1071, RFC 8200 8.1); `None`
/// for what is neither. Fragments and extension headers are not looked into.
pub fn checked(frame: &[u8]) -> std::result::Result<Option<(u8, SocketAddr, SocketAddr)>, String> {
    let packet = frame.get(14..).ok_or("shorter than an Ethernet header")?;
    let short = || format!("cut short: {frame:02x?}");
    let (source, destination, protocol, transport): (IpAddr, IpAddr, u8, &[u8]) = match frame[12..14] {
        [0x08, 0x00] => {
            let header = packet.get(..usize::from(packet[0] & 15) * 4).filter(|header| header.len() >= 20);
            let header = header.ok_or_else(short)?;
            let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
            if sum(0, header) != 0xffff {
                return Err(format!("IPv4 header checksum: {header:02x?}"));
            }
            if u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0 {
                return Ok(None);
            }
            let address = |at: usize| <[u8; 4]>::try_from(&header[at..at + 4]).expect("four bytes");
            let transport = packet.get(header.len()..total).ok_or_else(short)?;
            (address(12).into(), address(16).into(), header[9], transport)
        }
        [0x86, 0xdd] => {
            let header = packet.get(..40).ok_or_else(short)?;
            let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
            let address = |at: usize| <[u8; 16]>::try_from(&header[at..at + 16]).expect("sixteen bytes");
            let transport = packet.get(40..40 + length).ok_or_else(short)?;
            (address(8).into(), address(24).into(), header[6], transport)
        }
        _ => return Ok(None),
    };
    if protocol != TCP && protocol != UDP {
        return Ok(None);
    }
    let least = if protocol == TCP { 20 } else { 8 };
    if transport.len() < least {
        return Err(short());
    }
    let port = |at: usize| u16::from_be_bytes([transport[at], transport[at + 1]]);
    let flow = (protocol, SocketAddr::new(source, port(0)), SocketAddr::new(destination, port(2)));
    if protocol == UDP && port(6) == 0 {
        // "None", which IPv6 does not know (RFC 8200 8.1).
        return if source.is_ipv4() { Ok(Some(flow)) } else { Err(format!("no checksum: {flow:?}")) };
    }
    let octets = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let pseudo = [octets(source), octets(destination)].concat();
    let start = u32::from(protocol) + transport.len() as u32;
    if sum(u32::from(sum(start, &pseudo)), transport) != 0xffff {
        return Err(format!("transport checksum: {flow:?}: {transport:02x?}"));
    }
    Ok(Some(flow))
}

/// The one's complement sum of big-endian words, folded.
fn sum(start: u32, bytes: &[u8]) -> u16 {
    let mut sum = u64::from(start);
    for pair in bytes.chunks(2) {
        sum += u64::from(pair[0]) << 8 | pair.get(1).map_or(0, |byte| u64::from(*byte));
    }
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Frame;

    #[test]
    fn any_bit_that_turns_is_noticed() {
        for (from, to) in [("10.0.0.1:7", "10.0.0.2:80"), ("[fd::1]:7", "[fd::2]:80")] {
            let [from, to] = [from, to].map(|text| text.parse::<SocketAddr>().unwrap());
            for (protocol, frame) in [(TCP, Frame::tcp(from, to)), (UDP, Frame::udp(from, to))] {
                let frame = frame.payload(b"odd").trailer(&[9; 5]).build();
                assert_eq!(checked(&frame), Ok(Some((protocol, from, to))));
                // From the IP header on; what says version, length, protocol and "no checksum" changes what is looked at.
                let end = frame.len() - 5;
                let addresses = if from.is_ipv4() { 26..34 } else { 22..54 };
                for at in addresses.chain(end - 3..end) {
                    for bit in 0..8 {
                        let mut wrong = frame.clone();
                        wrong[at] ^= 1 << bit;
                        assert!(checked(&wrong).is_err(), "byte {at}, bit {bit}");
                    }
                }
            }
        }
        let [from, to] = ["10.0.0.1:7", "10.0.0.2:80"].map(|text| text.parse().unwrap());
        assert!(checked(&Frame::udp(from, to).checksum(0).build()).unwrap().is_some());
        let [from, to] = ["[fd::1]:7", "[fd::2]:80"].map(|text| text.parse().unwrap());
        assert!(checked(&Frame::udp(from, to).checksum(0).build()).is_err());
    }
}
