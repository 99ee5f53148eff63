/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * steer.h - the code that all policies share.
 *
 * A policy maps a connection to a position in the table. The controller fills the table, which
 * maps each position to a slot. The socket in that slot gets the connection. Weights, drains,
 * reloads and CPU maps only change how the table is filled, so a policy needs no code for them.
 *
 * A policy file has a head comment, declarations and one STEER_POLICY block:
 *
 *	STEER_POLICY(ctx, table)
 *	{
 *		return steer_spread(table, ctx->hash);
 *	}
 *
 * This header does everything else: it takes turns, falls back to another live slot if the
 * selected one has no socket, migrates connections and counts selections.
 *
 * steer/abi.py mirrors the layouts of the structs; a test compares the two.
 */
#ifndef STEER_H
#define STEER_H

#include <linux/types.h>
#include <uapi/linux/bpf.h>

/* Placeholders for map descriptors. The loader replaces them. */
#define STEER_MAP_SOCKETS 0x57ee0001
#define STEER_MAP_TABLE 0x57ee0002
#define STEER_MAP_COUNTS 0x57ee0003
#define STEER_MAP_CPUS 0x57ee0004
#define STEER_MAP_SLOTS 0x57ee0005
#define STEER_MAP_PARAMS 0x57ee0006
#define STEER_MAP_OWN 0x57ee0007
#define STEER_MAP_FLOWS 0x57ee0008
#define STEER_MAP_OWNERS 0x57ee0009
#define STEER_MAP_LISTENERS 0x57ee000a
#define STEER_MAP_MOVED 0x57ee000b
#define STEER_MAP_EARLY 0x57ee000c
#define STEER_MAP_ATTACHMENT 0x57ee0301
#define STEER_MAP_MEMBERS 0x57ee0302
#define STEER_MAP_EVENTS 0x57ee0303

/* Placeholder for the protocol number of the group, as in IP headers. The loader replaces it. */
#define STEER_CONSTANT_PROTOCOL 0x57ee0100

#define STEER_SLOTS 8192
#define STEER_ENTRIES 65536 /* positions in the table */
#define STEER_TURNS 32768 /* 16-bit words for rows */
#define STEER_FALLBACKS 256 /* live slots to try if the selected slot has no socket */
#ifdef STEER_ATTACHED
#define STEER_TRIES 8 /* a reload closes many listeners at once */
#else
#define STEER_TRIES 4
#endif
#define STEER_BACKUPS 2 /* backup listeners of a TCP group */
#define STEER_ROW 0x8000 /* flag in an entry: the rest is the offset of a row in `turns` */
#define STEER_RING_BIT 20 /* in the head of the table */
#define STEER_LENGTH_BIT 40
#define STEER_SLOT 0x80000000u /* flag in a position: the rest is a slot; the table is not used */
#define STEER_VALUES 16 /* parameters; also counters */
#define STEER_HISTOGRAMS 4
#define STEER_BUCKETS 32
#define STEER_IPV4 __builtin_bswap16(0x0800) /* sk_reuseport_md.eth_protocol */
#define STEER_TCP 6 /* in IP headers */
#define STEER_UDP 17
#define STEER_IPV6_BYTES 40 /* length of the header */

/*
 * One buffer of the table. An entry is a slot or a row. A row is a list of slots that take
 * turns: its length, then its slots. All numbers have 16 bits, so that the part in use occupies
 * few cache lines.
 */
struct steer_layout {
	u32 length; /* entries in use; steer_spread() returns a position below this */
	u32 ring; /* length of the ring, whose entries then repeat; 0 if the table is no ring */
	u16 entries[STEER_ENTRIES];
	u16 turns[STEER_TURNS];
	u16 fallbacks[STEER_FALLBACKS];
};

/*
 * The table is double-buffered. The controller writes the inactive buffer and then makes it
 * active with one store to `head`. One load of `head` gives a program everything it needs
 * first:
 *
 *	from bit STEER_LENGTH_BIT	the length of the active buffer
 *	from bit STEER_RING_BIT		the length of its ring
 *	from bit 0			its offset in `buffers`: 0 or sizeof(struct steer_layout)
 */
struct steer_table {
	u64 head;
	u32 early; /* 1 after the first early lookup, see steer_find_tcp() */
	u32 reserved;
	struct steer_layout buffers[2];
};

/* The active buffer, as one load of the head described it. A policy gets this as `table`. */
struct steer_view {
	u64 head;
	u32 length;
	u32 ring;
	const u16 *entries;
	const struct steer_layout *layout;
	bool is_plain; /* the result of steer_is_plain(); if true, the next two fields are set */
	u32 segment; /* STEER_NONE, STEER_ACK or STEER_SYN */
	u32 counted; /* 1 if the selection is counted: for a datagram or a SYN */
};

