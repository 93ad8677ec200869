// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* RateLimiter: each source prefix may send so much of each kind of traffic, by a limit of its tier; else it is dropped. */
#include "include/kernel.h"
#include "include/event.h"
#include "include/parse.h"
#include "include/stage.h"
#include "include/lpm_table.h"
#include "include/neighbour.h"
#include "include/bans.h"
#include "abi/rate_limiter.h"

/* By class and scope. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, RATE_CLASSES * RATE_SCOPES);
	__type(key, __u32);
	__type(value, struct rate_count);
} scope_counts SEC(".maps");

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
	__u64 bytes;
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
	charge->amount = meter == RATE_BYTES ? q->bytes : 1;
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
		after = rate_after(limit, index, bucket, now, gcra_cost(limit, meter == RATE_BYTES ? q->bytes : 1));
		if (!after)
			return bucket & RATE_TOLD ? RATE_REFUSED_AGAIN : RATE_REFUSED;
		if (flow_update(&e, after))
			return RATE_ADMITTED;
	}
	return charge_in_scope(q, 0, meter);
}

__attribute__((noinline, weak)) int refund_kept(__u32 at)
{
	__u32 zero = 0;
	struct rate_charges *mine = bpf_map_lookup_elem(&charges, &zero);

	if (mine)
		rate_refund(&mine->charge[at & (RATE_SCOPES * 2 - 1)]);
	return 0;
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
		for (__u32 j = 0; j < RATE_SCOPES * 2 && j < *(volatile __u32 *)&mine->done; j++)
			refund_kept(j);
		count_scope(counters, q->class, i / 2, q->bytes, false);
		verdict.outcome = outcome;
		verdict.scope = i / 2;
		verdict.meter = i & 1;
		verdict.matched = 1;
		return verdict.packed;
	}
	verdict.matched = mine->matched != 0;
	if (mine->unknown) {
		verdict.outcome = RATE_NO_PLACE;
		return verdict.packed;
	}
	for (__u32 scope = 0; scope < RATE_SCOPES; scope++) {
		if (*(volatile __u32 *)&mine->admitted >> scope & 1)
			count_scope(counters, q->class, scope, q->bytes, true);
	}
	return verdict.packed;
}

/* A bucket of the limiter's own: a word that all CPUs share. */
static __always_inline bool admit_shared(const struct rate_limit *limit, __u64 *word, __u64 now)
{
	__u64 units = gcra_now(limit, now), cost = gcra_cost(limit, 1), was, lead;

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

/* Whether a packet of a source that has no place may pass. */
__attribute__((noinline, weak)) bool admit_unknown(__u32 bank)
{
	__u32 zero = 0, index = bank * RATE_LIMITS + RATE_LIMIT_SHARED;
	struct rate_policy *policy = bpf_map_lookup_elem(&policies, &bank);
	struct rate_limit *limit = bpf_map_lookup_elem(&limits, &index);
	struct rate_shared *all = bpf_map_lookup_elem(&shared, &zero);

	if (!policy || !limit || !all || policy->full == RATE_FULL_DROP)
		return false;
	return policy->full == RATE_FULL_PASS || admit_shared(limit, &all->share, rate_now(policy, all, limit->clock));
}

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
	if (!admit_shared(limit, &all->told, bpf_ktime_get_ns())) {
		count_one(&counters->own[RATE_OWN_EVENTS_HELD], 0);
		return 0;
	}
	parse(ctx, &p);
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
	__u32 zero = 0, bank, index, answer = 0, outcome;
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
	all = bpf_map_lookup_elem(&shared, &zero);
	mine = bpf_map_lookup_elem(&charges, &zero);
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
	charge->amount = meter == RATE_BYTES ? q->bytes : 1;
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
	__u32 zero = 0, reason, action = XDP_PASS, index, detail = 0, notes;
	union verdict verdict = { .packed = 0 };
	struct rate_policy *policy;
	struct rate_shared *all;
	struct rate_limit *limit;
	struct question q;
	struct packet p;
	__u64 banned, now;

	all = bpf_map_lookup_elem(&shared, &zero);
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
	case RATE_NO_PLACE:
		reason = REASON_UNKNOWN_SOURCE;
		action = admit_unknown(q.bank) ? XDP_PASS : XDP_DROP;
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
