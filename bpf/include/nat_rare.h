/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The ways out of the NAT balancer, the common one first. */
#ifndef XDPKIT_NAT_RARE_H
#define XDPKIT_NAT_RARE_H

#include "nat_path.h"

static __always_inline int nat_step_of(struct nat_segment *g, const struct packet *p, __u32 record, __u64 word,
				       bool from_backend, __u32 now)
{
	g->word = word;
	g->record = record;
	g->from_backend = from_backend;
	g->tcp_flags = 0;
	g->now = now;
	if (p->protocol == IPPROTO_TCP) {
		g->tcp_flags = p->tcp->flags;
		g->sequence = bpf_ntohl(p->tcp->seq);
		g->acknowledged = bpf_ntohl(p->tcp->ack_seq);
		g->length = p->network_end - p->at + sizeof(struct tcphdr) - p->tcp->doff * 4;
	}
	return nat_step(g);
}

/* Translated, and on its way. */
static __always_inline int nat_send(struct xdp_md *ctx, struct xdpkit_counters *all, struct packet *p, __u64 bytes,
				    bool from_backend, const struct nat_way *way)
{
	__u32 reason = from_backend ? REASON_ANSWERED : REASON_FORWARDED, action;

	if (way->state == NEXT_HOP_NO_ROUTE)
		return stage_end(ctx, all, bytes, REASON_NO_ROUTE, XDP_DROP);
	translate(p, &way->to);
	/* The host's stack sends it, and finds out the neighbour's address on the way. */
	if (way->state != NEXT_HOP_FOUND)
		return stage_end(ctx, all, bytes, REASON_UNRESOLVED, XDP_PASS);
	__builtin_memcpy(p->eth, way->macs, sizeof(way->macs));
	action = way->interface == ctx->ingress_ifindex ? XDP_TX : (int)bpf_redirect(way->interface, 0);
	return stage_end(ctx, all, bytes, reason, action);
}

#endif
