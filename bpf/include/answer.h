/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * ICMP messages of our own, sent back to where a packet came from, in the name of the address that it was for: echo
 * replies, and Fragmentation Needed (RFC 1191) or Packet Too Big (RFC 4443). What is quoted fits 576 or 1280 bytes.
 */
#ifndef XDPKIT_ANSWER_H
#define XDPKIT_ANSWER_H

#include "locate.h"
#include "merged.h"
#include "reflect.h"
#include "checksum.h"
#include "service.h"
#include "martian.h"

#define ICMP_ECHOREPLY 0
#define ICMP_DEST_UNREACH 3
#define ICMP_SOURCE_QUENCH 4
#define ICMP_REDIRECT 5
#define ICMP_ECHO 8
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETERPROB 12
#define ICMP_TYPE_MAX 18
#define ICMP_FRAG_NEEDED 4
#define ICMPV6_DEST_UNREACH 1
#define ICMPV6_PKT_TOOBIG 2
#define ICMPV6_PARAMPROB 4
#define ICMPV6_INFORMATIONAL 128 /* from here on */
#define ICMPV6_ECHO_REQUEST 128
#define ICMPV6_ECHO_REPLY 129
#define ICMPV6_REDIRECT 137

#define IPV6_MIN_MTU 1280

/* Bytes of the packet that are quoted, headers included: multiples of 4, as the checksum helper wants it. */
#define QUOTE4_MAX 504
#define QUOTE6_MAX 1184
#define QUOTE4_MIN 28
#define QUOTE6_MIN 48

/* When the next message of our own is due, in ns of the coarse clock: one for all CPUs, for such messages are rare. */
SHARED_ARRAY(next_answer, __u64);

#define NS_PER_SECOND 1000000000U
/* A tenth of a second's messages may be sent at once, and one: more than any tick of the clock holds. */
#define ANSWERS_AT_ONCE_NS (NS_PER_SECOND / 10)
#define ANSWER_TRIES 8

/*
 * Whether another message of our own may be sent now: the generic cell rate algorithm, see gcra.h. Refused, too, when
 * other CPUs were quicker, many times in a row.
 */
static __always_inline bool may_answer(const struct balancer_settings *now)
{
	__u32 zero = 0, rate = now->answers_per_second;
	__u64 *word = bpf_map_lookup_elem(&next_answer, &zero), time, due, begin;

	if (!word || !rate)
		return false;
	time = bpf_ktime_get_coarse_ns();
	for (int i = 0; i < ANSWER_TRIES; i++) {
		due = *(volatile __u64 *)word;
		begin = (__s64)(due - time) > 0 ? due : time;
		if (begin - time >= ANSWERS_AT_ONCE_NS)
			return false;
		if (__sync_val_compare_and_swap(word, due, begin + NS_PER_SECOND / rate) == due)
			return true;
	}
	return false;
}

static __always_inline bool is_group_mac(const struct ethhdr *eth)
{
	return (eth->h_dest[0] | eth->h_source[0]) & 1;
}

/*
 * Whether no ICMP error may be sent about a packet, for it is one itself, or of a type that nobody knows; by what an
 * answer must never lead to, more types than those that belong to flows.
 */
static __always_inline bool is_any_icmp_error(const struct packet *p)
{
	__u8 type;

	if (!p->transport_header || p->protocol != (p->network == NETWORK_IPV4 ? IPPROTO_ICMP : IPPROTO_ICMPV6))
		return false;
	type = p->icmp->type;
	if (p->network == NETWORK_IPV6)
		return type < ICMPV6_INFORMATIONAL || type == ICMPV6_REDIRECT;
	return type == ICMP_DEST_UNREACH || type == ICMP_SOURCE_QUENCH || type == ICMP_REDIRECT ||
	       type == ICMP_TIME_EXCEEDED || type == ICMP_PARAMETERPROB || type > ICMP_TYPE_MAX;
}

/*
 * Whether a packet may be answered by a message of our own, with `by_error` by an ICMP error: not one to a group or from
 * one, by its MACs or addresses, no later fragment, and no ICMP error by another. Asked before the functions that answer,
 * not by them: for their stack. Global, as all that few packets need. Weak: see parse.h.
 */
__attribute__((noinline, weak)) int is_answerable(struct xdp_md *ctx, __u32 by_error)
{
	struct balancer_settings *now = balancer_settings();
	struct packet p;

	if (!now || parse_again(ctx, &p) != REASON_NONE || p.network < NETWORK_IPV4 || is_group_mac(p.eth) ||
	    p.fragment == FRAGMENT_LATER || (by_error && is_any_icmp_error(&p)))
		return false;
	return !is_martian(now, &p);
}

/* The checksum of an ICMP echo request of zeroes. Others may have it, too. */
#define ECHO_BLANK_CHECKSUM bpf_htons(0xf7ff)
/* Bytes of an echo request that are looked at: of what is longer and zero so far, the rest counts as zero, too. */
#define ECHO_BYTES_MAX 1472

