/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The parser that all stages share: Ethernet, up to two VLAN tags, IPv4 with options, IPv6 with a
 * bounded extension-header walk, fragments, TCP, UDP, ICMP and ICMPv6.
 *
 * It answers REASON_NONE and a filled `struct packet`, or the reason why the frame is malformed or
 * deeper than we look. What it read up to there stays valid: `network` says how far it came.
 * It does not verify checksums: the host's stack or the backend does.
 */
#ifndef XDPKIT_PARSE_H
#define XDPKIT_PARSE_H

#include "kernel.h"
#include "../abi/packet.h"
#include "../abi/reason.h"

/* Bounds an offset for the verifier: 22 bytes of Ethernet, 40 of IPv6, 8 extensions of at most 2048. */
#define PACKET_OFFSET_MASK 0x7fff

#define ETHERNET_HEADERS_MAX (sizeof(struct ethhdr) + PACKET_VLANS_MAX * sizeof(struct vlan_hdr))

/* Offsets count from the start of the frame; a header pointer is valid up to its fixed size. */
struct packet {
	void *data;
	void *end;
	struct ethhdr *eth;
	union {
		struct iphdr *ip4;
		struct ipv6hdr *ip6;
		void *network_header;
	};
	union {
		struct tcphdr *tcp;
		struct udphdr *udp;
		struct icmphdr *icmp;
		void *transport_header; /* NULL: none was read (other protocol, later fragment) */
	};
	__u32 linear;      /* bytes from data to end: all of the frame, but for multi-buffer ones */
	__u32 at;          /* the cursor */
	__u32 network_at;  /* where the network header starts */
	__u32 network_end; /* where the IP packet ends by its own header: padding lies behind */
	__be16 ether_type; /* behind the tags */
	__be16 vlan_tci[PACKET_VLANS_MAX];
	__u16 fragment_at; /* of an IPv6 fragment: where its fragment header starts */
	__u8 vlans;
	__u8 network;  /* enum packet_network */
	__u8 protocol; /* IANA number of what follows IP and its extension headers */
	__u8 fragment; /* enum packet_fragment */
	__u8 routed;   /* an IPv6 routing header has segments left: the destination is not the last one */
};

/* The next `size` bytes, or NULL when the frame's linear part ends before. */
static __always_inline void *take(struct packet *p, __u32 size)
{
	void *header = p->data + p->at;

	if (header + size > p->end)
		return NULL;
	p->at += size;
	return header;
}

/*
 * The reason for a header that `take` did not find: the frame may go on in another buffer, where our
 * pointers do not reach. That is not the packet's fault.
 */
static __always_inline enum xdpkit_reason cut(struct xdp_md *ctx, const struct packet *p, enum xdpkit_reason reason)
{
	return bpf_xdp_get_buff_len(ctx) > p->linear ? REASON_HEADERS_SPLIT : reason;
}

/* The longest that the length fields of IPv4, IPv6 and UDP can tell. */
#define IP_LENGTH_MAX 0xffff

/*
 * Where a packet ends that has `length` bytes from `from` on; false when the frame ends before. The helper knows about
 * fragments of multi-buffer frames but costs more than the rest of the parser, so it is asked only when the linear part
 * is too short, or for a length of 0. That means all of the frame where it is longer than any wire carries: segments that
 * the host's stack has merged, or the sender's has not cut yet, which generic mode sees so ("BIG TCP"; by IPv6 with a
 * jumbo option, RFC 2675, or without).
 */
static __always_inline bool find_end(struct xdp_md *ctx, struct packet *p, __u32 from, __u32 length)
{
	__u32 frame;

	p->network_end = from + length;
	if (length && p->network_end <= p->linear)
		return true;
	frame = bpf_xdp_get_buff_len(ctx);
	if (!length && frame - from > IP_LENGTH_MAX)
		p->network_end = frame;
	return p->network_end <= frame;
}

/* A linear part that no 1500-byte MTU fills: from here on a frame may have more buffers. */
#define LINEAR_OF_JUMBO 1600
/* Shorter than any frame on a wire: padding may have gone to another buffer. */
#define LINEAR_OF_WIRE 60

