// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* NatBalancer: connections to virtual addresses go to backends, with addresses and ports translated both ways. */
#include "include/kernel.h"
#include "include/parse.h"
#include "include/locate.h"
#include "include/stage.h"
#include "include/own_macs.h"
#include "include/next_hop.h"
#include "include/service.h"
#include "include/translate.h"
#include "include/connection.h"
#include "include/nat_open.h"
#include "include/nat_state.h"
#include "include/nat_path.h"
#include "include/nat_forward.h"
#include "include/nat_rare.h"
#include "abi/nat_balancer.h"

/*
 * Said with a record that was found where it was guessed to be: all that is needed of it stands in the wish, too. Reading
 * it there lets the processor go on while the record is on its way from memory.
 */
#define NAT_GUESSED (1ULL << 41)

/*
 * The connection of a client's packet. The place where it would be put today is the first to look at; the flow table
 * knows where it is. 0: none; else the record and 1.
 */
static __always_inline __u64 nat_find_client(const struct nat_settings *s, const struct service *service,
					     struct nat_wish *wish)
{
	struct nat_connection *r;
	struct backend *backend;
	__u64 found;
	__u32 number;

	if (service->scheduler == NAT_BY_SLOT && !(service->flags & NAT_DESTINATION_ONLY)) {
		number = nat_slot_backend(service, slot_of(service, wish->hash));
		backend = bpf_map_lookup_elem(&backends, &number);
		if (backend) {
			wish->backend = number;
			nat_attempt(s, service, backend, wish, 0);
			r = nat_record(s, wish->place);
			if (r && nat_flags(NAT_ONCE(r->word)) & NAT_LIVE &&
			    nat_is_of_client(r, wish->client, wish->client_port, wish->service) &&
			    r->backend == number && r->identity == backend->identity && r->port == wish->port &&
			    r->address == wish->address)
				return NAT_GUESSED | ((__u64)wish->place + 1);
		}
	}
	found = nat_look_up_client(wish);
	if (!found)
		return 0;
	r = nat_record(s, found - 1);
	return r && nat_is_of_client(r, wish->client, wish->client_port, wish->service) ? found : 0;
}

static __always_inline void nat_ask_for_connection(struct nat_wish *wish, const struct balancer_settings *b,
						   const struct service *service, __u32 number,
						   const struct nat_tuple *q, __u32 now)
{
	wish->client[0] = q->source[0];
	wish->client[1] = q->source[1];
	wish->client_port = q->source_port;
	wish->kept = false;
	wish->backend = 0;
	wish->service = number;
	wish->flags = (q->protocol == IPPROTO_TCP ? NAT_TCP : 0) | (q->ipv6 ? NAT_IPV6 : 0);
	wish->now = now;
	wish->hash = nat_slot_hash(b, service, q);
}

/* The connection that a packet, or what an ICMP error quotes, belongs to: its record and 1, or 0. */
static __always_inline __u64 nat_find(const struct nat_settings *s, const struct balancer_settings *b,
				      struct nat_job *job, __u32 vip, __u32 number, __u32 now)
{
	struct service *service;

	if (!number)
		return nat_find_backend(s, &job->packet, vip);
	service = bpf_map_lookup_elem(&services, &number);
	if (!service)
		return 0;
	nat_ask_for_connection(&job->wish, b, service, number, &job->packet, now);
	return nat_find_client(s, service, &job->wish);
}

/* The same of what an error quotes. Answers NAT_ERROR_BACKEND too when it comes from a backend's side. */
#define NAT_ERROR_BACKEND (1ULL << 40)

