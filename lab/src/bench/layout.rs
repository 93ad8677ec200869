//! Where the addresses and ports stand in a template frame, and flows as the wrapper reads them.

use std::net::{IpAddr, SocketAddr};

/// What the wrapper restores at most, and the step; as in `lab/bpf/bench.bpf.c`.
const RESTORED_MAX: usize = 128;
const RESTORED_STEP: usize = 32;

const VLAN_TAGS: [[u8; 2]; 2] = [[0x81, 0x00], [0x88, 0xa8]];
const IPV4: [u8; 2] = [0x08, 0x00];
const IPV6: [u8; 2] = [0x86, 0xdd];
const TCP_AND_UDP: [u8; 2] = [6, 17];

/// A template frame's geometry, in bytes from its start.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) restored: usize,
    pub(super) source_at: usize,
    /// None where TCP or UDP does not follow IP at once.
    pub(super) port_at: Option<usize>,
    pub(super) ipv6: bool,
}

impl Layout {
    /// Reads the headers. None if it is not an IP packet, or its headers do not fit what is restored.
    pub(super) fn of(frame: &[u8]) -> Option<Self> {
        let mut at = 12;
        let mut kind = frame.get(at..at + 2)?;
        while VLAN_TAGS.iter().any(|tag| tag == kind) {
            at += 4;
            kind = frame.get(at..at + 2)?;
        }
        at += 2;
        let ipv6 = kind == IPV6;
        let (source_at, transport_at, protocol) = match ipv6 {
            true => (at + 8, at + 40, *frame.get(at + 6)?),
            false if kind == IPV4 => {
                let words = usize::from(frame.get(at)? & 0xf);
                (at + 12, at + words * 4, *frame.get(at + 9)?)
            }
            false => return None,
        };
        let restored = frame.len().min(RESTORED_MAX) / RESTORED_STEP * RESTORED_STEP;
        let fits = source_at + 16 <= restored && transport_at + 2 <= restored;
        fits.then_some(Self {
            restored,
            source_at,
            port_at: TCP_AND_UDP.contains(&protocol).then_some(transport_at),
            ipv6,
        })
    }

    /// Fills a frame up so that all of it, or the most that is possible, can be restored.
    pub(super) fn pad(frame: &mut Vec<u8>) {
        if frame.len() < RESTORED_MAX {
            frame.resize(frame.len().next_multiple_of(RESTORED_STEP), 0);
        }
    }

    pub(super) fn flow_size(&self) -> usize {
        if self.ipv6 { 24 } else { 8 }
    }

    /// One flow, as `struct bench_flow4` or `struct bench_flow6`. None if it is of the other family.
    pub(super) fn encode(&self, flow: &SocketAddr, destination_port: u16) -> Option<Vec<u8>> {
        let mut bytes = match (self.ipv6, flow.ip()) {
            (false, IpAddr::V4(ip)) => ip.octets().to_vec(),
            (true, IpAddr::V6(ip)) => ip.octets().to_vec(),
            _ => return None,
        };
        bytes.extend(flow.port().to_be_bytes());
        bytes.extend(destination_port.to_be_bytes());
        bytes.resize(self.flow_size(), 0);
        Some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Frame;

    #[test]
    fn finds_addresses_and_ports() {
        let (v4, other_v4) = ("10.0.0.1:7".parse().unwrap(), "10.0.0.2:8".parse().unwrap());
        let (v6, other_v6) = ("[fd::1]:7".parse().unwrap(), "[fd::2]:8".parse().unwrap());
        let rows = [
            ("IPv4, UDP", Frame::udp(v4, other_v4), 26, Some(34)),
            ("IPv4 options", Frame::tcp(v4, other_v4).options(&[1; 8]), 26, Some(42)),
            ("two tags", Frame::tcp(v4, other_v4).tag(0x88a8, 1).vlan(2), 34, Some(42)),
            ("IPv6, TCP", Frame::tcp(v6, other_v6), 22, Some(54)),
            ("IPv6 extension", Frame::tcp(v6, other_v6).extension(0, &[]), 22, None),
            ("no ports", Frame::echo(v4.ip(), other_v4.ip(), 1, 1), 26, None),
        ];
        for (name, frame, source_at, port_at) in rows {
            let mut frame = frame.build();
            Layout::pad(&mut frame);
            let layout = Layout::of(&frame).expect(name);
            assert_eq!((layout.source_at, layout.port_at), (source_at, port_at), "{name}");
            assert_eq!(layout.restored, frame.len().min(128), "{name}");
            assert_eq!(layout.ipv6, source_at == 22, "{name}");
        }
        assert_eq!(Layout::of(&Frame::ethernet(0x88b5).payload(&[0; 64]).build()), None);
        assert_eq!(Layout::of(&[0; 13]), None);
    }

    #[test]
    fn encodes_flows_of_its_own_family_only() {
        let layout = Layout { restored: 64, source_at: 26, port_at: None, ipv6: false };
        let flow = layout.encode(&"1.2.3.4:258".parse().unwrap(), 772);
        assert_eq!(flow.unwrap(), [1, 2, 3, 4, 1, 2, 3, 4]);
        assert_eq!(layout.encode(&"[fd::1]:1".parse().unwrap(), 0), None);
    }
}