/* Per slot and CPU. */
struct steer_counts {
	u64 selected; /* connections (UDP: datagrams) for which this slot was selected */
	u64 fallback; /* of these, selected in place of a slot that had no socket */
	u64 migrated; /* of these, migrated from a closing listener */
};

/* Per CPU. */
struct steer_cpu {
	u64 turns; /* index of the next turn: low 32 bits for SYNs, high 32 bits for lone ACKs */
	u32 random; /* state of xorshift32; never 0 */
	u32 reserved;
	u64 unsteered; /* selections left to the kernel's hash, as no live slot was found */
};

/* Per slot of the service, for all its groups and CPUs. */
struct steer_slot {
	u32 pending; /* handshakes in progress: low 16 bits; high 16 bits: second of the last one */
	u32 last_selected; /* value of steer_pace.selected when this slot was last selected */
	u16 stamp; /* changes whenever another worker gets the slot */
	u16 flows; /* changes when remembered flows of this slot become invalid */
	u32 reserved;
};

/* Durations of about the last hundred connections, in units of 1024 ns. */
struct steer_pace {
	u64 mean; /* 128 times the mean */
	u64 square; /* 128 times the mean square */
	u32 varied; /* 1 if some connections last much longer than others */
	u32 selected; /* handshakes so far */
	u32 refreshed; /* position whose slot was passed to steer_refresh_load() last */
	u32 moved; /* entries of the map of moved connections, see steer_move_count() */
};

/* The numbers that policies read of many slots at once are adjacent in memory. */
struct steer_loads {
	u32 load[STEER_SLOTS]; /* open connections plus handshakes in progress */
	u32 open[STEER_SLOTS]; /* connections accepted by the worker or in its accept queue */
	struct steer_slot slots[STEER_SLOTS];
	struct steer_pace pace;
};

/* The worker that owns a connection: the one that has the slot while its stamp is the same. */
struct steer_owner {
	u16 slot;
	u16 stamp;
	u32 since; /* time of opening, in units of 1024 ns; 0 if the connection is not counted as open */
};

/* Identifies a TCP packet as long as it may be looked up again. */
struct steer_packet {
	u32 client[4]; /* IPv4 uses only the first word */
	u32 ports;
	u32 sequence;
};

/* The slot selected in an early lookup. */
struct steer_early {
	u32 slot;
	u32 seen; /* time of the lookup, in ticks */
};

struct steer_params {
	u32 ticks_per_s; /* frequency of steer_ticks() */
	u32 second; /* ticks >> this is a clock of about one count per second */
	u32 seed; /* random, so that a client cannot predict which worker it gets */
	u32 backup; /* slot of the first backup listener, where connections wait if no worker is ready */
	u32 values[STEER_VALUES];
};

/* Per CPU: the counters and histograms that the policy declares. */
struct steer_own {
	u64 counters[STEER_VALUES];
	u64 histograms[STEER_HISTOGRAMS][STEER_BUCKETS];
};

/*
 * Shared by `steer attach` and the programs that select among listeners of other servers. Only
 * objects compiled with STEER_ATTACHED use it, and bpf/attach.c.
 */
struct steer_attachment {
	u64 alive_ns; /* last heartbeat of the attacher; CLOCK_MONOTONIC */
	u32 port; /* of the listeners */
	u32 netns; /* of the listeners: its number */
	u32 port_offset; /* of skc_num in struct sock_common */
	u32 net_offset; /* of skc_net.net in struct sock_common */
	u32 netns_offset; /* of ns.inum in struct net */
	u32 reserved;
	u8 closing[STEER_SLOTS]; /* 1: the listener in the slot is being closed */
};

/*
 * Declarations of a policy. They expand to nothing: the controller parses them in the text of
 * the file, and passes the index of each name to the compiler.
 */
#define STEER_TABLE(kind) /* how the table is filled; default: consistent */
#define STEER_PARAM(name, initial, least, most, help) /* a u32 that users can set */
#define STEER_COUNTER(name, help)
#define STEER_HISTOGRAM(name, unit, help)

#define steer_param(name) steer_get_param(STEER_PARAM_##name)
#define steer_add(name, number) steer_add_at(STEER_COUNTER_##name, number)
#define steer_record(name, value) steer_record_at(STEER_HISTOGRAM_##name, value)

/*
 * A compiler barrier for one variable (barrier_var() in the kernel): the compiler computes
 * `value` before this point and knows nothing about it after. Without it the compiler may merge
 * two reads of ctx into one read at a selected address, which the verifier rejects, or turn
 * arithmetic into a branch.
 */
