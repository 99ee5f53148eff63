/*
 * @NAME@ - by the hash of the flow, but some connections to a random worker.
 *
 * steer shows the text after the name in the line above. Say here for which services the policy
 * is good, and for which it is not.
 */
#include "steer.h"

/*
 * How the controller fills the table with the workers that may be selected:
 *
 *	consistent	for hashes; if a worker leaves, only its share moves
 *	shares		as many entries for each worker as its weight
 *	turns		entry 0 is all workers, which take turns
 *	cpus		entry N is the worker pinned to CPU N, or to the nearest CPU with a worker
 *	ring		the workers in turn, with their weights; see bpf/least-conn.c
 */
STEER_TABLE(consistent)

/* At most 16 parameters, which can be changed at run time: name, default, least, most, help. */
STEER_PARAM(percent, 10, 0, 100, "percentage of connections that go to a random worker")

/* At most 16 counters and 4 histograms; `steer status` shows them. */
STEER_COUNTER(scattered, "connections that went to a random worker")
STEER_HISTOGRAM(length, "bytes", "length of the first packet")

/*
 * Runs for each new connection, and over UDP for each datagram. Return one of
 *
 *	steer_spread(table, number)	an entry of the table, for any 32-bit number
 *	a number			the entry with this index
 *	steer_to(slot)			this slot, whatever the table contains
 *
 * ctx is the kernel's struct sk_reuseport_md, with hash, len, ip_protocol, data and more. steer.h
 * has steer_random() and other functions. If the selected worker is gone, or the number is out of
 * range, another worker gets the connection and the fallback counter goes up.
 */
STEER_POLICY(ctx, table)
{
	steer_record(length, ctx->len);
	if (steer_random() % 100 < steer_param(percent)) {
		steer_add(scattered, 1);
		return steer_spread(table, steer_random());
	}
	return steer_spread(table, ctx->hash);
}
