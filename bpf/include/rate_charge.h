/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The limits that a packet is under: which ones are about it, and what it is charged to them. */
#ifndef XDPKIT_RATE_CHARGE_H
#define XDPKIT_RATE_CHARGE_H

#include "buckets.h"
#include "parse.h"
#include "stage.h"

/* By class and scope. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, RATE_CLASSES * RATE_SCOPES);
	__type(key, __u32);
	__type(value, struct rate_count);
} scope_counts SEC(".maps");

/*
 * What is charged for one packet under several limits. One a CPU: XDP is not re-entered. In memory, where the verifier
 * takes the counts for unknown instead of following each of their values.
 */
struct rate_charges {
	struct rate_charge charge[RATE_SCOPES * 2];
	__u32 done;     /* charges that were made */
	__u32 admitted; /* by scope, in bits */
	__u32 matched;  /* limits that are about the packet */
	__u32 unknown;  /* of these, where the source has no place */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct rate_charges);
} charges SEC(".maps");

/* What is asked about a packet. */
struct question {
	struct rate_source source;
	__u32 bytes;
	__u32 packets; /* that the frame stands for: see merged.h */
	__u32 features;
	__u32 port;
	__u32 class;
	__u32 bank;
};

/* What a packet comes to, packed into the scalar that a global function may return. */
union verdict {
	__u64 packed;
	struct {
		__u8 outcome; /* enum rate_outcome */
		__u8 scope;   /* that refused */
		__u8 meter;
		__u8 matched; /* some limit is about the packet */
		__u32 reserved;
	};
};

static __always_inline __u32 features_of(const struct packet *p, __u32 *port)
{
	__u32 features = RATE_IS_IP;

	*port = 0;
	if (p->protocol == IPPROTO_TCP) {
		features |= RATE_IS_TCP;
		if (!p->transport_header)
			return features;
		features |= RATE_HAS_PORT;
		*port = bpf_ntohs(p->tcp->dest);
		if ((p->tcp->flags & 0x12) == 0x02)
			features |= RATE_IS_SYN;
	} else if (p->protocol == IPPROTO_UDP) {
		features |= RATE_IS_UDP;
		if (!p->transport_header)
			return features;
		features |= RATE_HAS_PORT;
		*port = bpf_ntohs(p->udp->dest);
	} else if (p->transport_header) {
		if (p->icmp->type == (p->network == NETWORK_IPV4 ? 8 : 128) && p->icmp->code == 0)
			features |= RATE_IS_ECHO;
	}
	return features;
}

static __always_inline bool in_scope(const struct rate_scope *scope, __u32 features, __u32 port)
{
	__u32 needs = scope->needs;

	return needs && (features & needs) == needs && (!scope->port || scope->port == port);
}

static __always_inline __u32 limit_index(__u32 bank, __u32 class, __u32 scope, __u32 meter)
{
	return bank * RATE_LIMITS + (class * RATE_SCOPES + scope) * RATE_METERS + meter;
}

/* Sources without a tier are counted where this CPU writes anyway. */
static __always_inline void count_scope(struct xdpkit_counters *counters, __u32 class, __u32 scope, __u64 bytes,
					bool admitted)
{
	__u32 index = class * RATE_SCOPES + scope;
	struct rate_count *count;

	if (!class) {
		index = RATE_OWN_SCOPES + 2 * scope + !admitted;
		count_one(&counters->own[index & (XDPKIT_OWN_COUNTS - 1)], bytes);
		return;
	}
	count = bpf_map_lookup_elem(&scope_counts, &index);
	if (count)
		count_one(admitted ? &count->admitted : &count->refused, bytes);
}

/* One of several limits, or the only one in the long run. A global function: verified once, for any scope. */
__attribute__((noinline, weak)) __u32 charge_in_scope(struct question *q, __u32 scope, __u32 meter)
{
	struct flow_table *t = buckets_open();
	__u32 zero = 0, index, bank, outcome;
	struct rate_charge *charge;
	struct rate_charges *mine;
	struct rate_policy *policy;
	struct rate_shared *all;
	struct rate_limit *limit;
	__u64 tag;

	if (!q || !t)
		return RATE_ADMITTED;
	scope &= RATE_SCOPES - 1;
	meter &= 1;
	bank = q->bank;
	policy = bpf_map_lookup_elem(&policies, &bank);
	all = bpf_map_lookup_elem(&shared, &zero);
	mine = bpf_map_lookup_elem(&charges, &zero);
	if (!policy || !all || !mine || !in_scope(&policy->scope[scope], q->features, q->port))
		return RATE_ADMITTED;
	index = limit_index(bank, q->class, scope, meter);
	limit = bpf_map_lookup_elem(&limits, &index);
	if (!limit || limit->clock == RATE_NO_LIMIT)
		return RATE_ADMITTED;
	mine->matched++;
	tag = RATE_TAG(scope, meter);
	/* Kept where the next one goes when nothing comes of it. */
	charge = &mine->charge[mine->done & (RATE_SCOPES * 2 - 1)];
	charge->source = q->source;
	charge->key = rate_key(t, &q->source, tag);
	charge->now = rate_now(policy, all, limit->clock);
	charge->amount = meter == RATE_BYTES ? q->bytes : q->packets;
	charge->flags = (q->source.ipv6 ? RATE_IPV6 : 0) | tag << RATE_TAG_SHIFT;
	charge->limit = index;
	charge->bank = bank;
	outcome = rate_charge_again(charge);
	if (outcome == RATE_ADMITTED) {
		mine->done++;
		mine->admitted |= 1U << scope;
	}
	return outcome;
}

