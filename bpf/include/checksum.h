/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Internet checksums (RFC 1071) and their incremental update (RFC 1624). Sums are one's-complement numbers of 16 bits
 * in network byte order, kept in 64 bits without carrying until the end; a helper call costs twenty times as much.
 */
#ifndef XDPKIT_CHECKSUM_H
#define XDPKIT_CHECKSUM_H

#include "kernel.h"

/* Carries end around until 16 bits are left. */
static __always_inline __u16 csum_fold(__u64 sum)
{
	__u32 half;

	/* Both halves are added to each other, crosswise: the upper one gets the carry of the lower, and is the sum. */
	sum += sum >> 32 | sum << 32;
	half = sum >> 32;
	half += half >> 16 | half << 16;
	return half >> 16;
}

/*
 * The change of a sum when some of what it covers becomes something else: add these up, and apply the total once.
 * Values are as they stand in the packet; those of 16 bits must start at an even offset.
 */
static __always_inline __u64 csum_change16(__be16 before, __be16 after)
{
	return (__u64)(__u16)~before + after;
}

static __always_inline __u64 csum_change32(__be32 before, __be32 after)
{
	return (__u64)(__u32)~before + after;
}

/* For whole IPv6 addresses. */
static __always_inline __u64 csum_change128(const __be32 *before, const __be32 *after)
{
	return csum_change32(before[0], after[0]) + csum_change32(before[1], after[1]) +
	       csum_change32(before[2], after[2]) + csum_change32(before[3], after[3]);
}

/* RFC 1624, equation 3: HC' = ~(~HC + ~m + m'). */
static __always_inline __sum16 csum_apply(__sum16 check, __u64 change)
{
	return ~csum_fold((__u16)~check + change);
}

/* For UDP: 0 says that the sender computed none, and stays; a computed 0 is sent as 0xffff (RFC 768). */
static __always_inline __sum16 csum_apply_udp(__sum16 check, __u64 change)
{
	__sum16 updated;

	if (!check)
		return 0;
	updated = csum_apply(check, change);
	return updated ? updated : 0xffff;
}

/* The checksum of an IPv4 header without options, its own field taken as 0. */
static __always_inline __sum16 csum_ipv4(const struct iphdr *ip)
{
	const any_u16 *word = (const any_u16 *)ip;

	return ~csum_fold((__u64)word[0] + word[1] + word[2] + word[3] + word[4] + word[6] + word[7] + word[8] + word[9]);
}

/* What one hop less changes. TTL is the first byte of its word, which falls by 0x0100, in the order of the network. */
#define CSUM_HOP 0xfffe

/* One hop less. The caller has seen that it is more than 1. */
static __always_inline void ipv4_decrement_ttl(struct iphdr *ip)
{
	ip->ttl--;
	ip->check = csum_apply(ip->check, CSUM_HOP);
}

#endif
