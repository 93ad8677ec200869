/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* From a connection to the wire: what is written into its packets, and where they go. */
#ifndef XDPKIT_NAT_PATH_H
#define XDPKIT_NAT_PATH_H

#include "nat_state.h"
#include "next_hop.h"
#include "translate.h"

/* Backends whose clients keep their address: 0, or half of a hash of their address, port and protocol, and a number. */
SHARED_ARRAY(backend_index, __u64);

/* Next hops that a CPU chooses again in one tick: a few percent of its time, whatever the number of connections. */
#define NAT_ASKED_PER_TICK 1024

static __always_inline __u64 nat_slot_hash(const struct balancer_settings *b, const struct service *service,
					   const struct nat_tuple *q)
{
	__u32 ports = flow_ports(service, q->source_port, q->destination_port);

	if (!q->ipv6)
		return flow_hash4(b->seed, q->source[0], q->destination[0], ports, q->protocol);
	return flow_hash6(b->seed, q->source, q->destination, ports, q->protocol);
}

/* ---- counting ----------------------------------------------------------------------------------------- */

/* In service_state.function and backend_state.function. */
#define NAT_SERVICE_ANSWERS 0       /* packets of backends */
#define NAT_SERVICE_ANSWERED_BYTES 1
#define NAT_SERVICE_REFUSED 2       /* connections that did not come about */

static __always_inline void nat_count(__u32 backend, __u32 service, bool from_backend, __u64 bytes)
{
	struct service_state *of_service = bpf_map_lookup_elem(&service_states, &service);
	struct backend_state *of_backend = bpf_map_lookup_elem(&backend_states, &backend);

	if (!of_service || !of_backend)
		return;
	if (from_backend) {
		of_service->function[NAT_SERVICE_ANSWERS]++;
		of_service->function[NAT_SERVICE_ANSWERED_BYTES] += bytes;
		of_backend->function++;
		return;
	}
	of_service->packets++;
	of_service->bytes += bytes;
	of_backend->packets++;
	of_backend->bytes += bytes;
}

__attribute__((noinline, weak)) int nat_report_refused(__u32 reason)
{
	struct nat_settings *s = nat_settings();
	struct nat_job *job = nat_job();
	struct events_state *state;
	struct nat_event *e;

	if (!s || !job || !s->sample)
		return 0;
	state = sampled(s->sample);
	if (!state)
		return 0;
	e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e) {
		state->lost++;
		return 0;
	}
	e->timestamp = bpf_ktime_get_ns();
	e->kind = NAT_EVENT_REFUSED;
	e->reason = reason;
	e->client[0] = job->wish.client[0];
	e->client[1] = job->wish.client[1];
	e->client_port = job->wish.client_port;
	e->port = 0;
	e->service = job->wish.service;
	e->backend = 0;
	e->flags = job->wish.flags;
	e->identity = 0;
	bpf_ringbuf_submit(e, 0);
	return 1;
}

/* A connection was asked for: it is there, or it was refused. */
__attribute__((noinline, weak)) int nat_count_opened(__u32 service, __u32 record, __u32 reason, __u32 flags)
{
	struct service_state *of_service = bpf_map_lookup_elem(&service_states, &service);
	struct nat_connection *r = bpf_map_lookup_elem(&connections, &record);
	struct nat_settings *s = nat_settings();
	struct backend_state *of_backend;
	__u32 number;

	if (!of_service || !r || !s)
		return 0;
	if (reason == REASON_NO_BACKEND) {
		of_service->no_backend++;
	} else if (reason != REASON_NONE) {
		of_service->function[NAT_SERVICE_REFUSED]++;
	}
	if (reason != REASON_NONE) {
		if (s->sample)
			nat_report_refused(reason);
	} else {
		of_service->flows++;
		number = r->backend;
		of_backend = bpf_map_lookup_elem(&backend_states, &number);
		if (of_backend)
			of_backend->flows++;
		if (s->sample)
			nat_report(record, NAT_EVENT_NEW, flags);
	}
	return 1;
}

