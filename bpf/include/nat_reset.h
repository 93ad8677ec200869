/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Turns a TCP segment into the RST that answers it (RFC 9293, section 3.5.2). */
#ifndef XDPKIT_NAT_RESET_H
#define XDPKIT_NAT_RESET_H

#include "locate.h"
#include "answer.h"
#include "nat_state.h"

/* False: none may be sent, and the packet is as it was. */
__attribute__((noinline, weak)) int nat_reset(struct xdp_md *ctx)
{
	__u32 length, header, sequence;
	__u64 sum = 0;
	struct packet p;
	__u8 flags;

	if (parse_again(ctx, &p) != REASON_NONE || p.protocol != IPPROTO_TCP || !p.transport_header ||
	    p.fragment != FRAGMENT_NONE || p.tcp->flags & TCP_RST)
		return false;
	length = p.network_end - (p.at - sizeof(struct tcphdr)) - p.tcp->doff * 4;
	/* The device would cut the answer as it would have cut what was merged. The sender repeats a segment of it. */
	if (is_merged(ctx, p.network_end - p.network_at))
		return false;
	header = p.at - sizeof(struct tcphdr) - p.network_at;
	flags = p.tcp->flags;
	sequence = bpf_ntohl(p.tcp->seq) + length + !!(flags & TCP_SYN) + !!(flags & TCP_FIN);

	reflect(&p);
	if (flags & TCP_ACK) {
		p.tcp->seq = p.tcp->ack_seq;
		p.tcp->ack_seq = 0;
		p.tcp->flags = TCP_RST;
	} else {
		p.tcp->seq = 0;
		p.tcp->ack_seq = bpf_htonl(sequence);
		p.tcp->flags = TCP_RST | TCP_ACK;
	}
	p.tcp->res1 = 0;
	p.tcp->doff = sizeof(struct tcphdr) / 4;
	p.tcp->window = 0;
	p.tcp->urg_ptr = 0;
	p.tcp->check = 0;
	for (__u32 i = 0; i < sizeof(struct tcphdr) / 4; i++)
		sum += ((any_u32 *)p.tcp)[i];
	sum += bpf_htonl(sizeof(struct tcphdr)) + bpf_htonl(IPPROTO_TCP);
	if (p.network == NETWORK_IPV4) {
		any_u16 *word = (any_u16 *)&p.ip4->ttl;
		__u16 before = *word, total = p.ip4->tot_len;

		sum += (__u64)p.ip4->saddr + p.ip4->daddr;
		p.ip4->ttl = 64;
		p.ip4->tot_len = bpf_htons(header + sizeof(struct tcphdr));
		p.ip4->check = csum_apply(p.ip4->check, csum_change16(before, *word) +
								 csum_change16(total, p.ip4->tot_len));
	} else {
		for (__u32 i = 0; i < 4; i++)
			sum += (__u64)p.ip6->saddr.s6_addr32[i] + p.ip6->daddr.s6_addr32[i];
		p.ip6->hop_limit = 64;
		p.ip6->payload_len = bpf_htons(header - sizeof(struct ipv6hdr) + sizeof(struct tcphdr));
	}
	p.tcp->check = ~csum_fold(sum);
	/* What is behind belongs to nobody any more. Where it cannot be cut, it is padding. */
	cut_behind(ctx, &p, p.at);
	return true;
}

#endif
