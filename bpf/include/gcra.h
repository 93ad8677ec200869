/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The generic cell rate algorithm (ITU-T I.371) in one word: the theoretical arrival time of the next packet. It leads
 * the clock by what the bucket holds; a packet adds its cost to the lead, and is refused when that would be more than
 * the burst's. An idle bucket has no lead, whatever its word says, and equals a bucket that was never used.
 *
 * Times are counted modulo 2^50 units. A lead greater than any can be is the time of a bucket idle for long, not
 * one of the future; `most` leaves a second for CPUs whose clocks disagree. (A bucket that sleeps for just as long as
 * the count takes to come round, 36 years to 73 minutes by the limit's rate, may look full for as long as its burst.
 * Who knows the bucket but not its limit, as who looks for room, takes it for full in the last quarter of that time.)
 * A clock that went back makes the lead greater: nothing is given away.
 */
#ifndef XDPKIT_GCRA_H
#define XDPKIT_GCRA_H

#include "kernel.h"
#include "../abi/rate_limiter.h"

static __always_inline __u64 gcra_now(const struct rate_limit *limit, __u64 now)
{
	return (now << (limit->left & 63)) >> (limit->right & 63);
}

static __always_inline __u64 gcra_cost(const struct rate_limit *limit, __u64 amount)
{
	return (amount * limit->cost + (1 << RATE_COST_SHIFT) - 1) >> RATE_COST_SHIFT;
}

/* What a time in the limit's units leads by. */
static __always_inline __u64 gcra_lead(const struct rate_limit *limit, __u64 time, __u64 now_units)
{
	__u64 lead = (time - now_units) & RATE_TIME_MASK;

	return lead > limit->most ? 0 : lead;
}

/* A bucket's lead in ns, less than zero when it is idle, by the bucket alone. */
static __always_inline __s64 gcra_lead_ns(__u64 bucket, __u64 now)
{
	__u32 unit = bucket >> RATE_UNIT_SHIFT & (RATE_UNITS - 1);
	__u32 left = unit < 2 ? 0 : 6 * unit - 10, right = unit < 2 ? 10 - 6 * unit : 0;
	__s64 lead = bucket - ((now << left) >> right);

	/* From one more than any lead on, it is of the past. */
	lead = ((lead - (RATE_LEAD_END + 1)) & RATE_TIME_MASK) + RATE_LEAD_END - RATE_TIME_MASK;
	return (__s64)((__u64)lead << right) >> left;
}

/* A time of a bucket whose limit had other units before it was changed. */
static __always_inline __u64 gcra_convert(const struct rate_limit *limit, __u64 bucket, __u64 now)
{
	__s64 lead = gcra_lead_ns(bucket, now);

	if (lead < 0)
		lead = 0;
	return gcra_now(limit, now) + (((__u64)lead << (limit->left & 63)) >> (limit->right & 63));
}

#endif
