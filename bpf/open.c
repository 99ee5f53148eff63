/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * open - counts the open connections of each worker, without help from the worker.
 *
 * This is not a policy but a sock_ops program on the cgroup of the service. A listener has the
 * slot of its worker in its socket storage, and connections inherit it. A connection is counted
 * from the end of its handshake until the worker closes it or it is reset. A connection that the
 * worker has closed and that only waits for the client is no load.
 */
#include "steer.h"

#define MAX_DURATION (1 << 20) /* about a second; longer durations are cut to this */

/* In units of 1024 ns, and never 0. It wraps around after about an hour. */
static __always_inline u32 get_time(void)
{
	return bpf_ktime_get_ns() >> 10 | 1;
}

/*
 * Update the moving averages over about a hundred connections. Not atomic: if two CPUs update
 * them at the same time, one update may be lost.
 */
static __always_inline void update_pace(u64 spent)
{
	struct steer_pace *pace = steer_get_pace();
	u64 mean, square;

	if (spent > MAX_DURATION)
		spent = MAX_DURATION;
	mean = pace->mean - (pace->mean >> 7) + spent;
	square = pace->square - (pace->square >> 7) + spent * spent;
	pace->mean = mean;
	pace->square = square;
	/* Variance > mean squared: durations vary more than in an exponential distribution. */
	pace->varied = square << 7 > 2 * mean * mean;
}

/* Returns whether it was counted now. */
static __always_inline bool count_opened(struct steer_owner *owner)
{
	struct steer_slot *at = steer_get_slot_state(owner->slot);
	u32 pending = at->pending;

	if (owner->since || at->stamp != owner->stamp)
		return false;
	owner->since = get_time();
	if (pending & 0xffff)
		at->pending = pending - 1;
	steer_adjust_open(owner->slot, 1, pending & 0xffff ? 0 : 1);
	return true;
}

/*
 * Some connections have migrated to another worker; this may be one of them.
 *
 * Args: connection: what names it to steer_get_cookie().
 */
static __always_inline void count_closed_moved(void *connection, struct steer_owner *owner)
{
	u64 cookie = steer_get_cookie(connection);
	struct steer_owner *moved =
		bpf_map_lookup_elem_((uintptr_t)steer_map(STEER_MAP_MOVED), &cookie);

	steer_adjust_owner(moved ? moved : owner, -1);
	if (moved && !bpf_map_delete_elem_((uintptr_t)steer_map(STEER_MAP_MOVED), &cookie))
		__sync_fetch_and_add(&steer_get_pace()->moved, -1);
}

static __always_inline void count_closed(void *connection, struct steer_owner *owner)
{
	if (!owner->since)
		return;
	update_pace(get_time() - owner->since);
	owner->since = 0;
	/* The map is rarely in a CPU cache: reading it takes as long as everything else here. */
	if (steer_get_pace()->moved)
		count_closed_moved(connection, owner);
	else
		steer_adjust_owner(owner, -1);
}

/* Whether this change of state closes an open connection. */
static __always_inline bool is_close(u32 before, u32 state)
{
	/* SYN_RECV means TCP Fast Open. */
	return !steer_is_open(state) && (steer_is_open(before) || before == BPF_TCP_SYN_RECV);
}

/* Runs about ten times for each socket of the cgroup, so it first checks the kind of event. */
int steer_count(struct bpf_sock_ops *ctx)
{
	u32 what = ctx->op;
	struct steer_owner *owner;
	struct bpf_sock *sk;

	if (what == BPF_SOCK_OPS_STATE_CB) {
		if (!is_close(ctx->args[0], ctx->args[1]))
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
		count_closed(ctx, owner);
	else if (count_opened(owner))
		bpf_sock_ops_cb_flags_set(ctx,
					  ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	return 1;
}

/* An argument of a tracepoint as the verifier knows it. bcc would read it in another way. */
#define read_argument(ctx, number)                                                               \
	({                                                                                       \
		void *argument;                                                                  \
		asm volatile("%0 = *(u64 *)(%1 + " #number " * 8)" : "=r"(argument) : "r"(ctx)); \
		argument;                                                                        \
	})

/*
 * tp_btf/inet_sock_set_state: the same for `steer attach`. It needs no cgroup, and sees the end of
 * connections that were opened before it was attached.
 */
int steer_trace(void *ctx)
{
	void *sk = read_argument(ctx, 0);
	u32 before = (u64)read_argument(ctx, 1), state = (u64)read_argument(ctx, 2);
	bool opens = before == BPF_TCP_SYN_RECV && state == BPF_TCP_ESTABLISHED;
	struct steer_owner *owner;

	if (!opens && !is_close(before, state))
		return 0;
	owner = bpf_sk_storage_get(steer_map(STEER_MAP_OWNERS), sk, NULL, 0);
	if (!owner)
		return 0;
	if (opens)
		count_opened(owner);
	else
		count_closed(sk, owner);
	return 0;
}
