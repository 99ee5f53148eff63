/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * attach - what becomes of listeners that other services open and close.
 *
 * Not a policy, but two programs on the cgroups where the listeners of an attached group were
 * made. One says that somebody listens on the group's port: a new member, perhaps. The other runs
 * before a listener begins to close. A listener that closes takes handshakes with it that reach
 * it just then. So its slot is marked, which keeps policies from choosing it, and then the close
 * waits until what was on its way has arrived.
 */
#include "steer.h"

#define LOOKS 64 /* at the clock, each in a row of: */
#define LOOKS_AT_ONCE 24
#define WAIT_NS 50000

static long (*steer_ring_output)(void *, void *, u64, u64) = (void *)BPF_FUNC_ringbuf_output;

/* Whoever reads the ring looks for itself what has changed. */
static __always_inline void ring(u64 cookie)
{
	steer_ring_output(steer_map(STEER_MAP_EVENTS), &cookie, sizeof(cookie), 0);
}

/* No helper waits here. Several looks in a row, or the verifier would follow too many turns. */
static __always_inline void wait(void)
{
	u64 end = bpf_ktime_get_ns() + WAIT_NS;
	u32 i, j;

#pragma clang loop unroll(disable)
	for (i = 0; i < LOOKS; i++) {
		u64 now = 0;

#pragma unroll
		for (j = 0; j < LOOKS_AT_ONCE; j++)
			now = bpf_ktime_get_ns();
		if ((s64)(now - end) > 0)
			break;
	}
}

int steer_closing(struct bpf_sock *sk)
{
	u64 cookie;
	u32 *slot;
	u8 *closing;

	if (sk->state != BPF_TCP_LISTEN)
		return 1;
	cookie = steer_get_cookie(sk);
	slot = bpf_map_lookup_elem_((uintptr_t)steer_map(STEER_MAP_MEMBERS), &cookie);
	if (!slot)
		return 1;
	closing = &steer_get_attachment()->closing[*slot & (STEER_SLOTS - 1)];
	if (*closing) /* seen by a cgroup below */
		return 1;
	*closing = 1;
	wait();
	ring(cookie);
	return 1;
}

int steer_listening(struct bpf_sock_ops *ctx)
{
	if (ctx->op == BPF_SOCK_OPS_TCP_LISTEN_CB &&
	    ctx->local_port == steer_get_attachment()->port)
		ring(0);
	return 1;
}
