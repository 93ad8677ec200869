// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The flow table by itself, and the kernel's LRU_HASH beside it: programs to be timed, one that does what it is asked
 * to and answers, to be compared with a model, and one that keeps two CPUs at the same entries. Driven by
 * lab/src/bench/flow_table.rs.
 */
#include "../../bpf/include/kernel.h"
#include "../../bpf/include/flow_table.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* What the rank says, by the lowest bits of `now`. */
enum {
	RANK_KEEP = 0,   /* nothing goes */
	RANK_LOWEST = 1, /* the lower the value, the sooner it goes, but only in need */
	RANK_STALE = 2,  /* values below now >> 2 are as good as gone; nothing else goes */
};

static __always_inline __u64 rank(__u64 value, __u64 now)
{
	if ((now & 3) == RANK_LOWEST)
		return (FLOW_VALUE_MASK - (value & 0xffffffffff)) << 2;
	if ((now & 3) == RANK_STALE && (value & 0xffffffffff) < now >> 2)
		return FLOW_STALE | (now - value) << 2;
	return FLOW_KEEP;
}

FLOW_TABLE(flows, rank)

struct {
	__uint(type, 9 /* BPF_MAP_TYPE_LRU_HASH */);
	__uint(max_entries, 1);
	__type(key, __u64);
	__type(value, __u64);
} lru SEC(".maps");

#define QUESTIONS 65536

enum {
	ASK_FIND = 0,
	ASK_INSERT = 1, /* value: of the new entry */
	ASK_UPDATE = 2,
	ASK_REMOVE = 3,
	ASK_HASH = 4, /* of number and value, as four words; nothing is looked up */
};

struct question {
	__u64 number; /* what the key is made of */
	__u64 value;  /* in: to be set; out: what was found */
	__u64 now;
	__u64 victim; /* key of the entry that went; 0: none */
	__u64 victim_value;
	__u32 operation;
	__u32 answer; /* find, update, remove: 1 for done; insert: enum flow_answer */
	__u32 slot;
	__u32 reserved;
	__u64 key;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, 1U << 10 /* BPF_F_MMAPABLE */);
	__uint(max_entries, QUESTIONS);
	__type(key, __u32);
	__type(value, struct question);
} questions SEC(".maps");

struct flow_probe {
	__u64 next;   /* question, or new flow */
	__u64 keys;   /* stress: different numbers */
	__u64 now;    /* stress: for the rank */
	__u64 remove; /* stress: one in so many operations; 0: none */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct flow_probe);
} probe SEC(".maps");

/* What one CPU has done. */
struct flow_stress {
	__u64 random;
	__u64 operations;
	__u64 added;   /* to values */
	__u64 removed; /* sum of the values of entries that went or were removed */
	__u64 torn;    /* states that did not belong to the key they were found by */
	__u64 evictions;
	__u64 full;
	__u64 given_up; /* operations that lost every race */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct flow_stress);
} stress_state SEC(".maps");

static __always_inline struct flow_probe *state(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&probe, &zero);
}

static __always_inline __u64 source(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;
	struct iphdr *ip = data + sizeof(struct ethhdr);

	return (void *)(ip + 1) > end ? 0 : ip->saddr;
}

/* Adds one to the value of a key, or inserts it: what the functions do once a packet. */
static __always_inline int table_count(__u64 number)
{
	struct flow_table *t = flows_open();
	struct flow_entry e;
	struct flow_claim c;

	if (!t)
		return XDP_ABORTED;
	c.key = flow_key(t, number);
	if (flows_find(t, c.key, &e)) {
		flow_update(&e, flow_value(e.word) + 1);
		return XDP_PASS;
	}
	c.now = RANK_LOWEST;
	if (flows_claim(&c) == FLOW_TAKEN)
		flows_publish(&c, 1);
	return XDP_PASS;
}

static __always_inline int lru_count(__u64 number)
{
	__u64 *value = bpf_map_lookup_elem(&lru, &number), one = 1, was;

	if (value) {
		was = *(volatile __u64 *)value;
		__sync_val_compare_and_swap(value, was, was + 1);
		return XDP_PASS;
	}
	bpf_map_update_elem(&lru, &number, &one, 1 /* BPF_NOEXIST */);
	return XDP_PASS;
}

SEC("xdp.frags")
int table_known(struct xdp_md *ctx)
{
	return table_count(source(ctx));
}

SEC("xdp.frags")
int lru_known(struct xdp_md *ctx)
{
	return lru_count(source(ctx));
}

/* Every packet is a flow that was never seen. */
SEC("xdp.frags")
int table_new(struct xdp_md *ctx __attribute__((unused)))
{
	struct flow_probe *s = state();

	return s ? table_count(1ULL << 40 | s->next++) : XDP_ABORTED;
}

