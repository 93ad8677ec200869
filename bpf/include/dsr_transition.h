/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Slots in transition: the flows that could move are remembered, so that they do not. Everything here is off the path
 * of packets whose slot is not in transition.
 *
 * A slot's word names its backend and, in transition, the one before: the last that it served without remembering
 * anything. Flows that nobody has recorded belong to that one, but for those that begin now. What was recorded before
 * the slot's transition began says nothing any more.
 */
#ifndef XDPKIT_DSR_TRANSITION_H
#define XDPKIT_DSR_TRANSITION_H

#include "kernel.h"
#include "service.h"
#include "flow_table.h"
#include "../layout/dsr_keys.h"

SHARED_ARRAY(settings, struct dsr_settings);
SHARED_ARRAY(transitions, struct dsr_transition);
SHARED_ARRAY(flow_sides, struct dsr_side);

#define RECORD_KIND(value) ((value) >> DSR_RECORD_KIND_SHIFT & 3)
#define RECORD_TIME(value) ((__u32)((value) >> DSR_RECORD_TIME_SHIFT))

static __always_inline __u32 dsr_time(void)
{
	return bpf_ktime_get_coarse_ns() >> DSR_TIME_SHIFT;
}

/* What a rank is told: the time, the idle time, and whether the flow that wants room may not push out half-open ones. */
#define RANK_IDLE_SHIFT 32
#define RANK_WEAK (1ULL << 63)
#define RANK_HALF_OPEN_LIFE 3576 /* a minute */
/*
 * Established flows are kept until they are idle, whoever asks. Half-open ones give way to each other, the oldest
 * first; those that stay with the previous backend to all, as they would do so without a record.
 */
static __always_inline __u64 dsr_rank(__u64 value, __u64 now)
{
	__u32 age = (__u32)now - RECORD_TIME(value), idle = now >> RANK_IDLE_SHIFT & 0x7fffffff;
	__u64 kind = RECORD_KIND(value), rank = (__u64)age << 2;

	if (age > idle)
		return FLOW_STALE | rank;
	if (kind == DSR_STAYING)
		return rank | 1ULL << 62;
	if (kind == DSR_ESTABLISHED)
		return FLOW_KEEP;
	if (age > RANK_HALF_OPEN_LIFE)
		return FLOW_STALE | rank;
	return now & RANK_WEAK ? FLOW_KEEP : rank | 1ULL << 61;
}

FLOW_TABLE(flows, dsr_rank);

static __always_inline bool is_side_of(__u32 slot, const struct transit *t)
{
	struct dsr_side *side = bpf_map_lookup_elem(&flow_sides, &slot);

	return side && side->client[0] == t->client[0] && side->client[1] == t->client[1] &&
	       side->ports == t->ports && side->service == t->service;
}

static __always_inline bool is_alive(__u32 number)
{
	struct backend *backend = bpf_map_lookup_elem(&backends, &number);

	return number && backend && !(*(volatile __u32 *)&backend->flags & BACKEND_KILLED);
}

static __always_inline __u64 record_of(__u32 backend, __u32 kind, const struct transit *t, __u32 now)
{
	return backend | (__u64)kind << DSR_RECORD_KIND_SHIFT | (t->what & TRANSIT_SIDE ? DSR_RECORD_SIDE : 0) |
	       (__u64)now << DSR_RECORD_TIME_SHIFT;
}

static __always_inline void transit_count(const struct transit *t, __u32 what)
{
	__u32 service = t->service;
	struct service_state *state = bpf_map_lookup_elem(&service_states, &service);

	if (state)
		state->function[what]++;
}

/* Whether there is a record of the flow now. */
static __always_inline bool transit_record(const struct transit *t, __u64 key, __u32 backend, __u32 kind, __u32 now,
					   __u32 idle)
{
	struct flow_claim claim = { .key = key };
	struct dsr_side *side;
	__u32 slot;

	claim.now = now | (__u64)(idle & 0x7fffffff) << RANK_IDLE_SHIFT | (kind == DSR_STAYING ? RANK_WEAK : 0);
	if (flows_claim(&claim) != FLOW_TAKEN)
		return false;
	if (t->what & TRANSIT_SIDE) {
		slot = claim.slot;
		side = bpf_map_lookup_elem(&flow_sides, &slot);
		if (!side) {
			flows_withdraw(&claim);
			return false;
		}
		side->client[0] = t->client[0];
		side->client[1] = t->client[1];
		side->ports = t->ports;
		side->service = t->service;
	}
	if (!flows_publish(&claim, record_of(backend, kind, t, now)))
		return false;
	transit_count(t, DSR_RECORDED);
	return true;
}

