/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * source - a worker by the client's address, whatever its port.
 *
 * Hashes the address, or only the prefix that the parameters specify. The table is the same as
 * for `hash`: if a worker leaves, only its clients move to other workers. Weights are respected.
 *
 * For workers that keep state for each client: sessions, caches, limits.
 *
 * Not for unequal loads: load is ignored. Clients behind the same proxy or NAT share an address,
 * so they all go to one worker.
 */
#define steer_position(ctx, table, migrating, hash) \
	(migrating ? spread_socket(table, migrating) : steer_policy(ctx, table))
#include "steer.h"

STEER_TABLE(consistent)
STEER_PARAM(prefix4, 32, 0, 32, "length of the IPv4 prefix that identifies a client")
STEER_PARAM(prefix6, 64, 0, 128, "length of the IPv6 prefix that identifies a client")

/*
 * The 64-bit finalizer of MurmurHash3 (Appleby): each bit of the input affects half of the
 * output. The 32-bit one needs two more instructions after each step.
 */
static __always_inline u64 mix(u64 number)
{
	number ^= number >> 33;
	number *= 0xff51afd7ed558ccd;
	number ^= number >> 33;
	number *= 0xc4ceb9fe1a85ec53;
	return number ^ number >> 33;
}

/* The first `bits` of a number of 64. */
static __always_inline u64 take_prefix(u64 part, s32 bits)
{
	if (bits <= 0)
		return 0;
	return bits < 64 ? part >> (64 - bits) : part;
}

static __always_inline u32 spread_ipv4(const struct steer_view *table, u32 address)
{
	u64 bits = (u64)__builtin_bswap32(address) >> (32 - steer_param(prefix4));

	return steer_spread(table, mix((u64)steer_get_params()->seed << 32 | bits) >> 32);
}

static __always_inline u32 spread_ipv6(const struct steer_view *table, const u64 *address)
{
	s32 bits = steer_param(prefix6);
	u64 number =
		mix(steer_get_params()->seed ^ take_prefix(__builtin_bswap64(address[0]), bits));

	number = mix(number ^ take_prefix(__builtin_bswap64(address[1]), bits - 64));
	return steer_spread(table, number >> 32);
}

/* For a migrating connection there is no packet to read, so take the address from the socket. */
static __always_inline u32 spread_socket(const struct steer_view *table, struct bpf_sock *sk)
{
	u64 address[2];

	if (sk->family == 2 /* AF_INET */)
		return spread_ipv4(table, sk->dst_ip4);
	address[0] = sk->dst_ip6[0] | (u64)sk->dst_ip6[1] << 32;
	address[1] = sk->dst_ip6[2] | (u64)sk->dst_ip6[3] << 32;
	if (!address[0] && (u32)address[1] == __builtin_bswap32(0xffff))
		return spread_ipv4(table, address[1] >> 32); /* ::ffff:a.b.c.d */
	return spread_ipv6(table, address);
}

STEER_POLICY(ctx, table)
{
	u64 address[2];
	u32 address4;

	/* If the packet cannot be read, the helper fills the address with 0. */
	if (ctx->eth_protocol == STEER_IPV4) {
		steer_read_ip(ctx, 12, &address4, sizeof(address4));
		return spread_ipv4(table, address4);
	}
	steer_read_ip(ctx, 8, address, sizeof(address));
	return spread_ipv6(table, address);
}
