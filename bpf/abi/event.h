/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A packet as events report it. Mirrored by src/abi/event.rs. */
#ifndef XDPKIT_ABI_EVENT_H
#define XDPKIT_ABI_EVENT_H

#include "packet.h"
#include "reason.h"

#pragma clang diagnostic push
#pragma clang diagnostic error "-Wpadded"

struct events_state {
	__u64 seen; /* packets since the start, for the sampling */
	__u64 lost; /* events that found the ring full */
};

/* Bytes of the frame that an event carries: all headers that the parser reads, but for unusual ones. */
#define EVENT_FRAME_BYTES 128

struct packet_event {
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
	__u32 detail; /* of the stage: what decided; 0: nothing particular */
	__u32 captured; /* bytes of `frame` that are valid */
	__u8 frame[EVENT_FRAME_BYTES]; /* its beginning, as the program found it */
};
_Static_assert(sizeof(struct packet_event) == 224 && __builtin_offsetof(struct packet_event, source) == 56,
	       "src/abi/event.rs asserts the same");

#pragma clang diagnostic pop

#endif
