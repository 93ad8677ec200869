//! XDP actions and the reasons that stages count: mirror of `bpf/abi/reason.h`.

use std::fmt;

/// What becomes of a packet: `enum xdp_action` of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum Action {
    /// `XDP_ABORTED`: dropped as a program error; raises the tracepoint `xdp:xdp_exception`.
    Aborted = 0,
    /// `XDP_DROP`: dropped, silently and as early as can be.
    Drop = 1,
    /// `XDP_PASS`: goes on to the next stage, after the last one to the kernel's network stack.
    Pass = 2,
    /// `XDP_TX`: sent out of the interface that it came in by.
    Tx = 3,
    /// `XDP_REDIRECT`: sent out of another interface.
    Redirect = 4,
}

impl Action {
    /// All of them, in the kernel's order.
    pub const ALL: [Self; 5] = [Self::Aborted, Self::Drop, Self::Pass, Self::Tx, Self::Redirect];

    /// The action of a program's return value, if it is one. The kernel treats any other as `Aborted`.
    #[must_use]
    pub fn from_code(code: u32) -> Option<Self> {
        Self::ALL.get(usize::try_from(code).ok()?).copied()
    }

    /// Lower-case name: `aborted`, `drop`, `pass`, `tx`, `redirect`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Aborted => "aborted",
            Self::Drop => "drop",
            Self::Pass => "pass",
            Self::Tx => "tx",
            Self::Redirect => "redirect",
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident = $value:literal, $name:literal;)+) => {
        /// Why a packet left a stage. Each packet is counted under exactly one reason in each stage it meets.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        #[repr(u8)]
        pub enum Reason {
            $($(#[doc = $doc])+ $variant = $value,)+
        }

        impl Reason {
            /// All reasons, by rising code.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// Name in snake case, as in JSON and metrics.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }
        }
    };
}

reasons! {
    /// Well-formed, and the stage had no opinion.
    None = 0, "none";
    /// Shorter than an Ethernet header.
    EthernetTruncated = 1, "ethernet_truncated";
    /// Ends inside a VLAN tag.
    VlanTruncated = 2, "vlan_truncated";
    /// Ends inside the IPv4 header.
    Ipv4Truncated = 3, "ipv4_truncated";
    /// EtherType IPv4, but the version field is not 4.
    Ipv4Version = 4, "ipv4_version";
    /// IHL below 5 (RFC 791).
    Ipv4HeaderLength = 5, "ipv4_header_length";
    /// Total length below the header's or beyond the frame.
    Ipv4TotalLength = 6, "ipv4_total_length";
    /// Ends inside the IPv6 header.
    Ipv6Truncated = 7, "ipv6_truncated";
    /// EtherType IPv6, but the version field is not 6.
    Ipv6Version = 8, "ipv6_version";
    /// Payload length beyond the frame.
    Ipv6PayloadLength = 9, "ipv6_payload_length";
    /// An IPv6 extension header reaches beyond the packet.
    Ipv6ExtensionTruncated = 10, "ipv6_extension_truncated";
    /// No room for a TCP header.
    TcpTruncated = 11, "tcp_truncated";
    /// Data offset below 5 or beyond the packet (RFC 9293).
    TcpDataOffset = 12, "tcp_data_offset";
    /// No room for a UDP header.
    UdpTruncated = 13, "udp_truncated";
    /// UDP length below 8 or beyond the packet (RFC 768).
    UdpLength = 14, "udp_length";
    /// No room for an ICMP header.
    IcmpTruncated = 15, "icmp_truncated";
    /// No room for an ICMPv6 header.
    Icmpv6Truncated = 16, "icmpv6_truncated";
    /// More than two VLAN tags: deeper than we look.
    VlanTooDeep = 20, "vlan_too_deep";
    /// More than eight IPv6 extension headers: deeper than we look.
    Ipv6ExtensionChain = 21, "ipv6_extension_chain";
    /// The headers go on behind the frame's first buffer, where a program cannot look: the driver splits frames.
    HeadersSplit = 22, "headers_split";
    /// `PacketMonitor`: the action set for the packet's protocol.
    ProtocolAction = 32, "protocol_action";
    /// `PacketMonitor`: a frame to a group address is not sent back; it went on.
    TxGroupAddress = 33, "tx_group_address";
    /// `Firewall`: an allow rule.
    Allowed = 40, "allowed";
    /// `Firewall`: a deny rule.
    Denied = 41, "denied";
    /// `Firewall`: no rule matched, the default action decided.
    DefaultAction = 42, "default_action";
    /// `Firewall`, `RateLimiter`: ARP.
    Arp = 43, "arp";
    /// `Firewall`, `RateLimiter`: IPv6 neighbour discovery (RFC 4861) from the link.
    NeighbourDiscovery = 44, "neighbour_discovery";
    /// `Firewall`, `RateLimiter`: neither ARP nor IP.
    NotIp = 45, "not_ip";
    /// `Firewall`: more rules to ask than a packet may cost; dropped.
    RuleChain = 46, "rule_chain";
    /// `Firewall`, `RateLimiter`, when they only count: would have been dropped by a rule, the default, a limit or a ban.
    WouldDrop = 47, "would_drop";
    /// `RateLimiter`: within every limit that it is under.
    WithinLimit = 48, "within_limit";
    /// `RateLimiter`: more packets than the source's limit allows.
    OverPackets = 49, "over_packets";
    /// `RateLimiter`: more bytes than the source's limit allows.
    OverBytes = 50, "over_bytes";
    /// `RateLimiter`: the source is banned.
    Banned = 51, "banned";
    /// `RateLimiter`: the source's tier is exempt from limits.
    Exempt = 52, "exempt";
    /// `RateLimiter`: the source's tier is blocked.
    Blocked = 53, "blocked";
    /// `RateLimiter`: no scope is about it, or its class has no limit there.
    NoLimit = 54, "no_limit";
    /// `RateLimiter`: the table has no place for its source; it passed or was dropped as
    /// [`TableFull`](crate::TableFull) says.
    UnknownSource = 55, "unknown_source";
    /// `RateLimiter`: other CPUs were faster at the same bucket, many times in a row; dropped.
    Contended = 56, "contended";
    /// Balancers, `TunnelDecap`, and `PacketMonitor` where it would send the frame back: its destination MAC address is none of
    /// this host's (flooded by a switch, broadcast, multicast); it passed unmodified.
    NotForUs = 60, "not_for_us";
    /// Balancers: for none of the virtual addresses; it went on untouched.
    NotForVip = 64, "not_for_vip";
    /// Balancers: for a virtual address, but no service there has this protocol and port; it went on untouched.
    NoService = 65, "no_service";
    /// Balancers: to a backend (or from one to its client).
    Forwarded = 66, "forwarded";
    /// Balancers: the service has no backend for it.
    NoBackend = 67, "no_backend";
    /// Balancers: for port 0 of a service on any port.
    PortZero = 68, "port_zero";
    /// Balancers: the next hop's MAC is not known yet; the packet went to the host's stack, which finds it out.
    Unresolved = 69, "unresolved";
    /// Balancers: the host has no way to the backend, or forwarding is off on the interface.
    NoRoute = 70, "no_route";
    /// Balancers: TTL or hop limit of 1 or 0. It went on to the host's stack, which tells the sender; or was dropped where the
    /// stack would take it for itself, as its address is one of the host's own.
    HopLimit = 71, "hop_limit";
    /// Balancers: too big for the way to the backend; Fragmentation Needed or Packet Too Big went back.
    TooBigAnswered = 72, "too_big_answered";
    /// Balancers: too big for the way to the backend, and not answered: an ICMP error, a later fragment, or more than the ration
    /// of answers allows. With `XDP_PASS`: the host's stack forwards it in fragments.
    TooBig = 73, "too_big";
    /// Balancers: an ICMP echo request for a virtual address, answered.
    EchoAnswered = 74, "echo_answered";
    /// Balancers: a fragment whose first one has not come by, or long ago.
    FragmentUnknown = 75, "fragment_unknown";
    /// Balancers: an ICMP error about a flow, to that flow's backend.
    ErrorForwarded = 76, "error_forwarded";
    /// Balancers: an ICMP error about nothing that is balanced; it went on.
    ErrorUnknown = 77, "error_unknown";
    /// Balancers: the driver left no room for another header.
    NoRoom = 78, "no_room";
    /// Balancers: only the host's stack can send to the next hop (by a tunnel, a macvlan, a bridge that has not learnt the
    /// address...): translated or encapsulated, the packet went to it, and goes on where the host forwards.
    ViaStack = 79, "via_stack";
    /// `DsrBalancer`: the backend is to be a neighbour, but the way there leads through a gateway.
    OffLink = 80, "off_link";
    /// `DsrBalancer`: a health check's probe, to the backend that it is for.
    Probed = 81, "probed";
    /// `DsrBalancer`: for a virtual address, by the interface for probes, but no probe of a backend there; dropped.
    NotAProbe = 82, "not_a_probe";
    /// `NatBalancer`: from a backend to its client.
    Answered = 90, "answered";
    /// `NatBalancer`: a TCP segment for a service that opens no connection and is of none; dropped.
    NoConnection = 91, "no_connection";
    /// `NatBalancer`: no room for another connection: all that could have gone are confirmed.
    ConnectionsFull = 92, "connections_full";
    /// `NatBalancer`: every port that was tried is in use towards this backend.
    PortsExhausted = 93, "ports_exhausted";
    /// `NatBalancer`: the client of a service that keeps its address is the backend itself.
    BackendIsClient = 94, "backend_is_client";
    /// `NatBalancer`: of a connection whose backend was killed or has gone.
    BackendKilled = 95, "backend_killed";
    /// `NatBalancer`: answered with a TCP RST.
    ResetSent = 96, "reset_sent";
    /// `NatBalancer`: its connection ended while it was handled.
    ConnectionRace = 97, "connection_race";
    /// Balancers: from a source that is not one host (0.0.0.0/8, 127.0.0.0/8, 224.0.0.0/4, 240.0.0.0/4, `::`, `::1`,
    /// ff00::/8) or that is one of the balancer's own virtual addresses: it gets no new flow and no answer; dropped.
    MartianSource = 100, "martian_source";
    /// Balancers: an echo request for a virtual address, but the ration of answers is used up; dropped.
    AnswerLimited = 101, "answer_limited";
    /// Balancers: an IPv6 routing header has segments left, so the virtual address is not the last destination; it went on.
    RoutingHeader = 102, "routing_header";
    /// Balancers: the route leads to a link that is down, or (`DsrBalancer` without a tunnel) to an interface that only the
    /// host's stack could send by; dropped.
    NoEgress = 103, "no_egress";
    /// `TunnelDecap`: the outer header was taken off.
    Decapsulated = 110, "decapsulated";
    /// `TunnelDecap`: not a tunnel's packet; it went on untouched.
    NotTunnel = 111, "not_tunnel";
    /// `TunnelDecap`: a fragment of a tunnel's packet; it went on untouched.
    TunnelFragment = 112, "tunnel_fragment";
    /// `TunnelDecap`: what is inside is for none of the virtual addresses; it went on untouched.
    TunnelNotVip = 113, "tunnel_not_vip";
    /// `TunnelDecap`: the tunnel does not end here; it went on untouched.
    TunnelDestination = 114, "tunnel_destination";
    /// `TunnelDecap`: the tunnel begins where none may; dropped.
    TunnelSource = 115, "tunnel_source";
    /// `TunnelDecap`: what is inside contradicts itself or the outside; dropped.
    InnerMalformed = 116, "inner_malformed";
    /// `TunnelDecap`: what is inside comes from a virtual address; dropped.
    InnerSource = 117, "inner_source";
    /// `TunnelDecap`: congestion was met on the way, and what is inside cannot say so (RFC 6040); dropped.
    InnerEcn = 118, "inner_ecn";
}

impl Reason {
    /// The reason of a code from the data path; `Option::None` for one of a newer program.
    #[must_use]
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.iter().copied().find(|reason| *reason as u8 == code)
    }

    /// Whether the frame contradicts itself.
    #[must_use]
    pub fn is_malformed(self) -> bool {
        (1..20).contains(&(self as u8))
    }

    /// Whether the frame is deeper than the parser looks.
    #[must_use]
    pub fn is_unsupported(self) -> bool {
        (20..32).contains(&(self as u8))
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_mirror_the_header() {
        let header = include_str!("../bpf/abi/reason.h");
        let in_c: Vec<(String, u8)> = header
            .lines()
            .filter_map(|line| line.trim().strip_prefix("REASON_")?.strip_suffix(',')?.split_once(" = "))
            .map(|(name, value)| (name.to_lowercase(), value.parse().unwrap()))
            .collect();
        let in_rust: Vec<(String, u8)> = Reason::ALL.iter().map(|r| (r.name().to_owned(), *r as u8)).collect();
        assert!(in_c.len() > 20, "the header was read");
        assert_eq!(in_c, in_rust);
    }

    #[test]
    fn codes_round_trip() {
        for reason in Reason::ALL {
            assert_eq!(Reason::from_code(*reason as u8), Some(*reason));
        }
        assert_eq!(Reason::from_code(127), None);
        assert_eq!(Action::from_code(5), None);
        assert_eq!(Action::from_code(3), Some(Action::Tx));
    }
}
