/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The keys of sources in the tables of buckets and bans. */
#ifndef XDPKIT_RATE_KEYS_H
#define XDPKIT_RATE_KEYS_H

#include "flow_keys.h"
#include "../abi/rate_limiter.h"

/* A source, masked by its prefix length. IPv4: the address in `high`, and `low` is 0. */
struct rate_source {
	__be64 high;
	__be64 low;
	__u32 ipv6;
	__u32 wide; /* IPv6, and more than 64 bits count */
};

/* IPv4, and IPv6 sources that are not wide, under a scope and meter. */
static __always_inline __u64 rate_key_exact(const struct flow_table *t, const struct rate_source *s, __u64 tag)
{
	__u64 key;

	if (!s->ipv6)
		return flow_key(t, s->high | tag << 32);
	/* Exact for each tag; across tags and families, two keys are equal by chance once in 2^64 pairs. */
	key = flow_key(t, s->high ^ ((tag + 1) * t->secret[4]));
	return key < FLOW_KEY_MIN ? key + FLOW_KEY_MIN : key;
}

/* All others, and all bans. */
static __always_inline __u64 rate_key_hash(const struct flow_table *t, const struct rate_source *s, __u64 tag)
{
	__u32 words[5] = { s->high, s->high >> 32, s->low, s->low >> 32, tag };

	return flow_hash(t, words, 5);
}

#endif
