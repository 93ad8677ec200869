/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Connections: where their records are, how both directions find them, what their packets make of their state, and
 * which may go.
 *
 * The place of a record says what the backend sees. Where the source is translated, we are free to choose its port,
 * so the port is chosen such that the place is free: connections[place of (backend, translated address, port)]. An
 * answer of the backend leads there by itself. Two connections that a backend could not tell apart would have the
 * same place, so there cannot be two: nothing else has to see to unique ports. Where the client's address is kept,
 * the place follows from client and backend, with a few others to choose from, and an entry in the flow table leads
 * there too.
 *
 * From the client's side, the flow table leads to the record. But the slot that chose the backend would mostly choose
 * it again, and the port follows from the flow: so we look first where the record was put if nothing stood in the way.
 * That saves the look into the table, a cache miss, for most packets.
 *
 * A record is taken from free, dead (silent for too long), closed or unconfirmed, in that order; one whose client has
 * confirmed the backend's answer is never taken while it lives. What leads to a record is compared with it each time,
 * so an entry of the flow table that leads to another connection's record is no entry.
 */
#ifndef XDPKIT_CONNECTION_H
#define XDPKIT_CONNECTION_H

#include "service.h"
#include "flow_table.h"
#include "../layout/nat_places.h"

SHARED_ARRAY(connections, struct nat_connection);
SHARED_ARRAY(nat, struct nat_settings);
SHARED_ARRAY(loads, struct nat_load);

static __always_inline struct nat_settings *nat_settings(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&nat, &zero);
}

/* What is confirmed is for its record to judge; of the others, the oldest goes first when there is no room. */
static __always_inline __u64 nat_rank(__u64 value, __u64 now)
{
	__u64 age = (now - (value >> NAT_VALUE_STAMP_SHIFT)) & NAT_VALUE_STAMP_MASK;

	if (value & NAT_VALUE_CONFIRMED)
		return FLOW_KEEP;
	/* Another CPU's clock may be a tick ahead of ours, and what it has just entered must not look like the oldest of all. */
	return (((age + 1) & NAT_VALUE_STAMP_MASK) + 1) << 2;
}

FLOW_TABLE(flows, nat_rank)

static __always_inline __u64 nat_value(__u32 record, __u32 now)
{
	return (__u64)(now / NAT_STAMP_UNIT & NAT_VALUE_STAMP_MASK) << NAT_VALUE_STAMP_SHIFT | record;
}

/* ---- words -------------------------------------------------------------------------------------------- */

#define NAT_ONCE(word) (*(volatile __u64 *)&(word))

static __always_inline __u32 nat_flags(__u64 word)
{
	return word >> NAT_FLAGS_SHIFT & NAT_FLAGS_MASK;
}

static __always_inline __u64 nat_word(__u64 generation, __u32 flags, __u32 stamp)
{
	return generation << NAT_GENERATION_SHIFT | (__u64)flags << NAT_FLAGS_SHIFT | stamp;
}

static __always_inline __u32 nat_state(__u32 flags)
{
	if (!(flags & NAT_TCP))
		return flags & NAT_ANSWERED ? NAT_UDP_ANSWERED : NAT_UDP_NEW;
	if (flags & (NAT_RST_CLIENT | NAT_RST_BACKEND))
		return NAT_TCP_RESET;
	if ((flags & NAT_FIN_CLIENT) && (flags & NAT_FIN_BACKEND))
		return NAT_TCP_TIME_WAIT;
	if (flags & (NAT_FIN_CLIENT | NAT_FIN_BACKEND))
		return NAT_TCP_CLOSING;
	if (flags & NAT_CONFIRMED)
		return NAT_TCP_ESTABLISHED;
	return flags & NAT_ANSWERED ? NAT_TCP_ANSWERED : NAT_TCP_SYN;
}

/* Silent for longer than its state allows, or none at all. Another CPU's stamp may be a tick ahead of our clock. */
static __always_inline bool nat_is_dead(const struct nat_settings *s, __u64 word, __u32 now)
{
	__u32 flags = nat_flags(word);

	return !(flags & NAT_LIVE) ||
	       (__s32)(now - (__u32)word) > (__s32)s->timeout[nat_state(flags) & (NAT_STATES - 1)];
}

/* The backend has ended it: a SYN may begin anew. A client's RST does not count, anybody could have sent it. */
static __always_inline bool nat_is_over(__u32 flags)
{
	return flags & NAT_RST_BACKEND || ((flags & NAT_FIN_CLIENT) && (flags & NAT_FIN_BACKEND));
}

/* May not go for another one while it lives. */
static __always_inline bool nat_is_kept(__u32 flags)
{
	return flags & NAT_CONFIRMED && !nat_is_over(flags);
}

static __always_inline struct nat_connection *nat_record(const struct nat_settings *s, __u32 place)
{
	place &= s->records_mask;
	return bpf_map_lookup_elem(&connections, &place);
}

/* ---- whose record is it ------------------------------------------------------------------------------- */

static __always_inline bool nat_is_of_client(const struct nat_connection *r, const __be64 *client, __be16 port,
					     __u32 service)
{
	return r->client[0] == client[0] && r->client[1] == client[1] && r->client_port == port &&
	       r->service == service;
}

/* The backend of a connection, NULL when its number has another one by now. */
static __always_inline struct backend *nat_backend(const struct nat_connection *r)
{
	__u32 number = r->backend;
	struct backend *backend = bpf_map_lookup_elem(&backends, &number);

	return backend && backend->identity == r->identity && backend->flags & BACKEND_USED ? backend : NULL;
}

/* ---- giving up ---------------------------------------------------------------------------------------- */

static __always_inline void nat_uncount(const struct nat_connection *r, __u32 flags)
{
	__u32 number = r->backend;
	struct nat_load *load;

	if (!(flags & NAT_COUNTED))
		return;
	load = bpf_map_lookup_elem(&loads, &number);
	if (load && NAT_ONCE(load->active))
		__sync_fetch_and_add(&load->active, -1);
}

/* The record that the flow table has for a key, and 1; 0 for none. */
__attribute__((noinline, weak)) __u64 nat_look_up(__u64 key)
{
	const struct flow_table *t = flows_open();
	struct flow_entry entry;

	return t && flows_find(t, key, &entry) ? (flow_value(entry.word) & NAT_VALUE_RECORD) + 1 : 0;
}

/* Takes out of the flow table what leads to this record, unless it leads elsewhere by now. */
__attribute__((noinline, weak)) int nat_forget_key(__u64 key, __u32 record)
{
	const struct flow_table *t = flows_open();
	struct flow_entry entry;

	if (!t || !flows_find(t, key, &entry) || (flow_value(entry.word) & NAT_VALUE_RECORD) != record)
		return 0;
	return flows_remove(&entry);
}

/* Both entries of a record that the caller has claimed. */
__attribute__((noinline, weak)) int nat_forget(__u32 record, __u32 flags)
{
	struct nat_connection *r = bpf_map_lookup_elem(&connections, &record);
	const struct flow_table *t = flows_open();
	bool ipv6 = flags & NAT_IPV6;

	if (!r || !t)
		return 0;
	nat_forget_key(nat_key(t, r->client, r->client_port, r->service, ipv6), record);
	if (flags & NAT_KEPT_SOURCE)
		nat_forget_key(nat_key(t, r->client, r->client_port, NAT_KEY_OF_BACKEND | r->address, ipv6), record);
	return 1;
}

#endif
