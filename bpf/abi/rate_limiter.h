/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What RateLimiter shares with Rust. Mirrored by src/abi/rate_limiter.rs. */
#ifndef XDPKIT_ABI_RATE_LIMITER_H
#define XDPKIT_ABI_RATE_LIMITER_H

#include "reason.h"

#pragma clang diagnostic push
#pragma clang diagnostic error "-Wpadded"

#define RATE_SCOPES 8
#define RATE_CLASSES 64 /* 0: sources that no tier is about */

enum rate_meter {
	RATE_PACKETS = 0,
	RATE_BYTES = 1,
	RATE_EXCESS_PACKETS = 2, /* what was refused: too much of it leads to a ban */
	RATE_EXCESS_BYTES = 3,
};
#define RATE_METERS 4

/*
 * A bucket (a flow table's value): its theoretical arrival time in units of 2^(10 - 6 * unit) ns of CLOCK_MONOTONIC,
 * modulo 2^50; RATE_SEEN after its second packet; RATE_TOLD when an event has told that it is over; and
 * what its key does not say of an IPv6 source.
 */
#define RATE_TIME_BITS 50
#define RATE_TIME_MASK ((1ULL << RATE_TIME_BITS) - 1)
#define RATE_LEAD_END ((1ULL << 48) + (1ULL << 40)) /* no lead comes near that */
#define RATE_UNIT_SHIFT 50
#define RATE_UNITS 4
#define RATE_SEEN (1ULL << 52)
#define RATE_TOLD (1ULL << 53)
#define RATE_IPV6 (1ULL << 54)
#define RATE_TAG_SHIFT 55 /* scope, then meter */
#define RATE_TAG(scope, meter) ((__u64)(scope) | (__u64)(meter) << 3)

/* A limit, one cache line. GCRA: a packet is admitted when the arrival time leads the clock by at most `depth`. */
struct rate_limit {
	__u64 cost;  /* of a packet or a byte, in units and RATE_COST_SHIFT more bits */
	__u64 depth; /* what the burst costs, in units */
	__u64 most;  /* no lead can be greater: it is none then, but the time of a bucket that was idle for long */
	__u32 clock; /* enum rate_clock */
	__u32 unit;
	__u32 left; /* ns to units: first by left, */
	__u32 right; /* then by right */
	__u64 reserved[3];
};
_Static_assert(sizeof(struct rate_limit) == 64, "one cache line");
#define RATE_COST_SHIFT 12

enum rate_clock {
	RATE_NO_LIMIT = 0,
	RATE_JIFFIES = 1,
	RATE_NANOSECONDS = 2,
};

/* Limits by class, scope and meter, then some for the limiter itself; all of that twice: in force, and aside. */
#define RATE_LIMIT_SHARED (RATE_CLASSES * RATE_SCOPES * RATE_METERS)
#define RATE_LIMIT_EVENTS (RATE_LIMIT_SHARED + 1)
#define RATE_LIMITS (RATE_LIMIT_SHARED + 2)

/* What a packet is, and what a scope asks for: all of its bits. */
enum rate_features {
	RATE_IS_IP = 1,
	RATE_IS_TCP = 2,
	RATE_IS_UDP = 4,
	RATE_IS_SYN = 8, /* SYN without ACK */
	RATE_IS_ECHO = 16, /* a request */
	RATE_HAS_PORT = 32,
};

struct rate_scope {
	__u8 needs; /* enum rate_features; 0: unused */
	__u8 reserved;
	__u16 port; /* of the destination, host byte order; 0: any */
};

