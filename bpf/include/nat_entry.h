/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A connection's record and the entries of the flow table that lead to it: how both come and go. */
#ifndef XDPKIT_NAT_ENTRY_H
#define XDPKIT_NAT_ENTRY_H

#include "connection.h"
#include "nat_job.h"

static __always_inline void nat_count_own(__u32 what)
{
	struct xdpkit_counters *all = stage_counters();

	if (all)
		all->own[what & (XDPKIT_OWN_COUNTS - 1)].packets++;
}

/* Ends what a record held: its word was `word`, and is claimed now. */
static __always_inline void nat_let_go(struct nat_connection *r, __u32 record, __u64 word)
{
	__u32 flags = nat_flags(word);

	if (!(flags & NAT_LIVE))
		return;
	nat_uncount(r, flags);
	nat_forget(record, flags);
}

/* Claims a record that has this word. */
static __always_inline bool nat_claim(struct nat_connection *r, __u64 word, __u32 now)
{
	__u64 claimed = nat_word((word >> NAT_GENERATION_SHIFT) + 1, NAT_CLAIMED, now);

	return __sync_val_compare_and_swap(&r->word, word, claimed) == word;
}

/* A claimed record is nobody's again. */
static __always_inline void nat_free(struct nat_connection *r)
{
	__u64 word = NAT_ONCE(r->word);

	__sync_lock_test_and_set(&r->word, word >> NAT_GENERATION_SHIFT << NAT_GENERATION_SHIFT);
}

/* Ends a connection, if its word is still this one. */
__attribute__((noinline, weak)) int nat_end(__u32 record, __u64 word, __u32 now)
{
	struct nat_connection *r = bpf_map_lookup_elem(&connections, &record);

	if (!r || !(nat_flags(word) & NAT_LIVE) || !nat_claim(r, word, now))
		return 0;
	nat_let_go(r, record, word);
	nat_free(r);
	return 1;
}

/*
 * The same where an entry of the flow table is about to go, or has gone. If there is another one, it leads to a
 * record that is not its own from now on, and is taken for none.
 */
static __always_inline bool nat_drop(struct nat_connection *r, __u64 word, __u32 now)
{
	if (!nat_claim(r, word, now))
		return false;
	nat_uncount(r, nat_flags(word));
	nat_free(r);
	return true;
}

static __always_inline void nat_touch_line(const struct flow_table *t, __u64 key, __u32 candidate)
{
	__u32 index = flow_line_at(t, key, candidate);
	struct flow_line *line = bpf_map_lookup_elem(&flows_lines, &index);
	__u64 word = line ? FLOW_ONCE(line->state[0]) : 0;

	asm volatile("" ::"r"(word));
}

/*
 * Has both lines of a key fetched at once, and beside the record in its second place: a new connection needs them all,
 * and a miss for each after the other would cost more than all the rest.
 */
static __always_inline void nat_touch(const struct flow_table *t, __u64 key)
{
	nat_touch_line(t, key, 1);
	nat_touch_line(t, key, 0);
}

/* The key of a record's client and its service; or, with `of_backend`, the backend whose clients keep their address. */
__attribute__((noinline, weak)) __u64 nat_key_of(__u32 record, __u32 flags, __u32 of_backend)
{
	struct nat_connection *r = bpf_map_lookup_elem(&connections, &record);
	const struct flow_table *t = flows_open();

	if (!r || !t)
		return 0;
	return nat_key(t, r->client, r->client_port, of_backend ? NAT_KEY_OF_BACKEND | r->address : r->service,
		       flags & NAT_IPV6);
}

/* Whether a record with these flags is the one that a key is about. */
__attribute__((noinline, weak)) int nat_is_of_key(__u32 record, __u32 flags, __u64 key)
{
	return nat_key_of(record, flags, false) == key ||
	       (flags & NAT_KEPT_SOURCE && nat_key_of(record, flags, true) == key);
}

/* Ends the unconfirmed connection whose entry in the flow table went for another. */
__attribute__((noinline, weak)) int nat_end_victim(__u64 key, __u32 record, __u32 now)
{
	struct nat_connection *r = bpf_map_lookup_elem(&connections, &record);
	__u64 word;

	if (!r)
		return 0;
	word = NAT_ONCE(r->word);
	if (!(nat_flags(word) & NAT_LIVE) || nat_is_kept(nat_flags(word)) || !nat_is_of_key(record, nat_flags(word), key) ||
	    !nat_drop(r, word, now))
		return 0;
	nat_count_own(NAT_EVICTED);
	return 1;
}

