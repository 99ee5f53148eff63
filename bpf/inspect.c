/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * inspect - which sockets serve, who has them open, and which program chooses among them.
 *
 * Not a policy, but programs of type TRACING. All but three are BPF iterators, which run when
 * somebody reads their file; the last three count, as long as they are attached, which listener each
 * new connection came from, and which socket each datagram went to. Nothing here changes what a
 * socket does.
 */
#include "tracing.h"

#define TCP_END 1 /* instead of an address: no listener comes after this */

/* Of struct bpf_iter__tcp and bpf_iter__udp: the socket; of bpf_iter__task_file. */
#define ITER_SOCKET 8
#define ITER_TASK 8
#define ITER_FD 16
#define ITER_FILE 24

static __always_inline void emit_socket(void *ctx, u64 sk, u32 pid, u32 fd,
					const struct steer_offsets *at)
{
	struct steer_socket found;

	__builtin_memset(&found, 0, sizeof(found));
	steer_describe(&found, sk, at);
	found.pid = pid;
	found.fd = fd;
	steer_emit(ctx, &found, sizeof(found));
}

/* iter/tcp: the listeners of a network namespace. Connections come after all of them: those are
 * marked, so that nobody has to read on. */
int steer_tcp(void *ctx)
{
	const struct steer_offsets *at = steer_offsets();
	u64 sk = steer_word(ctx, ITER_SOCKET);

	if (!sk || !at)
		return 0;
	if (steer_u8(sk, at->state) != STEER_LISTEN) {
		struct steer_socket end;

		__builtin_memset(&end, 0, sizeof(end));
		end.address = TCP_END;
		steer_emit(ctx, &end, sizeof(end));
		return 0;
	}
	if (steer_is_server(sk, at))
		emit_socket(ctx, sk, 0, 0, at);
	return 0;
}

/* iter/udp: the bound sockets of a network namespace. */
int steer_udp(void *ctx)
{
	const struct steer_offsets *at = steer_offsets();
	u64 sk = steer_word(ctx, ITER_SOCKET);

	if (sk && at && steer_is_server(sk, at))
		emit_socket(ctx, sk, 0, 0, at);
	return 0;
}

/* The same two with nothing but the addresses: to see, at a fifth of the cost, whether there are
 * any but those that processes have open. */
int steer_tcp_addresses(void *ctx)
{
	const struct steer_offsets *at = steer_offsets();
	u64 sk = steer_word(ctx, ITER_SOCKET), end = TCP_END;

	if (!sk || !at)
		return 0;
	if (steer_u8(sk, at->state) != STEER_LISTEN)
		steer_emit(ctx, &end, sizeof(end));
	else if (steer_is_server(sk, at))
		steer_emit(ctx, &sk, sizeof(sk));
	return 0;
}

int steer_udp_addresses(void *ctx)
{
	const struct steer_offsets *at = steer_offsets();
	u64 sk = steer_word(ctx, ITER_SOCKET);

	if (sk && at && steer_is_server(sk, at))
		steer_emit(ctx, &sk, sizeof(sk));
	return 0;
}

/* iter/task_file: the same of every process's open files, in all network namespaces. */
int steer_task_file(void *ctx)
{
	const struct steer_offsets *at = steer_offsets();
	u64 file = steer_word(ctx, ITER_FILE), socket, sk;

	if (!file || !at)
		return 0;
	if ((steer_u16(steer_u64(file, at->file_inode), at->inode_mode) & STEER_S_IFMT) !=
	    STEER_S_IFSOCK)
		return 0;
	socket = steer_u64(file, at->file_private_data);
	if (!socket || steer_u64(socket, at->socket_file) != file)
		return 0; /* opened by its path */
	sk = steer_u64(socket, at->socket_sk);
	/* One of MPTCP listens by another socket, which is in the group. */
	if (sk && at->mptcp_first != STEER_NOWHERE && steer_u16(sk, at->protocol) == STEER_MPTCP)
		sk = steer_u64(sk, at->mptcp_first);
	if (sk && steer_is_server(sk, at))
		emit_socket(ctx, sk, steer_pid(steer_word(ctx, ITER_TASK), at),
			    steer_word(ctx, ITER_FD), at);
	return 0;
}