/*
 * Whether `left` bytes from this offset on are zeroes. By itself, for the verifier goes through the loop once for each state in
 * which it begins.
 */
__attribute__((noinline, weak)) int is_blank(struct xdp_md *ctx, __u32 offset, __u32 left)
{
	const __u8 *bytes = (void *)(long)ctx->data + (offset & 0xff), *end = (void *)(long)ctx->data_end, *last;
	__u32 at;

	if (left > ECHO_BYTES_MAX)
		left = ECHO_BYTES_MAX;
	/* What fills no word first: behind the loop, the verifier would go through it once for each of the loop's ends. */
	last = bytes + (left & ~7U);
	for (at = 0; at < (left & 7); at++) {
		if (last + 1 > end)
			break;
		if (*last++)
			return false;
	}
	for (at = 0; at + 8 <= left; at += 8) {
		if (at >= ECHO_BYTES_MAX || bytes + at + 8 > end)
			break;
		if (*(const any_u64 *)(bytes + at))
			return false;
	}
	return true;
}

/*
 * Whether nothing but zeroes stands behind the checksum of an ICMP echo request. Then the sum of its reply, whose type is
 * zero too, is that of nothing: +0, where RFC 1624 knows only that it is +0 or -0, which have other checksums, ffff and
 * 0000. A receiver takes ffff for either.
 */
__attribute__((noinline, weak)) int is_blank_echo(struct xdp_md *ctx)
{
	struct packet p;

	if (parse_again(ctx, &p) != REASON_NONE || p.network != NETWORK_IPV4 || !p.transport_header ||
	    p.icmp->checksum != ECHO_BLANK_CHECKSUM)
		return false;
	return is_blank(ctx, p.at - 4, p.network_end - p.at + 4);
}

/*
 * Turns an echo request into its reply. Only the type changes under the sums: addresses are exchanged. The reply has a
 * hop limit of its own. `blank`: see is_blank_echo().
 */
__attribute__((noinline, weak)) int answer_echo(struct xdp_md *ctx, __u32 blank)
{
	struct packet p;
	any_u16 *word;
	__u16 before;

	if (parse_again(ctx, &p) != REASON_NONE || !p.transport_header)
		return false;
	word = (any_u16 *)&p.icmp->type;
	before = *word;
	if (p.network == NETWORK_IPV4) {
		p.icmp->type = ICMP_ECHOREPLY;
		word = (any_u16 *)&p.ip4->ttl;
		p.icmp->checksum = csum_apply(p.icmp->checksum, csum_change16(before, *(any_u16 *)&p.icmp->type));
		if (blank)
			p.icmp->checksum = 0xffff;
		before = *word;
		p.ip4->ttl = 64;
		p.ip4->check = csum_apply(p.ip4->check, csum_change16(before, *word));
	} else {
		p.icmp->type = ICMPV6_ECHO_REPLY;
		p.icmp->checksum = csum_apply(p.icmp->checksum, csum_change16(before, *(any_u16 *)&p.icmp->type));
		p.ip6->hop_limit = 64;
	}
	reflect(&p);
	return true;
}

/* Sums `length` bytes from `start` on, at most QUOTE6_MAX + 8 and a multiple of 4. */
static __always_inline __s64 sum_bytes(void *start, __u32 length, __u32 seed)
{
	return bpf_csum_diff(NULL, 0, start, length, seed);
}

/*
 * Replaces the packet, which is_answerable(), by a message to its sender that says how long it may be. What was merged was not so long, and the
 * device would cut the answer as it would have cut that. False: none may be sent, and the packet
 * is as it was; or (after the second adjustment) it is good for nothing but dropping.
 */
