/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Which backend a packet goes to: the flow it belongs to, by its own headers or by those that it quotes. */
#ifndef XDPKIT_DSR_SELECT_H
#define XDPKIT_DSR_SELECT_H

#include "locate.h"
#include "service.h"
#include "answer.h"
#include "dsr_transition.h"
#include "fragment.h"

enum choice_flags {
	CHOICE_OPENS = 1, /* a TCP SYN */
	CHOICE_REST = 2,  /* by choose_for_rest() */
	CHOICE_FIRST = 4, /* later fragments are to follow it, to its backend or to the host */
};

/*
 * What was found out about a packet. With `t.word`, its slot decides; else its backend is known, or (0) it is not
 * forwarded, and `action` says what happens instead.
 */
struct choice {
	__u32 hash; /* what varies by flow */
	__u16 reason;
	__u8 action;
	__u8 flags; /* enum choice_flags */
	struct transit t;
};

static __always_inline void choose(struct choice *c, __u32 reason, __u32 action)
{
	c->t.backend = 0;
	c->reason = reason;
	c->action = action;
}

/* The packet's slot: what it says is left for choose_by_slot(), on whose way there is more room on the stack. */
static __always_inline bool choose_slot(struct choice *c, const struct service *service, __u64 hash)
{
	__u32 slot = slot_of(service, hash);
	__u32 *word = slot_word(service, slot);

	if (!word) {
		choose(c, REASON_NO_BACKEND, XDP_DROP);
		return false;
	}
	c->hash = hash;
	c->t.word = *(volatile __u32 *)word;
	c->t.backend = c->t.word & SLOT_BACKEND;
	c->t.slot = service->first_line * SLOT_LINE_WORDS + slot;
	return true;
}

static __always_inline void choose_by_slot(struct choice *c)
{
	if (c->t.word >> SLOT_PREVIOUS_SHIFT)
		c->t.backend = transit(&c->t);
	if (!c->t.backend)
		choose(c, REASON_NO_BACKEND, XDP_DROP);
}

/* A packet of which only the addresses count. */
static __always_inline void choose_by_addresses(struct choice *c, const struct balancer_settings *now,
						const struct packet *p)
{
	struct service *service = service_record(c->t.service);
	__u64 hash;

	choose(c, REASON_NO_SERVICE, XDP_PASS);
	if (!service)
		return;
	if (p->network == NETWORK_IPV4)
		hash = flow_hash4(now->seed, p->ip4->saddr, p->ip4->daddr, 0, p->protocol);
	else
		hash = flow_hash6(now->seed, (const any_u64 *)&p->ip6->saddr, (const any_u64 *)&p->ip6->daddr, 0,
				  p->protocol);
	c->reason = REASON_FORWARDED;
	c->t.what = TRANSIT_CURRENT;
	choose_slot(c, service, hash);
}

/* The flow that an ICMP error is about, from the view of the client: what is quoted went the other way. */
static __always_inline bool quoted_flow(struct xdp_md *ctx, const struct packet *p, struct flow *flow)
{
	union extension_walk walk = { .packed = 0 };
	__u32 at = p->at & 0x7f;
	struct ipv6hdr *ip6;
	struct iphdr *ip4;
	struct udphdr *ports;

	__builtin_memset(flow, 0, sizeof(*flow));
	/* Behind that many headers stands no honest error. */
	if (p->at > 0x7f)
		return false;
	if (p->network == NETWORK_IPV4) {
		ip4 = p->data + at;
		if ((void *)(ip4 + 1) > p->end || ip4->version != 4 || ip4->ihl < 5 ||
		    ip4->frag_off & bpf_htons(IP_OFFSET) || ip4->saddr != p->ip4->daddr)
			return false;
		flow->protocol = ip4->protocol;
		*(any_u32 *)flow->client = ip4->daddr;
		*(any_u32 *)flow->vip = ip4->saddr;
		at += ip4->ihl * 4;
	} else {
		ip6 = p->data + at;
		if ((void *)(ip6 + 1) > p->end || ip6->version != 6)
			return false;
		flow->ipv6 = 1;
		flow->protocol = ip6->nexthdr;
		__builtin_memcpy(flow->client, &ip6->daddr, 16);
		__builtin_memcpy(flow->vip, &ip6->saddr, 16);
		if (*(any_u64 *)&p->ip6->daddr != flow->vip[0] || *((any_u64 *)&p->ip6->daddr + 1) != flow->vip[1])
			return false;
		at += sizeof(*ip6);
		if (is_extension(flow->protocol)) {
			walk.packed = walk_extensions(ctx, at, 0xffff, flow->protocol);
			if (walk.reason || walk.fragment == FRAGMENT_LATER)
				return false;
			at = walk.at;
			flow->protocol = walk.protocol;
		}
	}
	if (flow->protocol != IPPROTO_TCP && flow->protocol != IPPROTO_UDP)
		return false;
	if (at > 0x1ff)
		return false;
	/* RFC 792 promises eight bytes, of which the first four are the ports. */
	ports = p->data + (at & 0x1ff);
	if ((void *)(ports + 1) > p->end)
		return false;
	flow->port = ports->source;
	flow->client_port = ports->dest;
	return true;
}

