/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Making the host find out a neighbour's MAC: its stack does when it has something to forward there. The packet at hand is
 * no good for that (its destination may be the host's own address, its new source, too, which the stack takes for forged),
 * so it becomes one that the neighbour throws away without a word. Clients repeat what matters.
 */
#ifndef XDPKIT_RESOLVE_H
#define XDPKIT_RESOLVE_H

#include "parse.h"
#include "checksum.h"

#define IPPROTO_NO_NEXT_HEADER 59

/*
 * From the same source to this address of the same family: an ICMP message of no known type (RFC 1122, 3.2.2), or an
 * IPv6 packet without contents (RFC 8200, 4.7). False when the packet has no room for that.
 */
static __always_inline bool become_request(struct packet *p, const __be64 *destination)
{
	__be16 *icmp;

	if (p->network == NETWORK_IPV4) {
		icmp = (void *)(p->ip4 + 1);
		if ((void *)(icmp + 4) > p->end)
			return false;
		*(__u8 *)p->ip4 = 0x45;
		p->ip4->tot_len = bpf_htons(28);
		p->ip4->frag_off = 0;
		p->ip4->ttl = 64;
		p->ip4->protocol = IPPROTO_ICMP;
		p->ip4->daddr = *(any_u32 *)destination;
		p->ip4->check = csum_ipv4(p->ip4);
		icmp[0] = bpf_htons(0xfd00);
		icmp[1] = (__be16)~bpf_htons(0xfd00);
		icmp[2] = 0;
		icmp[3] = 0;
		return true;
	}
	if (p->network != NETWORK_IPV6)
		return false;
	p->ip6->payload_len = 0;
	p->ip6->nexthdr = IPPROTO_NO_NEXT_HEADER;
	p->ip6->hop_limit = 64;
	__builtin_memcpy(&p->ip6->daddr, destination, 16);
	return true;
}

#endif
