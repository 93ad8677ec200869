// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* RateLimiter: each source prefix may send so much of each kind of traffic, by a limit of its tier; else it is dropped. */
#include "include/kernel.h"
#include "include/parse.h"
#include "include/stage.h"
#include "layout/lpm_table.h"
#include "include/neighbour.h"
#include "include/rate_charge.h"
#include "include/rate_excess.h"
#include "include/merged.h"
#include "abi/rate_limiter.h"

/* Only Rust uses them: rates as they were asked for, and the tiers, in two banks. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, RATE_RECORDS);
	__type(key, __u32);
	__type(value, struct rate_record);
} records SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct rate_tier);
} tiers SEC(".maps");

static __always_inline void source_of(struct rate_source *s, const struct packet *p, const struct rate_policy *policy)
{
	const __be64 *half;

	s->low = 0;
	s->ipv6 = p->network == NETWORK_IPV6;
	s->wide = 0;
	if (!s->ipv6) {
		s->high = p->ip4->saddr & policy->mask4;
		return;
	}
	half = (const __be64 *)&p->ip6->saddr;
	s->high = half[0] & policy->mask6[0];
	if (policy->wide6) {
		s->wide = 1;
		s->low = half[1] & policy->mask6[1];
	}
}

static __always_inline __u32 class_of(const struct rate_policy *policy, const struct packet *p)
{
	__u32 leaf;

	if (p->network == NETWORK_IPV4)
		leaf = lpm_lookup4(policy->roots[0], p->ip4->saddr);
	else
		leaf = lpm_lookup6(policy->roots[1], &p->ip6->saddr);
	return leaf & RATE_LEAF_CLASS & (RATE_CLASSES - 1);
}

SEC("xdp.frags")
int rate_limiter(struct xdp_md *ctx)
{
	struct xdpkit_counters *counters = stage_counters();
	__u32 index = 0, reason, action = XDP_PASS, detail = 0, notes;
	union verdict verdict = { .packed = 0 };
	struct rate_policy *policy;
	struct rate_shared *all;
	struct rate_limit *limit;
	struct question q;
	struct packet p;
	__u64 banned, now;

	all = bpf_map_lookup_elem(&shared, &index);
	if (!counters || !all)
		return XDP_ABORTED;
	q.bank = *(volatile __u32 *)&all->in_force & 1;
	policy = bpf_map_lookup_elem(&policies, &q.bank);
	if (!policy)
		return XDP_ABORTED;
	reason = parse(ctx, &p);
	q.bytes = frame_bytes(ctx, &p);

	if (reason != REASON_NONE) {
		action = reason >= REASON_FIRST_UNSUPPORTED ? policy->unsupported : XDP_DROP;
		return stage_end(ctx, counters, q.bytes, reason, action);
	}
	if (p.network < NETWORK_IPV4) {
		reason = p.network == NETWORK_ARP ? REASON_ARP : REASON_NOT_IP;
		return stage_end(ctx, counters, q.bytes, reason, XDP_PASS);
	}
	if (policy->neighbours == XDP_PASS && is_neighbour_discovery(&p))
		return stage_end(ctx, counters, q.bytes, REASON_NEIGHBOUR_DISCOVERY, XDP_PASS);

	q.packets = segments(ctx, &p);
	source_of(&q.source, &p, policy);
	banned = FLOW_ONCE(all->banned_until);
	if (banned) {
		now = rate_now(policy, all, RATE_JIFFIES);
		if (banned > now && ban_until(&q.source) > now) {
			reason = REASON_BANNED;
			action = XDP_DROP;
			goto out;
		}
	}
	q.class = 0;
	if (policy->tiers) {
		q.class = class_of(policy, &p);
		if (q.class == RATE_LEAF_EXEMPT) {
			reason = REASON_EXEMPT;
			goto out;
		}
		if (q.class == RATE_LEAF_BLOCKED) {
			reason = REASON_BLOCKED;
			action = XDP_DROP;
			goto out;
		}
	}
	reason = REASON_NO_LIMIT;
	if (policy->single) {
		verdict.meter = (policy->single - 1) & 1;
		q.features = RATE_IS_IP;
		q.port = 0;
		if (policy->scope[0].needs != RATE_IS_IP) {
			q.features = features_of(&p, &q.port);
			if (!in_scope(&policy->scope[0], q.features, q.port))
				goto out;
		}
		index = limit_index(q.bank, q.class, 0, verdict.meter);
		limit = q.class ? bpf_map_lookup_elem(&limits, &index) : &policy->only;
		if (!limit || limit->clock == RATE_NO_LIMIT)
			goto out;
		verdict.outcome = charge_one(&q, policy, all, limit, index, verdict.meter);
		if (verdict.outcome == RATE_ADMITTED) {
			count_scope(counters, q.class, 0, q.bytes, true);
			return stage_end(ctx, counters, q.bytes, REASON_WITHIN_LIMIT, XDP_PASS);
		}
		if (verdict.outcome != RATE_NO_PLACE)
			count_scope(counters, q.class, 0, q.bytes, false);
		else if (admit_unknown(q.bank, q.packets))
			verdict.outcome = RATE_ADMITTED_UNKNOWN;
	} else {
		if (!policy->scopes)
			goto out;
		q.features = features_of(&p, &q.port);
		verdict.packed = charge_all(&q, policy, counters);
		if (!verdict.matched)
			goto out;
	}
	switch (verdict.outcome) {
	case RATE_ADMITTED:
		reason = REASON_WITHIN_LIMIT;
		break;
	case RATE_ADMITTED_UNKNOWN:
		reason = REASON_UNKNOWN_SOURCE;
		break;
	case RATE_NO_PLACE:
		reason = REASON_UNKNOWN_SOURCE;
		action = XDP_DROP;
		break;
	case RATE_LOST_RACES:
		reason = REASON_CONTENDED;
		action = XDP_DROP;
		break;
	default:
		reason = verdict.meter == RATE_BYTES ? REASON_OVER_BYTES : REASON_OVER_PACKETS;
		action = XDP_DROP;
		if (policy->ban || (policy->events && verdict.outcome == RATE_REFUSED)) {
			notes = note_excess(&q, verdict.scope, verdict.meter, verdict.outcome == RATE_REFUSED_AGAIN);
			detail = (__u32)verdict.meter << RATE_DETAIL_METER_SHIFT |
				 (__u32)verdict.scope << RATE_DETAIL_SCOPE_SHIFT | q.class;
			if (policy->count_only && notes)
				report_excess(ctx, REASON_WOULD_DROP, XDP_PASS, notes & EXCESS_BANNED ? detail | RATE_DETAIL_BAN : detail, q.bank);
			else if (notes)
				report_excess(ctx, reason, action, notes & EXCESS_BANNED ? detail | RATE_DETAIL_BAN : detail, q.bank);
		}
	}
out:
	if (action == XDP_DROP && policy->count_only) {
		reason = REASON_WOULD_DROP;
		action = XDP_PASS;
	}
	return stage_end(ctx, counters, q.bytes, reason, action);
}
