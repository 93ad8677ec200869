/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * From a packet to its service, its slot and its backend. A packet for none of our addresses costs one probe of
 * vip_index; one for a service a second one, of service_index. Everything is an array: see the costs in ARCHITECTURE.md.
 */
#ifndef XDPKIT_SERVICE_H
#define XDPKIT_SERVICE_H

#include "kernel.h"
#include "parse.h"
#include "stage.h"
#include "../layout/service_hashes.h"

SHARED_ARRAY(balancer, struct balancer_settings);
SHARED_ARRAY(vip_index, __u64);
SHARED_ARRAY(service_index, __u64);
SHARED_ARRAY(vips, struct vip);
SHARED_ARRAY(services, struct service);
SHARED_ARRAY(slots, struct slot_line);
SHARED_ARRAY(backends, struct backend);
PER_CPU_ARRAY(backend_states, struct backend_state);
PER_CPU_ARRAY(service_states, struct service_state);

static __always_inline struct balancer_settings *balancer_settings(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&balancer, &zero);
}

static __always_inline __u64 index_word(void *index, __u32 at)
{
	__u64 *word = bpf_map_lookup_elem(index, &at);

	return word ? *(volatile __u64 *)word : 0;
}

/* A search that its first probe did not end; the rest of vip_index. Global: few packets need it. Weak: see parse.h. */
__attribute__((noinline, weak)) __u32 vip_probe(__u64 wanted, __u32 at, __u32 mask)
{
	__u64 word;

	for (__u32 i = 1; i < INDEX_PROBES; i++) {
		word = index_word(&vip_index, (at + i) & mask);
		if (!word)
			break;
		if ((word & ~(__u64)INDEX_NUMBER) == wanted)
			return word & INDEX_NUMBER;
	}
	return 0;
}

__attribute__((noinline, weak)) __u32 service_probe(__u64 wanted, __u32 at, __u32 mask)
{
	__u64 word;

	for (__u32 i = 1; i < INDEX_PROBES; i++) {
		word = index_word(&service_index, (at + i) & mask);
		if (!word)
			break;
		if ((word & ~(__u64)INDEX_NUMBER) == wanted)
			return word & INDEX_NUMBER;
	}
	return 0;
}

static __always_inline __u32 vip_find(__u64 wanted, __u32 at, __u32 mask)
{
	__u64 word = index_word(&vip_index, at & mask);

	if (!word)
		return 0;
	if ((word & ~(__u64)INDEX_NUMBER) == wanted)
		return word & INDEX_NUMBER;
	return vip_probe(wanted, at, mask);
}

/* The number of the virtual address, 0 for none. */
static __always_inline __u32 vip_find4(const struct balancer_settings *now, __be32 address)
{
	return vip_find((__u64)address << 32 | INDEX_IPV4, index_hash(address) >> 40, now->vip_mask);
}

/* 32 bits of a hash find it, the whole address decides: user space refuses addresses whose 32 bits are the same. */
static __always_inline __u32 vip_find6(const struct balancer_settings *now, const struct in6_addr *address)
{
	const any_u64 *half = (const any_u64 *)address;
	__u64 hash = index_hash6(address);
	__u32 number = vip_find(hash >> 32 << 32 | INDEX_IPV6, hash, now->vip_mask);
	struct vip *vip;

	if (!number)
		return 0;
	vip = bpf_map_lookup_elem(&vips, &number);
	return vip && vip->address[0] == half[0] && vip->address[1] == half[1] ? number : 0;
}

static __always_inline __u32 service_find_port(const struct balancer_settings *now, __u32 vip, __u8 protocol,
					       __be16 port)
{
	__u64 wanted = (__u64)vip << 48 | (__u64)port << 32 | (__u64)protocol << 24 | INDEX_SERVICE;
	__u32 at = index_hash(wanted) >> 40;
	__u64 word = index_word(&service_index, at & now->service_mask);

	if (!word)
		return 0;
	if ((word & ~(__u64)INDEX_NUMBER) == wanted)
		return word & INDEX_NUMBER;
	return service_probe(wanted, at, now->service_mask);
}

/* The number of the service, 0 for none: one for this port before one for any. Port 0 has none. */
static __always_inline __u32 service_find(const struct balancer_settings *now, __u32 vip, __u8 protocol, __be16 port)
{
	__u32 number;

	if (!port)
		return 0;
	number = service_find_port(now, vip, protocol, port);
	return number ? number : service_find_port(now, vip, protocol, 0);
}

/* NULL for 0 and for what is no service. By a copy of the number: old kernels want keys on the stack. */
static __always_inline struct service *service_record(__u32 number)
{
	return number ? bpf_map_lookup_elem(&services, &number) : NULL;
}

/* Who talks to a service, as it stands in the packets of the client. */
struct flow {
	__be64 client[2]; /* IPv4: the first four bytes, then zeroes */
	__be64 vip[2];
	__be16 client_port;
	__be16 port;
	__u8 protocol;
	__u8 ipv6;
	__u16 reserved;
};

/* The word of a slot, NULL when the service has none. */
static __always_inline __u32 *slot_word(const struct service *service, __u32 slot)
{
	__u32 line = service->first_line + slot / SLOT_LINE_WORDS;
	struct slot_line *found = bpf_map_lookup_elem(&slots, &line);

	return found ? &found->word[slot % SLOT_LINE_WORDS] : NULL;
}

#endif
