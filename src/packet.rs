//! A packet as events report it.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use crate::{
    Action, Reason,
    abi::{
        event::Event,
        packet::{FRAGMENT_FIRST, FRAGMENT_LATER, NETWORK_ARP, NETWORK_IPV4, NETWORK_IPV6},
    },
};

/// What the Ethernet frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Network {
    /// ARP.
    Arp,
    /// IPv4 or IPv6: see the addresses.
    Ip {
        /// Source address.
        source: IpAddr,
        /// Destination address.
        destination: IpAddr,
        /// TTL or hop limit.
        hop_limit: u8,
        /// IANA protocol number behind IP and its extension headers.
        protocol: u8,
        /// Whether it is a fragment.
        fragment: Fragment,
    },
    /// Anything else, and whatever was malformed before its addresses could be read.
    Other,
}

/// A packet's place in a fragmented datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fragment {
    /// Not fragmented; also an IPv6 atomic fragment (RFC 6946).
    No,
    /// The first one, with a transport header.
    First,
    /// One behind the first, without a transport header.
    Later,
}

/// The transport header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Transport {
    /// TCP.
    Tcp {
        /// Source port.
        source: u16,
        /// Destination port.
        destination: u16,
        /// The flags octet, from CWR (0x80) to FIN (0x01).
        flags: u8,
    },
    /// UDP.
    Udp {
        /// Source port.
        source: u16,
        /// Destination port.
        destination: u16,
    },
    /// ICMP.
    Icmp {
        /// Message type.
        kind: u8,
        /// Message code.
        code: u8,
    },
    /// ICMPv6.
    Icmpv6 {
        /// Message type.
        kind: u8,
        /// Message code.
        code: u8,
    },
}

/// An 802.1Q or 802.1ad tag: its tag control information in host byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VlanTag(pub u16);

impl VlanTag {
    /// VLAN identifier, 12 bits.
    #[must_use]
    pub fn id(self) -> u16 {
        self.0 & 0xfff
    }

    /// Priority code point, 3 bits.
    #[must_use]
    pub fn priority(self) -> u8 {
        (self.0 >> 13) as u8
    }
}

/// One packet.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PacketEvent {
    /// When the program saw it: time since boot without suspend, `CLOCK_MONOTONIC`.
    pub timestamp: Duration,
    /// Index of the interface that it came in by.
    pub interface: u32,
    /// Receive queue.
    pub rx_queue: u32,
    /// Bytes of the frame, Ethernet header included, FCS not.
    pub bytes: u32,
    /// Source MAC address.
    pub source_mac: [u8; 6],
    /// Destination MAC address.
    pub destination_mac: [u8; 6],
    /// The tags, outermost first; at most two.
    pub vlans: Vec<VlanTag>,
    /// EtherType behind the tags, host byte order.
    pub ether_type: u16,
    /// What the frame carries.
    pub network: Network,
    /// The transport header, if there is one that we know.
    pub transport: Option<Transport>,
    /// Why it left the stage; [`Reason::is_malformed`] tells of a broken packet.
    pub reason: Reason,
    /// What became of it.
    pub action: Action,
    /// The beginning of the frame as the program found it: at most 128 bytes.
    pub frame: Vec<u8>,
}

