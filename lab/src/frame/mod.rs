//! Test frames, field by field: right by default, wrong on request.
//!
//! ```
//! use xdpkit_lab::frame::{Frame, tcp};
//!
//! let [client, server] = ["10.0.0.2:4000".parse().unwrap(), "10.0.0.1:80".parse().unwrap()];
//! let tagged = Frame::udp4(client, server).vlan(100).payload(b"hello").build();
//! let syn = Frame::tcp4(client, server).flags(tcp::SYN).build();
//! let header_too_short = Frame::tcp4(client, server).data_offset(4).build();
//! # assert_eq!((tagged.len(), syn.len(), header_too_short.len()), (51, 54, 54));
//! ```

mod build;
#[cfg(test)]
mod tests;

pub use build::checksum;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

/// TCP's flags, for [`Frame::flags`].
pub mod tcp {
    /// Ends the sender's half.
    pub const FIN: u8 = 1;
    /// Opens a connection.
    pub const SYN: u8 = 2;
    /// Aborts a connection.
    pub const RST: u8 = 4;
    /// Asks for delivery at once.
    pub const PSH: u8 = 8;
    /// The acknowledgement number counts.
    pub const ACK: u8 = 16;
}

/// Numbers of IPv6 extension headers, for [`Frame::extension`].
pub mod extension {
    /// Hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// Routing.
    pub const ROUTING: u8 = 43;
    /// Authentication; counts its length in words of four bytes.
    pub const AUTHENTICATION: u8 = 51;
    /// Destination options.
    pub const DESTINATION: u8 = 60;
}

/// The default source Ethernet address.
pub const SRC_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// The default destination Ethernet address.
pub const DST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// A frame under construction. Every method returns the frame changed, so rows of a table read
/// from left to right; [`build`](Self::build) writes the bytes.
#[derive(Debug, Clone)]
pub struct Frame {
    macs: ([u8; 6], [u8; 6]),
    /// VLAN tags, outermost first: type and control information.
    tags: Vec<(u16, u16)>,
    network: Network,
    transport: Transport,
    payload: Vec<u8>,
    trailer: Vec<u8>,
    ttl: u8,
    tos: u8,
    id: u32,
    dont_fragment: bool,
    /// Offset in bytes, and whether more follow.
    fragment: Option<(u16, bool)>,
    options: Vec<u8>,
    extensions: Vec<Extension>,
    tcp_options: Vec<u8>,
    wrong: Overrides,
}

#[derive(Debug, Clone, Copy)]
enum Network {
    /// Something that is not IP: its type.
    Other(u16),
    V4(Ipv4Addr, Ipv4Addr),
    V6(Ipv6Addr, Ipv6Addr),
}

#[derive(Debug, Clone, Copy)]
enum Transport {
    /// No header of ours: its protocol number.
    Raw(u8),
    Udp {
        src: u16,
        dst: u16,
    },
    Tcp {
        src: u16,
        dst: u16,
        seq: u32,
        ack: u32,
        flags: u8,
        window: u16,
    },
    /// Type, code and the four bytes behind the checksum; the version decides the protocol.
    Icmp {
        kind: u8,
        code: u8,
        rest: [u8; 4],
    },
}

#[derive(Debug, Clone)]
enum Extension {
    Options { kind: u8, body: Vec<u8> },
    Fragment,
}

/// Fields that were set by hand, right or wrong.
#[derive(Debug, Clone, Copy, Default)]
struct Overrides {
    version: Option<u8>,
    ihl: Option<u8>,
    length: Option<u16>,
    protocol: Option<u8>,
    ip_checksum: Option<u16>,
    data_offset: Option<u8>,
    udp_length: Option<u16>,
    checksum: Option<u16>,
}

impl Frame {
    fn new(network: Network, transport: Transport) -> Self {
        Self {
            macs: (SRC_MAC, DST_MAC),
            tags: Vec::new(),
            network,
            transport,
            payload: Vec::new(),
            trailer: Vec::new(),
            ttl: 64,
            tos: 0,
            id: 0,
            dont_fragment: false,
            fragment: None,
            options: Vec::new(),
            extensions: Vec::new(),
            tcp_options: Vec::new(),
            wrong: Overrides::default(),
        }
    }

    /// A frame of any other type, whose payload is all there is.
    pub fn ethernet(ethertype: u16) -> Self {
        Self::new(Network::Other(ethertype), Transport::Raw(0))
    }

