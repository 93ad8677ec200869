/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Bans: a table of its own, which no flood of new sources can push anybody out of. They end by themselves. */
#ifndef XDPKIT_BANS_H
#define XDPKIT_BANS_H

#include "buckets.h"

/* A ban that is over is as good as gone; the others stay. */
static __always_inline __u64 ban_rank(__u64 value, __u64 now)
{
	__u64 until = value & RATE_BAN_TIME;

	return until <= now ? FLOW_STALE | (now - until) : FLOW_KEEP;
}

FLOW_TABLE(bans, ban_rank)

/* By slot: who is banned. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct rate_address);
} ban_addresses SEC(".maps");

static __always_inline __u64 ban_key(const struct flow_table *t, const struct rate_source *s)
{
	return rate_key_hash(t, s, s->ipv6);
}

/* When a source's ban ends, 0 for never was one. Only asked while some ban is in force. */
__attribute__((noinline, weak)) __u64 ban_until(struct rate_source *s)
{
	struct flow_table *t = bans_open();
	struct flow_entry e;

	if (!s || !t || !bans_find(t, ban_key(t, s), &e))
		return 0;
	return flow_value(e.word) & RATE_BAN_TIME;
}

enum ban_answer {
	BAN_SET = 0,
	BAN_FULL = 1,
	BAN_AGAIN = 2, /* another CPU was faster */
};

/*
 * Global: inlined into the loop below, clang 14 lays it out so that the loop is closed by falling through, which Linux 6.1
 * refuses as a back-edge.
 */
__attribute__((noinline, weak)) __u32 ban_try(struct rate_source *s, __u64 now, __u64 value)
{
	struct flow_table *t = bans_open();
	struct rate_address *beside;
	struct flow_entry e;
	struct flow_claim c;
	__u32 answer;

	if (!s || !t)
		return BAN_FULL;
	c.key = ban_key(t, s);
	c.now = now;
	if (bans_find(t, c.key, &e)) {
		if ((flow_value(e.word) & RATE_BAN_TIME) >= (value & RATE_BAN_TIME) || flow_update(&e, value))
			return BAN_SET;
		return BAN_AGAIN;
	}
	answer = bans_claim(&c);
	if (answer != FLOW_TAKEN)
		return answer == FLOW_FULL ? BAN_FULL : BAN_AGAIN;
	beside = bpf_map_lookup_elem(&ban_addresses, &c.slot);
	if (beside) {
		beside->address[0] = s->high;
		beside->address[1] = s->low;
	}
	return bans_publish(&c, value) ? BAN_SET : BAN_AGAIN;
}

/* Bans a source, or prolongs its ban; false when the table is full of others. */
static __always_inline bool ban_source(struct rate_source *s, __u64 now, __u64 until)
{
	__u32 zero = 0, answer = BAN_AGAIN;
	struct rate_shared *all;
	__u64 value, last;

	all = bpf_map_lookup_elem(&shared, &zero);
	if (!s || !all)
		return false;
	/* First: a ban that nobody looks for is none. */
	for (int i = 0; i < 8; i++) {
		last = FLOW_ONCE(all->banned_until);
		if (last >= until || __sync_val_compare_and_swap(&all->banned_until, last, until) == last)
			break;
	}
	value = (until & RATE_BAN_TIME) | (s->ipv6 ? RATE_BAN_IPV6 : 0);
	for (int i = 0; i < 8 && answer == BAN_AGAIN; i++)
		answer = ban_try(s, now, value);
	return answer == BAN_SET;
}

#endif
