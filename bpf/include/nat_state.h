/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What packets make of a connection's state. Modelled by tests/models/nat_model/. */
#ifndef XDPKIT_NAT_STATE_H
#define XDPKIT_NAT_STATE_H

#include "nat_open.h"
#include "event.h"

/* How far beyond the backend's SYN a client that confirms it may be, when data came with it (RFC 7413). */
#define NAT_EARLY_WINDOW 16384

/*
 * How far a client's RST or FIN may be from where it was of late, to be believed. Anybody can forge one, but not where the
 * client is. Ahead, there is room for what it sends between two samples, at half a gigabit a second.
 */
#define NAT_WINDOW_AHEAD (1U << 24)
#define NAT_WINDOW_BEHIND (1U << 20)

enum nat_verdict {
	NAT_GOES_ON = 0,
	NAT_BEGINS_ANEW = 1, /* a SYN after the end */
	NAT_LOST = 2,        /* the record is another's by now */
};

static __always_inline __u32 nat_udp_flags(__u32 flags, bool from_backend)
{
	if (from_backend)
		return flags | NAT_ANSWERED;
	return flags & NAT_ANSWERED ? flags | NAT_CONFIRMED : flags;
}

/* A backend's answer to a SYN. It has no connection with this client, or it would have sent something else. */
static __always_inline bool nat_is_answer(const struct nat_segment *g)
{
	return (g->tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST)) == (TCP_SYN | TCP_ACK);
}

static __always_inline __u32 nat_tcp_from_backend(__u32 flags, const struct nat_segment *g)
{
	if (g->tcp_flags & TCP_RST)
		return flags | NAT_RST_BACKEND;
	/* It goes on, so the RST was not the end. */
	flags = (flags & ~NAT_RST_BACKEND) | NAT_COUNTED;
	if (nat_is_answer(g)) {
		flags |= NAT_ANSWERED;
		/* Of a client that begins anew where it had not finished: what either has closed was the old one. */
		if (!nat_is_over(flags))
			flags &= ~(NAT_FIN_CLIENT | NAT_FIN_BACKEND);
	}
	if (!(flags & NAT_ANSWERED))
		return flags;
	if (!(flags & NAT_CONFIRMED) && g->length)
		flags |= NAT_EARLY;
	return g->tcp_flags & TCP_FIN ? flags | NAT_FIN_BACKEND : flags;
}

/* Whether a sequence number may be the client's, of whom this one is known. */
static __always_inline bool nat_is_in_window(__u32 sequence, __u32 expected)
{
	return sequence - expected + NAT_WINDOW_BEHIND < NAT_WINDOW_AHEAD + NAT_WINDOW_BEHIND;
}

/*
 * Samples how far the client is. The backend says what it has got, and is believed; who says to be the client only within
 * the window.
 */
static __always_inline void nat_sample(struct nat_connection *r, const struct tcphdr *tcp, bool from_backend)
{
	__u32 sequence = bpf_ntohl(from_backend ? tcp->ack_seq : tcp->seq);

	if (from_backend || nat_is_in_window(sequence, r->expected))
		r->expected = sequence;
}

static __always_inline __u32 nat_tcp_from_client(__u32 flags, const struct nat_segment *g, __u32 expected)
{
	__u32 beyond = g->acknowledged - expected;

	/* It goes on to the backend, which knows better; here it changes nothing. */
	if (flags & NAT_CONFIRMED && g->tcp_flags & (TCP_RST | TCP_FIN) && !nat_is_in_window(g->sequence, expected))
		return flags;
	if (g->tcp_flags & TCP_RST)
		return flags | NAT_RST_CLIENT;
	flags &= ~NAT_RST_CLIENT;
	if (g->tcp_flags & TCP_SYN)
		return flags;
	/* Who has not seen the answer cannot know what it acknowledges. */
	if (flags & NAT_ANSWERED && g->tcp_flags & TCP_ACK &&
	    (!beyond || (flags & NAT_EARLY && beyond < NAT_EARLY_WINDOW)))
		flags |= NAT_CONFIRMED;
	return g->tcp_flags & TCP_FIN && flags & NAT_CONFIRMED ? flags | NAT_FIN_CLIENT : flags;
}

__attribute__((noinline, weak)) int nat_keep_entry(__u64 key)
{
	const struct flow_table *t = flows_open();
	struct flow_entry entry;

	return t && flows_find(t, key, &entry) &&
	       flow_update(&entry, flow_value(entry.word) | NAT_VALUE_CONFIRMED);
}

/* Half of all stamps back: before what is unconfirmed, whatever its age, and behind what is free. */
#define NAT_STAMP_OVER ((NAT_VALUE_STAMP_MASK + 1) / 2)

__attribute__((noinline, weak)) int nat_spare_entry(__u64 key, __u32 record, __u32 now)
{
	const struct flow_table *t = flows_open();
	struct flow_entry entry;

	return t && flows_find(t, key, &entry) && (flow_value(entry.word) & NAT_VALUE_RECORD) == record &&
	       flow_update(&entry, nat_value(record, now - (__u32)NAT_STAMP_OVER * NAT_STAMP_UNIT));
}

