/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Frames that stand for several: generic mode sees TCP segments and UDP datagrams that the host's stack has merged, or
 * that their sender's has not cut yet. They are longer than the interface takes.
 */
#ifndef XDPKIT_MERGED_H
#define XDPKIT_MERGED_H

#include "kernel.h"
#include "parse.h"

/* The MTU of ordinary Ethernet: packets up to that come over any wire, and the interface's is not asked for. */
#define ETHERNET_MTU 1500
/* More than any frame stands for: BIG TCP merges up to 512 kB. What they cost has to fit into 64 bits. */
#define SEGMENTS_MAX 0x7fff

/* The MTU of the interface that the frame came in by, 0 where there is none. */
static __always_inline __u32 mtu_of_ingress(struct xdp_md *ctx)
{
	__u32 mtu = 0;

	return bpf_check_mtu(ctx, 0, &mtu, 0, 0) < 0 ? 0 : mtu;
}

/* Whether a packet of this length is none that came over the wire. */
static __always_inline bool is_merged(struct xdp_md *ctx, __u32 length)
{
	return length > ETHERNET_MTU && length > mtu_of_ingress(ctx);
}

/*
 * Cuts what is behind `end`, where the frame lies in one buffer. In several it stays, as padding: until Linux 6.19, the
 * kernel frees the other buffers wrongly in generic mode and on veth ("Bad page state").
 */
static __always_inline long cut_behind(struct xdp_md *ctx, const struct packet *p, __u32 end)
{
	if (bpf_xdp_get_buff_len(ctx) > p->linear)
		return 0;
	return bpf_xdp_adjust_tail(ctx, (int)end - (int)p->linear);
}

/*
 * Full packets of the interface's MTU that carry what is behind `headers` bytes of a packet of `length`: the least that
 * came over the wire. How long they really were, XDP is not told. Global: few packets need it. Weak: see parse.h.
 */
__attribute__((noinline, weak)) __u32 segments_of(struct xdp_md *ctx, __u32 length, __u32 headers)
{
	__u32 mtu = mtu_of_ingress(ctx), room, count;

	if (length <= mtu || mtu <= headers)
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
