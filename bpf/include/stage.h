/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What makes a program a stage: it counts every packet once, by reason and action, and hands a
 * packet that may go on to the next stage of the chain.
 */
#ifndef XDPKIT_STAGE_H
#define XDPKIT_STAGE_H

#include "kernel.h"
#include "parse.h"
#include "../abi/reason.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* This instance's successor. Empty in the last stage: the chain then ends with XDP_PASS. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} next_stage SEC(".maps");

/* One value with all counters: user space reads them in one call. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct xdpkit_counters);
} counters SEC(".maps");

/* This CPU's counters. NULL cannot be, but the verifier wants it looked at. */
static __always_inline struct xdpkit_counters *stage_counters(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&counters, &zero);
}

/* No lock is needed: XDP does not migrate and is not re-entered on a CPU. */
static __always_inline void count_one(struct xdpkit_count *count, __u64 bytes)
{
	count->packets++;
	count->bytes += bytes;
}

/* The one way out of a stage. */
static __always_inline int stage_end(struct xdp_md *ctx, struct xdpkit_counters *all, __u64 bytes, __u32 reason,
				     __u32 action)
{
	count_one(&all->count[reason & (XDPKIT_REASONS - 1)][action & (XDPKIT_ACTIONS - 1)], bytes);
	if (action == XDP_PASS)
		bpf_tail_call_static(ctx, &next_stage, 0);
	return action;
}

#endif