/* One that is over may go for a newer one again: without this, those that have closed would fill the flow table. */
__attribute__((noinline, weak)) int nat_spare(__u32 record, __u32 flags, __u32 now)
{
	nat_spare_entry(nat_key_of(record, flags, false), record, now);
	if (flags & NAT_KEPT_SOURCE)
		nat_spare_entry(nat_key_of(record, flags, true), record, now);
	return 1;
}

/* A confirmed connection may not go for a newer one: tells the flow table. */
__attribute__((noinline, weak)) int nat_confirm(__u32 record, __u32 flags, __u32 now)
{
	__u64 key = nat_key_of(record, flags, false);

	/* It may just have gone: then it comes back. */
	if (!nat_keep_entry(key) && nat_enter(key, record, now) == NAT_ENTERED)
		nat_keep_entry(key);
	if (flags & NAT_KEPT_SOURCE) {
		key = nat_key_of(record, flags, true);
		if (!nat_keep_entry(key) && nat_enter(key, record, now) == NAT_ENTERED)
			nat_keep_entry(key);
	}
	return 1;
}

__attribute__((noinline, weak)) int nat_report(__u32 record, __u32 kind, __u32 flags)
{
	struct nat_connection *r = bpf_map_lookup_elem(&connections, &record);
	struct nat_settings *s = nat_settings();
	struct events_state *state;
	struct nat_event *e;

	if (!r || !s || !s->sample)
		return 0;
	state = sampled(s->sample);
	if (!state)
		return 0;
	e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e) {
		state->lost++;
		return 0;
	}
	e->timestamp = bpf_ktime_get_ns();
	e->kind = kind;
	e->reason = REASON_NONE;
	e->client[0] = r->client[0];
	e->client[1] = r->client[1];
	e->client_port = r->client_port;
	e->port = r->port;
	e->service = r->service;
	e->backend = r->backend;
	e->flags = flags;
	e->identity = r->identity;
	bpf_ringbuf_submit(e, 0);
	return 1;
}

/* A connection is over, or after all not. */
__attribute__((noinline, weak)) int nat_recount(__u32 record, __u32 was, __u32 flags)
{
	struct nat_connection *r = bpf_map_lookup_elem(&connections, &record);
	struct nat_load *load;
	__u32 number;

	if (!r)
		return 0;
	if (was & NAT_COUNTED) {
		nat_uncount(r, was);
		return nat_report(record, NAT_EVENT_CLOSED, flags);
	}
	number = r->backend;
	load = bpf_map_lookup_elem(&loads, &number);
	if (load)
		__sync_fetch_and_add(&load->active, 1);
	return 0;
}

/* Brings a connection forward by one packet. Only packets that may change more than the time get here. */
__attribute__((noinline, weak)) int nat_step(struct nat_segment *g)
{
	struct nat_connection *r;
	struct nat_settings *s = nat_settings();
	__u32 record, flags, was;
	__u64 word;

	if (!g || !s)
		return NAT_LOST;
	record = g->record;
	r = bpf_map_lookup_elem(&connections, &record);
	if (!r)
		return NAT_LOST;
	word = NAT_ONCE(r->word);
	g->word = word;
	if (nat_is_dead(s, word, g->now))
		return NAT_LOST;
	for (int i = 0; i < 4; i++) {
		was = nat_flags(word);
		/* Another connection by now. */
		if (!(was & NAT_LIVE) || (word ^ g->word) >> NAT_GENERATION_SHIFT)
			return NAT_LOST;
		if (!(was & NAT_TCP)) {
			flags = nat_udp_flags(was, g->from_backend);
		} else if (g->from_backend) {
			flags = nat_tcp_from_backend(was, g);
			/* The last one counts: SYN cookies, or a backend that has forgotten the first, begin elsewhere. */
			if (nat_is_answer(g))
				r->expected = was & NAT_CONFIRMED ? g->acknowledged : g->sequence + 1;
		} else {
			if ((g->tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST)) == TCP_SYN && nat_is_over(was))
				return NAT_BEGINS_ANEW;
			flags = nat_tcp_from_client(was, g, r->expected);
		}
		if (nat_is_over(flags))
			flags &= ~NAT_COUNTED;
		if (__sync_val_compare_and_swap(&r->word, word,
						nat_word(word >> NAT_GENERATION_SHIFT, flags, g->now)) == word) {
			if (flags & ~was & NAT_CONFIRMED && flags & NAT_TCP)
				r->expected = g->sequence + g->length;
			/* Confirmed, or after all not over. */
			if (nat_is_kept(flags) && !nat_is_kept(was))
				nat_confirm(record, flags, g->now);
			else if (nat_is_kept(was) && !nat_is_kept(flags))
				nat_spare(record, flags, g->now);
			if ((was ^ flags) & NAT_COUNTED)
				nat_recount(record, was, flags);
			return NAT_GOES_ON;
		}
		word = NAT_ONCE(r->word);
	}
	/* Four others were quicker, with packets of the same connection. */
	return NAT_GOES_ON;
}

#endif
