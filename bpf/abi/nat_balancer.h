/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What NatBalancer shares with Rust. Mirrored by src/abi/nat_balancer.rs. */
#ifndef XDPKIT_ABI_NAT_BALANCER_H
#define XDPKIT_ABI_NAT_BALANCER_H

#include "event.h"
#include "flow_table.h"
#include "next_hop.h"
#include "service.h"

#pragma clang diagnostic push
#pragma clang diagnostic error "-Wpadded"

/* In service.flags. */
enum nat_service_flags {
	NAT_DESTINATION_ONLY = 0x100, /* the client's address is kept */
};

/* In service.flags from here on: addresses less one that connections get as their source. */
#define NAT_ADDRESSES_SHIFT 12
#define NAT_ADDRESSES_MAX 16

/*
 * service.function: the numbers of the vips whose addresses those are, four to a word; then whose turn it is.
 * backend.function: NAT_TUPLE, of backends whose clients keep their address, is a number that all with that address, port
 * and protocol share; NAT_START, of all, says where the records of their connections are.
 */
#define NAT_TURN 4
#define NAT_TUPLE 1
#define NAT_START 2

/* Numbers of services, and of those: they share 15 bits of a key. */
#define NAT_NUMBER_MAX 0x3fff

/* service.scheduler */
enum nat_scheduler {
	NAT_BY_SLOT = 0,      /* the slot that the hash of the flow (or of the source) chooses */
	NAT_ROUND_ROBIN = 1,  /* the next slot */
	NAT_LEAST_LOADED = 2, /* of all backends, which stand in the slots by turns */
};

/*
 * The word of a connection, which decides whose the record is: from the highest bits down a generation, flags and
 * the time of the last packet in jiffies. It is only changed by compare-and-swap.
 */
#define NAT_STAMP_MASK 0xffffffffULL
#define NAT_FLAGS_SHIFT 32
#define NAT_FLAGS_MASK 0xffffULL
#define NAT_GENERATION_SHIFT 48

enum nat_flags {
	NAT_LIVE = 1,
	NAT_CLAIMED = 2,   /* somebody writes the record; neither: it is free */
	NAT_ANSWERED = 4,  /* the backend has answered */
	NAT_CONFIRMED = 8, /* and then the client has: TCP, with an acknowledgement of what the backend sent */
	NAT_FIN_CLIENT = 16,
	NAT_FIN_BACKEND = 32,
	NAT_RST_CLIENT = 64, /* cleared when that side goes on: anybody can forge one */
	NAT_RST_BACKEND = 128,
	NAT_COUNTED = 256, /* in nat_load.active of its backend */
	NAT_TCP = 512,     /* else UDP */
	NAT_IPV6 = 1024,
	NAT_KEPT_SOURCE = 2048, /* of a service that translates the destination only */
	NAT_EARLY = 4096,       /* the backend sent data before it was confirmed (RFC 7413) */
};

/* What a connection's flags come to; each has a time after which silence ends it. */
enum nat_state {
	NAT_UDP_NEW = 0,
	NAT_UDP_ANSWERED = 1,
	NAT_TCP_SYN = 2,
	NAT_TCP_ANSWERED = 3,
	NAT_TCP_ESTABLISHED = 4,
	NAT_TCP_CLOSING = 5, /* one side is done */
	NAT_TCP_TIME_WAIT = 6,
	NAT_TCP_RESET = 7,
};
#define NAT_STATES 8

/*
 * A connection, both directions in one cache line, so that there is never half of it. The client's direction comes
 * here by the flow table; the backend's by the place of the record, see bpf/include/connection.h.
 */
struct nat_connection {
	__u64 word;
	__be64 client[2]; /* IPv4: the first four bytes, then zeroes */
	__be16 client_port;
	__be16 port;     /* that the backend sees as the client's */
	__u16 backend;   /* number; with the identity of who had it */
	__u16 address;   /* number of the vip that the backend sees as the client; NAT_KEPT_SOURCE: NAT_TUPLE */
	__u32 identity;
	__u32 expected; /* TCP, host order: what confirms the backend's answer; from then on, how far the client was of late */
	__u64 choice[2]; /* of the next hop to the client, and of that to the backend: see next_hop.h */
	__u16 service;
	__u16 reserved[3];
};
_Static_assert(sizeof(struct nat_connection) == 64, "one cache line");

/* In nat_connection.choice */
#define NAT_TO_CLIENT 0
#define NAT_TO_BACKEND 1

/* The value of an entry in the flow table: the record, when it was made, and whether it may go for another. */
#define NAT_VALUE_RECORD 0xffffffffULL
#define NAT_VALUE_STAMP_SHIFT 32
#define NAT_VALUE_STAMP_MASK 0x7ffffffULL /* jiffies / NAT_STAMP_UNIT */
#define NAT_VALUE_CONFIRMED (1ULL << 59)
#define NAT_STAMP_UNIT 16

/* What a backend has to bear, a cache line: CPUs write here. */
struct nat_load {
	__u64 active; /* connections that are neither closed nor gone */
	__u64 reserved[7];
};
_Static_assert(sizeof(struct nat_load) == 64, "one cache line");

struct nat_settings {
	__u64 secret[4]; /* of places and ports */
	__u32 records_mask;
	__u32 timeout[NAT_STATES]; /* jiffies, by enum nat_state */
	__u32 first_port; /* of those that backends see, host order, both inclusive */
	__u32 last_port;
	__u32 second;     /* jiffies in one */
	__u32 ports_shared;     /* some service has one of these ports */
	__u32 destination_only; /* some service is so: packets for strangers may be answers */
	__u32 backend_mask; /* entries of backend_index, less one */
	__u32 reset_unknown; /* a TCP segment of no connection is answered by RST */
	__u32 sample; /* every n-th of the events of each CPU; 0: none */
	__u32 reserved;
};

/* Index of the stage's own counts. */
enum nat_count {
	NAT_EVICTED = 0, /* unconfirmed or closed connections that went for new ones */
};

enum nat_event_kind {
	NAT_EVENT_NEW = 0,
	NAT_EVENT_CLOSED = 1,
	NAT_EVENT_REFUSED = 2,
};

struct nat_event {
	__u64 timestamp; /* ns, CLOCK_MONOTONIC */
	__u32 kind;      /* enum nat_event_kind */
	__u32 reason;    /* enum xdpkit_reason, of what was refused */
	__be64 client[2];
	__be16 client_port;
	__be16 port;
	__u16 service;
	__u16 backend;
	__u32 flags; /* enum nat_flags */
	__u32 identity;
};
_Static_assert(sizeof(struct nat_event) == 48 && __builtin_offsetof(struct nat_event, identity) == 44,
	       "src/abi/nat_balancer.rs asserts the same");

#pragma clang diagnostic pop

#endif
