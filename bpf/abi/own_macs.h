/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The MAC addresses that frames to this host carry where a program runs. Mirrored by src/base/own_macs.rs.
 */
#ifndef XDPKIT_ABI_OWN_MACS_H
#define XDPKIT_ABI_OWN_MACS_H

#pragma clang diagnostic push
#pragma clang diagnostic error "-Wpadded"

#define OWN_MACS_MAX 63

struct own_macs {
	__u64 count;
	__u64 mac[OWN_MACS_MAX]; /* six bytes as in the frame, then zeroes; the interface's own first */
};
_Static_assert(sizeof(struct own_macs) == 512, "src/base/own_macs.rs asserts the same");

#pragma clang diagnostic pop

#endif
