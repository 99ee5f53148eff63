/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * least-conn - the worker with the fewest open connections for its weight.
 *
 * Ties of the idle go in turn, so light load spreads evenly; so do those of the busy, if
 * connections take about the same time. If some take much longer than others, they go to
 * whoever was given one last: who was given none since is likely to be at a long one.
 *
 * A handshake counts as soon as it is sent somewhere: those of a burst, of which none has
 * ended yet, do not all go to one worker. Up to 64 workers are all looked at; of more only
 * eight, next to two places taken by chance (the power of two choices: Mitzenmacher 2001,
 * with neighbours, as they cost little).
 *
 * For requests that differ in what they cost, and workers that do one thing at a time.
 * Connections are what is counted: where each carries many requests, how many are under
 * way is not seen. Datagrams are no connections: over UDP all are ties.
 */
#define steer_position(ctx, table, migrating, hash) steer_policy(ctx, table)
#include "steer.h"

STEER_TABLE(deck)

#define ALL 64
#define NEIGHBOURS 4 /* looks at once; the deck is laid on and on, so some may be of the same */
#define PLACES 2
#define LOOK 63u /* in a score, the lowest bits: the look that it is of */
#define AGO 0x3fffu /* the next ones: how many connections ago it was given one */
#define LOOK_BITS 6
#define AGO_BITS 14
#define NONE ((u64)1 << 62)

/*
 * In a deck there is a word for each position where rows would be: the slot, as an offset into
 * the loads, and in the upper half its scale, the inverse of its weight. One load tells both,
 * and neither has to be shifted.
 */
#define OFFSET ((STEER_SLOTS - 1) * sizeof(u32))
#define SCALE ((u64)0xffff << 16)
#define WORDS (STEER_TURNS / 2)

static __always_inline const u32 *words_at(const struct steer_half *table, u64 position)
{
	return (const u32 *)table->layout->turns + (position & (WORDS - 1));
}

/*
 * Connections for the weight, then how long ago it was given one, then the look: the lowest wins.
 *
 * Args: counts: of each slot.
 *       given: connections so far, if ties of the busy go to whoever was given one last.
 */
static __always_inline u64 score(const u32 *counts, u64 word, u64 look, bool varied, u64 given)
{
	u64 count = *(const u32 *)((const void *)counts + (word & OFFSET)), ago, busy;

	if (!varied)
		return count * (word & SCALE) | look;
	steer_settle(count);
	busy = -count >> 63;
	steer_settle(busy);
	ago = (given - steer_slot_at((word & OFFSET) / sizeof(u32))->given & AGO) & busy;
	return (count * (word & SCALE)) << (LOOK_BITS + AGO_BITS - 16) | ago << LOOK_BITS | look;
}

/* There is no branch in it, as the verifier would follow each of 64 both ways. */
static __always_inline u64 lower(u64 one, u64 other)
{
	s64 less = one - other;
	u64 is_less = less >> 63;

	steer_settle(is_less);
	return other + (less & is_less);
}

/* The lowest of four looks next to each other. In pairs, as no pair waits for another. */
static __always_inline u64 lowest(const u32 *counts, const u32 *words, bool varied, u64 given)
{
	u64 first = lower(score(counts, words[0], 0, varied, given),
			  score(counts, words[1], 1, varied, given));
	u64 second = lower(score(counts, words[2], 2, varied, given),
			   score(counts, words[3], 3, varied, given));

	return lower(first, second);
}

/* Of twice as many, before it is asked whether to go on. */
static __always_inline u64 lowest_of_both(const u32 *counts, const u32 *words, bool varied,
					  u64 given)
{
	return lower(lowest(counts, words, varied, given),
		     lowest(counts, words + NEIGHBOURS, varied, given) | NEIGHBOURS);
}

/* From the turn on. No fewer than none: then the rest is not looked at. */
static __always_inline u64 of_all(const struct steer_half *table, const u32 *counts, u64 turn,
				  bool varied, u64 given)
{
	u64 best = NONE, i;

#pragma clang loop unroll(disable)
	for (i = 0; i < ALL && i < table->deck && best > LOOK; i += 2 * NEIGHBOURS)
		best = lower(lowest_of_both(counts, words_at(table, turn + i), varied, given) | i,
			     best);
	return turn + (best & LOOK);
}

static __always_inline u64 of_some(const struct steer_half *table, const u32 *counts, u64 given)
{
	u64 places[PLACES], best[PLACES], i, first;

#pragma unroll
	for (i = 0; i < PLACES; i++) {
		places[i] = (u64)steer_random() * table->deck >> 32;
		best[i] = lowest(counts, words_at(table, places[i]), true, given) | i * NEIGHBOURS;
	}
	first = lower(best[0], best[1]) & LOOK;
	return (first < NEIGHBOURS ? places[0] : places[1]) + first % NEIGHBOURS;
}

static __always_inline u32 *turn_of(struct steer_cpu *cpu, u32 is_ack, u64 deck)
{
	u32 *turn = (u32 *)&cpu->turns + is_ack;

	if (*turn >= deck)
		*turn -= deck;
	if (*turn >= deck) /* there were more */
		*turn = 0;
	return turn;
}

/*
 * One slot at each choice is looked after. The position is read back, as without
 * CAP_PERFMON the verifier takes no index that is a constant on one way and none on another.
 */
static __always_inline void tend(const struct steer_half *table)
{
	volatile u32 *tended = &steer_pace()->tended;

	*tended = *tended + 1 < table->deck ? *tended + 1 : 0;
	steer_tend(table->entries[*tended & (STEER_ENTRIES - 1)]);
}

STEER_POLICY(ctx, table)
{
	u32 segment = steer_segment_of(ctx, table), is_ack = segment & STEER_ACK, *turn;
	const struct steer_pace *pace = steer_pace();
	struct steer_cpu *cpu = steer_this_cpu();
	const u32 *counts = steer_loads()->load;
	u64 position;

	if (!cpu)
		return steer_spread(table, ctx->hash);
	/* It answers a SYN cookie: no handshake was ever under way where its SYN was sent. */
	counts += is_ack * STEER_SLOTS;
	if (table->deck <= ALL) {
		turn = turn_of(cpu, is_ack, table->deck);
		position = pace->varied ? of_all(table, counts, *turn, true, pace->given)
					: of_all(table, counts, *turn, false, 0);
		*turn = position + 1;
	} else {
		position = of_some(table, counts, pace->given);
	}
	if (segment & STEER_SYN) {
		tend(table);
		steer_expect(table->entries[position & (STEER_ENTRIES - 1)]);
	}
	return position;
}
