/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The parser once more, for what few packets need: global functions, which no pointer into the packet may go to or come
 * from. The verifier goes through the parser once a program, not once a caller, and through what follows with one state
 * for each kind of packet, not one for each way through the parser. Costs some nanoseconds more than parse().
 */
#ifndef XDPKIT_LOCATE_H
#define XDPKIT_LOCATE_H

#include "parse.h"

/* What parse() finds, without pointers: those are not for global functions to hand out. */
struct found {
	__u32 network_end;
	__u16 network_at;
	__u16 transport_at; /* 0: none was read */
	__u16 at;
	__u16 fragment_at;
	__be16 ether_type;
	__be16 vlan_tci[PACKET_VLANS_MAX];
	__u8 vlans;
	__u8 network;
	__u8 protocol;
	__u8 fragment;
	__u8 routed;
	__u8 ethernet;   /* an Ethernet header was read */
	__u8 extensions; /* of IPv6 are still to be walked over */
};

/* Not on the stack, which is short. */
PER_CPU_ARRAY(located, struct found);

static __always_inline struct found *where_located(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&located, &zero);
}

static __always_inline void note_network(struct found *found, const struct packet *p)
{
	found->network_end = p->network_end;
	found->network_at = p->network_at;
	found->transport_at = p->transport_header ? p->transport_header - p->data : 0;
	found->at = p->at;
	found->fragment_at = p->fragment_at;
	found->network = p->network;
	found->protocol = p->protocol;
	found->fragment = p->fragment;
	found->routed = p->routed;
}

/* Up to the extension headers of IPv6: those walked over in here, the stack would not do. */
__attribute__((noinline, weak)) __u32 locate(struct xdp_md *ctx)
{
	struct found *found = where_located();
	enum xdpkit_reason reason;
	struct packet p;

	if (!found)
		return REASON_HEADERS_SPLIT;
	reason = parse_ethernet(ctx, &p);
	found->ethernet = !!p.eth;
	found->ether_type = p.ether_type;
	found->vlan_tci[0] = p.vlan_tci[0];
	found->vlan_tci[1] = p.vlan_tci[1];
	found->vlans = p.vlans;
	found->extensions = false;
	if (reason == REASON_NONE && p.ether_type != bpf_htons(ETH_P_IPV6)) {
		reason = parse_network(ctx, &p);
	} else if (reason == REASON_NONE) {
		begin_network(&p);
		reason = parse_ipv6_header(ctx, &p);
		if (reason == REASON_NONE && is_extension(p.protocol))
			found->extensions = true;
		else if (reason == REASON_NONE)
			reason = parse_transport(ctx, &p);
	}
	note_network(found, &p);
	return reason;
}

/* The rest, by what walk_extensions() found. */
__attribute__((noinline, weak)) __u32 locate_behind(struct xdp_md *ctx, __u64 walked)
{
	union extension_walk walk = { .packed = walked };
	struct found *found = where_located();
	enum xdpkit_reason reason;
	struct packet p = {};

	if (!found)
		return REASON_HEADERS_SPLIT;
	p.data = (void *)(long)ctx->data;
	p.end = (void *)(long)ctx->data_end;
	p.linear = p.end - p.data;
	p.network = NETWORK_IPV6;
	p.network_at = found->network_at;
	p.network_end = found->network_end;
	reason = parse_behind(ctx, &p, walk);
	note_network(found, &p);
	return reason;
}

/* A constant of which clang does not know that it is one, so that it stands in a register for the verifier to know. */
static __always_inline __u32 known(__u32 number)
{
	barrier_var(number);
	return number;
}

/* Of this number the verifier knows in each case which it is, and so which header there is. */
static __always_inline __u32 known_network(__u32 network)
{
	if (network == NETWORK_IPV4)
		return known(NETWORK_IPV4);
	if (network == NETWORK_IPV6)
		return known(NETWORK_IPV6);
	return network == NETWORK_ARP ? known(NETWORK_ARP) : known(NETWORK_OTHER);
}

/* The same as parse(). */
static __always_inline enum xdpkit_reason parse_again(struct xdp_md *ctx, struct packet *p)
{
	struct found *found = where_located();
	__u32 reason, network, protocol;
	void *header;

	reason = locate(ctx);
	if (found && found->extensions)
		reason = locate_behind(ctx, walk_extensions(ctx, found->at, found->network_end, found->protocol));
	__builtin_memset(p, 0, sizeof(*p));
	p->data = (void *)(long)ctx->data;
	p->end = (void *)(long)ctx->data_end;
	p->linear = p->end - p->data;
	if (!found || !found->ethernet || p->data + sizeof(*p->eth) > p->end)
		return reason == REASON_NONE ? REASON_HEADERS_SPLIT : reason;
	p->eth = p->data;
	p->at = found->at & PACKET_OFFSET_MASK;
	p->network_at = found->network_at & 31;
	p->network_end = found->network_end;
	p->fragment_at = found->fragment_at;
	p->ether_type = found->ether_type;
	p->vlan_tci[0] = found->vlan_tci[0];
	p->vlan_tci[1] = found->vlan_tci[1];
	p->vlans = found->vlans;
	p->protocol = found->protocol;
	p->fragment = found->fragment;
	p->routed = found->routed;
	header = p->data + p->network_at;
	network = known_network(found->network);
	p->network = network;
	if (network < NETWORK_IPV4)
		return reason;
	if (header + (network == NETWORK_IPV4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr)) > p->end) {
		p->network = NETWORK_OTHER;
		return REASON_HEADERS_SPLIT;
	}
	p->network_header = header;
	if (!found->transport_at)
		return reason;
	header = p->data + (found->transport_at & PACKET_OFFSET_MASK);
	protocol = found->protocol;
	if (protocol == IPPROTO_TCP)
		protocol = known(IPPROTO_TCP);
	else if (protocol == IPPROTO_UDP)
		protocol = known(IPPROTO_UDP);
	else
		protocol = network == NETWORK_IPV4 ? known(IPPROTO_ICMP) : known(IPPROTO_ICMPV6);
	p->protocol = protocol;
	if (header + (protocol == IPPROTO_TCP ? sizeof(struct tcphdr) : sizeof(struct udphdr)) > p->end)
		return REASON_HEADERS_SPLIT;
	p->transport_header = header;
	return reason;
}

#endif
