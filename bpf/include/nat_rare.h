/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The ways out of the NAT balancer, the common one first. */
#ifndef XDPKIT_NAT_RARE_H
#define XDPKIT_NAT_RARE_H

#include "locate.h"
#include "fragment.h"
#include "nat_icmp.h"
#include "nat_reset.h"
#include "resolve.h"

/* ---- fragments ---------------------------------------------------------------------------------------- */

/*
 * Later fragments follow the first one of their datagram, to the same connection. What fragment.h remembers are 32 bits
 * of ours: of the record, of its generation, and the direction; the lowest bit is set.
 */
#define NAT_FRAGMENT_BACKEND 2
/* Instead: the first one was for a port of ours that no service has, and went to the host. */
#define NAT_FRAGMENT_HOST 4
#define NAT_FRAGMENT_GENERATION(word) ((__u32)((word) >> NAT_GENERATION_SHIFT & 7) << 2)
/* 27 bits are left: records of the largest capacity. */
#define NAT_FRAGMENT_RECORD_SHIFT 5

static __always_inline void nat_remember_fragment(struct xdp_md *ctx, __u32 record, __u64 word, bool from_backend)
{
	__u32 value = record << NAT_FRAGMENT_RECORD_SHIFT | NAT_FRAGMENT_GENERATION(word) |
		      (from_backend ? NAT_FRAGMENT_BACKEND : 0) | 1;

	fragment_remember(ctx, value & 0xffff, value >> 16);
}

/* What was remembered for a later fragment, 0 for nothing. */
__attribute__((noinline, weak)) __u32 nat_recall_fragment(struct xdp_md *ctx)
{
	struct nat_settings *s = nat_settings();
	struct nat_connection *r;
	struct packet p;
	__u32 value;

	if (!s || parse_again(ctx, &p) != REASON_NONE || p.network < NETWORK_IPV4 || p.fragment != FRAGMENT_LATER)
		return 0;
	value = fragment_recall(&p, ctx);
	if (!value || value == NAT_FRAGMENT_HOST)
		return value;
	r = nat_record(s, value >> NAT_FRAGMENT_RECORD_SHIFT);
	return r && NAT_FRAGMENT_GENERATION(NAT_ONCE(r->word)) == (value & 7 << 2) ? value : 0;
}

/* ---- the ways out ------------------------------------------------------------------------------------- */

/* What becomes of a packet, packed into the scalar that a global function may return. */
union nat_outcome {
	__u64 packed;
	struct {
		__u32 reason;
		__u32 action;
	};
};

/* Neither TCP nor UDP, nor an ICMP error about them. */
__attribute__((noinline, weak)) __u64 nat_other(struct xdp_md *ctx, __u32 vip)
{
	union nat_outcome outcome = { .reason = vip ? REASON_NO_SERVICE : REASON_NOT_FOR_VIP, .action = XDP_PASS };
	struct balancer_settings *b = balancer_settings();
	struct packet p;

	if (!vip || !b || b->echo != ECHO_ANSWER || parse_again(ctx, &p) != REASON_NONE || !p.transport_header ||
	    p.fragment != FRAGMENT_NONE)
		return outcome.packed;
	if ((p.network == NETWORK_IPV6 ? ICMPV6_ECHO_REQUEST : ICMP_ECHO) != p.icmp->type || p.icmp->code)
		return outcome.packed;
	if (is_martian(b, &p)) {
		outcome.reason = REASON_MARTIAN_SOURCE;
		outcome.action = XDP_DROP;
		return outcome.packed;
	}
	if (!may_answer(b)) {
		outcome.reason = REASON_ANSWER_LIMITED;
		outcome.action = XDP_DROP;
		return outcome.packed;
	}
	if (!is_answerable(ctx, false) || !answer_echo(ctx, is_blank_echo(ctx)))
		return outcome.packed;
	outcome.reason = REASON_ECHO_ANSWERED;
	outcome.action = XDP_TX;
	return outcome.packed;
}

