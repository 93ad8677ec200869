/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Next hops: the kernel chooses one, by its rules and routes, once per connection or backend; the table that all programs of
 * a balancer share says how frames leave to it. The resolver in user space (src/host) keeps the table and raises its
 * generation when the choice may be another. When it is gone, the choice is made again each second, and programs keep the
 * table by what the kernel's look-up says.
 */
#ifndef XDPKIT_NEXT_HOP_H
#define XDPKIT_NEXT_HOP_H

#include "kernel.h"
#include "locate.h"
#include "../abi/next_hop.h"
#include "../layout/service_hashes.h"

/* Ticks after which it is noted again that an entry is in use. */
#define NEXT_HOP_STAMP_TICKS 256

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, NEXT_HOPS);
	__type(key, __u32);
	__type(value, struct next_hop);
} next_hops SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 8192);
	__type(key, struct link_key);
	__type(value, struct link_info);
} links SEC(".maps");

/* The packet that is to be sent, as it will leave. */
struct next_hop_request {
	__be32 destination[4]; /* IPv4: the first, then zeroes */
	__be32 source[4];
	__u32 family; /* enum packet_network */
	__u8 protocol;
	__u8 traffic_class; /* DSCP, as in the packet */
	__u8 on_link; /* a neighbour is asked for: a gateway in between is a mistake */
	__u8 reserved;
	__be16 source_port;
	__be16 destination_port;
};

static __always_inline struct next_hop *next_hop_line(__u32 number)
{
	return bpf_map_lookup_elem(&next_hops, &number);
}

/* The generation by which choices hold at this moment; 0 when there is no table. */
static __always_inline __u32 next_hop_generation(void)
{
	struct next_hop_head *head = (struct next_hop_head *)next_hop_line(0);
	__u64 now = bpf_jiffies64();

	if (!head)
		return 0;
	if ((__s64)(*(volatile __u64 *)&head->lease - now) > 0)
		return *(volatile __u32 *)&head->generation;
	return NEXT_HOP_BY_TIME | (__u32)(now >> NEXT_HOP_TIME_SHIFT);
}

static __always_inline bool next_hop_is_fresh(__u64 choice, __u32 generation)
{
	return choice >> NEXT_HOP_GENERATION_SHIFT == generation;
}

/* Of a choice that is not fresh, whether it came to nothing in this tick: the kernel need not be asked again. */
static __always_inline bool next_hop_is_hopeless(__u64 choice)
{
	return choice && !(choice >> NEXT_HOP_GENERATION_SHIFT) &&
	       (choice >> NEXT_HOP_TICK_SHIFT & 0xff) == (bpf_jiffies64() & 0xff);
}

/*
 * What a choice came to: NEXT_HOP_FOUND, and `hop`; or why not. What came in by a device can go back by it, whatever its
 * driver does with frames from elsewhere.
 */
static __always_inline __u32 next_hop_state(struct xdp_md *ctx, __u64 choice, struct next_hop **hop)
{
	__u32 number = choice & NEXT_HOP_NUMBER, exit;
	__u64 egress;

	*hop = number ? next_hop_line(number) : NULL;
	if (!(choice >> NEXT_HOP_GENERATION_SHIFT))
		return choice >> NEXT_HOP_STATE_SHIFT & NEXT_HOP_STATE_MASK;
	if (!*hop)
		return NEXT_HOP_NO_ROUTE;
	egress = *(volatile __u64 *)&(*hop)->egress;
	exit = egress >> EGRESS_EXIT_SHIFT;
	if (exit == EXIT_DEVICE || (exit == EXIT_STACK && (__u32)egress == ctx->ingress_ifindex))
		return (*hop)->to ? NEXT_HOP_FOUND : NEXT_HOP_UNRESOLVED;
	return exit == EXIT_STACK ? NEXT_HOP_BY_STACK : NEXT_HOP_DOWN;
}

/* ---- choosing ----------------------------------------------------------------------------------------- */

static __always_inline __u8 family_of(__u32 network)
{
	return network == NETWORK_IPV4 ? AF_INET : AF_INET6;
}

