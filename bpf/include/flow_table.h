/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The flow table: entries of a 64-bit key and a state word in an array of cache lines, four to a line. Bounded
 * memory, nothing allocated, shared by all CPUs and by user space (src/flow_table/) without a lock.
 *
 * A key belongs to two lines. It goes to the first while that has two ways to spare, else to the one with
 * more room, else to the stash; so with at most half as many entries as ways, none is refused and none that is
 * fresh goes. A look-up that hits in the first line touches nothing else. A miss ends there as well, unless
 * the line is marked (FLOW_MARK_WAY).
 *
 * Keys come out of a secret: flow_key() scrambles a number below 2^63 and can be undone, so that the key is exact;
 * flow_hash() makes a tag of what is longer, two of which are equal once in 2^64 pairs, and a function to which
 * that would matter keeps the rest in an array of its own, by slot, and compares. Nobody without the secret can
 * aim at a line: each half of flow_hash() is strongly universal (Dietzfelbinger 1996, multiply-shift by 32-bit words).
 *
 * How entries change hands:
 *  1. Only the state word decides whose a way is, and it changes only by compare-and-swap: from a live state or free
 *     to FLOW_CLAIMED by who takes the way, from there to live by who has it. So an entry that is updated
 *     while somebody is about to evict it stays, and no update is lost.
 *  2. The key word, and what a function keeps beside, are written only while the state is FLOW_CLAIMED. A reader
 *     loads key, state, key: when both keys are the one it looks for and the state is live, the state belongs to
 *     that key. An update by compare-and-swap on that state then hits this entry or fails: a later entry in
 *     the same way has another generation.
 *  3. Who has written its key into a claimed way looks at all other ways that the key may be in, and only
 *     then goes live. Two CPUs with one new key cannot both fail to see the other. Who finds a live
 *     entry gives up its own. Of two claimed ones, the later in search order gives up, and the earlier makes
 *     sure of that (FLOW_BEATEN) before it goes live. So no two live entries ever have the same key.
 *  4. What moves on is told by the mark and by `stashed`, set before the key is written elsewhere.
 * Loads of one CPU have to stay in order where that matters: x86 does so, and the dependency in flow_then() elsewhere.
 *
 * What goes is the function's choice: its rank(value, now) says of a live entry FLOW_KEEP, or how stale it is. From
 * FLOW_STALE on, the entry is as good as gone and its way counts as room; below, it goes only when there is no
 * room at all, the highest rank first. The lowest two bits of a rank decide nothing.
 */
#ifndef XDPKIT_FLOW_TABLE_H
#define XDPKIT_FLOW_TABLE_H

#include "kernel.h"
#include "../layout/flow_keys.h"

#define FLOW_KEEP 0ULL
#define FLOW_STALE (1ULL << 63)

typedef __u64 (*flow_rank)(__u64 value, __u64 now);

/* An entry that was found. */
struct flow_entry {
	__u64 *state; /* the word, for flow_update() */
	__u64 word;   /* as it was when it was read: of this key, and live */
	__u32 slot;
};

/* A way that is being taken. The caller fills in the first two. */
struct flow_claim {
	__u64 key;
	__u64 now;          /* what the rank is told */
	__u64 victim_key;   /* of the live entry that went, whatever the answer is; 0: none did */
	__u64 victim_value; /* after FLOW_TAKEN, what is kept beside that entry is still there, in its slot */
	union {
		__u32 slot; /* FLOW_TAKEN: the way that is ours; FLOW_EXISTS: the entry that there is */
		__u32 room; /* before: ways to spare of the line that was surveyed last */
	};
	__u32 generation;
};

enum flow_answer {
	FLOW_TAKEN = 0,  /* write what is beside, then publish or withdraw: nothing else ends a claim */
	FLOW_EXISTS = 1, /* there is a live entry of this key */
	FLOW_FULL = 2,   /* every way must be kept */
	FLOW_BUSY = 3,   /* another CPU is at it: look up again, or take it as full */
};

#define FLOW_ONCE(word) (*(volatile __u64 *)&(word))

static __always_inline bool flow_is_live(__u64 word)
{
	return (__s64)word < 0;
}

/* The function's 60 bits of a state word. */
static __always_inline __u64 flow_value(__u64 word)
{
	return word >> FLOW_VALUE_SHIFT & FLOW_VALUE_MASK;
}

