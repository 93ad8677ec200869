/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What DsrBalancer shares with Rust. Mirrored by src/abi/dsr_balancer.rs. */
#ifndef XDPKIT_ABI_DSR_BALANCER_H
#define XDPKIT_ABI_DSR_BALANCER_H

#include "next_hop.h"
#include "service.h"

#pragma clang diagnostic push
#pragma clang diagnostic error "-Wpadded"

/* In the flags of a service: packets go inside an outer IP header; else as they are, to a neighbour. */
#define DSR_IPIP 0x100
/* And outer IPv4 packets around those that may be fragmented may be, too: backends put them together. */
#define DSR_OUTER_FRAGMENTS 0x200

/* Times of transitions: 32 bits of CLOCK_MONOTONIC_COARSE in units of 2^24 ns, 16.8 ms. They wrap after two years. */
#define DSR_TIME_SHIFT 24

/*
 * A slot whose upper half names a previous backend is in transition: since when, and when a packet last went to
 * another backend than the slot's present one.
 */
struct dsr_transition {
	__u32 begin;
	__u32 last;
};

/* Times in the unit above. */
struct dsr_settings {
	__u32 idle;     /* a transition is over when nothing was sent elsewhere for so long */
	__u32 longest;  /* and so long after its beginning in any case */
	__u32 udp_grace; /* from when on in a transition an unknown UDP flow is a new one */
	__u32 reserved;
	__be32 outer4;      /* outer source addresses: the prefix, and a mask of the bits that vary by flow */
	__be32 outer4_mask;
	__be64 outer6[2];
	__be64 outer6_mask; /* of the second half */
};

/*
 * Next hops to one backend, by a part of the flow's hash: where a route has several, flows are spread over them, and stay with
 * theirs. The kernel's choice goes by source and ports: those of the first packet stand for all, a few bits changed by path.
 */
#define DSR_PATHS 32

struct dsr_sample {
	__be64 source[2];
	__u32 ports;    /* the destination's in the upper half, as they stand in the packet */
	__u32 protocol; /* and enum packet_network above it; 0: none yet */
};
#define DSR_SAMPLE_NETWORK_SHIFT 8

struct dsr_paths {
	__u64 told; /* what the last event said: the MAC address, enum next_hop_state, and of which path */
	struct dsr_sample sample;
	__u64 choice[DSR_PATHS]; /* see next_hop.h */
};
_Static_assert(sizeof(struct dsr_paths) == 288, "src/abi/dsr_balancer.rs asserts the same");
#define DSR_TOLD_MAC_MASK 0xffffffffffffULL
#define DSR_TOLD_STATE_SHIFT 48
#define DSR_TOLD_PATH_SHIFT 56

/* The value of a recorded flow: its backend, what is known of it, and when it was last seen. */
#define DSR_RECORD_KIND_SHIFT 16
#define DSR_RECORD_SIDE (1ULL << 19) /* what the key leaves out stands beside */
#define DSR_RECORD_TIME_SHIFT 20

enum dsr_record_kind {
	DSR_STAYING = 0,     /* with the previous backend, where it would be sent without a record, too */
	DSR_HALF_OPEN = 1,   /* a SYN was seen */
	DSR_ESTABLISHED = 2, /* and a packet after it; or UDP */
	DSR_CLOSING = 3,     /* a FIN or RST was seen: a SYN begins another flow */
};

/* Of a flow whose addresses and ports do not fit into the key. */
struct dsr_side {
	__be64 client[2];
	__u32 ports; /* the service's in the upper half, as they stand in the packet */
	__u32 service;
	__u64 reserved;
};

/* The next hop to a backend is another than before. */
struct dsr_event {
	__u64 timestamp; /* ns, CLOCK_MONOTONIC */
	__u32 backend;
	__u32 identity;
	__u32 interface;
	__u16 state; /* enum next_hop_state */
	__u8 mac[6];
	__u32 cpu;
};
_Static_assert(sizeof(struct dsr_event) == 32, "src/abi/dsr_balancer.rs asserts the same");

/* In service_state.function */
enum dsr_service_count {
	DSR_IN_TRANSITION = 0, /* packets to slots in transition */
	DSR_RECORDED = 1,      /* flows that were recorded */
	DSR_UNRECORDED = 2,    /* new flows that went to the previous backend, for want of room */
};

#pragma clang diagnostic pop

#endif
