/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Where the indices of services have an entry, and which slot a flow has. Mirrored by src/balancer/hash.rs. */
#ifndef XDPKIT_SERVICE_HASHES_H
#define XDPKIT_SERVICE_HASHES_H

#include "../include/kernel.h"
#include "../abi/service.h"

/* The finaliser of MurmurHash3: every bit of the input moves every bit of the result. Mirrored by src/balancer/hash.rs. */
static __always_inline __u64 mix64(__u64 x)
{
	x ^= x >> 33;
	x *= 0xff51afd7ed558ccdULL;
	x ^= x >> 33;
	x *= 0xc4ceb9fe1a85ec53ULL;
	return x ^ x >> 33;
}

/* Nobody but the administrator fills the indices, so their hashes need no secret. */
static __always_inline __u64 index_hash(__u64 word)
{
	return (word ^ word >> 32) * 0x9e3779b97f4a7c15ULL;
}

static __always_inline __u64 index_hash6(const struct in6_addr *address)
{
	const any_u64 *half = (const any_u64 *)address;

	return mix64(half[0] ^ 0x2545f4914f6cdd1dULL) ^ mix64(half[1]);
}

/* Decides the slot; the lower half is left for other uses. The same on every box with the same seed. */
static __always_inline __u64 flow_hash4(__u64 seed, __be32 client, __be32 vip, __u32 ports, __u8 protocol)
{
	__u64 a = (__u64)client << 32 | vip, b = (__u64)ports << 8 | protocol;

	return mix64((a ^ seed) * 0x9e3779b97f4a7c15ULL ^ b ^ a >> 32);
}

static __always_inline __u64 flow_hash6(__u64 seed, const any_u64 *client, const any_u64 *vip, __u32 ports,
					__u8 protocol)
{
	__u64 a = mix64(client[0] ^ seed) ^ client[1];
	__u64 b = mix64(vip[0] + vip[1] * 0x9e3779b97f4a7c15ULL) ^ ((__u64)ports << 8 | protocol);

	return mix64(mix64(a) + b);
}

/* Both ports in one word, as the hashes want them; nothing of them where only the source counts. */
static __always_inline __u32 flow_ports(const struct service *service, __be16 client_port, __be16 port)
{
	return service->flags & SERVICE_BY_SOURCE ? 0 : (__u32)port << 16 | client_port;
}

/* A slot's number without a division: the hash as a fraction of the table. */
static __always_inline __u32 slot_of(const struct service *service, __u64 hash)
{
	return (hash >> 32) * service->slots >> 32;
}

#endif
