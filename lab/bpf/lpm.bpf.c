// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The compiled longest-prefix-match table by itself, and the kernel's trie beside it: programs that look the source
 * address up, to be timed, and some that keep the answers, to be compared. Driven by lab/src/bench/lpm.rs.
 */
#include "../../bpf/include/kernel.h"
#include "../../bpf/layout/lpm_table.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

struct lpm_probe {
	__u32 root4;
	__u32 root6;
	__u64 next; /* question that is to be answered next */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct lpm_probe);
} probe SEC(".maps");

struct trie4_key {
	__u32 length;
	__be32 address;
};

struct trie6_key {
	__u32 length;
	struct in6_addr address;
};

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct trie4_key);
	__type(value, __u32);
} trie4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct trie6_key);
	__type(value, __u32);
} trie6 SEC(".maps");

#define QUESTIONS 65536

struct question {
	union {
		__be32 address4;
		struct in6_addr address6;
	};
	__u32 answer;
	__u32 reserved[3];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, 1U << 10 /* BPF_F_MMAPABLE */);
	__uint(max_entries, QUESTIONS);
	__type(key, __u32);
	__type(value, struct question);
} questions SEC(".maps");

/* Frames are Ethernet and IP, nothing between: parsing has its own benchmark. */
static __always_inline void *network_header(struct xdp_md *ctx, __u32 size)
{
	void *data = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;

	return data + sizeof(struct ethhdr) + size > end ? NULL : data + sizeof(struct ethhdr);
}

static __always_inline struct lpm_probe *state(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&probe, &zero);
}

/* Makes clang believe that the answer matters. */
#define USE(answer) asm volatile("" ::"r"(answer))

SEC("xdp.frags")
int table_v4(struct xdp_md *ctx)
{
	struct iphdr *ip = network_header(ctx, sizeof(*ip));
	struct lpm_probe *s = state();

	if (!ip || !s)
		return XDP_ABORTED;
	USE(lpm_lookup4(s->root4, ip->saddr));
	return XDP_PASS;
}

SEC("xdp.frags")
int table_v6(struct xdp_md *ctx)
{
	struct ipv6hdr *ip = network_header(ctx, sizeof(*ip));
	struct lpm_probe *s = state();

	if (!ip || !s)
		return XDP_ABORTED;
	USE(lpm_lookup6(s->root6, &ip->saddr));
	return XDP_PASS;
}

SEC("xdp.frags")
int trie_v4(struct xdp_md *ctx)
{
	struct iphdr *ip = network_header(ctx, sizeof(*ip));
	struct trie4_key key = { .length = 32 };
	__u32 *found;

	if (!ip)
		return XDP_ABORTED;
	key.address = ip->saddr;
	found = bpf_map_lookup_elem(&trie4, &key);
	USE(found ? *found : 0);
	return XDP_PASS;
}

SEC("xdp.frags")
int trie_v6(struct xdp_md *ctx)
{
	struct ipv6hdr *ip = network_header(ctx, sizeof(*ip));
	struct trie6_key key = { .length = 128 };
	__u32 *found;

	if (!ip)
		return XDP_ABORTED;
	key.address = ip->saddr;
	found = bpf_map_lookup_elem(&trie6, &key);
	USE(found ? *found : 0);
	return XDP_PASS;
}

static __always_inline struct question *next_question(struct lpm_probe *s)
{
	__u32 at = s->next++ % QUESTIONS;

	return bpf_map_lookup_elem(&questions, &at);
}

/* One question a run. */
SEC("xdp.frags")
int answer_v4(struct xdp_md *ctx __attribute__((unused)))
{
	struct lpm_probe *s = state();
	struct question *q = s ? next_question(s) : NULL;

	if (!s || !q)
		return XDP_ABORTED;
	q->answer = lpm_lookup4(s->root4, q->address4);
	return XDP_PASS;
}

SEC("xdp.frags")
int answer_v6(struct xdp_md *ctx __attribute__((unused)))
{
	struct lpm_probe *s = state();
	struct question *q = s ? next_question(s) : NULL;

	if (!s || !q)
		return XDP_ABORTED;
	q->answer = lpm_lookup6(s->root6, &q->address6);
	return XDP_PASS;
}
