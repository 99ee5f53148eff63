/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * least-conn - the worker with the fewest open connections for its weight.
 *
 * Ties go in turn, so light load spreads evenly. A handshake counts as soon as it is sent
 * somewhere: those of a burst, of which none has ended yet, do not all go to one worker.
 * Up to 64 workers are all looked at; of more only eight, next to two places taken by
 * chance (the power of two choices: Mitzenmacher 2001, with neighbours, as they cost
 * little).
 *
 * For requests that differ in what they cost, and workers that do one thing at a time.
 * Connections are what is counted: where each carries many requests, how many are under
 * way is not seen. Datagrams are no connections: over UDP all are ties.
 */
#define steer_position(ctx, table, migrating, hash) steer_policy(ctx, table)
#include "steer.h"

STEER_TABLE(deck)

#define ALL 64
#define PLACES 2
#define NEIGHBOURS 4
#define LOOK 63u /* in a score: the look that it is of, for which there are the lowest bits */
#define LOOK_BITS 6
#define NONE ((u64)1 << 62)
#define NEVER 0x8000 /* seconds from now: no handshake began in that or the one before */

/*
 * Of two looks the lower: the fewer connections, and among ties the one that comes first.
 * There is no branch in it, as the verifier would follow each of 64 both ways.
 */
static __always_inline u64 lower(u64 best, const struct steer_half *table, u64 position,
				 u64 look, u64 second)
{
	u64 slot = table->entries[position & (STEER_ENTRIES - 1)];
	u64 score = steer_load(slot, second) * table->turns[position & (STEER_TURNS - 1)];
	s64 less = (score << LOOK_BITS | look) - best, mask = less >> 63;

	steer_settle(mask);
	return best + (less & mask);
}

static __always_inline u32 of_all(const struct steer_half *table, u32 is_ack, u64 second)
{
	struct steer_cpu *cpu = steer_this_cpu();
	u64 deck = table->deck, turn, best = NONE, i;
	u32 *next;

	if (!cpu)
		return 0;
	next = &cpu->turn + is_ack; /* turn_ack comes next */
	turn = *next;
	if (turn >= deck)
		turn -= deck;
	if (turn >= deck) /* there were more */
		turn = 0;
	/* No fewer than none. */
	for (i = 0; i < ALL && i < deck && best > LOOK; i++)
		best = lower(best, table, turn + i, i, second);
	turn += best & LOOK;
	*next = turn + 1;
	return turn;
}

static __always_inline u32 of_some(const struct steer_half *table, u64 second)
{
	u64 best = NONE, look, places[PLACES];

#pragma unroll
	for (look = 0; look < PLACES; look++)
		places[look] = (u64)steer_random() * table->deck >> 32;
#pragma unroll
	for (look = 0; look < PLACES * NEIGHBOURS; look++)
		best = lower(best, table, places[look / NEIGHBOURS] + look % NEIGHBOURS, look,
			     second);
	look = best & (PLACES * NEIGHBOURS - 1);
	return (look < NEIGHBOURS ? places[0] : places[1]) + look % NEIGHBOURS;
}

STEER_POLICY(ctx, table)
{
	u32 now = steer_second(), is_ack = steer_is_ack(ctx), position;
	/* It answers a SYN cookie: no handshake was ever under way where its SYN was sent. */
	u64 second = (u64)now + is_ack * NEVER;

	position = table->deck <= ALL ? of_all(table, is_ack, second) : of_some(table, second);
	if (steer_is_syn(ctx))
		steer_expect(table->entries[position & (STEER_ENTRIES - 1)], now);
	return position;
}