/*
 * Bytes of the whole frame. Where the IP packet lies in an ordinary linear part there is no second
 * buffer, so the helper is spared. (A driver that splits frames behind the headers could still hide
 * trailing bytes that belong to no packet; they are not worth a helper call a packet.)
 */
static __always_inline __u64 frame_bytes(struct xdp_md *ctx, const struct packet *p)
{
	if (p->network >= NETWORK_IPV4 && p->network_end <= p->linear && p->linear >= LINEAR_OF_WIRE &&
	    p->linear < LINEAR_OF_JUMBO)
		return p->linear;
	return bpf_xdp_get_buff_len(ctx);
}

static __always_inline bool is_vlan(__be16 ether_type)
{
	return ether_type == bpf_htons(ETH_P_8021Q) || ether_type == bpf_htons(ETH_P_8021AD) ||
	       ether_type == bpf_htons(ETH_P_QINQ1);
}

static __always_inline enum xdpkit_reason parse_tcp(struct xdp_md *ctx, struct packet *p)
{
	__u32 start = p->at;
	struct tcphdr *tcp = take(p, sizeof(*tcp));

	if (start + sizeof(*tcp) > p->network_end)
		return REASON_TCP_TRUNCATED;
	if (!tcp)
		return cut(ctx, p, REASON_TCP_TRUNCATED);
	if (tcp->doff < 5 || start + tcp->doff * 4 > p->network_end)
		return REASON_TCP_DATA_OFFSET;
	p->tcp = tcp;
	return REASON_NONE;
}

static __always_inline enum xdpkit_reason parse_udp(struct xdp_md *ctx, struct packet *p)
{
	__u32 start = p->at;
	struct udphdr *udp = take(p, sizeof(*udp));
	__u32 length;

	if (start + sizeof(*udp) > p->network_end)
		return REASON_UDP_TRUNCATED;
	if (!udp)
		return cut(ctx, p, REASON_UDP_TRUNCATED);
	length = bpf_ntohs(udp->len);
	/* RFC 2675, section 4: 0 where it cannot be told. */
	if (length < sizeof(*udp) && (length || p->network_end - start <= IP_LENGTH_MAX))
		return REASON_UDP_LENGTH;
	/* A first fragment states the length of the datagram that is yet to be put together. */
	if (p->fragment == FRAGMENT_NONE && start + length > p->network_end)
		return REASON_UDP_LENGTH;
	p->udp = udp;
	return REASON_NONE;
}

static __always_inline enum xdpkit_reason parse_transport(struct xdp_md *ctx, struct packet *p)
{
	enum xdpkit_reason truncated;
	struct icmphdr *icmp;

	if (p->protocol == IPPROTO_TCP)
		return parse_tcp(ctx, p);
	if (p->protocol == IPPROTO_UDP)
		return parse_udp(ctx, p);
	if (p->protocol == (p->network == NETWORK_IPV4 ? IPPROTO_ICMP : IPPROTO_ICMPV6)) {
		truncated = p->network == NETWORK_IPV4 ? REASON_ICMP_TRUNCATED : REASON_ICMPV6_TRUNCATED;
		if (p->at + sizeof(*icmp) > p->network_end)
			return truncated;
		icmp = take(p, sizeof(*icmp));
		if (!icmp)
			return cut(ctx, p, truncated);
		p->icmp = icmp;
	}
	return REASON_NONE;
}

static __always_inline enum xdpkit_reason parse_ipv4(struct xdp_md *ctx, struct packet *p)
{
	struct iphdr *ip = take(p, sizeof(*ip));
	__u32 header_length, fragment;

	if (!ip)
		return cut(ctx, p, REASON_IPV4_TRUNCATED);
	if (ip->version != 4)
		return REASON_IPV4_VERSION;
	header_length = ip->ihl * 4;
	if (header_length < sizeof(*ip))
		return REASON_IPV4_HEADER_LENGTH;
	if (!find_end(ctx, p, p->network_at, bpf_ntohs(ip->tot_len)) ||
	    p->network_end < p->network_at + header_length)
		return REASON_IPV4_TOTAL_LENGTH;

	p->network = NETWORK_IPV4;
	p->ip4 = ip;
	p->protocol = ip->protocol;
	p->at = p->network_at + header_length;

	fragment = bpf_ntohs(ip->frag_off);
	if (fragment & IP_OFFSET) {
		p->fragment = FRAGMENT_LATER;
		return REASON_NONE;
	}
	if (fragment & IP_MF)
		p->fragment = FRAGMENT_FIRST;
	return parse_transport(ctx, p);
}