/* ---- from the backend's side -------------------------------------------------------------------------- */

static __always_inline __u64 nat_backend_hash(const __be64 *address, __be16 port, __u8 protocol)
{
	return mix64(mix64(address[0] + 0x9e3779b97f4a7c15ULL) ^ address[1] ^ ((__u64)port << 16 | protocol));
}

/* The number that backends with this address, port and protocol share, 0 for none. */
static __always_inline __u32 nat_find_tuple(const struct nat_settings *s, const __be64 *address, __be16 port,
					    __u8 protocol)
{
	__u64 hash = nat_backend_hash(address, port, protocol), word;
	__u32 at;

	for (__u32 i = 0; i < INDEX_PROBES; i++) {
		at = (hash + i) & s->backend_mask;
		word = index_word(&backend_index, at);
		if (!word)
			return 0;
		if (word >> 32 == hash >> 32)
			return word & NAT_NUMBER_MAX;
	}
	return 0;
}

/* Both ends of a packet but for the ports. Answers the number of the vip that it is sent to, 0 for none. */
static __always_inline __u32 nat_read(const struct balancer_settings *b, struct nat_tuple *q, const struct iphdr *ip4,
				      const struct ipv6hdr *ip6, __u8 protocol, bool ipv6)
{
	q->protocol = protocol;
	q->ipv6 = ipv6;
	if (ipv6) {
		__builtin_memcpy(q->source, &ip6->saddr, 16);
		__builtin_memcpy(q->destination, &ip6->daddr, 16);
		return vip_find6(b, &ip6->daddr);
	}
	q->source[0] = ip4->saddr;
	q->source[1] = 0;
	q->destination[0] = ip4->daddr;
	q->destination[1] = 0;
	return vip_find4(b, ip4->daddr);
}

static __always_inline bool nat_is_backend_at(const struct backend *backend, const __be64 *address, __be16 port)
{
	return backend->address[0] == address[0] && backend->address[1] == address[1] && backend->port == port;
}

static __always_inline bool nat_is_of_backend(const struct nat_connection *r, const __be64 *address, __be16 port,
					      __u8 protocol)
{
	struct backend *backend = nat_backend(r);

	return backend && nat_is_backend_at(backend, address, port) &&
	       !(nat_flags(NAT_ONCE(r->word)) & NAT_TCP) == (protocol != IPPROTO_TCP);
}

/* The connection that a backend's packet to a client, whose address was kept, belongs to: the record and 1, or 0. */
__attribute__((noinline, weak)) __u64 nat_find_kept(struct nat_tuple *q)
{
	const struct flow_table *t = flows_open();
	struct nat_settings *s = nat_settings();
	struct nat_connection *r;
	__be64 client[2], address[2];
	__u64 found;
	__u32 number;

	if (!q || !s || !t)
		return 0;
	address[0] = q->source[0];
	address[1] = q->source[1];
	number = nat_find_tuple(s, address, q->source_port, q->protocol);
	if (!number)
		return 0;
	client[0] = q->destination[0];
	client[1] = q->destination[1];
	found = nat_look_up(nat_key(t, client, q->destination_port, NAT_KEY_OF_BACKEND | number, q->ipv6));
	if (!found)
		return 0;
	r = nat_record(s, found - 1);
	if (!r || r->client[0] != client[0] || r->client[1] != client[1] || r->client_port != q->destination_port ||
	    !(nat_flags(NAT_ONCE(r->word)) & NAT_KEPT_SOURCE) ||
	    !nat_is_of_backend(r, address, q->source_port, q->protocol))
		return 0;
	return found;
}