/* VLAN ids of the packet at hand, as in struct link_key. */
static __always_inline __u32 tags_of(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	any_u16 *type = data + 12;
	__u32 tags = 0;

	if ((void *)(type + 5) > end || !is_vlan(type[0]))
		return 0;
	tags = (bpf_ntohs(type[1]) & 0xfff) | 1 << 24;
	if (is_vlan(type[2]))
		tags = (tags & 0xfff) | (bpf_ntohs(type[3]) & 0xfff) << 12 | 2 << 24;
	return tags;
}

/* The interface whose rules and routes hold for the packet at hand: not the port, but the bridge, and so on. */
static __always_inline __u32 next_hop_ingress(struct xdp_md *ctx)
{
	struct link_key key = { .device = ctx->ingress_ifindex, .tags = tags_of(ctx) };
	struct link_info *link = bpf_map_lookup_elem(&links, &key);

	return link && link->layer3 ? link->layer3 : key.device;
}

/*
 * Asks the kernel; answers NEXT_HOP_FOUND, NEXT_HOP_UNRESOLVED, or why there is none. The interface that the packet came in
 * by has to forward (sysctl), else the kernel finds no route.
 */
static __always_inline __u32 fib_ask(struct xdp_md *ctx, const struct next_hop_request *request,
				     struct bpf_fib_lookup *fib)
{
	bool gateway;
	long answer;

	__builtin_memset(fib, 0, sizeof(*fib));
	fib->ifindex = next_hop_ingress(ctx);
	fib->family = family_of(request->family);
	fib->l4_protocol = request->protocol;
	fib->sport = request->source_port;
	fib->dport = request->destination_port;
	if (request->family == NETWORK_IPV4)
		*(__u8 *)&fib->flowinfo = request->traffic_class;
	else
		fib->flowinfo = bpf_htonl((__u32)request->traffic_class << 20);
	for (int i = 0; i < 4; i++) {
		fib->ipv6_src[i] = request->source[i];
		fib->ipv6_dst[i] = request->destination[i];
	}
	answer = bpf_fib_lookup(ctx, fib, sizeof(*fib), 0);
	if (answer != BPF_FIB_LKUP_RET_SUCCESS && answer != BPF_FIB_LKUP_RET_NO_NEIGH)
		return NEXT_HOP_NO_ROUTE;
	/* The kernel has put the gateway, if there is one, in the place of what we asked for. */
	gateway = fib->family != family_of(request->family) || fib->ipv6_dst[0] != request->destination[0];
	if (fib->family == AF_INET6)
		for (int i = 1; i < 4; i++)
			gateway |= fib->ipv6_dst[i] != request->destination[i];
	if (request->on_link && gateway)
		return NEXT_HOP_OFF_LINK;
	return answer == BPF_FIB_LKUP_RET_SUCCESS ? NEXT_HOP_FOUND : NEXT_HOP_UNRESOLVED;
}

/* How frames leave by an interface that routes name. */
static __always_inline __u64 egress_of(__u32 interface)
{
	struct next_hop_head *head = (struct next_hop_head *)next_hop_line(0);
	struct link_key key = { .device = interface };
	struct link_info *link = bpf_map_lookup_elem(&links, &key);

	if (link)
		return link->egress;
	/* What has come since somebody last looked after the table may be anything. */
	return (__u64)(head && head->lease ? EXIT_STACK : EXIT_DEVICE) << EGRESS_EXIT_SHIFT | interface;
}

static __always_inline __u64 mac_word(const __u8 *mac)
{
	return *(const any_u32 *)mac | (__u64)*(const any_u16 *)(mac + 4) << 32;
}

/* Writes down what the kernel has answered, where nobody knows better. */
static __always_inline void next_hop_fill(struct next_hop *hop, const struct bpf_fib_lookup *fib, bool known)
{
	__u64 egress = egress_of(fib->ifindex), to = known ? mac_word(fib->dmac) : 0;

	/* The resolver alone knows at which port a bridge has a neighbour: what it last said holds for the same MAC. */
	if (egress >> EGRESS_EXIT_SHIFT != EXIT_BRIDGE)
		hop->egress = egress;
	else if (!to || hop->to != to)
		hop->egress = (__u64)EXIT_STACK << EGRESS_EXIT_SHIFT | fib->ifindex;
	hop->from = mac_word(fib->smac);
	hop->to = to;
}

