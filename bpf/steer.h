/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * steer.h - what every policy shares.
 *
 * A policy turns a connection into a position in the table. The table, which the
 * controller fills, turns the position into a slot, and the slot's socket gets the
 * connection. Weights, drains, reloads and CPU maps are all in how the table is
 * filled, so none of them is code here.
 *
 * A policy file is a head comment, what it declares, and one STEER_POLICY block:
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
#define STEER_MAP_SLOTS 0x57ee0005
#define STEER_MAP_PARAMS 0x57ee0006
#define STEER_MAP_OWN 0x57ee0007
#define STEER_MAP_FLOWS 0x57ee0008
#define STEER_MAP_OWNERS 0x57ee0009
#define STEER_MAP_LISTENERS 0x57ee000a
#define STEER_MAP_MOVED 0x57ee000b
#define STEER_MAP_EARLY 0x57ee000c

/* And for a number that the loader knows: the protocol of the group, as in IP headers. */
#define STEER_CONSTANT_PROTOCOL 0x57ee0100

#define STEER_SLOTS 8192
#define STEER_ENTRIES 65536 /* positions in the table */
#define STEER_TURNS 32768 /* room for rows */
#define STEER_SPARES 256 /* live slots to try when the chosen one fails */
#define STEER_TRIES 4
#define STEER_RESERVES 2
#define STEER_ROW 0x8000 /* in an entry: not a slot, but where its row starts in turns */
#define STEER_DECK_BIT 20 /* in the head of the table */
#define STEER_LENGTH_BIT 40
#define STEER_SLOT 0x80000000u /* in a position: a slot, whatever the table says */
#define STEER_VALUES 16 /* parameters, counters */
#define STEER_HISTOGRAMS 4
#define STEER_BUCKETS 32
#define STEER_IPV4 __builtin_bswap16(0x0800) /* sk_reuseport_md.eth_protocol */
#define STEER_TCP 6 /* in IP headers */
#define STEER_UDP 17
#define STEER_IPV6_BYTES 40 /* of its header */

/*
 * An entry is a slot, or a row of slots that are taken in turn. A row is its
 * length and then its slots. All numbers fit 16 bits, so that what is in use
 * stays in few cache lines.
 */
struct steer_layout {
	u32 length; /* entries that steer_spread() spreads over */
	u32 deck; /* entries until they begin anew, where a deck is laid */
	u16 entries[STEER_ENTRIES];
	u16 turns[STEER_TURNS];
	u16 spares[STEER_SPARES];
};

/*
 * Two halves, one active: the controller fills the other, then flips. The head says all of
 * the active one that a choice begins with, so that one load tells it: from bit
 * STEER_LENGTH_BIT on its length, below it from STEER_DECK_BIT on its deck, and below that
 * where it begins: 0 or the size of a layout.
 */
struct steer_table {
	u64 head;
	u32 early; /* 1 once there was an early lookup, see steer_tcp_at() */
	u32 reserved;
	struct steer_layout halves[2];
};

/* The active half as a policy sees it, from one look at the head. */
struct steer_half {
	u64 head;
	u32 length;
	u32 deck;
	const u16 *entries;
	const struct steer_layout *layout;
	bool is_plain; /* the packet is as most are, see steer_is_plain(); then: */
	u32 segment; /* what it is, see steer_segment() */
	u32 counts; /* 1 if it is to be counted: a datagram, or a SYN */
};

/* Per slot and CPU. */
struct steer_count {
	u64 selected; /* connections (UDP: datagrams) sent to the slot */
	u64 fallback; /* those of them that had been meant for a slot that was gone */
	u64 migrated; /* those of them taken over from a closing listener */
};

/* Per CPU. */
struct steer_cpu {
	u64 turns; /* the next: of SYNs, and from bit 32 on of lone ACKs */
	u32 random; /* never 0 */
	u32 reserved;
	u64 unsteered; /* no live slot found: left to the kernel's hash */
};

/* Per slot, of the service: all its groups and CPUs together. */
struct steer_slot {
	u32 pending; /* handshakes sent its way: the second, 16 bits, and how many since */
	u32 given; /* when a connection was last sent its way, in connections */
	u16 stamp; /* another for each worker that has the slot */
	u16 flows; /* another when flows known to be here are so no more */
	u32 reserved;
};

