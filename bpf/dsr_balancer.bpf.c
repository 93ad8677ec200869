// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * DsrBalancer: sends packets for a virtual address to a backend that answers the client itself, as they are to a
 * neighbour, or inside an outer IP header. Which backend, a table says; flows are remembered only where it changes.
 */
#include "include/kernel.h"
#include "include/parse.h"
#include "include/stage.h"
#include "include/own_macs.h"
#include "include/service.h"
#include "include/next_hop.h"
#include "include/checksum.h"
#include "include/encapsulate.h"
#include "include/resolve.h"
#include "include/answer.h"
#include "include/dsr_select.h"
#include "abi/dsr_balancer.h"

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

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 16);
} events SEC(".maps");

/*
 * Looks for the way to a backend, in L2 mode only among neighbours, and reports when it is another than before. Global:
 * once in a while, on each CPU, a packet needs it. Weak: see parse.h.
 */
__attribute__((noinline, weak)) int find_way(struct xdp_md *ctx, __u32 number, __u32 on_link)
{
	struct backend_state *state = bpf_map_lookup_elem(&backend_states, &number);
	struct backend *backend = bpf_map_lookup_elem(&backends, &number);
	struct next_hop_request request;
	struct dsr_event *event;
	any_u32 *macs, before[2];
	__u32 was;

	if (!state || !backend)
		return 0;
	*(any_u64 *)&request.destination[0] = backend->address[0];
	*(any_u64 *)&request.destination[2] = backend->address[1];
	request.family = backend->family;
	request.flags = on_link ? NEXT_HOP_ON_LINK : 0;
	macs = (any_u32 *)state->hop.macs;
	was = state->hop.state;
	before[0] = macs[0];
	before[1] = macs[1] & 0xffff;
	next_hop_find(ctx, &request, &state->hop);
	if (state->hop.state == was && (was != NEXT_HOP_FOUND || (macs[0] == before[0] && (macs[1] & 0xffff) == before[1])))
		return 0;
	event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (!event)
		return 0;
	event->timestamp = bpf_ktime_get_ns();
	event->backend = number;
	event->identity = backend->identity;
	event->interface = state->hop.interface;
	event->state = state->hop.state;
	event->cpu = bpf_get_smp_processor_id();
	__builtin_memcpy(event->mac, state->hop.macs, sizeof(event->mac));
	bpf_ringbuf_submit(event, 0);
	return 0;
}

