/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * cpu - the worker pinned to the CPU that takes in the packet.
 *
 * A row for every CPU number holds the slots pinned to it, or to the nearest CPU
 * that has one; workers that share a CPU take turns. For hosts whose receive
 * queues spread over the CPUs: the connection is then handled where its packets
 * already are in cache.
 *
 * With one receive queue, or one busy client on the same host, all connections
 * land on one worker.
 */
#include "steer.h"

STEER_TABLE(cpus)

STEER_POLICY(ctx, table)
{
	return bpf_get_smp_processor_id();
}
