// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * What any filter pays for verdicts that the processor cannot foresee: programs that parse, load words from a table, the first
 * by the source address and each further one by the word before, and judge by one bit of the last. Driven by lab/src/bench/verdict.rs.
 */
#include "../../bpf/include/kernel.h"
#include "../../bpf/include/parse.h"
#include "../../bpf/include/stage.h"

struct verdict_line {
	__u32 word; /* the lowest bit: drop */
	__u32 reserved[15];
};

/* The number is a power of two, so that a mask does. */
const volatile __u32 line_mask = 0;
const volatile __u32 loads = 1; /* at most LOADS_MAX */

#define LOADS_MAX 3

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, 1U << 10 /* BPF_F_MMAPABLE */);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct verdict_line);
} lines SEC(".maps");

/* The action for a packet, without a branch on the last word: XDP_DROP is one less than XDP_PASS. */
static __always_inline __u32 judge(struct xdp_md *ctx, __u64 *bytes)
{
	enum xdpkit_reason reason;
	struct verdict_line *line;
	__u32 word = 0, index;
	struct packet p;

	reason = parse(ctx, &p);
	*bytes = frame_bytes(ctx, &p);
	if (reason != REASON_NONE || p.network != NETWORK_IPV4)
		return XDP_PASS;
#pragma unroll
	for (__u32 i = 0; i < LOADS_MAX; i++) {
		if (i >= loads)
			break;
		index = ((p.ip4->saddr ^ word) * 0x9e3779b97f4a7c15ULL >> 32) & line_mask;
		line = bpf_map_lookup_elem(&lines, &index);
		if (!line)
			return XDP_PASS;
		word = line->word;
	}
	word &= 1;
	asm volatile("" : "+r"(word)); /* clang would make it a branch again */
	return XDP_PASS - word;
}

/* Counts as a stage does, and never branches on the verdict: no packet waits for the word of the one before. */
SEC("xdp.frags")
int never_branches(struct xdp_md *ctx)
{
	struct xdpkit_counters *all = stage_counters();
	__u64 bytes;
	__u32 action = judge(ctx, &bytes);

	if (!all)
		return XDP_ABORTED;
	count_one(&all->count[REASON_ALLOWED][action & (XDPKIT_ACTIONS - 1)], bytes);
	return action;
}

/* The way of a stage: what passes goes on to the next one, what is dropped does not. */
SEC("xdp.frags")
int ends_as_a_stage(struct xdp_md *ctx)
{
	struct xdpkit_counters *all = stage_counters();
	__u64 bytes;
	__u32 action = judge(ctx, &bytes);

	if (!all)
		return XDP_ABORTED;
	return stage_end(ctx, all, bytes, REASON_ALLOWED, action);
}
