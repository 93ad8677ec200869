// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* PacketMonitor: counts packets by protocol, reports samples of them, applies an action by protocol. */
#include "include/kernel.h"
#include "include/parse.h"
#include "include/stage.h"
#include "include/reflect.h"
#include "abi/monitor.h"

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct monitor_settings);
} settings SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct monitor_events_state);
} events_state SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} events SEC(".maps");

/* MONITOR_OTHER where there is no IP. */
static __always_inline __u32 transport_of(const struct packet *p)
{
	if (p->network < NETWORK_IPV4)
		return MONITOR_OTHER;
	if (p->protocol == IPPROTO_TCP)
		return MONITOR_TCP;
	if (p->protocol == IPPROTO_UDP)
		return MONITOR_UDP;
	if (p->protocol == IPPROTO_ICMP && p->network == NETWORK_IPV4)
		return MONITOR_ICMP;
	if (p->protocol == IPPROTO_ICMPV6 && p->network == NETWORK_IPV6)
		return MONITOR_ICMPV6;
	return MONITOR_OTHER_TRANSPORT;
}

static __always_inline void fill_event(struct monitor_event *e, const struct packet *p)
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

/* An action and its reason, packed into the scalar that a global function may return. */
union outcome {
	__u64 packed;
	struct {
		__u16 reason;
		__u8 action;
		__u8 lost; /* an event found no room */
	};
};

/*
 * What few packets need, a report or being sent back, parses once more, in a global function: the path of
 * all the others keeps little alive and stays short, and the verifier checks this one by itself. Weak, as
 * `walk_extensions`.
 */
__attribute__((noinline, weak)) __u64 report_or_send_back(struct xdp_md *ctx, __u32 reason, __u32 action,
							   __u32 wants_report)
{
	union outcome outcome = { .packed = 0 };
	struct monitor_event *e;
	struct packet p;
	__u64 bytes;

	parse(ctx, &p);
	bytes = frame_bytes(ctx, &p);
	if (action == XDP_TX && p.eth && (p.eth->h_dest[0] | p.eth->h_source[0]) & 1) {
		reason = REASON_TX_GROUP_ADDRESS;
		action = XDP_PASS;
	}
	outcome.reason = reason;
	outcome.action = action;
	if (wants_report) {
		e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
		outcome.lost = !e;
		if (e) {
			__builtin_memset(e, 0, sizeof(*e));
			e->timestamp = bpf_ktime_get_ns();
			e->interface = ctx->ingress_ifindex;
			e->rx_queue = ctx->rx_queue_index;
			e->bytes = bytes;
			e->reason = reason;
			e->action = action;
			if (p.eth)
				fill_event(e, &p);
			bpf_ringbuf_submit(e, 0);
		}
	}
	if (action == XDP_TX && p.eth)
		reflect(&p);
	return outcome.packed;
}

/* This CPU's state for a packet that is to be reported, or NULL. */
static __always_inline struct monitor_events_state *sampled(__u32 every)
{
	struct monitor_events_state *state;
	__u32 zero = 0;

	state = bpf_map_lookup_elem(&events_state, &zero);
	return state && state->seen++ % every == 0 ? state : NULL;
}

SEC("xdp.frags")
int monitor(struct xdp_md *ctx)
{
	__u32 zero = 0, transport, reason, action = XDP_PASS, set;
	struct xdpkit_counters *all = stage_counters();
	struct monitor_events_state *events_of = NULL;
	struct monitor_settings *now;
	union outcome outcome;
	struct packet p;
	__u64 bytes;

	now = bpf_map_lookup_elem(&settings, &zero);
	if (!all || !now)
		return XDP_ABORTED;
	reason = parse(ctx, &p);
	bytes = frame_bytes(ctx, &p);

	if (reason == REASON_NONE) {
		transport = transport_of(&p);
		count_one(&all->own[p.network & 3], bytes);
		if (transport)
			count_one(&all->own[transport & (MONITOR_PROTOCOLS - 1)], bytes);
		set = transport ? now->action[transport & (MONITOR_PROTOCOLS - 1)] : 0;
		if (!set)
			set = now->action[p.network & 3];
		if (set) {
			action = (set - 1) & 3;
			reason = REASON_PROTOCOL_ACTION;
		}
	}
	if (now->sample)
		events_of = sampled(now->sample);
	if (events_of || action == XDP_TX) {
		outcome.packed = report_or_send_back(ctx, reason, action, events_of != NULL);
		reason = outcome.reason;
		action = outcome.action;
		if (events_of && outcome.lost)
			events_of->lost++;
	}
	return stage_end(ctx, all, bytes, reason, action);
}