static __always_inline __u64 flow_live_word(__u64 value, __u64 generation)
{
	return FLOW_LIVE | (value & FLOW_VALUE_MASK) << FLOW_VALUE_SHIFT | (generation & FLOW_GENERATION);
}

/* Whether the state went from what was found to a new value. When not, somebody else changed it: find again. */
static __always_inline bool flow_update(const struct flow_entry *e, __u64 value)
{
	return __sync_val_compare_and_swap(e->state, e->word, flow_live_word(value, e->word)) == e->word;
}

/* A number, 0, that is known only after `word`: what is loaded from an address with it is loaded later. */
static __always_inline __u64 flow_then(__u64 word)
{
	asm volatile("%0 &= 0" : "+r"(word));
	return word;
}

/* 0 when equal, else 1; without a branch, which random flows would mispredict. */
static __always_inline __u64 flow_differs(__u64 a, __u64 b)
{
	__u64 bits = a ^ b;

	bits |= -bits;
	asm volatile("" : "+r"(bits)); /* else clang makes a branch of it */
	return bits >> 63;
}

/* All bits when a is below b, else 0, of two ranks with a way in their lowest two bits; without a branch. */
static __always_inline __u64 flow_is_less(__u64 a, __u64 b)
{
	__s64 difference = (__s64)(a >> 2) - (__s64)(b >> 2);

	asm volatile("" : "+r"(difference));
	return difference >> 63;
}

/* The first way of a line with this key; FLOW_WAYS: none. */
static __always_inline __u64 flow_way(struct flow_line *line, __u64 key)
{
	__u64 none, way;

	none = flow_differs(FLOW_ONCE(line->key[0]), key);
	way = none;
	none &= flow_differs(FLOW_ONCE(line->key[1]), key);
	way += none;
	none &= flow_differs(FLOW_ONCE(line->key[2]), key);
	way += none;
	none &= flow_differs(FLOW_ONCE(line->key[3]), key);
	return way + none;
}

/* The state of a way when it is live and of this key, else 0. */
static __always_inline __u64 flow_read(struct flow_line *line, __u64 way, __u64 key)
{
	__u64 word = FLOW_ONCE(line->state[way & (FLOW_WAYS - 1)]);

	if (!flow_is_live(word) || FLOW_ONCE(line->key[(way + flow_then(word)) & (FLOW_WAYS - 1)]) != key)
		return 0;
	return word;
}

/* Looks at every way that a key may be in: the slot and 1, or 0. */
static __always_inline __u64 flow_find_in_all(void *lines, const struct flow_table *t, __u64 key)
{
	struct flow_line *line;
	__u32 index;

	for (__u32 at = 0; at < 3 * FLOW_WAYS; at++) {
		if (at == 2 * FLOW_WAYS && !*(volatile const __u32 *)&t->stashed)
			break;
		index = flow_line_at(t, key, at / FLOW_WAYS);
		line = bpf_map_lookup_elem(lines, &index);
		if (!line)
			break;
		if (FLOW_ONCE(line->key[at % FLOW_WAYS]) == key && flow_read(line, at % FLOW_WAYS, key))
			return (__u64)index * FLOW_WAYS + at % FLOW_WAYS + 1;
	}
	return 0;
}

/* A way's rank: free above all, claimed below all. */
static __always_inline __u64 flow_rank_of(__u64 word, __u64 now, flow_rank rank)
{
	if (flow_is_live(word))
		return rank(flow_value(word), now);
	return word & ~FLOW_GENERATION ? FLOW_KEEP : ~0ULL;
}

/*
 * The way of the highest rank in the lowest two bits of its rank, the first of equals; counts in the claim those that are
 * room.
 */
static __always_inline __u64 flow_survey(struct flow_line *line, struct flow_claim *c, flow_rank rank)
{
	__u64 best = 0, room = 0, found;

#pragma unroll
	for (__u32 way = 0; way < FLOW_WAYS; way++) {
		found = flow_rank_of(FLOW_ONCE(line->state[way]), c->now, rank);
		room += found >> 63;
		found = (found & ~3ULL) | (FLOW_WAYS - 1 - way);
		/* Without a branch, whose ways the verifier would multiply. */
		best ^= (best ^ found) & flow_is_less(best, found);
	}
	c->room = room;
	return best;
}

