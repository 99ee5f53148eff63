/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * flow - over UDP, a flow stays with the worker that first got it.
 *
 * A flow is the datagrams from one address and port of a client to one bind. The first datagram
 * of a flow is hashed as by `hash`, so after a reload it goes to a new worker. Flows that are
 * already known stay with the old workers until these exit. The program records a flow when a
 * datagram arrives, without help from any process. If there is no room, the flows that were idle
 * longest are forgotten.
 *
 * For protocols with long-lived flows: QUIC, WireGuard, SIP, games.
 *
 * Not for clients that change their port with each datagram: each is then a new flow. A flow
 * that moves to another address, as QUIC allows, also becomes a new flow. Over TCP the policy is
 * the same as `hash`.
 */
#include "steer.h"

STEER_TABLE(consistent)
STEER_PARAM(capacity, 65536, 1024, 16777216, "flows to remember; 24 bytes each")
STEER_PARAM(idle, 60, 1, 86400, "seconds without a datagram until a flow is forgotten")
STEER_COUNTER(total, "all datagrams")
STEER_COUNTER(known, "datagrams of known flows")
STEER_COUNTER(new, "datagrams of new flows")
STEER_COUNTER(expired, "datagrams of flows that had been idle for too long or whose worker is gone")
STEER_COUNTER(refused, "datagrams of new flows that could not be remembered")

/*
 * The flows are kept in a set-associative table. The kernel's hash of the four-tuple, which has
 * a secret seed of this boot, selects the set and the way at which the search begins. So the
 * flows of a set that is not full are contiguous from there. The kernel's own hash maps are
 * helper calls that alone take longer than this whole program.
 *
 * Sets differ in how many flows they get. So each has room for twice the average: at full
 * capacity, one flow in a thousand finds its set full.
 */
#define FLOWS_OF_SET_BIT 3
#define WAYS (2 << FLOWS_OF_SET_BIT)

struct flow_set {
	u64 flows[2 << FLOWS_OF_SET_BIT]; /* see make_flow(); 0: free */
	u32 seen[2 << FLOWS_OF_SET_BIT]; /* time of the last datagram, in ticks */
};

#define IN_USE ((u64)1 << 31)
#define CLOCK_SKEW 16 /* ticks that the clock of another CPU may be ahead */

static __always_inline u32 get_slot(u64 flow)
{
	return flow >> 16 & 0x7fff;
}

static __always_inline bool is_alive(u64 flow, u32 seen, u32 now)
{
	/* Negative if another CPU has seen the flow since. */
	s64 age = (s32)(now - seen),
	    idle = (u64)steer_param(idle) * steer_get_params()->ticks_per_s;

	return age < idle && steer_get_slot_state(get_slot(flow))->flows == (u16)flow;
}

/*
 * The tag tells a flow from the others of its set; it is made from hash and port. Among a million
 * flows the probability that two are confused is about 1 in 200. The tag is in the upper 32 bits,
 * so that higher bits of the product are cut off.
 */
static __always_inline u64 make_tag(u32 hash, u64 port)
{
	return (hash ^ port * 0x9e3779b1 /* 2^32 over the golden ratio (Knuth) */) << 32;
}

/* Tag, slot and steer_slot.flows in one number, as several CPUs may write it at the same time. */
static __always_inline u64 make_flow(u64 tag, u64 slot)
{
	return tag | IN_USE | slot << 16 | steer_get_slot_state(slot)->flows;
}

/* The way that was idle longest. No branches, as the verifier would follow each both ways. */
static __always_inline u32 find_oldest(const struct flow_set *set, u32 now)
{
	u64 best = 0, i;

#pragma unroll
	for (i = 0; i < WAYS; i++) {
		u64 other = (u64)(u32)(now + CLOCK_SKEW - set->seen[i]) << 4 | i;
		s64 less = best - other;
		u64 is_less = less >> 63;

		steer_barrier(is_less);
		best -= less & is_less;
	}
	return best;
}

STEER_POLICY(ctx, table)
{
	u32 hash = ctx->hash, now = steer_ticks(), at, seen, i;
	u32 index = (u64)hash * steer_param(capacity) >> (32 + FLOWS_OF_SET_BIT);
	struct steer_own *own = steer_get_own();
	const u16 *port = ctx->data;
	u64 flow, tag, slot;
	struct flow_set *set;

	if (steer_protocol() != STEER_UDP || !own || port + 1 > (const u16 *)ctx->data_end)
		return steer_spread(table, hash);
	own->counters[STEER_COUNTER_total]++;
	tag = make_tag(hash, *port);
	set = bpf_map_lookup_elem_((uintptr_t)steer_map(STEER_MAP_FLOWS), &index);
	if (!set) {
		own->counters[STEER_COUNTER_refused]++;
		return steer_spread(table, hash);
	}
#pragma unroll
	for (i = 0; i < WAYS; i++) {
		at = hash + i;
		flow = set->flows[at & (WAYS - 1)];
		if (!flow)
			goto fresh;
		if (!((flow ^ tag) >> 32))
			goto known;
	}
	at = find_oldest(set, now);
fresh:
	own->counters[STEER_COUNTER_new]++;
	/*
	 * Keeps the compiler from merging the counters of both branches into one access at a
	 * selected address: see steer_read_entry().
	 */
	asm volatile("");
	goto choose;
known:
	seen = set->seen[at & (WAYS - 1)];
	if (is_alive(flow, seen, now)) {
		own->counters[STEER_COUNTER_known]++;
		if (seen != now)
			set->seen[at & (WAYS - 1)] = now;
		return steer_to(get_slot(flow));
	}
	own->counters[STEER_COUNTER_expired]++;
choose:
	slot = steer_get_slot(ctx, table, steer_spread(table, hash));
	set->seen[at & (WAYS - 1)] = now;
	set->flows[at & (WAYS - 1)] = make_flow(tag, slot);
	return steer_to(slot);
}
