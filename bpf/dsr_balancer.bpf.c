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
#include "include/dsr_select.h"
#include "include/dsr_forward.h"
#include "include/dsr_probe.h"
#include "abi/dsr_balancer.h"

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
