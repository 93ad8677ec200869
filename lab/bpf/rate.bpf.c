// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * What the rate limiter is compared with: the same parser, algorithm, clock and counters, and the kernel's LRU_HASH for the
 * buckets. One limit of packets a source, nothing else. Driven by lab/src/bench/rate.rs.
 */
#include "../../bpf/include/kernel.h"
#include "../../bpf/include/parse.h"
#include "../../bpf/include/stage.h"
#include "../../bpf/include/gcra.h"

struct {
	__uint(type, 9 /* BPF_MAP_TYPE_LRU_HASH */);
	__uint(max_entries, 1);
	__type(key, __u64);
	__type(value, __u64);
} buckets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct rate_limit);
} limit SEC(".maps");

const volatile __u64 tick = 4000000;

SEC("xdp.frags")
int lru_limiter(struct xdp_md *ctx)
{
	__u64 key, now, units, cost, lead, was, fresh, bytes, *bucket;
	struct xdpkit_counters *counters = stage_counters();
	enum xdpkit_reason reason;
	struct rate_limit *l;
	struct packet p;
	__u32 zero = 0;

	l = bpf_map_lookup_elem(&limit, &zero);
	if (!counters || !l)
		return XDP_ABORTED;
	reason = parse(ctx, &p);
	bytes = frame_bytes(ctx, &p);
	if (reason != REASON_NONE)
		return stage_end(ctx, counters, bytes, reason, XDP_DROP);
	if (p.network == NETWORK_IPV4)
		key = p.ip4->saddr;
	else if (p.network == NETWORK_IPV6)
		key = *(const __be64 *)&p.ip6->saddr;
	else
		return stage_end(ctx, counters, bytes, REASON_NOT_IP, XDP_PASS);

	now = bpf_jiffies64() * tick;
	units = gcra_now(l, now);
	cost = gcra_cost(l, 1);
	bucket = bpf_map_lookup_elem(&buckets, &key);
	if (!bucket) {
		fresh = (units + cost) & RATE_TIME_MASK;
		if (!bpf_map_update_elem(&buckets, &key, &fresh, 1 /* BPF_NOEXIST */))
			return stage_end(ctx, counters, bytes, REASON_WITHIN_LIMIT, XDP_PASS);
		bucket = bpf_map_lookup_elem(&buckets, &key);
		if (!bucket)
			return stage_end(ctx, counters, bytes, REASON_UNKNOWN_SOURCE, XDP_DROP);
	}
	for (int i = 0; i < 32; i++) {
		was = *(volatile __u64 *)bucket;
		lead = gcra_lead(l, was, units) + cost;
		if (lead > l->depth)
			return stage_end(ctx, counters, bytes, REASON_OVER_PACKETS, XDP_DROP);
		if (__sync_val_compare_and_swap(bucket, was, (units + lead) & RATE_TIME_MASK) == was)
			return stage_end(ctx, counters, bytes, REASON_WITHIN_LIMIT, XDP_PASS);
	}
	return stage_end(ctx, counters, bytes, REASON_CONTENDED, XDP_DROP);
}