/* The connection of a backend's packet: the record and 1, or 0. `vip` is the number of its destination, 0: none. */
static __always_inline __u64 nat_find_backend(const struct nat_settings *s, struct nat_tuple *q, __u32 vip)
{
	struct nat_connection *r;
	__u32 place;

	if (!vip)
		return nat_find_kept(q);
	place = nat_place(s, nat_start(s, q->source, q->source_port, q->protocol), vip, bpf_ntohs(q->destination_port));
	r = nat_record(s, place);
	if (!r || (nat_flags(NAT_ONCE(r->word)) & (NAT_LIVE | NAT_KEPT_SOURCE)) != NAT_LIVE ||
	    r->port != q->destination_port || r->address != vip ||
	    !nat_is_of_backend(r, q->source, q->source_port, q->protocol))
		return 0;
	return (__u64)place + 1;
}

/* Whether a record is of the connection of the packet at hand: as it was found, but after its word was read. */
__attribute__((noinline, weak)) int nat_is_of_packet(__u32 record, __u32 from_backend)
{
	struct nat_connection *r = bpf_map_lookup_elem(&connections, &record);
	struct nat_job *job = nat_job();
	struct nat_tuple *q;

	if (!r || !job)
		return false;
	q = &job->packet;
	if (!from_backend)
		return nat_is_of_client(r, q->source, q->source_port, job->wish.service);
	if (!nat_is_of_backend(r, q->source, q->source_port, q->protocol))
		return false;
	if (nat_flags(NAT_ONCE(r->word)) & NAT_KEPT_SOURCE)
		return r->client[0] == q->destination[0] && r->client[1] == q->destination[1] &&
		       r->client_port == q->destination_port;
	return r->port == q->destination_port && r->address == job->vip;
}

/*
 * The same where a service was added whose port a connection was given before: the backend goes on with it. Packets of the
 * service's own clients are found before.
 */
__attribute__((noinline, weak)) __u64 nat_find_answer(void)
{
	struct nat_settings *s = nat_settings();
	struct nat_job *job = nat_job();
	__u64 found;

	if (!s || !job || !job->vip || !s->ports_shared)
		return 0;
	found = nat_find_backend(s, &job->packet, job->vip);
	if (found)
		job->segment.from_backend = true;
	return found;
}

/* ---- what becomes of it ------------------------------------------------------------------------------- */

static __always_inline void nat_copy_vip(__be64 *address, __u32 number)
{
	struct vip *vip = bpf_map_lookup_elem(&vips, &number);

	if (!vip)
		return;
	address[0] = vip->address[0];
	address[1] = vip->address[1];
}

/* The backend that a connection was found by. */
static __always_inline struct backend *nat_guessed_backend(const struct nat_wish *wish)
{
	__u32 number = wish->backend;
	struct backend *backend = bpf_map_lookup_elem(&backends, &number);

	return backend && backend->flags & BACKEND_USED ? backend : NULL;
}

/* The backend of a connection; what else is to be known of it goes where a guess would have put it. */
static __always_inline struct backend *nat_known_backend(struct nat_wish *wish, const struct nat_connection *r)
{
	wish->backend = r->backend;
	wish->service = r->service;
	wish->port = r->port;
	wish->address = r->address;
	wish->kept = nat_flags(NAT_ONCE(r->word)) & NAT_KEPT_SOURCE;
	return nat_backend(r);
}

/* Both ends as the other side shall see them. False: the service has gone. */
static __always_inline bool nat_translation(struct nat_job *job, const struct nat_connection *r,
					    const struct backend *backend, bool from_backend)
{
	struct translation *to = &job->way.to;
	__u32 number = job->wish.service;
	struct service *service;

	to->hops = 1;
	if (from_backend) {
		service = bpf_map_lookup_elem(&services, &number);
		if (!service)
			return false;
		nat_copy_vip(to->source, service->vip);
		to->source_port = service->port;
		to->destination[0] = r->client[0];
		to->destination[1] = r->client[1];
		to->destination_port = r->client_port;
		return true;
	}
	to->destination[0] = backend->address[0];
	to->destination[1] = backend->address[1];
	to->destination_port = backend->port;
	to->source_port = job->wish.port;
	if (job->wish.kept) {
		to->source[0] = r->client[0];
		to->source[1] = r->client[1];
	} else {
		nat_copy_vip(to->source, job->wish.address);
	}
	return true;
}

