/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The compiled longest-prefix-match table: a multibit trie in an array of cache lines, by the first 16 bits of
 * the address and then by each further byte. The words at the bottom are those of the longest prefix, so a
 * look-up goes down and never back. User space writes through a mapping; see src/lpm/.
 */
#ifndef XDPKIT_LPM_TABLE_H
#define XDPKIT_LPM_TABLE_H

#include "../include/kernel.h"
#include "../abi/lpm_table.h"

/* All tables of a function, and the one that is being built. max_entries is set at load time. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, 1U << 10 /* BPF_F_MMAPABLE */);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct lpm_line);
} lpm_lines SEC(".maps");

/* Word `at` of the node that starts at `line`. */
static __always_inline __u32 lpm_word(__u32 line, __u32 at)
{
	struct lpm_line *found;

	line += at / LPM_LINE_WORDS;
	found = bpf_map_lookup_elem(&lpm_lines, &line);
	return found ? found->word[at % LPM_LINE_WORDS] : 0;
}

static __always_inline __u32 lpm_count_bits(__u64 bits)
{
	bits -= bits >> 1 & 0x5555555555555555;
	bits = (bits & 0x3333333333333333) + (bits >> 2 & 0x3333333333333333);
	bits = (bits + (bits >> 4)) & 0x0f0f0f0f0f0f0f0f;
	return bits * 0x0101010101010101 >> 56;
}

/* Where the word of a slot is in a compressed node. */
static __always_inline __u32 lpm_run_at(__u32 line, __u32 slot)
{
	struct lpm_line *head = bpf_map_lookup_elem(&lpm_lines, &line);
	__u64 starts;
	__u32 before;

	if (!head)
		return 0;
	before = head->word[LPM_COUNTS_AT] >> slot / 64 * 8 & 0xff;
	/* Up to this slot's bit, which moves to the top; slot 0 starts a run that is not one further. */
	starts = ((__u64 *)head->word)[slot / 64] << (63 - slot % 64);
	return LPM_RUNS_AT - 1 + before + lpm_count_bits(starts);
}

/* What a node says for a byte of the address. */
static __always_inline __u32 lpm_step(__u32 node, __u32 byte)
{
	__u32 line = node & LPM_LINE_MASK;

	return lpm_word(line, node & LPM_COMPRESSED ? lpm_run_at(line, byte) : byte);
}

/* The leaf for an IPv4 address, 0 for none. `root` is the line where the table starts. */
static __always_inline __u32 lpm_lookup4(__u32 root, __be32 address)
{
	__u32 bits = bpf_ntohl(address);
	__u32 word = lpm_word(root, bits >> 16);

	if (word & LPM_NODE) {
		word = lpm_step(word, bits >> 8 & 0xff);
		if (word & LPM_NODE)
			word = lpm_step(word, bits & 0xff);
	}
	return word;
}

/*
 * From a word further down, by `count` bytes of an address, at most eight, the next one at the top. A global
 * function: the verifier checks its loop once and by itself. Weak: see walk_extensions in parse.h.
 */
__attribute__((noinline, weak)) __u32 lpm_walk(__u32 word, __u64 bytes, __u32 count)
{
	__u32 line, steps;
	struct lpm_line *path;

	for (int i = 0; i < 8 && count && word & LPM_NODE; i++) {
		steps = 1;
		if (word & LPM_PATH) {
			line = word & LPM_LINE_MASK;
			path = bpf_map_lookup_elem(&lpm_lines, &line);
			if (!path)
				return 0;
			steps = path->word[LPM_PATH_COUNT_AT] & 15;
			if ((bytes ^ *(__u64 *)path) >> (64 - 8 * steps & 63))
				return path->word[LPM_PATH_OTHER_AT];
			word = path->word[LPM_PATH_NEXT_AT];
		} else {
			word = lpm_step(word, bytes >> 56);
		}
		bytes <<= 8 * steps & 63;
		count -= steps;
	}
	return word;
}

/* The same for an IPv6 address. Hardly any prefix reaches into its second half. */
static __always_inline __u32 lpm_lookup6(__u32 root, const struct in6_addr *address)
{
	const __be64 *half = (const __be64 *)address;
	__u64 bytes = __builtin_bswap64(half[0]);
	__u32 word = lpm_word(root, bytes >> 48);

	if (word & LPM_NODE)
		word = lpm_walk(word, bytes << 16, 6);
	if (word & LPM_NODE)
		word = lpm_walk(word, __builtin_bswap64(half[1]), 8);
	return word;
}

#endif
