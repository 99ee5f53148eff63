/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * attach - watches sockets that servers of others open and close.
 *
 * This is not a policy. steer_listening, on the cgroups where the listeners of an attached group
 * were created, reports a socket that listens on the group's port; steer_state, on a tracepoint,
 * does so for all cgroups, if the kernel allows it. steer_bound, on those cgroups, reports a UDP
 * socket that is bound to the port. steer_closing, on those cgroups, runs before a socket closes.
 * Handshakes that reach a listener while it closes are lost, so the program marks the slot of the
 * listener, which policies then do not select, and delays the close until handshakes that are
 * under way have arrived. For UDP it only marks the slot: a datagram that has arrived at a socket
 * that closes is lost, however long the close takes.
 */
#include "steer.h"

#define ROUNDS 64
#define READS 24 /* of the clock, in a round */
#define WAIT_NS 50000

static long (*steer_ring_output)(void *, void *, u64, u64) = (void *)BPF_FUNC_ringbuf_output;

/* Wakes the attacher, which then looks for listeners itself. */
static __always_inline void wake(u64 cookie)
{
	steer_ring_output(steer_map(STEER_MAP_EVENTS), &cookie, sizeof(cookie), 0);
}

/*
 * Waits for WAIT_NS, or as long as it takes to read the clock ROUNDS * READS times. No helper can
 * wait here. The verifier follows each round, so a round reads the clock several times.
 */
static __always_inline void wait(void)
{
	u64 end = bpf_ktime_get_ns() + WAIT_NS;
	u32 i, j;

#pragma clang loop unroll(disable)
	for (i = 0; i < ROUNDS; i++) {
		u64 now = 0;

#pragma unroll
		for (j = 0; j < READS; j++)
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

	if (steer_protocol() == STEER_UDP && sk->protocol != STEER_UDP)
		return 1;
	if (steer_protocol() == STEER_TCP && sk->state != BPF_TCP_LISTEN)
		return 1;
	cookie = steer_get_cookie(sk);
	slot = bpf_map_lookup_elem_((uintptr_t)steer_map(STEER_MAP_MEMBERS), &cookie);
	if (!slot)
		return 1;
	closing = &steer_get_attachment()->closing[*slot & (STEER_SLOTS - 1)];
	if (*closing) /* a program on another cgroup has waited */
		return 1;
	*closing = 1;
	if (steer_protocol() == STEER_TCP)
		wait();
	wake(cookie);
	return 1;
}

int steer_listening(struct bpf_sock_ops *ctx)
{
	if (ctx->op == BPF_SOCK_OPS_TCP_LISTEN_CB &&
	    ctx->local_port == steer_get_attachment()->port)
		wake(0);
	return 1;
}

/* After bind(2). */
int steer_bound(struct bpf_sock *sk)
{
	if (sk->protocol == STEER_UDP && sk->src_port == steer_get_attachment()->port)
		wake(0);
	return 1;
}

/* Whether a socket is bound to the port, in the network namespace of the listeners. */
static __always_inline bool is_there(u64 sk)
{
	const struct steer_attachment *at = steer_get_attachment();
	u64 net = 0;
	u32 netns = 0;
	u16 port = 0;

	bpf_probe_read_kernel(&port, sizeof(port), (void *)(sk + at->port_offset));
	if (port != at->port)
		return false;
	bpf_probe_read_kernel(&net, sizeof(net), (void *)(sk + at->net_offset));
	bpf_probe_read_kernel(&netns, sizeof(netns), (void *)(net + at->netns_offset));
	return netns == at->netns;
}

/* tp_btf/inet_sock_set_state */
int steer_state(void *ctx)
{
	u64 sk, state;

	asm volatile("%0 = *(u64 *)(%1 + 16)" : "=r"(state) : "r"(ctx));
	if ((u32)state != BPF_TCP_LISTEN)
		return 0;
	asm volatile("%0 = *(u64 *)(%1 + 0)" : "=r"(sk) : "r"(ctx));
	if (is_there(sk))
		wake(0);
	return 0;
}
