/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * steer.h - what every policy shares.
 *
 * A policy turns a connection into a position in the table. The table, which the
 * controller fills, turns the position into a slot, and the slot's socket gets the
 * connection. Weights, drains, reloads and CPU maps are all in how the table is
 * filled, so none of them is code here.
 *
 * A policy file is a head comment, one STEER_POLICY block, and nothing else:
 *
 *	STEER_POLICY(ctx, table)
 *	{
 *		return steer_spread(table, ctx->hash);
 *	}
 *
 * All else (turns, another live slot when the chosen one is gone, migration,
 * counters) happens here, once for all policies.
 *
 * The layouts are mirrored in steer/abi.py; a test holds the two together.
 */
#ifndef STEER_H
#define STEER_H

#include <linux/types.h>
#include <uapi/linux/bpf.h>

/* Stand-ins for map descriptors; the loader puts the real ones in their place. */
#define STEER_MAP_SOCKETS 0x57ee0001
#define STEER_MAP_TABLE 0x57ee0002
#define STEER_MAP_COUNTS 0x57ee0003
#define STEER_MAP_CPUS 0x57ee0004

#define STEER_ENTRIES 65536 /* positions in the table */
#define STEER_TURNS 32768 /* room for rows */
#define STEER_SPARES 256 /* live slots to try when the chosen one fails */
#define STEER_TRIES 4
#define STEER_ROW 0x8000 /* in an entry: not a slot, but where its row starts in turns */

/*
 * An entry is a slot, or a row of slots that are taken in turn. A row is its
 * length and then its slots. All numbers fit 16 bits, so that what is in use
 * stays in few cache lines.
 */
struct steer_half {
	u32 length; /* entries that steer_spread() spreads over */
	u32 reserved;
	u16 entries[STEER_ENTRIES];
	u16 turns[STEER_TURNS];
	u16 spares[STEER_SPARES];
};

/* Two halves, one active: the controller fills the other, then flips. */
struct steer_table {
	u32 active;
	u32 reserved;
	struct steer_half halves[2];
};

/* Per slot and CPU. */
struct steer_count {
	u64 selected; /* connections (UDP: datagrams) sent to the slot */
	u64 fallback; /* those of them that had been meant for a slot that was gone */
	u64 migrated; /* those of them taken over from a closing listener */
};

/* Per CPU. */
struct steer_cpu {
	u32 turn;
	u32 turn_ack;
	u32 random; /* never 0 */
	u32 reserved;
	u64 unsteered; /* no live slot found: left to the kernel's hash */
};

/* Stand-in `map` as a pointer that bcc puts into the bytecode as it stands. */
#define steer_map(map) ((void *)bpf_pseudo_fd(BPF_PSEUDO_MAP_FD, map))

/* A position for any 32-bit number, evenly over the table. */
static __always_inline u32 steer_spread(const struct steer_half *table, u32 number)
{
	return (u64)number * table->length >> 32;
}

/* The half in use. Its address is part of the program, so there is no look-up to pay for. */
static __always_inline const struct steer_half *steer_active(void)
{
	struct steer_table *table = (void *)bpf_pseudo_fd(BPF_PSEUDO_MAP_VALUE, STEER_MAP_TABLE);

	return &table->halves[table->active & 1];
}

static __always_inline struct steer_cpu *steer_this_cpu(void)
{
	u32 zero = 0;

	return bpf_map_lookup_elem_((uintptr_t)steer_map(STEER_MAP_CPUS), &zero);
}

/*
 * A lone ACK reaches a listener when it answers a SYN cookie, after the program
 * has already run for the SYN; or it is late, and its connection gone. Turns
 * taken by SYNs and by such ACKs are counted apart: with one counter and an even
 * number of workers every connection would end on the same half of them.
 */
static __always_inline bool steer_is_ack(const struct sk_reuseport_md *ctx)
{
	const u8 *header = ctx->data;

	if (ctx->ip_protocol != 6 /* TCP */ || header + 14 > (const u8 *)ctx->data_end)
		return false;
	return !(header[13] & 0x02 /* SYN */);
}

