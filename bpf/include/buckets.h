/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The rate limiter's buckets: which key a source has under a scope and meter, how a packet is charged, and who
 * may have a bucket when the table is crowded.
 *
 * A bucket that is not idle stays whatever comes, so no source is ever admitted more than its limit. An idle one
 * equals none; it goes when another source needs its place, but not within `protect` after a source was seen a
 * second time: a flood of spoofed sources, each seen once, takes the places of its own kind. A source that finds none is
 * unknown, see rate_full.
 */
#ifndef XDPKIT_BUCKETS_H
#define XDPKIT_BUCKETS_H

#include "gcra.h"
#include "flow_table.h"
#include "../layout/rate_keys.h"

/* Written through mappings by Rust, a word at a time; the bank that is not in force, at leisure. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, struct rate_policy);
} policies SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 2 * RATE_LIMITS);
	__type(key, __u32);
	__type(value, struct rate_limit);
} limits SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct rate_shared);
} shared SEC(".maps");

/* By slot of a bucket, where an IPv6 source is more than the 64 bits that a key tells. Else one entry. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct rate_address);
} bucket_addresses SEC(".maps");

/* `now` in ns, and in its lowest bits (which no clock has) the protection in units of 2^30 ns: see rate_moment(). */
#define RATE_PROTECT_BITS 10

static __always_inline __u64 rate_moment(const struct rate_policy *policy, __u64 now)
{
	/* Never for a shorter time than was asked for. */
	__u64 protect = (policy->protect + (1 << 30) - 1) >> 30;

	if (protect >= 1 << RATE_PROTECT_BITS)
		protect = (1 << RATE_PROTECT_BITS) - 1;
	return (now >> RATE_PROTECT_BITS << RATE_PROTECT_BITS) | protect;
}

static __always_inline __u64 rate_rank(__u64 value, __u64 moment)
{
	__s64 idle = -gcra_lead_ns(value, moment);
	__s64 protect = value & RATE_SEEN ? (moment & ((1 << RATE_PROTECT_BITS) - 1)) << 30 : 0;

	if (idle <= 0 || idle < protect)
		return FLOW_KEEP;
	return FLOW_STALE | idle;
}

FLOW_TABLE(buckets, rate_rank)

#define RATE_TRIES 32

enum rate_outcome {
	RATE_ADMITTED = 0,
	RATE_REFUSED = 1,
	RATE_REFUSED_AGAIN = 2, /* an event has told before */
	RATE_NO_PLACE = 3,
	RATE_LOST_RACES = 4,
	RATE_ADMITTED_UNKNOWN = 5, /* it has no place, and passes as rate_full says */
};

/* What is charged where, for the functions off the common path. */
struct rate_charge {
	struct rate_source source;
	__u64 key;
	__u64 now; /* ns by the limit's clock */
	__u64 amount; /* packets or bytes */
	__u64 flags; /* RATE_IPV6 and the tag, in their place in a bucket */
	__u32 limit; /* index */
	__u32 bank;
	struct flow_claim claim; /* room that the stack does not have */
};

/* Aside: its words would take room on the stack of all others. */
__attribute__((noinline, weak)) __u64 rate_key_wide(struct rate_source *s, __u64 tag)
{
	struct flow_table *t = buckets_open();

	if (!s || !t)
		return FLOW_KEY_MIN;
	return rate_key_hash(t, s, tag);
}

/* The key of a source under a scope and meter. */
static __always_inline __u64 rate_key(const struct flow_table *t, struct rate_source *s, __u64 tag)
{
	return s->ipv6 && s->wide ? rate_key_wide(s, tag) : rate_key_exact(t, s, tag);
}

/* The clock that a limit goes by, in ns of CLOCK_MONOTONIC. */
__attribute__((noinline, weak)) __u64 rate_find_offset(__u64 jiffies_ns)
{
	__u32 zero = 0;
	struct rate_shared *all = bpf_map_lookup_elem(&shared, &zero);
	__u64 offset = jiffies_ns - bpf_ktime_get_ns();

	if (!all)
		return 0;
	if (!offset)
		offset = 1;
	__sync_val_compare_and_swap(&all->jiffies_offset, 0, offset);
	return all->jiffies_offset;
}

static __always_inline __u64 rate_now(const struct rate_policy *policy, const struct rate_shared *all, __u32 clock)
{
	__u64 now, offset;

	if (clock != RATE_JIFFIES)
		return bpf_ktime_get_ns();
	now = bpf_jiffies64() * policy->tick;
	offset = FLOW_ONCE(((struct rate_shared *)all)->jiffies_offset);
	if (!offset)
		offset = rate_find_offset(now);
	return now - offset;
}

