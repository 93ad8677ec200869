// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * What the kernel's own tables cost for a packet's source address and port: what other figures are a ratio to.
 * IPv4 without options only. Driven by lab/src/bench/yardstick.rs.
 */
#include "../../bpf/include/kernel.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

struct {
	__uint(type, 9 /* BPF_MAP_TYPE_LRU_HASH */);
	__uint(max_entries, 1);
	__type(key, __u64);
	__type(value, __u64);
} hash SEC(".maps");

/* 2^24 words: a random one is in no cache. */
#define WORDS_LOG 24

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1 << WORDS_LOG);
	__type(key, __u32);
	__type(value, __u64);
} words SEC(".maps");

__u64 inserted = 0;

/* The source, or 0 for a packet too short. */
static __always_inline __u64 source(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;

	if (data + 36 > end)
		return 0;
	return (__u64) * (__be32 *)(data + 26) << 16 | *(__be16 *)(data + 34);
}

static __always_inline __u64 scrambled(__u64 number)
{
	return number * 0x9e3779b97f4a7c15ULL;
}

/* A source that is not there yet is entered. */
SEC("xdp.frags")
int look_up(struct xdp_md *ctx)
{
	__u64 key = source(ctx), value = 1, *found;

	found = bpf_map_lookup_elem(&hash, &key);
	if (found)
		asm volatile("" ::"r"(*found));
	else
		bpf_map_update_elem(&hash, &key, &value, 0 /* BPF_ANY */);
	return XDP_PASS;
}

/* Every packet is a new key, and another one goes for it. */
SEC("xdp.frags")
int insert(struct xdp_md *ctx __attribute__((unused)))
{
	__u64 key = scrambled(++inserted), value = 1;

	bpf_map_update_elem(&hash, &key, &value, 0 /* BPF_ANY */);
	return XDP_PASS;
}

SEC("xdp.frags")
int array(struct xdp_md *ctx)
{
	__u32 index = scrambled(source(ctx)) >> (64 - WORDS_LOG);
	__u64 *found = bpf_map_lookup_elem(&words, &index);

	if (found)
		asm volatile("" ::"r"(*found));
	return XDP_PASS;
}

/* The same, changed atomically: until that is done, nothing behind it begins. */
SEC("xdp.frags")
int atomic(struct xdp_md *ctx)
{
	__u32 index = scrambled(source(ctx)) >> (64 - WORDS_LOG);
	__u64 *found = bpf_map_lookup_elem(&words, &index);

	if (found)
		__sync_fetch_and_add(found, 1);
	return XDP_PASS;
}