SEC("xdp.frags")
int lru_new(struct xdp_md *ctx __attribute__((unused)))
{
	struct flow_probe *s = state();

	return s ? lru_count(1ULL << 40 | s->next++) : XDP_ABORTED;
}

SEC("xdp.frags")
int answer(struct xdp_md *ctx __attribute__((unused)))
{
	struct flow_probe *s = state();
	struct flow_table *t = flows_open();
	__u32 at = s ? s->next++ % QUESTIONS : 0;
	struct question *q = bpf_map_lookup_elem(&questions, &at);
	struct flow_entry e;
	struct flow_claim c;

	if (!s || !t || !q)
		return XDP_ABORTED;
	c.key = flow_key(t, q->number);
	q->key = c.key;
	q->victim = 0;
	q->answer = 0;
	if (q->operation == ASK_HASH) {
		q->key = flow_hash(t, (const __u32 *)q, 4);
		return XDP_PASS;
	}
	if (q->operation == ASK_INSERT) {
		c.now = q->now;
		q->answer = flows_claim(&c);
		q->victim = c.victim_key;
		q->victim_value = c.victim_value;
		q->slot = c.slot;
		if (q->answer == FLOW_TAKEN && !flows_publish(&c, q->value))
			q->answer = FLOW_BUSY;
		return XDP_PASS;
	}
	if (!flows_find(t, c.key, &e))
		return XDP_PASS;
	q->slot = e.slot;
	if (q->operation == ASK_UPDATE) {
		q->answer = flow_update(&e, q->value);
	} else if (q->operation == ASK_REMOVE) {
		q->value = flow_value(e.word);
		q->answer = flows_remove(&e);
	} else {
		q->value = flow_value(e.word);
		q->answer = 1;
	}
	return XDP_PASS;
}

/* A value is a count, and above it bits of the key that it belongs to. */
#define COUNT_BITS 40
#define COUNT_MASK ((1ULL << COUNT_BITS) - 1)

static __always_inline bool belongs(__u64 value, __u64 key)
{
	return value >> COUNT_BITS == (key & 0xfffff);
}

/* Global, for Linux 6.1: see ban_try() in bpf/include/bans.h. True when it is done. */
__attribute__((noinline, weak)) bool stress_try(struct flow_claim *c)
{
	struct flow_table *t = flows_open();
	struct flow_probe *s = state();
	struct flow_stress *mine;
	struct flow_entry e;
	__u32 zero = 0, answer;
	__u64 value;

	mine = bpf_map_lookup_elem(&stress_state, &zero);
	if (!c || !t || !s || !mine)
		return true;

	if (flows_find(t, c->key, &e)) {
		value = flow_value(e.word);
		if (!belongs(value, c->key)) {
			mine->torn++;
			return true;
		}
		if (s->remove && mine->random % s->remove == 0) {
			if (!flows_remove(&e))
				return false;
			mine->removed += value & COUNT_MASK;
			return true;
		}
		if (!flow_update(&e, value + 1))
			return false;
		mine->added++;
		return true;
	}
	answer = flows_claim(c);
	if (c->victim_key) {
		mine->evictions++;
		mine->removed += c->victim_value & COUNT_MASK;
		if (!belongs(c->victim_value, c->victim_key))
			mine->torn++;
	}
	if (answer == FLOW_FULL) {
		mine->full++;
		return true;
	}
	if (answer != FLOW_TAKEN || !flows_publish(c, (c->key & 0xfffff) << COUNT_BITS | 1))
		return false;
	mine->added++;
	return true;
}

/* One operation: adds one to a random entry, which is made where it is not there, or removes one. */
SEC("xdp.frags")
int stress(struct xdp_md *ctx __attribute__((unused)))
{
	struct flow_table *t = flows_open();
	struct flow_probe *s = state();
	struct flow_stress *mine;
	struct flow_claim c;
	bool done = false;
	__u32 zero = 0;

	mine = bpf_map_lookup_elem(&stress_state, &zero);
	if (!s || !t || !mine)
		return XDP_ABORTED;
	if (!mine->random)
		mine->random = 0x9e3779b97f4a7c15 * (bpf_get_smp_processor_id() + 1);
	mine->random ^= mine->random << 13;
	mine->random ^= mine->random >> 7;
	mine->random ^= mine->random << 17;
	mine->operations++;
	c.key = flow_key(t, (mine->random >> 20) % s->keys);
	c.now = s->now;
	for (int i = 0; i < 8 && !done; i++)
		done = stress_try(&c);
	if (!done)
		mine->given_up++;
	return XDP_PASS;
}
