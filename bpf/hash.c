/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * hash - by the kernel's hash of the four-tuple.
 *
 * The number is the kernel's own; the table makes it consistent: when a worker
 * goes, only its share of the flows moves, and weights are honoured. For
 * services that want a flow's packets, over UDP also its retries, on one worker.
 *
 * Blind to load: a connection may wait behind a busy worker while others idle.
 */
#include "steer.h"

STEER_POLICY(ctx, table)
{
	return steer_spread(table, ctx->hash);
}
