//! The oracle: every header read by `etherparse`'s slice of it, and on top the parser's documented policies.

use std::net::IpAddr;

use etherparse::{
    EtherType, Ethernet2HeaderSlice, Icmpv4Slice, Icmpv6Slice, IpAuthHeaderSlice, IpFragOffset, IpNumber,
    Ipv4HeaderSlice, Ipv6FragmentHeaderSlice, Ipv6HeaderSlice, Ipv6RawExtHeaderSlice, SingleVlanHeader,
    SingleVlanHeaderSlice, TcpHeader, TcpHeaderSlice, UdpHeaderSlice,
    err::{ipv4, ipv6, tcp},
    ether_type, ip_number,
};
use xdpkit::{Fragment, Network, PacketEvent, Reason, Transport, VlanTag};

use super::difference::Difference;

/// Policy: frames with more tags are unsupported.
const VLANS_MAX: usize = 2;
/// Policy: IPv6 packets with more extension headers are unsupported.
const EXTENSIONS_MAX: usize = 8;
/// The longest that a length field of 16 bits tells.
const LENGTH_MAX: usize = 65_535;

/// What was read of a frame, in the words of the monitor's events.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Reading {
    pub(crate) source_mac: [u8; 6],
    pub(crate) destination_mac: [u8; 6],
    pub(crate) vlans: Vec<VlanTag>,
    pub(crate) ether_type: u16,
    pub(crate) network: Network,
    pub(crate) transport: Option<Transport>,
    pub(crate) reason: Reason,
}

impl From<&PacketEvent> for Reading {
    fn from(event: &PacketEvent) -> Self {
        Self {
            source_mac: event.source_mac,
            destination_mac: event.destination_mac,
            vlans: event.vlans.clone(),
            ether_type: event.ether_type,
            network: event.network,
            transport: event.transport,
            reason: event.reason,
        }
    }
}

/// The oracle's answer.
pub(crate) struct Oracle<'a> {
    pub(crate) reading: Reading,
    /// Policies by which the reading may differ from `etherparse`'s own, in the order of the headers.
    pub(crate) policies: Vec<Difference>,
    /// How far into the frame headers were read: the rest may be anywhere.
    pub(crate) headers_end: usize,
    /// Where the IP packet ends by its own header.
    pub(crate) network_end: Option<usize>,
    /// What is not read yet of the innermost header's payload.
    rest: &'a [u8],
    frame: &'a [u8],
}

/// Reads a frame of at least 14 bytes.
pub(crate) fn read(frame: &[u8]) -> Oracle<'_> {
    let ethernet = Ethernet2HeaderSlice::from_slice(frame).expect("a frame has an Ethernet header");
    let mut oracle = Oracle {
        reading: Reading {
            source_mac: ethernet.source(),
            destination_mac: ethernet.destination(),
            vlans: Vec::new(),
            ether_type: ethernet.ether_type().0,
            network: Network::Other,
            transport: None,
            reason: Reason::None,
        },
        policies: Vec::new(),
        headers_end: 0,
        network_end: None,
        rest: frame,
        frame,
    };
    oracle.look_at(14);
    oracle.go_past(14);
    oracle.reading.reason = oracle.link().err().unwrap_or(Reason::None);
    oracle
}

/// The tag control information.
pub(crate) fn tag(header: &SingleVlanHeader) -> VlanTag {
    let priority = u16::from(header.pcp.value()) << 13;
    let drop_eligible = u16::from(header.drop_eligible_indicator) << 12;
    VlanTag(priority | drop_eligible | header.vlan_id.value())
}

pub(crate) fn fragment(offset: IpFragOffset, more: bool) -> Fragment {
    match (offset.value(), more) {
        (0, false) => Fragment::No,
        (0, true) => Fragment::First,
        _ => Fragment::Later,
    }
}

pub(crate) fn tcp(header: &TcpHeader) -> Transport {
    let flags = [header.cwr, header.ece, header.urg, header.ack, header.psh, header.rst, header.syn, header.fin];
    Transport::Tcp {
        source: header.source_port,
        destination: header.destination_port,
        flags: flags.iter().fold(0, |octet, flag| octet << 1 | u8::from(*flag)),
    }
}

