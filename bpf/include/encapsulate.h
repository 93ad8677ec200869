/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* An outer IP header around a packet: RFC 2003 and 2473, with DSCP and ECN copied (RFC 6040, normal mode). */
#ifndef XDPKIT_ENCAPSULATE_H
#define XDPKIT_ENCAPSULATE_H

#include "kernel.h"
#include "parse.h"
#include "checksum.h"

#define OUTER_HOP_LIMIT 64

/* What an outer header says of the packet inside. */
struct inner {
	__u32 network_at; /* offset of its header, so the length of the Ethernet header and tags */
	__u32 length;     /* by its own header */
	__be16 id;       /* for the outer header */
	__be16 frag_off; /* IP_DF or 0: as in the packet; set for IPv6 */
	__u8 network;    /* enum packet_network */
	__u8 traffic_class;
};

/*
 * Packets of one outer source must not have the same identification (RFC 6864), but the fragments of a datagram have: each
 * offset adds an amount of its own.
 */
static __always_inline __be16 fragment_id(const struct iphdr *ip)
{
	return ip->id + (ip->frag_off & bpf_htons(IP_OFFSET)) * 0x9e37U;
}

static __always_inline void decrement_hops(const struct packet *p)
{
	if (p->network == NETWORK_IPV4)
		ipv4_decrement_ttl(p->ip4);
	else
		p->ip6->hop_limit--;
}

static __always_inline void inner_read(const struct packet *p, struct inner *inner)
{
	inner->network_at = p->network_at;
	inner->length = p->network_end - p->network_at;
	inner->network = p->network;
	if (p->network == NETWORK_IPV4) {
		inner->traffic_class = p->ip4->tos;
		inner->id = fragment_id(p->ip4);
		inner->frag_off = p->ip4->frag_off & bpf_htons(IP_DF);
	} else {
		inner->traffic_class = ipv6_traffic_class(p->ip6);
		inner->id = 0;
		inner->frag_off = bpf_htons(IP_DF);
	}
}

/*
 * Room for `overhead` bytes behind the Ethernet header and its tags, which move to the new start with another type at
 * their end. The new header's place, NULL when the driver left no room.
 */
static __always_inline void *make_room(struct xdp_md *ctx, const struct inner *inner, __u32 overhead, __be16 ether_type)
{
	void *data, *end, *from;

	if (bpf_xdp_adjust_head(ctx, -(int)overhead))
		return NULL;
	data = (void *)(long)ctx->data;
	end = (void *)(long)ctx->data_end;
	from = data + overhead;
	if (from + ETHERNET_HEADERS_MAX > end)
		return NULL;
	*(any_u64 *)data = *(any_u64 *)from;
	*(any_u32 *)(data + 8) = *(any_u32 *)(from + 8);
	if (inner->network_at > sizeof(struct ethhdr)) {
		/* One tag or two; behind a single one, the second copy is overwritten below. */
		*(any_u32 *)(data + 12) = *(any_u32 *)(from + 12);
		*(any_u32 *)(data + 16) = *(any_u32 *)(from + 16);
	}
	/* The type stands before it: in two steps, for the verifier takes no offset below a number that it does not know. */
	data += (inner->network_at - sizeof(ether_type)) & 31;
	if (data + sizeof(ether_type) + sizeof(struct ipv6hdr) > end)
		return NULL;
	*(any_u16 *)data = ether_type;
	return data + sizeof(ether_type);
}

/* An outer IPv4 header. */
static __always_inline void fill_outer4(struct iphdr *outer, const struct inner *inner, __be32 source,
					__be32 destination)
{
	*(__u8 *)outer = 0x45;
	outer->tos = inner->traffic_class;
	outer->tot_len = bpf_htons(inner->length + sizeof(*outer));
	outer->id = inner->id;
	outer->frag_off = inner->frag_off;
	outer->ttl = OUTER_HOP_LIMIT;
	outer->protocol = inner->network == NETWORK_IPV4 ? IPPROTO_IPIP : IPPROTO_IPV6;
	outer->saddr = source;
	outer->daddr = destination;
	outer->check = csum_ipv4(outer);
}

/* An outer IPv6 header. The flow label tells flows apart on the way (RFC 6438). */
static __always_inline void fill_outer6(struct ipv6hdr *outer, const struct inner *inner, __u32 flow,
					const __be64 *source, const __be64 *destination)
{
	any_u32 *first = (any_u32 *)outer;
	any_u64 *addresses = (any_u64 *)&outer->saddr;

	*first = bpf_htonl(0x60000000 | (__u32)inner->traffic_class << 20 | (flow & 0xfffff));
	outer->payload_len = bpf_htons(inner->length);
	outer->nexthdr = inner->network == NETWORK_IPV4 ? IPPROTO_IPIP : IPPROTO_IPV6;
	outer->hop_limit = OUTER_HOP_LIMIT;
	addresses[0] = source[0];
	addresses[1] = source[1];
	addresses[2] = destination[0];
	addresses[3] = destination[1];
}

#endif