/* Takes the way of that rank in a line, unless it has changed meanwhile. */
static __always_inline bool flow_take(struct flow_line *line, __u64 best, struct flow_claim *c, flow_rank rank)
{
	__u64 way = (FLOW_WAYS - 1 - (best & 3)) & (FLOW_WAYS - 1), word;

	word = FLOW_ONCE(line->state[way]);
	if ((flow_rank_of(word, c->now, rank) & ~3ULL) < (best & ~3ULL))
		return false;
	c->generation = word & FLOW_GENERATION;
	if (__sync_val_compare_and_swap(&line->state[way], word, FLOW_CLAIMED | c->generation) != word)
		return false;
	if (flow_is_live(word)) {
		c->victim_key = FLOW_ONCE(line->key[way]);
		c->victim_value = flow_value(word);
	}
	return true;
}

/* Gives a claimed way back. */
static __always_inline void flow_give_back(struct flow_line *line, __u64 way, __u32 generation)
{
	__sync_lock_test_and_set(&line->key[way & (FLOW_WAYS - 1)], FLOW_KEY_GONE);
	__sync_lock_test_and_set(&line->state[way & (FLOW_WAYS - 1)], FLOW_FREE | generation);
}

static __always_inline void flow_mark(struct flow_line *line)
{
	if (!FLOW_ONCE(line->key[FLOW_MARK_WAY]))
		__sync_val_compare_and_swap(&line->key[FLOW_MARK_WAY], 0, FLOW_KEY_GONE);
}

/*
 * Looks for others with the key of a claimed way, whose place in search order is `own`: FLOW_TAKEN when
 * it may go live.
 */
static __always_inline __u32 flow_settle(void *lines, const struct flow_table *t, struct flow_claim *c, __u32 own)
{
	struct flow_line *line;
	__u32 index, slot;
	__u64 word;

	for (__u32 at = 0; at < 3 * FLOW_WAYS; at++) {
		index = flow_line_at(t, c->key, at / FLOW_WAYS);
		line = bpf_map_lookup_elem(lines, &index);
		if (!line)
			break;
		slot = index * FLOW_WAYS + at % FLOW_WAYS;
		if (slot == c->slot || FLOW_ONCE(line->key[at % FLOW_WAYS]) != c->key)
			continue;
		word = FLOW_ONCE(line->state[at % FLOW_WAYS]);
		if ((word & ~FLOW_GENERATION) == FLOW_CLAIMED) {
			if (at < own)
				return FLOW_BUSY;
			word = __sync_val_compare_and_swap(&line->state[at % FLOW_WAYS], word,
							   FLOW_BEATEN | (word & FLOW_GENERATION));
		}
		if (flow_is_live(word) && FLOW_ONCE(line->key[(at + flow_then(word)) % FLOW_WAYS]) == c->key) {
			c->slot = slot;
			return FLOW_EXISTS;
		}
	}
	return FLOW_TAKEN;
}

typedef __u64 (*flow_surveyor)(struct flow_claim *c, __u32 index);
typedef __u32 (*flow_settler)(struct flow_claim *c, __u32 own);

static __always_inline __u32 flow_claim_in(void *lines, struct flow_table *t, struct flow_claim *c, flow_rank rank,
					   flow_surveyor survey, flow_settler settle)
{
	__u64 best[2], room, found;
	struct flow_line *first, *second, *line;
	__u32 index, own, answer, way;

	c->victim_key = 0;
	index = flow_line_at(t, c->key, 1);
	second = bpf_map_lookup_elem(lines, &index);
	index = flow_line_at(t, c->key, 0);
	first = bpf_map_lookup_elem(lines, &index);
	if (!first || !second)
		return FLOW_FULL;
	found = flow_find_in_all(lines, t, c->key);
	if (found) {
		c->slot = found - 1;
		return FLOW_EXISTS;
	}
	best[0] = survey(c, index);
	room = c->room;
	best[1] = survey(c, flow_line_at(t, c->key, 1));
	line = first;
	found = best[0];
	own = 0;
	if (room < 2 && c->room > room) {
		own = FLOW_WAYS;
	} else if (!room) {
		index = flow_line_at(t, c->key, 2);
		line = bpf_map_lookup_elem(lines, &index);
		if (!line)
			return FLOW_FULL;
		own = 2 * FLOW_WAYS;
		found = survey(c, index);
		if (!c->room) {
			/* No room anywhere: what may go at all? */
			line = first;
			found = best[0];
			own = best[1] > best[0] ? FLOW_WAYS : 0;
		}
	}
	if (own == FLOW_WAYS) {
		line = second;
		found = best[1];
		index = flow_line_at(t, c->key, 1);
	} else if (own == 0) {
		index = flow_line_at(t, c->key, 0);
	}
	if (found < FLOW_WAYS)
		return FLOW_FULL;
	if (!flow_take(line, found, c, rank))
		return FLOW_BUSY;
	way = FLOW_WAYS - 1 - (found & 3);
	c->slot = index * FLOW_WAYS + way;
	if (own) {
		flow_mark(first);
		if (own > FLOW_WAYS) {
			flow_mark(second);
			*(volatile __u32 *)&t->stashed = 1;
		}
	}
	/* An exchange is a full barrier, also for what was stored before it. */
	__sync_lock_test_and_set(&line->key[way & (FLOW_WAYS - 1)], c->key);
	answer = settle(c, own + way);
	if (answer != FLOW_TAKEN)
		flow_give_back(line, way, c->generation);
	return answer;
}

