// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Firewall: the longest prefix of the source address whose rule applies decides, else the default. */
#include "include/kernel.h"
#include "include/event.h"
#include "include/parse.h"
#include "include/locate.h"
#include "include/stage.h"
#include "layout/lpm_table.h"
#include "include/neighbour.h"
#include "abi/firewall.h"

/*
 * Sizes are set at load time. Each list has tries of its own, so that one can be filled while the other is
 * in force; their memory is taken an entry at a time. Values are leaves.
 */
#define RULES_TRIE(name, key_type)                     \
	struct {                                       \
		__uint(type, BPF_MAP_TYPE_LPM_TRIE);   \
		__uint(map_flags, BPF_F_NO_PREALLOC);  \
		__uint(max_entries, 1);                \
		__type(key, key_type);                 \
		__type(value, __u32);                  \
	} name SEC(".maps")

RULES_TRIE(trie_v4_a, struct firewall_key4);
RULES_TRIE(trie_v4_b, struct firewall_key4);
RULES_TRIE(trie_v6_a, struct firewall_key6);
RULES_TRIE(trie_v6_b, struct firewall_key6);

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct firewall_rule);
} rules SEC(".maps");

/*
 * By set of CPUs and rule; the last set is user space's, for what a counter had counted before it was given to its rule.
 * Not a per-CPU map: that costs two cache misses instead of one.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct xdpkit_count);
} rule_counts SEC(".maps");

/* By CPU, where each has counters of its own. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct firewall_uncounted);
} uncounted SEC(".maps");

/* Written through a mapping, a field at a time. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct firewall_settings);
} settings SEC(".maps");

/* The list in force: a pending one only until its deadline. */
static __always_inline __u32 list_in_force(const struct firewall_settings *now)
{
	__u32 list = *(volatile const __u32 *)&now->list;

	if (list & FIREWALL_PENDING && bpf_ktime_get_coarse_ns() >= now->deadline)
		list ^= 1;
	return list & 1;
}

static __always_inline __u32 find_in_trie(const struct packet *p, __u32 list)
{
	__u32 *leaf;

	if (p->network == NETWORK_IPV4) {
		struct firewall_key4 key = { .prefix_length = 32, .address = p->ip4->saddr };

		leaf = list ? bpf_map_lookup_elem(&trie_v4_b, &key) : bpf_map_lookup_elem(&trie_v4_a, &key);
	} else {
		struct firewall_key6 key = { .prefix_length = 128 };

		__builtin_memcpy(key.address, &p->ip6->saddr, sizeof(key.address));
		leaf = list ? bpf_map_lookup_elem(&trie_v6_b, &key) : bpf_map_lookup_elem(&trie_v6_a, &key);
	}
	return leaf ? *leaf : 0;
}

static __always_inline __u32 find_leaf(const struct packet *p, const struct firewall_settings *now, __u32 list)
{
	if (now->engine == FIREWALL_TRIE)
		return find_in_trie(p, list);
	if (p->network == NETWORK_IPV4)
		return lpm_lookup4(now->roots[list][0], p->ip4->saddr);
	return lpm_lookup6(now->roots[list][1], &p->ip6->saddr);
}

/* Adds what this CPU has put off. A global function: once in many packets, and the verifier checks the loop once. */
__attribute__((noinline, weak)) int add_uncounted(__u32 cpu, __u32 first)
{
	struct firewall_uncounted *log;
	struct xdpkit_count *count;
	__u32 index;
	__u64 entry;

	log = bpf_map_lookup_elem(&uncounted, &cpu);
	if (!log)
		return 0;
	__sync_fetch_and_add(&log->turns, 1);
	for (int i = 0; i < FIREWALL_UNCOUNTED; i++) {
		entry = log->entry[i];
		index = first + (entry >> 32);
		count = bpf_map_lookup_elem(&rule_counts, &index);
		if (count && entry)
			count_one(count, (__u32)entry);
		log->entry[i] = 0;
	}
	log->used = 0;
	__sync_fetch_and_add(&log->turns, 1);
	return 0;
}

static __always_inline void count_rule(const struct firewall_settings *now, __u32 rule, __u64 bytes)
{
	struct firewall_uncounted *log;
	struct xdpkit_count *count;
	__u32 cpu, index, used;

	if (!now->counters)
		return;
	cpu = bpf_get_smp_processor_id();
	if (now->counters_shared) {
		index = (cpu & now->counters_mask) * now->counters + rule;
		count = bpf_map_lookup_elem(&rule_counts, &index);
		if (!count)
			return;
		__sync_fetch_and_add(&count->packets, 1);
		__sync_fetch_and_add(&count->bytes, bytes);
		return;
	}
	log = bpf_map_lookup_elem(&uncounted, &cpu);
	if (!log)
		return;
	used = log->used;
	if (used >= FIREWALL_UNCOUNTED)
		return; /* never: it is emptied in time */
	*(volatile __u64 *)&log->entry[used] = (__u64)rule << 32 | (__u32)bytes;
	log->used = used + 1;
	if (used + 1 == FIREWALL_UNCOUNTED)
		add_uncounted(cpu, cpu * now->counters);
}

/* Rules of one source prefix and its covering ones that are asked for one packet. */
#define RULES_ASKED_MAX 64

/* What rules ask of a packet besides its source. */
struct question {
	__be64 destination[2]; /* IPv4: the first four bytes, then zeroes */
	__u64 bytes;
	__u32 protocol;
	__u32 port; /* of the destination, host byte order; NO_PORT where there is none */
};
#define NO_PORT 0x10000

