/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What PacketMonitor shares with Rust. Mirrored by src/abi/monitor.rs. */
#ifndef XDPKIT_ABI_MONITOR_H
#define XDPKIT_ABI_MONITOR_H

#include "event.h"

#pragma clang diagnostic push
#pragma clang diagnostic error "-Wpadded"

/*
 * Index of the stage's own counts. A well-formed packet counts once for its network and, where there is one,
 * once for its transport.
 */
enum monitor_protocol {
	MONITOR_OTHER = 0,
	MONITOR_ARP = 1,
	MONITOR_IPV4 = 2,
	MONITOR_IPV6 = 3, /* up to here: enum packet_network */
	MONITOR_TCP = 4,
	MONITOR_UDP = 5,
	MONITOR_ICMP = 6,
	MONITOR_ICMPV6 = 7,
	MONITOR_OTHER_TRANSPORT = 8,
};
#define MONITOR_PROTOCOLS 16

struct monitor_settings {
	__u32 sample; /* every n-th packet becomes an event; 0: none */
	/* XDP action + 1 by enum monitor_protocol; 0: not set. The transport's goes before the network's. */
	__u8 action[MONITOR_PROTOCOLS];
};

#pragma clang diagnostic pop

#endif
