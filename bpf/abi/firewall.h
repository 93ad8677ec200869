/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What Firewall shares with Rust. Mirrored by src/abi/firewall.rs. */
#ifndef XDPKIT_ABI_FIREWALL_H
#define XDPKIT_ABI_FIREWALL_H

#include "reason.h"

#pragma clang diagnostic push
#pragma clang diagnostic error "-Wpadded"

/* LPM_TRIE keys: the prefix length in bits, host byte order; then the address, network byte order. */
struct firewall_key4 {
	__u32 prefix_length;
	__be32 address;
};

struct firewall_key6 {
	__u32 prefix_length;
	__u8 address[16];
};

/*
 * What a prefix leads to: the index of the first rule to ask. A plain rule applies to every packet for
 * ever, so its decision stands here, and nobody needs to look at the rule. 0: no rule.
 */
#define FIREWALL_LEAF_RULE 0x0fffffff
#define FIREWALL_LEAF_PLAIN 0x10000000
#define FIREWALL_LEAF_DENY 0x20000000 /* of a plain rule */

enum firewall_rule_flags {
	/* Which of the two lists it stands in, and what it does there. */
	FIREWALL_LIST_A = 1,
	FIREWALL_LIST_B = 2,
	FIREWALL_DENY_A = 4,
	FIREWALL_DENY_B = 8,
	/* In that list it is plain, whatever the record says of expiry and counting: the other list may hold it so. */
	FIREWALL_PLAIN_A = 16,
	FIREWALL_PLAIN_B = 32,
	FIREWALL_DESTINATION = 64,
	FIREWALL_PROTOCOL = 128,
	FIREWALL_PORTS = 256,
	FIREWALL_IPV6 = 512,
	FIREWALL_COUNT_ONLY = 1024,
};

/* A rule, one cache line. The data path looks only at those that are not plain. */
struct firewall_rule {
	__u64 expires; /* ns of CLOCK_MONOTONIC; 0: never */
	__u32 next;    /* leaf to go on with when this rule does not apply */
	__u32 counter; /* index of its counter */
	__u32 flags;   /* enum firewall_rule_flags */
	__u8 source_length;
	__u8 destination_length; /* 1 to 128 */
	__u8 protocol;
	__u8 reserved;
	__u16 first_port; /* destination ports, host byte order, both inclusive */
	__u16 last_port;
	__u32 reserved_too;
	__be64 source[2]; /* IPv4: the first four bytes, then zeroes */
	__be64 destination[2];
};
_Static_assert(sizeof(struct firewall_rule) == 64, "one cache line");

#define FIREWALL_FOLLOW_DEFAULT 0xff

/* Verdicts where no rule decides: each enum xdp_action, XDP_PASS or XDP_DROP. */
struct firewall_settings {
	__u32 default_action;
	__u32 not_ip;      /* Ethernet frames that are neither ARP nor IP; or FIREWALL_FOLLOW_DEFAULT */
	__u32 unsupported; /* deeper than the parser looks */
	__u32 neighbours;  /* ARP and IPv6 neighbour discovery; XDP_DROP: the rules decide */
	__u32 engine;      /* enum firewall_engine */
	__u32 list;        /* the list in force, 0 or 1, and FIREWALL_PENDING */
	__u64 deadline;    /* ns of CLOCK_MONOTONIC: a pending list is in force only before */
	__u32 roots[2][2]; /* compiled: by list and family (0: IPv4, 1: IPv6) */
	__u32 count_only;  /* nothing is dropped by the rules or the default */
	__u32 sample;      /* every n-th dropped packet of each CPU becomes an event; 0: none */
	__u32 counters;    /* counters a CPU has for itself; 0: rules are not counted */
	__u32 counters_mask; /* CPUs share a set of counters when they agree in these bits */
	__u32 counters_shared; /* whether any do */
	__u32 reserved;
};

/*
 * What a CPU has yet to add to its counters. A counter in a big list is a cache miss; put off, many of them are waited for
 * at once. An entry is one word, so that readers see it whole: the counter in the upper half, bytes in the lower; 0: none.
 */
#define FIREWALL_UNCOUNTED 62
struct firewall_uncounted {
	__u64 turns; /* odd while entries are being added: a reader has to look again */
	__u32 used;  /* entries; only the program looks at it */
	__u32 reserved;
	__u64 entry[FIREWALL_UNCOUNTED];
};

#define FIREWALL_PENDING 2 /* in `list`: waits for a confirmation */

enum firewall_engine {
	FIREWALL_TRIE = 0,
	FIREWALL_COMPILED = 1,
};

#pragma clang diagnostic pop

#endif
