/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Sending a packet on to its backend: as it is to a neighbour, inside an outer header, or by the host's stack. */
#ifndef XDPKIT_DSR_FORWARD_H
#define XDPKIT_DSR_FORWARD_H

#include "answer.h"
#include "dsr_paths.h"
#include "encapsulate.h"
#include "resolve.h"

/* What becomes of a packet, packed into the scalar that a global function may return. */
union verdict {
	__u64 packed;
	struct {
		__u32 reason;
		__u32 action;
	};
};

static __always_inline __u64 verdict(__u32 reason, __u32 action)
{
	union verdict v = { .reason = reason, .action = action };

	return v.packed;
}

/* Of a frame for which there was no room after all, nothing was sent. */
static __always_inline __u64 sent(__u32 reason, int action)
{
	return action == XDP_DROP ? verdict(REASON_NO_ROOM, XDP_DROP) : verdict(reason, action);
}

/* Of what was merged, the stack makes no request that leaves. Global: few packets need it. Weak: see parse.h. */
__attribute__((noinline, weak)) int ask_for_neighbour(struct xdp_md *ctx, __u32 number)
{
	struct backend *backend = bpf_map_lookup_elem(&backends, &number);
	struct packet p;

	if (!backend || parse_again(ctx, &p) != REASON_NONE || p.network != backend->family ||
	    is_merged(ctx, p.network_end - p.network_at))
		return false;
	return become_request(&p, backend->address);
}

/* A packet that does not fit. Global: few packets need it. Weak: see parse.h. */
__attribute__((noinline, weak)) __u64 refuse_too_big(struct xdp_md *ctx, __u32 service, __u32 mtu, __u32 network)
{
	struct service_state *state = bpf_map_lookup_elem(&service_states, &service);
	struct balancer_settings *now = balancer_settings();

	if (!now || !state || !is_answerable(ctx, true) || !may_answer(now))
		return verdict(REASON_TOO_BIG, XDP_DROP);
	if (!(network == NETWORK_IPV4 ? answer_too_big4(ctx, mtu) : answer_too_big6(ctx, mtu)))
		return verdict(REASON_TOO_BIG, XDP_DROP);
	state->too_big++;
	return verdict(REASON_TOO_BIG_ANSWERED, XDP_TX);
}

static __always_inline __u64 resolve_l2(struct xdp_md *ctx, __u32 number)
{
	return verdict(REASON_UNRESOLVED, ask_for_neighbour(ctx, number) ? XDP_PASS : XDP_DROP);
}

/* The dummy address of RFC 7600, 192.0.0.8: the host's stack takes no packet from its own address for forwarding. */
#define IPV4_DUMMY bpf_htonl(0xc0000008)

/* The last identification of an outer packet that may be fragmented: such must all differ (RFC 6864, 4.3). */
SHARED_ARRAY(identification, __u64);

static __always_inline __be16 next_identification(void)
{
	__u32 zero = 0;
	__u64 *last = bpf_map_lookup_elem(&identification, &zero);

	return last ? bpf_htons((__u16)__sync_fetch_and_add(last, 1)) : 0;
}

/*
 * Inside an outer header, to a next hop; without one, to the host's stack, which forwards it: and fragments it, with `reason`
 * REASON_TOO_BIG, or finds out its neighbour.
 */
static __always_inline __u64 forward_ipip(struct xdp_md *ctx, const struct inner *inner, const struct backend *backend,
					  struct next_hop *hop, __u32 hash, __u32 reason)
{
	struct dsr_settings *set;
	struct ipv6hdr *outer6;
	struct iphdr *outer4;
	__be64 source[2];
	__be32 source4;
	__u32 zero = 0;

