/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * ICMP errors about packets of connections: they belong to the connection of the packet that they quote, and are
 * translated outside and inside, so that its sender recognises it. Path-MTU discovery lives by them.
 */
#ifndef XDPKIT_NAT_ICMP_H
#define XDPKIT_NAT_ICMP_H

#include "locate.h"
#include "answer.h"
#include "nat_path.h"

/* What every error quotes at least of a transport header (RFC 792). */
#define NAT_QUOTED_MIN 8
#define NAT_QUOTED_TCP_CHECKSUM 18

static __always_inline bool nat_is_error(const struct packet *p)
{
	if (p->network == NETWORK_IPV6)
		return p->icmp->type >= ICMPV6_DEST_UNREACH && p->icmp->type <= ICMPV6_PARAMPROB;
	return p->icmp->type == ICMP_DEST_UNREACH || p->icmp->type == ICMP_TIME_EXCEEDED ||
	       p->icmp->type == ICMP_PARAMETERPROB;
}

/* The quoted packet. */
struct nat_quote {
	struct iphdr *ip4;
	struct ipv6hdr *ip6;
	struct udphdr *ports; /* eight bytes of the transport header */
	__u8 protocol;
};

/* False: not a first part of TCP or UDP, or too little of it. */
static __always_inline bool nat_read_quote(struct xdp_md *ctx, struct packet *p, struct nat_quote *q)
{
	union extension_walk walk;
	__u32 header;

	q->ip4 = NULL;
	q->ip6 = NULL;
	if (p->network == NETWORK_IPV4) {
		q->ip4 = take(p, sizeof(*q->ip4));
		if (!q->ip4 || q->ip4->version != 4 || q->ip4->ihl < 5 || q->ip4->frag_off & bpf_htons(IP_OFFSET))
			return false;
		header = q->ip4->ihl * 4;
		p->at += header - sizeof(*q->ip4);
		q->protocol = q->ip4->protocol;
	} else {
		q->ip6 = take(p, sizeof(*q->ip6));
		if (!q->ip6 || q->ip6->version != 6)
			return false;
		q->protocol = q->ip6->nexthdr;
		if (is_extension(q->protocol)) {
			/* Farther in, the walk does not begin. */
			if (p->at > 0xff)
				return false;
			walk.packed = walk_extensions(ctx, p->at, p->network_end, q->protocol);
			if (walk.reason || walk.fragment == FRAGMENT_LATER)
				return false;
			p->at = walk.at & PACKET_OFFSET_MASK;
			q->protocol = walk.protocol;
		}
	}
	if (q->protocol != IPPROTO_TCP && q->protocol != IPPROTO_UDP)
		return false;
	q->ports = take(p, NAT_QUOTED_MIN);
	return q->ports && p->at <= p->network_end;
}

/*
 * Who would have sent an answer to the quoted packet, as if it came from there: that is looked up as any other packet.
 * The packet is an error when it says so.
 */
__attribute__((noinline, weak)) int nat_read_error(struct xdp_md *ctx, struct nat_tuple *to)
{
	struct nat_quote q;
	struct packet p;

	if (!to || parse_again(ctx, &p) != REASON_NONE || !p.transport_header || !nat_is_error(&p) ||
	    !nat_read_quote(ctx, &p, &q))
		return false;
	if (q.ip4) {
		to->source[0] = q.ip4->daddr;
		to->source[1] = 0;
		to->destination[0] = q.ip4->saddr;
		to->destination[1] = 0;
	} else if (q.ip6) {
		__builtin_memcpy(to->source, &q.ip6->daddr, 16);
		__builtin_memcpy(to->destination, &q.ip6->saddr, 16);
	}
	to->source_port = q.ports->dest;
	to->destination_port = q.ports->source;
	to->protocol = q.protocol;
	to->ipv6 = p.network == NETWORK_IPV6;
	return true;
}

/* Changes the addresses of an IPv4 header; answers how the sum of the header changed, its own checksum included. */
static __always_inline __u64 nat_rewrite4(struct iphdr *ip, __be32 source, __be32 destination, __u64 *addresses)
{
	__u64 change = csum_change32(ip->saddr, source) + csum_change32(ip->daddr, destination);
	__sum16 before = ip->check;

	ip->saddr = source;
	ip->daddr = destination;
	ip->check = csum_apply(ip->check, change);
	*addresses = change;
	return change + csum_change16(before, ip->check);
}

