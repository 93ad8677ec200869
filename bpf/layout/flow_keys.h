/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The keys of a flow table, and the lines that a key may be in. Mirrored by src/flow_table/key.rs. */
#ifndef XDPKIT_FLOW_KEYS_H
#define XDPKIT_FLOW_KEYS_H

#include "../include/kernel.h"
#include "../abi/flow_table.h"

/* The exact key of a number below 2^63. Its inverse is in src/flow_table/key.rs. */
static __always_inline __u64 flow_key(const struct flow_table *t, __u64 number)
{
	number ^= t->secret[0];
	number *= t->secret[1];
	number ^= number >> 32;
	number *= t->secret[2];
	number ^= number >> 32;
	number *= t->secret[3];
	return number ^ number >> 32;
}

/* A tag of `count` words, at most FLOW_HASH_WORDS; the count must be the same for all of a table's keys. */
static __always_inline __u64 flow_hash(const struct flow_table *t, const __u32 *words, __u32 count)
{
	__u64 high = t->secret[2 * FLOW_HASH_WORDS], low = t->secret[2 * FLOW_HASH_WORDS + 1], tag;

	for (__u32 i = 0; i < FLOW_HASH_WORDS; i++) {
		if (i >= count)
			break;
		high += words[i] * t->secret[2 * i];
		low += words[i] * t->secret[2 * i + 1];
	}
	tag = (high >> 32 << 32) | low >> 32;
	return tag < FLOW_KEY_MIN ? tag + FLOW_KEY_MIN : tag;
}

/* The lines that a key may be in, in search order: 0 and 1, and 2 for the stash. */
static __always_inline __u32 flow_line_at(const struct flow_table *t, __u64 key, __u32 candidate)
{
	if (candidate == 0)
		return (key >> 32) * t->lines >> 32;
	if (candidate == 1)
		return (key & 0xffffffff) * t->lines >> 32;
	return t->lines + ((key >> 16 & 0xffffffff) * t->stash >> 32);
}

#endif