impl PacketEvent {
    /// `None` for codes of a newer program.
    pub(crate) fn decode(raw: Event) -> Option<Self> {
        let address = |bytes: [u8; 16]| match raw.network {
            NETWORK_IPV4 => IpAddr::V4(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3])),
            _ => IpAddr::V6(Ipv6Addr::from(bytes)),
        };
        let network = match raw.network {
            NETWORK_ARP => Network::Arp,
            NETWORK_IPV4 | NETWORK_IPV6 => Network::Ip {
                source: address(raw.source),
                destination: address(raw.destination),
                hop_limit: raw.hop_limit,
                protocol: raw.protocol,
                fragment: match raw.fragment {
                    FRAGMENT_FIRST => Fragment::First,
                    FRAGMENT_LATER => Fragment::Later,
                    _ => Fragment::No,
                },
            },
            _ => Network::Other,
        };
        let (source, destination) = (u16::from_be_bytes(raw.source_port), u16::from_be_bytes(raw.destination_port));
        let transport = match (raw.transport, raw.protocol) {
            (0, _) => None,
            (_, 6) => Some(Transport::Tcp { source, destination, flags: raw.tcp_flags }),
            (_, 17) => Some(Transport::Udp { source, destination }),
            (_, 1) => Some(Transport::Icmp { kind: raw.icmp_type, code: raw.icmp_code }),
            (_, 58) => Some(Transport::Icmpv6 { kind: raw.icmp_type, code: raw.icmp_code }),
            _ => None,
        };
        let tags = raw.vlan_tci.iter().take(raw.vlans.into());
        Some(Self {
            timestamp: Duration::from_nanos(raw.timestamp),
            interface: raw.interface,
            rx_queue: raw.rx_queue,
            bytes: raw.bytes,
            source_mac: raw.source_mac,
            destination_mac: raw.destination_mac,
            vlans: tags.map(|tci| VlanTag(u16::from_be_bytes(*tci))).collect(),
            ether_type: u16::from_be_bytes(raw.ether_type),
            network,
            transport,
            reason: Reason::from_code(raw.reason)?,
            action: Action::from_code(raw.action.into())?,
            frame: raw.frame[..(raw.captured as usize).min(raw.frame.len())].to_vec(),
        })
    }
}

struct Mac([u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// One line, much as tcpdump prints.
impl fmt::Display for PacketEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for tag in &self.vlans {
            write!(f, "vlan {} ", tag.id())?;
        }
        let end = |address: IpAddr, port: Option<u16>| match (address, port) {
            (address, None) => address.to_string(),
            (IpAddr::V4(v4), Some(port)) => format!("{v4}:{port}"),
            (IpAddr::V6(v6), Some(port)) => format!("[{v6}]:{port}"),
        };
        match self.network {
            Network::Ip { source, destination, protocol, fragment, .. } => {
                let ports = match self.transport {
                    Some(Transport::Tcp { source, destination, .. } | Transport::Udp { source, destination }) => {
                        (Some(source), Some(destination))
                    }
                    _ => (None, None),
                };
                write!(f, "{} > {} ", end(source, ports.0), end(destination, ports.1))?;
                match self.transport {
                    Some(Transport::Tcp { flags, .. }) => write!(f, "tcp [{}]", tcp_flags(flags))?,
                    Some(Transport::Udp { .. }) => write!(f, "udp")?,
                    Some(Transport::Icmp { kind, code }) => write!(f, "icmp type {kind} code {code}")?,
                    Some(Transport::Icmpv6 { kind, code }) => write!(f, "icmpv6 type {kind} code {code}")?,
                    None => write!(f, "protocol {protocol}")?,
                }
                match fragment {
                    Fragment::No => {}
                    Fragment::First => write!(f, " first fragment")?,
                    Fragment::Later => write!(f, " later fragment")?,
                }
            }
            Network::Arp => write!(f, "{} > {} arp", Mac(self.source_mac), Mac(self.destination_mac))?,
            Network::Other => {
                write!(
                    f,
                    "{} > {} ethertype {:#06x}",
                    Mac(self.source_mac),
                    Mac(self.destination_mac),
                    self.ether_type
                )?;
            }
        }
        write!(f, ", {} bytes", self.bytes)?;
        if self.reason != Reason::None {
            write!(f, ", {}", self.reason)?;
        }
        if self.action != Action::Pass {
            write!(f, ": {}", self.action)?;
        }
        Ok(())
    }
}

fn tcp_flags(flags: u8) -> String {
    let names = ['F', 'S', 'R', 'P', '.', 'U', 'E', 'W'];
    names.iter().enumerate().filter(|(bit, _)| flags >> bit & 1 == 1).map(|(_, name)| *name).collect()
}
