/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Fragments follow their first one, which alone has ports: where it went is remembered for half a minute. */
#ifndef XDPKIT_FRAGMENT_H
#define XDPKIT_FRAGMENT_H

#include "locate.h"
#include "service.h"
#include "flow_table.h"

/* A value: the backend, the service, and when the first fragment came, in units of 2^24 ns. */
#define FRAGMENT_SERVICE_SHIFT 16
#define FRAGMENT_TIME_SHIFT 32
#define FRAGMENT_TIME_MASK 0xfffffff
#define FRAGMENT_LIFE 1788
/* In the place of a backend, whose numbers are below: the first one was for no service, and went to the host. */
#define FRAGMENT_HOST 0xffff

/* All may go, the oldest first. */
static __always_inline __u64 fragment_rank(__u64 value, __u64 now)
{
	__u64 age = (now - (value >> FRAGMENT_TIME_SHIFT)) & FRAGMENT_TIME_MASK;

	return (age > FRAGMENT_LIFE ? FLOW_STALE : 4) + (age << 3);
}

FLOW_TABLE(fragments, fragment_rank);

/*
 * Whether a later fragment's datagram can be for a service. Behind an IPv6 fragment header, more extension headers may
 * stand.
 */
static __always_inline bool may_be_of_service(const struct packet *p)
{
	return p->protocol == IPPROTO_TCP || p->protocol == IPPROTO_UDP ||
	       (p->network == NETWORK_IPV6 && is_extension(p->protocol));
}

static __always_inline struct frag_hdr *fragment_header(const struct packet *p, struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct frag_hdr *header = data + (p->fragment_at & PACKET_OFFSET_MASK);

	return p->fragment_at && (void *)(header + 1) <= end ? header : NULL;
}

/*
 * What all fragments of one datagram have in common, 0 when it cannot be told. A tag: 1 pair in 2^64 is mistaken. In IPv6,
 * the protocol is not of it: later fragments need not name the same as the first (RFC 8200, 4.5).
 */
static __always_inline __u64 fragment_key(const struct packet *p, struct xdp_md *ctx, const struct flow_table *table)
{
	__u32 words[FLOW_HASH_WORDS] = {};
	struct frag_hdr *header;

	words[9] = (__u32)p->network << 8;
	if (p->network == NETWORK_IPV4) {
		words[9] |= p->protocol;
		words[0] = p->ip4->saddr;
		words[4] = p->ip4->daddr;
		words[8] = p->ip4->id;
	} else {
		header = fragment_header(p, ctx);
		if (!header)
			return 0;
		__builtin_memcpy(words, &p->ip6->saddr, 32);
		words[8] = header->identification;
	}
	return flow_hash(table, words, FLOW_HASH_WORDS);
}

static __always_inline __u64 fragment_time(void)
{
	return bpf_ktime_get_coarse_ns() >> 24 & FRAGMENT_TIME_MASK;
}

/* What was remembered for a later fragment, the service in the upper 16 bits; 0 when its first one has not been seen. */
static __always_inline __u32 fragment_recall(const struct packet *p, struct xdp_md *ctx)
{
	struct flow_table *table = fragments_open();
	struct flow_entry entry;
	__u64 key, value;

	if (!table)
		return 0;
	key = fragment_key(p, ctx, table);
	if (!key || !fragments_find(table, key, &entry))
		return 0;
	value = flow_value(entry.word);
	if (((fragment_time() - (value >> FRAGMENT_TIME_SHIFT)) & FRAGMENT_TIME_MASK) > FRAGMENT_LIFE)
		return 0;
	return value;
}

/* The backend of a later fragment, or FRAGMENT_HOST; 0 for none. */
static __always_inline __u32 fragment_find(const struct packet *p, struct xdp_md *ctx, __u32 *service)
{
	__u32 value = fragment_recall(p, ctx), number = value & 0xffff;
	struct backend *backend;

	*service = value >> FRAGMENT_SERVICE_SHIFT;
	if (number == FRAGMENT_HOST)
		return number;
	backend = bpf_map_lookup_elem(&backends, &number);
	/* Killed meanwhile, or the number is another service's by now. */
	if (!backend || backend->service != *service || (backend->flags & (BACKEND_USED | BACKEND_KILLED)) != BACKEND_USED)
		return 0;
	return number;
}

/* The key of a first fragment, 0 for anything else. Global by itself: its stack is not under that of the claim. */
__attribute__((noinline, weak)) __u64 fragment_key_of_first(struct xdp_md *ctx)
{
	struct flow_table *table = fragments_open();
	struct packet p;

	if (!table || parse_again(ctx, &p) != REASON_NONE || p.network < NETWORK_IPV4 || p.fragment != FRAGMENT_FIRST)
		return 0;
	return fragment_key(&p, ctx, table);
}

/* The packet is a first fragment. Global, and weak: see parse.h. */
__attribute__((noinline, weak)) int fragment_remember(struct xdp_md *ctx, __u32 backend, __u32 service)
{
	struct flow_table *table = fragments_open();
	struct flow_claim claim = {};
	struct flow_entry entry;
	__u64 value;

	claim.key = fragment_key_of_first(ctx);
	if (!table || !claim.key)
		return 0;
	claim.now = fragment_time();
	value = backend | (__u64)service << FRAGMENT_SERVICE_SHIFT | claim.now << FRAGMENT_TIME_SHIFT;
	/* An identification that comes again is another datagram's. */
	if (fragments_find(table, claim.key, &entry))
		flow_update(&entry, value);
	else if (fragments_claim(&claim) == FLOW_TAKEN)
		fragments_publish(&claim, value);
	return 0;
}

#endif