/* How long connections are open, the last hundred or so, in about microseconds. */
struct steer_pace {
	u64 mean; /* 128 times */
	u64 square; /* 128 times the mean square */
	u32 varied; /* 1 if some last much longer than others */
	u32 given; /* connections so far */
	u32 tended; /* the position whose slot was looked after last */
	u32 moved; /* connections that are known to be another worker's, see steer_moved() */
};

/* What is read of every slot again and again lies close together. */
struct steer_load {
	u32 load[STEER_SLOTS]; /* connections and handshakes, see steer_load() */
	u32 open[STEER_SLOTS]; /* connections that the worker has, or that wait for it */
	struct steer_slot slots[STEER_SLOTS];
	struct steer_pace pace;
};

/* Whose a connection is: of the worker that has the slot while it has that stamp. */
struct steer_owner {
	u16 slot;
	u16 stamp;
	u32 since; /* when it was opened, in about microseconds; 0 if it is not counted */
};

/* What tells a packet of TCP from others, for as long as it may come again. */
struct steer_packet {
	u32 client[4]; /* IPv4: the first */
	u32 ports;
	u32 sequence;
};

/* Where it went that was looked up early. */
struct steer_early {
	u32 slot;
	u32 seen; /* ticks */
};

struct steer_params {
	u32 ticks_per_s; /* of steer_ticks() */
	u32 second; /* so many bits of these are about a second */
	u32 seed; /* by chance: so that nobody outside can tell what goes where */
	u32 reserve; /* the first slot of the reserve: where what finds nobody waits */
	u32 values[STEER_VALUES];
};

/* Per CPU: what a policy counts for itself. */
struct steer_own {
	u64 counters[STEER_VALUES];
	u64 histograms[STEER_HISTOGRAMS][STEER_BUCKETS];
};

/*
 * What a policy declares. The controller reads it in the text of the file, and tells the
 * compiler where each value is.
 */
#define STEER_TABLE(kind) /* how the table is filled: consistent if not said */
#define STEER_PARAM(name, initial, least, most, help) /* a u32 that users set */
#define STEER_COUNTER(name, help)
#define STEER_HISTOGRAM(name, unit, help)

#define steer_param(name) steer_param_at(STEER_PARAM_##name)
#define steer_add(name, number) steer_add_at(STEER_COUNTER_##name, number)
#define steer_record(name, value) steer_record_at(STEER_HISTOGRAM_##name, value)

/*
 * Have `value` computed by now. The compiler may else choose between two addresses and then
 * read, and the verifier takes no context at an address that was chosen; or make a branch
 * of what is written without one.
 */
#define steer_settle(value) asm volatile("" : "+r"(value))

/* Stand-in `map` as a pointer that bcc puts into the bytecode as it stands. */
#define steer_map(map) ((void *)bpf_pseudo_fd(BPF_PSEUDO_MAP_FD, map))

/*
 * What ctx->ip_protocol is. As part of the program it costs nothing, and the verifier takes out
 * what is for another protocol; the field is read from the socket, in no cache near by.
 */
static __always_inline u64 steer_protocol(void)
{
	return bpf_pseudo_fd(0, STEER_CONSTANT_PROTOCOL);
}

/* A position for any 32-bit number, evenly over the table. */
static __always_inline u32 steer_spread(const struct steer_half *table, u32 number)
{
	return (u64)number * table->length >> 32;
}

/* Its address is part of the program, so there is no look-up to pay for. */
static __always_inline struct steer_table *steer_table(void)
{
	return (void *)bpf_pseudo_fd(BPF_PSEUDO_MAP_VALUE, STEER_MAP_TABLE);
}

/* The half in use. */
static __always_inline struct steer_half steer_active(void)
{
	const struct steer_table *table = steer_table();
	u64 head = table->head;
	const struct steer_layout *layout =
		(const void *)table->halves + (head & sizeof(struct steer_layout));

	return (struct steer_half){
		.head = head,
		.length = head >> STEER_LENGTH_BIT,
		.deck = head >> STEER_DECK_BIT & ((1 << (STEER_LENGTH_BIT - STEER_DECK_BIT)) - 1),
		.entries = layout->entries,
		.layout = layout,
	};
}

