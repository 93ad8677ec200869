/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The ways to a backend: 32 of them, so that a route with several next hops is used as a whole. Each keeps the next hop that
 * the host's routes chose for it; what changes is told to user space.
 */
#ifndef XDPKIT_DSR_PATHS_H
#define XDPKIT_DSR_PATHS_H

#include "locate.h"
#include "service.h"
#include "next_hop.h"
#include "dsr_select.h"
#include "../abi/dsr_balancer.h"

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 16);
} events SEC(".maps");

SHARED_ARRAY(paths, struct dsr_paths);

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

/* Outer source addresses differ by flow within a prefix, for whoever spreads packets by them; those of one path all alike. */
static __always_inline __be32 outer_source4(const struct dsr_settings *set, __u32 hash)
{
	return set->outer4 | (hash & set->outer4_mask);
}

static __always_inline __be64 outer_source6_low(const struct dsr_settings *set, __u32 hash)
{
	return set->outer6[1] | (((__u64)hash << 32 | hash) & set->outer6_mask);
}

static __always_inline void outer_source(struct next_hop_request *request, const struct dsr_settings *set, __u32 hash)
{
	if (request->family == NETWORK_IPV4) {
		request->source[0] = outer_source4(set, hash);
		return;
	}
	*(any_u64 *)&request->source[0] = set->outer6[0];
	*(any_u64 *)&request->source[2] = outer_source6_low(set, hash);
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

#endif
