// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * DsrBalancer: sends packets for a virtual address to a backend that answers the client itself, as they are to a
 * neighbour, or inside an outer IP header. Which backend, a table says; flows are remembered only where it changes.
 */
#include "include/kernel.h"
#include "include/parse.h"
#include "include/locate.h"
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

SHARED_ARRAY(paths, struct dsr_paths);

/* Of a frame for which there was no room after all, nothing was sent. */
static __always_inline __u64 sent(__u32 reason, int action)
{
	return action == XDP_DROP ? verdict(REASON_NO_ROOM, XDP_DROP) : verdict(reason, action);
}

/* Says what the next hop to a backend is, unless that was said last. */
static __always_inline void tell(__u32 number, __u32 path, __u32 state, const struct next_hop *hop)
{
	struct dsr_paths *known = bpf_map_lookup_elem(&paths, &number);
	struct backend *backend = bpf_map_lookup_elem(&backends, &number);
	__u64 to = state == NEXT_HOP_FOUND && hop ? hop->to : 0, before, now;
	struct dsr_event *event;

	if (!known || !backend)
		return;
	now = to | (__u64)state << DSR_TOLD_STATE_SHIFT | (__u64)path << DSR_TOLD_PATH_SHIFT;
	before = *(volatile __u64 *)&known->told;
	/* Another CPU says it. */
	if (before == now || __sync_val_compare_and_swap(&known->told, before, now) != before)
		return;
	event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (!event)
		return;
	event->timestamp = bpf_ktime_get_ns();
	event->backend = number;
	event->identity = backend->identity;
	event->interface = hop ? hop->interface : 0;
	event->state = state;
	event->cpu = bpf_get_smp_processor_id();
	__builtin_memcpy(event->mac, &to, sizeof(event->mac));
	bpf_ringbuf_submit(event, 0);
}

/*
 * A path is in another state than was told last: that is news if it is the same path. Global: it is rare. Weak: see parse.h.
 */
__attribute__((noinline, weak)) int notice(struct xdp_md *ctx, __u32 number, __u32 path, __u64 choice)
{
	struct dsr_paths *known = bpf_map_lookup_elem(&paths, &number);
	struct next_hop *hop = NULL;
	__u32 state;

	if (!known || known->told >> DSR_TOLD_PATH_SHIFT != path)
		return 0;
	state = next_hop_state(ctx, choice, &hop);
	tell(number, path, state, hop);
	return 0;
}

/*
 * Whether a path of a backend leads to this MAC address: where there are several, others than the last that was told are no
 * news. Global, as all that few packets need.
 */
__attribute__((noinline, weak)) int leads_to(__u32 number, __u64 mac)
{
	struct dsr_paths *known = bpf_map_lookup_elem(&paths, &number);
	struct next_hop *hop;

	if (!known)
		return false;
	for (int i = 0; i < DSR_PATHS; i++) {
		hop = next_hop_line(known->choice[i] & NEXT_HOP_NUMBER);
		if (known->choice[i] & NEXT_HOP_NUMBER && hop && hop->to == mac)
			return true;
	}
	return false;
}

/* Outer source addresses of one path stand for those of all its flows. */
static __always_inline void outer_source(struct next_hop_request *request, const struct dsr_settings *set, __u32 hash)
{
	__be64 low;

	if (request->family == NETWORK_IPV4) {
		request->source[0] = set->outer4 | (hash & set->outer4_mask);
		return;
	}
	low = set->outer6[1] | (((__u64)hash << 32 | hash) & set->outer6_mask);
	*(any_u64 *)&request->source[0] = set->outer6[0];
	*(any_u64 *)&request->source[2] = low;
}

