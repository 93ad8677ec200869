/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Reporting packets to user space: sampling, the ring buffer, and the record of a packet. */
#ifndef XDPKIT_EVENT_H
#define XDPKIT_EVENT_H

#include "parse.h"
#include "../abi/event.h"

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct events_state);
} events_state SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} events SEC(".maps");

/* This CPU's state for a packet that is to be reported, or NULL. */
static __always_inline struct events_state *sampled(__u32 every)
{
	struct events_state *state;
	__u32 zero = 0;

	state = bpf_map_lookup_elem(&events_state, &zero);
	return state && state->seen++ % every == 0 ? state : NULL;
}

static __always_inline void fill_event(struct packet_event *e, const struct packet *p)
{
	__builtin_memcpy(e->source_mac, p->eth->h_source, 6);
	__builtin_memcpy(e->destination_mac, p->eth->h_dest, 6);
	e->ether_type = p->ether_type;
	__builtin_memcpy(e->vlan_tci, p->vlan_tci, sizeof(e->vlan_tci));
	e->vlans = p->vlans;
	e->network = p->network;
	e->protocol = p->protocol;
	e->fragment = p->fragment;
	if (p->network == NETWORK_IPV4) {
		__builtin_memcpy(e->source, &p->ip4->saddr, 4);
		__builtin_memcpy(e->destination, &p->ip4->daddr, 4);
		e->hop_limit = p->ip4->ttl;
	} else if (p->network == NETWORK_IPV6) {
		__builtin_memcpy(e->source, &p->ip6->saddr, 16);
		__builtin_memcpy(e->destination, &p->ip6->daddr, 16);
		e->hop_limit = p->ip6->hop_limit;
	}
	if (!p->transport_header)
		return;
	e->transport = 1;
	if (p->protocol == IPPROTO_TCP) {
		e->source_port = p->tcp->source;
		e->destination_port = p->tcp->dest;
		e->tcp_flags = p->tcp->flags;
	} else if (p->protocol == IPPROTO_UDP) {
		e->source_port = p->udp->source;
		e->destination_port = p->udp->dest;
	} else {
		e->icmp_type = p->icmp->type;
		e->icmp_code = p->icmp->code;
	}
}

/* By a helper, because the frame may lie in several buffers. */
static __always_inline void capture(struct xdp_md *ctx, struct packet_event *e, __u64 bytes)
{
	__u32 length = bytes < EVENT_FRAME_BYTES ? bytes : EVENT_FRAME_BYTES;
	__u32 last = length - 1;

	/*
	 * For the verifier: the helper takes no empty buffer. The length is made of what was compared, because Linux 6.1 learns
	 * nothing of a number from a comparison of that number less one.
	 */
	barrier_var(last);
	if (last >= EVENT_FRAME_BYTES)
		return;
	length = last + 1;
	if (!bpf_xdp_load_bytes(ctx, 0, e->frame, length))
		e->captured = length;
}

/* Belongs into a global function: it would keep all that was parsed alive on the path of every packet. */
static __always_inline bool report(struct xdp_md *ctx, const struct packet *p, __u64 bytes, __u32 reason,
				   __u32 action, __u32 detail)
{
	struct packet_event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);

	if (!e)
		return false;
	__builtin_memset(e, 0, sizeof(*e));
	e->timestamp = bpf_ktime_get_ns();
	e->interface = ctx->ingress_ifindex;
	e->rx_queue = ctx->rx_queue_index;
	e->bytes = bytes;
	e->reason = reason;
	e->action = action;
	e->detail = detail;
	if (p->eth)
		fill_event(e, p);
	capture(ctx, e, bytes);
	bpf_ringbuf_submit(e, 0);
	return true;
}

#endif
