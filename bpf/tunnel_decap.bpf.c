// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* TunnelDecap: takes the outer header off packets for our virtual addresses, and hands them to the host's stack. */
#include "include/kernel.h"
#include "include/parse.h"
#include "include/stage.h"
#include "include/own_macs.h"
#include "include/decapsulate.h"
#include "abi/tunnel_decap.h"

/* Sizes are set at load time. Values are bits of enum tunnel_role. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct tunnel_key4);
	__type(value, __u32);
} prefixes_v4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct tunnel_key6);
	__type(value, __u32);
} prefixes_v6 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct tunnel_settings);
} settings SEC(".maps");

static __always_inline __u32 roles4(__be32 address)
{
	struct tunnel_key4 key = { .prefix_length = 32, .address = address };
	__u32 *roles = bpf_map_lookup_elem(&prefixes_v4, &key);

	return roles ? *roles : 0;
}

static __always_inline __u32 roles6(const struct in6_addr *address)
{
	struct tunnel_key6 key = { .prefix_length = 128 };
	__u32 *roles;

	__builtin_memcpy(key.address, address, sizeof(key.address));
	roles = bpf_map_lookup_elem(&prefixes_v6, &key);
	return roles ? *roles : 0;
}

/* What is found inside: the roles of its addresses, its ECN field, and whether its header is sound. */
struct inside {
	__u32 source;
	__u32 destination;
	__u32 ecn;
	bool sound;
};

static __always_inline void look_inside4(const struct packet *p, struct inside *in)
{
	struct iphdr *ip = p->data + (p->at & PACKET_OFFSET_MASK);
	__u32 length;

	if ((void *)(ip + 1) > p->end || ip->version != 4 || ip->ihl < 5)
		return;
	length = bpf_ntohs(ip->tot_len);
	/* Merged, as the outer one: see find_end(). */
	if (!length && p->network_end - p->at > IP_LENGTH_MAX)
		length = p->network_end - p->at;
	in->sound = length >= ip->ihl * 4U && p->at + length <= p->network_end;
	in->source = roles4(ip->saddr);
	in->destination = roles4(ip->daddr);
	in->ecn = ip->tos;
}

static __always_inline void look_inside6(const struct packet *p, struct inside *in)
{
	struct ipv6hdr *ip = p->data + (p->at & PACKET_OFFSET_MASK);

	if ((void *)(ip + 1) > p->end || ip->version != 6)
		return;
	in->sound = p->at + sizeof(*ip) + bpf_ntohs(ip->payload_len) <= p->network_end;
	in->source = roles6(&ip->saddr);
	in->destination = roles6(&ip->daddr);
	in->ecn = ip->flow_lbl[0] >> 4;
}

/* Takes the outer header off, and writes the ECN field inside. */
static __always_inline bool unwrap(struct xdp_md *ctx, const struct packet *p, bool ipv4, __u32 before, __u32 ecn)
{
	__u32 network_at = p->network_at & 31;
	void *data, *end, *ip;

	if (!remove_outer(ctx, network_at, p->at & PACKET_OFFSET_MASK, bpf_htons(ipv4 ? ETH_P_IP : ETH_P_IPV6)))
		return false;
	if ((before & ECN_MASK) == ecn)
		return true;
	data = (void *)(long)ctx->data;
	end = (void *)(long)ctx->data_end;
	ip = data + network_at;
	if (ip + sizeof(struct iphdr) > end)
		return false;
	if (ipv4)
		ipv4_set_ecn(ip, ecn);
	else
		ipv6_set_ecn(ip, ecn);
	return true;
}

/* Why a tunnel's packet is left alone or dropped; REASON_DECAPSULATED. */
static __always_inline __u32 handle_tunnel(struct xdp_md *ctx, const struct packet *p, const struct tunnel_settings *now,
					   __u32 *action)
{
	__u32 source, destination, outer_ecn, ecn;
	struct inside in = {};
	bool ipv4 = p->protocol == IPPROTO_IPIP;

	if (p->fragment)
		return REASON_TUNNEL_FRAGMENT;
	if (ipv4)
		look_inside4(p, &in);
	else
		look_inside6(p, &in);
	if (!(in.destination & TUNNEL_VIP))
		return REASON_TUNNEL_NOT_VIP;
	if (p->network == NETWORK_IPV4) {
		source = roles4(p->ip4->saddr);
		destination = roles4(p->ip4->daddr);
		outer_ecn = p->ip4->tos;
	} else {
		source = roles6(&p->ip6->saddr);
		destination = roles6(&p->ip6->daddr);
		outer_ecn = p->ip6->flow_lbl[0] >> 4;
	}
	if (!((destination | now->any) & TUNNEL_DESTINATION))
		return REASON_TUNNEL_DESTINATION;
	*action = XDP_DROP;
	if (!((source | now->any) & TUNNEL_SOURCE))
		return REASON_TUNNEL_SOURCE;
	if (!in.sound)
		return REASON_INNER_MALFORMED;
	/* Nobody else may speak in the name of our own address. */
	if (in.source & TUNNEL_VIP)
		return REASON_INNER_SOURCE;
	ecn = ecn_decapsulate(outer_ecn, in.ecn);
	if (ecn == ECN_DROP)
		return REASON_INNER_ECN;
	if (!unwrap(ctx, p, ipv4, in.ecn, ecn))
		return REASON_NO_ROOM;
	*action = XDP_PASS;
	return REASON_DECAPSULATED;
}

SEC("xdp.frags")
int tunnel_decap(struct xdp_md *ctx)
{
	struct xdpkit_counters *all = stage_counters();
	__u32 zero = 0, reason, action = XDP_PASS;
	struct tunnel_settings *now;
	struct packet p;
	__u64 bytes;

	now = bpf_map_lookup_elem(&settings, &zero);
	if (!all || !now)
		return XDP_ABORTED;
	reason = parse(ctx, &p);
	bytes = frame_bytes(ctx, &p);
	if (reason == REASON_NONE)
		reason = p.network < NETWORK_IPV4 || (p.protocol != IPPROTO_IPIP && p.protocol != IPPROTO_IPV6) ?
				 REASON_NOT_TUNNEL :
			 !is_for_us(p.eth) ? REASON_NOT_FOR_US :
					     handle_tunnel(ctx, &p, now, &action);
	return stage_end(ctx, all, bytes, reason, action);
}
