/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What TunnelDecap shares with Rust. Mirrored by src/abi/tunnel_decap.rs. */
#ifndef XDPKIT_ABI_TUNNEL_DECAP_H
#define XDPKIT_ABI_TUNNEL_DECAP_H

#pragma clang diagnostic push
#pragma clang diagnostic error "-Wpadded"

/* LPM_TRIE keys: the prefix length in bits, host byte order; then the address, network byte order. */
struct tunnel_key4 {
	__u32 prefix_length;
	__be32 address;
};

struct tunnel_key6 {
	__u32 prefix_length;
	__u8 address[16];
};

/* What a prefix is good for, in bits. Longer prefixes have the bits of those that cover them. */
enum tunnel_role {
	TUNNEL_VIP = 1,         /* destination inside */
	TUNNEL_SOURCE = 2,      /* source outside */
	TUNNEL_DESTINATION = 4, /* destination outside */
};

struct tunnel_settings {
	__u32 any; /* enum tunnel_role: those for which every address is good */
	__u32 reserved;
};

#pragma clang diagnostic pop

#endif