/*
 * Whether the source of an ICMP error is to be left alone: where clients keep their address, so do the routers on the
 * way; only the backend itself appears by its virtual address.
 */
static __always_inline bool nat_keeps_source(const struct packet *p, const struct nat_connection *r,
					     const struct backend *backend, bool from_backend)
{
	__be64 source[2] = { 0, 0 };

	if (!(nat_flags(NAT_ONCE(r->word)) & NAT_KEPT_SOURCE))
		return false;
	if (!from_backend)
		return true;
	if (p->network == NETWORK_IPV4)
		source[0] = p->ip4->saddr;
	else
		__builtin_memcpy(source, &p->ip6->saddr, 16);
	return source[0] != backend->address[0] || source[1] != backend->address[1];
}

/* ---- the next hop ------------------------------------------------------------------------------------- */

/* Chooses the next hop of a connection in one direction, NAT_TO_CLIENT or NAT_TO_BACKEND, and keeps it there. */
__attribute__((noinline, weak)) __u64 nat_choose(struct xdp_md *ctx, __u32 record, __u32 direction)
{
	struct nat_connection *r = bpf_map_lookup_elem(&connections, &record);
	struct next_hop_request request = {};
	struct nat_job *job = nat_job();
	__u64 word, before, choice;
	struct translation *to;
	__u32 side = direction & 1;

	if (!r || !job)
		return 0;
	word = NAT_ONCE(r->word);
	before = *(volatile __u64 *)&r->choice[side];
	if (next_hop_is_hopeless(before))
		return before;
	to = &job->way.to;
	*(any_u64 *)&request.destination[0] = to->destination[0];
	*(any_u64 *)&request.destination[2] = to->destination[1];
	*(any_u64 *)&request.source[0] = to->source[0];
	*(any_u64 *)&request.source[2] = to->source[1];
	request.source_port = to->source_port;
	request.destination_port = to->destination_port;
	request.family = nat_flags(word) & NAT_IPV6 ? NETWORK_IPV6 : NETWORK_IPV4;
	request.protocol = nat_flags(word) & NAT_TCP ? IPPROTO_TCP : IPPROTO_UDP;
	request.traffic_class = job->traffic_class;
	choice = next_hop_choose(ctx, &request);
	/* Not into the record of a connection that has come since. */
	if (__sync_val_compare_and_swap(&r->choice[side], before, choice) == before &&
	    (NAT_ONCE(r->word) ^ word) >> NAT_GENERATION_SHIFT)
		__sync_lock_test_and_set(&r->choice[side], 0);
	return choice;
}

/* Whether it is time to choose again, and this CPU has not chosen too often in this tick. */
static __always_inline bool nat_may_choose(__u32 now)
{
	struct nat_job *job = nat_job();

	if (!job)
		return true;
	if (job->tick != now) {
		job->tick = now;
		job->asked = 0;
	}
	return job->asked++ < NAT_ASKED_PER_TICK;
}

/* The choice of a connection in one direction. Of the last generation, it may be kept for a while: its entry is still there. */
static __always_inline __u64 nat_chosen(struct xdp_md *ctx, __u32 record, struct nat_connection *r, __u32 direction,
					__u32 now)
{
	__u64 choice = *(volatile __u64 *)&r->choice[direction];
	__u32 generation = next_hop_generation();
	struct next_hop *hop = NULL;

	/* What cannot be sent to may be by now. */
	if (next_hop_state(ctx, choice, &hop) == NEXT_HOP_FOUND &&
	    (next_hop_is_fresh(choice, generation) ||
	     (next_hop_is_fresh(choice, generation - 1) && !nat_may_choose(now))))
		return choice;
	return nat_choose(ctx, record, direction);
}

#endif
