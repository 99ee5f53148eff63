/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * flow - over UDP, a flow stays with the worker that first got it.
 *
 * A flow is what goes from one address and port of a client to one bind. New ones go
 * where the table of `hash` says, so after a reload to the new workers, while those known
 * go on with the old ones until these end: QUIC, WireGuard, SIP, games. What is known is
 * written when a datagram comes in: no process has a part in it. When there is room for no
 * more, those that were idle longest are forgotten; what cannot be remembered goes where
 * the table says all the same.
 *
 * Not for clients whose port changes from one datagram to the next: each is a new flow.
 * Nor for flows that move to another address (QUIC does): then it is a new one. Over TCP
 * it is `hash`.
 */
#include "steer.h"

STEER_TABLE(consistent)
STEER_PARAM(capacity, 65536, 1024, 16777216, "flows that are remembered; 80 bytes each")
STEER_PARAM(idle, 60, 1, 86400, "seconds without a datagram after which a flow is forgotten")
STEER_COUNTER(total, "datagrams")
STEER_COUNTER(known, "of a flow that is known")
STEER_COUNTER(new, "of one that is not")
STEER_COUNTER(expired, "of one that was known, but was idle for too long or has lost its worker")
STEER_COUNTER(refused, "of one that is not, and could not be remembered")

/*
 * The kernel's hash of the four-tuple, which has a secret of this boot in it, and the
 * client's port: the chance that of a million flows two are taken for one is about 1 in 200.
 */
struct key {
	u32 hash;
	u16 port;
	u16 reserved;
};

struct flow {
	u16 slot;
	u16 stamp; /* as steer_slot.flows was */
	u32 seen; /* ticks */
};

static __always_inline bool is_alive(const struct flow *flow, u32 now)
{
	/* Another CPU may have seen it since, then it is less than nothing. */
	s64 age = (s32)(now - flow->seen),
	    idle = (u64)steer_param(idle) * steer_params()->ticks_per_s;

	return age < idle && steer_slot_at(flow->slot)->flows == flow->stamp;
}

STEER_POLICY(ctx, table)
{
	u32 hash = ctx->hash, now = steer_ticks();
	struct flow *flow, fresh = {.seen = now};
	struct steer_own *own = steer_own();
	const u16 *port = ctx->data;
	struct key key = {.hash = hash};

	if (steer_protocol() != STEER_UDP || !own || port + 1 > (const u16 *)ctx->data_end)
		return steer_spread(table, hash);
	own->counters[STEER_COUNTER_total]++;
	key.port = *port;
	flow = bpf_map_lookup_elem_((uintptr_t)steer_map(STEER_MAP_FLOWS), &key);
	if (flow && is_alive(flow, now)) {
		own->counters[STEER_COUNTER_known]++;
		if (flow->seen != now)
			flow->seen = now;
		return steer_to(flow->slot);
	}
	fresh.slot = steer_slot(ctx, table, steer_spread(table, hash));
	fresh.stamp = steer_slot_at(fresh.slot)->flows;
	if (flow) {
		own->counters[STEER_COUNTER_expired]++;
		*flow = fresh;
	} else if (bpf_map_update_elem_((uintptr_t)steer_map(STEER_MAP_FLOWS), &key, &fresh,
					BPF_ANY)) {
		own->counters[STEER_COUNTER_refused]++;
	} else {
		own->counters[STEER_COUNTER_new]++;
	}
	return steer_to(fresh.slot);
}
