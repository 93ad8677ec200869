// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Frames that an XDP program has sent back or redirected and that were lost all the same: the kernel finds that out when the
 * program has ended, and tells tracepoints only. Counted by the interface whose program it was, where user space has made an
 * entry for that.
 */
#include "include/kernel.h"
#include <bpf/bpf_core_read.h>

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* What is read of the kernel's own structs: where it is, the loader finds out. */
struct ns_common {
	unsigned int inum;
} __attribute__((preserve_access_index));

struct net {
	struct ns_common ns;
} __attribute__((preserve_access_index));

typedef struct {
	struct net *net;
} __attribute__((preserve_access_index)) possible_net_t;

struct net_device {
	int ifindex;
	possible_net_t nd_net;
} __attribute__((preserve_access_index));

struct bpf_raw_tracepoint_args {
	__u64 args[4];
};

/* By the index of the interface, and above it the inode of its network namespace. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, __u64);
} lost SEC(".maps");

static __always_inline void count_lost(__u64 device, __u64 frames)
{
	struct net_device *dev = (struct net_device *)device;
	__u64 key, *total;
	struct net *net;

	if (!frames)
		return;
	net = BPF_CORE_READ(dev, nd_net.net);
	key = (__u64)BPF_CORE_READ(net, ns.inum) << 32 | (__u32)BPF_CORE_READ(dev, ifindex);
	total = bpf_map_lookup_elem(&lost, &key);
	if (total)
		__sync_fetch_and_add(total, frames);
}

/* xdp_redirect_err(dev, ...): no such device, one that takes none, too long a frame. */
SEC("raw_tp")
int redirect_err(struct bpf_raw_tracepoint_args *ctx)
{
	count_lost(ctx->args[0], 1);
	return 0;
}

/* xdp_devmap_xmit(from_dev, to_dev, sent, drops, err): the other device has not taken all. */
SEC("raw_tp")
int devmap_xmit(struct bpf_raw_tracepoint_args *ctx)
{
	int drops = ctx->args[3];

	count_lost(ctx->args[0], drops > 0 ? drops : 0);
	return 0;
}

/* xdp_bulk_tx(dev, sent, drops, err): the same of XDP_TX, with drivers that tell (veth). */
SEC("raw_tp")
int bulk_tx(struct bpf_raw_tracepoint_args *ctx)
{
	int drops = ctx->args[2];

	count_lost(ctx->args[0], drops > 0 ? drops : 0);
	return 0;
}