#define steer_barrier(value) asm volatile("" : "+r"(value))

/* The placeholder of a map as a pointer. bcc copies it unchanged into the bytecode. */
#define steer_map(map) ((void *)bpf_pseudo_fd(BPF_PSEUDO_MAP_FD, map))

/*
 * The same as ctx->ip_protocol. The loader makes it a constant, so it costs nothing, and the
 * verifier removes the code for the other protocol. Reading the field instead loads it from the
 * socket, which is often not in a CPU cache.
 */
static __always_inline u64 steer_protocol(void)
{
	return bpf_pseudo_fd(0, STEER_CONSTANT_PROTOCOL);
}

#define STEER_ABANDONED_NS 1000000000

static __always_inline struct steer_attachment *steer_get_attachment(void)
{
	return (void *)bpf_pseudo_fd(BPF_PSEUDO_MAP_VALUE, STEER_MAP_ATTACHMENT);
}

#ifdef STEER_ATTACHED
static u64 (*steer_get_coarse_ns)(void) = (void *)BPF_FUNC_ktime_get_coarse_ns;

/* True if the attacher has ended: nobody updates the table, so the kernel's hash must decide. */
static __always_inline bool steer_is_abandoned(void)
{
	s64 silent_ns = steer_get_coarse_ns() - steer_get_attachment()->alive_ns;

	return silent_ns > STEER_ABANDONED_NS;
}

/* A listener that closes loses the handshakes that reach it meanwhile, so it must get none. */
static __always_inline bool steer_is_closing(u32 slot)
{
	return steer_get_attachment()->closing[slot & (STEER_SLOTS - 1)];
}
#else
static __always_inline bool steer_is_abandoned(void)
{
	return false;
}

static __always_inline bool steer_is_closing(u32 slot)
{
	return false;
}
#endif

/* Maps any 32-bit number to a position, evenly over the table. */
static __always_inline u32 steer_spread(const struct steer_view *table, u32 number)
{
	return (u64)number * table->length >> 32;
}

/* The address is a constant in the program, so no map lookup is needed. */
static __always_inline struct steer_table *steer_get_table(void)
{
	return (void *)bpf_pseudo_fd(BPF_PSEUDO_MAP_VALUE, STEER_MAP_TABLE);
}

/* Describe the active buffer. */
static __always_inline struct steer_view steer_get_active(void)
{
	const struct steer_table *table = steer_get_table();
	u64 head = table->head;
	const struct steer_layout *layout =
		(const void *)table->buffers + (head & sizeof(struct steer_layout));

	return (struct steer_view){
		.head = head,
		.length = head >> STEER_LENGTH_BIT,
		.ring = head >> STEER_RING_BIT & ((1 << (STEER_LENGTH_BIT - STEER_RING_BIT)) - 1),
		.entries = layout->entries,
		.layout = layout,
	};
}

static __always_inline const struct steer_params *steer_get_params(void)
{
	return (void *)bpf_pseudo_fd(BPF_PSEUDO_MAP_VALUE, STEER_MAP_PARAMS);
}

static __always_inline u32 steer_get_param(u32 index)
{
	return steer_get_params()->values[index & (STEER_VALUES - 1)];
}

static __always_inline struct steer_own *steer_get_own(void)
{
	u32 zero = 0;

	return bpf_map_lookup_elem_((uintptr_t)steer_map(STEER_MAP_OWN), &zero);
}

static __always_inline void steer_add_at(u32 index, u64 number)
{
	struct steer_own *own = steer_get_own();

	if (own)
		own->counters[index & (STEER_VALUES - 1)] += number;
}

/* Count a value in the bucket of its number of binary digits. */
static __always_inline void steer_record_at(u32 index, u32 value)
{
	struct steer_own *own = steer_get_own();
	u32 bucket = 0, bits;

#pragma unroll
	for (bits = 16; bits; bits >>= 1)
		if (value >> bits) {
			value >>= bits;
			bucket += bits;
		}
	bucket += value; /* value is now 1, or 0 if it was 0 at the start */
	if (bucket > STEER_BUCKETS - 1)
		bucket = STEER_BUCKETS - 1;
	steer_barrier(bucket); /* keeps the mask below, which the verifier needs */
	if (own)
		own->histograms[index & (STEER_HISTOGRAMS - 1)][bucket & (STEER_BUCKETS - 1)]++;
}

/* The kernel's coarse clock; reading it is cheap. It wraps around. Linux 5.5+. */
static __always_inline u32 steer_ticks(void)
{
	return bpf_jiffies64();
}

