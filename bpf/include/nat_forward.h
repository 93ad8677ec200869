/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The short way of most packets: TCP or UDP behind plain headers, of a confirmed connection about which they say nothing
 * new, to a neighbour that is known. It decides as the long way in nat_balancer.bpf.c does, by the same functions. But
 * headers are where they nearly always are, and nothing is written down for others to read: half as many instructions.
 * Whatever is unusual goes the long way, from the start; until all is known, nothing has changed but the time of the
 * connection's last packet.
 */
#ifndef XDPKIT_NAT_FORWARD_H
#define XDPKIT_NAT_FORWARD_H

#include "nat_path.h"

/* Said for a packet that has to go the long way. No action is XDP_ABORTED. */
#define NAT_LONG_WAY XDP_ABORTED

/* A packet with plain headers. */
struct nat_plain {
	void *end;
	struct ethhdr *eth;
	struct iphdr *ip4;
	struct ipv6hdr *ip6;
	union {
		struct tcphdr *tcp;
		struct udphdr *udp;
	};
	__u32 bytes;  /* of the frame */
	__u32 length; /* of the IP packet */
	__u32 protocol;
};

/* False: not so plain, or it says something new about its connection. */
static __always_inline bool nat_read_plain(struct nat_plain *p, void *data, void *end, bool ipv6)
{
	__u32 header = ipv6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr), hops, transport;

	p->end = end;
	p->eth = data;
	p->ip4 = data + sizeof(struct ethhdr);
	p->ip6 = data + sizeof(struct ethhdr);
	p->tcp = data + sizeof(struct ethhdr) + header;
	/* Of UDP too: nearly all datagrams are so long. */
	if ((void *)(p->tcp + 1) > end)
		return false;
	p->bytes = end - data;
	if (p->bytes < LINEAR_OF_WIRE || p->bytes >= LINEAR_OF_JUMBO)
		return false;
	if (ipv6) {
		if (p->ip6->version != 6)
			return false;
		p->length = sizeof(struct ipv6hdr) + bpf_ntohs(p->ip6->payload_len);
		p->protocol = p->ip6->nexthdr;
		hops = p->ip6->hop_limit;
	} else {
		/* No options. */
		if (*(__u8 *)p->ip4 != 0x45 || p->ip4->frag_off & bpf_htons(IP_MF | IP_OFFSET))
			return false;
		p->length = bpf_ntohs(p->ip4->tot_len);
		p->protocol = p->ip4->protocol;
		hops = p->ip4->ttl;
	}
	if (hops <= 1 || sizeof(struct ethhdr) + p->length > p->bytes)
		return false;
	if (p->protocol == IPPROTO_TCP) {
		transport = p->tcp->doff * 4;
		return transport >= sizeof(struct tcphdr) && header + transport <= p->length &&
		       !(p->tcp->flags & (TCP_SYN | TCP_FIN | TCP_RST));
	}
	transport = bpf_ntohs(p->udp->len);
	return p->protocol == IPPROTO_UDP && transport >= sizeof(struct udphdr) && header + transport <= p->length;
}

/* Whether a backend is still the one of the connection in a record, and gets packets. */
static __always_inline bool nat_is_usable(const struct backend *backend, const struct nat_connection *r)
{
	return backend->identity == r->identity &&
	       (backend->flags & (BACKEND_USED | BACKEND_KILLED)) == BACKEND_USED;
}

/* Whether the connection in a record goes on as before with this packet, which is noted. */
static __always_inline bool nat_goes_on(const struct nat_settings *s, const struct nat_plain *p,
					struct nat_connection *r, __u64 word, bool from_backend)
{
	__u32 flags = nat_flags(word), now = bpf_jiffies64();
	__s32 age = now - (__u32)word;

	if ((flags & (NAT_LIVE | NAT_CONFIRMED | NAT_FIN_CLIENT | NAT_FIN_BACKEND | NAT_RST_CLIENT | NAT_RST_BACKEND)) !=
	    (NAT_LIVE | NAT_CONFIRMED))
		return false;
	if (age > (__s32)(s->second >> 2)) {
		if (age > (__s32)s->timeout[flags & NAT_TCP ? NAT_TCP_ESTABLISHED : NAT_UDP_ANSWERED] ||
		    __sync_val_compare_and_swap(&r->word, word, (word & ~NAT_STAMP_MASK) | now) != word)
			return false;
		if (flags & NAT_TCP)
			nat_sample(r, p->tcp, from_backend);
	}
	return true;
}

/*
 * Whether a record is still of the connection whose word was read before all else of it. Nothing of the record may be
 * read after this.
 */
static __always_inline bool nat_is_still(struct nat_connection *r, __u64 word)
{
	asm volatile("" ::: "memory");
	return !((NAT_ONCE(r->word) ^ word) >> NAT_GENERATION_SHIFT);
}