/* The only limit that there is, the usual case. */
static __always_inline __u32 charge_one(struct question *q, const struct rate_policy *policy,
					const struct rate_shared *all, const struct rate_limit *limit, __u32 index,
					__u32 meter)
{
	struct flow_table *t = buckets_open();
	__u64 now, key, bucket, after;
	struct flow_entry e;

	if (!t)
		return RATE_NO_PLACE;
	now = rate_now(policy, all, limit->clock);
	key = rate_key(t, &q->source, RATE_TAG(0, meter));
	if (buckets_find(t, key, &e)) {
		bucket = flow_value(e.word);
		after = rate_after(limit, index, bucket, now, gcra_cost(limit, meter == RATE_BYTES ? q->bytes : q->packets));
		if (!after)
			return bucket & RATE_TOLD ? RATE_REFUSED_AGAIN : RATE_REFUSED;
		if (flow_update(&e, after))
			return RATE_ADMITTED;
	}
	return charge_in_scope(q, 0, meter);
}

/* A bucket of the limiter's own: a word that all CPUs share. */
static __always_inline bool admit_shared(const struct rate_limit *limit, __u64 *word, __u64 now, __u32 amount)
{
	__u64 units = gcra_now(limit, now), cost = gcra_cost(limit, amount), was, lead;

	for (int i = 0; i < RATE_TRIES; i++) {
		was = FLOW_ONCE(*word);
		lead = gcra_lead(limit, was, units);
		if (lead + cost > limit->depth)
			return false;
		if (__sync_val_compare_and_swap(word, was, (units + lead + cost) & RATE_TIME_MASK) == was)
			return true;
	}
	return false;
}

/* Whether so many packets of a source that has no place may pass. */
__attribute__((noinline, weak)) bool admit_unknown(__u32 bank, __u32 packets)
{
	__u32 zero = 0, index = bank * RATE_LIMITS + RATE_LIMIT_SHARED;
	struct rate_policy *policy = bpf_map_lookup_elem(&policies, &bank);
	struct rate_limit *limit = bpf_map_lookup_elem(&limits, &index);
	struct rate_shared *all = bpf_map_lookup_elem(&shared, &zero);

	if (!policy || !limit || !all || policy->full == RATE_FULL_DROP)
		return false;
	return policy->full == RATE_FULL_PASS ||
	       admit_shared(limit, &all->share, rate_now(policy, all, limit->clock), packets);
}

__attribute__((noinline, weak)) int refund_kept(__u32 at)
{
	__u32 zero = 0;
	struct rate_charges *mine = bpf_map_lookup_elem(&charges, &zero);

	if (mine)
		rate_refund(&mine->charge[at & (RATE_SCOPES * 2 - 1)]);
	return 0;
}

static __always_inline void refund_all(const struct rate_charges *mine)
{
	for (__u32 j = 0; j < RATE_SCOPES * 2 && j < *(volatile __u32 *)&mine->done; j++)
		refund_kept(j);
}

/*
 * Every limit that a packet is under. It is charged to all of them, or to none: where one refuses, what the
 * others were charged is given back, and is lost only when another packet of the source was at that bucket in between.
 */
static __always_inline __u64 charge_all(struct question *q, const struct rate_policy *policy,
					struct xdpkit_counters *counters)
{
	union verdict verdict = { .packed = 0 };
	struct rate_charges *mine;
	__u32 zero = 0, outcome;

	mine = bpf_map_lookup_elem(&charges, &zero);
	if (!q || !mine)
		return 0;
	mine->done = 0;
	mine->admitted = 0;
	mine->matched = 0;
	mine->unknown = 0;
	for (__u32 i = 0; i < RATE_SCOPES * 2; i++) {
		if (i / 2 >= policy->scopes)
			break;
		if (!(policy->meters >> (i & 1) & 1))
			continue;
		outcome = charge_in_scope(q, i / 2, i & 1);
		if (outcome == RATE_ADMITTED)
			continue;
		if (outcome == RATE_NO_PLACE) {
			mine->unknown++;
			continue;
		}
		refund_all(mine);
		count_scope(counters, q->class, i / 2, q->bytes, false);
		verdict.outcome = outcome;
		verdict.scope = i / 2;
		verdict.meter = i & 1;
		verdict.matched = 1;
		return verdict.packed;
	}
	verdict.matched = mine->matched != 0;
	if (mine->unknown) {
		verdict.outcome = admit_unknown(q->bank, q->packets) ? RATE_ADMITTED_UNKNOWN : RATE_NO_PLACE;
		if (verdict.outcome == RATE_NO_PLACE)
			refund_all(mine);
		return verdict.packed;
	}
	for (__u32 scope = 0; scope < RATE_SCOPES; scope++) {
		if (*(volatile __u32 *)&mine->admitted >> scope & 1)
			count_scope(counters, q->class, scope, q->bytes, true);
	}
	return verdict.packed;
}

#endif
