/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Taking an outer IP header off: RFC 2003 and 2473, with ECN as RFC 6040, section 4.2, wants it. */
#ifndef XDPKIT_DECAPSULATE_H
#define XDPKIT_DECAPSULATE_H

#include "kernel.h"
#include "parse.h"
#include "checksum.h"

#define ECN_MASK 3
#define ECN_NOT_ECT 0
#define ECN_ECT_1 1
#define ECN_ECT_0 2
#define ECN_CE 3

#define ECN_DROP 4

/* The ECN field that the packet goes on with; ECN_DROP: congestion was met by one that cannot carry the word on. */
static __always_inline __u32 ecn_decapsulate(__u32 outer, __u32 inner)
{
	outer &= ECN_MASK;
	inner &= ECN_MASK;
	if (outer == ECN_CE)
		return inner == ECN_NOT_ECT ? ECN_DROP : ECN_CE;
	if (outer == ECN_ECT_1 && inner == ECN_ECT_0)
		return ECN_ECT_1;
	return inner;
}

static __always_inline void ipv4_set_ecn(struct iphdr *ip, __u32 ecn)
{
	/* The first 16 bits: version, header length, type of service. */
	any_u16 *word = (any_u16 *)ip;
	__u16 before = *word;

	ip->tos = (ip->tos & ~ECN_MASK) | ecn;
	ip->check = csum_apply(ip->check, csum_change16(before, *word));
}

static __always_inline void ipv6_set_ecn(struct ipv6hdr *ip, __u32 ecn)
{
	ip->flow_lbl[0] = (ip->flow_lbl[0] & ~(ECN_MASK << 4)) | ecn << 4;
}

/*
 * Removes what is between the Ethernet header with its tags, which ends at `network_at`, and the header inside, at
 * `inner_at`; the type becomes that of the packet inside.
 */
static __always_inline bool remove_outer(struct xdp_md *ctx, __u32 network_at, __u32 inner_at, __be16 ether_type)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end, *to;
	__u32 overhead = inner_at - network_at, word[5];
	__u16 last;

	if (network_at > 22 || overhead < sizeof(struct iphdr) || overhead > 0x7ff || data + 22 > end)
		return false;
	/* Kept aside: the outer header may be shorter than this one. */
	word[0] = *(any_u32 *)data;
	word[1] = *(any_u32 *)(data + 4);
	word[2] = *(any_u32 *)(data + 8);
	word[3] = *(any_u32 *)(data + 12);
	word[4] = *(any_u32 *)(data + 16);
	if (bpf_xdp_adjust_head(ctx, overhead))
		return false;
	data = (void *)(long)ctx->data;
	end = (void *)(long)ctx->data_end;
	if (data + 22 + sizeof(struct iphdr) > end)
		return false;
	*(any_u32 *)data = word[0];
	*(any_u32 *)(data + 4) = word[1];
	*(any_u32 *)(data + 8) = word[2];
	last = ether_type;
	if (network_at == sizeof(struct ethhdr)) {
		*(any_u16 *)(data + 12) = last;
		return true;
	}
	*(any_u32 *)(data + 12) = word[3];
	to = data + 16;
	if (network_at == sizeof(struct ethhdr) + 2 * sizeof(struct vlan_hdr)) {
		*(any_u32 *)to = word[4];
		to += 4;
	}
	*(any_u16 *)to = last;
	return true;
}

#endif
