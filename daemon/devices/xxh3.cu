/* Leaf digests where the bytes are: XXH3-64, seed 0, default secret, of many leaves in one launch.
 *
 * Format: xxHash 0.8, doc/xxhash_spec.md. A leaf is at most 1 MiB, at an address that is a multiple of 16.
 *
 * The blocks of a leaf depend on one another, the 8 accumulators of a block do not: four threads a leaf, two
 * accumulators each. The two are neighbours, so what the format adds across neighbours stays in the thread: no shuffle,
 * no shared memory, no barrier, and threads that run one after another compute the same. The four read one stripe
 * together, 64 adjacent bytes. Parallelism beyond that is leaves, which is why xxh3_finish is a launch of its own.
 *
 * No #include: NVRTC compiles this without headers, and tests/cuda_on_cpu.h makes it C++ for a host.
 */

typedef unsigned int u32;
typedef unsigned long long u64;

static __constant__ const u64 SECRET[24] = {
    0xbe4ba423396cfeb8ull, 0x1cad21f72c81017cull, 0xdb979083e96dd4deull, 0x1f67b3b7a4a44072ull,
    0x78e5c0cc4ee679cbull, 0x2172ffcc7dd05a82ull, 0x8e2443f7744608b8ull, 0x4c263a81e69035e0ull,
    0xcb00c391bb52283cull, 0xa32e531b8b65d088ull, 0x4ef90da297486471ull, 0xd8acdea946ef1938ull,
    0x3f349ce33f76faa8ull, 0x1d4f0bc7c7bbdcf9ull, 0x3159b4cd4be0518aull, 0x647378d9c97e9fc8ull,
    0xc3ebd33483acc5eaull, 0xeb6313faffa081c5ull, 0x49daf0b751dd0d17ull, 0x9e68d429265516d3ull,
    0xfca1477d58be162bull, 0xce31d07ad1b8f88full, 0x280416958f3acb45ull, 0x7e404bbbcafbd7afull,
};

const u32 PRIME32_1 = 0x9E3779B1u, PRIME32_2 = 0x85EBCA77u, PRIME32_3 = 0xC2B2AE3Du;
const u64 PRIME64_1 = 0x9E3779B185EBCA87ull, PRIME64_2 = 0xC2B2AE3D27D4EB4Full, PRIME64_3 = 0x165667B19E3779F9ull;
const u64 PRIME64_4 = 0x85EBCA77C2B2AE63ull, PRIME64_5 = 0x27D4EB2F165667C5ull;
const u64 PRIME_MX1 = 0x165667919E3779F9ull, PRIME_MX2 = 0x9FB21C651E98DF25ull;

const u32 SHORT = 240;   // the longest leaf that has no accumulators
const u32 STRIPE = 64;
const u32 STRIPES = 16;  // of a block: (secret - stripe) / 8
const u32 LANES = 4;     // threads a leaf, 16 bytes of each stripe

__device__ __forceinline__ u64 secret(u32 offset) {
    u32 word = offset / 8, bits = offset % 8 * 8;
    return bits ? SECRET[word] >> bits | SECRET[word + 1] << (64 - bits) : SECRET[word];
}

/* Bytes, where the format reads at any address: a GPU refuses wider loads there, and one such leaf is one such read. */
__device__ __forceinline__ u64 read(const unsigned char *at, u32 bytes) {
    u64 value = 0;
#pragma unroll
    for (u32 i = 0; i < bytes; i++) value |= (u64)at[i] << (8 * i);
    return value;
}

__device__ __forceinline__ u64 read64(const unsigned char *at) { return read(at, 8); }

/* The accumulators of one thread */

__device__ __forceinline__ u64 product_of_halves(u64 value) { return (value & 0xFFFFFFFFu) * (value >> 32); }

__device__ __forceinline__ void accumulate(ulonglong2 &acc, ulonglong2 data, u64 key, u64 next_key) {
    // One sum per side first: of a stripe, only an addition waits for the stripe before it.
    acc.x += product_of_halves(data.x ^ key) + data.y;
    acc.y += product_of_halves(data.y ^ next_key) + data.x;
}