/* The same clock in units of about a second. */
static __always_inline u32 steer_second(void)
{
	return steer_ticks() >> (steer_get_params()->second & 31);
}

static __always_inline struct steer_loads *steer_get_loads(void)
{
	return (void *)bpf_pseudo_fd(BPF_PSEUDO_MAP_VALUE, STEER_MAP_SLOTS);
}

static __always_inline struct steer_slot *steer_get_slot_state(u64 slot)
{
	return &steer_get_loads()->slots[slot & (STEER_SLOTS - 1)];
}

static __always_inline struct steer_pace *steer_get_pace(void)
{
	return &steer_get_loads()->pace;
}

/*
 * The load of a slot: its open connections and its handshakes in progress. A handshake that
 * never completes is dropped from the load after one or two seconds.
 */
static __always_inline u64 steer_get_load(u64 slot)
{
	return steer_get_loads()->load[slot & (STEER_SLOTS - 1)];
}

/* Add to the open connections of a slot, and to its load. */
static __always_inline void steer_adjust_open(u64 slot, s32 more, s32 load)
{
	__sync_fetch_and_add(&steer_get_loads()->open[slot & (STEER_SLOTS - 1)], more);
	if (load)
		__sync_fetch_and_add(&steer_get_loads()->load[slot & (STEER_SLOTS - 1)], load);
}

/* Count a handshake for a slot. Not atomic: CPUs that do this at the same time may lose one. */
static __always_inline void steer_add_handshake(u32 slot)
{
	struct steer_slot *at = steer_get_slot_state(slot);
	u32 second = steer_second(), pending = at->pending;

	at->last_selected = ++steer_get_pace()->selected;
	if ((second & 0xffff) != pending >> 16)
		pending = second << 16 | (pending & 0xffff);
	at->pending = pending + ((pending & 0xffff) < 0xffff);
	__sync_fetch_and_add(&steer_get_loads()->load[slot & (STEER_SLOTS - 1)], 1);
}

/*
 * Recompute the load of a slot. This drops its handshakes if the last one started more than a
 * second ago, and corrects counts that CPUs have written at the same time. Call it for each
 * slot from time to time.
 */
static __always_inline void steer_refresh_load(u32 slot)
{
	struct steer_slot *at = steer_get_slot_state(slot);
	u32 pending = at->pending, number = pending & 0xffff;
	s32 open;

	if (number && (u16)(steer_second() - (pending >> 16)) > 1) {
		at->pending = 0;
		number = 0;
	}
	slot &= STEER_SLOTS - 1;
	open = steer_get_loads()->open[slot];
	steer_get_loads()->load[slot] = (open < 0 ? 0 : open) + number;
}

/* A position that stands for this slot, whatever the table contains. */
static __always_inline u32 steer_to(u32 slot)
{
	return STEER_SLOT | slot;
}

static __always_inline struct steer_cpu *steer_get_cpu(void)
{
	u32 zero = 0;

	return bpf_map_lookup_elem_((uintptr_t)steer_map(STEER_MAP_CPUS), &zero);
}

/* The first bytes of an IPv4 or IPv6 header. */
struct steer_ip {
	u8 version; /* high 4 bits; low 4 bits: length of the IPv4 header in words */
	u8 class;
	u16 total4; /* IPv4: bytes of the packet */
	u16 payload6; /* IPv6: bytes after the header */
	u8 next6; /* IPv6: type of the next header */
	u8 hops6;
};

/* Fails if the packet is shorter. The helper's prototype lacks the const. */
static __always_inline long steer_read(const struct sk_reuseport_md *ctx, u32 at, void *to,
				       u32 bytes)
{
	return bpf_skb_load_bytes((void *)ctx, at, to, bytes);
}

/* Args: at: offset from the IP header, wherever the data begin. */
static __always_inline long steer_read_ip(const struct sk_reuseport_md *ctx, u32 at, void *to,
					  u32 bytes)
{
	return bpf_skb_load_bytes_relative((void *)ctx, at, to, bytes, BPF_HDR_START_NET);
}

#define STEER_NOWHERE 0xffff /* an offset at which every read fails */

/* The offset after the IPv6 header and at most two extension headers (RFC 8200, 4). */
static __always_inline u32 steer_skip_ipv6(const struct sk_reuseport_md *ctx, u8 next)
{
	u8 header[2] = {next};
	u32 at = STEER_IPV6_BYTES, i;

#pragma unroll
	for (i = 0; i < 2; i++)
		if (header[0] == 0 /* hop by hop */ || header[0] == 60 /* destination */ ||
		    header[0] == 43 /* routing */) {
			if (steer_read(ctx, at, header, sizeof(header)))
				return STEER_NOWHERE;
			at += (header[1] + 1) * 8;
		}
	return header[0] == STEER_TCP ? at : STEER_NOWHERE;
}

