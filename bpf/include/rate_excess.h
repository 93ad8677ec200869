/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What comes of a packet that is over a limit, or whose source has no place: shared allowances, events, bans. */
#ifndef XDPKIT_RATE_EXCESS_H
#define XDPKIT_RATE_EXCESS_H

#include "locate.h"
#include "bans.h"
#include "event.h"
#include "rate_charge.h"

/* Reports, unless there were too many events. */
__attribute__((noinline, weak)) int report_excess(struct xdp_md *ctx, __u32 reason, __u32 action, __u32 detail,
						   __u32 bank)
{
	__u32 zero = 0, index = bank * RATE_LIMITS + RATE_LIMIT_EVENTS;
	struct rate_policy *policy = bpf_map_lookup_elem(&policies, &bank);
	struct rate_limit *limit = bpf_map_lookup_elem(&limits, &index);
	struct events_state *state = bpf_map_lookup_elem(&events_state, &zero);
	struct rate_shared *all = bpf_map_lookup_elem(&shared, &zero);
	struct xdpkit_counters *counters = stage_counters();
	struct packet p;

	if (!policy || !limit || !all || !state || !counters || !policy->events)
		return 0;
	if (!admit_shared(limit, &all->told, bpf_ktime_get_ns(), 1)) {
		count_one(&counters->own[RATE_OWN_EVENTS_HELD], 0);
		return 0;
	}
	parse_again(ctx, &p);
	if (!report(ctx, &p, frame_bytes(ctx, &p), reason, action, detail))
		state->lost++;
	return 0;
}

/* What comes of a refused packet besides. */
enum excess {
	EXCESS_TELL = 1, /* the first in a while */
	EXCESS_BANNED = 2,
};

/* A limit was exceeded: was that news, and was it by far too much? Answers bits of enum excess. */
__attribute__((noinline, weak)) __u32 note_excess(struct question *q, __u32 scope, __u32 meter, __u32 told)
{
	__u32 bank, index = 0, answer = 0, outcome;
	struct flow_table *t = buckets_open();
	struct xdpkit_counters *counters = stage_counters();
	struct rate_charge *charge;
	struct rate_charges *mine;
	struct rate_policy *policy;
	struct rate_shared *all;
	struct rate_limit *limit;
	struct flow_entry e;
	__u64 bucket;

	if (!q || !t || !counters)
		return 0;
	bank = q->bank;
	policy = bpf_map_lookup_elem(&policies, &bank);
	all = bpf_map_lookup_elem(&shared, &index);
	mine = bpf_map_lookup_elem(&charges, &index);
	if (!policy || !all || !mine)
		return 0;
	if (!told && buckets_find(t, rate_key(t, &q->source, RATE_TAG(scope, meter)), &e)) {
		bucket = flow_value(e.word);
		/* Of several CPUs, one tells. */
		if (!(bucket & RATE_TOLD) && flow_update(&e, bucket | RATE_TOLD))
			answer |= EXCESS_TELL;
	}
	index = limit_index(bank, q->class, scope, meter + RATE_EXCESS_PACKETS);
	limit = bpf_map_lookup_elem(&limits, &index);
	if (!policy->ban || !limit || limit->clock == RATE_NO_LIMIT)
		return answer;
	/* The packet's own charges are done with. */
	charge = &mine->charge[0];
	charge->source = q->source;
	charge->key = rate_key(t, &q->source, RATE_TAG(scope, meter + RATE_EXCESS_PACKETS));
	charge->now = rate_now(policy, all, limit->clock);
	charge->amount = meter == RATE_BYTES ? q->bytes : q->packets;
	charge->flags = (q->source.ipv6 ? RATE_IPV6 : 0) | RATE_TAG(scope, meter + RATE_EXCESS_PACKETS) << RATE_TAG_SHIFT;
	charge->limit = index;
	charge->bank = bank;
	outcome = rate_charge_again(charge);
	if (outcome != RATE_REFUSED && outcome != RATE_REFUSED_AGAIN)
		return answer;
	if (ban_source(&q->source, charge->now, charge->now + policy->ban)) {
		count_one(&counters->own[RATE_OWN_BANS], q->bytes);
		return answer | EXCESS_BANNED;
	}
	count_one(&counters->own[RATE_OWN_BANS_REFUSED], q->bytes);
	return answer;
}

#endif
