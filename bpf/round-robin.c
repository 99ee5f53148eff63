/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * round-robin - each worker in its turn.
 *
 * Row 0 holds the slots in the order they are served, as often as they weigh.
 * Every CPU goes through it by itself, from a start of its own, so the counts
 * are exact to within the number of CPUs. For connections that cost about the
 * same. Not for UDP flows: each datagram goes to the next worker.
 */
#include "steer.h"

STEER_TABLE(turns)

STEER_POLICY(ctx, table)
{
	return 0;
}