static __always_inline const struct steer_params *steer_params(void)
{
	return (void *)bpf_pseudo_fd(BPF_PSEUDO_MAP_VALUE, STEER_MAP_PARAMS);
}

static __always_inline u32 steer_param_at(u32 index)
{
	return steer_params()->values[index & (STEER_VALUES - 1)];
}

static __always_inline struct steer_own *steer_own(void)
{
	u32 zero = 0;

	return bpf_map_lookup_elem_((uintptr_t)steer_map(STEER_MAP_OWN), &zero);
}

static __always_inline void steer_add_at(u32 index, u64 number)
{
	struct steer_own *own = steer_own();

	if (own)
		own->counters[index & (STEER_VALUES - 1)] += number;
}

/* Into the bucket of all values with as many binary digits. */
static __always_inline void steer_record_at(u32 index, u32 value)
{
	struct steer_own *own = steer_own();
	u32 bucket = 0, bits;

#pragma unroll
	for (bits = 16; bits; bits >>= 1)
		if (value >> bits) {
			value >>= bits;
			bucket += bits;
		}
	bucket += value; /* 1, or 0 if it was 0 from the start */
	if (bucket > STEER_BUCKETS - 1)
		bucket = STEER_BUCKETS - 1;
	steer_settle(bucket); /* or the mask below goes, which is what the verifier understands */
	if (own)
		own->histograms[index & (STEER_HISTOGRAMS - 1)][bucket & (STEER_BUCKETS - 1)]++;
}

/* The kernel's clock, coarse but for nothing; it runs over. Linux 5.5+. */
static __always_inline u32 steer_ticks(void)
{
	return bpf_jiffies64();
}

/* Of the same clock, about seconds. */
static __always_inline u32 steer_second(void)
{
	return steer_ticks() >> (steer_params()->second & 31);
}

static __always_inline struct steer_load *steer_loads(void)
{
	return (void *)bpf_pseudo_fd(BPF_PSEUDO_MAP_VALUE, STEER_MAP_SLOTS);
}

static __always_inline struct steer_slot *steer_slot_at(u64 slot)
{
	return &steer_loads()->slots[slot & (STEER_SLOTS - 1)];
}

static __always_inline struct steer_pace *steer_pace(void)
{
	return &steer_loads()->pace;
}

/*
 * How much a slot has to do: its open connections, and the handshakes that were sent its
 * way and have not ended. Those that never do are forgotten after a second or two.
 */
static __always_inline u64 steer_load(u64 slot)
{
	return steer_loads()->load[slot & (STEER_SLOTS - 1)];
}

/* Connections were opened there, or closed. */
static __always_inline void steer_opened(u64 slot, s32 more, s32 load)
{
	__sync_fetch_and_add(&steer_loads()->open[slot & (STEER_SLOTS - 1)], more);
	if (load)
		__sync_fetch_and_add(&steer_loads()->load[slot & (STEER_SLOTS - 1)], load);
}

/* A handshake goes there. Not atomic: CPUs that do so at once may forget one. */
static __always_inline void steer_expect(u32 slot)
{
	struct steer_slot *at = steer_slot_at(slot);
	u32 second = steer_second(), pending = at->pending;

	at->given = ++steer_pace()->given;
	if ((second & 0xffff) != pending >> 16)
		pending = second << 16 | (pending & 0xffff);
	at->pending = pending + ((pending & 0xffff) < 0xffff);
	__sync_fetch_and_add(&steer_loads()->load[slot & (STEER_SLOTS - 1)], 1);
}

/*
 * Forget the handshakes of a slot if the last was sent there more than a second ago, and put
 * right what CPUs that wrote at once have got wrong. To be done of each slot now and then.
 */
static __always_inline void steer_tend(u32 slot)
{
	struct steer_slot *at = steer_slot_at(slot);
	u32 pending = at->pending, number = pending & 0xffff;
	s32 open;

	if (number && (u16)(steer_second() - (pending >> 16)) > 1) {
		at->pending = 0;
		number = 0;
	}
	slot &= STEER_SLOTS - 1;
	open = steer_loads()->open[slot];
	steer_loads()->load[slot] = (open < 0 ? 0 : open) + number;
}

