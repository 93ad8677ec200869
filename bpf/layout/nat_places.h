/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The keys of connections, and the places of their records: see connection.h. */
#ifndef XDPKIT_NAT_PLACES_H
#define XDPKIT_NAT_PLACES_H

#include "flow_keys.h"
#include "service_hashes.h"
#include "../abi/nat_balancer.h"

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

#endif
