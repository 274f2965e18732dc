// What a copy engine cannot do with bytes that have landed: cut them, transpose them, cast them, sum them up.
//
// Every kernel runs in one-dimensional grids of blocks of 256 threads, with any number of blocks. Addresses are byte
// addresses; source and destination never overlap. Self-contained, and integer arithmetic only: the text is also
// compiled as plain C++ (tests/simcuda/shim), so there is no header, no inline assembly and no warp intrinsic.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// Strided loops around a run, outermost first; strides are bytes. An unused loop counts 1.
struct Loops {
    u64 count[5], src_stride[5], dst_stride[5];
};

// The value of a T at any address: nothing in the file format aligns a tensor.
template <typename T>
__device__ T load(const u8 *__restrict__ address) {
    if ((u64)address % sizeof(T) == 0) return *(const T *)address;
    T value = 0;
    for (u32 i = 0; i < sizeof(T); i++) value |= (T)address[i] << (8 * i);
    return value;
}

// Calls body(source offset, destination offset) for every unit of every run of the loops. Neighbouring threads get
// neighbouring units. A row is one index of all loops; its place is only computed when a thread gets to another one.
template <typename Body>
__device__ void each_unit(const Loops &loops, u64 run, u64 src_unit, u64 dst_unit, Body body) {
    u64 rows = 1;
    for (int i = 0; i < 5; i++) rows *= loops.count[i];
    if (run == 0) return;

    const u64 threads = (u64)gridDim.x * blockDim.x, first = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    const u64 row_step = threads / run, unit_step = threads - row_step * run;
    u64 row = first / run, unit = first - row * run, placed = ~0ull, src = 0, dst = 0;
    while (row < rows) {
        if (row != placed) {
            placed = row;
            src = dst = 0;
            u64 rest = row;
            for (int i = 4; rest > 0; i--) {
                const u64 count = loops.count[i];
                if (count == 1) continue;
                const u64 quotient = rest / count, index = rest - quotient * count;
                src += index * loops.src_stride[i];
                dst += index * loops.dst_stride[i];
                rest = quotient;
            }
        }
        body(src + unit * src_unit, dst + unit * dst_unit);
        row += row_step;
        unit += unit_step;
        if (unit >= run) {
            unit -= run;
            row++;
        }
    }
}

// Copies `run` bytes for every index of the loops. Both addresses, every stride and the run are multiples of the size
// of Unit, the width of each access.
template <typename Unit>
__device__ void gather(const u8 *__restrict__ src, u8 *__restrict__ dst, const Loops &loops, u64 run) {
    each_unit(loops, run / sizeof(Unit), sizeof(Unit), sizeof(Unit), [=](u64 src_offset, u64 dst_offset) {
        *(Unit *)(dst + dst_offset) = *(const Unit *)(src + src_offset);
    });
}

#define GATHER(name, Unit)                                                                                             \
    extern "C" __global__ void name(const u8 *__restrict__ src, u8 *__restrict__ dst,                                  \
                                    const __grid_constant__ Loops loops, u64 run) {                                    \
        gather<Unit>(src, dst, loops, run);                                                                            \
    }

GATHER(shardlift_gather_1, u8)
GATHER(shardlift_gather_2, u16)
GATHER(shardlift_gather_4, u32)
GATHER(shardlift_gather_8, u64)
GATHER(shardlift_gather_16, uint4)

// Transposes `batch` matrices: element (b, row, column) goes from b * src_batch_stride + row * src_row_stride + column
// elements to b * dst_batch_stride + column * dst_col_stride + row elements. The destination's address and strides are
// multiples of the element's size.
template <typename Element>
__device__ void transpose(const u8 *__restrict__ src, u8 *__restrict__ dst, u64 batch, u64 rows, u64 cols,
                          u64 src_batch_stride, u64 src_row_stride, u64 dst_batch_stride, u64 dst_col_stride) {
    // One column more than is used, so that a column lies in 32 different banks.
    __shared__ Element tile[32][33];
    const u32 x = threadIdx.x % 32, y = threadIdx.x / 32;
    const u64 tiles_down = (rows + 31) / 32, tiles_across = (cols + 31) / 32;
    const u64 tiles = batch * tiles_down * tiles_across;
    for (u64 index = blockIdx.x; index < tiles; index += gridDim.x) {
        const u64 across = index % tiles_across, rest = index / tiles_across;
        const u64 row = rest % tiles_down * 32, col = across * 32, b = rest / tiles_down;
        for (u32 i = y; i < 32; i += 8) {
            if (row + i < rows && col + x < cols) {
                const u64 offset = b * src_batch_stride + (row + i) * src_row_stride + (col + x) * sizeof(Element);
                tile[i][x] = load<Element>(src + offset);
            }
        }
        __syncthreads();
        for (u32 i = y; i < 32; i += 8) {
            if (col + i < cols && row + x < rows) {
                const u64 offset = b * dst_batch_stride + (col + i) * dst_col_stride + (row + x) * sizeof(Element);
                *(Element *)(dst + offset) = tile[x][i];
            }
        }
        __syncthreads();
    }
}