/*
 * The offset of the TCP header in the data. It is 0 except in an early lookup: if a rule of
 * netfilter looks up the listener, the data begin with the IP header. `tproxy` passes the packet
 * to the selected listener. `socket` only looks, and the packet is looked up again later.
 *
 * The first byte of a TCP header belongs to the source port and may look like that of an IP
 * header. The length decides: ctx->len equals the length in the IP header only if the data
 * include that header.
 */
static __always_inline u32 steer_find_tcp(const struct sk_reuseport_md *ctx)
{
	const u8 *data;
	struct steer_ip ip;

	if (steer_protocol() != STEER_TCP)
		return 0;
	data = ctx->data;
	if (data + 1 > (const u8 *)ctx->data_end || (*data & 0xd0) != 0x40)
		return 0;
	if (steer_read_ip(ctx, 0, &ip, sizeof(ip)))
		return 0;
	if (ip.version >> 4 == 4)
		return ctx->len == __builtin_bswap16(ip.total4) ? (ip.version & 15) * 4 : 0;
	if (ctx->len != __builtin_bswap16(ip.payload6) + STEER_IPV6_BYTES)
		return 0;
	return steer_skip_ipv6(ctx, ip.next6);
}

/*
 * Kinds of segments. A lone ACK reaches a listener if it answers a SYN cookie, when the program
 * has already run for the SYN, or if it arrives after its connection is gone. SYNs and lone ACKs
 * have separate turn counters. With a common counter and an even number of workers, each SYN
 * would be followed by an ACK and all connections would go to the same half of the workers.
 */
#define STEER_NONE 0 /* not TCP, or no packet because a connection migrates */
#define STEER_ACK 1 /* any segment but a SYN */
#define STEER_SYN 2 /* the value of the flag in the TCP header */

/* Args: at: offset of the TCP header, see steer_find_tcp(). */
static __always_inline u32 steer_read_segment_at(const struct sk_reuseport_md *ctx, u32 at)
{
	const u8 *header;
	u8 flags = 0;

	if (steer_protocol() != STEER_TCP)
		return STEER_NONE;
	header = ctx->data;
	if (at) {
		if (steer_read(ctx, at + 13, &flags, 1))
			return STEER_NONE;
	} else {
		if (header + 14 > (const u8 *)ctx->data_end)
			return STEER_NONE;
		flags = header[13];
	}
	/* No branch, as the verifier would then check all later code twice. */
	return (flags & STEER_SYN) | ((flags & STEER_SYN) >> 1 ^ STEER_ACK);
}

static __always_inline u32 steer_read_segment(const struct sk_reuseport_md *ctx)
{
	return steer_read_segment_at(ctx, steer_find_tcp(ctx));
}

static __always_inline u32 steer_is_ack(const struct sk_reuseport_md *ctx)
{
	return steer_read_segment(ctx) & STEER_ACK;
}

static __always_inline bool steer_is_syn(const struct sk_reuseport_md *ctx)
{
	return steer_read_segment(ctx) & STEER_SYN;
}

/* The next slot of a row. Each CPU has its own turn counter, so CPUs never wait or race. */
static __always_inline u32 steer_take_turn(const struct steer_view *table, u32 row, u32 is_ack)
{
	const u16 *turns = table->layout->turns;
	u32 length = turns[row & (STEER_TURNS - 1)], turn = 0;
	struct steer_cpu *cpu = steer_get_cpu();

	if (cpu) {
		/*
		 * Shift instead of selecting a pointer to one of the two counters: without
		 * CAP_PERFMON the verifier rejects such a pointer. A branch would make it check
		 * all later code twice.
		 */
		u32 shift = is_ack * 32;
		u64 taken = cpu->turns;

		turn = taken >> shift;
		if (turn >= length) {
			taken -= (u64)turn << shift;
			turn = 0;
		}
		cpu->turns = taken + ((u64)1 << shift);
	}
	return turns[(row + 1 + turn) & (STEER_TURNS - 1)];
}

/* The entry at a position: a slot or a row. */
static __always_inline u32 steer_read_entry(const struct steer_view *table, u32 position)
{
	u64 at = position;
	u32 slot = position & ~STEER_SLOT;

	if (position & STEER_SLOT)
		return slot < STEER_ROW ? slot : STEER_ROW - 1 /* out of range, so no socket */;
	/*
	 * Without CAP_PERFMON the verifier accepts a number that is added to a pointer only if its
	 * known bounds are the same on every path. A policy may return a constant or a number of
	 * limited range, while a migrating connection has any number. So hide the bounds here.
	 */
	at ^= table->head;
	steer_barrier(at);
	return table->layout->entries[(at ^ table->head) & (STEER_ENTRIES - 1)];
}

