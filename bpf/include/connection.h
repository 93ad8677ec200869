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
#include "../abi/nat_balancer.h"

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

/* Global: see FLOW_TABLE_OF(). */
__attribute__((noinline, weak)) __u64 nat_way_rank(__u64 word, __u64 now)
{
	return flow_rank_of(word, now, nat_rank);
}

FLOW_TABLE_OF(flows, nat_way_rank)

static __always_inline __u64 nat_value(__u32 record, __u32 now)
{
	return (__u64)(now / NAT_STAMP_UNIT & NAT_VALUE_STAMP_MASK) << NAT_VALUE_STAMP_SHIFT | record;
}

/* In keys: services by their number, backends whose clients keep their address by this and backend.function[NAT_TUPLE]. */
#define NAT_KEY_OF_BACKEND (NAT_NUMBER_MAX + 1)

/* The flow table's key for a client and the service or backend that it talks to. Exact for IPv4. */
static __always_inline __u64 nat_key(const struct flow_table *t, const __be64 *client, __be16 port, __u32 whom,
				     bool ipv6)
{
	__u32 words[5];

	if (!ipv6)
		return flow_key(t, (__u64)(__be32)client[0] << 31 | (__u64)port << 15 | whom);
	words[0] = client[0];
	words[1] = client[0] >> 32;
	words[2] = client[1];
	words[3] = client[1] >> 32;
	words[4] = whom << 16 | port;
	return flow_hash(t, words, 5);
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

/* ---- places ------------------------------------------------------------------------------------------- */

/*
 * The ports of one backend are scattered over all records, each backend's in a way of its own: else those of several would
 * pile up in some places and leave others empty. This is that way: where they start, and how far one port is from the
 * next. Of a backend that is known, it is kept in backend.function[NAT_START]; mirrored by src/nat_balancer/table.rs.
 */
static __always_inline __u64 nat_start(const struct nat_settings *s, const __be64 *backend, __be16 port, __u8 protocol)
{
	__u64 rest = (__u64)port << 32 | protocol;

	return mix64((backend[0] ^ s->secret[0]) + (backend[1] ^ s->secret[1]) * 0x9e3779b97f4a7c15ULL +
		     (rest ^ s->secret[2]) * 0xc2b2ae3d27d4eb4fULL);
}

/*
 * Where the record of a connection is that a backend sees as this address, a vip, and port (host order). The factor is
 * odd, so no two ports of one backend and address share a place unless there are fewer records than ports.
 */
static __always_inline __u32 nat_place(const struct nat_settings *s, __u64 start, __u32 address, __u32 port)
{
	__u32 stride = (start >> 32) + address * 0x9e3779b1;

	return ((__u32)start + address * 0x85ebca6b + port * (stride | 1)) & s->records_mask;
}

/* Where a client keeps its address, the other places that a record may have. */
static __always_inline __u32 nat_place_kept(__u64 key, __u32 attempt)
{
	return (key >> 20) + attempt * 0x9e3779b1;
}

/* The translated port, host order, for an attempt. */
static __always_inline __u32 nat_port(const struct nat_settings *s, __u64 choice)
{
	return s->first_port + ((choice & 0xffffffff) * (s->last_port - s->first_port + 1) >> 32);
}

/* The first choice follows from what chose the slot; ports of one client are apart, whatever chose theirs. */
static __always_inline __u64 nat_first_choice(__u64 hash, __be16 client_port)
{
	return (hash + client_port * 0xc2b2ae3d27d4eb4fULL) * 0x9e3779b97f4a7c15ULL >> 7;
}

/* The others are made of the secret key: nobody can have all places of a client taken. */
static __always_inline __u64 nat_choice(__u64 key, __u32 attempt)
{
	return mix64(key + attempt);
}

/* The number of the vip whose address becomes the source. */
static __always_inline __u32 nat_address(const struct service *service, __u64 choice)
{
	__u32 count = (service->flags >> NAT_ADDRESSES_SHIFT & (NAT_ADDRESSES_MAX - 1)) + 1;
	__u32 at = (choice >> 32 & 0xffff) * count >> 16;

	/* The compiler knows the product's bounds and widens the mask; old verifiers do not. */
	asm volatile("" : "+r"(at));
	return ((const __u16 *)service->function)[at & (NAT_ADDRESSES_MAX - 1)];
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
