// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* DsrBalancer: finds the service that a packet is for. */
#include "include/kernel.h"
#include "include/parse.h"
#include "include/stage.h"
#include "include/service.h"
#include "include/next_hop.h"
#include "include/checksum.h"
#include "abi/dsr_balancer.h"

SEC("xdp.frags")
int dsr_balancer(struct xdp_md *ctx)
{
	struct xdpkit_counters *all = stage_counters();
	struct balancer_settings *now = balancer_settings();
	struct packet p;
	__u32 reason;

	if (!all || !now)
		return XDP_ABORTED;
	reason = parse(ctx, &p);
	if (reason == REASON_NONE && p.network == NETWORK_IPV4 && vip_find4(now, p.ip4->daddr))
		reason = REASON_NONE;
	return stage_end(ctx, all, frame_bytes(ctx, &p), reason, XDP_PASS);
}