#define TRANSPOSE(name, Element)                                                                                       \
    extern "C" __global__ void name(const u8 *__restrict__ src, u8 *__restrict__ dst, u64 batch, u64 rows, u64 cols,   \
                                    u64 src_batch_stride, u64 src_row_stride, u64 dst_batch_stride,                    \
                                    u64 dst_col_stride) {                                                              \
        transpose<Element>(src, dst, batch, rows, cols, src_batch_stride, src_row_stride, dst_batch_stride,            \
                           dst_col_stride);                                                                            \
    }

TRANSPOSE(shardlift_transpose_1, u8)
TRANSPOSE(shardlift_transpose_2, u16)
TRANSPOSE(shardlift_transpose_4, u32)
TRANSPOSE(shardlift_transpose_8, u64)

// The f32 of a finite number of E exponent and M mantissa bits; exact.
template <int E, int M>
__device__ u32 widen(u32 bits) {
    const u32 bias = 128 - (1 << (E - 1)), mantissa_mask = (1 << M) - 1;
    const u32 sign = bits >> (E + M) << 31, magnitude = bits & ((1 << (E + M)) - 1);
    if (magnitude > mantissa_mask) return sign | ((magnitude << (23 - M)) + (bias << 23));
    if (magnitude == 0) return sign;
    const u32 shift = __clz(magnitude) - (31 - M);
    return sign | (bias + 1 - shift) << 23 | ((magnitude << shift) & mantissa_mask) << (23 - M);
}

// bits / 2^shift, rounded to nearest, ties to even. An overflow into the exponent is the right next number.
__device__ u32 round_shift(u32 bits, u32 shift) {
    return (bits + ((1u << (shift - 1)) - 1) + (bits >> shift & 1)) >> shift;
}

// Each format: its bits, and the ways to and from the bits of an f32. A NaN becomes quiet on the way to f32; it keeps
// its sign, and the upper bits of its payload where both formats have some (f16, bf16, f32).
struct F32 {
    typedef u32 Bits;
    static __device__ u32 to_f32(u32 bits) { return (bits & 0x7fffffff) > 0x7f800000 ? bits | 0x400000 : bits; }
    static __device__ u32 from_f32(u32 bits) { return bits; }
};

struct F16 {
    typedef u16 Bits;
    static __device__ u32 to_f32(u32 bits) {
        const u32 sign = bits >> 15 << 31, mantissa = bits & 0x3ff;
        if ((bits & 0x7c00) != 0x7c00) return widen<5, 10>(bits);
        return sign | 0x7f800000 | mantissa << 13 | (mantissa ? 0x400000 : 0);
    }
    static __device__ u32 from_f32(u32 bits) {
        const u32 sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
        if (magnitude > 0x7f800000) return sign | 0x7c00 | (magnitude >> 13 & 0x3ff);
        // Half way between the largest finite number and 2^16: a tie goes to even, which is infinity.
        if (magnitude >= 0x477ff000) return sign | 0x7c00;
        // From 2^-14 on the result is normal, below 2^-25 it is zero.
        if (magnitude >= 0x38800000) return sign | round_shift(magnitude - (112 << 23), 13);
        if (magnitude < 0x33000000) return sign;
        return sign | round_shift((magnitude & 0x7fffff) | 0x800000, 126 - (magnitude >> 23));
    }
};

