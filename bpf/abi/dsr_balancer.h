/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What DsrBalancer shares with Rust. Mirrored by src/abi/dsr_balancer.rs. */
#ifndef XDPKIT_ABI_DSR_BALANCER_H
#define XDPKIT_ABI_DSR_BALANCER_H

#include "service.h"

#endif