static __always_inline __u64 nat_rewrite6(struct ipv6hdr *ip, const __be64 *source, const __be64 *destination)
{
	__u64 change = csum_change128(ip->saddr.s6_addr32, (const any_u32 *)source) +
		       csum_change128(ip->daddr.s6_addr32, (const any_u32 *)destination);

	__builtin_memcpy(&ip->saddr, source, 16);
	__builtin_memcpy(&ip->daddr, destination, 16);
	return change;
}

/*
 * Rewrites what an error quotes: `to` is what packets of the connection become that go the error's way; the quoted one
 * went the other way, so it becomes the reverse. Answers how the sum of the message changed, and NAT_REWRITTEN.
 */
#define NAT_REWRITTEN (1ULL << 63)

__attribute__((noinline, weak)) __u64 nat_translate_quote(struct xdp_md *ctx, struct translation *to)
{
	__u64 change, addresses, transport;
	struct tcphdr *tcp;
	struct nat_quote q;
	struct packet p;
	__sum16 before;

	if (!to || parse_again(ctx, &p) != REASON_NONE || !p.transport_header || !nat_read_quote(ctx, &p, &q))
		return 0;
	if (q.ip4) {
		change = nat_rewrite4(q.ip4, to->destination[0], to->source[0], &addresses);
	} else if (q.ip6) {
		addresses = nat_rewrite6(q.ip6, to->destination, to->source);
		change = addresses;
	} else {
		return 0;
	}
	transport = csum_change16(q.ports->source, to->destination_port) +
		    csum_change16(q.ports->dest, to->source_port);
	q.ports->source = to->destination_port;
	q.ports->dest = to->source_port;
	change += transport;
	if (q.protocol == IPPROTO_UDP) {
		before = q.ports->check;
		q.ports->check = csum_apply_udp(before, addresses + transport);
		return NAT_REWRITTEN | (change + csum_change16(before, q.ports->check));
	}
	tcp = (void *)q.ports;
	/* Only if it is there, and not in the padding. */
	if ((void *)tcp + NAT_QUOTED_TCP_CHECKSUM <= p.end &&
	    p.at - NAT_QUOTED_MIN + NAT_QUOTED_TCP_CHECKSUM <= p.network_end) {
		before = tcp->check;
		tcp->check = csum_apply(before, addresses + transport);
		change += csum_change16(before, tcp->check);
	}
	return NAT_REWRITTEN | change;
}

/*
 * The outer headers, and the message's own checksum, whose sum has changed inside by `change`. `keep_source`: the outer
 * source is another host's.
 */
__attribute__((noinline, weak)) int nat_translate_outside(struct xdp_md *ctx, struct translation *to, __u64 change,
							   __u32 keep_source)
{
	__be64 source[2];
	struct packet p;
	__u64 outside;

	if (!to || parse_again(ctx, &p) != REASON_NONE || !p.transport_header)
		return false;
	source[0] = to->source[0];
	source[1] = to->source[1];
	change &= ~NAT_REWRITTEN;
	if (p.network == NETWORK_IPV4) {
		if (keep_source)
			source[0] = p.ip4->saddr;
		/* ICMP has no pseudo-header. */
		nat_rewrite4(p.ip4, source[0], to->destination[0], &outside);
		if (to->hops)
			ipv4_decrement_ttl(p.ip4);
	} else {
		if (keep_source)
			__builtin_memcpy(source, &p.ip6->saddr, 16);
		change += nat_rewrite6(p.ip6, source, to->destination);
		p.ip6->hop_limit -= to->hops;
	}
	p.icmp->checksum = csum_apply(p.icmp->checksum, change);
	return true;
}

static __always_inline bool nat_translate_error(struct xdp_md *ctx, struct translation *to, __u32 keep_source)
{
	__u64 change = nat_translate_quote(ctx, to);

	return change && nat_translate_outside(ctx, to, change, keep_source);
}

#endif
