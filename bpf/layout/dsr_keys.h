/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The keys of flows whose slot is in transition. */
#ifndef XDPKIT_DSR_KEYS_H
#define XDPKIT_DSR_KEYS_H

#include "flow_keys.h"
#include "../abi/dsr_balancer.h"

enum transit_what {
	TRANSIT_SYN = 1,
	TRANSIT_END = 2, /* FIN or RST */
	TRANSIT_UDP = 4,
	TRANSIT_LOOK = 8,  /* not a packet of the flow: leave no trace */
	TRANSIT_SIDE = 16, /* addresses and ports do not fit into a key */
	TRANSIT_CURRENT = 32, /* of no flow: any backend will do */
};

/* A packet for a slot, in transition or not. All that is known of it, once: the stack of a program is short. */
struct transit {
	any_u64 client[2]; /* IPv4: the first four bytes, then zeroes */
	__u32 ports; /* the service's in the upper half, as they stand in the packet */
	__u32 service;
	__u32 slot; /* among all */
	__u32 word;
	__u32 what; /* enum transit_what */
	__u32 backend; /* for the caller: what it comes to */
};

/* Services have 12 bits, so an IPv4 address, a port and a service are below 2^60: the key is exact. */
static __always_inline __u64 transit_key(const struct flow_table *table, const struct transit *t)
{
	__u32 words[6];

	if (!(t->what & TRANSIT_SIDE))
		return flow_key(table, (__u64)(__u32)t->client[0] << 28 | (__u64)(t->ports & 0xffff) << 12 | t->service);
	words[0] = t->client[0];
	words[1] = t->client[0] >> 32;
	words[2] = t->client[1];
	words[3] = t->client[1] >> 32;
	words[4] = t->ports;
	words[5] = t->service;
	return flow_hash(table, words, 6);
}

#endif
