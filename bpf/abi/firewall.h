/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What Firewall shares with Rust. Mirrored by src/abi/firewall.rs. */
#ifndef XDPKIT_ABI_FIREWALL_H
#define XDPKIT_ABI_FIREWALL_H

#include "reason.h"

#pragma clang diagnostic push
#pragma clang diagnostic error "-Wpadded"

/* LPM_TRIE keys: the prefix length in bits, host byte order; then the address, network byte order. */
struct firewall_key4 {
	__u32 prefix_length;
	__be32 address;
};

struct firewall_key6 {
	__u32 prefix_length;
	__u8 address[16];
};

struct firewall_rule {
	__u32 action; /* enum xdp_action: XDP_PASS or XDP_DROP */
	__u32 prefix_length; /* of its key: a look-up does not tell which prefix it found */
};

#define FIREWALL_FOLLOW_DEFAULT 0xff

/* Verdicts where no rule decides: each enum xdp_action, XDP_PASS or XDP_DROP. */
struct firewall_settings {
	__u32 default_action;
	__u32 not_ip;      /* Ethernet frames that are neither ARP nor IP; or FIREWALL_FOLLOW_DEFAULT */
	__u32 unsupported; /* deeper than the parser looks */
	__u32 neighbours;  /* ARP and IPv6 neighbour discovery; XDP_DROP: the rules decide */
};

#pragma clang diagnostic pop

#endif
