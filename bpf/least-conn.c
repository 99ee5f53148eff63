/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * least-conn - the worker with the fewest open connections for its weight.
 *
 * Connections divided by weight decide. Equal idle workers take turns, so that light load is
 * spread evenly. Equal busy workers also take turns if connections take about the same time. If
 * some take much longer than others, the worker that got its last connection most recently is
 * selected: one that got none for longer is probably busy with a long one.
 *
 * A handshake counts as soon as a worker is selected for it, so that a burst of handshakes does
 * not all go to one worker. With up to 64 workers all are compared. With more, the policy
 * compares eight: four neighbours at each of two random places (the power of two choices,
 * Mitzenmacher 2001; neighbours are added as they are cheap).
 *
 * For requests that differ in cost, and for workers that handle one request at a time.
 *
 * Not for connections that carry many concurrent requests, as only connections are counted. Over
 * UDP no connections exist, so all workers are equal.
 */
#define steer_position(ctx, table, migrating, hash) steer_policy(ctx, table)
#include "steer.h"

STEER_TABLE(ring)

#define SCAN_MAX 64
#define NEIGHBOURS 4 /* compared at once; past its end the ring repeats, so some may be the same */
#define SAMPLES 2
#define INDEX 63u /* lowest bits of a score: index of the candidate */
#define AGE 0x3fffu /* the bits above: how many connections ago it was last selected */
#define INDEX_BITS 6
#define AGE_BITS 14
#define NONE ((u64)1 << 62)

/*
 * In a ring, `turns` has no rows but a 32-bit word for each position. The lower half is the
 * slot, as an offset into the loads. The upper half is its scale, the inverse of its weight. So
 * one load gives both, and neither needs a shift.
 */
#define OFFSET ((STEER_SLOTS - 1) * sizeof(u32))
#define SCALE ((u64)0xffff << 16)
#define WORDS (STEER_TURNS / 2)

static __always_inline const u32 *get_words(const struct steer_view *table, u64 position)
{
	return (const u32 *)table->layout->turns + (position & (WORDS - 1));
}

/*
 * The score of a candidate, most significant part first: connections divided by weight, how long
 * ago it was selected, its index. The lowest score wins.
 *
 * Args: counts: connections of each slot.
 *       varied: whether equal busy workers are compared by when they were last selected.
 *       selected: handshakes so far, if `varied`.
 */
static __always_inline u64 compute_score(const u32 *counts, u64 word, u64 index, bool varied,
					 u64 selected)
{
	u64 count = *(const u32 *)((const void *)counts + (word & OFFSET)), age, busy, last;

	if (!varied)
		return count * (word & SCALE) | index;
	steer_barrier(count);
	busy = -count >> 63;
	steer_barrier(busy);
	last = steer_get_slot_state((word & OFFSET) / sizeof(u32))->last_selected;
	age = (selected - last & AGE) & busy;
	return (count * (word & SCALE)) << (INDEX_BITS + AGE_BITS - 16) | age << INDEX_BITS | index;
}

/* No branch, as the verifier would follow each of 64 both ways. */
static __always_inline u64 min_score(u64 one, u64 other)
{
	s64 less = one - other;
	u64 is_less = less >> 63;

	steer_barrier(is_less);
	return other + (less & is_less);
}

/* The lowest score of four adjacent candidates. The two pairs are independent for the CPU. */
static __always_inline u64 scan_four(const u32 *counts, const u32 *words, bool varied, u64 selected)
{
	u64 first = min_score(compute_score(counts, words[0], 0, varied, selected),
			      compute_score(counts, words[1], 1, varied, selected));
	u64 second = min_score(compute_score(counts, words[2], 2, varied, selected),
			       compute_score(counts, words[3], 3, varied, selected));

	return min_score(first, second);
}

/* The lowest score of eight, which is one step of scan_all(). */
static __always_inline u64 scan_eight(const u32 *counts, const u32 *words, bool varied,
				      u64 selected)
{
	return min_score(scan_four(counts, words, varied, selected),
			 scan_four(counts, words + NEIGHBOURS, varied, selected) | NEIGHBOURS);
}

/* The position with the lowest score, from `turn` on. An idle worker ends it: none is lower. */
static __always_inline u64 scan_all(const struct steer_view *table, const u32 *counts, u64 turn,
				    bool varied, u64 selected)
{
	u64 best = NONE, i;

#pragma clang loop unroll(disable)
	for (i = 0; i < SCAN_MAX && i < table->ring && best > INDEX; i += 2 * NEIGHBOURS)
		best = min_score(
			scan_eight(counts, get_words(table, turn + i), varied, selected) | i, best);
	return turn + (best & INDEX);
}

/* The position with the lowest score among four neighbours at each of two random places. */
static __always_inline u64 sample_two(const struct steer_view *table, const u32 *counts,
				      u64 selected)
{
	u64 starts[SAMPLES], best[SAMPLES], i, first;

#pragma unroll
	for (i = 0; i < SAMPLES; i++) {
		starts[i] = (u64)steer_random() * table->ring >> 32;
		best[i] = scan_four(counts, get_words(table, starts[i]), true, selected) |
			  i * NEIGHBOURS;
	}
	first = min_score(best[0], best[1]) & INDEX;
	return (first < NEIGHBOURS ? starts[0] : starts[1]) + first % NEIGHBOURS;
}

static __always_inline u32 *get_turn(struct steer_cpu *cpu, u32 is_ack, u64 ring)
{
	u32 *turn = (u32 *)&cpu->turns + is_ack;

	if (*turn >= ring)
		*turn -= ring;
	if (*turn >= ring) /* the ring has become shorter */
		*turn = 0;
	return turn;
}

/*
 * Refresh the load of one slot at each selection. The position is read back from memory, as
 * without CAP_PERFMON the verifier rejects an index that is a constant on only one path.
 */
static __always_inline void refresh_next(const struct steer_view *table)
{
	volatile u32 *refreshed = &steer_get_pace()->refreshed;

	*refreshed = *refreshed + 1 < table->ring ? *refreshed + 1 : 0;
	steer_refresh_load(table->entries[*refreshed & (STEER_ENTRIES - 1)]);
}

STEER_POLICY(ctx, table)
{
	u32 segment = steer_get_segment(ctx, table), is_ack = segment & STEER_ACK, *turn;
	const struct steer_pace *pace = steer_get_pace();
	struct steer_cpu *cpu = steer_get_cpu();
	const u32 *counts = steer_get_loads()->load;
	u64 position;

	if (!cpu)
		return steer_spread(table, ctx->hash);
	/* An ACK that answers a SYN cookie: no handshake of it is in progress, so compare `open`. */
	counts += is_ack * STEER_SLOTS;
	if (table->ring <= SCAN_MAX) {
		turn = get_turn(cpu, is_ack, table->ring);
		position = pace->varied ? scan_all(table, counts, *turn, true, pace->selected)
					: scan_all(table, counts, *turn, false, 0);
		*turn = position + 1;
	} else {
		position = sample_two(table, counts, pace->selected);
	}
	if (segment & STEER_SYN) {
		refresh_next(table);
		steer_add_handshake(table->entries[position & (STEER_ENTRIES - 1)]);
	}
	return position;
}
