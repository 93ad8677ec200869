/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The layout of the compiled longest-prefix-match table. Mirrored by src/lpm/. */
#ifndef XDPKIT_ABI_LPM_TABLE_H
#define XDPKIT_ABI_LPM_TABLE_H

#pragma clang diagnostic push
#pragma clang diagnostic error "-Wpadded"

#define LPM_LINE_WORDS 16

/* A cache line. A node is a run of lines; which of its slots is where, the word that leads to it tells. */
struct lpm_line {
	__u32 word[LPM_LINE_WORDS];
};

/*
 * A word, host byte order: 0 says that no prefix covers this slot; with LPM_NODE, a node that the next byte of
 * the address decides in; else a leaf, whose bits belong to the user of the table.
 */
#define LPM_NODE (1U << 31)
#define LPM_COMPRESSED (1U << 30)
#define LPM_PATH (1U << 29)
#define LPM_LINE_MASK (LPM_PATH - 1)

/* Lines of a root, which the first 16 bits of an address decide in, and of a flat node. */
#define LPM_ROOT_LINES 4096
#define LPM_FLAT_LINES 16

/*
 * With neither mark a node is flat: a word a slot. A compressed node keeps a word for each run of slots with equal
 * words: first four 64-bit bitmaps of the slots where a run starts (slot 0 always does), then in one word four bytes
 * with the bits in the bitmaps before each, then the runs' words.
 */
#define LPM_COUNTS_AT 8
#define LPM_RUNS_AT 9

/*
 * A path stands for nodes of which all slots but one hold the same leaf. It keeps the bytes of the one way on, up to
 * eight from the highest of a 64-bit number down, then their number, the word behind them, and the leaf of all
 * other addresses. Only in tables for IPv6; never across the middle of an address.
 */
#define LPM_PATH_COUNT_AT 2
#define LPM_PATH_NEXT_AT 3
#define LPM_PATH_OTHER_AT 4

#pragma clang diagnostic pop

#endif
