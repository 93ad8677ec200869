/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Puts other addresses and ports into a packet; every checksum follows by its difference (RFC 1624). */
#ifndef XDPKIT_TRANSLATE_H
#define XDPKIT_TRANSLATE_H

#include "checksum.h"
#include "parse.h"

/* Both ends of a packet as they shall be. IPv4 addresses: the first four bytes, then zeroes. */
struct translation {
	__be64 source[2];
	__be64 destination[2];
	__be16 source_port;
	__be16 destination_port;
	__u32 hops; /* taken from it: 1, or 0 where the host's stack takes one */
};

/*
 * Also takes hops from it. Answers how the sum of the addresses changed: transport checksums cover them as a
 * pseudo-header.
 */
static __always_inline __u64 translate_ipv4(struct iphdr *ip, const struct translation *to)
{
	__be32 source = (__be32)to->source[0], destination = (__be32)to->destination[0];
	__u64 change = csum_change32(ip->saddr, source) + csum_change32(ip->daddr, destination);

	ip->ttl -= to->hops;
	ip->saddr = source;
	ip->daddr = destination;
	ip->check = csum_apply(ip->check, to->hops ? change + CSUM_HOP : change);
	return change;
}

static __always_inline __u64 translate_ipv6(struct ipv6hdr *ip, const struct translation *to)
{
	const __be32 *source = (const __be32 *)to->source, *destination = (const __be32 *)to->destination;
	__u64 change = csum_change128(ip->saddr.s6_addr32, source) +
		       csum_change128(ip->daddr.s6_addr32, destination);

	ip->hop_limit -= to->hops;
	__builtin_memcpy(&ip->saddr, to->source, 16);
	__builtin_memcpy(&ip->daddr, to->destination, 16);
	return change;
}

/* Changes the ports too: TCP and UDP both start with them. */
static __always_inline __u64 translate_ports(struct udphdr *ports, const struct translation *to)
{
	__u64 change = csum_change16(ports->source, to->source_port) +
		       csum_change16(ports->dest, to->destination_port);

	ports->source = to->source_port;
	ports->dest = to->destination_port;
	return change;
}

/* The checksum too; `change` is that of the addresses. */
static __always_inline void translate_transport(struct udphdr *transport, __u8 protocol, __u64 change,
						const struct translation *to)
{
	struct tcphdr *tcp = (void *)transport;

	change += translate_ports(transport, to);
	if (protocol == IPPROTO_TCP)
		tcp->check = csum_apply(tcp->check, change);
	else
		transport->check = csum_apply_udp(transport->check, change);
}

/* The network header, and the transport header where the packet has one: later fragments have none. */
static __always_inline void translate(struct packet *p, const struct translation *to)
{
	__u64 change;

	if (p->network == NETWORK_IPV4)
		change = translate_ipv4(p->ip4, to);
	else
		change = translate_ipv6(p->ip6, to);
	if (p->transport_header)
		translate_transport(p->udp, p->protocol, change, to);
}

#endif
