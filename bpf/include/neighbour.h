/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Telling neighbour discovery, without which a host has no link, from other ICMPv6. */
#ifndef XDPKIT_NEIGHBOUR_H
#define XDPKIT_NEIGHBOUR_H

#include "parse.h"

#define ND_ROUTER_SOLICITATION 133
#define ND_REDIRECT 137
#define ND_HOP_LIMIT 255

/* RFC 4861: such a packet comes from a neighbour only if no router has touched its hop limit. */
static __always_inline bool is_neighbour_discovery(const struct packet *p)
{
	return p->network == NETWORK_IPV6 && p->protocol == IPPROTO_ICMPV6 && p->transport_header &&
	       p->ip6->hop_limit == ND_HOP_LIMIT && p->icmp->code == 0 && p->icmp->type >= ND_ROUTER_SOLICITATION &&
	       p->icmp->type <= ND_REDIRECT;
}

#endif
