/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* How many packets a frame stands for: generic mode sees TCP segments and UDP datagrams that the host's stack has merged. */
#ifndef XDPKIT_SEGMENTS_H
#define XDPKIT_SEGMENTS_H

#include "kernel.h"
#include "parse.h"

/* The MTU of ordinary Ethernet: packets up to that are taken for one each, without asking for the interface's. */
#define ETHERNET_MTU 1500
/* More than any frame stands for: BIG TCP merges up to 512 kB. What they cost has to fit into 64 bits. */
#define SEGMENTS_MAX 0x7fff

/*
 * Full packets of the interface's MTU that carry what is behind `headers` bytes of a packet of `length`: the least that
 * came over the wire. How long they really were, XDP is not told. Global: few packets need it. Weak: see parse.h.
 */
__attribute__((noinline, weak)) __u32 segments_of(struct xdp_md *ctx, __u32 length, __u32 headers)
{
	__u32 mtu = 0, room, count;

	/* The interface that the frame came in by; the answer is negative only where there is none. */
	if (bpf_check_mtu(ctx, 0, &mtu, 0, 0) < 0 || length <= mtu || mtu <= headers)
		return 1;
	room = mtu - headers;
	count = (length - headers + room - 1) / room;
	return count < SEGMENTS_MAX ? count : SEGMENTS_MAX;
}

/* Of an IP packet that is well-formed. */
static __always_inline __u32 segments(struct xdp_md *ctx, const struct packet *p)
{
	__u32 length = p->network_end - p->network_at, headers;

	if (length <= ETHERNET_MTU)
		return 1;
	headers = p->at - p->network_at;
	if (p->protocol == IPPROTO_TCP && p->transport_header)
		headers += p->tcp->doff * 4 - sizeof(struct tcphdr);
	return segments_of(ctx, length, headers);
}

#endif
