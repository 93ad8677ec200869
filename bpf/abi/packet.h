/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What the parser says of a packet, in terms that events carry to Rust. Mirrored by src/abi/packet.rs. */
#ifndef XDPKIT_ABI_PACKET_H
#define XDPKIT_ABI_PACKET_H

#pragma clang diagnostic push
#pragma clang diagnostic error "-Wpadded"

enum packet_network {
	NETWORK_OTHER = 0, /* neither ARP nor IP: LLDP, 802.3, MPLS, ... */
	NETWORK_ARP = 1,
	NETWORK_IPV4 = 2,
	NETWORK_IPV6 = 3,
};

enum packet_fragment {
	FRAGMENT_NONE = 0, /* also an IPv6 "atomic fragment", RFC 6946 */
	FRAGMENT_FIRST = 1,
	FRAGMENT_LATER = 2, /* carries no transport header */
};

#define PACKET_VLANS_MAX 2
#define PACKET_IPV6_EXTENSIONS_MAX 8

#pragma clang diagnostic pop

#endif
