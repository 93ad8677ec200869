// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* NatBalancer: connections to virtual addresses go to backends, with addresses and ports translated both ways. */
#include "include/kernel.h"
#include "include/parse.h"
#include "include/stage.h"
#include "include/next_hop.h"
#include "include/service.h"
#include "include/translate.h"
#include "include/connection.h"
#include "include/nat_open.h"
#include "include/nat_state.h"
#include "include/nat_path.h"
#include "include/nat_rare.h"
#include "abi/nat_balancer.h"

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
			nat_attempt(s, service, backend, wish, 0);
			r = nat_record(s, wish->place);
			if (r && nat_flags(NAT_ONCE(r->word)) & NAT_LIVE &&
			    nat_is_of_client(r, wish->client, wish->client_port, wish->service))
				return (__u64)wish->place + 1;
		}
	}
	found = nat_look_up(wish->key);
	if (!found)
		return 0;
	r = nat_record(s, found - 1);
	return r && nat_is_of_client(r, wish->client, wish->client_port, wish->service) ? found : 0;
}

/* Both ends of the packet. Answers the number of the vip that it is sent to, 0 for none. */
static __always_inline __u32 nat_read(const struct balancer_settings *b, struct nat_tuple *q, const struct packet *p)
{
	q->protocol = p->protocol;
	q->ipv6 = p->network == NETWORK_IPV6;
	if (p->network == NETWORK_IPV6) {
		__builtin_memcpy(q->source, &p->ip6->saddr, 16);
		__builtin_memcpy(q->destination, &p->ip6->daddr, 16);
		return vip_find6(b, &p->ip6->daddr);
	}
	q->source[0] = p->ip4->saddr;
	q->source[1] = 0;
	q->destination[0] = p->ip4->daddr;
	q->destination[1] = 0;
	return vip_find4(b, p->ip4->daddr);
}

static __always_inline void nat_ask_for_connection(struct nat_wish *wish, const struct balancer_settings *b,
						   const struct flow_table *t, const struct service *service,
						   __u32 number, const struct nat_tuple *q, __u32 now)
{
	wish->client[0] = q->source[0];
	wish->client[1] = q->source[1];
	wish->client_port = q->source_port;
	wish->service = number;
	wish->flags = (q->protocol == IPPROTO_TCP ? NAT_TCP : 0) | (q->ipv6 ? NAT_IPV6 : 0);
	wish->now = now;
	wish->key = nat_key(t, q->source, q->source_port, number, q->ipv6);
	wish->hash = nat_slot_hash(b, service, q);
}

