// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A generator of packets and a sink for them, for what a packet costs between two interfaces. Driven by
 * lab/src/bench/live.rs.
 */
#include "../../bpf/include/kernel.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

const volatile __u32 frame_mask = 0; /* frames less one; their number is a power of two */
const volatile __u32 egress = 0;     /* interface, in the namespace of the one that sends or forwards */
const volatile __be32 wanted = 0;    /* destination network of what counts as arrived */
const volatile __be32 mask = 0;      /* of that network */

/* Whole frames: what is written downstream would otherwise come back with the recycled page. */
struct live_frame {
	__u64 words[8];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct live_frame);
} frames SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} arrived SEC(".maps");

/* 1: what arrives is sent back as an answer. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} echo SEC(".maps");

__u32 next_frame = 0;

static __always_inline bool write_next(struct xdp_md *ctx)
{
	__u32 index = next_frame++ & frame_mask;
	struct live_frame *frame = bpf_map_lookup_elem(&frames, &index);
	void *data = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;

	if (!frame || data + sizeof(*frame) > end)
		return false;
#pragma unroll
	for (int i = 0; i < 8; i++)
		((__u64 *)data)[i] = frame->words[i];
	return true;
}

SEC("xdp.frags")
int live_send(struct xdp_md *ctx)
{
	return write_next(ctx) ? bpf_redirect(egress, 0) : XDP_ABORTED;
}

/* What making a packet costs, when nothing is done with it. */
SEC("xdp.frags")
int live_generate(struct xdp_md *ctx)
{
	return write_next(ctx) ? XDP_DROP : XDP_ABORTED;
}

/* The shortest way from one interface to another. */
SEC("xdp.frags")
int live_forward(struct xdp_md *ctx __attribute__((unused)))
{
	return bpf_redirect(egress, 0);
}

/* The checksums stay right: all that is summed stays. */
static __always_inline void answer(struct ethhdr *eth, struct iphdr *ip, struct udphdr *udp)
{
	struct ethhdr from = *eth;
	__be32 address = ip->saddr;
	__be16 port = udp->source;

	__builtin_memcpy(eth->h_dest, from.h_source, 6);
	__builtin_memcpy(eth->h_source, from.h_dest, 6);
	ip->saddr = ip->daddr;
	ip->daddr = address;
	udp->source = udp->dest;
	udp->dest = port;
}

SEC("xdp.frags")
int live_sink(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;
	struct iphdr *ip = data + sizeof(struct ethhdr);
	struct udphdr *udp = (void *)(ip + 1);
	__u32 zero = 0, *answers = bpf_map_lookup_elem(&echo, &zero);
	__u64 *count = bpf_map_lookup_elem(&arrived, &zero);

	if (!count || !answers || (void *)(udp + 1) > end || (ip->daddr & mask) != wanted)
		return XDP_DROP;
	*count += 1;
	if (!*answers)
		return XDP_DROP;
	answer(data, ip, udp);
	return XDP_TX;
}