/* What the walk over IPv6 extension headers found, packed into the scalar that a global function may return. */
union extension_walk {
	__u64 packed;
	struct {
		__u16 at;        /* where the transport header starts */
		__u16 fragment_at; /* as in struct packet, and all that follow */
		__u8 fragment;
		__u8 routed;
		__u8 reason;     /* enum xdpkit_reason */
		/*
		 * Of the transport header, or the extension that was one too many. Last, so that no mask is needed to read it:
		 * behind a mask, the verifier does not know what was compared before.
		 */
		__u8 protocol;
	};
};

/* Offset of the fourth field of a routing header (RFC 8200, 4.4). */
#define ROUTING_SEGMENTS_LEFT 3

static __always_inline bool is_extension(__u8 next)
{
	return next == IPPROTO_HOPOPTS || next == IPPROTO_ROUTING || next == IPPROTO_DSTOPTS || next == IPPROTO_AH ||
	       next == IPPROTO_FRAGMENT;
}

/*
 * A global function: the verifier checks it once and by itself. Inlined, its paths would multiply with
 * those of every caller past the verifier's limit; packets without extension headers never pay the call.
 * Weak, so that clang cannot draw conclusions from the body that the verifier does not see at the call.
 */
__attribute__((noinline, weak)) __u64 walk_extensions(struct xdp_md *ctx, __u32 at, __u32 network_end, __u32 next)
{
	union extension_walk walk = { .packed = 0 };
	struct packet p = { .data = (void *)(long)ctx->data, .end = (void *)(long)ctx->data_end };
	struct ipv6_opt_hdr *option;
	struct frag_hdr *fragment;
	__u32 start, bits;
	__u8 *left;
	int i;

	p.linear = p.end - p.data;
	p.at = at & 0xff;
	for (i = 0; i < PACKET_IPV6_EXTENSIONS_MAX && is_extension(next); i++) {
		start = p.at;
		if (next == IPPROTO_FRAGMENT) {
			fragment = take(&p, sizeof(*fragment));
			if (start + sizeof(*fragment) > network_end || !fragment)
				goto truncated;
			next = fragment->nexthdr;
			bits = bpf_ntohs(fragment->frag_off);
			if (bits & (IP6_OFFSET | IP6_MF))
				walk.fragment_at = start;
			if (bits & IP6_OFFSET) {
				walk.fragment = FRAGMENT_LATER;
				goto out;
			}
			if (bits & IP6_MF)
				walk.fragment = FRAGMENT_FIRST;
			continue;
		}
		option = take(&p, sizeof(*option));
		if (start + sizeof(*option) > network_end || !option)
			goto truncated;
		/* AH counts in 4-byte units less two (RFC 4302), the others in 8-byte units less one. */
		p.at = start + (next == IPPROTO_AH ? (option->hdrlen + 2) * 4 : (option->hdrlen + 1) * 8);
		if (p.at > network_end) {
			walk.reason = REASON_IPV6_EXTENSION_TRUNCATED;
			goto out;
		}
		if (next == IPPROTO_ROUTING) {
			left = (__u8 *)option + ROUTING_SEGMENTS_LEFT;
			if ((void *)(left + 1) > p.end)
				goto truncated;
			walk.routed |= !!*left;
		}
		next = option->nexthdr;
	}
	if (is_extension(next))
		walk.reason = REASON_IPV6_EXTENSION_CHAIN;
	goto out;
truncated:
	start += next == IPPROTO_FRAGMENT ? sizeof(*fragment) : sizeof(*option);
	walk.reason = start > network_end ? REASON_IPV6_EXTENSION_TRUNCATED :
					    cut(ctx, &p, REASON_IPV6_EXTENSION_TRUNCATED);
out:
	walk.at = p.at;
	walk.protocol = next;
	return walk.packed;
}

static __always_inline __u8 ipv6_traffic_class(const struct ipv6hdr *ip)
{
	return ip->priority << 4 | ip->flow_lbl[0] >> 4;
}