/*
 * The entry of what the kernel has answered, made where there is none; 0: there is no room. Where two CPUs make the same one,
 * both are good. Global, as all that few packets need. Weak: see parse.h.
 */
__attribute__((noinline, weak)) __u32 next_hop_entry(struct bpf_fib_lookup *fib, __u32 state, __u32 is_led)
{
	__u32 at, number, now = bpf_jiffies64();
	__u64 first, second, what, hash;
	struct next_hop_head *head;
	struct next_hop *hop;
	__u8 family;

	if (!fib)
		return 0;
	family = fib->family == AF_INET ? NETWORK_IPV4 : NETWORK_IPV6;
	first = *(const any_u64 *)&fib->ipv6_dst[0];
	second = *(const any_u64 *)&fib->ipv6_dst[2];
	if (family == NETWORK_IPV4) {
		first &= 0xffffffff;
		second = 0;
	}
	what = fib->ifindex | (__u64)fib->mtu_result << 32 | (__u64)family << 48;
	hash = mix64(mix64(first + 0x9e3779b97f4a7c15ULL) ^ second ^ (what << 29 | what >> 35));
	at = (hash >> 20) % (NEXT_HOPS - 1);
	for (__u32 i = 0; i < NEXT_HOP_PROBES; i++) {
		number = 1 + (at + i) % (NEXT_HOPS - 1);
		hop = next_hop_line(number);
		if (!hop)
			return 0;
		if (*(volatile __u32 *)&hop->use != NEXT_HOP_USED || hop->address[0] != first || hop->address[1] != second ||
		    *(volatile __u64 *)&hop->interface != what)
			continue;
		hop->last_used = now;
		if (!is_led || (!hop->to && state == NEXT_HOP_FOUND))
			next_hop_fill(hop, fib, state == NEXT_HOP_FOUND);
		return number;
	}
	for (__u32 i = 0; i < NEXT_HOP_PROBES; i++) {
		number = 1 + (at + i) % (NEXT_HOPS - 1);
		hop = next_hop_line(number);
		if (!hop)
			return 0;
		if (__sync_val_compare_and_swap(&hop->use, NEXT_HOP_FREE, NEXT_HOP_CLAIMED) != NEXT_HOP_FREE)
			continue;
		hop->address[0] = first;
		hop->address[1] = second;
		*(volatile __u64 *)&hop->interface = what;
		hop->last_used = now;
		next_hop_fill(hop, fib, state == NEXT_HOP_FOUND);
		__sync_lock_test_and_set(&hop->use, NEXT_HOP_USED);
		head = (struct next_hop_head *)next_hop_line(0);
		if (head)
			__sync_fetch_and_add(&head->wanted, 1);
		return number;
	}
	return 0;
}

/* Chooses. Global: few packets need it. Weak: see parse.h. */
__attribute__((noinline, weak)) __u64 next_hop_choose(struct xdp_md *ctx, struct next_hop_request *request)
{
	__u32 generation = next_hop_generation(), state, number = 0;
	struct bpf_fib_lookup fib;

	if (!request)
		return 0;
	state = fib_ask(ctx, request, &fib);
	if (state == NEXT_HOP_FOUND || state == NEXT_HOP_UNRESOLVED) {
		number = next_hop_entry(&fib, state, !(generation & NEXT_HOP_BY_TIME));
		/* Of a neighbour that it does not know, the kernel does not tell the MTU: its entry only makes it be resolved. */
		if (number && state == NEXT_HOP_FOUND)
			return (__u64)generation << NEXT_HOP_GENERATION_SHIFT | number;
		if (!number)
			state = NEXT_HOP_BY_STACK;
	}
	return (bpf_jiffies64() & 0xff) << NEXT_HOP_TICK_SHIFT | state << NEXT_HOP_STATE_SHIFT | number;
}

/* ---- sending ------------------------------------------------------------------------------------------ */

static __always_inline void write_macs(void *data, __u64 to, __u64 from)
{
	*(any_u64 *)data = to | from << 48;
	*(any_u32 *)(data + 8) = from >> 16;
}

/*
 * Sends a frame one of whose sides is tagged: with the tags of its egress, in the place of those that it has. Global: see
 * parse.h. The priority of the outer tag stays.
 */
