// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Firewall: the longest prefix of the source address that has a rule decides, else the default. */
#include "include/kernel.h"
#include "include/parse.h"
#include "include/stage.h"
#include "abi/firewall.h"

/* max_entries is set at load time; memory is taken a rule at a time. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct firewall_key4);
	__type(value, struct firewall_rule);
} rules_v4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct firewall_key6);
	__type(value, struct firewall_rule);
} rules_v6 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct firewall_settings);
} settings SEC(".maps");

#define ND_ROUTER_SOLICITATION 133
#define ND_REDIRECT 137
#define ND_HOP_LIMIT 255

/* RFC 4861: such a packet comes from a neighbour only if no router has touched its hop limit. */
static __always_inline bool is_neighbour_discovery(const struct packet *p)
{
	return p->network == NETWORK_IPV6 && p->protocol == IPPROTO_ICMPV6 && p->transport_header &&
	       p->ip6->hop_limit == ND_HOP_LIMIT && p->icmp->code == 0 && p->icmp->type >= ND_ROUTER_SOLICITATION &&
	       p->icmp->type <= ND_REDIRECT;
}

static __always_inline struct firewall_rule *find_rule(const struct packet *p)
{
	if (p->network == NETWORK_IPV4) {
		struct firewall_key4 key = { .prefix_length = 32, .address = p->ip4->saddr };

		return bpf_map_lookup_elem(&rules_v4, &key);
	} else {
		struct firewall_key6 key = { .prefix_length = 128 };

		__builtin_memcpy(key.address, &p->ip6->saddr, sizeof(key.address));
		return bpf_map_lookup_elem(&rules_v6, &key);
	}
}

SEC("xdp.frags")
int firewall(struct xdp_md *ctx)
{
	__u32 zero = 0, reason, action;
	struct xdpkit_counters *all = stage_counters();
	struct firewall_settings *now;
	struct firewall_rule *rule;
	struct packet p;
	__u64 bytes;

	now = bpf_map_lookup_elem(&settings, &zero);
	if (!all || !now)
		return XDP_ABORTED;
	reason = parse(ctx, &p);
	bytes = frame_bytes(ctx, &p);

	if (reason != REASON_NONE) {
		action = reason >= REASON_FIRST_UNSUPPORTED ? now->unsupported : XDP_DROP;
	} else if (p.network == NETWORK_ARP) {
		/* No rule can name ARP: where it does not always pass, the default decides. */
		reason = REASON_ARP;
		action = now->neighbours == XDP_PASS ? XDP_PASS : now->default_action;
	} else if (p.network == NETWORK_OTHER) {
		reason = REASON_NOT_IP;
		action = now->not_ip == FIREWALL_FOLLOW_DEFAULT ? now->default_action : now->not_ip;
	} else if (now->neighbours == XDP_PASS && is_neighbour_discovery(&p)) {
		reason = REASON_NEIGHBOUR_DISCOVERY;
		action = XDP_PASS;
	} else {
		rule = find_rule(&p);
		action = rule ? rule->action : now->default_action;
		reason = !rule ? REASON_DEFAULT_ACTION : action == XDP_PASS ? REASON_ALLOWED : REASON_DENIED;
	}
	return stage_end(ctx, all, bytes, reason, action);
}