/* Ends a claim: the entry goes live, or (false) was beaten by one that is being written or is there. */
static __always_inline bool flow_publish_in(void *lines, const struct flow_claim *c, __u64 value)
{
	__u32 index = c->slot / FLOW_WAYS, way = c->slot % FLOW_WAYS, was = c->generation;
	struct flow_line *line = bpf_map_lookup_elem(lines, &index);

	if (!line)
		return false;
	if (__sync_val_compare_and_swap(&line->state[way & (FLOW_WAYS - 1)], FLOW_CLAIMED | was,
					flow_live_word(value, was + 1)) == (FLOW_CLAIMED | was))
		return true;
	flow_give_back(line, way, was);
	return false;
}

/* Removes an entry, unless its state has changed since it was found. Nobody may need what is kept beside it. */
static __always_inline bool flow_remove_in(void *lines, const struct flow_entry *e)
{
	__u32 index = e->slot / FLOW_WAYS, way = e->slot % FLOW_WAYS, was = e->word & FLOW_GENERATION;
	struct flow_line *line = bpf_map_lookup_elem(lines, &index);

	if (!line || __sync_val_compare_and_swap(&line->state[way], e->word, FLOW_CLAIMED | was) != e->word)
		return false;
	flow_give_back(line, way, was);
	return true;
}

/*
 * Defines a table: the maps NAME_lines and NAME_table (sized and filled by Rust before the program runs), and
 *
 *   const struct flow_table *NAME_open(void)
 *	   for flow_key() and flow_hash(); NULL cannot be
 *   bool NAME_find(const struct flow_table *, __u64 key, struct flow_entry *)
 *   __u32 NAME_claim(struct flow_claim *)
 *	   enum flow_answer; after FLOW_TAKEN, nobody else has the slot until
 *   bool NAME_publish(const struct flow_claim *, __u64 value)	or
 *   void NAME_withdraw(const struct flow_claim *)
 *   bool NAME_remove(const struct flow_entry *)
 *
 * The paths that few packets take are global functions: verified once, and off the way of all others. Weak, as
 * walk_extensions() in parse.h.
 */
