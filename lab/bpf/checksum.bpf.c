// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The library's checksum arithmetic by itself, as the verifier and the JIT have left it: a program that works out one case
 * a run, to be compared with sums over whole messages. Driven by lab/src/bench/checksum.rs.
 */
#include "../../bpf/include/kernel.h"
#include "../../bpf/include/checksum.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define CASES 16384

struct checksum_case {
	/* Questions. */
	__be32 before[4];
	__be32 after[4];
	struct iphdr ip; /* without options; afterwards with one hop less */
	__sum16 check;
	/* Answers: the check after the first 2, 4 and 16 bytes have changed; the first 10, for UDP; that of the header. */
	__sum16 changed16;
	__sum16 changed32;
	__sum16 changed128;
	__sum16 udp;
	__sum16 header;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, CASES);
	__type(key, __u32);
	__type(value, struct checksum_case);
} cases SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} next SEC(".maps");

SEC("xdp.frags")
int answer(struct xdp_md *ctx __attribute__((unused)))
{
	__u32 zero = 0, at, *now = bpf_map_lookup_elem(&next, &zero);
	struct checksum_case *c;
	const any_u16 *before, *after;

	if (!now)
		return XDP_ABORTED;
	at = (*now)++;
	c = bpf_map_lookup_elem(&cases, &at);
	if (!c)
		return XDP_ABORTED;
	before = (const any_u16 *)c->before;
	after = (const any_u16 *)c->after;
	c->changed16 = csum_apply(c->check, csum_change16(before[0], after[0]));
	c->changed32 = csum_apply(c->check, csum_change32(c->before[0], c->after[0]));
	c->changed128 = csum_apply(c->check, csum_change128(c->before, c->after));
	/* Two addresses and a port, as a translation changes them. */
	c->udp = csum_apply_udp(c->check, csum_change32(c->before[0], c->after[0]) +
						  csum_change32(c->before[1], c->after[1]) +
						  csum_change16(before[4], after[4]));
	c->header = csum_ipv4(&c->ip);
	ipv4_decrement_ttl(&c->ip);
	return XDP_PASS;
}