/* A position for a slot that the policy knows by itself. */
static __always_inline u32 steer_to(u32 slot)
{
	return STEER_SLOT | slot;
}

static __always_inline struct steer_cpu *steer_this_cpu(void)
{
	u32 zero = 0;

	return bpf_map_lookup_elem_((uintptr_t)steer_map(STEER_MAP_CPUS), &zero);
}

/* The first bytes of an IP header, of version 4 or 6. */
struct steer_ip {
	u8 version; /* the high half; the low half: IPv4's length in words */
	u8 class;
	u16 total4; /* bytes */
	u16 payload6; /* bytes */
	u8 next6;
	u8 hops6;
};

/* The helpers take no const; they fail if so many bytes are not there. */
static __always_inline long steer_read(const struct sk_reuseport_md *ctx, u32 at, void *to,
				       u32 bytes)
{
	return bpf_skb_load_bytes((void *)ctx, at, to, bytes);
}

/* Args: at: in the IP header, wherever the data begin. */
static __always_inline long steer_read_ip(const struct sk_reuseport_md *ctx, u32 at, void *to,
					  u32 bytes)
{
	return bpf_skb_load_bytes_relative((void *)ctx, at, to, bytes, BPF_HDR_START_NET);
}

#define STEER_NOWHERE 0xffff /* no helper loads a byte from there */

/* The end of the IPv6 header and of at most two extension headers (RFC 8200, 4). */
static __always_inline u32 steer_behind_ipv6(const struct sk_reuseport_md *ctx, u8 next)
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
 * Where the TCP header begins in the data: at 0, except in an early lookup, by a rule of
 * netfilter, when the data begin with the IP header. `tproxy` hands the packet to the listener
 * that was chosen; `socket` only looks, and the packet comes again.
 *
 * The first byte of a TCP header, of the source port, may look like that of an IP header. The
 * length tells them apart: ctx->len is what the IP header says only if that is included.
 */
static __always_inline u32 steer_tcp_at(const struct sk_reuseport_md *ctx)
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
	return steer_behind_ipv6(ctx, ip.next6);
}

/*
 * What a segment is. A lone ACK reaches a listener when it answers a SYN cookie, after the
 * program has already run for the SYN; or it is late, and its connection gone. Turns taken
 * by SYNs and by such ACKs are counted apart: with one counter and an even number of workers
 * every connection would end on the same half of them.
 */
#define STEER_NONE 0 /* not TCP, or no packet, as where a connection migrates */
#define STEER_ACK 1 /* anything but a SYN */
#define STEER_SYN 2 /* as in the flags of the header */

/* Args: at: where the TCP header begins, see steer_tcp_at(). */
static __always_inline u32 steer_segment_at(const struct sk_reuseport_md *ctx, u32 at)
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
	/* Without a branch, as the verifier would follow all that comes both ways. */
	return (flags & STEER_SYN) | ((flags & STEER_SYN) >> 1 ^ STEER_ACK);
}

static __always_inline u32 steer_segment(const struct sk_reuseport_md *ctx)
{
	return steer_segment_at(ctx, steer_tcp_at(ctx));
}

static __always_inline u32 steer_is_ack(const struct sk_reuseport_md *ctx)
{
	return steer_segment(ctx) & STEER_ACK;
}

static __always_inline bool steer_is_syn(const struct sk_reuseport_md *ctx)
{
	return steer_segment(ctx) & STEER_SYN;
}