/* The limit has changed since, and is counted in other units now: rare, so off the common path. */
__attribute__((noinline, weak)) __u64 rate_convert(__u64 bucket, __u64 now, __u32 index)
{
	struct rate_limit *limit = bpf_map_lookup_elem(&limits, &index);

	return limit ? gcra_convert(limit, bucket, now) : bucket;
}

/* What a bucket is after a packet, or 0 when it refuses. No bucket is 0: it is seen. */
static __always_inline __u64 rate_after(const struct rate_limit *limit, __u32 index, __u64 bucket, __u64 now,
					__u64 cost)
{
	__u64 units = gcra_now(limit, now), time = bucket, lead;

	if ((bucket >> RATE_UNIT_SHIFT & (RATE_UNITS - 1)) != limit->unit)
		time = rate_convert(bucket, now, index);
	lead = gcra_lead(limit, time, units);
	if (lead + cost > limit->depth)
		return 0;
	/* Told of an excess that is over: the next one is news. */
	if (!lead)
		bucket &= ~RATE_TOLD;
	bucket &= ~(RATE_TIME_MASK | (__u64)(RATE_UNITS - 1) << RATE_UNIT_SHIFT);
	return bucket | RATE_SEEN | (__u64)limit->unit << RATE_UNIT_SHIFT | ((units + lead + cost) & RATE_TIME_MASK);
}

/* A source without a bucket: gets one, with this packet in it, where there is room. */
static __always_inline __u32 rate_enter(struct rate_charge *charge, const struct rate_limit *limit)
{
	__u64 cost = gcra_cost(limit, charge->amount), time;
	__u32 bank = charge->bank; /* Linux 6.1 wants keys on the stack */
	struct rate_address *beside;
	struct rate_policy *policy;
	__u32 slot;

	policy = bpf_map_lookup_elem(&policies, &bank);

	if (!policy)
		return RATE_NO_PLACE;
	if (cost > limit->depth)
		return RATE_REFUSED;
	charge->claim.key = charge->key;
	charge->claim.now = rate_moment(policy, charge->now);
	switch (buckets_claim(&charge->claim)) {
	case FLOW_TAKEN:
		break;
	case FLOW_FULL:
		return RATE_NO_PLACE;
	default:
		return RATE_LOST_RACES;
	}
	if (charge->source.wide) {
		slot = charge->claim.slot;
		beside = bpf_map_lookup_elem(&bucket_addresses, &slot);
		if (beside) {
			beside->address[0] = charge->source.high;
			beside->address[1] = charge->source.low;
		}
	}
	time = gcra_now(limit, charge->now) + cost;
	time = charge->flags | (__u64)limit->unit << RATE_UNIT_SHIFT | (time & RATE_TIME_MASK);
	return buckets_publish(&charge->claim, time) ? RATE_ADMITTED : RATE_LOST_RACES;
}

/* Charges a packet, against other CPUs that are at the same bucket. */
__attribute__((noinline, weak)) __u32 rate_charge_again(struct rate_charge *charge)
{
	struct rate_limit *limit;
	struct flow_entry e;
	struct flow_table *t;
	__u64 after, bucket;
	__u32 outcome, index;

	if (!charge)
		return RATE_NO_PLACE;
	index = charge->limit;
	limit = bpf_map_lookup_elem(&limits, &index);
	if (!limit)
		return RATE_NO_PLACE;
	for (int i = 0; i < RATE_TRIES; i++) {
		/* Each time: the stack has no room to keep it. */
		t = buckets_open();
		if (!t)
			return RATE_NO_PLACE;
		if (!buckets_find(t, charge->key, &e)) {
			outcome = rate_enter(charge, limit);
			if (outcome != RATE_LOST_RACES)
				return outcome;
			continue;
		}
		bucket = flow_value(e.word);
		after = rate_after(limit, charge->limit, bucket, charge->now, gcra_cost(limit, charge->amount));
		if (!after)
			return bucket & RATE_TOLD ? RATE_REFUSED_AGAIN : RATE_REFUSED;
		if (flow_update(&e, after))
			return RATE_ADMITTED;
	}
	return RATE_LOST_RACES;
}

/* Takes a charge back, if nobody was at the bucket since. */
static __always_inline void rate_refund(const struct rate_charge *charge)
{
	struct flow_table *t = buckets_open();
	__u32 index = charge->limit;
	struct rate_limit *limit = bpf_map_lookup_elem(&limits, &index);
	struct flow_entry e;
	__u64 bucket, time;

	if (!t || !limit || !buckets_find(t, charge->key, &e))
		return;
	bucket = flow_value(e.word);
	/* By another policy, it may be counted in other units by now. */
	if ((bucket >> RATE_UNIT_SHIFT & (RATE_UNITS - 1)) != limit->unit)
		return;
	time = (bucket - gcra_cost(limit, charge->amount)) & RATE_TIME_MASK;
	flow_update(&e, (bucket & ~RATE_TIME_MASK) | time);
}

#endif