/* The next slot of a row. Each CPU takes its own turns, so none ever waits or races. */
static __always_inline u32 steer_turn(const struct sk_reuseport_md *ctx,
				      const struct steer_half *table, u32 row)
{
	u32 length = table->turns[row & (STEER_TURNS - 1)], turn = 0, *next;
	struct steer_cpu *cpu = steer_this_cpu();

	if (cpu) {
		next = steer_is_ack(ctx) ? &cpu->turn_ack : &cpu->turn;
		if (*next < length)
			turn = *next;
		*next = turn + 1;
	}
	return table->turns[(row + 1 + turn) & (STEER_TURNS - 1)];
}

static __always_inline u32 steer_slot(const struct sk_reuseport_md *ctx,
				      const struct steer_half *table, u32 position)
{
	u32 entry = table->entries[position & (STEER_ENTRIES - 1)];

	return entry & STEER_ROW ? steer_turn(ctx, table, entry) : entry;
}

/* Chance, for policies: xorshift32 (Marsaglia 2003), at a third of the helper's cost. */
static __always_inline u32 steer_random(void)
{
	struct steer_cpu *cpu = steer_this_cpu();
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

static __always_inline bool steer_select(struct sk_reuseport_md *ctx, u32 slot, bool fallback,
					 bool migrating)
{
	struct steer_count *count;

	if (bpf_sk_select_reuseport(ctx, steer_map(STEER_MAP_SOCKETS), &slot, 0))
		return false;
	/*
	 * A connection is counted once, by its SYN, and what is late not at all. Once more
	 * where it migrates: half-open ones do with the ACK that ends their handshake.
	 */
	if (!migrating && steer_is_ack(ctx))
		return true;
	count = bpf_map_lookup_elem_((uintptr_t)steer_map(STEER_MAP_COUNTS), &slot);
	if (count) {
		count->selected++;
		if (fallback)
			count->fallback++;
		if (migrating)
			count->migrated++;
	}
	return true;
}

/* SK_PASS with nothing selected leaves the choice to the kernel's hash. */
static __always_inline int steer_deliver(struct sk_reuseport_md *ctx,
					 const struct steer_half *table, u32 position,
					 bool migrating)
{
	struct steer_cpu *cpu;
	u32 i;

	if (steer_select(ctx, steer_slot(ctx, table, position), false, migrating))
		return SK_PASS;
#pragma unroll
	for (i = 0; i < STEER_TRIES; i++)
		if (steer_select(ctx, table->spares[(ctx->hash + i) & (STEER_SPARES - 1)], true,
				 migrating))
			return SK_PASS;
	cpu = steer_this_cpu();
	if (cpu && !steer_is_ack(ctx))
		cpu->unsteered++;
	return SK_PASS;
}

/*
 * Have `value` read by now. The compiler may else choose between two addresses and then
 * read, and the verifier takes no context at an address that was chosen.
 */
#define steer_settle(value) asm volatile("" : "+r"(value))

/*
 * Two programs from one policy: steer_migrate is also asked where the queue of a
 * closing listener goes (Linux 5.14+); steer_plain is for kernels that never ask.
 *
 * A connection that migrates has no packet, and the CPU is that of whoever closed the
 * listener: its hash is the position then, or a whole queue would land on one worker.
 */
#define STEER_POLICY(ctx, table)                                                                   \
	static __always_inline u32 steer_policy(struct sk_reuseport_md *ctx,                       \
						const struct steer_half *table);                   \
	int steer_plain(struct sk_reuseport_md *ctx)                                               \
	{                                                                                          \
		const struct steer_half *half = steer_active();                                    \
                                                                                                   \
		return steer_deliver(ctx, half, steer_policy(ctx, half), false);                   \
	}                                                                                          \
	int steer_migrate(struct sk_reuseport_md *ctx)                                             \
	{                                                                                          \
		const struct steer_half *half = steer_active();                                    \
		bool migrating = ctx->migrating_sk != NULL;                                        \
		u32 hash = ctx->hash;                                                              \
                                                                                                   \
		steer_settle(hash);                                                                \
		return steer_deliver(                                                              \
			ctx, half, migrating ? steer_spread(half, hash) : steer_policy(ctx, half), \
			migrating);                                                                \
	}                                                                                          \
	static __always_inline u32 steer_policy(struct sk_reuseport_md *ctx,                       \
						const struct steer_half *table)

#endif
