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
	__type(value, struct monitor_protocols);
} protocols SEC(".maps");

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

/* The transport's counter, or MONITOR_OTHER where there is no IP. */
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

static __always_inline void count_protocols(const struct packet *p, __u32 transport, __u64 bytes)
{
	struct monitor_protocols *all;
	__u32 zero = 0;

	all = bpf_map_lookup_elem(&protocols, &zero);
	if (!all)
		return;
	all->count[p->network & 3].packets++;
	all->count[p->network & 3].bytes += bytes;
	if (transport) {
		all->count[transport & (MONITOR_PROTOCOLS - 1)].packets++;
		all->count[transport & (MONITOR_PROTOCOLS - 1)].bytes += bytes;
	}
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

static __always_inline void report(struct xdp_md *ctx, const struct packet *p, __u32 sample, __u64 bytes, __u32 reason,
				   __u32 action)
{
	struct monitor_events_state *state;
	struct monitor_event *e;
	__u32 zero = 0;

	state = bpf_map_lookup_elem(&events_state, &zero);
	if (!state || state->seen++ % sample)
		return;
	e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e) {
		state->lost++;
		return;
	}
	__builtin_memset(e, 0, sizeof(*e));
	e->timestamp = bpf_ktime_get_ns();
	e->interface = ctx->ingress_ifindex;
	e->rx_queue = ctx->rx_queue_index;
	e->bytes = bytes;
	e->reason = reason;
	e->action = action;
	if (p->eth)
		fill_event(e, p);
	bpf_ringbuf_submit(e, 0);
}

SEC("xdp.frags")
int monitor(struct xdp_md *ctx)
{
	__u32 zero = 0, transport, reason, action = XDP_PASS, set;
	struct monitor_settings *now;
	struct packet p;
	__u64 bytes;

	reason = parse(ctx, &p);
	bytes = frame_bytes(ctx, &p);
	now = bpf_map_lookup_elem(&settings, &zero);
	if (!now)
		return stage_end(ctx, bytes, reason, action);

	if (reason == REASON_NONE) {
		transport = transport_of(&p);
		count_protocols(&p, transport, bytes);
		set = transport ? now->action[transport & (MONITOR_PROTOCOLS - 1)] : 0;
		if (!set)
			set = now->action[p.network & 3];
		if (set) {
			action = (set - 1) & 3;
			reason = REASON_PROTOCOL_ACTION;
		}
		if (action == XDP_TX && p.eth->h_dest[0] & 1) {
			action = XDP_PASS;
			reason = REASON_TX_GROUP_ADDRESS;
		}
	}
	if (now->sample)
		report(ctx, &p, now->sample, bytes, reason, action);
	if (action == XDP_TX)
		reflect(&p);
	return stage_end(ctx, bytes, reason, action);
}
