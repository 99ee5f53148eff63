/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * flow - over UDP, a flow stays with the worker that first got it.
 *
 * A flow is what goes from one address and port of a client to one bind. New ones go
 * where the table of `hash` says, so after a reload to the new workers, while those known
 * go on with the old ones until these end: QUIC, WireGuard, SIP, games. What is known is
 * written when a datagram comes in: no process has a part in it. When there is room for no
 * more, those that were idle longest are forgotten.
 *
 * Not for clients whose port changes from one datagram to the next: each is a new flow.
 * Nor for flows that move to another address (QUIC does): then it is a new one. Over TCP
 * it is `hash`.
 */
#include "steer.h"

STEER_TABLE(consistent)
STEER_PARAM(capacity, 65536, 1024, 16777216, "flows that are remembered; 24 bytes each")
STEER_PARAM(idle, 60, 1, 86400, "seconds without a datagram after which a flow is forgotten")
STEER_COUNTER(total, "datagrams")
STEER_COUNTER(known, "of a flow that is known")
STEER_COUNTER(new, "of one that is not")
STEER_COUNTER(expired, "of one that was known, but was idle for too long or has lost its worker")
STEER_COUNTER(refused, "of one that is not, and could not be remembered")

/*
 * The kernel's hash of the four-tuple, which has a secret of this boot in it, says in which set a
 * flow is, and where in it one begins to look; so a set that is not full has its flows in a row
 * from there. The kernel's own hash tables would be functions to call, which alone take longer
 * than all of this.
 *
 * A set has room for twice as many as are to be in it, as by chance some get more than others: of
 * as many flows as there is capacity for, one in a thousand finds its set full.
 */
#define FLOWS_OF_SET_BIT 3
#define WAYS (2 << FLOWS_OF_SET_BIT)

struct set {
	u64 flows[2 << FLOWS_OF_SET_BIT]; /* see flow_of(); 0: none yet */
	u32 seen[2 << FLOWS_OF_SET_BIT]; /* ticks */
};

#define IS_ONE ((u64)1 << 31)
#define EARLIER 16 /* ticks: other CPUs' clocks may be so far ahead */

static __always_inline u32 slot_of(u64 flow)
{
	return flow >> 16 & 0x7fff;
}

static __always_inline bool is_alive(u64 flow, u32 seen, u32 now)
{
	/* Another CPU may have seen it since, then it is less than nothing. */
	s64 age = (s32)(now - seen), idle = (u64)steer_param(idle) * steer_params()->ticks_per_s;

	return age < idle && steer_slot_at(slot_of(flow))->flows == (u16)flow;
}

/*
 * What tells it from others of its set, of hash and port: the chance that of a million flows two
 * are taken for one is about 1 in 200. In the upper half, so that what is above is cut off.
 */
static __always_inline u64 tag_of(u32 hash, u64 port)
{
	return (hash ^ port * 0x9e3779b1 /* 2^32 over the golden ratio (Knuth) */) << 32;
}

/* One number, as CPUs may write at once: its tag, its slot, and as steer_slot.flows was. */
static __always_inline u64 flow_of(u64 tag, u64 slot)
{
	return tag | IS_ONE | slot << 16 | steer_slot_at(slot)->flows;
}

/* The place that was idle longest. Without a branch, as the verifier would follow each both ways. */
static __always_inline u32 oldest(const struct set *set, u32 now)
{
	u64 best = 0, i;

#pragma unroll
	for (i = 0; i < WAYS; i++) {
		u64 other = (u64)(u32)(now + EARLIER - set->seen[i]) << 4 | i;
		s64 less = best - other;
		u64 is_less = less >> 63;

		steer_settle(is_less);
		best -= less & is_less;
	}
	return best;
}

STEER_POLICY(ctx, table)
{
	u32 hash = ctx->hash, now = steer_ticks(), at, seen, i;
	u32 index = (u64)hash * steer_param(capacity) >> (32 + FLOWS_OF_SET_BIT);
	struct steer_own *own = steer_own();
	const u16 *port = ctx->data;
	u64 flow, tag, slot;
	struct set *set;

	if (steer_protocol() != STEER_UDP || !own || port + 1 > (const u16 *)ctx->data_end)
		return steer_spread(table, hash);
	own->counters[STEER_COUNTER_total]++;
	tag = tag_of(hash, *port);
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
	at = oldest(set, now);
fresh:
	own->counters[STEER_COUNTER_new]++;
	/* Or it is counted behind here, at an address that was chosen: see steer_entry(). */
	asm volatile("");
	goto choose;
known:
	seen = set->seen[at & (WAYS - 1)];
	if (is_alive(flow, seen, now)) {
		own->counters[STEER_COUNTER_known]++;
		if (seen != now)
			set->seen[at & (WAYS - 1)] = now;
		return steer_to(slot_of(flow));
	}
	own->counters[STEER_COUNTER_expired]++;
choose:
	slot = steer_slot(ctx, table, steer_spread(table, hash));
	set->seen[at & (WAYS - 1)] = now;
	set->flows[at & (WAYS - 1)] = flow_of(tag, slot);
	return steer_to(slot);
}
