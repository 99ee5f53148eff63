/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * random - by chance, in proportion to the weights.
 *
 * For connections that come in patterns which would line up with turns, and as
 * the yardstick for the others. Spreads less evenly than round-robin, and
 * sends the datagrams of one flow to many workers.
 */
#include "steer.h"

STEER_TABLE(shares)

STEER_POLICY(ctx, table)
{
	return steer_spread(table, steer_random());
}