SEC("xdp.frags")
int nat_balancer(struct xdp_md *ctx)
{
	struct xdpkit_counters *all = stage_counters();
	struct balancer_settings *b = balancer_settings();
	const struct flow_table *t = flows_open();
	__u32 reason, vip, number, now, tcp_flags = 0;
	struct nat_settings *s = nat_settings();
	struct nat_job *job = nat_job();
	struct nat_connection *r;
	struct service *service;
	struct backend *backend;
	union nat_opened opened;
	bool from_backend;
	struct packet p;
	__u64 bytes, found, word = 0;
	int step;

	if (!all || !b || !s || !t || !job)
		return XDP_ABORTED;
	reason = parse(ctx, &p);
	bytes = frame_bytes(ctx, &p);
	/* What is malformed or deeper than we look is the host's. */
	if (reason != REASON_NONE)
		return stage_end(ctx, all, bytes, reason, XDP_PASS);
	if (p.network < NETWORK_IPV4)
		return stage_end(ctx, all, bytes, REASON_NOT_FOR_VIP, XDP_PASS);
	vip = nat_read(b, &job->packet, &p);
	if (!vip && !s->destination_only)
		return stage_end(ctx, all, bytes, REASON_NOT_FOR_VIP, XDP_PASS);
	if (p.fragment != FRAGMENT_NONE || (p.protocol != IPPROTO_TCP && p.protocol != IPPROTO_UDP) ||
	    !p.transport_header)
		return stage_end(ctx, all, bytes, REASON_NO_SERVICE, XDP_PASS);

	now = bpf_jiffies64();
	job->packet.source_port = p.udp->source;
	job->packet.destination_port = p.udp->dest;
	number = vip ? service_find(b, vip, p.protocol, p.udp->dest) : 0;
	from_backend = !number;
	if (from_backend) {
		found = nat_find_backend(s, &job->packet, vip);
		if (!found)
			return stage_end(ctx, all, bytes, vip ? REASON_NO_SERVICE : REASON_NOT_FOR_VIP, XDP_PASS);
	} else {
		service = bpf_map_lookup_elem(&services, &number);
		if (!service)
			return XDP_ABORTED;
		nat_ask_for_connection(&job->wish, b, t, service, number, &job->packet, now);
		found = nat_find_client(s, service, &job->wish);
	}
	if ((p.network == NETWORK_IPV6 ? p.ip6->hop_limit : p.ip4->ttl) <= 1)
		return stage_end(ctx, all, bytes, REASON_HOP_LIMIT, XDP_PASS);
	if (p.protocol == IPPROTO_TCP)
		tcp_flags = p.tcp->flags;

	/* Found; and once more where a connection begins. */
	for (int i = 0; i < 3; i++) {
		if (!found) {
			if (p.protocol == IPPROTO_TCP &&
			    (tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN)) != TCP_SYN)
				return stage_end(ctx, all, bytes, REASON_NO_CONNECTION, XDP_DROP);
			opened.packed = nat_open(&job->wish);
			nat_count_opened(number, opened.record, opened.reason, job->wish.flags);
			if (opened.reason != REASON_NONE)
				return stage_end(ctx, all, bytes, opened.reason, XDP_DROP);
			found = (__u64)opened.record + 1;
		}
		r = nat_record(s, found - 1);
		if (!r)
			return XDP_ABORTED;
		word = NAT_ONCE(r->word);
		step = NAT_LOST;
		if (!nat_is_dead(s, word, now)) {
			/* Most packets say nothing new; a quarter of a second is exact enough for timeouts. */
			if ((nat_flags(word) & (NAT_CONFIRMED | NAT_RST_CLIENT | NAT_RST_BACKEND)) == NAT_CONFIRMED &&
			    !(tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST))) {
				if ((__s32)(now - (__u32)word) > (__s32)(s->second >> 2))
					__sync_val_compare_and_swap(&r->word, word,
								    (word & ~NAT_STAMP_MASK) | now);
				break;
			}
			step = nat_step_of(&job->segment, &p, found - 1, word, from_backend, now);
			if (step == NAT_GOES_ON)
				break;
		}
		if (from_backend)
			return stage_end(ctx, all, bytes, REASON_NO_SERVICE, XDP_PASS);
		if (step == NAT_BEGINS_ANEW)
			nat_end(found - 1, word, now);
		found = 0;
	}
	/* Others were quicker, twice. */
	if (!found)
		return stage_end(ctx, all, bytes, REASON_CONNECTION_RACE, XDP_DROP);

	number = found - 1;
	r = nat_record(s, number);
	if (!r)
		return XDP_ABORTED;
	backend = nat_backend(r);
	if (!backend || backend->flags & BACKEND_KILLED) {
		nat_end(number, word, now);
		return stage_end(ctx, all, bytes, REASON_BACKEND_KILLED, XDP_DROP);
	}
	if (!nat_translation(&job->way.to, r, backend, from_backend))
		return stage_end(ctx, all, bytes, REASON_NO_SERVICE, XDP_PASS);
	if (from_backend)
		nat_way_to_client(ctx, s, number, r, &job->way, now);
	else
		nat_way_to_backend(ctx, r->backend, backend, &job->way);
	nat_count(r->backend, r->service, from_backend, bytes);
	/* What was read of the record is of one connection only if it is still that one's. */
	if ((NAT_ONCE(r->word) ^ word) >> NAT_GENERATION_SHIFT)
		return stage_end(ctx, all, bytes, REASON_CONNECTION_RACE, XDP_DROP);
	return nat_send(ctx, all, &p, bytes, from_backend, &job->way);
}