/* The next hop of a connection in one direction; NULL: it has to be chosen again, or the packet cannot go there as it is. */
static __always_inline struct next_hop *nat_next_hop(struct xdp_md *ctx, const struct nat_plain *p, const struct nat_connection *r,
						     __u32 direction)
{
	__u64 choice = *(volatile const __u64 *)&r->choice[direction];
	struct next_hop *hop = NULL;

	if (!next_hop_is_fresh(choice, next_hop_generation()) || next_hop_state(ctx, choice, &hop) != NEXT_HOP_FOUND ||
	    !hop || p->length > hop->mtu)
		return NULL;
	return hop;
}

/* The end of both directions: sends the packet to a neighbour. */
static __always_inline int nat_send(struct xdp_md *ctx, struct xdpkit_counters *all, const struct nat_plain *p,
				    const struct translation *to, struct next_hop *hop, __u32 reason, bool ipv6)
{
	__u64 change;
	int action;

	change = ipv6 ? translate_ipv6(p->ip6, to) : translate_ipv4(p->ip4, to);
	translate_transport(p->udp, p->protocol, change, to);
	action = next_hop_send(ctx, hop, p->eth, p->end, 0);
	if (action == XDP_DROP)
		reason = REASON_NO_ROOM;
	count_one(&all->count[reason][action & (XDPKIT_ACTIONS - 1)], p->bytes);
	return action;
}

static __always_inline int nat_forward_to_backend(struct xdp_md *ctx, const struct balancer_settings *b,
						  const struct nat_settings *s, const struct nat_plain *p,
						  const struct nat_tuple *q, __u32 number, bool ipv6)
{
	struct service *service = bpf_map_lookup_elem(&services, &number);
	__u32 chosen = 0, place, address = 0, port = 0;
	struct translation to = { .hops = 1 };
	struct service_state *of_service;
	struct backend_state *state;
	struct xdpkit_counters *all;
	struct backend *backend;
	struct nat_connection *r;
	struct nat_job *job;
	__u64 hash, choice, found, word = 0;
	struct next_hop *hop;
	bool guessed = false;
	struct vip *vip;

	if (!service)
		return NAT_LONG_WAY;
	if (service->scheduler == NAT_BY_SLOT && !(service->flags & NAT_DESTINATION_ONLY)) {
		/* Where the connection would be put today: see connection.h. */
		hash = nat_slot_hash(b, service, q);
		chosen = nat_slot_backend(service, slot_of(service, hash));
		backend = bpf_map_lookup_elem(&backends, &chosen);
		if (!backend)
			return NAT_LONG_WAY;
		choice = nat_first_choice(hash, q->source_port);
		port = nat_port(s, choice);
		address = nat_address(service, choice);
		place = nat_place(s, backend->function[NAT_START], address, port);
		port = bpf_htons(port);
		r = nat_record(s, place);
		if (!r)
			return NAT_LONG_WAY;
		word = NAT_ONCE(r->word);
		guessed = nat_is_of_client(r, q->source, q->source_port, number) && r->backend == chosen &&
			  r->port == port && r->address == address;
	}
	if (!guessed) {
		job = nat_job();
		if (!job)
			return NAT_LONG_WAY;
		job->wish.client[0] = q->source[0];
		job->wish.client[1] = q->source[1];
		job->wish.client_port = q->source_port;
		job->wish.service = number;
		job->wish.backend = chosen;
		job->wish.flags = ipv6 ? NAT_IPV6 : 0;
		found = nat_look_up_client(&job->wish);
		if (!found)
			return NAT_LONG_WAY;
		r = nat_record(s, found - 1);
		if (!r)
			return NAT_LONG_WAY;
		word = NAT_ONCE(r->word);
		if (!nat_is_of_client(r, q->source, q->source_port, number))
			return NAT_LONG_WAY;
		chosen = r->backend;
		port = r->port;
		address = r->address;
		backend = bpf_map_lookup_elem(&backends, &chosen);
		if (!backend)
			return NAT_LONG_WAY;
	}
	if (!nat_is_usable(backend, r) || !nat_goes_on(s, p, r, word, false))
		return NAT_LONG_WAY;
	state = bpf_map_lookup_elem(&backend_states, &chosen);
	of_service = bpf_map_lookup_elem(&service_states, &number);
	all = stage_counters();
	vip = bpf_map_lookup_elem(&vips, &address);
	hop = nat_next_hop(ctx, p, r, NAT_TO_BACKEND);
	if (!state || !of_service || !all || !hop || !nat_is_still(r, word))
		return NAT_LONG_WAY;
	if (nat_flags(word) & NAT_KEPT_SOURCE) {
		to.source[0] = q->source[0];
		to.source[1] = q->source[1];
	} else if (vip) {
		to.source[0] = vip->address[0];
		to.source[1] = vip->address[1];
	} else {
		return NAT_LONG_WAY;
	}
	of_service->packets++;
	of_service->bytes += p->bytes;
	state->packets++;
	state->bytes += p->bytes;
	to.source_port = port;
	to.destination[0] = backend->address[0];
	to.destination[1] = backend->address[1];
	to.destination_port = backend->port;
	return nat_send(ctx, all, p, &to, hop, REASON_FORWARDED, ipv6);
}