/* Of what was merged, the stack makes no request that leaves. Global: few packets need it. Weak: see parse.h. */
__attribute__((noinline, weak)) int ask_for_neighbour(struct xdp_md *ctx, __u32 number)
{
	struct backend *backend = bpf_map_lookup_elem(&backends, &number);
	struct packet p;

	if (!backend || parse(ctx, &p) != REASON_NONE || p.network != backend->family ||
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

/* An ICMP echo request for one of our addresses, which answers by itself. Global: few packets need it. Weak: see parse.h. */
__attribute__((noinline, weak)) __u64 reply_to_echo(struct xdp_md *ctx)
{
	struct balancer_settings *now = balancer_settings();

	if (!now || !may_answer(now))
		return verdict(REASON_ANSWER_LIMITED, XDP_DROP);
	if (!is_answerable(ctx, false) || !answer_echo(ctx, is_blank_echo(ctx)))
		return verdict(REASON_NO_SERVICE, XDP_PASS);
	return verdict(REASON_ECHO_ANSWERED, XDP_TX);
}

static __always_inline __u64 send(struct xdp_md *ctx, struct next_hop *hop, __u32 reason)
{
	return verdict(reason, next_hop_send(ctx, hop));
}

/* To a neighbour whose MAC is known, as it is but for the MACs. */
static __always_inline __u64 send_l2(struct xdp_md *ctx, const struct packet *p, struct next_hop *hop, __u32 reason)
{
	void *data = p->data;

	if (data + sizeof(struct ethhdr) > p->end)
		return verdict(REASON_NO_ROOM, XDP_DROP);
	__builtin_memcpy(data, hop->macs, 12);
	return send(ctx, hop, reason);
}

static __always_inline __u64 resolve_l2(struct xdp_md *ctx, __u32 number)
{
	return verdict(REASON_UNRESOLVED, ask_for_neighbour(ctx, number) ? XDP_PASS : XDP_DROP);
}

static __always_inline __u64 forward_l2(struct xdp_md *ctx, const struct packet *p, __u32 number,
					struct next_hop *hop, __u32 reason)
{
	return hop->state == NEXT_HOP_UNRESOLVED ? resolve_l2(ctx, number) : send_l2(ctx, p, hop, reason);
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
 * Inside an outer header. With `reason` REASON_TOO_BIG, the host's stack forwards and fragments it; it forwards, too, what
 * goes to a next hop whose MAC is not known, and finds that out.
 */
static __always_inline __u64 forward_ipip(struct xdp_md *ctx, const struct inner *inner, const struct backend *backend,
					  struct next_hop *hop, __u32 hash, __u32 reason)
{
	const __u8 *macs = hop->state == NEXT_HOP_FOUND && reason != REASON_TOO_BIG ? hop->macs : NULL;
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
		outer4 = make_room(ctx, inner, sizeof(*outer4), macs, bpf_htons(ETH_P_IP));
		if (!outer4)
			return verdict(REASON_NO_ROOM, XDP_DROP);
		source4 = macs || set->outer4_mask ? set->outer4 | (hash & set->outer4_mask) : IPV4_DUMMY;
		fill_outer4(outer4, inner, source4, *(any_u32 *)backend->address);
	} else {
		outer6 = make_room(ctx, inner, sizeof(*outer6), macs, bpf_htons(ETH_P_IPV6));
		if (!outer6)
			return verdict(REASON_NO_ROOM, XDP_DROP);
		source[0] = set->outer6[0];
		source[1] = set->outer6[1] | (((__u64)hash << 32 | hash) & set->outer6_mask);
		fill_outer6(outer6, inner, hash, source, backend->address);
	}
	if (macs)
		return send(ctx, hop, reason);
	return verdict(reason == REASON_TOO_BIG ? reason : REASON_UNRESOLVED, XDP_PASS);
}

/*
 * Bytes of the longest packet that may go on by this hop. Where none is known yet, the host's stack decides; but no outer
 * header tells a length of more than 65535.
 */
static __always_inline __u32 longest(const struct next_hop *hop, __u32 overhead)
{
	__u32 mtu = hop->state == NEXT_HOP_FOUND ? hop->mtu : ~0U;

	if (overhead && mtu > IP_LENGTH_MAX)
		mtu = IP_LENGTH_MAX;
	return mtu - overhead;
}

static __always_inline __u32 no_way(const struct next_hop *hop)
{
	return hop->state == NEXT_HOP_OFF_LINK ? REASON_OFF_LINK : REASON_NO_ROUTE;
}

/*
 * A health check's probe: it goes to the backend that its source port names, whatever that one's weight, and leaves no
 * trace but its reason. The way is looked up for it alone. A hop limit of 255 shows that a socket of this host has sent
 * it (RFC 5082): what the host forwards, such as a client's packet to a port without a service, goes no further. Resets
 * may have any: the host's stack sends some without a socket, and without them a backend that has missed the end of one
 * probe would not take the next, from the same port. Global: probes are few. Weak: see parse.h. Names the backend above the
 * reason when that has to be resolved.
 */
#define PROBE_BACKEND_SHIFT 16

__attribute__((noinline, weak)) __u64 forward_probe(struct xdp_md *ctx, __u32 vip)
{
	struct balancer_settings *now = balancer_settings();
	struct next_hop_request request = {};
	struct service *service = NULL;
	struct next_hop hop = {};
	struct backend *backend;
	struct inner inner;
	struct packet p;
	__u32 number, hops, overhead = 0;
	bool ipip;

	if (!now || parse(ctx, &p) != REASON_NONE || p.network < NETWORK_IPV4 || p.protocol != IPPROTO_TCP ||
	    p.fragment != FRAGMENT_NONE || !p.transport_header)
		return verdict(REASON_NOT_A_PROBE, XDP_DROP);
	number = bpf_ntohs(p.tcp->source) - now->probe_base;
	backend = bpf_map_lookup_elem(&backends, &number);
	if (backend && (backend->flags & (BACKEND_USED | BACKEND_KILLED)) == BACKEND_USED)
		service = service_record(backend->service);
	hops = p.network == NETWORK_IPV4 ? p.ip4->ttl : p.ip6->hop_limit;
	if (!service || !(service->flags & SERVICE_USED) || service->vip != vip ||
	    (hops != 255 && (hops <= 1 || !(p.tcp->flags & TCP_RST))))
		return verdict(REASON_NOT_A_PROBE, XDP_DROP);
	ipip = service->flags & DSR_IPIP;
	*(any_u64 *)&request.destination[0] = backend->address[0];
	*(any_u64 *)&request.destination[2] = backend->address[1];
	request.family = backend->family;
	request.flags = ipip ? 0 : NEXT_HOP_ON_LINK;
	next_hop_find(ctx, &request, &hop);
	if (hop.state != NEXT_HOP_FOUND && hop.state != NEXT_HOP_UNRESOLVED)
		return verdict(no_way(&hop), XDP_DROP);
	inner_read(&p, &inner);
	inner.frag_off = bpf_htons(IP_DF);
	if (ipip)
		overhead = backend->family == NETWORK_IPV4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);
	if (inner.length > longest(&hop, overhead))
		return verdict(REASON_TOO_BIG, XDP_DROP);
	/* The caller resolves it: there is more room on the stack. */
	if (!ipip && hop.state == NEXT_HOP_UNRESOLVED)
		return verdict(REASON_UNRESOLVED | number << PROBE_BACKEND_SHIFT, XDP_DROP);
	if (p.network == NETWORK_IPV4)
		ipv4_decrement_ttl(p.ip4);
	else
		p.ip6->hop_limit--;
	if (ipip)
		return forward_ipip(ctx, &inner, backend, &hop, index_hash(number) >> 32, REASON_PROBED);
	return send_l2(ctx, &p, &hop, REASON_PROBED);
}

/* To the backend that was chosen, with the headers that `p` has found. */
static __always_inline __u64 forward(struct xdp_md *ctx, const struct packet *p, const struct choice *c, __u64 bytes)
{
	struct backend_state *state = bpf_map_lookup_elem(&backend_states, &c->t.backend);
	struct service *service = bpf_map_lookup_elem(&services, &c->t.service);
	struct backend *backend = bpf_map_lookup_elem(&backends, &c->t.backend);
	__u32 overhead = 0, mtu, reason = c->reason;
	struct inner inner;
	bool ipip;

	if (!state || !service || !backend)
		return verdict(REASON_NO_BACKEND, XDP_DROP);
	ipip = service->flags & DSR_IPIP;
	if (p->network == NETWORK_IPV4 ? p->ip4->ttl <= 1 : p->ip6->hop_limit <= 1)
		return verdict(REASON_HOP_LIMIT, expire(ctx));
	if (!next_hop_is_fresh(&state->hop))
		find_way(ctx, c->t.backend, !ipip);
	if (state->hop.state != NEXT_HOP_FOUND && state->hop.state != NEXT_HOP_UNRESOLVED)
		return verdict(no_way(&state->hop), XDP_DROP);
	inner_read(p, &inner);
	if (ipip)
		overhead = backend->family == NETWORK_IPV4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);
	/* Only a kernel's tunnel device puts the fragments of an outer packet together. */
	if (inner.frag_off || !(service->flags & DSR_OUTER_FRAGMENTS))
		inner.frag_off = bpf_htons(IP_DF);
	else if (backend->family == NETWORK_IPV4)
		inner.id = next_identification();
	mtu = longest(&state->hop, overhead);
	if (inner.length > mtu) {
		if (inner.frag_off || !overhead || backend->family != NETWORK_IPV4 ||
		    inner.length > IP_LENGTH_MAX - overhead)
			return refuse_too_big(ctx, c->t.service, mtu, p->network);
		reason = REASON_TOO_BIG;
	}

	state->packets++;
	state->bytes += bytes;
	state->flows += c->flags & CHOICE_OPENS;
	if (p->network == NETWORK_IPV4)
		ipv4_decrement_ttl(p->ip4);
	else
		p->ip6->hop_limit--;
	if (ipip)
		return forward_ipip(ctx, &inner, backend, &state->hop, c->hash, reason);
	return forward_l2(ctx, p, c->t.backend, &state->hop, reason);
}