/* The next slot of a row. Each CPU takes its own turns, so none ever waits or races. */
static __always_inline u32 steer_turn(const struct steer_half *table, u32 row, u32 is_ack)
{
	const u16 *turns = table->layout->turns;
	u32 length = turns[row & (STEER_TURNS - 1)], turn = 0;
	struct steer_cpu *cpu = steer_this_cpu();

	if (cpu) {
		/*
		 * Not a pointer to one of the two, as without CAP_PERFMON none may be computed;
		 * nor a branch, as the verifier would follow all that comes both ways.
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

/* What stands there: a slot, or a row. */
static __always_inline u32 steer_entry(const struct steer_half *table, u32 position)
{
	u64 at = position;
	u32 slot = position & ~STEER_SLOT;

	if (position & STEER_SLOT)
		return slot < STEER_ROW ? slot : STEER_ROW - 1 /* that there is none, too */;
	/*
	 * Without CAP_PERFMON the verifier takes a number that is added to a pointer only if it knows
	 * as much of it by every way there. By one it may be a constant, or below the number of CPUs,
	 * and by another, where a connection migrates, any: so here it is to know nothing.
	 */
	at ^= table->head;
	steer_settle(at);
	return table->layout->entries[(at ^ table->head) & (STEER_ENTRIES - 1)];
}

static __always_inline u32 steer_slot_of(const struct steer_half *table, u32 position, u32 is_ack)
{
	u32 entry = steer_entry(table, position);

	return entry & STEER_ROW ? steer_turn(table, entry, is_ack) : entry;
}

static __always_inline u32 steer_slot(const struct sk_reuseport_md *ctx,
				      const struct steer_half *table, u32 position)
{
	return steer_slot_of(table, position, steer_is_ack(ctx));
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

/* bcc's own declaration has but 32 bits. */
static u64 (*steer_cookie)(void *) = (void *)BPF_FUNC_get_socket_cookie;

/* Whether a connection is open: the worker has it, or is to get it, and has not closed it. */
static __always_inline bool steer_is_open(u32 state)
{
	return state == BPF_TCP_ESTABLISHED || state == BPF_TCP_CLOSE_WAIT;
}

static __always_inline void steer_counted(const struct steer_owner *owner, s32 more)
{
	if (steer_slot_at(owner->slot)->stamp == owner->stamp)
		steer_opened(owner->slot, more, more);
}

/*
 * A connection goes from the queue of one worker to another's: it is counted where it is.
 * What is written at the socket itself cannot be reached from here, so it stays in a map
 * until it is closed. One whose handshake has not ended is nobody's yet.
 */
static __always_inline void steer_moved(struct sk_reuseport_md *ctx, struct bpf_sock *connection,
					u32 slot)
{
	u64 listener, cookie;
	struct steer_owner *from, was, now = {.slot = slot};
	s32 more = 0;

	/* SYN_RECV is one of TCP Fast Open, which is counted; else it would be NEW_SYN_RECV. */
	if (!steer_is_open(connection->state) && connection->state != BPF_TCP_SYN_RECV)
		return;
	listener = steer_cookie(ctx->sk);
	from = bpf_map_lookup_elem_((uintptr_t)steer_map(STEER_MAP_LISTENERS), &listener);
	if (!from)
		return;
	was = *from;
	now.stamp = steer_slot_at(slot)->stamp;
	cookie = steer_cookie(connection);
	if (!bpf_map_lookup_elem_((uintptr_t)steer_map(STEER_MAP_MOVED), &cookie))
		more = 1;
	/* First, or whoever closes it on another CPU does not look. */
	__sync_fetch_and_add(&steer_pace()->moved, more);
	if (bpf_map_update_elem_((uintptr_t)steer_map(STEER_MAP_MOVED), &cookie, &now, BPF_ANY)) {
		__sync_fetch_and_add(&steer_pace()->moved, -more);
		return;
	}
	steer_counted(&was, -1);
	steer_counted(&now, 1);
}

/* bcc's own declaration has but 32 bits, which costs instructions to cut them out. */
static long (*steer_select_reuseport)(struct sk_reuseport_md *, void *, void *,
				      u64) = (void *)BPF_FUNC_sk_select_reuseport;

static __always_inline bool steer_select_at(struct sk_reuseport_md *ctx, u32 *slot)
{
	return steer_select_reuseport(ctx, steer_map(STEER_MAP_SOCKETS), slot, 0) == 0;
}

static __always_inline bool steer_select(struct sk_reuseport_md *ctx, u32 slot)
{
	return steer_select_at(ctx, &slot);
}

/* Returns false if it cannot be read. */
static __always_inline bool steer_know(const struct sk_reuseport_md *ctx, u32 at,
				       struct steer_packet *packet)
{
	if (steer_read(ctx, at, &packet->ports, 8))
		return false;
	if (ctx->eth_protocol == STEER_IPV4)
		return !steer_read_ip(ctx, 12, packet->client, 4);
	return !steer_read_ip(ctx, 8, packet->client, 16);
}

/*
 * A packet that was looked up early may come again, to be delivered or for another rule. It
 * goes to the same slot: it takes no other turn, and is not counted again. A client that is
 * not answered sends it again after about a second. By then it is forgotten.
 */
static __always_inline bool steer_again(struct sk_reuseport_md *ctx)
{
	struct steer_packet packet = {};
	struct steer_early *early;

	if (steer_protocol() != STEER_TCP || !steer_know(ctx, steer_tcp_at(ctx), &packet))
		return false;
	early = bpf_map_lookup_elem_((uintptr_t)steer_map(STEER_MAP_EARLY), &packet);
	return early && steer_ticks() - early->seen < steer_params()->ticks_per_s / 4 &&
	       steer_select(ctx, early->slot);
}

static __always_inline void steer_remember(const struct sk_reuseport_md *ctx, u32 at, u32 slot)
{
	struct steer_early early = {.slot = slot, .seen = steer_ticks()};
	struct steer_packet packet = {};

	if (!steer_know(ctx, at, &packet))
		return;
	bpf_map_update_elem_((uintptr_t)steer_map(STEER_MAP_EARLY), &packet, &early, BPF_ANY);
	if (!steer_table()->early) /* no store where it is set: all CPUs read this cache line */
		steer_table()->early = 1;
}

static __always_inline struct steer_count *steer_count_at(u32 *slot)
{
	return bpf_map_lookup_elem_((uintptr_t)steer_map(STEER_MAP_COUNTS), slot);
}

static __always_inline struct steer_count *steer_count_of(u32 slot)
{
	return steer_count_at(&slot);
}

/*
 * A connection is counted once, by its SYN, and what is late not at all. Once more where it
 * migrates: half-open ones do with the ACK that ends their handshake.
 */
static __always_inline void steer_selected(struct sk_reuseport_md *ctx, u32 slot, bool fallback,
					   struct bpf_sock *migrating)
{
	struct steer_count *count = steer_count_of(slot);

	if (migrating)
		steer_moved(ctx, migrating, slot);
	if (!count)
		return;
	count->selected++;
	if (fallback)
		count->fallback++;
	if (migrating)
		count->migrated++;
}

/* Where the slot that was chosen has no socket: others that are alive, and then the reserve. */
static __always_inline int steer_try_others(struct sk_reuseport_md *ctx, u32 at, u32 is_ack,
					    struct bpf_sock *migrating)
{
	/* Looked for again, as what is rarely needed is not to be kept. */
	const struct steer_half table = steer_active();
	const u16 *spares = table.layout->spares;
	struct steer_cpu *cpu;
	bool found = false;
	u32 slot = 0, i;

#pragma unroll
	for (i = 0; i < STEER_TRIES + STEER_RESERVES; i++)
		if (!found) {
			slot = i < STEER_TRIES ? spares[(ctx->hash + i) & (STEER_SPARES - 1)]
					       : steer_params()->reserve + i - STEER_TRIES;
			found = steer_select(ctx, slot);
		}
	if (found) {
		if (at)
			steer_remember(ctx, at, slot);
		if (migrating || !is_ack)
			steer_selected(ctx, slot, true, migrating);
	} else {
		cpu = steer_this_cpu();
		if (cpu && !is_ack)
			cpu->unsteered++;
	}
	return SK_PASS;
}

/* SK_PASS with nothing selected leaves the choice to the kernel's hash. */
static __always_inline int steer_deliver(struct sk_reuseport_md *ctx,
					 const struct steer_half *table, u32 position,
					 struct bpf_sock *migrating)
{
	u32 at = steer_tcp_at(ctx), is_ack = steer_segment_at(ctx, at) & STEER_ACK;
	u32 slot = steer_slot_of(table, position, is_ack);

	if (!steer_select(ctx, slot))
		return steer_try_others(ctx, at, is_ack, migrating);
	if (at)
		steer_remember(ctx, at, slot);
	if (migrating || !is_ack)
		steer_selected(ctx, slot, false, migrating);
	return SK_PASS;
}

/* Whether the packet has nothing to do with early lookups, as far as can be seen at once. */
static __always_inline bool steer_is_plain(const struct sk_reuseport_md *ctx,
					   struct steer_half *table)
{
	const u8 *header;

	table->segment = STEER_NONE;
	table->counts = 1;
	table->is_plain = true;
	if (steer_protocol() != STEER_TCP)
		return true;
	header = ctx->data;
	if (header + 14 > (const u8 *)ctx->data_end)
		return false;
	table->counts = (header[13] & STEER_SYN) >> 1;
	table->segment = table->counts << 1 | (table->counts ^ STEER_ACK);
	return !steer_table()->early && (*header & 0xd0) != 0x40;
}

/* As steer_segment(), without another look where the packet was looked at. */
static __always_inline u32 steer_segment_of(const struct sk_reuseport_md *ctx,
					    const struct steer_half *table)
{
	return table->is_plain ? table->segment : steer_segment(ctx);
}

/*
 * What most packets are: nothing migrates, nothing was looked up early. Apart from all else, so
 * that what runs for each of them is short, in few cache lines and registers. What is rare comes
 * last, as clang leaves code in the order of the source.
 */
static __always_inline int steer_deliver_plainly(struct sk_reuseport_md *ctx,
						 const struct steer_half *table, u32 position)
{
	u64 entry = steer_entry(table, position);
	u32 slot, is_ack = table->counts ^ STEER_ACK;
	struct steer_count *count;

	steer_settle(entry); /* or the compiler makes three instructions of the comparison */
	if (entry >= STEER_ROW)
		goto row;
	slot = entry;
select:
	/* Before the socket is selected: that returns late, and what is done by then costs little. */
	count = steer_count_at(&slot);
	if (count)
		count->selected += table->counts;
	if (!steer_select_at(ctx, &slot))
		goto others;
	asm volatile(""); /* or the compiler goes to another return, far away */
	return SK_PASS;
row:
	slot = steer_turn(table, entry, is_ack);
	goto select;
others:
	count = steer_count_at(&slot);
	if (count)
		count->selected -= table->counts;
	return steer_try_others(ctx, 0, is_ack, NULL);
}

/*
 * Two programs from one policy: steer_migrate is also asked where the queue of a
 * closing listener goes (Linux 5.14+); steer_plain is for kernels that never ask.
 *
 * A connection that migrates has no packet, and the CPU is that of whoever closed the
 * listener: its hash is the position then, or a whole queue would land on one worker. A
 * policy that can do better defines steer_position() before it includes this.
 */
#ifndef steer_position
#define steer_position(ctx, table, migrating, hash) \
	(migrating ? steer_spread(table, hash) : steer_policy(ctx, table))
#endif
#define STEER_POLICY(ctx, table)                                                            \
	static __always_inline u32 steer_policy(struct sk_reuseport_md *ctx,                \
						const struct steer_half *table);            \
	int steer_plain(struct sk_reuseport_md *ctx)                                        \
	{                                                                                   \
		struct steer_half half = steer_active();                                    \
                                                                                            \
		if (steer_is_plain(ctx, &half))                                             \
			return steer_deliver_plainly(ctx, &half, steer_policy(ctx, &half)); \
		half.is_plain = false;                                                      \
		if (steer_table()->early && steer_again(ctx))                               \
			return SK_PASS;                                                     \
		return steer_deliver(ctx, &half, steer_policy(ctx, &half), NULL);           \
	}                                                                                   \
	int steer_migrate(struct sk_reuseport_md *ctx)                                      \
	{                                                                                   \
		struct bpf_sock *migrating = ctx->migrating_sk;                             \
		struct steer_half half = steer_active();                                    \
		u32 hash = 0, position;                                                     \
                                                                                            \
		if (!migrating && steer_is_plain(ctx, &half))                               \
			return steer_deliver_plainly(ctx, &half, steer_policy(ctx, &half)); \
		half.is_plain = false;                                                      \
		if (migrating) {                                                            \
			hash = ctx->hash;                                                   \
			steer_settle(hash);                                                 \
		} else if (steer_table()->early && steer_again(ctx)) {                      \
			return SK_PASS;                                                     \
		}                                                                           \
		position = steer_position(ctx, (&half), migrating, hash);                   \
		return steer_deliver(ctx, &half, position, migrating);                      \
	}                                                                                   \
	static __always_inline u32 steer_policy(struct sk_reuseport_md *ctx,                \
						const struct steer_half *table)

#endif