__device__ __forceinline__ u64 scrambled(u64 acc, u64 key) { return (acc ^ acc >> 47 ^ key) * PRIME32_1; }

/* A block from registers. Each stripe's register is loaded anew as soon as it is used: the next block is on its way
 * while this one is computed, at no further registers, and few leaves suffice to keep the memory busy. */
__device__ __forceinline__ void block(
    ulonglong2 &acc, ulonglong2 (&data)[STRIPES], const u64 (&keys)[STRIPES + 2], const ulonglong2 *next, u32 stripes
) {
#pragma unroll
    for (u32 i = 0; i < STRIPES; i++) {
        accumulate(acc, data[i], keys[i], keys[i + 1]);
        if (i < stripes) data[i] = __ldcs(next + i * LANES);
    }
    acc.x = scrambled(acc.x, keys[STRIPES]);
    acc.y = scrambled(acc.y, keys[STRIPES + 1]);
}

/* The 8 accumulators of every leaf over 240 bytes, to lanes[8 * leaf]; the others' are left alone.
 * LANES * count threads, in blocks of any size. */
extern "C" __global__ void __launch_bounds__(128) xxh3_lanes(
    const u64 *__restrict__ addresses, const u32 *__restrict__ sizes, u32 count, u64 *__restrict__ lanes
) {
    u32 thread = blockIdx.x * blockDim.x + threadIdx.x, leaf = thread / LANES, lane = thread % LANES;
    if (leaf >= count || sizes[leaf] <= SHORT) return;
    u32 size = sizes[leaf];
    const ulonglong2 *at = (const ulonglong2 *)addresses[leaf] + lane;

    // Whole stripes from here on. The last stripe is not among them: it ends where the leaf ends.
    u32 stripes = (size - 1) / STRIPE;
    ulonglong2 data[STRIPES] = {};
#pragma unroll
    for (u32 i = 0; i < STRIPES; i++) {
        if (i < stripes) data[i] = __ldcs(at + i * LANES);
    }

    u64 keys[STRIPES + 2];
#pragma unroll
    for (u32 i = 0; i < STRIPES + 2; i++) keys[i] = SECRET[2 * lane + i];

    ulonglong2 acc;
    acc.x = lane == 0 ? PRIME32_3 : lane == 1 ? PRIME64_2 : lane == 2 ? PRIME64_4 : PRIME64_5;
    acc.y = lane == 0 ? PRIME64_1 : lane == 1 ? PRIME64_3 : lane == 2 ? PRIME32_2 : PRIME32_1;

    // Two blocks a turn, or ptxas takes the first stripes' registers as scratch and loads those last, just before use.
#pragma unroll 2
    for (; stripes >= 2 * STRIPES; stripes -= STRIPES) {
        at += STRIPES * LANES;
        block(acc, data, keys, at, STRIPES);  // a constant: the loop that does the work tests nothing
    }
    if (stripes >= STRIPES) {
        at += STRIPES * LANES;
        stripes -= STRIPES;
        block(acc, data, keys, at, stripes);
    }
#pragma unroll
    for (u32 i = 0; i < STRIPES - 1; i++) {
        if (i < stripes) accumulate(acc, data[i], keys[i], keys[i + 1]);
    }

    const unsigned char *last = (const unsigned char *)addresses[leaf] + size - STRIPE + 16 * lane;
    ulonglong2 end;
    end.x = read64(last);
    end.y = read64(last + 8);
    accumulate(acc, end, secret(121 + 16 * lane), secret(129 + 16 * lane));
    lanes[8 * (u64)leaf + 2 * lane] = acc.x;
    lanes[8 * (u64)leaf + 2 * lane + 1] = acc.y;
}

/* From accumulators, or from the few bytes of a short leaf, to the digest */

__device__ __forceinline__ u64 folded_product(u64 a, u64 b) { return a * b ^ __umul64hi(a, b); }

