/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * open - how many connections each worker has open, with no help from the worker.
 *
 * Not a policy, but a sock_ops program on the cgroup of the service. A listener has its
 * worker's slot in its socket storage, and the connections that come from it inherit it.
 * One is counted when its handshake ends, and taken off when the worker closes it or it
 * is reset: what the worker has closed, and only waits for the client, is no load.
 */
#include "steer.h"

#define LONGEST (1 << 20) /* about a second: longer counts as this */

/* In about microseconds, and never 0; it runs over in an hour or so. */
static __always_inline u32 now(void)
{
	return bpf_ktime_get_ns() >> 10 | 1;
}

/* What the last hundred or so took. Not atomic: of two at once one may be forgotten. */
static __always_inline void learn(u64 spent)
{
	struct steer_pace *pace = steer_pace();
	u64 mean, square;

	if (spent > LONGEST)
		spent = LONGEST;
	mean = pace->mean - (pace->mean >> 7) + spent;
	square = pace->square - (pace->square >> 7) + spent * spent;
	pace->mean = mean;
	pace->square = square;
	/* The variance is more than the square of the mean: more than if they ended by chance. */
	pace->varied = square << 7 > 2 * mean * mean;
}

static __always_inline void opened(struct bpf_sock_ops *ctx, struct steer_owner *owner)
{
	struct steer_slot *at = steer_slot_at(owner->slot);
	u32 pending = at->pending;

	if (owner->since || at->stamp != owner->stamp)
		return;
	owner->since = now();
	if (pending & 0xffff)
		at->pending = pending - 1;
	steer_opened(owner->slot, 1, pending & 0xffff ? 0 : 1);
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
}

static __always_inline void closed(struct bpf_sock_ops *ctx, struct steer_owner *owner)
{
	u64 cookie = steer_cookie(ctx);
	struct steer_owner *moved;

	if (!owner->since)
		return;
	learn(now() - owner->since);
	owner->since = 0;
	moved = bpf_map_lookup_elem_((uintptr_t)steer_map(STEER_MAP_MOVED), &cookie);
	steer_counted(moved ? moved : owner, -1);
	if (moved)
		bpf_map_delete_elem_((uintptr_t)steer_map(STEER_MAP_MOVED), &cookie);
}

int steer_count(struct bpf_sock_ops *ctx)
{
	u32 what = ctx->op, state = ctx->args[1];
	struct steer_owner *owner;
	struct bpf_sock *sk;

	if (what != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB &&
	    (what != BPF_SOCK_OPS_STATE_CB || steer_is_open(state)))
		return 1;
	sk = ctx->sk;
	if (!sk)
		return 1;
	owner = bpf_sk_storage_get(steer_map(STEER_MAP_OWNERS), sk, NULL, 0);
	if (!owner)
		return 1;
	if (what == BPF_SOCK_OPS_STATE_CB)
		closed(ctx, owner);
	else
		opened(ctx, owner);
	return 1;
}
