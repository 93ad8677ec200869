//! `etherparse`'s own verdict on whole frames, and the named differences between it and the parser's.

use etherparse::{
    EtherType, Ipv6ExtensionSlice, LenSource, LinkExtSlice, LinkSlice, NetSlice, SlicedPacket, TransportSlice,
    err::{Layer, LenError, ipv4, packet::SliceError},
    ether_type,
};
use xdpkit::{Fragment, Network, Reason, Transport};

use super::oracle::{Reading, fragment, tag, tcp};

macro_rules! differences {
    ($($(#[doc = $doc:literal])+ $variant:ident,)+) => {
        /// A documented policy of the parser by which its reading differs from `etherparse`'s.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub(crate) enum Difference {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl Difference {
            pub(crate) const ALL: &'static [Self] = &[$(Self::$variant),+];
        }
    };
}

differences! {
    /// The parser stops at a third VLAN tag; `etherparse` reads three link extensions.
    ThirdVlanTag,
    /// MACsec is some other EtherType to the parser; `etherparse` reads it, and what it carries unencrypted.
    Macsec,
    /// The parser does not look into ARP; `etherparse` checks its lengths.
    ArpBody,
    /// An authentication header ends the parser's walk through IPv4 (a firewall sees protocol 51); `etherparse` goes on.
    AhInIpv4,
    /// Payload length 0 means none to the parser, but in frames longer than any wire carries; `etherparse` takes all that
    /// is left (jumbograms, RFC 2675).
    Ipv6PayloadLengthZero,
    /// The parser stops at a ninth extension header; `etherparse` has no bound.
    NinthExtension,
    /// The parser walks hop-by-hop options wherever they stand; `etherparse` refuses all but the first place.
    HopByHopNotFirst,
    /// The parser walks an authentication header of length 0, 8 bytes; `etherparse` refuses it.
    AhWithoutSequence,
    /// Behind a later fragment's header stands payload; `etherparse` reads extension headers there.
    ExtensionInLaterFragment,
    /// The parser reads (and checks) a first fragment's transport header; `etherparse` leaves all fragments alone.
    FirstFragment,
    /// ICMP over IPv6 and ICMPv6 over IPv4 are just other protocols to the parser; `etherparse` reads them.
    IcmpOfOtherFamily,
    /// The parser does not check messages by their type; `etherparse` wants 20 bytes of an ICMP timestamp.
    IcmpTimestampLength,
    /// IGMP is just another protocol to the parser; `etherparse` checks its length.
    IgmpBody,
    /// UDP length 0 is malformed to the parser, but in frames longer than any wire carries; `etherparse` takes all that is
    /// left (jumbograms, RFC 2675).
    UdpLengthZero,
}

/// What `etherparse` says of a whole frame.
#[derive(Debug)]
pub(crate) enum Whole {
    Read(Reading),
    /// Refused for what the parser has a word for, too.
    Refused(Reason),
    /// Refused for a reason of its own.
    Foreign(SliceError),
}

/// Asks `etherparse` to read a whole frame.
pub(crate) fn whole(frame: &[u8]) -> Whole {
    match SlicedPacket::from_ethernet(frame) {
        Ok(packet) => Whole::Read(reading(&packet)),
        Err(error) => word(&error).map_or(Whole::Foreign(error), Whole::Refused),
    }
}

/// Why the two differ: `Ok(None)` if they do not, `Err(())` if no policy that was applied explains it.
pub(crate) fn explain(ours: &Reading, policies: &[Difference], whole: &Whole) -> Result<Option<Difference>, ()> {
    let agree = match whole {
        Whole::Read(theirs) => theirs == ours,
        Whole::Refused(reason) => *reason == ours.reason,
        Whole::Foreign(_) => false,
    };
    if agree {
        return Ok(None);
    }
    policies.iter().find(|policy| policy.explains(ours, whole)).copied().map(Some).ok_or(())
}

impl Difference {
    /// Whether the difference has the shape that this policy gives it. The policy was applied: the header in
    /// question is there, and all before it was read by both.
    fn explains(self, ours: &Reading, whole: &Whole) -> bool {
        /// Whether `etherparse` read the same once `change` was made to our reading.
        fn read(ours: &Reading, whole: &Whole, change: impl FnOnce(&mut Reading, &Reading)) -> bool {
            let Whole::Read(theirs) = whole else { return false };
            let mut ours = ours.clone();
            change(&mut ours, theirs);
            ours == *theirs
        }
        let foreign =
            |wanted: &[Layer]| matches!(whole, Whole::Foreign(SliceError::Len(error)) if wanted.contains(&error.layer));
        let refused_deeper = match whole {
            Whole::Read(_) => false,
            Whole::Refused(reason) => *reason >= Reason::Ipv6ExtensionTruncated,
            Whole::Foreign(_) => true,
        };
        // Addresses and hop limit stay ours: they were read before the two parted.
        let deeper = |ours: &mut Reading, theirs: &Reading| {
            if let (Network::Ip { protocol, fragment, .. }, Network::Ip { protocol: theirs, fragment: place, .. }) =
                (&mut ours.network, theirs.network)
            {
                (*protocol, *fragment) = (theirs, place);
            }
            ours.transport = theirs.transport;
            ours.reason = theirs.reason;
        };
        match self {
            Self::ThirdVlanTag => match whole {
                Whole::Read(theirs) => theirs.vlans.len() == 3 && theirs.vlans.starts_with(&ours.vlans),
                _ => true,
            },
            Self::Macsec => match whole {
                Whole::Read(theirs) => theirs.ether_type == ours.ether_type && theirs.vlans.starts_with(&ours.vlans),
                _ => true,
            },
            Self::ArpBody => foreign(&[Layer::Arp]),
            Self::AhInIpv4 | Self::Ipv6PayloadLengthZero => refused_deeper || read(ours, whole, deeper),
            Self::NinthExtension => {
                ours.reason == Reason::Ipv6ExtensionChain && (refused_deeper || read(ours, whole, deeper))
            }
            Self::HopByHopNotFirst | Self::AhWithoutSequence => match whole {
                Whole::Foreign(SliceError::Ipv6Exts(_)) => true,
                // Eight bytes are enough for the parser, not for `etherparse`.
                Whole::Refused(reason) => self == Self::AhWithoutSequence && *reason == Reason::Ipv6ExtensionTruncated,
                _ => false,
            },
            Self::ExtensionInLaterFragment => match whole {
                Whole::Read(theirs) => theirs.transport.is_none() && read(ours, whole, deeper),
                Whole::Refused(reason) => *reason == Reason::Ipv6ExtensionTruncated,
                Whole::Foreign(error) => matches!(error, SliceError::Ipv6Exts(_)),
            },
            Self::FirstFragment => read(ours, whole, |ours, _| {
                ours.transport = None;
                ours.reason = Reason::None;
            }),
            Self::IcmpOfOtherFamily => {
                let truncated = matches!(whole, Whole::Refused(Reason::IcmpTruncated | Reason::Icmpv6Truncated));
                truncated
                    || foreign(&[Layer::Icmpv4Timestamp, Layer::Icmpv4TimestampReply])
                    || read(ours, whole, |ours, theirs| ours.transport = theirs.transport)
            }
            Self::IcmpTimestampLength => foreign(&[Layer::Icmpv4Timestamp, Layer::Icmpv4TimestampReply]),
            Self::IgmpBody => foreign(&[Layer::Igmp]),
            Self::UdpLengthZero => {
                ours.reason == Reason::UdpLength
                    && read(ours, whole, |ours, theirs| {
                        ours.reason = Reason::None;
                        ours.transport = theirs.transport;
                    })
            }
        }
    }
}

fn reading(packet: &SlicedPacket<'_>) -> Reading {
    let Some(LinkSlice::Ethernet2(ethernet)) = &packet.link else { panic!("not Ethernet: {:?}", packet.link) };
    let mut reading = Reading {
        source_mac: ethernet.source(),
        destination_mac: ethernet.destination(),
        vlans: Vec::new(),
        ether_type: ethernet.ether_type().0,
        network: Network::Other,
        transport: None,
        reason: Reason::None,
    };
    for extension in &packet.link_exts {
        // MACsec keeps its own EtherType, as everything that the parser does not look into.
        if let LinkExtSlice::Vlan(vlan) = extension {
            reading.vlans.push(tag(&vlan.to_header()));
            if EtherType(reading.ether_type) != ether_type::MACSEC {
                reading.ether_type = vlan.ether_type().0;
            }
        }
    }
    reading.network = packet.net.as_ref().map_or(Network::Other, network);
    reading.transport = packet.transport.as_ref().and_then(transport);
    reading
}

fn network(net: &NetSlice<'_>) -> Network {
    match net {
        NetSlice::Arp(_) => Network::Arp,
        NetSlice::Ipv4(packet) => {
            let header = packet.header();
            Network::Ip {
                source: header.source_addr().into(),
                destination: header.destination_addr().into(),
                hop_limit: header.ttl(),
                protocol: packet.payload().ip_number.0,
                fragment: fragment(header.fragments_offset(), header.more_fragments()),
            }
        }
        NetSlice::Ipv6(packet) => {
            let header = packet.header();
            let places = packet.extensions().clone().into_iter().map(|extension| match extension {
                Ipv6ExtensionSlice::Fragment(header) => fragment(header.fragment_offset(), header.more_fragments()),
                _ => Fragment::No,
            });
            // A packet that was fragmented twice: behind the first is behind the first.
            let place = places.max_by_key(|place| match place {
                Fragment::No => 0,
                Fragment::First => 1,
                Fragment::Later => 2,
            });
            Network::Ip {
                source: header.source_addr().into(),
                destination: header.destination_addr().into(),
                hop_limit: header.hop_limit(),
                protocol: packet.payload().ip_number.0,
                fragment: place.unwrap_or(Fragment::No),
            }
        }
    }
}

fn transport(slice: &TransportSlice<'_>) -> Option<Transport> {
    match slice {
        TransportSlice::Tcp(header) => Some(tcp(&header.to_header())),
        TransportSlice::Udp(header) => {
            Some(Transport::Udp { source: header.source_port(), destination: header.destination_port() })
        }
        TransportSlice::Icmpv4(header) => Some(Transport::Icmp { kind: header.type_u8(), code: header.code_u8() }),
        TransportSlice::Icmpv6(header) => Some(Transport::Icmpv6 { kind: header.type_u8(), code: header.code_u8() }),
        TransportSlice::Igmp(_) => None, // a transport that the parser does not know
    }
}

/// The parser's word for an error, if it has one.
fn word(error: &SliceError) -> Option<Reason> {
    match error {
        SliceError::Len(error) => word_for_length(error),
        SliceError::Ipv4(ipv4::HeaderError::UnexpectedVersion { .. }) => Some(Reason::Ipv4Version),
        SliceError::Ipv4(ipv4::HeaderError::HeaderLengthSmallerThanHeader { .. }) => Some(Reason::Ipv4HeaderLength),
        SliceError::Ipv6(_) => Some(Reason::Ipv6Version),
        SliceError::Tcp(_) => Some(Reason::TcpDataOffset),
        _ => None,
    }
}

fn word_for_length(error: &LenError) -> Option<Reason> {
    Some(match error.layer {
        Layer::VlanHeader => Reason::VlanTruncated,
        Layer::Ipv4Header if error.required_len == 20 => Reason::Ipv4Truncated,
        Layer::Ipv4Header | Layer::Ipv4Packet => Reason::Ipv4TotalLength,
        Layer::Ipv6Header => Reason::Ipv6Truncated,
        Layer::Ipv6Packet => Reason::Ipv6PayloadLength,
        Layer::IpAuthHeader
        | Layer::Ipv6ExtHeader
        | Layer::Ipv6HopByHopHeader
        | Layer::Ipv6DestOptionsHeader
        | Layer::Ipv6RouteHeader
        | Layer::Ipv6FragHeader => Reason::Ipv6ExtensionTruncated,
        Layer::UdpHeader if error.len_source != LenSource::UdpHeaderLen => Reason::UdpTruncated,
        Layer::UdpHeader | Layer::UdpPayload => Reason::UdpLength,
        Layer::TcpHeader if error.required_len == 20 => Reason::TcpTruncated,
        Layer::TcpHeader => Reason::TcpDataOffset,
        Layer::Icmpv4 => Reason::IcmpTruncated,
        Layer::Icmpv6 => Reason::Icmpv6Truncated,
        _ => return None,
    })
}