/* A packet went to another backend than the slot's present one. */
static __always_inline __u32 transit_elsewhere(struct dsr_transition *transition, __u32 now, __u32 backend)
{
	if (*(volatile __u32 *)&transition->last != now)
		*(volatile __u32 *)&transition->last = now;
	return backend;
}

/* The backend of a packet whose slot is in transition; 0: none. Global: see parse.h for this and for weak. */
__attribute__((noinline, weak)) __u32 transit(struct transit *t)
{
	__u32 current, previous, now, begin, kind, backend, slot, zero = 0;
	struct dsr_transition *transition;
	struct dsr_settings *set;
	struct flow_table *table;
	struct flow_entry entry;
	bool found, has_previous;
	__u64 key, value = 0;
	__u32 *word;

	set = bpf_map_lookup_elem(&settings, &zero);
	table = flows_open();
	if (!t || !set || !table)
		return 0;
	slot = t->slot;
	transition = bpf_map_lookup_elem(&transitions, &slot);
	if (!transition)
		return 0;
	current = t->word & SLOT_BACKEND;
	previous = t->word >> SLOT_PREVIOUS_SHIFT;
	now = dsr_time();
	begin = *(volatile __u32 *)&transition->begin;
	transit_count(t, DSR_IN_TRANSITION);

	if ((__s32)(now - *(volatile __u32 *)&transition->last) > (__s32)set->idle ||
	    (__s32)(now - begin) > (__s32)set->longest) {
		/* It is over. Unless user space has just changed the slot, it says so from now on. */
		struct slot_line *line;
		__u32 index = slot / SLOT_LINE_WORDS;

		line = bpf_map_lookup_elem(&slots, &index);
		if (line) {
			word = &line->word[slot % SLOT_LINE_WORDS];
			__sync_val_compare_and_swap(word, t->word, current);
		}
		return current;
	}
	has_previous = is_alive(previous);
	if (t->what & TRANSIT_CURRENT)
		return current || !has_previous ? current : previous;

	key = transit_key(table, t);
	found = flows_find(table, key, &entry);
	if (found) {
		value = flow_value(entry.word);
		if (!(value & DSR_RECORD_SIDE) != !(t->what & TRANSIT_SIDE) ||
		    (t->what & TRANSIT_SIDE && !is_side_of(entry.slot, t)))
			/* Another flow's: one pair in 2^64. This one goes unrecorded. */
			goto unrecorded;
	}
	backend = value & SLOT_BACKEND;
	kind = RECORD_KIND(value);
	if (found && (__s32)(RECORD_TIME(value) - begin) >= 0 && is_alive(backend) &&
	    !(t->what & TRANSIT_SYN && kind == DSR_CLOSING)) {
		if (t->what & TRANSIT_END)
			kind = DSR_CLOSING;
		else if (kind == DSR_HALF_OPEN && !(t->what & TRANSIT_SYN))
			kind = DSR_ESTABLISHED;
		value = record_of(backend, kind, t, now);
		if (!(t->what & TRANSIT_LOOK) && value != flow_value(entry.word))
			flow_update(&entry, value);
		return backend == current ? current : transit_elsewhere(transition, now, backend);
	}
	if (t->what & TRANSIT_LOOK)
		goto unrecorded;

	if (!has_previous || t->what & TRANSIT_SYN || (t->what & TRANSIT_UDP && now - begin > set->udp_grace)) {
		backend = current;
		kind = t->what & TRANSIT_SYN ? DSR_HALF_OPEN : DSR_ESTABLISHED;
	} else {
		backend = previous;
		kind = DSR_STAYING;
	}
	if (!backend)
		return 0;
	if (found) {
		if (flow_update(&entry, record_of(backend, kind, t, now)))
			transit_count(t, DSR_RECORDED);
	} else if (!transit_record(t, key, backend, kind, now, set->idle) && backend != previous && has_previous) {
		/* The packets after this one would go to the previous backend: so must this one. */
		transit_count(t, DSR_UNRECORDED);
		backend = previous;
	}
	return backend == current ? current : transit_elsewhere(transition, now, backend);

unrecorded:
	return has_previous ? transit_elsewhere(transition, now, previous) : current;
}

#endif
