/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* New connections: choosing a backend, a place and with it a port, and telling the flow table. */
#ifndef XDPKIT_NAT_OPEN_H
#define XDPKIT_NAT_OPEN_H

#include "connection.h"
#include "nat_job.h"

/* Places that are looked at for one connection. With half of all records in use, all are taken once in 2^32. */
#define NAT_ATTEMPTS 32
/* Backends that `least loaded` looks at. */
#define NAT_LEAST_MAX 256

/* What became of it, packed into the scalar that a global function may return. */
union nat_opened {
	__u64 packed;
	struct {
		__u32 record;
		__u16 reason; /* REASON_NONE: it is there */
		__u16 fresh;  /* and by this packet */
	};
};

static __always_inline void nat_count_own(__u32 what)
{
	struct xdpkit_counters *all = stage_counters();

	if (all)
		all->own[what & (XDPKIT_OWN_COUNTS - 1)].packets++;
}

static __always_inline __u32 nat_slot_backend(const struct service *service, __u32 slot)
{
	__u32 *word = slot_word(service, slot);

	return word ? *(volatile __u32 *)word & SLOT_BACKEND : 0;
}

/* The less loaded of two backends, the first of equals: connections for each unit of weight are compared. */
__attribute__((noinline, weak)) __u32 nat_less_loaded(__u32 best, __u32 candidate)
{
	struct backend *backend[2];
	struct nat_load *load[2];

	backend[0] = bpf_map_lookup_elem(&backends, &best);
	backend[1] = bpf_map_lookup_elem(&backends, &candidate);
	load[0] = bpf_map_lookup_elem(&loads, &best);
	load[1] = bpf_map_lookup_elem(&loads, &candidate);
	if (!backend[0] || !backend[1] || !load[0] || !load[1] || !candidate)
		return best;
	if (!best)
		return candidate;
	return (NAT_ONCE(load[1]->active) + 1) * backend[0]->weight <
			       (NAT_ONCE(load[0]->active) + 1) * backend[1]->weight ?
		       candidate :
		       best;
}

/* The backend in a service's next slot but so many. */
__attribute__((noinline, weak)) __u32 nat_listed(__u32 number, __u32 start, __u32 at)
{
	struct service *service = bpf_map_lookup_elem(&services, &number);

	return service && service->slots ? nat_slot_backend(service, (start + at) % service->slots) : 0;
}

/* Weighted least connections: the slots name the backends in turn, so once round is when the first comes again. */
__attribute__((noinline, weak)) __u32 nat_least_loaded(__u32 number, __u32 start)
{
	__u32 first = nat_listed(number, start, 0), best = first, candidate;

	for (__u32 i = 1; i < NAT_LEAST_MAX; i++) {
		candidate = nat_listed(number, start, i);
		if (candidate == first)
			break;
		best = nat_less_loaded(best, candidate);
	}
	return best;
}

