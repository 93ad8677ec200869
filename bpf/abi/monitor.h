/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What PacketMonitor shares with Rust. Mirrored by src/abi/monitor.rs. */
#ifndef XDPKIT_ABI_MONITOR_H
#define XDPKIT_ABI_MONITOR_H

#include "packet.h"
#include "reason.h"

#pragma clang diagnostic push
#pragma clang diagnostic error "-Wpadded"

/*
 * Index of the stage's own counts. A well-formed packet counts once for its network and, where there is one,
 * once for its transport.
 */
enum monitor_protocol {
	MONITOR_OTHER = 0,
	MONITOR_ARP = 1,
	MONITOR_IPV4 = 2,
	MONITOR_IPV6 = 3, /* up to here: enum packet_network */
	MONITOR_TCP = 4,
	MONITOR_UDP = 5,
	MONITOR_ICMP = 6,
	MONITOR_ICMPV6 = 7,
	MONITOR_OTHER_TRANSPORT = 8,
};
#define MONITOR_PROTOCOLS 16

struct monitor_settings {
	__u32 sample; /* every n-th packet becomes an event; 0: none */
	/* XDP action + 1 by enum monitor_protocol; 0: not set. The transport's goes before the network's. */
	__u8 action[MONITOR_PROTOCOLS];
};

struct monitor_events_state {
	__u64 seen; /* packets since the start, for the sampling */
	__u64 lost; /* events that found the ring full */
};

struct monitor_event {
	__u64 timestamp; /* ns, CLOCK_MONOTONIC */
	__u32 interface; /* ifindex */
	__u32 rx_queue;
	__u32 bytes; /* of the frame */
	__be16 ether_type;
	__be16 vlan_tci[PACKET_VLANS_MAX];
	__be16 source_port; /* ports: TCP and UDP, else 0 */
	__be16 destination_port;
	__u8 source_mac[6];
	__u8 destination_mac[6];
	__u8 vlans;
	__u8 network;   /* enum packet_network */
	__u8 protocol;  /* IANA number; 0 without IP */
	__u8 fragment;  /* enum packet_fragment */
	__u8 hop_limit; /* or TTL */
	__u8 transport; /* 1: a transport header was read */
	__u8 tcp_flags;
	__u8 icmp_type;
	__u8 icmp_code;
	__u8 reason; /* enum xdpkit_reason */
	__u8 action; /* enum xdp_action */
	__u8 reserved[3];
	__u8 source[16]; /* IPv4: the first four bytes */
	__u8 destination[16];
};
_Static_assert(sizeof(struct monitor_event) == 88 && __builtin_offsetof(struct monitor_event, source) == 56,
	       "src/abi/monitor.rs asserts the same");

#pragma clang diagnostic pop

#endif