    /// An IP packet of any protocol, whose payload is all there is. Panics on mixed families.
    pub fn ip(src: IpAddr, dst: IpAddr, protocol: u8) -> Self {
        Self::new(network(src, dst), Transport::Raw(protocol))
    }

    /// A UDP datagram. Panics on mixed families.
    pub fn udp(src: SocketAddr, dst: SocketAddr) -> Self {
        let ports = Transport::Udp { src: src.port(), dst: dst.port() };
        Self::new(network(src.ip(), dst.ip()), ports)
    }

    /// A UDP datagram over IPv4.
    pub fn udp4(src: SocketAddrV4, dst: SocketAddrV4) -> Self {
        Self::udp(src.into(), dst.into())
    }

    /// A UDP datagram over IPv6.
    pub fn udp6(src: SocketAddrV6, dst: SocketAddrV6) -> Self {
        Self::udp(src.into(), dst.into())
    }

    /// A TCP segment, a SYN unless [`flags`](Self::flags) says otherwise. Panics on mixed families.
    pub fn tcp(src: SocketAddr, dst: SocketAddr) -> Self {
        let (src_port, dst_port) = (src.port(), dst.port());
        let header = Transport::Tcp { src: src_port, dst: dst_port, seq: 1, ack: 0, flags: tcp::SYN, window: u16::MAX };
        Self::new(network(src.ip(), dst.ip()), header)
    }

    /// A TCP segment over IPv4.
    pub fn tcp4(src: SocketAddrV4, dst: SocketAddrV4) -> Self {
        Self::tcp(src.into(), dst.into())
    }

    /// A TCP segment over IPv6.
    pub fn tcp6(src: SocketAddrV6, dst: SocketAddrV6) -> Self {
        Self::tcp(src.into(), dst.into())
    }

    /// An ICMP or ICMPv6 message: type, code and the four bytes behind the checksum. For an error,
    /// the payload is the [`packet`](Self::packet) it complains about. Panics on mixed families.
    pub fn icmp(src: IpAddr, dst: IpAddr, kind: u8, code: u8, rest: [u8; 4]) -> Self {
        Self::new(network(src, dst), Transport::Icmp { kind, code, rest })
    }

    /// An echo request. Panics on mixed families.
    pub fn echo(src: IpAddr, dst: IpAddr, id: u16, seq: u16) -> Self {
        let kind = if src.is_ipv4() { 8 } else { 128 };
        let [[a, b], [c, d]] = [id.to_be_bytes(), seq.to_be_bytes()];
        Self::icmp(src, dst, kind, 0, [a, b, c, d])
    }

    /// An ARP request by broadcast: who has `target`?
    pub fn arp_request(mac: [u8; 6], src: Ipv4Addr, target: Ipv4Addr) -> Self {
        let mut body = vec![0, 1, 8, 0, 6, 4, 0, 1];
        body.extend(mac);
        body.extend(src.octets());
        body.extend([0; 6]);
        body.extend(target.octets());
        Self::ethernet(0x0806).macs(mac, [0xff; 6]).payload(&body)
    }