__attribute__((noinline, weak)) __u64 nat_find_quoted(struct xdp_md *ctx, __u32 now)
{
	struct balancer_settings *b = balancer_settings();
	struct nat_settings *s = nat_settings();
	struct nat_job *job = nat_job();
	__u32 vip, number;
	__u64 found;

	if (!b || !s || !job || !nat_read_error(ctx, &job->packet))
		return 0;
	vip = job->packet.ipv6 ? vip_find6(b, (const struct in6_addr *)job->packet.destination) :
				 vip_find4(b, job->packet.destination[0]);
	if (!vip && !s->destination_only)
		return 0;
	number = vip ? service_find(b, vip, job->packet.protocol, job->packet.destination_port) : 0;
	found = nat_find(s, b, job, vip, number, now);
	found &= ~NAT_GUESSED;
	if (!found && number) {
		found = nat_find_answer();
		number = 0;
	}
	return found && !number ? found | NAT_ERROR_BACKEND : found;
}

/* What a packet is to us. */
enum nat_kind {
	NAT_SEGMENT = 0,  /* TCP or UDP with its header */
	NAT_FRAGMENT = 1, /* of such, without it */
	NAT_ERROR = 2,    /* an ICMP error about such */
};

/*
 * Brings the packet's connection forward, or opens one; answers union nat_opened. `record` is what was found, and `found` whether. Only packets
 * that may say something new get here.
 */
__attribute__((noinline, weak)) __u64 nat_track(__u32 record, __u32 found, __u32 number)
{
	union nat_opened tracked = { .packed = 0 };
	struct nat_job *job = nat_job();
	int step;

	tracked.record = record;
	if (!job)
		return tracked.packed;
	/* Found; and once more where a connection begins. */
	for (int i = 0; i < 3; i++) {
		if (!found) {
			tracked.reason = REASON_NO_CONNECTION;
			if (job->wish.flags & NAT_TCP &&
			    (job->segment.tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN)) != TCP_SYN)
				return tracked.packed;
			if (nat_is_martian(&job->wish)) {
				tracked.record = 0;
				tracked.reason = REASON_MARTIAN_SOURCE;
				nat_count_opened(number, 0, REASON_MARTIAN_SOURCE, job->wish.flags);
				return tracked.packed;
			}
			tracked.packed = nat_open(&job->wish);
			/* Where there is no room, or who was there had to go: the dead make room, for this one or the next. */
			if ((tracked.reason == REASON_CONNECTIONS_FULL || job->claim.victim_key) && nat_sweep(&job->wish) &&
			    tracked.reason == REASON_CONNECTIONS_FULL)
				tracked.packed = nat_open(&job->wish);
			nat_count_opened(number, tracked.record, tracked.reason, job->wish.flags);
			/* Its first packet says no more than that it is there. */
			if (tracked.reason != REASON_NONE || tracked.fresh)
				return tracked.packed;
		}
		job->segment.record = tracked.record;
		step = nat_step(&job->segment);
		if (step == NAT_GOES_ON)
			return tracked.packed;
		if (job->segment.from_backend)
			break;
		if (step == NAT_BEGINS_ANEW)
			nat_end(tracked.record, job->segment.word, job->segment.now);
		found = false;
	}
	/* Others were quicker, twice; or it has just ended. */
	tracked.reason = job->segment.from_backend ? REASON_NO_SERVICE : REASON_CONNECTION_RACE;
	return tracked.packed;
}

static __always_inline void nat_read_segment(struct nat_segment *g, const struct packet *p, bool from_backend,
					     __u32 now)
{
	g->from_backend = from_backend;
	g->tcp_flags = 0;
	g->now = now;
	if (p->protocol != IPPROTO_TCP)
		return;
	g->tcp_flags = p->tcp->flags;
	g->sequence = bpf_ntohl(p->tcp->seq);
	g->acknowledged = bpf_ntohl(p->tcp->ack_seq);
	g->length = p->network_end - p->at + sizeof(struct tcphdr) - p->tcp->doff * 4;
}

/* Asks for the counters at the end: the stack is short, and this costs no more than having them all the way. */
static __always_inline int nat_done(struct xdp_md *ctx, const struct nat_job *job, __u32 reason, __u32 action)
{
	struct xdpkit_counters *all = stage_counters();

	return all ? stage_end(ctx, all, job->bytes, reason, action) : XDP_ABORTED;
}