static __always_inline int nat_forward_to_client(struct xdp_md *ctx, const struct nat_settings *s,
						 const struct nat_plain *p, const struct nat_tuple *q, __u32 vip,
						 bool ipv6)
{
	__u64 start = nat_start(s, q->source, q->source_port, q->protocol);
	__u32 place = nat_place(s, start, vip, bpf_ntohs(q->destination_port)), number;
	struct nat_connection *r = nat_record(s, place);
	struct translation to = { .hops = 1 };
	struct service_state *of_service;
	struct backend_state *state;
	struct xdpkit_counters *all;
	struct service *service;
	struct backend *backend;
	struct next_hop *hop;
	struct vip *from;
	__u64 word;

	if (!r)
		return NAT_LONG_WAY;
	word = NAT_ONCE(r->word);
	number = r->backend;
	backend = bpf_map_lookup_elem(&backends, &number);
	state = bpf_map_lookup_elem(&backend_states, &number);
	number = r->service;
	service = bpf_map_lookup_elem(&services, &number);
	of_service = bpf_map_lookup_elem(&service_states, &number);
	all = stage_counters();
	if (!backend || !state || !service || !of_service || !all)
		return NAT_LONG_WAY;
	if (nat_flags(word) & NAT_KEPT_SOURCE || r->port != q->destination_port || r->address != vip ||
	    !(nat_flags(word) & NAT_TCP) == (p->protocol == IPPROTO_TCP) ||
	    !nat_is_backend_at(backend, q->source, q->source_port) || !nat_is_usable(backend, r) ||
	    !nat_goes_on(s, p, r, word, true))
		return NAT_LONG_WAY;
	number = service->vip;
	from = bpf_map_lookup_elem(&vips, &number);
	if (!from)
		return NAT_LONG_WAY;
	hop = nat_next_hop(ctx, p, r, NAT_TO_CLIENT);
	to.source[0] = from->address[0];
	to.source[1] = from->address[1];
	to.source_port = service->port;
	to.destination[0] = r->client[0];
	to.destination[1] = r->client[1];
	to.destination_port = r->client_port;
	if (!hop || !nat_is_still(r, word))
		return NAT_LONG_WAY;
	of_service->function[NAT_SERVICE_ANSWERS]++;
	of_service->function[NAT_SERVICE_ANSWERED_BYTES] += p->bytes;
	state->function++;
	return nat_send(ctx, all, p, &to, hop, REASON_ANSWERED, ipv6);
}

static __always_inline int nat_forward_plain(struct xdp_md *ctx, void *data, void *end, bool ipv6)
{
	struct balancer_settings *b = balancer_settings();
	struct nat_settings *s = nat_settings();
	struct nat_plain p;
	struct nat_tuple q;
	__u32 vip, number;

	if (!b || !s || !nat_read_plain(&p, data, end, ipv6))
		return NAT_LONG_WAY;
	q.source_port = p.udp->source;
	q.destination_port = p.udp->dest;
	vip = nat_read(b, &q, p.ip4, p.ip6, p.protocol, ipv6);
	if (!vip)
		return NAT_LONG_WAY;
	number = service_find(b, vip, q.protocol, q.destination_port);
	return number ? nat_forward_to_backend(ctx, b, s, &p, &q, number, ipv6) :
			nat_forward_to_client(ctx, s, &p, &q, vip, ipv6);
}

/* A function of its own for its stack. */
__attribute__((noinline, weak)) int nat_forward6(struct xdp_md *ctx)
{
	return nat_forward_plain(ctx, (void *)(long)ctx->data, (void *)(long)ctx->data_end, true);
}

/* Answers the action, or NAT_LONG_WAY. */
static __always_inline int nat_forward(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;

	if ((void *)(eth + 1) > end || !is_for_us(eth))
		return NAT_LONG_WAY;
	if (eth->h_proto == bpf_htons(ETH_P_IP))
		return nat_forward_plain(ctx, data, end, false);
	if (eth->h_proto == bpf_htons(ETH_P_IPV6))
		return nat_forward6(ctx);
	return NAT_LONG_WAY;
}

#endif
