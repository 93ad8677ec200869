/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Sources that are not one host: nothing is sent to them, and no flow begins with them (RFC 1122, 3.2.1.3 and 3.2.2;
 * RFC 1812, 5.3.7; RFC 4443, 2.4). Among them are our own virtual addresses: a datagram that one of them seems to have
 * sent to another would make two services talk to each other for ever.
 */
#ifndef XDPKIT_MARTIAN_H
#define XDPKIT_MARTIAN_H

#include "parse.h"
#include "service.h"

/* Not of 0.0.0.0/8, 127.0.0.0/8, 224.0.0.0/4, 240.0.0.0/4. */
static __always_inline bool is_one_host4(__be32 address)
{
	__u32 first = bpf_ntohl(address) >> 24;

	return first - 1 < 223 && first != 127;
}

/* Not of ff00::/8, neither :: nor ::1. */
static __always_inline bool is_one_host6(const struct in6_addr *address)
{
	const any_u64 *half = (const any_u64 *)address;

	return *(const __u8 *)address != 0xff && (half[0] || __builtin_bswap64(half[1]) > 1);
}

/* Spares most packets the search, by the last byte of their source. */
static __always_inline bool may_be_vip(const struct balancer_settings *now, __u32 last)
{
	return now->vip_filter >> (last & 63) & 1;
}

/* Global: few packets need them, and those that do not have their room on the stack. Weak: see parse.h. */
__attribute__((noinline, weak)) int is_vip4(__be32 address)
{
	struct balancer_settings *now = balancer_settings();

	return now && vip_find4(now, address) != 0;
}

__attribute__((noinline, weak)) int is_vip6(__be64 first, __be64 second)
{
	struct balancer_settings *now = balancer_settings();
	any_u64 address[2] = { first, second };

	return now && vip_find6(now, (const struct in6_addr *)address) != 0;
}

static __always_inline bool is_martian4(const struct balancer_settings *now, __be32 source)
{
	return !is_one_host4(source) || (may_be_vip(now, bpf_ntohl(source)) && is_vip4(source));
}

static __always_inline bool is_martian6(const struct balancer_settings *now, const struct in6_addr *source)
{
	const any_u64 *half = (const any_u64 *)source;

	return !is_one_host6(source) || (may_be_vip(now, ((const __u8 *)source)[15]) && is_vip6(half[0], half[1]));
}

/* Whether an IP packet has such a source. */
static __always_inline bool is_martian(const struct balancer_settings *now, const struct packet *p)
{
	return p->network == NETWORK_IPV4 ? is_martian4(now, p->ip4->saddr) : is_martian6(now, &p->ip6->saddr);
}

#endif
