/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the NAT balancer knows of the packet at hand. In a per-CPU map rather than on the stack, of which a program and
 * all functions that it is in have 512 bytes together.
 */
#ifndef XDPKIT_NAT_JOB_H
#define XDPKIT_NAT_JOB_H

#include "service.h"
#include "flow_table.h"
#include "translate.h"
#include "../abi/nat_balancer.h"

/* Who wants a connection, and the search for its place. */
struct nat_wish {
	__be64 client[2];
	__u64 key;  /* of the flow table; made when it is looked into */
	__u64 hash; /* that chooses the slot */
	__u32 service;
	__u32 flags; /* enum nat_flags: the protocol, the family */
	__u32 now;
	__be16 client_port;
	__u16 kept; /* the client's address is */
	/* From here on, nat_open()'s own. */
	__u64 kept_key; /* of the backend's direction, where the client keeps its address */
	__u32 backend; /* that the slot chose; 0: none yet */
	__u32 place;
	__u16 port; /* network order */
	__u16 address;
	__u32 oldest; /* age of the victim so far, and 1 */
	__u32 victim; /* the attempt that led to it */
	__u32 own;    /* places that are taken by connections of the same backend */
};

/* What a packet says to the state of its connection. */
struct nat_segment {
	__u64 word; /* of the record, as nat_step() found it */
	__u32 record;
	__u32 from_backend;
	__u32 tcp_flags;
	__u32 sequence; /* host order */
	__u32 acknowledged;
	__u32 length; /* of the payload */
	__u32 now;
	__u32 reserved;
};

/* Both ends of a packet, as they stand in it. */
struct nat_tuple {
	__be64 source[2];
	__be64 destination[2];
	__be16 source_port;
	__be16 destination_port;
	__u8 protocol;
	__u8 ipv6;
	__u16 reserved;
};

/* Where a packet goes, and as what. */
struct nat_way {
	struct translation to;
	__u64 choice; /* see next_hop.h */
};

/* One CPU's. A packet is handled without another one coming in between. */
struct nat_job {
	struct nat_tuple packet;
	struct nat_wish wish;
	struct nat_segment segment;
	struct nat_way way;
	struct flow_claim claim;
	__u64 bytes; /* of the frame */
	__u32 vip;   /* number of its destination, 0 for none of ours */
	__u32 length; /* of the IP packet */
	__u32 traffic_class;
	__u32 reserved;
	/* What outlives the packet. */
	__u32 tick;  /* jiffies of the count below */
	__u32 asked; /* next hops that were chosen again */
	__be64 unresolved[2]; /* where the last packet was to go that had no known neighbour */
	__u64 unresolved_at;  /* and when, in jiffies */
};

PER_CPU_ARRAY(nat_jobs, struct nat_job);

static __always_inline struct nat_job *nat_job(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&nat_jobs, &zero);
}

#endif