    /// A neighbour solicitation by multicast: who has `target`?
    pub fn neighbour_solicitation(mac: [u8; 6], src: Ipv6Addr, target: Ipv6Addr) -> Self {
        let [.., a, b, c] = target.octets();
        let group = Ipv6Addr::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c]);
        let mut body = target.octets().to_vec();
        body.extend([1, 1]); // option: source link-layer address, in units of eight bytes
        body.extend(mac);
        Self::icmp(src.into(), group.into(), 135, 0, [0; 4])
            .macs(mac, [0x33, 0x33, 0xff, a, b, c])
            .ttl(255)
            .payload(&body)
    }

    /// Sets the Ethernet addresses.
    pub fn macs(mut self, src: [u8; 6], dst: [u8; 6]) -> Self {
        self.macs = (src, dst);
        self
    }

    /// Adds an 802.1Q tag behind those already there.
    pub fn vlan(self, id: u16) -> Self {
        self.tag(0x8100, id)
    }

    /// Adds a tag of any type (0x88a8 is 802.1ad) behind those already there.
    pub fn tag(mut self, ethertype: u16, control: u16) -> Self {
        self.tags.push((ethertype, control));
        self
    }

    /// What follows the innermost header.
    pub fn payload(mut self, payload: &[u8]) -> Self {
        self.payload = payload.to_vec();
        self
    }

    /// Bytes behind the end of the packet, which no length field counts.
    pub fn trailer(mut self, trailer: &[u8]) -> Self {
        self.trailer = trailer.to_vec();
        self
    }

    /// Time to live, or hop limit. 64 by default.
    pub fn ttl(mut self, ttl: u8) -> Self {
        self.ttl = ttl;
        self
    }

    /// Type of service, or traffic class.
    pub fn tos(mut self, tos: u8) -> Self {
        self.tos = tos;
        self
    }

    /// The identification that fragments share; IPv4 has 16 bits of it.
    pub fn identification(mut self, id: u32) -> Self {
        self.id = id;
        self
    }

    /// Sets IPv4's "don't fragment" bit.
    pub fn dont_fragment(mut self) -> Self {
        self.dont_fragment = true;
        self
    }

    /// Makes it a fragment at `offset` bytes (a multiple of 8). Only a first fragment has the
    /// transport header. IPv6 gets its fragment header behind the extensions already there.
    pub fn fragment(mut self, offset: u16, more: bool) -> Self {
        assert_eq!(offset % 8, 0, "a fragment's offset counts in units of 8 bytes");
        if self.fragment.replace((offset, more)).is_none() {
            self.extensions.push(Extension::Fragment);
        }
        self
    }

    /// IPv4 options, filled up to four bytes with zeroes (end of options). IPv6 has
    /// none and ignores them.
    pub fn options(mut self, options: &[u8]) -> Self {
        self.options = options.to_vec();
        self
    }

    /// Adds an IPv6 extension header behind those already there. `body` follows its first two
    /// bytes and is filled up with padding options, so that an empty one is valid. IPv4 has
    /// none and ignores it.
    pub fn extension(mut self, kind: u8, body: &[u8]) -> Self {
        self.extensions.push(Extension::Options { kind, body: body.to_vec() });
        self
    }

    /// Sets TCP's flags.
    pub fn flags(self, new: u8) -> Self {
        self.edit_tcp(|_, _, flags, _| *flags = new)
    }

    /// Sets TCP's sequence and acknowledgement numbers.
    pub fn sequence(self, new_seq: u32, new_ack: u32) -> Self {
        self.edit_tcp(|seq, ack, _, _| (*seq, *ack) = (new_seq, new_ack))
    }

    /// Sets TCP's window.
    pub fn window(self, new: u16) -> Self {
        self.edit_tcp(|_, _, _, window| *window = new)
    }

    fn edit_tcp(mut self, edit: impl FnOnce(&mut u32, &mut u32, &mut u8, &mut u16)) -> Self {
        match &mut self.transport {
            Transport::Tcp { seq, ack, flags, window, .. } => edit(seq, ack, flags, window),
            other => panic!("not a TCP segment: {other:?}"),
        }
        self
    }

    /// TCP options, filled up to four bytes with zeroes (end of options).
    pub fn tcp_options(mut self, options: &[u8]) -> Self {
        self.tcp_options = options.to_vec();
        self
    }

    /// Overrides IP's version. The checksums of all overridden fields are right for them.
    pub fn version(mut self, version: u8) -> Self {
        self.wrong.version = Some(version);
        self
    }

    /// Overrides IPv4's header length, in words of four bytes.
    pub fn ihl(mut self, ihl: u8) -> Self {
        self.wrong.ihl = Some(ihl);
        self
    }

    /// Overrides IPv4's total length, or IPv6's payload length.
    pub fn ip_length(mut self, length: u16) -> Self {
        self.wrong.length = Some(length);
        self
    }

    /// Overrides IPv4's protocol, or IPv6's last next header.
    pub fn protocol(mut self, protocol: u8) -> Self {
        self.wrong.protocol = Some(protocol);
        self
    }

    /// Overrides IPv4's header checksum.
    pub fn ip_checksum(mut self, checksum: u16) -> Self {
        self.wrong.ip_checksum = Some(checksum);
        self
    }

    /// Overrides TCP's header length, in words of four bytes.
    pub fn data_offset(mut self, offset: u8) -> Self {
        self.wrong.data_offset = Some(offset);
        self
    }

    /// Overrides UDP's length.
    pub fn udp_length(mut self, length: u16) -> Self {
        self.wrong.udp_length = Some(length);
        self
    }

    /// Overrides the checksum of TCP, UDP or ICMP. Zero in UDP over IPv4 means that there is none.
    pub fn checksum(mut self, checksum: u16) -> Self {
        self.wrong.checksum = Some(checksum);
        self
    }
}

fn network(src: IpAddr, dst: IpAddr) -> Network {
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => Network::V4(src, dst),
        (IpAddr::V6(src), IpAddr::V6(dst)) => Network::V6(src, dst),
        _ => panic!("{src} and {dst} are of different families"),
    }
}