SEC("xdp.frags")
int nat_balancer(struct xdp_md *ctx)
{
	__u32 reason, number = 0, now, action, tcp_flags = 0, kind = NAT_SEGMENT, state;
	struct balancer_settings *b;
	struct nat_settings *s;
	struct nat_job *job;
	union nat_outcome outcome;
	union nat_opened tracked;
	struct nat_connection *r;
	struct backend *backend;
	struct next_hop *hop = NULL;
	__u64 found, word, current;
	bool from_backend, guessed;
	struct packet p;

	action = nat_forward(ctx);
	if (action != NAT_LONG_WAY)
		return action;
	b = balancer_settings();
	s = nat_settings();
	job = nat_job();
	if (!b || !s || !job)
		return XDP_ABORTED;
	reason = parse_again(ctx, &p);
	/* What is malformed or deeper than we look is the host's, unless it is for one of our addresses. */
	if (reason != REASON_NONE) {
		job->bytes = bpf_xdp_get_buff_len(ctx);
		if (p.network == NETWORK_IPV4)
			number = vip_find4(b, p.ip4->daddr);
		else if (p.network == NETWORK_IPV6)
			number = vip_find6(b, &p.ip6->daddr);
		if (number && (!p.eth || !is_for_us(p.eth)))
			return nat_done(ctx, job, REASON_NOT_FOR_US, XDP_PASS);
		return nat_done(ctx, job, reason, number ? XDP_DROP : XDP_PASS);
	}
	job->bytes = frame_bytes(ctx, &p);
	if (p.network < NETWORK_IPV4)
		return nat_done(ctx, job, REASON_NOT_FOR_VIP, XDP_PASS);
	job->length = p.network_end - p.network_at;
	job->traffic_class = p.network == NETWORK_IPV6 ? ipv6_traffic_class(p.ip6) : p.ip4->tos;
	job->vip = nat_read(b, &job->packet, p.ip4, p.ip6, p.protocol, p.network == NETWORK_IPV6);
	if (!job->vip && !s->destination_only)
		return nat_done(ctx, job, REASON_NOT_FOR_VIP, XDP_PASS);
	if (!is_for_us(p.eth))
		return nat_done(ctx, job, REASON_NOT_FOR_US, XDP_PASS);
	if (p.routed) {
		if (job->vip && p.fragment == FRAGMENT_FIRST)
			fragment_remember(ctx, NAT_FRAGMENT_HOST, 0);
		return nat_done(ctx, job, job->vip ? REASON_ROUTING_HEADER : REASON_NOT_FOR_VIP, XDP_PASS);
	}
	now = bpf_jiffies64();
	if (p.fragment == FRAGMENT_LATER) {
		kind = NAT_FRAGMENT;
		number = nat_recall_fragment(ctx);
		/* Others than of TCP and UDP are not for us, and neither are those of ports without a service. */
		if (number == NAT_FRAGMENT_HOST || (job->vip && !number && !may_be_of_service(&p)))
			return nat_done(ctx, job, REASON_NO_SERVICE, XDP_PASS);
		if (!number)
			return nat_done(ctx, job, job->vip ? REASON_FRAGMENT_UNKNOWN : REASON_NOT_FOR_VIP,
					 job->vip ? XDP_DROP : XDP_PASS);
		found = (__u64)(number >> NAT_FRAGMENT_RECORD_SHIFT) + 1;
		from_backend = number & NAT_FRAGMENT_BACKEND;
	} else if (p.protocol == IPPROTO_TCP || p.protocol == IPPROTO_UDP) {
		if (!p.transport_header)
			return XDP_ABORTED;
		if (p.protocol == IPPROTO_TCP)
			tcp_flags = p.tcp->flags;
		job->packet.source_port = p.udp->source;
		job->packet.destination_port = p.udp->dest;
		number = job->vip ? service_find(b, job->vip, p.protocol, p.udp->dest) : 0;
		from_backend = !number;
		found = nat_find(s, b, job, job->vip, number, now);
	} else if (p.protocol == (p.network == NETWORK_IPV4 ? IPPROTO_ICMP : IPPROTO_ICMPV6) &&
		   p.fragment == FRAGMENT_NONE && p.transport_header && nat_is_error(&p)) {
		kind = NAT_ERROR;
		found = nat_find_quoted(ctx, now);
		from_backend = found & NAT_ERROR_BACKEND;
		found &= ~NAT_ERROR_BACKEND;
		if (!found)
			return nat_done(ctx, job, job->vip ? REASON_ERROR_UNKNOWN : REASON_NOT_FOR_VIP, XDP_PASS);
	} else {
		/* Later fragments of IPv6 do not always tell that they are neither TCP nor UDP. */
		if (job->vip && p.network == NETWORK_IPV6 && p.fragment == FRAGMENT_FIRST)
			fragment_remember(ctx, NAT_FRAGMENT_HOST, 0);
		outcome.packed = nat_other(ctx, job->vip);
		return nat_done(ctx, job, outcome.reason, outcome.action);
	}
	/* Neither to a service nor of a connection. */
	if (!found && from_backend) {
		/* The rest of the datagram must go the same way. */
		if (job->vip && p.fragment == FRAGMENT_FIRST)
			fragment_remember(ctx, NAT_FRAGMENT_HOST, 0);
		return nat_done(ctx, job, job->vip ? REASON_NO_SERVICE : REASON_NOT_FOR_VIP, XDP_PASS);
	}
	if ((p.network == NETWORK_IPV6 ? p.ip6->hop_limit : p.ip4->ttl) <= 1)
		return nat_done(ctx, job, REASON_HOP_LIMIT, expire(ctx));

	guessed = found & NAT_GUESSED;
	found &= ~NAT_GUESSED;
	r = nat_record(s, found - 1);
	if (!r)
		return XDP_ABORTED;
	word = NAT_ONCE(r->word);
	if (found && !nat_is_dead(s, word, now) &&
	    (kind != NAT_SEGMENT ||
	     ((nat_flags(word) & (NAT_CONFIRMED | NAT_RST_CLIENT | NAT_RST_BACKEND)) == NAT_CONFIRMED &&
	      !(tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST))))) {
		/*
		 * Most packets say nothing new; a quarter of a second is exact enough for timeouts. Errors do not keep a
		 * connection alive (RFC 5508, section 4.2).
		 */
		if ((__s32)(now - (__u32)word) > (__s32)(s->second >> 2) && kind != NAT_ERROR &&
		    __sync_val_compare_and_swap(&r->word, word, (word & ~NAT_STAMP_MASK) | now) == word &&
		    kind == NAT_SEGMENT && p.protocol == IPPROTO_TCP)
			nat_sample(r, p.tcp, from_backend);
		number = found - 1;
	} else {
		if (kind != NAT_SEGMENT)
			return nat_done(ctx, job, job->vip ? REASON_NO_CONNECTION : REASON_NOT_FOR_VIP,
					 job->vip ? XDP_DROP : XDP_PASS);
		nat_read_segment(&job->segment, &p, from_backend, now);
		if (!found)
			found = nat_find_answer();
		tracked.packed = nat_track(found - 1, !!found, number);
		if (tracked.reason == REASON_NO_CONNECTION) {
			outcome.packed = nat_refuse(ctx, tracked.reason);
			return nat_done(ctx, job, outcome.reason, outcome.action);
		}
		if (tracked.reason != REASON_NONE)
			return nat_done(ctx, job, tracked.reason,
					 tracked.reason == REASON_NO_SERVICE ? XDP_PASS : XDP_DROP);
		from_backend = job->segment.from_backend;
		number = tracked.record;
		r = nat_record(s, number);
		if (!r)
			return XDP_ABORTED;
		word = NAT_ONCE(r->word);
		/*
		 * Of two entries, among others as new, the second may have pushed out the first, and the connection with
		 * it.
		 */
		if (!(nat_flags(word) & NAT_LIVE))
			return nat_done(ctx, job, REASON_CONNECTIONS_FULL, XDP_DROP);
		guessed = false;
	}

	/* Its place may have been given to another connection after it was found, and before its word was read. */
	if (kind == NAT_SEGMENT && !nat_is_of_packet(number, from_backend))
		return nat_done(ctx, job, REASON_CONNECTION_RACE, XDP_DROP);
	backend = guessed ? nat_guessed_backend(&job->wish) : nat_known_backend(&job->wish, r);
	if (!backend || backend->flags & BACKEND_KILLED) {
		/* By the word that it has now, if it is still the same connection: this packet may have been noted as its last. */
		current = NAT_ONCE(r->word);
		if (!((current ^ word) >> NAT_GENERATION_SHIFT))
			nat_end(number, current, now);
		outcome.packed = nat_refuse(ctx, REASON_BACKEND_KILLED);
		return nat_done(ctx, job, outcome.reason, outcome.action);
	}
	if (!nat_translation(job, r, backend, from_backend))
		return nat_done(ctx, job, REASON_NO_SERVICE, XDP_PASS);
	job->way.choice = nat_chosen(ctx, number, r, from_backend ? NAT_TO_CLIENT : NAT_TO_BACKEND, now);
	state = next_hop_state(ctx, job->way.choice, &hop);
	nat_count(job->wish.backend, job->wish.service, from_backend, job->bytes);
	/* What was read of the record is of one connection only if it is still that one's. */
	if ((NAT_ONCE(r->word) ^ word) >> NAT_GENERATION_SHIFT)
		return nat_done(ctx, job, REASON_CONNECTION_RACE, XDP_DROP);
	if (state == NEXT_HOP_DOWN)
		return nat_done(ctx, job, REASON_NO_EGRESS, XDP_DROP);
	if (state != NEXT_HOP_FOUND && state != NEXT_HOP_UNRESOLVED && state != NEXT_HOP_BY_STACK)
		return nat_done(ctx, job, REASON_NO_ROUTE, XDP_DROP);

	reason = from_backend ? REASON_ANSWERED : REASON_FORWARDED;
	if (p.fragment == FRAGMENT_FIRST)
		nat_remember_fragment(ctx, number, word, from_backend);
	if (state == NEXT_HOP_UNRESOLVED) {
		reason = REASON_UNRESOLVED;
	} else if (state == NEXT_HOP_BY_STACK) {
		reason = REASON_VIA_STACK;
	} else if (hop && job->length > hop->mtu) {
		if (p.network == NETWORK_IPV6 || p.ip4->frag_off & bpf_htons(IP_DF)) {
			outcome.packed = nat_too_big(ctx, hop->mtu, job->wish.service, p.network == NETWORK_IPV6);
			return nat_done(ctx, job, outcome.reason, outcome.action);
		}
		reason = REASON_TOO_BIG;
	} else {
		job->way.to.hops = 1;
		goto send;
	}
	/* The host's stack sends it, fragments it, or finds out the neighbour's address on the way; and takes a hop from it. */
	job->way.to.hops = 0;
	hop = NULL;
	if (reason == REASON_UNRESOLVED) {
		action = nat_resolve(ctx);
		if (action)
			return nat_done(ctx, job, reason, action);
	}
send:
	if (kind == NAT_ERROR) {
		if (!nat_translate_error(ctx, &job->way.to, nat_keeps_source(&p, r, backend, from_backend)))
			return XDP_ABORTED;
		if (hop)
			reason = REASON_ERROR_FORWARDED;
	} else {
		translate(&p, &job->way.to);
	}
	if (!hop)
		return nat_done(ctx, job, reason, XDP_PASS);
	action = next_hop_send(ctx, hop, p.data, p.end, p.vlans);
	return nat_done(ctx, job, action == XDP_DROP ? REASON_NO_ROOM : reason, action);
}
