/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * cpu - the worker pinned to the CPU that receives the packet.
 *
 * The table has a row for each CPU number: the workers pinned to that CPU, or to the nearest CPU
 * that has any. Workers on the same CPU take turns.
 *
 * For hosts whose receive queues are spread over the CPUs: a connection is served on the CPU
 * whose caches already hold its packets.
 *
 * Not for hosts with one receive queue, or for one busy client on the same host: then all
 * connections go to one worker.
 */
#include "steer.h"

STEER_TABLE(cpus)

STEER_POLICY(ctx, table)
{
	return bpf_get_smp_processor_id();
}