#define FLOW_TABLE(name, rank)                                                                                     \
	struct {                                                                                                   \
		__uint(type, BPF_MAP_TYPE_ARRAY);                                                                  \
		__uint(map_flags, 1U << 10 /* BPF_F_MMAPABLE */);                                                  \
		__uint(max_entries, 1);                                                                            \
		__type(key, __u32);                                                                                \
		__type(value, struct flow_line);                                                                   \
	} name##_lines SEC(".maps");                                                                               \
                                                                                                                   \
	struct {                                                                                                   \
		__uint(type, BPF_MAP_TYPE_ARRAY);                                                                  \
		__uint(map_flags, 1U << 10 /* BPF_F_MMAPABLE */);                                                  \
		__uint(max_entries, 1);                                                                            \
		__type(key, __u32);                                                                                \
		__type(value, struct flow_table);                                                                  \
	} name##_table SEC(".maps");                                                                               \
                                                                                                                   \
	__attribute__((unused)) static __always_inline struct flow_table *name##_open(void)                        \
	{                                                                                                          \
		__u32 zero = 0;                                                                                    \
                                                                                                                   \
		return bpf_map_lookup_elem(&name##_table, &zero);                                                  \
	}                                                                                                          \
                                                                                                                   \
	__attribute__((noinline, weak)) __u64 name##_find_in_all(__u64 key)                                        \
	{                                                                                                          \
		struct flow_table *t = name##_open();                                                              \
                                                                                                                   \
		return t ? flow_find_in_all(&name##_lines, t, key) : 0;                                            \
	}                                                                                                          \
                                                                                                                   \
	__attribute__((unused)) static __always_inline bool name##_find(const struct flow_table *t, __u64 key, struct flow_entry *e) \
	{                                                                                                          \
		__u32 index = flow_line_at(t, key, 0);                                                             \
		struct flow_line *line = bpf_map_lookup_elem(&name##_lines, &index);                               \
		__u64 way, slot;                                                                                   \
                                                                                                                   \
		if (!line)                                                                                         \
			return false;                                                                              \
		way = flow_way(line, key);                                                                         \
		e->word = way < FLOW_WAYS ? flow_read(line, way, key) : 0;                                         \
		if (!e->word) {                                                                                    \
			/* Also a key that was found but is not live: it may be so elsewhere. */                   \
			if (way == FLOW_WAYS && !FLOW_ONCE(line->key[FLOW_MARK_WAY]))                              \
				return false;                                                                      \
			slot = name##_find_in_all(key);                                                            \
			if (!slot)                                                                                 \
				return false;                                                                      \
			index = (slot - 1) / FLOW_WAYS;                                                            \
			way = (slot - 1) % FLOW_WAYS;                                                              \
			line = bpf_map_lookup_elem(&name##_lines, &index);                                         \
			if (!line)                                                                                 \
				return false;                                                                      \
			e->word = flow_read(line, way, key);                                                       \
			if (!e->word)                                                                              \
				return false;                                                                      \
		}                                                                                                  \
		e->state = &line->state[way & (FLOW_WAYS - 1)];                                                    \
		e->slot = index * FLOW_WAYS + way;                                                                 \
		return true;                                                                                       \
	}                                                                                                          \
                                                                                                                   \
	__attribute__((noinline, weak)) __u64 name##_survey(struct flow_claim *c, __u32 index)                     \
	{                                                                                                          \
		struct flow_line *line = bpf_map_lookup_elem(&name##_lines, &index);                               \
                                                                                                                   \
		return line && c ? flow_survey(line, c, rank) : 0;                                                 \
	}                                                                                                          \
                                                                                                                   \
	__attribute__((noinline, weak)) __u32 name##_settle(struct flow_claim *c, __u32 own)                       \
	{                                                                                                          \
		struct flow_table *t = name##_open();                                                              \
                                                                                                                   \
		return t && c ? flow_settle(&name##_lines, t, c, own) : FLOW_BUSY;                                 \
	}                                                                                                          \
                                                                                                                   \
	__attribute__((noinline, weak)) __u32 name##_claim(struct flow_claim *c)                                   \
	{                                                                                                          \
		struct flow_table *t = name##_open();                                                              \
                                                                                                                   \
		return t && c ? \
			       flow_claim_in(&name##_lines, t, c, rank, name##_survey, name##_settle) :           \
			       FLOW_FULL;                                                                          \
	}                                                                                                          \
                                                                                                                   \
	__attribute__((unused)) static __always_inline bool name##_publish(const struct flow_claim *c, __u64 value) \
	{                                                                                                          \
		return flow_publish_in(&name##_lines, c, value);                                                   \
	}                                                                                                          \
                                                                                                                   \
	__attribute__((unused)) static __always_inline void name##_withdraw(const struct flow_claim *c)            \
	{                                                                                                          \
		__u32 index = c->slot / FLOW_WAYS;                                                                 \
		struct flow_line *line = bpf_map_lookup_elem(&name##_lines, &index);                               \
                                                                                                                   \
		if (line)                                                                                          \
			flow_give_back(line, c->slot % FLOW_WAYS, c->generation);                                  \
	}                                                                                                          \
                                                                                                                   \
	__attribute__((unused)) static __always_inline bool name##_remove(const struct flow_entry *e)              \
	{                                                                                                          \
		return flow_remove_in(&name##_lines, e);                                                           \
	}

#endif