struct Bf16 {
    typedef u16 Bits;
    static __device__ u32 to_f32(u32 bits) { return F32::to_f32(bits << 16); }
    static __device__ u32 from_f32(u32 bits) {
        return (bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 : round_shift(bits, 16);
    }
};

// OCP E4M3: no infinities, one NaN of either sign.
struct F8E4M3 {
    typedef u8 Bits;
    static __device__ u32 to_f32(u32 bits) {
        return (bits & 0x7f) == 0x7f ? bits >> 7 << 31 | 0x7fc00000 : widen<4, 3>(bits);
    }
};

// OCP E5M2: infinities and NaN as IEEE has them.
struct F8E5M2 {
    typedef u8 Bits;
    static __device__ u32 to_f32(u32 bits) {
        if ((bits & 0x7c) != 0x7c) return widen<5, 2>(bits);
        return bits >> 7 << 31 | (bits & 3 ? 0x7fc00000 : 0x7f800000);
    }
};

// As gather, converting each of the `run` elements. The source may lie at any address; the destination's address and
// strides are multiples of its element's size.
template <typename From, typename To>
__device__ void cast(const u8 *__restrict__ src, u8 *__restrict__ dst, const Loops &loops, u64 run) {
    typedef typename From::Bits FromBits;
    typedef typename To::Bits ToBits;
    each_unit(loops, run, sizeof(FromBits), sizeof(ToBits), [=](u64 src_offset, u64 dst_offset) {
        const u32 bits = load<FromBits>(src + src_offset);
        *(ToBits *)(dst + dst_offset) = (ToBits)To::from_f32(From::to_f32(bits));
    });
}

#define CAST(name, From, To)                                                                                           \
    extern "C" __global__ void name(const u8 *__restrict__ src, u8 *__restrict__ dst,                                  \
                                    const __grid_constant__ Loops loops, u64 run_elements) {                           \
        cast<From, To>(src, dst, loops, run_elements);                                                                 \
    }

CAST(shardlift_cast_f32_f16, F32, F16)
CAST(shardlift_cast_f32_bf16, F32, Bf16)
CAST(shardlift_cast_f16_f32, F16, F32)
CAST(shardlift_cast_f16_bf16, F16, Bf16)
CAST(shardlift_cast_bf16_f32, Bf16, F32)
CAST(shardlift_cast_bf16_f16, Bf16, F16)
CAST(shardlift_cast_f8_e4m3_f32, F8E4M3, F32)
CAST(shardlift_cast_f8_e4m3_f16, F8E4M3, F16)
CAST(shardlift_cast_f8_e4m3_bf16, F8E4M3, Bf16)
CAST(shardlift_cast_f8_e5m2_f32, F8E5M2, F32)
CAST(shardlift_cast_f8_e5m2_f16, F8E5M2, F16)
CAST(shardlift_cast_f8_e5m2_bf16, F8E5M2, Bf16)

// The finaliser of the SplitMix64 generator (Steele, Lea, Flood, OOPSLA 2014).
__device__ u64 splitmix64(u64 word) {
    word += 0x9e3779b97f4a7c15ull;
    word = (word ^ (word >> 30)) * 0xbf58476d1ce4e5b9ull;
    word = (word ^ (word >> 27)) * 0x94d049bb133111ebull;
    return word ^ (word >> 31);
}

// Adds the digest of `bytes` bytes to *sum: that of each word, mixed with its position; the last one padded with zeros.
// The source is aligned to 8 bytes.
extern "C" __global__ void shardlift_digest(const u8 *__restrict__ src, u64 bytes, u64 *sum) {
    __shared__ u64 partial[256];
    const u64 threads = (u64)gridDim.x * blockDim.x;
    u64 digest = 0;
    for (u64 index = (u64)blockIdx.x * blockDim.x + threadIdx.x; index * 8 < bytes; index += threads) {
        u64 word = 0;
        if (index * 8 + 8 <= bytes) {
            word = *(const u64 *)(src + index * 8);
        } else {
            for (u64 i = index * 8; i < bytes; i++) word |= (u64)src[i] << (i % 8 * 8);
        }
        digest += splitmix64(word ^ (index + 1) * 0x9e3779b97f4a7c15ull);
    }
    partial[threadIdx.x] = digest;
    for (u32 half = 128; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    }
    if (threadIdx.x == 0) atomicAdd(sum, partial[0]);
}