/* Two of them, in force and aside. */
struct rate_policy {
	__u32 scopes; /* used ones are below */
	__u32 meters; /* bits by enum rate_meter: those that any class has, of packets and bytes */
	struct rate_scope scope[RATE_SCOPES];
	__u32 tiers; /* 1: there are some */
	__u32 roots[2]; /* of the tiers: IPv4, IPv6 */
	__u32 count_only;
	/* --- */
	__u32 unsupported; /* enum xdp_action */
	__u32 neighbours; /* XDP_PASS: ARP and neighbour discovery are not limited */
	__u32 full; /* enum rate_full: sources that find no place */
	__u32 events;
	__be32 mask4;
	__u32 wide6; /* an IPv6 source is more than 64 bits */
	__be64 mask6[2];
	__u64 protect; /* ns for which a source keeps its bucket after it was idle */
	__u64 ban; /* ns; 0: nobody is banned for exceeding a limit */
	__u64 tick; /* ns */
	__u32 tier_bank; /* the records of the tiers in force: 0 or 1 */
	__u32 ban_factor; /* only for Rust */
	/* What most packets need is in the same place: */
	__u32 single; /* 1 + the meter of the only limit that a class has, in the first scope; 0: there are more, or none */
	__u32 reserved;
	struct rate_limit only; /* that of sources without a tier */
};

enum rate_full {
	RATE_FULL_DROP = 0,
	RATE_FULL_PASS = 1,
	RATE_FULL_SHARE = 2,
};

/* A leaf of the tiers: a class, and above it the length of the prefix. */
#define RATE_LEAF_CLASS 0xff
#define RATE_LEAF_LENGTH_SHIFT 8
#define RATE_LEAF_EXEMPT 62
#define RATE_LEAF_BLOCKED 63

/* What all packets write, each in a cache line of its own. */
struct rate_shared {
	__u32 in_force; /* policy and limits: 0 or 1 */
	__u32 reserved;
	__u64 banned_until; /* ns: no ban ends later */
	__u64 jiffies_offset; /* what jiffies, in ns, are ahead of CLOCK_MONOTONIC; 0: not known yet */
	__u64 reserved_too[5];
	__u64 share; /* arrival time of the sources that have no place */
	__u64 reserved_three[7];
	__u64 told; /* arrival time of events */
	__u64 reserved_four[7];
};

/*
 * By class and scope, a CPU. Those of class 0 are not here, see RATE_OWN_SCOPES, which only grow: in their place stands
 * what they were when the scope came to its place.
 */
struct rate_count {
	struct xdpkit_count admitted;
	struct xdpkit_count refused;
};

/* The stage's own counts. */
enum rate_own {
	RATE_OWN_BANS = 0,
	RATE_OWN_BANS_REFUSED = 1, /* the table of bans was full */
	RATE_OWN_EVENTS_HELD = 2,  /* not reported: there were too many */
	RATE_OWN_SCOPES = 16,      /* sources without a tier: admitted and refused, by scope */
};

/* A source as the addresses beside buckets and bans have it, IPv4 in the first four bytes. */
struct rate_address {
	__be64 address[2];
};

/* A ban (a flow table's value): the time of CLOCK_MONOTONIC in ns when it ends, all ones for never. */
#define RATE_BAN_TIME ((1ULL << 59) - 1)
#define RATE_BAN_IPV6 (1ULL << 59)

/* Only for Rust, to adopt: rates in the user's terms, of the tiers' classes, the scopes, and the limiter itself. */
#define RATE_RECORD_SCOPES RATE_CLASSES
#define RATE_RECORD_SHARED (RATE_CLASSES + RATE_SCOPES)
#define RATE_RECORD_EVENTS (RATE_RECORD_SHARED + 1)
#define RATE_RECORDS (RATE_RECORD_SHARED + 2)

struct rate_record {
	__u64 amount[2]; /* of packets and bytes; 0: no limit */
	__u64 per[2]; /* ns */
	__u64 burst[2];
};

struct rate_tier {
	__be64 address[2];
	__u32 class;
	__u8 length;
	__u8 ipv6;
	__u8 used;
	__u8 reserved;
};

/* What an event is about: packet_event.detail. */
#define RATE_DETAIL_BAN (1U << 31)
#define RATE_DETAIL_METER_SHIFT 16
#define RATE_DETAIL_SCOPE_SHIFT 8

#pragma clang diagnostic pop

#endif
