/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Which frames are addressed to this host. XDP runs before the kernel has looked: a switch that does not know where a
 * station is floods its frames to all, and two programs that both forward those feed each other for ever.
 */
#ifndef XDPKIT_OWN_MACS_H
#define XDPKIT_OWN_MACS_H

#include "kernel.h"
#include "../abi/own_macs.h"

/* Of this instance: it has its interface for itself. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct own_macs);
} own_macs SEC(".maps");

/*
 * Those of devices on top of the interface, and configured ones. Global: the verifier goes through the loop once, not once for
 * each state in which it is called. Weak: see parse.h.
 */
__attribute__((noinline, weak)) int is_own_besides(__u64 mac)
{
	__u32 zero = 0, at;
	struct own_macs *own = bpf_map_lookup_elem(&own_macs, &zero);

	if (!own)
		return false;
	for (at = 1; at < OWN_MACS_MAX && at < own->count; at++)
		if (own->mac[at] == mac)
			return true;
	return false;
}

/* Whether a frame is for this host and nobody else: group addresses are not. */
static __always_inline bool is_for_us(const struct ethhdr *eth)
{
	struct own_macs *own;
	__u32 zero = 0;
	__u64 mac = 0;

	own = bpf_map_lookup_elem(&own_macs, &zero);
	if (!own)
		return false;
	__builtin_memcpy(&mac, eth->h_dest, sizeof(eth->h_dest));
	return mac == own->mac[0] || is_own_besides(mac);
}

#endif