/* The backend of a new connection, 0 for none. */
static __always_inline __u32 nat_schedule(struct service *service, __u32 number, __u64 hash)
{
	__u64 turn;

	if (!service->slots)
		return 0;
	switch (service->scheduler) {
	case NAT_ROUND_ROBIN:
		turn = __sync_fetch_and_add(&service->function[NAT_TURN], 1);
		return nat_slot_backend(service, turn % service->slots);
	case NAT_LEAST_LOADED:
		/* Not always from the first slot: of equals, each has its turn. */
		turn = __sync_fetch_and_add(&service->function[NAT_TURN], 1);
		return nat_least_loaded(number, turn);
	default:
		return nat_slot_backend(service, slot_of(service, hash));
	}
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

/* A function of its own for its stack. */
__attribute__((noinline, weak)) int nat_make_key(struct nat_wish *wish)
{
	const struct flow_table *t = flows_open();

	if (!wish || !t)
		return 0;
	wish->key = nat_key(t, wish->client, wish->client_port, wish->service, wish->flags & NAT_IPV6);
	return 1;
}

/* Where an attempt would put the record, and the port and address that come with it. */
static __always_inline void nat_attempt(const struct nat_settings *s, const struct service *service,
					const struct backend *backend, struct nat_wish *wish, __u32 attempt)
{
	__u64 choice;
	__u32 port;

	if (service->flags & NAT_DESTINATION_ONLY) {
		wish->place = nat_place_kept(wish->kept_key, attempt) & s->records_mask;
		wish->port = wish->client_port;
		wish->address = backend->function[NAT_TUPLE];
		return;
	}
	choice = attempt ? nat_choice(wish->key, attempt) : nat_first_choice(wish->hash, wish->client_port);
	port = nat_port(s, choice);
	wish->port = bpf_htons(port);
	wish->address = nat_address(service, choice);
	wish->place = nat_place(s, backend->function[NAT_START], wish->address, port);
}

/*
 * Whether a client's connection is in the place that it gets when its first was taken. Half of those that are not in the
 * first are there, and the flow table would say so only by way of another cache miss.
 */
static __always_inline bool nat_is_in_second(struct nat_wish *wish)
{
	__u32 number = wish->service, backend_number = wish->backend;
	struct service *service = bpf_map_lookup_elem(&services, &number);
	struct backend *backend = bpf_map_lookup_elem(&backends, &backend_number);
	struct nat_settings *s = nat_settings();
	struct nat_connection *r;

	if (!s || !service || !backend || !backend_number)
		return false;
	nat_attempt(s, service, backend, wish, 1);
	r = nat_record(s, wish->place);
	return r && nat_flags(NAT_ONCE(r->word)) & NAT_LIVE && r->backend == backend_number &&
	       nat_is_of_client(r, wish->client, wish->client_port, wish->service);
}

/* What the flow table says of a client: as nat_look_up(). Most packets need no key, so it is made here. */
__attribute__((noinline, weak)) __u64 nat_look_up_client(struct nat_wish *wish)
{
	const struct flow_table *t = flows_open();
	struct flow_entry entry;

	if (!wish || !t)
		return 0;
	wish->key = nat_key(t, wish->client, wish->client_port, wish->service, wish->flags & NAT_IPV6);
	nat_touch(t, wish->key);
	if (nat_is_in_second(wish))
		return (__u64)wish->place + 1;
	return flows_find(t, wish->key, &entry) ? (flow_value(entry.word) & NAT_VALUE_RECORD) + 1 : 0;
}

enum nat_trial {
	NAT_TAKEN = 0, /* the place is claimed */
	NAT_OCCUPIED = 1,
};

/* Whether a port of a virtual address belongs to a service. */
__attribute__((noinline, weak)) int nat_port_is_served(__u32 address, __u32 protocol, __u32 port)
{
	struct balancer_settings *b = balancer_settings();

	return b && service_find(b, address, protocol, port) != 0;
}

/* Tries one place; with `force`, that of the victim. */
__attribute__((noinline, weak)) int nat_try(struct nat_wish *wish, __u32 attempt, __u32 force)
{
	struct nat_settings *s = nat_settings();
	__u32 number, backend_number, age;
	struct nat_connection *r;
	struct service *service;
	struct backend *backend;
	__u64 word;

	if (!wish || !s)
		return NAT_OCCUPIED;
	number = wish->service;
	backend_number = wish->backend;
	service = bpf_map_lookup_elem(&services, &number);
	backend = bpf_map_lookup_elem(&backends, &backend_number);
	if (!service || !backend)
		return NAT_OCCUPIED;
	nat_attempt(s, service, backend, wish, attempt);
	/*
	 * A port of this address that belongs to a service is not for us: its clients' packets would look the same. Nor is
	 * what stands in its place a victim, or a connection that finds no other one would be refused for good.
	 */
	if (s->ports_shared && !(service->flags & NAT_DESTINATION_ONLY) &&
	    nat_port_is_served(wish->address, service->protocol, wish->port))
		return NAT_OCCUPIED;
	r = nat_record(s, wish->place);
	if (!r)
		return NAT_OCCUPIED;
	word = NAT_ONCE(r->word);
	if (nat_flags(word) & NAT_CLAIMED)
		return NAT_OCCUPIED;
	if (!nat_is_dead(s, word, wish->now)) {
		if (nat_is_kept(nat_flags(word)) || !force) {
			wish->own += r->backend == backend_number;
			age = wish->now - (__u32)word + 1;
			if (!nat_is_kept(nat_flags(word)) && (__s32)age > (__s32)wish->oldest) {
				wish->oldest = age;
				wish->victim = attempt;
			}
			return NAT_OCCUPIED;
		}
	}
	if (!nat_claim(r, word, wish->now))
		return NAT_OCCUPIED;
	nat_let_go(r, wish->place, word);
	return NAT_TAKEN;
}

/* Claims the record that a new connection may have; or a reason why there is none. */
static __always_inline __u32 nat_find_place(struct nat_wish *wish)
{
	wish->oldest = 0;
	wish->victim = NAT_ATTEMPTS;
	wish->own = 0;
	for (__u32 i = 0; i < NAT_ATTEMPTS; i++)
		if (nat_try(wish, i, false) == NAT_TAKEN)
			return REASON_NONE;
	if (wish->victim < NAT_ATTEMPTS && nat_try(wish, wish->victim, true) == NAT_TAKEN) {
		nat_count_own(NAT_EVICTED);
		return REASON_NONE;
	}
	return wish->own >= NAT_ATTEMPTS ? REASON_PORTS_EXHAUSTED : REASON_CONNECTIONS_FULL;
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

static __always_inline void nat_fill(struct nat_connection *r, const struct nat_wish *wish, __u32 identity)
{
	r->client[0] = wish->client[0];
	r->client[1] = wish->client[1];
	r->client_port = wish->client_port;
	r->port = wish->port;
	r->backend = wish->backend;
	r->address = wish->address;
	r->identity = identity;
	r->expected = 0;
	r->hop_stamp = 0;
	r->service = wish->service;
}

/* Puts a connection into its place and into the flow table. */
__attribute__((noinline, weak)) __u64 nat_establish(struct nat_wish *wish, __u32 flags, __u32 identity)
{
	union nat_opened opened = { .packed = 0 };
	__u32 number = wish ? wish->backend : 0, entered;
	struct nat_load *load = bpf_map_lookup_elem(&loads, &number);
	struct nat_connection *r;
	__u64 word, found;

	opened.reason = REASON_CONNECTIONS_FULL;
	if (!wish || !load)
		return opened.packed;
	number = wish->place;
	r = bpf_map_lookup_elem(&connections, &number);
	if (!r)
		return opened.packed;
	nat_fill(r, wish, identity);
	word = nat_word(NAT_ONCE(r->word) >> NAT_GENERATION_SHIFT, flags, wish->now);
	/* First: as soon as it is live, others may end and uncount it. */
	__sync_fetch_and_add(&load->active, 1);
	/* An exchange is a full barrier: who sees the connection live sees what was filled in. */
	__sync_lock_test_and_set(&r->word, word);
	opened.record = number;
	opened.reason = REASON_NONE;

	entered = nat_enter(wish->key, number, wish->now);
	if (entered == NAT_ENTERED && flags & NAT_KEPT_SOURCE) {
		entered = nat_enter(wish->kept_key, number, wish->now);
		/* Both are wanted: where there is room for one only, it is as if there were none. */
		if (entered == NAT_ENTERED && nat_look_up(wish->key) != (__u64)number + 1) {
			entered = nat_enter(wish->key, number, wish->now);
			if (entered != NAT_ENTERED || nat_look_up(wish->kept_key) != (__u64)number + 1)
				entered = NAT_NO_ROOM;
		}
		/* The backend could not tell this connection from one that the client has by another service. */
		if (entered == NAT_EXISTS)
			opened.reason = REASON_PORTS_EXHAUSTED;
	} else if (entered == NAT_EXISTS) {
		/* Another CPU was opening the same one. */
		found = nat_look_up(wish->key);
		opened.record = found ? found - 1 : number;
	}
	if (entered == NAT_NO_ROOM)
		opened.reason = REASON_CONNECTIONS_FULL;
	if (entered != NAT_ENTERED)
		nat_end(number, word, wish->now);
	else
		opened.fresh = true;
	return opened.packed;
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

/* Opens a connection, or finds the one that another CPU opens at the same moment. */
__attribute__((noinline, weak)) __u64 nat_open(struct nat_wish *wish)
{
	union nat_opened opened = { .packed = 0 };
	const struct flow_table *t = flows_open();
	struct service *service;
	struct backend *backend;
	__u32 number, flags;

	opened.reason = REASON_NO_BACKEND;
	if (!wish || !t)
		return opened.packed;
	number = wish->service;
	service = bpf_map_lookup_elem(&services, &number);
	if (!service)
		return opened.packed;
	number = nat_schedule(service, number, wish->hash);
	backend = bpf_map_lookup_elem(&backends, &number);
	if (!number || !backend || (backend->flags & (BACKEND_USED | BACKEND_KILLED)) != BACKEND_USED)
		return opened.packed;
	wish->backend = number;
	/* Not made yet where the end of an earlier connection was found without it. */
	nat_make_key(wish);
	flags = wish->flags | NAT_LIVE | NAT_COUNTED;
	if (service->flags & NAT_DESTINATION_ONLY) {
		/* It would answer itself, not us. */
		if (wish->client[0] == backend->address[0] && wish->client[1] == backend->address[1]) {
			opened.reason = REASON_BACKEND_IS_CLIENT;
			return opened.packed;
		}
		flags |= NAT_KEPT_SOURCE;
		wish->kept = true;
		wish->kept_key = nat_key(t, wish->client, wish->client_port,
					 NAT_KEY_OF_BACKEND | (backend->function[NAT_TUPLE] & NAT_NUMBER_MAX),
					 flags & NAT_IPV6);
	}
	opened.reason = nat_find_place(wish);
	if (opened.reason != REASON_NONE)
		return opened.packed;
	return nat_establish(wish, flags, backend->identity);
}

#endif