/* A segment of no connection. */
__attribute__((noinline, weak)) __u64 nat_refuse(struct xdp_md *ctx, __u32 reason)
{
	union nat_outcome outcome = { .reason = reason, .action = XDP_DROP };
	struct balancer_settings *b = balancer_settings();
	struct nat_settings *s = nat_settings();

	if (!s || !b || !s->reset_unknown || !is_answerable(ctx, false) || !may_answer(b) || !nat_reset(ctx))
		return outcome.packed;
	outcome.reason = REASON_RESET_SENT;
	outcome.action = XDP_TX;
	return outcome.packed;
}

/* A packet that the way on does not take, and that must not be fragmented: its sender is told. */
__attribute__((noinline, weak)) __u64 nat_too_big(struct xdp_md *ctx, __u32 mtu, __u32 service, __u32 ipv6)
{
	struct service_state *state = bpf_map_lookup_elem(&service_states, &service);
	union nat_outcome outcome = { .reason = REASON_TOO_BIG, .action = XDP_DROP };
	struct balancer_settings *b = balancer_settings();

	if (!b || !state || !is_answerable(ctx, true) || !may_answer(b))
		return outcome.packed;
	if (!(ipv6 ? answer_too_big6(ctx, mtu) : answer_too_big4(ctx, mtu)))
		return outcome.packed;
	state->too_big++;
	outcome.reason = REASON_TOO_BIG_ANSWERED;
	outcome.action = XDP_TX;
	return outcome.packed;
}

/* Whether the host has no way to the packet's new source: its own address, or one that it knows nothing of. */
__attribute__((noinline, weak)) int nat_source_is_own(struct xdp_md *ctx)
{
	struct next_hop_request request = {};
	struct nat_job *job = nat_job();
	struct bpf_fib_lookup fib;

	if (!job)
		return false;
	*(any_u64 *)&request.destination[0] = job->way.to.source[0];
	*(any_u64 *)&request.destination[2] = job->way.to.source[1];
	request.family = job->packet.ipv6 ? NETWORK_IPV6 : NETWORK_IPV4;
	return fib_ask(ctx, &request, &fib) == NEXT_HOP_NO_ROUTE;
}

/* Less than it takes a neighbour to answer, in jiffies. */
#define NAT_RESOLVE_TIME 4

/*
 * The packet's next hop is a neighbour whose MAC is not known. The host's stack finds it out and forwards the packet, for
 * which this answers 0; but where the packet's new source is the host's own address, not by IPv4, which takes it for
 * forged, and perhaps not by IPv6. There a packet becomes a request with its old source: XDP_PASS, or XDP_DROP where it has
 * no room. By IPv4 at once, as there may be more neighbours to find out than we remember; by IPv6 only when the
 * neighbour is still not known a moment later.
 */
__attribute__((noinline, weak)) int nat_resolve(struct xdp_md *ctx)
{
	struct nat_settings *s = nat_settings();
	struct nat_job *job = nat_job();
	__u64 now = bpf_jiffies64();
	struct packet p;
	bool again;

	if (!job || !s)
		return 0;
	/* The same within the time in which clients repeat what got no answer. */
	again = job->unresolved[0] == job->way.to.destination[0] &&
		job->unresolved[1] == job->way.to.destination[1] && now - job->unresolved_at < 8 * s->second;
	if (!again) {
		job->unresolved[0] = job->way.to.destination[0];
		job->unresolved[1] = job->way.to.destination[1];
		job->unresolved_at = now;
	}
	if (job->packet.ipv6 && (!again || now - job->unresolved_at < NAT_RESOLVE_TIME))
		return 0;
	if (!nat_source_is_own(ctx))
		return 0;
	if (parse_again(ctx, &p) != REASON_NONE || p.network < NETWORK_IPV4 || is_merged(ctx, p.network_end - p.network_at))
		return XDP_DROP;
	return become_request(&p, job->way.to.destination) ? XDP_PASS : XDP_DROP;
}

#endif