__attribute__((noinline, weak)) int send_tagged(struct xdp_md *ctx, __u64 to, __u64 from, __u64 egress)
{
	__u32 device = egress & EGRESS_DEVICE_MASK, had = 0, gets = egress >> EGRESS_VLANS_SHIFT & 3;
	struct link_key key = { .device = ctx->ingress_ifindex };
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	__u16 priority = 0;
	any_u16 *tag;
	__be16 type;

	if (data + ETHERNET_HEADERS_MAX > end)
		return XDP_DROP;
	tag = data + 12;
	type = tag[0];
	if (is_vlan(type)) {
		priority = bpf_ntohs(tag[1]) & 0xf000;
		had = 1;
		type = tag[2];
		if (is_vlan(type)) {
			had = 2;
			type = tag[4];
		}
	}
	if (gets > PACKET_VLANS_MAX)
		return XDP_DROP;
	if (had && !gets) {
		key.tags = tags_of(ctx);
		/* Tags that are no interface's of this host go through it as they are. */
		if (!bpf_map_lookup_elem(&links, &key)) {
			write_macs(data, to, from);
			return device == ctx->ingress_ifindex ? XDP_TX : (int)bpf_redirect(device, 0);
		}
	}
	if (had != gets && bpf_xdp_adjust_head(ctx, 4 * ((int)had - (int)gets)))
		return XDP_DROP;
	data = (void *)(long)ctx->data;
	end = (void *)(long)ctx->data_end;
	if (data + ETHERNET_HEADERS_MAX > end)
		return XDP_DROP;
	write_macs(data, to, from);
	tag = data + 12;
	if (gets) {
		*tag++ = egress & EGRESS_AD0 ? bpf_htons(ETH_P_8021AD) : bpf_htons(ETH_P_8021Q);
		*tag++ = bpf_htons(priority | (egress >> EGRESS_VLAN0_SHIFT & 0xfff));
	}
	if (gets > 1) {
		*tag++ = egress & EGRESS_AD1 ? bpf_htons(ETH_P_8021AD) : bpf_htons(ETH_P_8021Q);
		*tag++ = bpf_htons(priority | (egress >> EGRESS_VLAN1_SHIFT & 0xfff));
	}
	*tag = type;
	return device == ctx->ingress_ifindex ? XDP_TX : (int)bpf_redirect(device, 0);
}

/* Sends the frame to a next hop. `vlans`: the tags that it has. Nothing that was read of the packet holds after this. */
static __always_inline int next_hop_send(struct xdp_md *ctx, struct next_hop *hop, void *data, void *end, __u32 vlans)
{
	__u64 egress = hop->egress;
	__u32 device = egress, now = bpf_jiffies64();

	if (now - hop->last_used > NEXT_HOP_STAMP_TICKS)
		hop->last_used = now;
	if (vlans || egress >> EGRESS_VLANS_SHIFT & 3)
		return send_tagged(ctx, hop->to, hop->from, egress);
	if (data + sizeof(struct ethhdr) > end)
		return XDP_DROP;
	write_macs(data, hop->to, hop->from);
	return device == ctx->ingress_ifindex ? XDP_TX : (int)bpf_redirect(device, 0);
}

/*
 * What becomes of a packet for one of our addresses whose hops are over: XDP_PASS, so that the host's stack tells its sender,
 * but only where it would forward the packet. What is sent to an address of its own it takes for itself, and answers with
 * the RST of a port that nobody listens at: XDP_DROP. Global: few packets need it. Weak: see parse.h.
 */
__attribute__((noinline, weak)) int expire(struct xdp_md *ctx)
{
	struct next_hop_request request = {};
	struct bpf_fib_lookup fib;
	struct packet p;

	if (parse_again(ctx, &p) != REASON_NONE || p.network < NETWORK_IPV4)
		return XDP_DROP;
	request.family = p.network;
	if (p.network == NETWORK_IPV4)
		request.destination[0] = p.ip4->daddr;
	else
		__builtin_memcpy(request.destination, &p.ip6->daddr, sizeof(request.destination));
	return fib_ask(ctx, &request, &fib) == NEXT_HOP_NO_ROUTE ? XDP_DROP : XDP_PASS;
}

#endif
