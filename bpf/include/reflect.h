/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Turns a frame back to where it came from: swaps MACs, IP addresses and ports. */
#ifndef XDPKIT_REFLECT_H
#define XDPKIT_REFLECT_H

#include "parse.h"

/*
 * Every checksum stays right: a one's-complement sum does not depend on the order of what it sums
 * (RFC 1071), and both halves of each swap are under the same sums.
 */
static __always_inline void reflect(struct packet *p)
{
	struct in6_addr address6;
	__be32 address4;
	__be16 port;
	__u8 mac[6];

	__builtin_memcpy(mac, p->eth->h_dest, 6);
	__builtin_memcpy(p->eth->h_dest, p->eth->h_source, 6);
	__builtin_memcpy(p->eth->h_source, mac, 6);
	if (p->network == NETWORK_IPV4) {
		address4 = p->ip4->saddr;
		p->ip4->saddr = p->ip4->daddr;
		p->ip4->daddr = address4;
	} else if (p->network == NETWORK_IPV6) {
		address6 = p->ip6->saddr;
		p->ip6->saddr = p->ip6->daddr;
		p->ip6->daddr = address6;
	}
	if (!p->transport_header)
		return;
	if (p->protocol == IPPROTO_TCP || p->protocol == IPPROTO_UDP) {
		/* TCP and UDP both start with the two ports. */
		port = p->udp->source;
		p->udp->source = p->udp->dest;
		p->udp->dest = port;
	}
}

#endif
