/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * hash - by the kernel's hash of the four-tuple.
 *
 * The hash is the kernel's own. The table makes it consistent: if a worker leaves, only its share
 * of the flows moves to other workers. Weights are respected.
 *
 * For services that want all packets of a flow on one worker, which over UDP includes
 * retransmissions.
 *
 * Not for unequal loads: the hash ignores load, so a connection may wait for a busy worker while
 * others are idle.
 */
#include "steer.h"

STEER_POLICY(ctx, table)
{
	return steer_spread(table, ctx->hash);
}