static __always_inline void choose_for_error(struct xdp_md *ctx, struct choice *c, const struct balancer_settings *now,
					     __u32 vip, const struct packet *p)
{
	struct service *service;
	struct flow flow;
	__u64 hash;

	choose(c, REASON_ERROR_UNKNOWN, XDP_PASS);
	if (!quoted_flow(ctx, p, &flow))
		return;
	c->t.service = service_find(now, vip, flow.protocol, flow.port);
	service = service_record(c->t.service);
	if (!service)
		return;
	if (flow.ipv6)
		hash = flow_hash6(now->seed, (const any_u64 *)flow.client, (const any_u64 *)flow.vip,
				  flow_ports(service, flow.client_port, flow.port), flow.protocol);
	else
		hash = flow_hash4(now->seed, *(any_u32 *)flow.client, *(any_u32 *)flow.vip,
				  flow_ports(service, flow.client_port, flow.port), flow.protocol);
	c->reason = REASON_ERROR_FORWARDED;
	c->t.client[0] = flow.client[0];
	c->t.client[1] = flow.client[1];
	c->t.ports = (__u32)flow.port << 16 | flow.client_port;
	c->t.what = TRANSIT_LOOK | (flow.ipv6 || !service->port ? TRANSIT_SIDE : 0);
	choose_slot(c, service, hash);
}

static __always_inline bool is_icmp_error(const struct packet *p)
{
	if (p->network == NETWORK_IPV4)
		return p->icmp->type == ICMP_DEST_UNREACH || p->icmp->type == ICMP_TIME_EXCEEDED ||
		       p->icmp->type == ICMP_PARAMETERPROB;
	return p->icmp->type >= ICMPV6_DEST_UNREACH && p->icmp->type <= ICMPV6_PARAMPROB;
}

static __always_inline void choose_for_icmp(struct xdp_md *ctx, struct choice *c, const struct balancer_settings *now,
					    __u32 number, const struct packet *p)
{
	struct vip *vip = bpf_map_lookup_elem(&vips, &number);
	bool echo = p->icmp->code == 0 &&
		    p->icmp->type == (p->network == NETWORK_IPV4 ? ICMP_ECHO : ICMPV6_ECHO_REQUEST);

	if (is_icmp_error(p)) {
		choose_for_error(ctx, c, now, number, p);
	} else if (!echo || now->echo == ECHO_PASS || !vip) {
		choose(c, REASON_NO_SERVICE, XDP_PASS);
	} else if (is_martian(now, p)) {
		choose(c, REASON_MARTIAN_SOURCE, XDP_DROP);
	} else if (now->echo == ECHO_BACKEND) {
		c->t.service = vip->echo;
		choose_by_addresses(c, now, p);
	} else {
		/* By reply_to_echo(), where there is more room on the stack. */
		choose(c, REASON_ECHO_ANSWERED, XDP_TX);
	}
}