static __always_inline void fill_question(struct question *question, const struct packet *p, __u64 bytes)
{
	__builtin_memset(question, 0, sizeof(*question));
	if (p->network == NETWORK_IPV4)
		__builtin_memcpy(question->destination, &p->ip4->daddr, 4);
	else
		__builtin_memcpy(question->destination, &p->ip6->daddr, 16);
	question->bytes = bytes;
	question->protocol = p->protocol;
	question->port = NO_PORT;
	/* No ports in a later fragment: a rule about ports says nothing of it. */
	if (p->transport_header && (p->protocol == IPPROTO_TCP || p->protocol == IPPROTO_UDP))
		question->port = bpf_ntohs(p->udp->dest);
}

/* The length is 1 to 128. */
static __always_inline bool destination_matches(const struct question *question, const struct firewall_rule *rule)
{
	__u64 high = __builtin_bswap64(question->destination[0] ^ rule->destination[0]);
	__u64 low = __builtin_bswap64(question->destination[1] ^ rule->destination[1]);
	__u32 length = rule->destination_length;

	if (length <= 64)
		return high >> ((64 - length) & 63) == 0;
	return (high | low >> ((128 - length) & 63)) == 0;
}

static __always_inline bool rule_applies(const struct question *question, const struct firewall_rule *rule)
{
	if (rule->expires && bpf_ktime_get_coarse_ns() >= rule->expires)
		return false;
	if (rule->flags & FIREWALL_PROTOCOL && rule->protocol != question->protocol)
		return false;
	if (rule->flags & FIREWALL_PORTS && (question->port < rule->first_port || question->port > rule->last_port))
		return false;
	return !(rule->flags & FIREWALL_DESTINATION) || destination_matches(question, rule);
}

/* What the rules say, packed into the scalar that a global function may return. */
union answer {
	__u64 packed;
	struct {
		__u32 counter; /* of the rule that decided */
		__u32 leaf;    /* that rule and its decision; 0: no rule decided */
	};
};

/* Instead of a leaf: there were more rules to ask than a packet may cost. */
#define TOO_MANY_RULES 0xffffffff

/*
 * Asks rule after rule, beginning with those of the longest prefix. A global function: only packets that meet
 * rules which are not plain get here, and the verifier checks the loop once. Weak, as `walk_extensions`.
 */
__attribute__((noinline, weak)) __u64 ask_rules(struct question *question, __u32 leaf, __u32 list)
{
	union answer answer = { .packed = 0 };
	struct firewall_settings *now;
	struct firewall_rule *rule;
	__u32 zero = 0, id;
	int i;

	now = bpf_map_lookup_elem(&settings, &zero);
	if (!now || !question)
		return 0;
	for (i = 0; i < RULES_ASKED_MAX; i++) {
		id = leaf & FIREWALL_LEAF_RULE;
		if (!id || leaf & FIREWALL_LEAF_PLAIN) {
			answer.counter = id;
			answer.leaf = leaf;
			return answer.packed;
		}
		rule = bpf_map_lookup_elem(&rules, &id);
		if (!rule)
			return 0;
		if (rule_applies(question, rule)) {
			if (!(rule->flags & FIREWALL_COUNT_ONLY)) {
				answer.counter = rule->counter;
				answer.leaf = id;
				if (rule->flags & (list ? FIREWALL_DENY_B : FIREWALL_DENY_A))
					answer.leaf |= FIREWALL_LEAF_DENY;
				return answer.packed;
			}
			count_rule(now, rule->counter, question->bytes);
		}
		leaf = rule->next;
	}
	answer.leaf = TOO_MANY_RULES;
	return answer.packed;
}

__attribute__((noinline, weak)) int report_drop(struct xdp_md *ctx, __u32 reason, __u32 action, __u32 rule)
{
	struct packet p;

	parse_again(ctx, &p);
	return report(ctx, &p, frame_bytes(ctx, &p), reason, action, rule);
}

SEC("xdp.frags")
int firewall(struct xdp_md *ctx)
{
	struct xdpkit_counters *all = stage_counters();
	__u32 zero = 0, reason, action, leaf, list;
	union answer answer = { .packed = 0 };
	struct firewall_settings *now;
	struct events_state *events_of;
	struct question question;
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
		list = list_in_force(now);
		leaf = find_leaf(&p, now, list);
		answer.counter = leaf & FIREWALL_LEAF_RULE;
		answer.leaf = leaf;
		if (leaf && !(leaf & FIREWALL_LEAF_PLAIN)) {
			fill_question(&question, &p, bytes);
			answer.packed = ask_rules(&question, leaf, list);
		}
		if (!answer.leaf) {
			reason = REASON_DEFAULT_ACTION;
			action = now->default_action;
		} else if (answer.leaf == TOO_MANY_RULES) {
			/* Rust refuses such lists; never pass in silence what we could not judge. */
			reason = REASON_RULE_CHAIN;
			action = XDP_DROP;
			answer.leaf = 0;
		} else {
			action = answer.leaf & FIREWALL_LEAF_DENY ? XDP_DROP : XDP_PASS;
			reason = action == XDP_DROP ? REASON_DENIED : REASON_ALLOWED;
			count_rule(now, answer.counter, bytes);
		}
		if (now->count_only && action == XDP_DROP) {
			reason = REASON_WOULD_DROP;
			action = XDP_PASS;
		}
	}
	if (now->sample && (action == XDP_DROP || reason == REASON_WOULD_DROP)) {
		events_of = sampled(now->sample);
		if (events_of && !report_drop(ctx, reason, action, answer.leaf & FIREWALL_LEAF_RULE))
			events_of->lost++;
	}
	return stage_end(ctx, all, bytes, reason, action);
}