__device__ __forceinline__ u64 rotated(u64 value, u32 bits) { return value << bits | value >> (64 - bits); }

__device__ __forceinline__ u64 swapped(u64 value) {
    value = (value & 0x00FF00FF00FF00FFull) << 8 | (value >> 8 & 0x00FF00FF00FF00FFull);
    value = (value & 0x0000FFFF0000FFFFull) << 16 | (value >> 16 & 0x0000FFFF0000FFFFull);
    return value << 32 | value >> 32;
}

__device__ __forceinline__ u64 avalanche(u64 hash) {
    hash = (hash ^ hash >> 37) * PRIME_MX1;
    return hash ^ hash >> 32;
}

__device__ __forceinline__ u64 avalanche_of_xxh64(u64 hash) {
    hash = (hash ^ hash >> 33) * PRIME64_2;
    hash = (hash ^ hash >> 29) * PRIME64_3;
    return hash ^ hash >> 32;
}

__device__ __forceinline__ u64 mixed(const unsigned char *at, u32 offset) {
    return folded_product(read64(at) ^ secret(offset), read64(at + 8) ^ secret(offset + 8));
}

__device__ u64 digest_of_at_most_16(const unsigned char *at, u32 size) {
    if (size > 8) {
        u64 low = read64(at) ^ secret(24) ^ secret(32), high = read64(at + size - 8) ^ secret(40) ^ secret(48);
        return avalanche(size + swapped(low) + high + folded_product(low, high));
    }
    if (size > 3) {
        u64 hash = (read(at + size - 4, 4) | read(at, 4) << 32) ^ secret(8) ^ secret(16);
        hash ^= rotated(hash, 49) ^ rotated(hash, 24);
        hash *= PRIME_MX2;
        hash ^= (hash >> 35) + size;
        hash *= PRIME_MX2;
        return hash ^ hash >> 28;
    }
    if (size > 0) {
        u64 key = (secret(0) ^ secret(4)) & 0xFFFFFFFFu;
        return avalanche_of_xxh64(
            ((u64)at[size - 1] | (u64)size << 8 | (u64)at[0] << 16 | (u64)at[size / 2] << 24) ^ key
        );
    }
    return avalanche_of_xxh64(secret(56) ^ secret(64));
}

__device__ u64 digest_of_at_most_240(const unsigned char *at, u32 size) {
    u64 acc = size * PRIME64_1;
    if (size <= 128) {
        for (u32 i = 0; i <= (size - 1) / 32; i++) {
            acc += mixed(at + 16 * i, 32 * i) + mixed(at + size - 16 * (i + 1), 32 * i + 16);
        }
        return avalanche(acc);
    }
    for (u32 i = 0; i < 8; i++) acc += mixed(at + 16 * i, 16 * i);
    acc = avalanche(acc) + mixed(at + size - 16, 119);
    for (u32 i = 8; i < size / 16; i++) acc += mixed(at + 16 * i, 16 * (i - 8) + 3);
    return avalanche(acc);
}

/* The digest of every leaf, after xxh3_lanes of the same leaves. One thread a leaf, in blocks of any size. */
extern "C" __global__ void xxh3_finish(
    const u64 *__restrict__ addresses, const u32 *__restrict__ sizes, u32 count, const u64 *__restrict__ lanes,
    u64 *__restrict__ digests
) {
    u32 leaf = blockIdx.x * blockDim.x + threadIdx.x;
    if (leaf >= count) return;
    u32 size = sizes[leaf];
    if (size <= SHORT) {
        const unsigned char *at = (const unsigned char *)addresses[leaf];
        digests[leaf] = size <= 16 ? digest_of_at_most_16(at, size) : digest_of_at_most_240(at, size);
        return;
    }
    const u64 *acc = lanes + 8 * (u64)leaf;
    u64 hash = size * PRIME64_1;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        hash += folded_product(acc[2 * i] ^ secret(11 + 16 * i), acc[2 * i + 1] ^ secret(19 + 16 * i));
    }
    digests[leaf] = avalanche(hash);
}