/* The packet at hand stands for all to a neighbour. Global, as all that few packets need. Weak: see parse.h. */
__attribute__((noinline, weak)) int take_sample(struct xdp_md *ctx, __u32 number)
{
	struct dsr_paths *known = bpf_map_lookup_elem(&paths, &number);
	struct dsr_sample *sample;
	struct packet p;

	if (!known || parse_again(ctx, &p) != REASON_NONE || p.network < NETWORK_IPV4)
		return 0;
	/* The kernel forwards none from a link-local address: it stands for no other. */
	if (p.network == NETWORK_IPV6 && (p.ip6->saddr.s6_addr32[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000))
		return 0;
	sample = &known->sample;
	sample->source[1] = 0;
	if (p.network == NETWORK_IPV4)
		sample->source[0] = p.ip4->saddr;
	else
		__builtin_memcpy(sample->source, &p.ip6->saddr, 16);
	sample->ports = 0;
	if (p.transport_header && (p.protocol == IPPROTO_TCP || p.protocol == IPPROTO_UDP))
		sample->ports = (__u32)p.udp->dest << 16 | p.udp->source;
	/* Last: then it counts. */
	*(volatile __u32 *)&sample->protocol = p.protocol | (__u32)p.network << DSR_SAMPLE_NETWORK_SHIFT;
	return 1;
}

/* The last bits of addresses and ports: clients whose addresses differ by those are of one network. */
static __always_inline void sample_source(struct next_hop_request *request, const struct dsr_sample *sample, __u32 path)
{
	if (sample->protocol >> DSR_SAMPLE_NETWORK_SHIFT != request->family)
		return;
	*(any_u64 *)&request->source[0] = sample->source[0];
	*(any_u64 *)&request->source[2] = sample->source[1];
	request->source[request->family == NETWORK_IPV4 ? 0 : 3] ^= bpf_htonl(path);
	request->source_port = sample->ports ^ bpf_htons(path);
	request->destination_port = sample->ports >> 16;
	request->protocol = sample->protocol;
}

#define PATH_HASH 0x9e3779b9U
/* In what choose_path() is told. */
#define PATH_OF_IPIP 0x100
#define PATH_INNER_SHIFT 16

/* Where the choice of a path is kept. */
static __always_inline volatile __u64 *choice_of(struct dsr_paths *known, __u32 path)
{
	return &known->choice[path & (DSR_PATHS - 1)];
}

/* Of a probe, whose choice is kept nowhere. */
#define PATH_OF_PROBE DSR_PATHS

/* What choose_path() asks for: not on the stack, which is short. */
PER_CPU_ARRAY(requests, struct next_hop_request);

/*
 * Chooses the next hop to a backend; in L2 mode only among neighbours. `what`: the path; PATH_OF_IPIP; enum
 * packet_network of the packet. Global: once a generation a packet needs it. Weak: see parse.h.
 */
__attribute__((noinline, weak)) __u64 choose_path(struct xdp_md *ctx, __u32 number, __u32 what)
{
	struct dsr_paths *known = bpf_map_lookup_elem(&paths, &number);
	struct backend *backend = bpf_map_lookup_elem(&backends, &number);
	__u32 zero = 0, path = what & 0xff;
	struct next_hop_request *request = bpf_map_lookup_elem(&requests, &zero);
	struct dsr_settings *set = bpf_map_lookup_elem(&settings, &zero);
	struct next_hop *hop = NULL;
	volatile __u64 *kept;
	__u64 choice, told;
	__u32 state;

	if (!known || !backend || !set || !request)
		return 0;
	kept = choice_of(known, path);
	if (path != PATH_OF_PROBE && next_hop_is_hopeless(*kept))
		return *kept;
	__builtin_memset(request, 0, sizeof(*request));
	*(any_u64 *)&request->destination[0] = backend->address[0];
	*(any_u64 *)&request->destination[2] = backend->address[1];
	request->family = backend->family;
	if (what & PATH_OF_IPIP) {
		request->protocol = what >> PATH_INNER_SHIFT == NETWORK_IPV4 ? IPPROTO_IPIP : IPPROTO_IPV6;
		outer_source(request, set, path * PATH_HASH);
	} else {
		request->on_link = true;
		if (path != PATH_OF_PROBE) {
			if (!known->sample.protocol)
				take_sample(ctx, number);
			sample_source(request, &known->sample, path);
		}
	}
	choice = next_hop_choose(ctx, request);
	if (path == PATH_OF_PROBE)
		return choice;
	*choice_of(known, path) = choice;
	state = next_hop_state(ctx, choice, &hop);
	told = known->told;
	if (!told || (state == NEXT_HOP_FOUND && !leads_to(number, told & DSR_TOLD_MAC_MASK)))
		tell(number, path, state, hop);
	return choice;
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
		source4 = hop || set->outer4_mask ? set->outer4 | (hash & set->outer4_mask) : IPV4_DUMMY;
		fill_outer4(outer4, inner, source4, *(any_u32 *)backend->address);
	} else {
		outer6 = make_room(ctx, inner, sizeof(*outer6), bpf_htons(ETH_P_IPV6));
		if (!outer6)
			return verdict(REASON_NO_ROOM, XDP_DROP);
		source[0] = set->outer6[0];
		source[1] = set->outer6[1] | (((__u64)hash << 32 | hash) & set->outer6_mask);
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

SEC("xdp.frags")
int dsr_balancer(struct xdp_md *ctx)
{
	struct balancer_settings *now = balancer_settings();
	union verdict v = { .action = XDP_PASS };
	struct xdpkit_counters *all;
	struct service_state *state;
	struct choice c = {};
	struct packet p;
	__u64 bytes, probe;
	__u32 vip = 0;

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
		v.reason = REASON_NOT_A_PROBE;
		v.action = XDP_DROP;
		probe = find_probe(ctx, vip);
		if (probe)
			v.packed = forward_probe(ctx, probe, choose_path(ctx, probe, probe >> PROBE_WHAT_SHIFT));
		if (v.reason == REASON_UNRESOLVED && v.action == XDP_DROP)
			v.packed = resolve_l2(ctx, probe);
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
		if (parse_again(ctx, &p) != REASON_NONE || p.network < NETWORK_IPV4) {
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