	set = bpf_map_lookup_elem(&settings, &zero);
	if (!set)
		return verdict(REASON_NO_ROOM, XDP_DROP);
	if (backend->family == NETWORK_IPV4) {
		outer4 = make_room(ctx, inner, sizeof(*outer4), bpf_htons(ETH_P_IP));
		if (!outer4)
			return verdict(REASON_NO_ROOM, XDP_DROP);
		source4 = hop || set->outer4_mask ? outer_source4(set, hash) : IPV4_DUMMY;
		fill_outer4(outer4, inner, source4, *(any_u32 *)backend->address);
	} else {
		outer6 = make_room(ctx, inner, sizeof(*outer6), bpf_htons(ETH_P_IPV6));
		if (!outer6)
			return verdict(REASON_NO_ROOM, XDP_DROP);
		source[0] = set->outer6[0];
		source[1] = outer_source6_low(set, hash);
		fill_outer6(outer6, inner, hash, source, backend->address);
	}
	if (!hop)
		return verdict(reason, XDP_PASS);
	return sent(reason, next_hop_send(ctx, hop, (void *)(long)ctx->data, (void *)(long)ctx->data_end,
					  inner->network_at > sizeof(struct ethhdr)));
}

/*
 * Bytes of the longest packet that may go on to a next hop. Where the host's stack sends it, that decides; but no outer header
 * tells a length of more than 65535.
 */
static __always_inline __u32 longest(const struct next_hop *hop, __u32 overhead)
{
	__u32 mtu = hop ? hop->mtu : ~0U;

	if (overhead && mtu > IP_LENGTH_MAX)
		mtu = IP_LENGTH_MAX;
	return mtu - overhead;
}

static __always_inline __u32 no_path(__u32 state)
{
	if (state == NEXT_HOP_OFF_LINK)
		return REASON_OFF_LINK;
	return state == NEXT_HOP_NO_ROUTE || state == NEXT_HOP_UNKNOWN ? REASON_NO_ROUTE : REASON_NO_EGRESS;
}

/* Whether a packet can go on at all: the host's stack sends none that has a virtual address as its destination. */
static __always_inline bool can_go_on(__u32 state, bool ipip)
{
	return state == NEXT_HOP_FOUND || state == NEXT_HOP_UNRESOLVED || (ipip && state == NEXT_HOP_BY_STACK);
}

/* The reason of a packet to a backend in this state, where it is another than that of a packet that is sent. */
static __always_inline __u32 reason_in(__u32 state, __u32 reason)
{
	if (state == NEXT_HOP_UNRESOLVED)
		return REASON_UNRESOLVED;
	return state == NEXT_HOP_BY_STACK ? REASON_VIA_STACK : reason;
}

/* What forward_rest() is told beside the backend: enum xdpkit_reason, enum next_hop_state and a flag, from the lowest bits on. */
#define REST_STATE_SHIFT 16
#define REST_OPENS_SHIFT 24
/* And of the numbers, the service's above the backend's. */
#define REST_SERVICE_SHIFT 16

/*
 * Whatever is not just sent to a next hop that is known: it goes to the host's stack, or may be fragmented on the way, or
 * nowhere. With REASON_TOO_BIG and XDP_DROP, the sender is to be told. Global, for the states of the verifier: few packets
 * need it. Weak: see parse.h.
 */
__attribute__((noinline, weak)) __u64 forward_rest(struct xdp_md *ctx, __u32 numbers, __u32 what, __u32 hash,
						   __u64 choice)
{
	__u32 number = numbers & 0xffff, service_number = numbers >> REST_SERVICE_SHIFT, overhead = 0, mtu;
	__u32 state = what >> REST_STATE_SHIFT & 0xff, reason = reason_in(state, what & 0xffff);
	struct backend_state *counts = bpf_map_lookup_elem(&backend_states, &number);
	struct service *service = bpf_map_lookup_elem(&services, &service_number);
	struct backend *backend = bpf_map_lookup_elem(&backends, &number);
	struct next_hop *hop = NULL;
	struct inner inner;
	struct packet p;
	bool ipip;

	if (!counts || !service || !backend || parse_again(ctx, &p) != REASON_NONE || p.network < NETWORK_IPV4)
		return verdict(REASON_NO_BACKEND, XDP_DROP);
	ipip = service->flags & DSR_IPIP;
	if (!can_go_on(state, ipip))
		return verdict(no_path(state), XDP_DROP);
	if (state == NEXT_HOP_FOUND)
		hop = next_hop_line(choice & NEXT_HOP_NUMBER);
	inner_read(&p, &inner);
	if (ipip)
		overhead = backend->family == NETWORK_IPV4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);
	/* Only a kernel's tunnel device puts the fragments of an outer packet together. */
	if (inner.frag_off || !(service->flags & DSR_OUTER_FRAGMENTS))
		inner.frag_off = bpf_htons(IP_DF);
	else if (backend->family == NETWORK_IPV4)
		inner.id = next_identification();
	mtu = longest(hop, overhead);
	if (inner.length > mtu) {
		if (inner.frag_off || !overhead || backend->family != NETWORK_IPV4 ||
		    inner.length > IP_LENGTH_MAX - overhead)
			return verdict(REASON_TOO_BIG, XDP_DROP);
		reason = REASON_TOO_BIG;
		hop = NULL;
	}
	counts->packets++;
	counts->bytes += bpf_xdp_get_buff_len(ctx);
	counts->flows += what >> REST_OPENS_SHIFT;
	decrement_hops(&p);
	if (ipip)
		return forward_ipip(ctx, &inner, backend, hop, hash, reason);
	if (!hop)
		return verdict(REASON_UNRESOLVED, XDP_DROP);
	return sent(reason, next_hop_send(ctx, hop, p.data, p.end, p.vlans));
}