/*
 * Looks at what has a key already: the record and 1 when it is a live connection of that key, else 0, and it is gone.
 */
__attribute__((noinline, weak)) __u64 nat_examine(__u64 key, __u32 now)
{
	struct nat_settings *s = nat_settings();
	__u64 found = nat_look_up(key), word;
	__u32 record = found - 1;
	struct nat_connection *r;

	if (!found || !s)
		return 0;
	r = bpf_map_lookup_elem(&connections, &record);
	if (!r)
		return 0;
	word = NAT_ONCE(r->word);
	if (nat_is_of_key(record, nat_flags(word), key)) {
		if (!nat_is_dead(s, word, now))
			return found;
		/* Claimed, it is being ended or made another's: who has claimed it relies on having it alone. */
		if (nat_flags(word) & NAT_LIVE)
			nat_drop(r, word, now);
	}
	nat_forget_key(key, record);
	return 0;
}

#define NAT_ENTERED 0
#define NAT_NO_ROOM 1
#define NAT_EXISTS 2

__attribute__((noinline, weak)) int nat_publish(__u32 record, __u32 now)
{
	struct nat_job *job = nat_job();

	return job && flows_publish(&job->claim, nat_value(record, now));
}

/* Makes a key lead to a record. */
__attribute__((noinline, weak)) __u32 nat_enter(__u64 key, __u32 record, __u32 now)
{
	struct nat_job *job = nat_job();
	__u32 answer;

	if (!job)
		return NAT_NO_ROOM;
	for (int i = 0; i < 3; i++) {
		job->claim.key = key;
		job->claim.now = now / NAT_STAMP_UNIT;
		answer = flows_claim(&job->claim);
		/* The other entry of the same connection is put back by the caller. */
		if (job->claim.victim_key && (job->claim.victim_value & NAT_VALUE_RECORD) != record)
			nat_end_victim(job->claim.victim_key, job->claim.victim_value & NAT_VALUE_RECORD, now);
		if (answer == FLOW_FULL)
			return NAT_NO_ROOM;
		if (answer == FLOW_TAKEN) {
			if (nat_publish(record, now))
				return NAT_ENTERED;
		} else if (nat_examine(key, now)) {
			return NAT_EXISTS;
		}
	}
	return NAT_NO_ROOM;
}

/*
 * Frees a way that a key may be in, counted in search order, when its entry is of a confirmed connection that has been
 * silent for too long, or leads to a record that is another one's by now. The flow table would keep such an entry for ever:
 * only the record knows better, and nothing looks there unless its place is wanted.
 */
__attribute__((noinline, weak)) int nat_sweep_way(__u64 key, __u32 at, __u32 now)
{
	const struct flow_table *t = flows_open();
	struct nat_settings *s = nat_settings();
	__u32 record, index, way = at % FLOW_WAYS;
	struct flow_entry entry;
	struct nat_connection *r;
	struct flow_line *line;
	__u64 word;

	if (!t || !s)
		return 0;
	index = flow_line_at(t, key, at / FLOW_WAYS);
	line = bpf_map_lookup_elem(&flows_lines, &index);
	if (!line)
		return 0;
	key = FLOW_ONCE(line->key[way]);
	entry.state = &line->state[way];
	entry.slot = index * FLOW_WAYS + way;
	entry.word = flow_read(line, way, key);
	if (!entry.word || !(flow_value(entry.word) & NAT_VALUE_CONFIRMED))
		return 0;
	record = flow_value(entry.word) & NAT_VALUE_RECORD;
	r = bpf_map_lookup_elem(&connections, &record);
	if (!r)
		return 0;
	word = NAT_ONCE(r->word);
	if (!(nat_flags(word) & NAT_LIVE) || !nat_is_of_key(record, nat_flags(word), key))
		return flows_remove(&entry);
	return nat_is_dead(s, word, now) && nat_end(record, word, now);
}

/* The same of all ways that the entries of a wished-for connection may be in. Answers how many were freed. */
__attribute__((noinline, weak)) int nat_sweep(struct nat_wish *wish)
{
	int freed = 0;

	if (!wish)
		return 0;
	for (__u32 at = 0; at < 3 * FLOW_WAYS; at++) {
		freed += nat_sweep_way(wish->key, at, wish->now);
		if (wish->kept)
			freed += nat_sweep_way(wish->kept_key, at, wish->now);
	}
	return freed;
}

#endif