static __always_inline u32 steer_resolve(const struct steer_view *table, u32 position, u32 is_ack)
{
	u32 entry = steer_read_entry(table, position);

	return entry & STEER_ROW ? steer_take_turn(table, entry, is_ack) : entry;
}

static __always_inline u32 steer_get_slot(const struct sk_reuseport_md *ctx,
					  const struct steer_view *table, u32 position)
{
	return steer_resolve(table, position, steer_is_ack(ctx));
}

/* A random number: xorshift32 (Marsaglia 2003), at a third of the cost of the kernel's helper. */
static __always_inline u32 steer_random(void)
{
	struct steer_cpu *cpu = steer_get_cpu();
	u32 number;

	if (!cpu)
		return 0;
	number = cpu->random;
	number ^= number << 13;
	number ^= number >> 17;
	number ^= number << 5;
	cpu->random = number;
	return number;
}

/* bcc declares this helper with a 32-bit result. */
static u64 (*steer_get_cookie)(void *) = (void *)BPF_FUNC_get_socket_cookie;

/* Whether a connection is open: its handshake is complete and the worker has not closed it. */
static __always_inline bool steer_is_open(u32 state)
{
	return state == BPF_TCP_ESTABLISHED || state == BPF_TCP_CLOSE_WAIT;
}

static __always_inline void steer_adjust_owner(const struct steer_owner *owner, s32 more)
{
	if (steer_get_slot_state(owner->slot)->stamp == owner->stamp)
		steer_adjust_open(owner->slot, more, more);
}

/*
 * Move a connection's count to the slot that it migrates to. The count's owner is stored at the
 * socket, which this program cannot write. So the new owner is kept in a map until the
 * connection is closed. A connection whose handshake is incomplete is not counted yet.
 */
static __always_inline void steer_move_count(struct sk_reuseport_md *ctx,
					     struct bpf_sock *connection, u32 slot)
{
	u64 listener, cookie;
	struct steer_owner *from, was, now = {.slot = slot};
	s32 more = 0;

	/* SYN_RECV means TCP Fast Open, which is counted. Other handshakes are NEW_SYN_RECV. */
	if (!steer_is_open(connection->state) && connection->state != BPF_TCP_SYN_RECV)
		return;
	listener = steer_get_cookie(ctx->sk);
	from = bpf_map_lookup_elem_((uintptr_t)steer_map(STEER_MAP_LISTENERS), &listener);
	if (!from)
		return;
	was = *from;
	now.stamp = steer_get_slot_state(slot)->stamp;
	cookie = steer_get_cookie(connection);
	if (!bpf_map_lookup_elem_((uintptr_t)steer_map(STEER_MAP_MOVED), &cookie))
		more = 1;
	/* Before the map is updated, or a close on another CPU would not read the map. */
	__sync_fetch_and_add(&steer_get_pace()->moved, more);
	if (bpf_map_update_elem_((uintptr_t)steer_map(STEER_MAP_MOVED), &cookie, &now, BPF_ANY)) {
		__sync_fetch_and_add(&steer_get_pace()->moved, -more);
		return;
	}
	steer_adjust_owner(&was, -1);
	steer_adjust_owner(&now, 1);
}

/* bcc declares this helper with 32-bit numbers, which costs instructions for truncation. */
static long (*steer_select_reuseport)(struct sk_reuseport_md *, void *, void *,
				      u64) = (void *)BPF_FUNC_sk_select_reuseport;

static __always_inline bool steer_select_at(struct sk_reuseport_md *ctx, u32 *slot)
{
	if (steer_is_closing(*slot))
		return false;
	return steer_select_reuseport(ctx, steer_map(STEER_MAP_SOCKETS), slot, 0) == 0;
}

static __always_inline bool steer_select(struct sk_reuseport_md *ctx, u32 slot)
{
	return steer_select_at(ctx, &slot);
}

/* Returns false if the packet cannot be read. */
static __always_inline bool steer_read_packet(const struct sk_reuseport_md *ctx, u32 at,
					      struct steer_packet *packet)
{
	if (steer_read(ctx, at, &packet->ports, 8))
		return false;
	if (ctx->eth_protocol == STEER_IPV4)
		return !steer_read_ip(ctx, 12, packet->client, 4);
	return !steer_read_ip(ctx, 8, packet->client, 16);
}

/*
 * Repeat the selection of an early lookup. After an early lookup the same packet may be looked
 * up again, for delivery or for another rule. It must go to the same slot, take no further turn
 * and not be counted again. The entry expires before a client retransmits, which it does after
 * about a second.
 */
