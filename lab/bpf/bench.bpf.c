// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The benchmark's programs: a wrapper that makes every repetition of a test run a packet of its own, and the
 * programs that the others are compared with. Driven by lab/src/bench.rs.
 */
#include "../../bpf/include/kernel.h"
#include "../../bpf/include/parse.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* The part of a frame that is restored, headers and more. Frames are padded to a multiple of the step. */
#define RESTORED_MAX 128
#define RESTORED_STEP 32

const volatile __u32 frame_length = 0;
const volatile __u32 restored = 0;  /* bytes, a multiple of RESTORED_STEP */
const volatile __u32 source_at = 0; /* offset of the source address */
const volatile __u32 port_at = 0;   /* offset of the source port; 0: there is none */
const volatile __u32 flow_mask = 0; /* flows less one; their number is a power of two */
const volatile bool ipv6 = false;

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} under_test SEC(".maps");

/* The state of one harness, not of a CPU: between repetitions the kernel may move the run to another one. */
struct bench_state {
	__u64 start; /* address of the frame as it came; user space writes 0 before each test run */
	__u64 now;   /* the same after the program under test */
	__u64 next;  /* flow, before masking */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct bench_state);
} state SEC(".maps");

struct bench_template {
	__u64 words[RESTORED_MAX / 8];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct bench_template);
} template SEC(".maps");

/* Read in order, so that prefetching hides it; small, so that it leaves the caches to the program under test. */
struct bench_flow4 {
	__be32 address;
	__be16 port;
	__be16 destination_port; /* 0: the template's */
};

struct bench_flow6 {
	__be64 address[2];
	__be16 port;
	__be16 destination_port;
	__u16 reserved[2];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct bench_flow4);
} flows_v4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct bench_flow6);
} flows_v6 SEC(".maps");

/* Undoes bpf_xdp_adjust_head and bpf_xdp_adjust_tail of the repetition before. */
static __always_inline bool restore_length(struct xdp_md *ctx, struct bench_state *s)
{
	__s64 removed, length;

	/* By way of memory a packet pointer becomes a number, which the verifier would otherwise not allow. */
	*(volatile __u64 *)&s->now = (__u64)ctx->data;
	removed = *(volatile __u64 *)&s->now - s->start;
	if (!s->start) {
		s->start = *(volatile __u64 *)&s->now;
		removed = 0;
	}
	if (removed && bpf_xdp_adjust_head(ctx, -removed))
		return false;
	length = (void *)(long)ctx->data_end - (void *)(long)ctx->data;
	return length == frame_length || !bpf_xdp_adjust_tail(ctx, frame_length - length);
}

/*
 * Restores the frame and makes it the next flow's. Not restored: bytes behind the first RESTORED_MAX, which read as
 * zeroes where a program cut them off, and metadata before the frame. Checksums are those of the template, so
 * they do not cover the flow's address and port: right for programs that update checksums, as opposed to verifying them.
 *
 * The stores are as wide as they can be: a load of several bytes that were stored one by one waits for all of them, and
 * the program under test would pay. (__builtin_memcpy of data of unknown alignment copies bytes.)
 */
SEC("xdp.frags")
int wrapper(struct xdp_md *ctx)
{
	struct bench_template *original;
	struct bench_flow4 *flow4;
	struct bench_flow6 *flow6;
	struct bench_state *s;
	__u32 zero = 0, index;
	__be16 port, destination_port;
	void *data, *end;

	s = bpf_map_lookup_elem(&state, &zero);
	original = bpf_map_lookup_elem(&template, &zero);
	if (!s || !original || !restore_length(ctx, s))
		return XDP_ABORTED;

	data = (void *)(long)ctx->data;
	end = (void *)(long)ctx->data_end;
	if (data + restored > end)
		return XDP_ABORTED;
#pragma unroll
	for (__u32 i = 0; i < RESTORED_MAX / RESTORED_STEP; i++) {
		if (i * RESTORED_STEP >= restored)
			break;
		for (__u32 j = 0; j < RESTORED_STEP / 8; j++)
			((__u64 *)data)[i * RESTORED_STEP / 8 + j] = original->words[i * RESTORED_STEP / 8 + j];
	}

	index = s->next++ & flow_mask;
	if (data + source_at + 16 > end)
		return XDP_ABORTED;
	if (ipv6) {
		flow6 = bpf_map_lookup_elem(&flows_v6, &index);
		if (!flow6)
			return XDP_ABORTED;
		*(__be64 *)(data + source_at) = flow6->address[0];
		*(__be64 *)(data + source_at + 8) = flow6->address[1];
		port = flow6->port;
		destination_port = flow6->destination_port;
	} else {
		flow4 = bpf_map_lookup_elem(&flows_v4, &index);
		if (!flow4)
			return XDP_ABORTED;
		*(__be32 *)(data + source_at) = flow4->address;
		port = flow4->port;
		destination_port = flow4->destination_port;
	}
	if (port_at) {
		if (data + port_at + 4 > end)
			return XDP_ABORTED;
		*(__be16 *)(data + port_at) = port;
		if (destination_port)
			*(__be16 *)(data + port_at + 2) = destination_port;
	}
	bpf_tail_call_static(ctx, &under_test, 0);
	return XDP_PASS;
}

/* What every figure is above: reaching a program and leaving it. */
SEC("xdp.frags")
int empty(struct xdp_md *ctx __attribute__((unused)))
{
	return XDP_PASS;
}

/* The parser alone. The barrier uses what stages use of its result; without, clang would leave most of it out. */
SEC("xdp.frags")
int parse_only(struct xdp_md *ctx)
{
	enum xdpkit_reason reason;
	struct packet p;

	reason = parse(ctx, &p);
	asm volatile("" ::"r"(reason), "r"(p.network), "r"(p.protocol), "r"(p.network_end));
	return XDP_PASS;
}

/* What every encapsulation does first. */
SEC("xdp.frags")
int grow(struct xdp_md *ctx)
{
	return bpf_xdp_adjust_head(ctx, -20) ? XDP_ABORTED : XDP_TX;
}

__u32 mangled = 0;

/* For the harness's own test: changes the frame in every way that the wrapper undoes, longer and shorter by turns. */
SEC("xdp.frags")
int mangle(struct xdp_md *ctx)
{
	bool grow = mangled++ % 2;
	void *data, *end;

	if (bpf_xdp_adjust_head(ctx, grow ? -40 : 14) || bpf_xdp_adjust_tail(ctx, grow ? 24 : -6))
		return XDP_ABORTED;
	data = (void *)(long)ctx->data;
	end = (void *)(long)ctx->data_end;
	if (data + 64 > end)
		return XDP_ABORTED;
	__builtin_memset(data, 0xff, 64);
	return XDP_TX;
}
