/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What both balancers share with Rust: virtual addresses, services, backends, slots. Mirrored by src/abi/service.rs. */
#ifndef XDPKIT_ABI_SERVICE_H
#define XDPKIT_ABI_SERVICE_H

#include "packet.h"

#pragma clang diagnostic push
#pragma clang diagnostic error "-Wpadded"

/*
 * Both indices are open hash tables of 64-bit words with linear probing, so that one aligned store changes an entry. A
 * word of 0 ends the search; a removed entry leaves INDEX_REMOVED behind. Nothing is ever stored further than
 * INDEX_PROBES from where its hash says.
 *
 * An entry of vip_index: the IPv4 address as it stands in the packet, or 32 bits of the hash of an IPv6 address, in the
 * upper half; the kind; the number of the vip. One of service_index: vip, port as it stands in the packet, protocol,
 * INDEX_SERVICE, number of the service, from the highest bits down.
 */
#define INDEX_PROBES 16
#define INDEX_NUMBER 0xffff
#define INDEX_IPV4 0x10000ULL
#define INDEX_IPV6 0x20000ULL
#define INDEX_SERVICE 0x10000ULL
#define INDEX_REMOVED 0x80000ULL

/* One virtual address, whatever the number of its services. 0 is none. */
struct vip {
	__be64 address[2]; /* IPv4: the first four bytes, then zeroes */
	__u32 family;      /* enum packet_network; 0: unused */
	__u32 echo;        /* the service whose backends are asked for ICMP echo; 0: none */
	__u64 held;        /* 1: stays without services */
};

enum service_flags {
	SERVICE_USED = 1,
	SERVICE_BY_SOURCE = 2, /* the hash leaves the ports out */
	SERVICE_FUNCTION = 0xff00, /* room for each balancer's own flags */
};

/* One service, a cache line. 0 is none. */
struct service {
	__u32 flags;      /* enum service_flags */
	__u32 first_line; /* where its slots start in `slots` */
	__u32 slots;      /* their number, a prime */
	__u32 vip;
	__be16 port; /* 0: any */
	__u8 protocol;
	__u8 reserved;
	__u32 scheduler; /* the function's own */
	__u64 function[5];
};
_Static_assert(sizeof(struct service) == 64, "one cache line");

/* A slot: the backend in its lower half; the upper half is the function's, 0 where it has no use for it. 0 is none. */
#define SLOT_LINE_WORDS 16
#define SLOT_BACKEND 0xffff
#define SLOT_PREVIOUS_SHIFT 16

struct slot_line {
	__u32 word[SLOT_LINE_WORDS];
};

enum backend_flags {
	BACKEND_USED = 1,
	BACKEND_DRAINING = 2, /* gets no new flows */
	BACKEND_REMOVED = 4,  /* draining, and then gone */
	BACKEND_KILLED = 8,   /* gets nothing */
};

/* One backend of one service, a cache line. Removed and added again, it has another number. 0 is none. */
struct backend {
	__be64 address[2]; /* IPv4: the first four bytes, then zeroes */
	__u32 family;      /* enum packet_network */
	__u32 flags;       /* enum backend_flags */
	__u32 service;
	__u32 weight;
	__be16 port; /* 0 where the function leaves ports alone */
	__u16 reserved;
	__u32 identity; /* never used again */
	__u64 function[3];
};
_Static_assert(sizeof(struct backend) == 64, "one cache line");

/* What one CPU counts of a backend. */
struct backend_state {
	__u64 packets;
	__u64 bytes; /* of frames as they came */
	__u64 flows; /* TCP: SYNs */
	__u64 function;
	__u64 reserved[4];
};
_Static_assert(sizeof(struct backend_state) == 64, "one cache line");

/* What one CPU counts of a service. */
struct service_state {
	__u64 packets;
	__u64 bytes;
	__u64 flows;    /* TCP: SYNs */
	__u64 too_big;  /* answered by Packet Too Big or Fragmentation Needed */
	__u64 no_backend;
	__u64 function[3];
};
_Static_assert(sizeof(struct service_state) == 64, "one cache line");

enum balancer_echo {
	ECHO_ANSWER = 0,
	ECHO_BACKEND = 1,
	ECHO_PASS = 2,
};

struct balancer_settings {
	__u64 seed; /* of the hash that chooses slots: the same on all boxes that share flows */
	__u32 vip_mask; /* entries of the indices, less one */
	__u32 service_mask;
	__u32 echo; /* enum balancer_echo */
	__u32 answers_per_second; /* messages of our own, all CPUs together */
	__u64 next_identity;
	__u32 probe_interface; /* health checks come in by it, and nothing else for a virtual address; 0: none */
	__u32 probe_base;      /* a probe's source port, less this, is the number of the backend that it is for */
	__u32 table_size;      /* only for Rust: slots of each service's table */
	__u32 reserved;
	__u64 vip_filter; /* a bit for the last six bits of each of our addresses; some of those that were ours may stay */
};

#pragma clang diagnostic pop

#endif