static __always_inline bool steer_repeat_early(struct sk_reuseport_md *ctx)
{
	struct steer_packet packet = {};
	struct steer_early *early;

	if (steer_protocol() != STEER_TCP || !steer_read_packet(ctx, steer_find_tcp(ctx), &packet))
		return false;
	early = bpf_map_lookup_elem_((uintptr_t)steer_map(STEER_MAP_EARLY), &packet);
	return early && steer_ticks() - early->seen < steer_get_params()->ticks_per_s / 4 &&
	       steer_select(ctx, early->slot);
}

static __always_inline void steer_remember_early(const struct sk_reuseport_md *ctx, u32 at,
						 u32 slot)
{
	struct steer_early early = {.slot = slot, .seen = steer_ticks()};
	struct steer_packet packet = {};

	if (!steer_read_packet(ctx, at, &packet))
		return;
	bpf_map_update_elem_((uintptr_t)steer_map(STEER_MAP_EARLY), &packet, &early, BPF_ANY);
	if (!steer_get_table()->early) /* avoid a needless store: all CPUs read this cache line */
		steer_get_table()->early = 1;
}

static __always_inline struct steer_counts *steer_get_counts_at(u32 *slot)
{
	return bpf_map_lookup_elem_((uintptr_t)steer_map(STEER_MAP_COUNTS), slot);
}

static __always_inline struct steer_counts *steer_get_counts(u32 slot)
{
	return steer_get_counts_at(&slot);
}

/*
 * Count a selection. A connection is counted once, for its SYN; late segments are not counted.
 * It is counted again if it migrates. A connection in the middle of its handshake migrates when
 * the final ACK arrives.
 */
static __always_inline void steer_count_selection(struct sk_reuseport_md *ctx, u32 slot,
						  bool fallback, struct bpf_sock *migrating)
{
	struct steer_counts *count = steer_get_counts(slot);

	if (migrating)
		steer_move_count(ctx, migrating, slot);
	if (!count)
		return;
	count->selected++;
	if (fallback)
		count->fallback++;
	if (migrating)
		count->migrated++;
}

/* The selected slot has no socket: try other live slots, then the backup listeners. */
static __always_inline int steer_try_others(struct sk_reuseport_md *ctx, u32 at, u32 is_ack,
					    struct bpf_sock *migrating)
{
	/* Read the table again, as this rare path should not occupy registers of the common one. */
	const struct steer_view table = steer_get_active();
	const u16 *fallbacks = table.layout->fallbacks;
	struct steer_cpu *cpu;
	bool found = false;
	u32 slot = 0, i;

#ifdef STEER_ATTACHED /* without backup listeners; unrolled, it would be too long */
#pragma clang loop unroll(disable)
	for (i = 0; i < STEER_TRIES; i++) {
		slot = fallbacks[(ctx->hash + i) & (STEER_FALLBACKS - 1)];
		found = steer_select(ctx, slot);
		if (found)
			break;
	}
#else
#pragma unroll
	for (i = 0; i < STEER_TRIES + STEER_BACKUPS; i++)
		if (!found) {
			slot = i < STEER_TRIES ? fallbacks[(ctx->hash + i) & (STEER_FALLBACKS - 1)]
					       : steer_get_params()->backup + i - STEER_TRIES;
			found = steer_select(ctx, slot);
		}
#endif
	if (found) {
		if (at)
			steer_remember_early(ctx, at, slot);
		if (migrating || !is_ack)
			steer_count_selection(ctx, slot, true, migrating);
	} else {
		cpu = steer_get_cpu();
		if (cpu && !is_ack)
			cpu->unsteered++;
	}
	return SK_PASS;
}

/* If no socket is selected, SK_PASS leaves the selection to the kernel's hash. */
static __always_inline int steer_deliver(struct sk_reuseport_md *ctx,
					 const struct steer_view *table, u32 position,
					 struct bpf_sock *migrating)
{
	u32 at = steer_find_tcp(ctx), is_ack = steer_read_segment_at(ctx, at) & STEER_ACK;
	u32 slot = steer_resolve(table, position, is_ack);

	if (!steer_select(ctx, slot))
		return steer_try_others(ctx, at, is_ack, migrating);
	if (at)
		steer_remember_early(ctx, at, slot);
	if (migrating || !is_ack)
		steer_count_selection(ctx, slot, false, migrating);
	return SK_PASS;
}

/* Whether the packet is certainly not part of an early lookup. Also classifies the packet. */
static __always_inline bool steer_is_plain(const struct sk_reuseport_md *ctx,
					   struct steer_view *table)
{
	const u8 *header;

