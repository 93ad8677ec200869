/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The layout of the flow table. Mirrored by src/flow_table/. */
#ifndef XDPKIT_ABI_FLOW_TABLE_H
#define XDPKIT_ABI_FLOW_TABLE_H

#pragma clang diagnostic push
#pragma clang diagnostic error "-Wpadded"

#define FLOW_WAYS 4

/* A cache line, the unit of look-up. Slot s of the table is way s % FLOW_WAYS of line s / FLOW_WAYS. */
struct flow_line {
	__u64 key[FLOW_WAYS];
	__u64 state[FLOW_WAYS];
};

/*
 * A key is at least FLOW_KEY_MIN. 0: never used. 1: the entry that was here is gone. Keys of a line never turn
 * back to 0.
 */
#define FLOW_KEY_GONE 1
#define FLOW_KEY_MIN 2

/* When this way's key is 0, no key whose first line this is was ever put elsewhere. */
#define FLOW_MARK_WAY 2

/*
 * A state word: the lowest bits are a generation, which grows whenever an entry is published in this way, so that
 * an update meant for an earlier entry cannot hit a later one. With FLOW_LIVE, the bits between are the
 * function's; without, one of the values below stands there.
 */
#define FLOW_LIVE (1ULL << 63)
#define FLOW_GENERATION 7ULL
#define FLOW_VALUE_SHIFT 3
#define FLOW_VALUE_BITS 60
#define FLOW_VALUE_MASK ((1ULL << FLOW_VALUE_BITS) - 1)

#define FLOW_FREE (0ULL << FLOW_VALUE_SHIFT)
#define FLOW_CLAIMED (1ULL << FLOW_VALUE_SHIFT) /* owned by who is writing the entry */
#define FLOW_BEATEN (2ULL << FLOW_VALUE_SHIFT)  /* the same, but somebody else's entry of that key came first */

/* Bytes that may be hashed to a key, in 32-bit words. */
#define FLOW_HASH_WORDS 11
#define FLOW_SECRET_WORDS (2 * FLOW_HASH_WORDS + 2)

/* The one entry beside the lines. */
struct flow_table {
	__u32 lines;   /* that keys choose two of */
	__u32 stash;   /* lines behind them, for what finds no room in its two */
	__u32 stashed; /* 1: something was ever put into the stash */
	__u32 reserved;
	__u64 secret[FLOW_SECRET_WORDS]; /* random; words 1 to 3 are odd */
};
_Static_assert(sizeof(struct flow_table) == 208, "src/abi/flow_table.rs asserts the same");

#pragma clang diagnostic pop

#endif
