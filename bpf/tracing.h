/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * tracing.h - how programs that look at the kernel read its structures.
 *
 * They serve every kernel as they are compiled: where a field is comes from the kernel's
 * own BTF when they are loaded, through the map `offsets`. Addresses are plain numbers here,
 * and a field is read with bpf_probe_read_kernel(), which reads 0 where nothing is.
 *
 * The layouts are mirrored in steer/loader/kernel_sockets.py; a test holds the two together.
 */
#ifndef STEER_TRACING_H
#define STEER_TRACING_H

#include <linux/types.h>
#include <uapi/linux/bpf.h>

/* Stand-ins for map descriptors, as in steer.h. */
#define STEER_MAP_OFFSETS 0x57ee0201
#define STEER_MAP_MARKS 0x57ee0202
#define STEER_MAP_ACCEPTED 0x57ee0203
#define STEER_MAP_WANTED 0x57ee0204

#define steer_map(map) ((void *)bpf_pseudo_fd(BPF_PSEUDO_MAP_FD, map))

#define STEER_NOWHERE 0xffffffff /* this kernel has no such field */
#define STEER_TCP 6
#define STEER_UDP 17
#define STEER_MPTCP 262 /* include/uapi/linux/in.h */
#define STEER_INET 2
#define STEER_INET6 10
#define STEER_ESTABLISHED 1 /* include/net/tcp_states.h */
#define STEER_SYN_RECV 3
#define STEER_CLOSE 7
#define STEER_LISTEN 10
#define STEER_PIDTYPE_TGID 1 /* include/linux/pid_types.h */
#define STEER_S_IFMT 0170000
#define STEER_S_IFSOCK 0140000

/* Offsets in bytes, of bit fields in bits. */
struct steer_offsets {
	u32 file_inode, file_private_data, inode_mode, inode_number, socket_file, socket_sk;
	u32 socket_inode, family, state, reuseport_bit, v6only_bit, device, netns, port;
	u32 address4, address6, cookie, protocol, uid, socket, queued, backlog, memory;
	u32 memory_limit, drops, more_drops, second_drops, group, cgroup, mptcp_first, netns_number;
	u32 group_program, group_sockets, group_by_cpu, program_kind, program_tag, program_aux;
	u32 program_classic, classic_length, classic_filter, aux_id, aux_user, aux_load_time;
	u32 aux_name, user_uid;
	u32 cgroup_node, node_id, task_signal, signal_pids, pid_level, pid_numbers;
	u32 pid_number_bytes;
};

/* A socket, and the process that has it open where that was looked for. */
struct steer_socket {
	u64 address; /* of the socket in the kernel: names it as long as it is there */
	u64 inode;
	u64 cookie; /* 0: nobody has asked for it yet */
	u64 group; /* 0: none */
	u64 program; /* 0: none */
	u64 loaded_ns; /* since the boot */
	u64 cgroup; /* where it was made */
	u32 pid; /* 0: not looked for */
	u32 fd;
	u32 netns;
	u32 uid;
	u32 device;
	u32 queued;
	u32 backlog;
	u32 memory;
	u32 memory_limit;
	u32 drops;
	u32 program_id; /* 0 of a classic one */
	u32 program_kind;
	u32 program_uid;
	u16 family;
	u16 protocol;
	u16 port;
	u16 members; /* sockets of its group */
	u16 by_cpu; /* those of them that have SO_INCOMING_CPU set */
	u16 classic_length; /* 0: it is not classic */
	u8 state;
	u8 is_reuseport;
	u8 is_v6only;
	u8 reserved[1];
	u8 ip[16];
	u8 tag[8];
	char name[16];
};

static __always_inline const struct steer_offsets *steer_offsets(void)
{
	u32 zero = 0;

	return bpf_map_lookup_elem_((uintptr_t)steer_map(STEER_MAP_OFFSETS), &zero);
}

/* What bcc would take for a pointer into the kernel, and the verifier for one with a type. */
#define steer_read(base, offset, to, bytes) \
	bpf_probe_read_kernel(to, bytes, (const void *)((base) + (offset)))

/* steer_u64(base, offset) and so on: a field of that type, or 0. */
#define STEER_READER(type)                                             \
	static __always_inline type steer_##type(u64 base, u32 offset) \
	{                                                              \
		type value = 0;                                        \
                                                                       \
		steer_read(base, offset, &value, sizeof(value));       \
		return value;                                          \
	}

STEER_READER(u64)
STEER_READER(u32)
STEER_READER(u16)
STEER_READER(u8)

static __always_inline u8 steer_bit(u64 base, u32 offset)
{
	return steer_u8(base, offset >> 3) >> (offset & 7) & 1;
}

/* Of the context, as a number. */
static __always_inline u64 steer_word(void *ctx, u32 offset)
{
	u64 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), ctx + offset);
	return value;
}

