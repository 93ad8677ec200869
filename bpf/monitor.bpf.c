// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* PacketMonitor: counts packets by protocol, reports samples of them, applies an action by protocol. */
#include "include/kernel.h"
#include "include/event.h"
#include "include/parse.h"
#include "include/locate.h"
#include "include/stage.h"
#include "include/own_macs.h"
#include "include/reflect.h"
#include "abi/monitor.h"

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct monitor_settings);
} settings SEC(".maps");

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
	struct packet p;
	__u64 bytes;

	parse_again(ctx, &p);
	bytes = frame_bytes(ctx, &p);
	if (action == XDP_TX && p.eth && (p.eth->h_dest[0] | p.eth->h_source[0]) & 1) {
		reason = REASON_TX_GROUP_ADDRESS;
		action = XDP_PASS;
	} else if (action == XDP_TX && p.eth && !is_for_us(p.eth)) {
		reason = REASON_NOT_FOR_US;
		action = XDP_PASS;
	}
	outcome.reason = reason;
	outcome.action = action;
	if (wants_report)
		outcome.lost = !report(ctx, &p, bytes, reason, action, 0);
	if (action == XDP_TX && p.eth)
		reflect(&p);
	return outcome.packed;
}

SEC("xdp.frags")
int monitor(struct xdp_md *ctx)
{
	__u32 zero = 0, transport, reason, action = XDP_PASS, set;
	struct xdpkit_counters *all = stage_counters();
	struct events_state *events_of = NULL;
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
