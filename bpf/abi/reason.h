/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Why a packet left a stage: every way out of every program has one value here, counted per CPU.
 * Mirrored by src/reason.rs. Append only: the numbers are kept in pinned counters across upgrades,
 * which is why this header is not part of the pins' fingerprint.
 */
#ifndef XDPKIT_ABI_REASON_H
#define XDPKIT_ABI_REASON_H

#pragma clang diagnostic push
#pragma clang diagnostic error "-Wpadded"

enum xdpkit_reason {
	/* Well-formed, and nothing in the stage had an opinion. */
	REASON_NONE = 0,

	/* Malformed: the frame contradicts itself (RFC 791, 8200, 9293, 768, 792, 4443). */
	REASON_ETHERNET_TRUNCATED = 1,
	REASON_VLAN_TRUNCATED = 2,
	REASON_IPV4_TRUNCATED = 3,
	REASON_IPV4_VERSION = 4,
	REASON_IPV4_HEADER_LENGTH = 5,
	REASON_IPV4_TOTAL_LENGTH = 6,
	REASON_IPV6_TRUNCATED = 7,
	REASON_IPV6_VERSION = 8,
	REASON_IPV6_PAYLOAD_LENGTH = 9,
	REASON_IPV6_EXTENSION_TRUNCATED = 10,
	REASON_TCP_TRUNCATED = 11,
	REASON_TCP_DATA_OFFSET = 12,
	REASON_UDP_TRUNCATED = 13,
	REASON_UDP_LENGTH = 14,
	REASON_ICMP_TRUNCATED = 15,
	REASON_ICMPV6_TRUNCATED = 16,

	/* Unsupported: maybe right, but deeper than we look. */
	REASON_VLAN_TOO_DEEP = 20,
	REASON_IPV6_EXTENSION_CHAIN = 21,
	REASON_HEADERS_SPLIT = 22,

	/* PacketMonitor */
	REASON_PROTOCOL_ACTION = 32,
	REASON_TX_GROUP_ADDRESS = 33,

	/* Firewall */
	REASON_ALLOWED = 40,
	REASON_DENIED = 41,
	REASON_DEFAULT_ACTION = 42,
	REASON_ARP = 43,
	REASON_NEIGHBOUR_DISCOVERY = 44,
	REASON_NOT_IP = 45,
	REASON_RULE_CHAIN = 46,
	REASON_WOULD_DROP = 47,

	/* RateLimiter; it has the Firewall's last five but RULE_CHAIN in common */
	REASON_WITHIN_LIMIT = 48,
	REASON_OVER_PACKETS = 49,
	REASON_OVER_BYTES = 50,
	REASON_BANNED = 51,
	REASON_EXEMPT = 52,
	REASON_BLOCKED = 53,
	REASON_NO_LIMIT = 54,
	REASON_UNKNOWN_SOURCE = 55,
	REASON_CONTENDED = 56,

	/* Both balancers, TunnelDecap, and PacketMonitor where it sends back */
	REASON_NOT_FOR_US = 60,

	/* Both balancers */
	REASON_NOT_FOR_VIP = 64,
	REASON_NO_SERVICE = 65,
	REASON_FORWARDED = 66,
	REASON_NO_BACKEND = 67,
	REASON_PORT_ZERO = 68,
	REASON_UNRESOLVED = 69,
	REASON_NO_ROUTE = 70,
	REASON_HOP_LIMIT = 71,
	REASON_TOO_BIG_ANSWERED = 72,
	REASON_TOO_BIG = 73,
	REASON_ECHO_ANSWERED = 74,
	REASON_FRAGMENT_UNKNOWN = 75,
	REASON_ERROR_FORWARDED = 76,
	REASON_ERROR_UNKNOWN = 77,
	REASON_NO_ROOM = 78,
	REASON_VIA_STACK = 79,

	/* DsrBalancer */
	REASON_OFF_LINK = 80,
	REASON_PROBED = 81,
	REASON_NOT_A_PROBE = 82,

	/* NatBalancer */
	REASON_ANSWERED = 90,
	REASON_NO_CONNECTION = 91,
	REASON_CONNECTIONS_FULL = 92,
	REASON_PORTS_EXHAUSTED = 93,
	REASON_BACKEND_IS_CLIENT = 94,
	REASON_BACKEND_KILLED = 95,
	REASON_RESET_SENT = 96,
	REASON_CONNECTION_RACE = 97,

	/* Both balancers again: what they neither balance nor answer, or cannot send */
	REASON_MARTIAN_SOURCE = 100,
	REASON_ANSWER_LIMITED = 101,
	REASON_ROUTING_HEADER = 102,
	REASON_NO_EGRESS = 103,

	/* TunnelDecap */
	REASON_DECAPSULATED = 110,
	REASON_NOT_TUNNEL = 111,
	REASON_TUNNEL_FRAGMENT = 112,
	REASON_TUNNEL_NOT_VIP = 113,
	REASON_TUNNEL_DESTINATION = 114,
	REASON_TUNNEL_SOURCE = 115,
	REASON_INNER_MALFORMED = 116,
	REASON_INNER_SOURCE = 117,
	REASON_INNER_ECN = 118,
};

#define REASON_FIRST_UNSUPPORTED REASON_VLAN_TOO_DEEP
#define REASON_FIRST_OF_STAGES REASON_PROTOCOL_ACTION

/* Room for reasons to come, and the five XDP actions rounded up so that the index is a shift. */
#define XDPKIT_REASONS 128
#define XDPKIT_ACTIONS 8
#define XDPKIT_OWN_COUNTS 64

struct xdpkit_count {
	__u64 packets;
	__u64 bytes; /* of the whole frame, Ethernet header included, FCS not */
};

struct xdpkit_counters {
	struct xdpkit_count count[XDPKIT_REASONS][XDPKIT_ACTIONS];
	struct xdpkit_count own[XDPKIT_OWN_COUNTS]; /* what a stage counts besides, by an enum of its own */
};

#pragma clang diagnostic pop

#endif
