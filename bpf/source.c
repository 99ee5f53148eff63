/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * source - a client's address keeps its worker, whatever its ports.
 *
 * The number is made of as many bits of the address as the parameters say. The table is
 * that of `hash`: when a worker goes only its clients move, and weights are honoured.
 * For workers that remember something of their clients: sessions, caches, limits.
 *
 * Blind to load. Clients behind one address, of a proxy or a carrier's NAT, all go to one
 * worker.
 */
#define steer_position(ctx, table, migrating, hash) \
	(migrating ? of_socket(table, migrating) : steer_policy(ctx, table))
#include "steer.h"

STEER_TABLE(consistent)
STEER_PARAM(prefix4, 32, 0, 32, "bits of an IPv4 address that make a source")
STEER_PARAM(prefix6, 64, 0, 128, "bits of an IPv6 address that make a source")

/*
 * The finalizer of MurmurHash3 (Appleby) for 64 bits: every bit of the input changes half of the
 * output. Numbers of 32 bits take two more instructions after each step.
 */
static __always_inline u64 mixed(u64 number)
{
	number ^= number >> 33;
	number *= 0xff51afd7ed558ccd;
	number ^= number >> 33;
	number *= 0xc4ceb9fe1a85ec53;
	return number ^ number >> 33;
}

/* The first `bits`, of 64. */
static __always_inline u64 first(u64 half, s32 bits)
{
	if (bits <= 0)
		return 0;
	return bits < 64 ? half >> (64 - bits) : half;
}

static __always_inline u32 of_v4(const struct steer_half *table, u32 address)
{
	u64 bits = (u64)__builtin_bswap32(address) >> (32 - steer_param(prefix4));

	return steer_spread(table, mixed((u64)steer_params()->seed << 32 | bits) >> 32);
}

static __always_inline u32 of_v6(const struct steer_half *table, const u64 *address)
{
	s32 bits = steer_param(prefix6);
	u64 number = mixed(steer_params()->seed ^ first(__builtin_bswap64(address[0]), bits));

	number = mixed(number ^ first(__builtin_bswap64(address[1]), bits - 64));
	return steer_spread(table, number >> 32);
}

/* A connection that migrates: there is no packet to read. */
static __always_inline u32 of_socket(const struct steer_half *table, struct bpf_sock *sk)
{
	u64 address[2];

	if (sk->family == 2 /* AF_INET */)
		return of_v4(table, sk->dst_ip4);
	address[0] = sk->dst_ip6[0] | (u64)sk->dst_ip6[1] << 32;
	address[1] = sk->dst_ip6[2] | (u64)sk->dst_ip6[3] << 32;
	if (!address[0] && (u32)address[1] == __builtin_bswap32(0xffff))
		return of_v4(table, address[1] >> 32); /* ::ffff:a.b.c.d */
	return of_v6(table, address);
}

STEER_POLICY(ctx, table)
{
	u64 address[2];
	u32 address4;

	/* What cannot be read is filled with 0. */
	if (ctx->eth_protocol == STEER_IPV4) {
		steer_read_ip(ctx, 12, &address4, sizeof(address4));
		return of_v4(table, address4);
	}
	steer_read_ip(ctx, 8, address, sizeof(address));
	return of_v6(table, address);
}
