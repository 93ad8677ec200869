/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* New connections: a backend, a place and with it a port, and the entries of the flow table. */
#ifndef XDPKIT_NAT_OPEN_H
#define XDPKIT_NAT_OPEN_H

#include "nat_entry.h"
#include "nat_schedule.h"
#include "martian.h"

/* Places that are looked at for one connection. With half of all records in use, all are taken once in 2^32. */
#define NAT_ATTEMPTS 32

/* What became of it, packed into the scalar that a global function may return. */
union nat_opened {
	__u64 packed;
	struct {
		__u32 record;
		__u16 reason; /* REASON_NONE: it is there */
		__u16 fresh;  /* and by this packet */
	};
};

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
	r->choice[NAT_TO_CLIENT] = 0;
	r->choice[NAT_TO_BACKEND] = 0;
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

/* Whether who wants a connection is not one host. A function of its own for its stack. */
__attribute__((noinline, weak)) int nat_is_martian(struct nat_wish *wish)
{
	struct balancer_settings *b = balancer_settings();

	if (!b || !wish)
		return true;
	return wish->flags & NAT_IPV6 ? is_martian6(b, (const struct in6_addr *)wish->client) :
					is_martian4(b, wish->client[0]);
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