/* iter/task_file: who has a descriptor of one of the programs in `wanted`. */
int steer_holders(void *ctx)
{
	const struct steer_offsets *at = steer_offsets();
	u64 file = steer_word(ctx, ITER_FILE);
	u64 found[2];

	if (!file || !at)
		return 0;
	found[0] = steer_u64(file, at->file_private_data);
	if (!bpf_map_lookup_elem_((uintptr_t)steer_map(STEER_MAP_WANTED), found))
		return 0;
	found[1] = steer_pid(steer_word(ctx, ITER_TASK), at);
	steer_emit(ctx, found, sizeof(found));
	return 0;
}

#define CLASSIC_INSNS_MAX 4096 /* BPF_MAXINSNS of include/uapi/linux/bpf_common.h */
#define CLASSIC_PART 32

/* iter/tcp, iter/udp: the instructions of a classic program in `wanted`, for each socket of the
 * group that has it, in parts: the last one is longer than the program. What is behind the program
 * may not be readable, so instructions are read one by one. */
int steer_classic(void *ctx)
{
	const struct steer_offsets *at = steer_offsets();
	u64 sk = steer_word(ctx, ITER_SOCKET), part[CLASSIC_PART], program, classic, filter;
	u32 i, j, length;

	if (!sk || !at || !steer_is_server(sk, at))
		return 0;
	program = steer_u64(steer_u64(sk, at->group), at->group_program);
	if (!bpf_map_lookup_elem_((uintptr_t)steer_map(STEER_MAP_WANTED), &program))
		return 0;
	classic = steer_u64(program, at->program_classic);
	filter = steer_u64(classic, at->classic_filter);
	length = steer_u16(classic, at->classic_length);
#pragma clang loop unroll(disable)
	for (i = 0; i < CLASSIC_INSNS_MAX; i += CLASSIC_PART) {
		if (i >= length)
			break;
#pragma unroll
		for (j = 0; j < CLASSIC_PART; j++)
			part[j] = steer_u64(filter, (i + j) * sizeof(*part));
		steer_emit(ctx, part, sizeof(part));
	}
	return 0;
}

/* Have a socket counted. Args: typed: the same socket. */
static __always_inline void mark(u64 sk, void *typed)
{
	u64 none = 0;

	if (bpf_sk_storage_get(steer_map(STEER_MAP_MARKS), typed, &sk, BPF_SK_STORAGE_GET_F_CREATE))
		bpf_map_update_elem_((uintptr_t)steer_map(STEER_MAP_ACCEPTED), &sk, &none,
				     BPF_NOEXIST);
}

static __always_inline void count(void *typed)
{
	u64 *mark, *number, counted;

	mark = bpf_sk_storage_get(steer_map(STEER_MAP_MARKS), typed, NULL, 0);
	if (!mark)
		return;
	counted = *mark;
	number = bpf_map_lookup_elem_((uintptr_t)steer_map(STEER_MAP_ACCEPTED), &counted);
	if (number)
		__sync_fetch_and_add(number, 1);
}

/* iter/tcp: have each listener mark the connections that come from it. Nothing is written before
 * all of them are done. */
int steer_mark(void *ctx)
{
	const struct steer_offsets *at = steer_offsets();
	u64 sk = steer_word(ctx, ITER_SOCKET), end = TCP_END;
	void *typed = steer_typed(ctx, 8);

	if (!typed || !at)
		return 0;
	if (steer_u8(sk, at->state) != STEER_LISTEN) {
		steer_emit(ctx, &end, sizeof(end));
		return 0;
	}
	mark(sk, typed);
	return 0;
}

/* iter/udp: have the datagrams of each socket counted. */
int steer_mark_udp(void *ctx)
{
	const struct steer_offsets *at = steer_offsets();
	u64 sk = steer_word(ctx, ITER_SOCKET);
	void *typed = steer_typed(ctx, 8);

	if (typed && at && steer_is_server(sk, at))
		mark(sk, typed);
	return 0;
}

/* tp_btf/inet_sock_set_state: a connection is established. */
int steer_accepted(void *ctx)
{
	if (steer_word(ctx, 8) == STEER_SYN_RECV && steer_word(ctx, 16) == STEER_ESTABLISHED)
		count(steer_typed(ctx, 0));
	return 0;
}

/* tp_btf/sk_data_ready (Linux 6.3): a datagram was put into the receive queue of a socket; for
 * sockets that are not marked it means something else. */
int steer_readable(void *ctx)
{
	count(steer_typed(ctx, 0));
	return 0;
}

/* fexit/__udp_enqueue_schedule_skb, for older kernels: the same, unless the function failed. */
int steer_received(void *ctx)
{
	if (!(u32)steer_word(ctx, 16))
		count(steer_typed(ctx, 0));
	return 0;
}
