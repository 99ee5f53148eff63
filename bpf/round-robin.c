/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * round-robin - the workers in turn.
 *
 * The table has one row, at position 0: the slots in the order of their turns, each as often as
 * its weight says. Each CPU walks through the row by itself, so the counts are exact to within
 * the number of CPUs.
 *
 * For connections that cost about the same.
 *
 * Not for UDP flows: each datagram goes to the next worker.
 */
#include "steer.h"

STEER_TABLE(turns)

STEER_POLICY(ctx, table)
{
	return 0;
}