impl Oracle<'_> {
    /// Says that the parser needs the first `size` bytes of the next header, as far as there are so many.
    fn look_at(&mut self, size: usize) {
        self.headers_end = self.at() + size.min(self.rest.len());
    }

    fn go_past(&mut self, length: usize) {
        self.rest = &self.rest[length..];
    }

    /// How far headers were gone past: of a frame that is right, the offset of what the last one read stands before.
    pub(crate) fn at(&self) -> usize {
        self.rest.as_ptr() as usize - self.frame.as_ptr() as usize
    }

    fn link(&mut self) -> Result<(), Reason> {
        use ether_type::{PROVIDER_BRIDGING, VLAN_DOUBLE_TAGGED_FRAME, VLAN_TAGGED_FRAME};
        while let VLAN_TAGGED_FRAME | PROVIDER_BRIDGING | VLAN_DOUBLE_TAGGED_FRAME = EtherType(self.reading.ether_type)
        {
            if self.reading.vlans.len() == VLANS_MAX {
                self.policies.push(Difference::ThirdVlanTag);
                return Err(Reason::VlanTooDeep);
            }
            self.look_at(4);
            let header = SingleVlanHeaderSlice::from_slice(self.rest).map_err(|_| Reason::VlanTruncated)?;
            self.reading.vlans.push(tag(&header.to_header()));
            self.reading.ether_type = header.ether_type().0;
            self.go_past(header.slice().len());
        }
        match EtherType(self.reading.ether_type) {
            ether_type::IPV4 => self.ipv4(),
            ether_type::IPV6 => self.ipv6(),
            ether_type::ARP => {
                self.policies.push(Difference::ArpBody);
                self.reading.network = Network::Arp;
                Ok(())
            }
            ether_type::MACSEC => {
                self.policies.push(Difference::Macsec);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn ipv4(&mut self) -> Result<(), Reason> {
        use ipv4::{HeaderError as Content, HeaderSliceError as Refused};
        self.look_at(20);
        let header = Ipv4HeaderSlice::from_slice(self.rest).map_err(|error| match error {
            Refused::Len(error) if error.required_len == 20 => Reason::Ipv4Truncated,
            // Options beyond the frame: the total length is either below the header's or beyond the frame.
            Refused::Len(_) => Reason::Ipv4TotalLength,
            Refused::Content(Content::UnexpectedVersion { .. }) => Reason::Ipv4Version,
            Refused::Content(Content::HeaderLengthSmallerThanHeader { .. }) => Reason::Ipv4HeaderLength,
        })?;
        let total = told_or_merged(usize::from(header.total_len()), self.rest.len());
        if total < header.slice().len() || total > self.rest.len() {
            return Err(Reason::Ipv4TotalLength);
        }
        self.rest = &self.rest[..total];
        self.go_past(header.slice().len());

        let fragment = fragment(header.fragments_offset(), header.more_fragments());
        self.ip(header.source_addr().into(), header.destination_addr().into(), header.ttl());
        self.follow(header.protocol(), fragment);
        match header.protocol() {
            ip_number::AUTH => self.policies.push(Difference::AhInIpv4),
            ip_number::IPV6_ICMP => self.policies.push(Difference::IcmpOfOtherFamily),
            _ => {}
        }
        self.transport(header.protocol(), ip_number::ICMP, fragment)
    }

    fn ipv6(&mut self) -> Result<(), Reason> {
        self.look_at(40);
        let header = Ipv6HeaderSlice::from_slice(self.rest).map_err(|error| match error {
            ipv6::HeaderSliceError::Len(_) => Reason::Ipv6Truncated,
            ipv6::HeaderSliceError::Content(_) => Reason::Ipv6Version,
        })?;
        let payload = told_or_merged(usize::from(header.payload_length()), self.rest.len() - header.slice().len());
        let total = header.slice().len() + payload;
        if total > self.rest.len() {
            return Err(Reason::Ipv6PayloadLength);
        }
        if payload == 0 {
            self.policies.push(Difference::Ipv6PayloadLengthZero);
        }
        self.rest = &self.rest[..total];
        self.go_past(header.slice().len());

        self.ip(header.source_addr().into(), header.destination_addr().into(), header.hop_limit());
        self.follow(header.next_header(), Fragment::No);
        let (protocol, fragment) = self.extensions(header.next_header())?;
        if protocol == ip_number::ICMP {
            self.policies.push(Difference::IcmpOfOtherFamily);
        }
        self.transport(protocol, ip_number::IPV6_ICMP, fragment)
    }

    /// Walks the extension headers, up to the transport header or the end of a later fragment's.
    fn extensions(&mut self, first: IpNumber) -> Result<(IpNumber, Fragment), Reason> {
        let (mut next, mut place) = (first, Fragment::No);
        for walked in 0.. {
            if !is_extension(next) {
                break;
            }
            if walked == EXTENSIONS_MAX {
                self.policies.push(Difference::NinthExtension);
                return Err(Reason::Ipv6ExtensionChain);
            }
            self.look_at(match next {
                ip_number::IPV6_FRAG => 8,
                // Whether segments are left.
                ip_number::IPV6_ROUTE => 4,
                _ => 2,
            });
            let length;
            (next, length) = match next {
                ip_number::IPV6_FRAG => {
                    let header =
                        Ipv6FragmentHeaderSlice::from_slice(self.rest).map_err(|_| Reason::Ipv6ExtensionTruncated)?;
                    match fragment(header.fragment_offset(), header.more_fragments()) {
                        Fragment::No => {} // "atomic", or the packet was called a fragment before
                        found => place = found,
                    }
                    (header.next_header(), header.slice().len())
                }
                ip_number::AUTH => self.authentication()?,
                _ => {
                    if next == ip_number::IPV6_HOP_BY_HOP && walked > 0 {
                        self.policies.push(Difference::HopByHopNotFirst);
                    }
                    let header =
                        Ipv6RawExtHeaderSlice::from_slice(self.rest).map_err(|_| Reason::Ipv6ExtensionTruncated)?;
                    (header.next_header(), header.slice().len())
                }
            };
            self.go_past(length);
            self.follow(next, place);
            if place == Fragment::Later {
                if is_extension(next) {
                    self.policies.push(Difference::ExtensionInLaterFragment);
                }
                break;
            }
        }
        Ok((next, place))
    }

    /// The next header and the length of an authentication header.
    fn authentication(&mut self) -> Result<(IpNumber, usize), Reason> {
        match IpAuthHeaderSlice::from_slice(self.rest) {
            Ok(header) => Ok((header.next_header(), header.slice().len())),
            // Policy: the length field is believed even when it leaves no room for the fixed fields.
            Err(_) if self.rest.len() >= 8 && self.rest[1] == 0 => {
                self.policies.push(Difference::AhWithoutSequence);
                Ok((IpNumber(self.rest[0]), 8))
            }
            Err(_) => Err(Reason::Ipv6ExtensionTruncated),
        }
    }

    fn transport(&mut self, protocol: IpNumber, icmp: IpNumber, place: Fragment) -> Result<(), Reason> {
        if place == Fragment::Later {
            return Ok(());
        }
        if place == Fragment::First {
            self.policies.push(Difference::FirstFragment);
        }
        let transport = match protocol {
            ip_number::TCP => self.tcp()?,
            ip_number::UDP => self.udp(place)?,
            ip_number::IGMP => {
                self.policies.push(Difference::IgmpBody);
                return Ok(());
            }
            ip_number::ICMP if protocol == icmp => {
                self.look_at(8);
                let read = Icmpv4Slice::from_slice(self.rest).map(|header| (header.type_u8(), header.code_u8()));
                let (kind, code) = match read {
                    Ok(read) => read,
                    Err(error) if error.required_len == 8 => return Err(Reason::IcmpTruncated),
                    // Policy: messages are not checked against their type's length.
                    Err(_) => {
                        self.policies.push(Difference::IcmpTimestampLength);
                        (self.rest[0], self.rest[1])
                    }
                };
                Transport::Icmp { kind, code }
            }
            ip_number::IPV6_ICMP if protocol == icmp => {
                self.look_at(8);
                let header = Icmpv6Slice::from_slice(self.rest).map_err(|_| Reason::Icmpv6Truncated)?;
                Transport::Icmpv6 { kind: header.type_u8(), code: header.code_u8() }
            }
            _ => return Ok(()),
        };
        self.reading.transport = Some(transport);
        Ok(())
    }

    fn tcp(&mut self) -> Result<Transport, Reason> {
        self.look_at(20);
        match TcpHeaderSlice::from_slice(self.rest) {
            Ok(header) => Ok(tcp(&header.to_header())),
            Err(tcp::HeaderSliceError::Len(error)) if error.required_len == 20 => Err(Reason::TcpTruncated),
            Err(_) => Err(Reason::TcpDataOffset),
        }
    }

    fn udp(&mut self, place: Fragment) -> Result<Transport, Reason> {
        self.look_at(8);
        let header = UdpHeaderSlice::from_slice(self.rest).map_err(|_| Reason::UdpTruncated)?;
        let length = usize::from(header.length());
        if length == 0 {
            if self.rest.len() > LENGTH_MAX {
                return Ok(Transport::Udp { source: header.source_port(), destination: header.destination_port() });
            }
            self.policies.push(Difference::UdpLengthZero);
        }
        // Policy: a first fragment's length is that of the datagram yet to be put together.
        if length < 8 || place == Fragment::No && length > self.rest.len() {
            return Err(Reason::UdpLength);
        }
        Ok(Transport::Udp { source: header.source_port(), destination: header.destination_port() })
    }

    /// Notes the addresses, once the packet's length is right.
    fn ip(&mut self, source: IpAddr, destination: IpAddr, hop_limit: u8) {
        self.network_end = Some(self.at() + self.rest.len());
        self.reading.network = Network::Ip { source, destination, hop_limit, protocol: 0, fragment: Fragment::No };
    }

    /// Notes what the header just read says of the next one.
    fn follow(&mut self, next: IpNumber, place: Fragment) {
        if let Network::Ip { protocol, fragment, .. } = &mut self.reading.network {
            (*protocol, *fragment) = (next.0, place);
        }
    }
}

/// Policy: a length of 0 means all there is, where that is longer than any wire carries; else nothing.
fn told_or_merged(told: usize, there: usize) -> usize {
    if told == 0 && there > LENGTH_MAX { there } else { told }
}

fn is_extension(number: IpNumber) -> bool {
    use ip_number::{AUTH, IPV6_DEST_OPTIONS, IPV6_FRAG, IPV6_HOP_BY_HOP, IPV6_ROUTE};
    matches!(number, IPV6_HOP_BY_HOP | IPV6_ROUTE | IPV6_DEST_OPTIONS | AUTH | IPV6_FRAG)
}