/* The fixed header alone. */
static __always_inline enum xdpkit_reason parse_ipv6_header(struct xdp_md *ctx, struct packet *p)
{
	struct ipv6hdr *ip = take(p, sizeof(*ip));

	if (!ip)
		return cut(ctx, p, REASON_IPV6_TRUNCATED);
	if (ip->version != 6)
		return REASON_IPV6_VERSION;
	if (!find_end(ctx, p, p->at, bpf_ntohs(ip->payload_len)))
		return REASON_IPV6_PAYLOAD_LENGTH;

	p->network = NETWORK_IPV6;
	p->ip6 = ip;
	p->protocol = ip->nexthdr;
	return REASON_NONE;
}

/* What stands behind the extension headers. */
static __always_inline enum xdpkit_reason parse_behind(struct xdp_md *ctx, struct packet *p, union extension_walk walk)
{
	p->at = walk.at & PACKET_OFFSET_MASK;
	p->protocol = walk.protocol;
	p->fragment = walk.fragment;
	p->fragment_at = walk.fragment_at;
	p->routed = walk.routed;
	if (walk.reason)
		return walk.reason;
	return p->fragment == FRAGMENT_LATER ? REASON_NONE : parse_transport(ctx, p);
}

static __always_inline enum xdpkit_reason parse_ipv6(struct xdp_md *ctx, struct packet *p)
{
	enum xdpkit_reason reason = parse_ipv6_header(ctx, p);
	union extension_walk walk;

	if (reason != REASON_NONE)
		return reason;
	if (!is_extension(p->protocol))
		return parse_transport(ctx, p);
	walk.packed = walk_extensions(ctx, p->at, p->network_end, p->protocol);
	return parse_behind(ctx, p, walk);
}

/*
 * Answers what it is told. Global, and weak: behind the call the verifier does not know which of many numbers it is, and goes
 * through what follows once, not once for each.
 */
__attribute__((noinline, weak)) __u32 any_number(__u32 number)
{
	return number;
}

static __always_inline enum xdpkit_reason parse_ethernet(struct xdp_md *ctx, struct packet *p)
{
	struct vlan_hdr *vlan;

	__builtin_memset(p, 0, sizeof(*p));
	p->data = (void *)(long)ctx->data;
	p->end = (void *)(long)ctx->data_end;
	p->linear = p->end - p->data;
	p->eth = take(p, sizeof(*p->eth));
	if (!p->eth)
		return cut(ctx, p, REASON_ETHERNET_TRUNCATED);
	p->ether_type = p->eth->h_proto;
	/* Spares most packets six comparisons. */
	if (p->ether_type == bpf_htons(ETH_P_IP) || p->ether_type == bpf_htons(ETH_P_IPV6))
		return REASON_NONE;
	for (int i = 0; i < PACKET_VLANS_MAX; i++) {
		if (!is_vlan(p->ether_type))
			break;
		vlan = take(p, sizeof(*vlan));
		if (!vlan)
			return cut(ctx, p, REASON_VLAN_TRUNCATED);
		p->vlan_tci[i] = vlan->h_vlan_TCI;
		p->ether_type = vlan->h_vlan_encapsulated_proto;
		p->vlans++;
	}
	return is_vlan(p->ether_type) ? REASON_VLAN_TOO_DEEP : REASON_NONE;
}

static __always_inline void begin_network(struct packet *p)
{
	p->network_at = p->at;
	p->network_header = p->data + p->at;
}

static __always_inline enum xdpkit_reason parse_network(struct xdp_md *ctx, struct packet *p)
{
	begin_network(p);
	if (p->ether_type == bpf_htons(ETH_P_IP))
		return parse_ipv4(ctx, p);
	if (p->ether_type == bpf_htons(ETH_P_IPV6))
		return parse_ipv6(ctx, p);
	if (p->ether_type == bpf_htons(ETH_P_ARP))
		p->network = NETWORK_ARP;
	return REASON_NONE;
}

static __always_inline enum xdpkit_reason parse(struct xdp_md *ctx, struct packet *p)
{
	enum xdpkit_reason reason = parse_ethernet(ctx, p);

	if (reason == REASON_NONE)
		reason = parse_network(ctx, p);
	return reason == REASON_NONE ? REASON_NONE : any_number(reason);
}

#endif
