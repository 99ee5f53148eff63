/*
 * @NAME@ - by the flow's hash, but some connections by chance.
 *
 * What is behind the name in the line above is what steer shows of it. Say here whom it
 * suits, and where it does not.
 */
#include "steer.h"

/*
 * How the controller lays the active workers out in the table:
 *
 *	consistent	for any number; when a worker goes, only its share moves
 *	shares		each as many entries as it weighs
 *	turns		entry 0 is all of them, taken in turn
 *	cpus		entry N is the worker pinned to CPU N, or the nearest to it
 *	deck		in turn, with their weights beside; see least-conn
 */
STEER_TABLE(consistent)

/* What may be set, also while it runs: name, default, least, most, what it means. 16 at most. */
STEER_PARAM(percent, 10, 0, 100, "how many of 100 connections go by chance")

/* What it counts (16 at most), and what it measures (4); `steer status` shows them. */
STEER_COUNTER(scattered, "connections that went by chance")
STEER_HISTOGRAM(length, "bytes", "of the packet that opened the connection")

/*
 * Asked for every new connection; over UDP for every datagram. The answer is one of
 *
 *	steer_spread(table, number)	an entry of the table, for any 32-bit number
 *	a number			that entry of the table
 *	steer_to(slot)			that slot, whatever the table says
 *
 * where ctx is the kernel's struct sk_reuseport_md (hash, len, ip_protocol, data ...), and
 * steer.h has steer_random() and more. If the worker it falls on is gone, or if the answer
 * makes no sense, another live worker gets the connection, and status counts it as fallback.
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