	table->segment = STEER_NONE;
	table->counted = 1;
	table->is_plain = true;
	if (steer_protocol() != STEER_TCP)
		return true;
	header = ctx->data;
	if (header + 14 > (const u8 *)ctx->data_end)
		return false;
	table->counted = (header[13] & STEER_SYN) >> 1;
	table->segment = table->counted << 1 | (table->counted ^ STEER_ACK);
	return !steer_get_table()->early && (*header & 0xd0) != 0x40;
}

/* The same as steer_read_segment(), but uses the result of steer_is_plain() if there is one. */
static __always_inline u32 steer_get_segment(const struct sk_reuseport_md *ctx,
					     const struct steer_view *table)
{
	return table->is_plain ? table->segment : steer_read_segment(ctx);
}

/*
 * The fast path for most packets: no migration and no early lookup. It is separate from the rest
 * so that it needs few cache lines and registers. The rare cases come last, as clang keeps the
 * order of the source.
 */
static __always_inline int steer_deliver_plain(struct sk_reuseport_md *ctx,
					       const struct steer_view *table, u32 position)
{
	u64 entry = steer_read_entry(table, position);
	u32 slot, is_ack = table->counted ^ STEER_ACK;
	struct steer_counts *count;

	steer_barrier(entry); /* saves two instructions in the comparison */
	if (entry >= STEER_ROW)
		goto row;
	slot = entry;
select:
	/* Count before selecting: the CPU overlaps this work with the slower selection. */
	count = steer_get_counts_at(&slot);
	if (count)
		count->selected += table->counted;
	if (!steer_select_at(ctx, &slot))
		goto others;
	asm volatile(""); /* keeps the compiler from jumping to a distant return */
	return SK_PASS;
row:
	slot = steer_take_turn(table, entry, is_ack);
	goto select;
others:
	count = steer_get_counts_at(&slot);
	if (count)
		count->selected -= table->counted;
	return steer_try_others(ctx, 0, is_ack, NULL);
}

/*
 * Each policy becomes two programs. The kernel also runs steer_migrate when a listener closes
 * and its queue migrates (Linux 5.14+). steer_plain is for older kernels.
 *
 * For a migrating connection there is no packet, and the current CPU is that of the process that
 * closed the listener. So its position comes from its hash; otherwise a whole queue could go to
 * one worker. A policy that has a better way defines steer_position() before it includes this
 * header.
 */
#ifndef steer_position
#define steer_position(ctx, table, migrating, hash) \
	(migrating ? steer_spread(table, hash) : steer_policy(ctx, table))
#endif
#define STEER_POLICY(ctx, table)                                                          \
	static __always_inline u32 steer_policy(struct sk_reuseport_md *ctx,              \
						const struct steer_view *table);          \
	int steer_plain(struct sk_reuseport_md *ctx)                                      \
	{                                                                                 \
		struct steer_view view;                                                   \
                                                                                          \
		if (steer_is_abandoned())                                                 \
			return SK_PASS;                                                   \
		view = steer_get_active();                                                \
		if (steer_is_plain(ctx, &view))                                           \
			return steer_deliver_plain(ctx, &view, steer_policy(ctx, &view)); \
		view.is_plain = false;                                                    \
		if (steer_get_table()->early && steer_repeat_early(ctx))                  \
			return SK_PASS;                                                   \
		return steer_deliver(ctx, &view, steer_policy(ctx, &view), NULL);         \
	}                                                                                 \
	int steer_migrate(struct sk_reuseport_md *ctx)                                    \
	{                                                                                 \
		struct bpf_sock *migrating = ctx->migrating_sk;                           \
		struct steer_view view;                                                   \
		u32 hash = 0, position;                                                   \
                                                                                          \
		if (steer_is_abandoned())                                                 \
			return SK_PASS;                                                   \
		view = steer_get_active();                                                \
		if (!migrating && steer_is_plain(ctx, &view))                             \
			return steer_deliver_plain(ctx, &view, steer_policy(ctx, &view)); \
		view.is_plain = false;                                                    \
		if (migrating) {                                                          \
			hash = ctx->hash;                                                 \
			steer_barrier(hash);                                              \
		} else if (steer_get_table()->early && steer_repeat_early(ctx)) {         \
			return SK_PASS;                                                   \
		}                                                                         \
		position = steer_position(ctx, (&view), migrating, hash);                 \
		return steer_deliver(ctx, &view, position, migrating);                    \
	}                                                                                 \
	static __always_inline u32 steer_policy(struct sk_reuseport_md *ctx,              \
						const struct steer_view *table)

#endif
