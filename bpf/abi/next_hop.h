/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The next hops that programs send packets to: by whom they are reached, and how a frame to them leaves. Filled by the
 * resolver in user space (src/host), and by programs where it has not come to it or is gone. Mirrored by
 * src/abi/next_hop.rs.
 */
#ifndef XDPKIT_ABI_NEXT_HOP_H
#define XDPKIT_ABI_NEXT_HOP_H

#include "packet.h"

#pragma clang diagnostic push
#pragma clang diagnostic error "-Wpadded"

/* Entries; the first is the head. */
#define NEXT_HOPS 4096
/* An entry is stored at most so far from where the hash of its key says. */
#define NEXT_HOP_PROBES 16

/* What a choice came to. */
enum next_hop_state {
	NEXT_HOP_UNKNOWN = 0,
	NEXT_HOP_FOUND = 1,
	NEXT_HOP_UNRESOLVED = 2, /* the neighbour's MAC is not known */
	NEXT_HOP_OFF_LINK = 3,   /* behind a gateway, where a neighbour is asked for */
	NEXT_HOP_NO_ROUTE = 4,
	NEXT_HOP_BY_STACK = 5,   /* by an interface that only the host's stack can send by */
	NEXT_HOP_DOWN = 6,       /* by a link that is down */
};

enum next_hop_use {
	NEXT_HOP_FREE = 0,
	NEXT_HOP_CLAIMED = 1, /* somebody writes it */
	NEXT_HOP_USED = 2,    /* its key does not change any more */
	NEXT_HOP_LEAVING = 3, /* found no more; free after a new generation and a grace period */
};

/*
 * The key: the neighbour, by the interface that routes name, and the MTU of the route. All else are words that change one
 * by one, each at once.
 */
struct next_hop {
	__be64 address[2]; /* IPv4: the first four bytes, then zeroes */
	__u32 interface;   /* of the route: a bridge, a VLAN, a bond... */
	__u16 mtu;         /* bytes of IP */
	__u8 family;       /* enum packet_network */
	__u8 reserved;
	__u32 use;         /* enum next_hop_use */
	__u32 last_used;   /* jiffies, lower half; no more exact than a second */
	__u64 to;          /* the neighbour's MAC address as in the frame, six bytes, then zeroes; 0: not known */
	__u64 from;        /* ours, the same */
	__u64 egress;      /* see below */
	__u64 spare;
};
_Static_assert(sizeof(struct next_hop) == 64, "one cache line");

/* In the place of the first entry. */
struct next_hop_head {
	__u64 lease;      /* jiffies (64 bits) until when the resolver vouches for the table; 0: it never has */
	__u32 generation; /* another: choose again. From 1 on, below NEXT_HOP_BY_TIME */
	__u32 wanted;     /* programs add one with each entry that they make */
	__u64 reserved[6];
};
_Static_assert(sizeof(struct next_hop_head) == 64, "one cache line");

/* Generations while the lease has lapsed: jiffies in units of 2^this. */
#define NEXT_HOP_BY_TIME 0x80000000U
#define NEXT_HOP_TIME_SHIFT 8

/*
 * How a frame leaves: from the lowest bits on the index of the device that takes it, VLAN ids (the outer one first), their
 * number, which of them are of 802.1ad, and enum next_hop_exit.
 */
#define EGRESS_DEVICE_MASK 0xffffffffULL
#define EGRESS_VLAN0_SHIFT 32
#define EGRESS_VLAN1_SHIFT 44
#define EGRESS_VLANS_SHIFT 56
#define EGRESS_AD0 (1ULL << 58)
#define EGRESS_AD1 (1ULL << 59)
#define EGRESS_EXIT_SHIFT 60

enum next_hop_exit {
	EXIT_NONE = 0,   /* the link is down or gone */
	EXIT_DEVICE = 1, /* by the device, with these tags */
	EXIT_STACK = 2,  /* only the host's stack can send by it */
	EXIT_BRIDGE = 3, /* in `links` only: by the port at which the bridge has the neighbour */
};

/*
 * What is known of an interface as frames come and go, in `links`. Of a key with tags, only `layer3` counts: the interface
 * whose addresses and routes hold for frames that come in by the device with these tags.
 */
struct link_key {
	__u32 device;
	__u32 tags; /* VLAN ids, the outer one in the lower 12 bits; bit 24 on: their number */
};

struct link_info {
	__u64 egress; /* as in an entry */
	__u32 layer3;
	__u32 reserved;
};

/*
 * What a flow or a backend remembers of a choice: the generation in which it was made, and an entry. Of generation 0 is one that
 * leads nowhere yet: what it came to (enum next_hop_state), and the last bits of jiffies then, for it is made again with the
 * next tick. 0: none was made.
 */
#define NEXT_HOP_GENERATION_SHIFT 32
#define NEXT_HOP_STATE_SHIFT 16
#define NEXT_HOP_STATE_MASK 0xffULL
#define NEXT_HOP_TICK_SHIFT 24
#define NEXT_HOP_NUMBER 0xffffULL

#pragma clang diagnostic pop

#endif
