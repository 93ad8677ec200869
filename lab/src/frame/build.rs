//! From a described frame to its bytes.

use super::{Extension, Frame, Network, Transport, extension};

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const FRAGMENT: u8 = 44;

/// The Internet checksum (RFC 1071) of `bytes`, ready to be stored big-endian.
pub fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u64 = 0;
    for pair in bytes.chunks(2) {
        sum += u64::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

impl Frame {
    /// The frame's bytes, from the Ethernet header on.
    pub fn build(&self) -> Vec<u8> {
        let mut frame = self.ethernet_header();
        frame.extend(self.packet());
        frame.extend(&self.trailer);
        frame
    }

    /// The packet's bytes, without the Ethernet header and trailer: for the inside of tunnels and
    /// ICMP errors.
    pub fn packet(&self) -> Vec<u8> {
        let later_fragment = self.fragment.is_some_and(|(offset, _)| offset > 0);
        let body = if later_fragment { self.payload.clone() } else { self.message() };
        self.around(&body)
    }

    /// The whole packet in fragments of `size` bytes (a multiple of 8) of its message, in order.
    pub fn fragments(&self, size: usize) -> Vec<Vec<u8>> {
        let message = self.message();
        let count = message.len().div_ceil(size);
        let fragment = |(index, part): (usize, &[u8])| {
            let mut frame = self.ethernet_header();
            let cut = self.clone().fragment((index * size) as u16, index + 1 < count);
            frame.extend(cut.around(part));
            frame
        };
        message.chunks(size).enumerate().map(fragment).collect()
    }

    fn ethernet_header(&self) -> Vec<u8> {
        let mut header = [self.macs.1, self.macs.0].concat();
        for (ethertype, control) in &self.tags {
            header.extend(ethertype.to_be_bytes());
            header.extend(control.to_be_bytes());
        }
        let ethertype: u16 = match self.network {
            Network::Other(ethertype) => ethertype,
            Network::V4(..) => 0x0800,
            Network::V6(..) => 0x86dd,
        };
        header.extend(ethertype.to_be_bytes());
        header
    }

    /// Puts the network header before a message or a part of one.
    fn around(&self, body: &[u8]) -> Vec<u8> {
        let mut packet = match self.network {
            Network::Other(_) => Vec::new(),
            Network::V4(src, dst) => self.v4_header(src.octets(), dst.octets(), body.len()),
            Network::V6(src, dst) => self.v6_header(src.octets(), dst.octets(), body.len()),
        };
        packet.extend(body);
        packet
    }

    fn v4_header(&self, src: [u8; 4], dst: [u8; 4], body: usize) -> Vec<u8> {
        let mut options = self.options.clone();
        options.resize(options.len().next_multiple_of(4), 0);
        let len = 20 + options.len();
        let version = self.wrong.version.unwrap_or(4);
        let ihl = self.wrong.ihl.unwrap_or((len / 4) as u8);
        let total = self.wrong.length.unwrap_or((len + body) as u16);
        let (offset, more) = self.fragment.unwrap_or_default();
        let flags = u16::from(self.dont_fragment) << 14 | u16::from(more) << 13;
        let mut header = vec![version << 4 | ihl & 15, self.tos];
        header.extend(total.to_be_bytes());
        header.extend((self.id as u16).to_be_bytes());
        header.extend((flags | (offset / 8)).to_be_bytes());
        header.extend([self.ttl, self.wrong.protocol.unwrap_or(self.own_protocol()), 0, 0]);
        header.extend(src);
        header.extend(dst);
        header.extend(options);
        let sum = self.wrong.ip_checksum.unwrap_or_else(|| checksum(&header));
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        header
    }

    fn v6_header(&self, src: [u8; 16], dst: [u8; 16], body: usize) -> Vec<u8> {
        // Built from the inside out, because each header names its successor.
        let mut next = self.wrong.protocol.unwrap_or(self.own_protocol());
        let mut extensions = Vec::new();
        for extension in self.extensions.iter().rev() {
            let (kind, header) = match extension {
                Extension::Fragment => (FRAGMENT, self.fragment_header(next)),
                Extension::Options { kind, body } => (*kind, extension_header(*kind, next, body)),
            };
            extensions.splice(0..0, header);
            next = kind;
        }
        let version = self.wrong.version.unwrap_or(6);
        let length = self.wrong.length.unwrap_or((extensions.len() + body) as u16);
        let mut header = vec![version << 4 | self.tos >> 4, self.tos << 4, 0, 0];
        header.extend(length.to_be_bytes());
        header.extend([next, self.ttl]);
        header.extend(src);
        header.extend(dst);
        header.extend(extensions);
        header
    }

    fn fragment_header(&self, next: u8) -> Vec<u8> {
        let (offset, more) = self.fragment.unwrap_or_default();
        let mut header = vec![next, 0];
        header.extend((offset | u16::from(more)).to_be_bytes());
        header.extend(self.id.to_be_bytes());
        header
    }

    fn own_protocol(&self) -> u8 {
        match (self.transport, self.network) {
            (Transport::Raw(protocol), _) => protocol,
            (Transport::Udp { .. }, _) => UDP,
            (Transport::Tcp { .. }, _) => TCP,
            (Transport::Icmp { .. }, Network::V6(..)) => ICMPV6,
            (Transport::Icmp { .. }, _) => ICMP,
        }
    }

    /// The transport header, if there is one, and the payload.
    fn message(&self) -> Vec<u8> {
        let mut message = Vec::new();
        let at = match self.transport {
            Transport::Raw(_) => return self.payload.clone(),
            Transport::Udp { src, dst } => {
                let length = self.wrong.udp_length.unwrap_or((8 + self.payload.len()) as u16);
                message.extend([src, dst, length, 0].map(u16::to_be_bytes).concat());
                6
            }
            Transport::Tcp { src, dst, seq, ack, flags, window } => {
                let mut options = self.tcp_options.clone();
                options.resize(options.len().next_multiple_of(4), 0);
                let words = self.wrong.data_offset.unwrap_or((5 + options.len() / 4) as u8);
                message.extend([src, dst].map(u16::to_be_bytes).concat());
                message.extend([seq, ack].map(u32::to_be_bytes).concat());
                message.extend([words << 4, flags]);
                message.extend([window, 0, 0].map(u16::to_be_bytes).concat());
                message.extend(options);
                16
            }
            Transport::Icmp { kind, code, rest } => {
                message.extend([kind, code, 0, 0]);
                message.extend(rest);
                2
            }
        };
        message.extend(&self.payload);
        let sum = self.wrong.checksum.unwrap_or_else(|| self.transport_checksum(&message));
        message[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        message
    }

    fn transport_checksum(&self, message: &[u8]) -> u16 {
        let protocol = self.own_protocol();
        let mut sum = Vec::new();
        // ICMP for IPv4 is the one without a pseudo-header.
        if protocol != ICMP {
            match self.network {
                Network::Other(_) => {}
                Network::V4(src, dst) => sum.extend([src.octets(), dst.octets()].concat()),
                Network::V6(src, dst) => sum.extend([src.octets(), dst.octets()].concat()),
            }
            sum.extend((message.len() as u32).to_be_bytes());
            sum.extend([0, protocol]);
        }
        sum.extend(message);
        match checksum(&sum) {
            0 if protocol == UDP => 0xffff, // zero would say that there is none
            sum => sum,
        }
    }
}

fn extension_header(kind: u8, next: u8, body: &[u8]) -> Vec<u8> {
    let mut header = vec![next, 0];
    header.extend(body);
    let missing = header.len().next_multiple_of(8) - header.len();
    match missing {
        0 => {}
        1 => header.push(0), // Pad1
        _ => {
            header.extend([1, missing as u8 - 2]); // PadN
            header.resize(header.len() + missing - 2, 0);
        }
    }
    header[1] = match kind {
        extension::AUTHENTICATION => header.len() / 4 - 2,
        _ => header.len() / 8 - 1,
    } as u8;
    header
}
