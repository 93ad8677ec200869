/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The way to a neighbour or through a router, from the kernel's routes and neighbours, kept for a moment: a look-up
 * there costs more than all the rest of a packet's way.
 */
#ifndef XDPKIT_NEXT_HOP_H
#define XDPKIT_NEXT_HOP_H

#include "kernel.h"
#include "parse.h"
#include "../abi/service.h"

/* A second where the kernel ticks 100 times in one, less where it ticks faster: so old may an answer be. */
#define NEXT_HOP_LIFE 100

enum next_hop_flags {
	NEXT_HOP_ON_LINK = 1, /* a neighbour: a gateway in between is a mistake */
};

struct next_hop_request {
	__be32 destination[4]; /* IPv4: the first, then zeroes */
	__u32 family;          /* enum packet_network */
	__u32 flags;           /* enum next_hop_flags */
};

static __always_inline bool next_hop_is_fresh(const struct next_hop *hop)
{
	return (__s64)(hop->fresh_until - bpf_jiffies64()) > 0;
}

/*
 * Asks the kernel, and answers the state. `hop` must be this CPU's own. The interface that the packet came in by has to
 * forward (sysctl), else the kernel finds no way. What is not found is asked for again with the next tick.
 */
__attribute__((noinline, weak)) int next_hop_find(struct xdp_md *ctx, struct next_hop_request *request,
						  struct next_hop *hop)
{
	struct bpf_fib_lookup fib;
	bool gateway;
	long answer;

	if (!request || !hop)
		return NEXT_HOP_NO_ROUTE;
	__builtin_memset(&fib, 0, sizeof(fib));
	fib.ifindex = ctx->ingress_ifindex;
	fib.family = request->family == NETWORK_IPV4 ? AF_INET : AF_INET6;
	for (int i = 0; i < 4; i++)
		fib.ipv6_dst[i] = request->destination[i];
	answer = bpf_fib_lookup(ctx, &fib, sizeof(fib), 0);

	hop->fresh_until = bpf_jiffies64() + 1;
	hop->interface = fib.ifindex;
	if (answer != BPF_FIB_LKUP_RET_SUCCESS && answer != BPF_FIB_LKUP_RET_NO_NEIGH) {
		hop->state = NEXT_HOP_NO_ROUTE;
		return NEXT_HOP_NO_ROUTE;
	}
	/* The kernel has put the gateway, if there is one, in the place of what we asked for. */
	gateway = fib.family != (request->family == NETWORK_IPV4 ? AF_INET : AF_INET6) ||
		  fib.ipv6_dst[0] != request->destination[0];
	if (request->family == NETWORK_IPV6)
		for (int i = 1; i < 4; i++)
			gateway |= fib.ipv6_dst[i] != request->destination[i];
	if (request->flags & NEXT_HOP_ON_LINK && gateway) {
		hop->state = NEXT_HOP_OFF_LINK;
		return NEXT_HOP_OFF_LINK;
	}
	if (answer == BPF_FIB_LKUP_RET_NO_NEIGH) {
		hop->state = NEXT_HOP_UNRESOLVED;
		return NEXT_HOP_UNRESOLVED;
	}
	__builtin_memcpy(hop->macs, fib.dmac, 6);
	__builtin_memcpy(hop->macs + 6, fib.smac, 6);
	hop->mtu = fib.mtu_result;
	hop->state = NEXT_HOP_FOUND;
	hop->fresh_until += NEXT_HOP_LIFE - 1;
	return NEXT_HOP_FOUND;
}

/*
 * What becomes of a packet for one of our addresses whose hops are over: XDP_PASS, so that the host's stack tells its sender,
 * but only where it would forward the packet. What is sent to an address of its own it takes for itself, and answers with
 * the RST of a port that nobody listens at: XDP_DROP. Global: few packets need it. Weak: see parse.h.
 */
__attribute__((noinline, weak)) int expire(struct xdp_md *ctx)
{
	struct next_hop_request request = {};
	struct next_hop hop = {};
	struct packet p;

	if (parse(ctx, &p) != REASON_NONE || p.network < NETWORK_IPV4)
		return XDP_DROP;
	request.family = p.network;
	if (p.network == NETWORK_IPV4)
		request.destination[0] = p.ip4->daddr;
	else
		__builtin_memcpy(request.destination, &p.ip6->daddr, sizeof(request.destination));
	return next_hop_find(ctx, &request, &hop) == NEXT_HOP_NO_ROUTE ? XDP_DROP : XDP_PASS;
}

/* Sends the frame, whose MACs are written, on its way. */
static __always_inline int next_hop_send(struct xdp_md *ctx, const struct next_hop *hop)
{
	return hop->interface == ctx->ingress_ifindex ? XDP_TX : (int)bpf_redirect(hop->interface, 0);
}

#endif
