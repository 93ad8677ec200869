/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Health checks' probes: the host's own packets, each to the backend that its source port names. */
#ifndef XDPKIT_DSR_PROBE_H
#define XDPKIT_DSR_PROBE_H

#include "dsr_forward.h"

/*
 * The backend of a health check's probe: the one that its source port names, whatever that one's weight; above it, what
 * choose_path() is told. 0: no probe. A hop limit of 255 shows that a socket of this host has sent it (RFC 5082): what the
 * host forwards, such as a client's packet to a port without a service, goes no further. Resets may have any: the host's
 * stack sends some without a socket, and without them a backend that has missed the end of one probe would not take the
 * next, from the same port. Global: probes are few. Weak: see parse.h.
 */
#define PROBE_WHAT_SHIFT 32

__attribute__((noinline, weak)) __u64 find_probe(struct xdp_md *ctx, __u32 vip)
{
	struct balancer_settings *now = balancer_settings();
	struct service *service = NULL;
	struct backend *backend;
	__u32 number, hops, what;
	struct packet p;

	if (!now || parse_again(ctx, &p) != REASON_NONE || p.network < NETWORK_IPV4 || p.protocol != IPPROTO_TCP ||
	    p.fragment != FRAGMENT_NONE || !p.transport_header)
		return 0;
	number = bpf_ntohs(p.tcp->source) - now->probe_base;
	backend = bpf_map_lookup_elem(&backends, &number);
	if (backend && (backend->flags & (BACKEND_USED | BACKEND_KILLED)) == BACKEND_USED)
		service = service_record(backend->service);
	hops = p.network == NETWORK_IPV4 ? p.ip4->ttl : p.ip6->hop_limit;
	if (!service || !(service->flags & SERVICE_USED) || service->vip != vip ||
	    (hops != 255 && (hops <= 1 || !(p.tcp->flags & TCP_RST))))
		return 0;
	what = PATH_OF_PROBE | p.network << PATH_INNER_SHIFT;
	if (service->flags & DSR_IPIP)
		what |= PATH_OF_IPIP;
	return (__u64)what << PROBE_WHAT_SHIFT | number;
}

/* Sends a probe to its backend, by the next hop that was chosen for it alone: it leaves no trace but its reason. */
__attribute__((noinline, weak)) __u64 forward_probe(struct xdp_md *ctx, __u64 probe, __u64 choice)
{
	__u32 number = probe, state, overhead = 0;
	struct next_hop *hop = NULL;
	struct backend *backend;
	struct inner inner;
	struct packet p;
	bool ipip;

	ipip = probe >> PROBE_WHAT_SHIFT & PATH_OF_IPIP;
	backend = bpf_map_lookup_elem(&backends, &number);
	if (!backend || parse_again(ctx, &p) != REASON_NONE || p.network < NETWORK_IPV4)
		return verdict(REASON_NOT_A_PROBE, XDP_DROP);
	state = next_hop_state(ctx, choice, &hop);
	if (!can_go_on(state, ipip))
		return verdict(no_path(state), XDP_DROP);
	if (state != NEXT_HOP_FOUND)
		hop = NULL;
	inner_read(&p, &inner);
	inner.frag_off = bpf_htons(IP_DF);
	if (ipip)
		overhead = backend->family == NETWORK_IPV4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);
	if (inner.length > longest(hop, overhead))
		return verdict(REASON_TOO_BIG, XDP_DROP);
	decrement_hops(&p);
	if (ipip)
		return forward_ipip(ctx, &inner, backend, hop, index_hash(number) >> 32, reason_in(state, REASON_PROBED));
	/* The caller resolves it: there is more room on the stack. */
	if (!hop)
		return verdict(REASON_UNRESOLVED, XDP_DROP);
	return sent(REASON_PROBED, next_hop_send(ctx, hop, p.data, p.end, p.vlans));
}

#endif
