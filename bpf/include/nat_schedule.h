/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Which backend a new connection goes to. */
#ifndef XDPKIT_NAT_SCHEDULE_H
#define XDPKIT_NAT_SCHEDULE_H

#include "connection.h"

/* Backends that `least loaded` looks at. */
#define NAT_LEAST_MAX 256


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

#endif