/* A TCP segment or UDP datagram, or the first fragment of one. */
static __always_inline void choose_for_flow(struct choice *c, const struct balancer_settings *now, __u32 vip,
					    const struct packet *p)
{
	/* TCP and UDP both start with the two ports. */
	__be16 client_port = p->udp->source, port = p->udp->dest;
	struct service *service;
	__u64 hash;

	c->t.service = service_find(now, vip, p->protocol, port);
	service = service_record(c->t.service);
	if (!service) {
		choose(c, port ? REASON_NO_SERVICE : REASON_PORT_ZERO, port ? XDP_PASS : XDP_DROP);
		return;
	}
	/* Of flows that go on, too: nothing tells them from new ones. */
	if (is_martian(now, p)) {
		choose(c, REASON_MARTIAN_SOURCE, XDP_DROP);
		return;
	}
	if (p->network == NETWORK_IPV4)
		hash = flow_hash4(now->seed, p->ip4->saddr, p->ip4->daddr, flow_ports(service, client_port, port),
				  p->protocol);
	else
		hash = flow_hash6(now->seed, (const any_u64 *)&p->ip6->saddr, (const any_u64 *)&p->ip6->daddr,
				  flow_ports(service, client_port, port), p->protocol);
	c->reason = REASON_FORWARDED;
	if (p->protocol == IPPROTO_TCP && (p->tcp->flags & (TCP_SYN | TCP_ACK)) == TCP_SYN)
		c->flags |= CHOICE_OPENS;
	if (!choose_slot(c, service, hash) || !(c->t.word >> SLOT_PREVIOUS_SHIFT))
		return;
	c->t.client[1] = 0;
	if (p->network == NETWORK_IPV4)
		c->t.client[0] = p->ip4->saddr;
	else
		__builtin_memcpy(c->t.client, &p->ip6->saddr, 16);
	c->t.ports = (__u32)port << 16 | client_port;
	c->t.what = p->network == NETWORK_IPV6 || !service->port ? TRANSIT_SIDE : 0;
	if (p->protocol == IPPROTO_UDP)
		c->t.what |= TRANSIT_UDP;
	else if (c->flags & CHOICE_OPENS)
		c->t.what |= TRANSIT_SYN;
	else if (p->tcp->flags & (TCP_FIN | TCP_RST))
		c->t.what |= TRANSIT_END;
}

/*
 * What varies by flow, of a fragment: later ones know the addresses only, and all of a datagram are to leave with the same
 * outer source, for reassembly goes by it.
 */
static __always_inline __u32 fragment_hash(const struct balancer_settings *now, const struct packet *p)
{
	if (p->network == NETWORK_IPV4)
		return flow_hash4(now->seed, p->ip4->saddr, p->ip4->daddr, 0, 0);
	return flow_hash6(now->seed, (const any_u64 *)&p->ip6->saddr, (const any_u64 *)&p->ip6->daddr, 0, 0);
}

/* Later fragments of IPv6 do not always tell that they are neither TCP nor UDP. */
static __always_inline __u32 first_of_others(const struct packet *p)
{
	return p->network == NETWORK_IPV6 && p->fragment == FRAGMENT_FIRST ? CHOICE_FIRST : 0;
}

/* What is neither a whole segment nor a whole datagram. Global: few packets need it. Weak: see parse.h. */
__attribute__((noinline, weak)) int choose_for_rest(struct xdp_md *ctx, struct choice *c, __u32 vip)
{
	struct balancer_settings *now = balancer_settings();
	struct packet p;

	if (!now || !c || parse_again(ctx, &p) != REASON_NONE || p.network < NETWORK_IPV4)
		return 0;
	c->flags = CHOICE_REST;
	if (p.routed) {
		choose(c, REASON_ROUTING_HEADER, XDP_PASS);
		if (p.fragment == FRAGMENT_FIRST)
			c->flags |= CHOICE_FIRST;
	} else if (p.fragment == FRAGMENT_LATER && may_be_of_service(&p)) {
		c->t.backend = fragment_find(&p, ctx, &c->t.service);
		c->hash = fragment_hash(now, &p);
		if (c->t.backend == FRAGMENT_HOST)
			choose(c, REASON_NO_SERVICE, XDP_PASS);
		else if (!c->t.backend)
			choose(c, REASON_FRAGMENT_UNKNOWN, XDP_DROP);
		else
			c->reason = REASON_FORWARDED;
	} else if (!p.transport_header) {
		choose(c, REASON_NO_SERVICE, XDP_PASS);
		c->flags |= first_of_others(&p);
	} else if (p.protocol == IPPROTO_TCP || p.protocol == IPPROTO_UDP) {
		choose_for_flow(c, now, vip, &p);
		if (p.fragment == FRAGMENT_FIRST) {
			c->flags |= CHOICE_FIRST;
			c->hash = fragment_hash(now, &p);
		}
	} else if (p.fragment) {
		/* A fragmented echo or error: nobody sends them, and a part cannot be answered. */
		choose(c, REASON_NO_SERVICE, XDP_PASS);
		c->flags |= first_of_others(&p);
	} else {
		choose_for_icmp(ctx, c, now, vip, &p);
	}
	return 0;
}

#endif
