// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * What a rate limiter is judged by: a token bucket as the textbooks have it, under a lock, by the nanosecond clock. It is
 * offered each packet just before the program under test, so that it knows what was asked for and when, and counts what one
 * may admit of it. Driven by lab/src/bench/token_bucket.rs.
 */
#include "../../bpf/include/kernel.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

const volatile __u64 cost = 1;  /* ns that a packet takes */
const volatile __u64 depth = 1; /* ns that the burst takes */

struct bpf_spin_lock {
	__u32 val;
};

struct token_bucket {
	struct bpf_spin_lock lock;
	__u32 started;
	__u64 first;    /* ns: when the first packet came */
	__u64 last;     /* and the last */
	__u64 credit;   /* ns */
	__u64 offered;
	__u64 admitted;
	__u64 lost;     /* ns of credit that nobody asked for while the bucket was full */
	__u64 overflows; /* in so many gaps */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct token_bucket);
} bucket SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} under_test SEC(".maps");

SEC("xdp.frags")
int token_bucket(struct xdp_md *ctx)
{
	struct token_bucket *b;
	__u32 zero = 0;
	__u64 now;

	b = bpf_map_lookup_elem(&bucket, &zero);
	if (!b)
		return XDP_ABORTED;
	now = bpf_ktime_get_ns();
	bpf_spin_lock(&b->lock);
	if (!b->started) {
		b->started = 1;
		b->first = now;
		b->last = now;
		b->credit = depth;
	}
	/* Another CPU may have read the clock later and be first here. */
	if (now > b->last) {
		b->credit += now - b->last;
		b->last = now;
		if (b->credit > depth) {
			b->lost += b->credit - depth;
			b->credit = depth;
			b->overflows++;
		}
	}
	b->offered++;
	if (b->credit >= cost) {
		b->credit -= cost;
		b->admitted++;
	}
	bpf_spin_unlock(&b->lock);
	bpf_tail_call_static(ctx, &under_test, 0);
	return XDP_ABORTED;
}