/* To the backend that was chosen, with the headers that `p` has found. */
static __always_inline __u64 forward(struct xdp_md *ctx, const struct packet *p, const struct choice *c, __u64 bytes)
{
	struct backend_state *counts = bpf_map_lookup_elem(&backend_states, &c->t.backend);
	struct service *service = bpf_map_lookup_elem(&services, &c->t.service);
	struct backend *backend = bpf_map_lookup_elem(&backends, &c->t.backend);
	struct dsr_paths *known = bpf_map_lookup_elem(&paths, &c->t.backend);
	__u32 overhead = 0, path, state;
	struct next_hop *hop = NULL;
	struct inner inner;
	union verdict v;
	__u64 choice;
	bool ipip;

	if (!counts || !service || !backend || !known)
		return verdict(REASON_NO_BACKEND, XDP_DROP);
	ipip = service->flags & DSR_IPIP;
	if (p->network == NETWORK_IPV4 ? p->ip4->ttl <= 1 : p->ip6->hop_limit <= 1)
		return verdict(REASON_HOP_LIMIT, expire(ctx));
	path = (__u64)c->hash * DSR_PATHS >> 32;
	choice = *choice_of(known, path);
	state = next_hop_state(ctx, choice, &hop);
	/* What cannot be sent to may be by now. */
	if (state != NEXT_HOP_FOUND || !next_hop_is_fresh(choice, next_hop_generation())) {
		choice = choose_path(ctx, c->t.backend, path | (ipip ? PATH_OF_IPIP : 0) | p->network << PATH_INNER_SHIFT);
		state = next_hop_state(ctx, choice, &hop);
	}
	if ((known->told >> DSR_TOLD_STATE_SHIFT & 0xff) != state)
		notice(ctx, c->t.backend, path, choice);
	if (ipip)
		overhead = backend->family == NETWORK_IPV4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);
	/* Older verifiers do not see that what is found is there. */
	asm volatile("" : "+r"(hop));
	if (!hop || state != NEXT_HOP_FOUND || service->flags & DSR_OUTER_FRAGMENTS) {
		v.packed = forward_rest(ctx, c->t.service << REST_SERVICE_SHIFT | c->t.backend,
					c->reason | state << REST_STATE_SHIFT |
						(c->flags & CHOICE_OPENS ? 1U << REST_OPENS_SHIFT : 0),
					c->hash, choice);
		if (v.action != XDP_DROP)
			return v.packed;
		if (v.reason == REASON_TOO_BIG)
			return refuse_too_big(ctx, c->t.service, longest(hop, overhead), p->network);
		return v.reason == REASON_UNRESOLVED ? resolve_l2(ctx, c->t.backend) : v.packed;
	}
	inner_read(p, &inner);
	inner.frag_off = bpf_htons(IP_DF);
	if (inner.length > longest(hop, overhead))
		return refuse_too_big(ctx, c->t.service, longest(hop, overhead), p->network);

	counts->packets++;
	counts->bytes += bytes;
	counts->flows += c->flags & CHOICE_OPENS;
	decrement_hops(p);
	if (ipip)
		return forward_ipip(ctx, &inner, backend, hop, c->hash, c->reason);
	return sent(c->reason, next_hop_send(ctx, hop, p->data, p->end, p->vlans));
}

#endif
