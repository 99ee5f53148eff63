/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * least-conn - the worker with the fewest open connections for its weight.
 *
 * Ties of the idle go in turn, so light load spreads evenly; so do those of the busy, if
 * connections take about the same time. If some take much longer than others, they go to
 * whoever was given one last: who was given none since is likely to be at a long one.
 *
 * A handshake counts as soon as it is sent
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
#define LOOK 63u /* in a score, the lowest bits: the look that it is of */
#define AGO 0x3fffu /* the next ones: how many connections ago it was given one */
#define LOOK_BITS 6
#define TIE_BITS 20
#define NONE ((u64)1 << 62)
#define NEVER 0x8000 /* seconds from now: no handshake began in that or the one before */

/* What all looks at once have in common. */
struct now {
	u64 second;
	u64 given;
	u64 ago; /* AGO if ties among the busy go to whoever was given one last, else 0 */
};

/*
 * Of two looks the lower: the fewer connections, and among ties the one that comes first.
 * There is no branch in it, as the verifier would follow each of 64 both ways.
 */
static __always_inline u64 lower(u64 best, const struct steer_half *table, u64 position,
				 u64 look, const struct now *now)
{
	u64 slot = table->entries[position & (STEER_ENTRIES - 1)];
	u64 ago = now->given - steer_slot_at(slot)->given & now->ago;
	u64 load = steer_load(slot, now->second), busy, score;
	s64 less;

	busy = -load >> 63;
	steer_settle(busy);
	score = load * table->turns[position & (STEER_TURNS - 1)] << TIE_BITS;
	less = (score | ago * busy << LOOK_BITS | look) - best;
	busy = less >> 63;
	steer_settle(busy);
	return best + (less & busy);
}

static __always_inline u32 of_all(const struct steer_half *table, u32 is_ack,
				  const struct now *now)
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
		best = lower(best, table, turn + i, i, now);
	turn += best & LOOK;
	*next = turn + 1;
	return turn;
}

static __always_inline u32 of_some(const struct steer_half *table, const struct now *now)
{
	u64 best = NONE, look, places[PLACES];

#pragma unroll
	for (look = 0; look < PLACES; look++)
		places[look] = (u64)steer_random() * table->deck >> 32;
#pragma unroll
	for (look = 0; look < PLACES * NEIGHBOURS; look++)
		best = lower(best, table, places[look / NEIGHBOURS] + look % NEIGHBOURS, look, now);
	look = best & (PLACES * NEIGHBOURS - 1);
	return (look < NEIGHBOURS ? places[0] : places[1]) + look % NEIGHBOURS;
}

STEER_POLICY(ctx, table)
{
	u32 second = steer_second(), is_ack = steer_is_ack(ctx), position;
	const struct steer_pace *pace = steer_pace();
	/* It answers a SYN cookie: no handshake was ever under way where its SYN was sent. */
	struct now now = {(u64)second + is_ack * NEVER, pace->given, -pace->varied & AGO};

	position = table->deck <= ALL ? of_all(table, is_ack, &now) : of_some(table, &now);
	if (steer_is_syn(ctx))
		steer_expect(table->entries[position & (STEER_ENTRIES - 1)], second);
	return position;
}
