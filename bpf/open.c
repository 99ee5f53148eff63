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

/* Some connections went to another worker: perhaps this is one. */
static __always_inline void closed_moved(struct bpf_sock_ops *ctx, struct steer_owner *owner)
{
	u64 cookie = steer_cookie(ctx);
	struct steer_owner *moved =
		bpf_map_lookup_elem_((uintptr_t)steer_map(STEER_MAP_MOVED), &cookie);

	steer_counted(moved ? moved : owner, -1);
	if (moved && !bpf_map_delete_elem_((uintptr_t)steer_map(STEER_MAP_MOVED), &cookie))
		__sync_fetch_and_add(&steer_pace()->moved, -1);
}

static __always_inline void closed(struct bpf_sock_ops *ctx, struct steer_owner *owner)
{
	if (!owner->since)
		return;
	learn(now() - owner->since);
	owner->since = 0;
	/* The map is in no cache near by: to look there takes as long as all the rest. */
	if (steer_pace()->moved)
		closed_moved(ctx, owner);
	else
		steer_counted(owner, -1);
}

/* Whether a connection is closed by this. Where it was not open before, that was seen earlier. */
static __always_inline bool closes(u32 before, u32 state)
{
	/* SYN_RECV is one of TCP Fast Open. */
	return !steer_is_open(state) && (steer_is_open(before) || before == BPF_TCP_SYN_RECV);
}

/* It is asked of all sockets of the cgroup, some ten times of each: so first what it is about. */
int steer_count(struct bpf_sock_ops *ctx)
{
	u32 what = ctx->op;
	struct steer_owner *owner;
	struct bpf_sock *sk;

	if (what == BPF_SOCK_OPS_STATE_CB) {
		if (!closes(ctx->args[0], ctx->args[1]))
			return 1;
	} else if (what != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB) {
		return 1;
	}
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