/* The same with its type, for helpers that want one. */
#define steer_typed(ctx, offset)                                                            \
	({                                                                                  \
		void *pointer;                                                              \
		asm volatile("%0 = *(u64 *)(%1 + " #offset ")" : "=r"(pointer) : "r"(ctx)); \
		pointer;                                                                    \
	})

/* Write a record out: ctx->meta->seq, of which both stand at the beginning. */
static __always_inline void steer_emit(void *ctx, const void *record, u32 bytes)
{
	void *meta = steer_typed(ctx, 0);

	bpf_seq_write(steer_typed(meta, 0), record, bytes);
}

static __always_inline void steer_program(struct steer_socket *into, const struct steer_offsets *at)
{
	u64 program = into->program, aux = steer_u64(program, at->program_aux);
	u64 classic = steer_u64(program, at->program_classic);

	into->program_kind = steer_u32(program, at->program_kind);
	if (classic)
		into->classic_length = steer_u16(classic, at->classic_length);
	into->program_id = steer_u32(aux, at->aux_id);
	into->program_uid = steer_u32(steer_u64(aux, at->aux_user), at->user_uid);
	into->loaded_ns = steer_u64(aux, at->aux_load_time);
	steer_read(program, at->program_tag, into->tag, sizeof(into->tag));
	steer_read(aux, at->aux_name, into->name, sizeof(into->name));
}

/* Whether a socket is one that takes connections or datagrams: what is no full socket has the
 * first fields only, and they are read first. */
static __always_inline bool steer_is_server(u64 sk, const struct steer_offsets *at)
{
	u16 family = steer_u16(sk, at->family), protocol;
	u8 state = steer_u8(sk, at->state);

	if (family != STEER_INET && family != STEER_INET6)
		return false;
	if (state != STEER_LISTEN && state != STEER_CLOSE && state != STEER_ESTABLISHED)
		return false;
	protocol = steer_u16(sk, at->protocol);
	if (protocol == STEER_TCP)
		return state == STEER_LISTEN;
	return protocol == STEER_UDP && steer_u16(sk, at->port) &&
	       (state == STEER_CLOSE || steer_u64(sk, at->group));
}

static __always_inline void steer_describe(struct steer_socket *into, u64 sk,
					   const struct steer_offsets *at)
{
	u64 socket = steer_u64(sk, at->socket), cgroup;

	into->address = sk;
	if (socket)
		into->inode = steer_u64(socket + at->socket_inode, at->inode_number);
	into->cookie = steer_u64(sk, at->cookie);
	into->netns = steer_u32(steer_u64(sk, at->netns), at->netns_number);
	into->uid = steer_u32(sk, at->uid);
	into->device = steer_u32(sk, at->device);
	into->queued = steer_u32(sk, at->queued);
	into->backlog = steer_u32(sk, at->backlog);
	into->memory = steer_u32(sk, at->memory);
	into->memory_limit = steer_u32(sk, at->memory_limit);
	into->family = steer_u16(sk, at->family);
	into->protocol = steer_u16(sk, at->protocol);
	into->port = steer_u16(sk, at->port);
	into->state = steer_u8(sk, at->state);
	into->is_reuseport = steer_bit(sk, at->reuseport_bit);
	into->is_v6only = steer_bit(sk, at->v6only_bit);
	into->drops = steer_u32(sk, at->drops);
	if (at->more_drops != STEER_NOWHERE) {
		u64 more = steer_u64(sk, at->more_drops);

		/* One number for even NUMA nodes, and one for odd ones. */
		if (more)
			into->drops = steer_u32(more, 0) + steer_u32(more, at->second_drops);
	}
	if (into->family == STEER_INET6)
		steer_read(sk, at->address6, into->ip, 16);
	else
		steer_read(sk, at->address4, into->ip, 4);
	if (at->cgroup != STEER_NOWHERE) {
		cgroup = steer_u64(sk, at->cgroup);
		into->cgroup = steer_u64(steer_u64(cgroup, at->cgroup_node), at->node_id);
	}
	into->group = steer_u64(sk, at->group);
	if (into->group) {
		into->members = steer_u16(into->group, at->group_sockets);
		into->program = steer_u64(into->group, at->group_program);
		if (at->group_by_cpu != STEER_NOWHERE)
			into->by_cpu = steer_u16(into->group, at->group_by_cpu);
	}
	if (into->program)
		steer_program(into, at);
}

/* The number of a task's process, as the process that reads sees it. */
static __always_inline u32 steer_pid(u64 task, const struct steer_offsets *at)
{
	u64 ours = steer_u64(bpf_get_current_task(), at->task_signal);
	u64 theirs = steer_u64(task, at->task_signal);
	u32 process = at->signal_pids + STEER_PIDTYPE_TGID * sizeof(u64);
	u32 level = steer_u32(steer_u64(ours, process), at->pid_level);

	return steer_u32(steer_u64(theirs, process),
			 at->pid_numbers + level * at->pid_number_bytes);
}

#endif