__attribute__((noinline, weak)) int answer_too_big4(struct xdp_md *ctx, __u32 mtu)
{
	__u32 quote, at, length;
	struct packet p;
	struct iphdr *ip;
	__be32 source, destination;
	__be32 *rest;
	void *data, *end;
	__u8 macs[12], tos;
	__s64 sum;

	if (parse_again(ctx, &p) != REASON_NONE || p.network != NETWORK_IPV4)
		return false;
	length = p.network_end - p.network_at;
	if (length < QUOTE4_MIN || is_merged(ctx, length))
		return false;
	quote = length >= QUOTE4_MAX ? QUOTE4_MAX : QUOTE4_MIN;
	at = p.network_at & 31;
	source = p.ip4->daddr;
	destination = p.ip4->saddr;
	tos = p.ip4->tos;
	__builtin_memcpy(macs, p.eth->h_source, 6);
	__builtin_memcpy(macs + 6, p.eth->h_dest, 6);

	/* Cut what is not quoted, then make room for the new headers before what is. */
	if (cut_behind(ctx, &p, at + quote))
		return false;
	if (bpf_xdp_adjust_head(ctx, -28))
		return false;
	data = (void *)(long)ctx->data;
	end = (void *)(long)ctx->data_end;
	if (data + 28 + ETHERNET_HEADERS_MAX > end)
		return false;
	*(any_u32 *)(data + 12) = *(any_u32 *)(data + 28 + 12);
	*(any_u32 *)(data + 16) = *(any_u32 *)(data + 28 + 16);
	*(any_u16 *)(data + 20) = *(any_u16 *)(data + 28 + 20);
	__builtin_memcpy(data, macs, 12);
	ip = data + at;
	if ((void *)ip + 28 + QUOTE4_MIN > end)
		return false;
	*(__u8 *)ip = 0x45;
	ip->tos = tos;
	ip->tot_len = bpf_htons(28 + quote);
	ip->id = 0;
	ip->frag_off = bpf_htons(IP_DF);
	ip->ttl = 64;
	ip->protocol = IPPROTO_ICMP;
	ip->saddr = source;
	ip->daddr = destination;
	ip->check = csum_ipv4(ip);
	rest = (void *)ip + 20;
	rest[0] = bpf_htonl(ICMP_DEST_UNREACH << 24 | ICMP_FRAG_NEEDED << 16);
	rest[1] = bpf_htonl(mtu);
	if (quote == QUOTE4_MAX) {
		if ((void *)ip + 28 + QUOTE4_MAX > end)
			return false;
		sum = sum_bytes((void *)ip + 20, 8 + QUOTE4_MAX, 0);
	} else {
		sum = sum_bytes((void *)ip + 20, 8 + QUOTE4_MIN, 0);
	}
	if (sum < 0)
		return false;
	*(any_u16 *)((void *)ip + 22) = ~csum_fold(sum);
	return true;
}

__attribute__((noinline, weak)) int answer_too_big6(struct xdp_md *ctx, __u32 mtu)
{
	any_u64 addresses[4];
	__u32 quote, at, length;
	struct packet p;
	struct ipv6hdr *ip;
	void *data, *end;
	__u8 macs[12];
	__be32 *rest;
	__s64 sum;

	if (parse_again(ctx, &p) != REASON_NONE || p.network != NETWORK_IPV6)
		return false;
	length = p.network_end - p.network_at;
	if (length < QUOTE6_MIN || is_merged(ctx, length))
		return false;
	quote = length >= QUOTE6_MAX ? QUOTE6_MAX : QUOTE6_MIN;
	at = p.network_at & 31;
	__builtin_memcpy(addresses, &p.ip6->daddr, 16);
	__builtin_memcpy(addresses + 2, &p.ip6->saddr, 16);
	__builtin_memcpy(macs, p.eth->h_source, 6);
	__builtin_memcpy(macs + 6, p.eth->h_dest, 6);

	if (cut_behind(ctx, &p, at + quote))
		return false;
	if (bpf_xdp_adjust_head(ctx, -48))
		return false;
	data = (void *)(long)ctx->data;
	end = (void *)(long)ctx->data_end;
	if (data + 48 + ETHERNET_HEADERS_MAX > end)
		return false;
	*(any_u32 *)(data + 12) = *(any_u32 *)(data + 48 + 12);
	*(any_u32 *)(data + 16) = *(any_u32 *)(data + 48 + 16);
	*(any_u16 *)(data + 20) = *(any_u16 *)(data + 48 + 20);
	__builtin_memcpy(data, macs, 12);
	ip = data + at;
	if ((void *)ip + 48 + QUOTE6_MIN > end)
		return false;
	*(any_u32 *)ip = bpf_htonl(0x60000000);
	ip->payload_len = bpf_htons(8 + quote);
	ip->nexthdr = IPPROTO_ICMPV6;
	ip->hop_limit = 64;
	__builtin_memcpy(&ip->saddr, addresses, 32);
	rest = (void *)ip + 40;
	rest[0] = bpf_htonl(ICMPV6_PKT_TOOBIG << 24);
	rest[1] = bpf_htonl(mtu < IPV6_MIN_MTU ? IPV6_MIN_MTU : mtu);
	/* The pseudo-header (RFC 8200, section 8.1): addresses, length, protocol. */
	sum = bpf_csum_diff(NULL, 0, (__be32 *)addresses, sizeof(addresses),
			    csum_fold((__u64)bpf_htonl(8 + quote) + bpf_htonl(IPPROTO_ICMPV6)));
	if (sum < 0)
		return false;
	if (quote == QUOTE6_MAX) {
		/* The helper takes 512 bytes at once. */
		if ((void *)ip + 48 + QUOTE6_MAX > end)
			return false;
		sum = sum_bytes((void *)ip + 40, 512, csum_fold(sum));
		sum = sum_bytes((void *)ip + 40 + 512, 8 + QUOTE6_MAX - 512 - 512, csum_fold(sum));
		sum = sum_bytes((void *)ip + 40 + 8 + QUOTE6_MAX - 512, 512, csum_fold(sum));
	} else {
		sum = sum_bytes((void *)ip + 40, 8 + QUOTE6_MIN, csum_fold(sum));
	}
	*(any_u16 *)((void *)ip + 42) = ~csum_fold(sum);
	return true;
}

#endif