SEC("xdp.frags")
int dsr_balancer(struct xdp_md *ctx)
{
	struct balancer_settings *now = balancer_settings();
	union verdict v = { .action = XDP_PASS };
	struct xdpkit_counters *all;
	struct service_state *state;
	struct choice c = {};
	struct packet p;
	__u32 vip = 0;
	__u64 bytes;

	if (!now)
		return XDP_ABORTED;
	v.reason = parse(ctx, &p);
	bytes = frame_bytes(ctx, &p);
	if (p.network == NETWORK_IPV4)
		vip = vip_find4(now, p.ip4->daddr);
	else if (p.network == NETWORK_IPV6)
		vip = vip_find6(now, &p.ip6->daddr);
	if (!vip) {
		/* Malformed or not, it is none of ours. */
		if (v.reason == REASON_NONE)
			v.reason = REASON_NOT_FOR_VIP;
		goto end;
	}
	/* A malformed frame has its Ethernet header as long as it has a virtual address. */
	if (!p.eth || !is_for_us(p.eth)) {
		v.reason = REASON_NOT_FOR_US;
		goto end;
	}
	if (v.reason != REASON_NONE) {
		v.action = XDP_DROP;
		goto end;
	}
	if (ctx->ingress_ifindex == now->probe_interface) {
		v.packed = forward_probe(ctx, vip);
		if (v.reason >> PROBE_BACKEND_SHIFT)
			v.packed = resolve_l2(ctx, v.reason >> PROBE_BACKEND_SHIFT);
		goto end;
	}

	if (p.fragment == FRAGMENT_NONE && p.transport_header && !p.routed &&
	    (p.protocol == IPPROTO_TCP || p.protocol == IPPROTO_UDP)) {
		choose_for_flow(&c, now, vip, &p);
	} else {
		choose_for_rest(ctx, &c, vip);
	}
	if (c.reason == REASON_FORWARDED || c.reason == REASON_ERROR_FORWARDED)
		choose_by_slot(&c);
	if (c.t.service) {
		state = bpf_map_lookup_elem(&service_states, &c.t.service);
		if (state) {
			state->packets++;
			state->bytes += bytes;
			state->flows += c.flags & CHOICE_OPENS;
			state->no_backend += !c.t.backend && c.reason == REASON_NO_BACKEND;
		}
	}
	if (c.flags & CHOICE_FIRST && (c.t.backend || c.action == XDP_PASS))
		fragment_remember(ctx, c.t.backend ? c.t.backend : FRAGMENT_HOST, c.t.service);
	if (!c.t.backend) {
		v.packed = c.reason == REASON_ECHO_ANSWERED ? reply_to_echo(ctx) : verdict(c.reason, c.action);
		goto end;
	}
	if (c.flags & CHOICE_REST) {
		/* Once more: what was parsed is not kept across calls. */
		if (parse(ctx, &p) != REASON_NONE || p.network < NETWORK_IPV4) {
			v.packed = verdict(REASON_NO_ROOM, XDP_DROP);
			goto end;
		}
	}
	v.packed = forward(ctx, &p, &c, bytes);
end:
	/* Looked up here, not before: the stack of a program with all its functions is short. */
	all = stage_counters();
	return all ? stage_end(ctx, all, bytes, v.reason, v.action) : XDP_ABORTED;
}
