/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * random - a random worker, in proportion to the weights.
 *
 * For connections that arrive in patterns which would coincide with turns, and as a baseline for
 * comparing other policies.
 *
 * Not for an even spread, which round-robin does better, nor for UDP flows: the datagrams of one
 * flow go to many workers.
 */
#include "steer.h"

STEER_TABLE(shares)

STEER_POLICY(ctx, table)
{
	return steer_spread(table, steer_random());
}
