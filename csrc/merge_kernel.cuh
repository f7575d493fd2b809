// The CUDA kernel: one thread block per tile of W, 512 x 128 weights in 16 bits or 256 x 128 in fp32. A is staged in
// shared memory once per tile. From then on a warp waits for no other: it works through units of its own, 128 bytes of
// 16 rows (fp32: of 32), which come in by cp.async while those before are worked on and are written once, from
// registers. B is read for a unit's rows straight into the registers where mma.m16n8k16 takes it; the columns are dealt
// out so that its results lie where a thread holds W.
//
// fp32 weights: fused multiply-adds in the order merge.h states give the bits of the CPU, which nothing rounds later.
//
// 16-bit weights: tensor cores with fp32 accumulators. Where one term has both factors in bf16, or both in fp16, one
// product is exact. All else is split: x = h + m + l, each the bf16 number nearest to what is left, which is all of x,
// as 3 * 8 bits are 24 (a number beyond 3.39e38 gives NaN, one below 2^-110 loses its last bits). With |m| <= 2^-8 |x|,
// |l| <= 2^-16 |x|, u = 2^-24 and P the sum of |c B A|, the products m l, l m and l l that are left out come to
// (2 + 2^-7) u P, any other would be 256 u P: six are needed. 16 ranks are summed apart from those before, h h last, so
// that what an instruction loses is relative to their own P. NVIDIA does not say what it loses; Fasi et al. 2021
// (doi 10.7717/peerj-cs.330) find on an A100 that eight products and the accumulator are cut off at u of the largest,
// and their sum to 24 bits: (R + 4) u P for h h and R <= 16, and 2^-4 of that for the rest. With one rounding each of
// c B and of two additions that is u (|W| + (R + 10) P), for more ranks as well: R + 10 where the CPU has R + 2.
//
// A test compiles this file for the host, too: what only a GPU has is called through the few functions at the top.
#pragma once

#include <type_traits>

#include "merge.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SLORA_DEVICE __device__ __forceinline__
#define SLORA_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define SLORA_UNROLL _Pragma("unroll")
#define SLORA_KEEP_ROLLED _Pragma("unroll 1")
#define SLORA_SHARED(name) extern __shared__ float4 name[]
#endif

namespace slora {

constexpr int kRing = 32 * 1024;  // bytes of W that a block has in shared memory, or on their way there
// Bytes of shared memory for one of the 16-bit parts of 16 ranks of A, and 64 more: at the end of the last of these
// parts is the Chunk of the ranks.
constexpr int kSlab = 32 * kCudaTileCols + 64;

// What a warp works on at a time. A thread has kRuns runs of 16 bytes: run i lies in row g + i / 2 * 8 at byte
// 16 q + i % 2 * 64, where g = lane / 4 and q = lane % 4. A tile is kAcross units wide.
template <Dtype dtype>
struct Unit {
  using Bits = std::conditional_t<dtype == Dtype::f32, uint32_t, uint16_t>;
  static constexpr int kSize = sizeof(Bits), kInRun = 16 / kSize, kRuns = 2 * kSize;
  static constexpr int kRows = 4 * kRuns, kCols = 128 / kSize, kBytes = 128 * kRows;
  static constexpr int kAcross = kCudaTileCols / kCols;
};

// Where the slabs of A begin in shared memory, after W and, for fp32 alone, 16 ranks of B for each warp.
constexpr int offset_of_A(Dtype dtype, int warps) { return kRing + (dtype == Dtype::f32 ? warps * 32 * 16 * 4 : 0); }

// Fits a table to blocks that may have `block_limit` of the `sm_limit` bytes of an SM: of four warps where four blocks
// share an SM with that much of A each, else of eight.
inline void fit(CudaTable& table, Dtype dtype, int64_t block_limit, int64_t sm_limit) {
  constexpr int64_t reserved = 1024;  // by the system, for each block
  const bool four = 4 * (offset_of_A(dtype, 4) + table.slabs * kSlab + reserved) <= sm_limit;
  table.warps = four ? 4 : 8;
  const int64_t before = offset_of_A(dtype, table.warps), fitting = (block_limit - before) / kSlab;
  table.slabs = table.slabs < fitting ? table.slabs : fitting;
  table.shared_bytes = before + table.slabs * kSlab;
}

#ifdef __CUDACC__
SLORA_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
SLORA_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
SLORA_DEVICE float widened_f16(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
SLORA_DEVICE uint32_t two_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
SLORA_DEVICE uint32_t two_f16(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
SLORA_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// Pointers that come out of the tables are generic to the compiler; these say that they are global. A and B are read
// by several blocks and stay in the caches, W is seen once and gives way to them.
template <class T>
SLORA_DEVICE T load_shared_by_blocks(const T* from) {
  return __ldg(from);
}
template <class T>
SLORA_DEVICE T load_once(const T* from) {
  return __ldcs(from);
}
// 16 bytes on their way from global to shared memory, past the registers; L2 reads 256 at a time, the width of a tile
// in 16 bits. A thread waits for its own by groups: until at most `left` of them are on their way.
SLORA_DEVICE void copy_ahead(void* to, const void* from) {
  asm volatile(
      "cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
      "l"(__cvta_generic_to_global(from))
      : "memory");
}
SLORA_DEVICE void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int left>
SLORA_DEVICE void wait_for_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}
SLORA_DEVICE void warp_barrier() { __syncwarp(); }
template <class T>
SLORA_DEVICE void store_once(T* to, T value) {
  __stcs(to, value);
}

// Volatile, so that what follows from it is computed where it is needed: elsewhere it would take registers.
SLORA_DEVICE unsigned thread_index() {
  unsigned index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// d += b @ a for 16 rows, 8 columns and 16 ranks of bf16 or fp16 numbers.
template <Dtype part>
SLORA_DEVICE void mma(float (&d)[4], uint4 b, uint2 a) {
#define SLORA_MMA(type)                                      \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "            \
      "{%8, %9}, {%0, %1, %2, %3};"                          \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])       \
      : "r"(b.x), "r"(b.y), "r"(b.z), "r"(b.w), "r"(a.x), "r"(a.y))
  if (part == Dtype::bf16) SLORA_MMA("bf16");
  if (part == Dtype::f16) SLORA_MMA("f16");
#undef SLORA_MMA
}
#endif

// The number in 32 bits, or in the lower or upper half of them.
SLORA_DEVICE float low_number(uint32_t bits, Dtype dtype) {
  if (dtype == Dtype::f32) return float_of(bits);
  return dtype == Dtype::bf16 ? float_of(bits << 16) : widened_f16(static_cast<uint16_t>(bits));
}
SLORA_DEVICE float high_number(uint32_t bits, Dtype dtype) {
  return dtype == Dtype::bf16 ? float_of(bits & 0xffff0000u) : widened_f16(static_cast<uint16_t>(bits >> 16));
}
SLORA_DEVICE uint32_t pair_of(float low, float high, Dtype dtype) {
  return dtype == Dtype::bf16 ? two_bf16(low, high) : two_f16(low, high);
}

// Up to 16 ranks of a term: B from the tile's first row on, and strides in bytes.
struct alignas(16) Chunk {
  const char* B;
  int64_t row_stride, rank_stride;
  int32_t ranks;
  float scale;
  Dtype dtype;
  int32_t together;  // there are 16, and one access takes four of them
};

// kCount numbers, `next` bytes apart; only `left` of them are there, the others are 0.
template <int kCount>
SLORA_DEVICE void load_each(float* x, const char* from, int64_t next, Dtype dtype, int left) {
  if (dtype == Dtype::f32) {
    SLORA_UNROLL
    for (int i = 0; i < kCount; ++i, from += next)
      x[i] = i < left ? load_shared_by_blocks(reinterpret_cast<const float*>(from)) : 0.0f;
  } else {
    uint16_t bits[kCount];
    SLORA_UNROLL
    for (int i = 0; i < kCount; ++i, from += next)
      bits[i] = i < left ? load_shared_by_blocks(reinterpret_cast<const uint16_t*>(from)) : 0;
    SLORA_UNROLL
    for (int i = 0; i < kCount; ++i) x[i] = low_number(bits[i], dtype);
  }
}

// kCount ranks of B from `rank` on, times the scale, of kRows rows, eight apart; 0 beyond the last rank and row.
template <int kRows, int kCount>
SLORA_DEVICE void load_B(float (&x)[kRows][kCount], const Chunk& chunk, int row, int rows, int rank) {
  const char* from = chunk.B + row * chunk.row_stride + rank * chunk.rank_stride;
  const int64_t down = 8 * chunk.row_stride;
  const Dtype dtype = chunk.dtype;
  if (chunk.together && row + 8 * (kRows - 1) < rows) {
    SLORA_UNROLL
    for (int r = 0; r < kRows; ++r, from += down) {
      SLORA_UNROLL
      for (int i = 0; i < kCount; i += 4) {
        if (dtype == Dtype::f32) {
          const float4 four = load_shared_by_blocks(reinterpret_cast<const float4*>(from) + i / 4);
          x[r][i] = four.x, x[r][i + 1] = four.y, x[r][i + 2] = four.z, x[r][i + 3] = four.w;
        } else {
          const uint2 four = load_shared_by_blocks(reinterpret_cast<const uint2*>(from) + i / 4);
          x[r][i] = low_number(four.x, dtype), x[r][i + 1] = high_number(four.x, dtype);
          x[r][i + 2] = low_number(four.y, dtype), x[r][i + 3] = high_number(four.y, dtype);
        }
      }
    }
  } else {
    SLORA_UNROLL
    for (int r = 0; r < kRows; ++r, from += down)
      load_each<kCount>(x[r], from, chunk.rank_stride, dtype, row + 8 * r < rows ? chunk.ranks - rank : 0);
  }
  SLORA_UNROLL
  for (int i = 0; i < kRows * kCount; ++i) x[i / kCount][i % kCount] *= chunk.scale;
}

// Makes 16-bit parts of four numbers, two in a word, the largest part first.
template <Dtype part, int kParts>
SLORA_DEVICE void split(uint2 (&words)[kParts], float (&x)[4]) {
  SLORA_UNROLL
  for (int p = 0; p < kParts; ++p) {
    words[p] = make_uint2(pair_of(x[0], x[1], part), pair_of(x[2], x[3], part));
    if (p + 1 == kParts) break;
    x[0] -= low_number(words[p].x, part), x[1] -= high_number(words[p].x, part);
    x[2] -= low_number(words[p].y, part), x[3] -= high_number(words[p].y, part);
  }
}

// B of one unit where the products take it: 16 ranks of 32 rows in shared memory, [rank][g][i] for rows g + 8 i, or of
// 16 rows in the registers of mma, split.
SLORA_DEVICE void load_B_to_shared(float* Bs, const Chunk& chunk, int row, int rows) {
  const int member = static_cast<int>(thread_index() % 32);
  float x[1][16];
  load_B(x, chunk, row + member, rows, 0);
  warp_barrier();
  SLORA_UNROLL
  for (int k = 0; k < 16; ++k) Bs[32 * k + member % 8 * 4 + member / 8] = x[0][k];
  warp_barrier();
}
template <Dtype part, int kParts>
SLORA_DEVICE void load_B_to_registers(uint4 (&b)[kParts], const Chunk& chunk, int row, int rows) {
  const int member = static_cast<int>(thread_index() % 32);
  float x[2][4];
  load_B(x, chunk, row + member / 4, rows, 4 * (member % 4));
  uint2 upper[kParts], lower[kParts];
  split<part>(upper, x[0]), split<part>(lower, x[1]);
  SLORA_UNROLL
  for (int p = 0; p < kParts; ++p) b[p] = make_uint4(upper[p].x, lower[p].x, upper[p].y, lower[p].y);
}

// Where, in words, four of 16 ranks of a column of A lie in one part. Of every 32 columns mma has four tiles of eight;
// member q of a row gets two neighbours out of each, which are eight neighbours of W. What a lane needs for two tiles
// is together, and lanes that access shared memory at a time do not share a bank.
SLORA_DEVICE unsigned word_of_A(unsigned col, unsigned quarter) {
  const unsigned tile = col / 32 * 4 + col % 8 / 2, n = col % 32 / 8 * 2 + col % 2;
  return 128 * (tile / 2) + 16 * n + 4 * (quarter ^ (tile / 2 % 2 * 2 + n / 2 % 2)) + 2 * (tile % 2);
}

// 16 ranks from `rank` on of columns of A into shared memory, zeros beyond `cols` and the last rank. Each thread has
// one of kCount columns.
//   kParts = 2: fp32, [rank][column]; else 16 bits, [part][word].
template <Dtype part, int kParts, int kWarps, int kCount>
SLORA_DEVICE void stage_A(char* to, const Piece& piece, int64_t rank, int64_t first_col, int col, int cols) {
  const int thread = static_cast<int>(thread_index()), c = col + thread % kCount;
  const int64_t size = piece.A_dtype == Dtype::f32 ? 4 : 2, next = piece.A_strides[0] * size;
  // Four ranks at a time, or the thread's share of the tile.
  constexpr int kThreads = 32 * kWarps, kQuarters = kCount == kCudaTileCols ? 4 * kCount / kThreads : 1;
  constexpr int kApart = kQuarters * kThreads / kCount;
  SLORA_KEEP_ROLLED
  for (int first = kQuarters * (thread / kCount); first < 4; first += kApart) {
    const char* from = piece.A + (rank + 4 * first) * next + (first_col + c) * piece.A_strides[1] * size;
    const int64_t rest = piece.rank - rank - 4 * first;
    const int left = c < cols ? static_cast<int>(rest < 16 ? rest : 16) : 0;
    float x[kQuarters][4];
    load_each<4 * kQuarters>(&x[0][0], from, next, piece.A_dtype, left);
    SLORA_UNROLL
    for (int k = 0; k < kQuarters; ++k) {
      if constexpr (kParts == 2) {
        SLORA_UNROLL
        for (int i = 0; i < 4; ++i) reinterpret_cast<float*>(to)[(4 * (first + k) + i) * kCudaTileCols + c] = x[k][i];
      } else {
        uint2 words[kParts];
        split<part>(words, x[k]);
        SLORA_UNROLL
        for (int p = 0; p < kParts; ++p)
          *reinterpret_cast<uint2*>(to + p * kSlab + 4 * word_of_A(c, first + k)) = words[p];
      }
    }
  }
}

// Both point at the unit's first column and row.
SLORA_DEVICE void multiply_fused(float (&sum)[8][4], const float* As, const float* Bs, int count) {
  SLORA_KEEP_ROLLED
  for (int j = 0; j < count; ++j, As += kCudaTileCols, Bs += 32) {
    const float4 b = *reinterpret_cast<const float4*>(Bs);
    const float4 a[2] = {*reinterpret_cast<const float4*>(As), *reinterpret_cast<const float4*>(As + 16)};
    const float rows[4] = {b.x, b.y, b.z, b.w};
    SLORA_UNROLL
    for (int i = 0; i < 8; ++i) {
      sum[i][0] = fused(rows[i / 2], a[i % 2].x, sum[i][0]), sum[i][1] = fused(rows[i / 2], a[i % 2].y, sum[i][1]);
      sum[i][2] = fused(rows[i / 2], a[i % 2].z, sum[i][2]), sum[i][3] = fused(rows[i / 2], a[i % 2].w, sum[i][3]);
    }
  }
}

// 16 ranks: those of B as mma has them, of A from the unit's first column on.
template <Dtype part, int kParts>
SLORA_DEVICE void multiply_tensor(float (&sum)[4][8], const char* As, const uint4 (&b)[kParts], unsigned g,
                                  unsigned q) {
  SLORA_UNROLL
  for (int pair = 0; pair < 4; ++pair) {
    uint4 a[kParts];
    SLORA_UNROLL
    for (int p = 0; p < kParts; ++p)
      a[p] =
          *reinterpret_cast<const uint4*>(As + p * kSlab + 512 * pair + 64 * g + 16 * (q ^ (pair % 2 * 2 + g / 2 % 2)));
    SLORA_UNROLL
    for (int t = 0; t < 2; ++t) {
      float d[4] = {};
      SLORA_UNROLL
      for (int i = kParts - 1; i >= 0; --i) {
        SLORA_UNROLL
        for (int k = kParts - 1 - i; k >= 0; --k)
          mma<part>(d, b[i], t == 0 ? make_uint2(a[k].x, a[k].y) : make_uint2(a[k].z, a[k].w));
      }
      SLORA_UNROLL
      for (int c = 0; c < 4; ++c) sum[c / 2 * 2 + pair / 2][pair % 2 * 4 + 2 * t + c % 2] += d[c];
    }
  }
}

// Adds `scale` times `sum` to a run.
template <Dtype dtype>
SLORA_DEVICE uint4 added(uint4 run, float scale, const float (&sum)[Unit<dtype>::kInRun]) {
  uint32_t words[4] = {run.x, run.y, run.z, run.w};
  SLORA_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (dtype == Dtype::f32) {
      words[i] = bits_of(fused(scale, sum[i], float_of(words[i])));
    } else {
      const float low = fused(scale, sum[2 * i], low_number(words[i], dtype));
      words[i] = pair_of(low, fused(scale, sum[2 * i + 1], high_number(words[i], dtype)), dtype);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// A thread's place in its block, see Unit.
struct Lane {
  unsigned warp, g, q;
};
SLORA_DEVICE Lane this_lane() {
  const unsigned thread = thread_index();
  return {thread / 32, thread % 32 / 4, thread % 4};
}

// A thread block's part of a segment, and the steps of its work.
template <Dtype dtype, int kWarps>
struct Tile {
  using U = Unit<dtype>;
  using Bits = typename U::Bits;
  static constexpr int kRows = cuda_tile_rows(dtype), kCols = kCudaTileCols;
  static constexpr int kA = offset_of_A(dtype, kWarps), kAhead = kRing / (kWarps * U::kBytes);

  const Segment& s;
  char* shared;
  int tile_row, tile_col;
  int rows, cols;
  bool aligned;  // runs of W, to 16 bytes

  SLORA_DEVICE Tile(const Segment& s, char* shared, int tile_row, int tile_col)
      : s(s), shared(shared), tile_row(tile_row), tile_col(tile_col) {
    rows = static_cast<int>(s.rows - first_row() < kRows ? s.rows - first_row() : kRows);
    cols = static_cast<int>(s.cols - first_col() < kCols ? s.cols - first_col() : kCols);
    const auto bits = reinterpret_cast<uintptr_t>(s.source) | reinterpret_cast<uintptr_t>(s.target) |
                      static_cast<uintptr_t>((s.source_stride | s.target_stride) * U::kSize);
    aligned = static_cast<unsigned>(bits) % 16 == 0;
  }

  SLORA_DEVICE int64_t first_row() const { return static_cast<int64_t>(tile_row) * kRows; }
  SLORA_DEVICE int64_t first_col() const { return static_cast<int64_t>(tile_col) * kCols; }
  // The units of each warp, some of them perhaps beyond the last row; where unit n of the running warp begins; whether
  // its weights are all there, by 16 bytes.
  SLORA_DEVICE int units() const { return (rows + kWarps * U::kRows - 1) / (kWarps * U::kRows) * U::kAcross; }
  SLORA_DEVICE int row_of(int n) const {
    return (n / U::kAcross * kWarps + static_cast<int>(thread_index() / 32)) * U::kRows;
  }
  SLORA_DEVICE int col_of(int n) const { return n % U::kAcross * U::kCols; }
  SLORA_DEVICE bool is_plain(int n) const {
    return aligned && row_of(n) + U::kRows <= rows && col_of(n) + U::kCols <= cols;
  }
  // How many elements of the thread's run i of unit n are inside W; more than kInRun count as all.
  SLORA_DEVICE int inside(int n, int i) const {
    const Lane lane = this_lane();
    const int row = row_of(n) + static_cast<int>(lane.g) + i / 2 * 8;
    return row < rows ? cols - col_of(n) - static_cast<int>(lane.q) * U::kInRun - i % 2 * (U::kCols / 2) : 0;
  }

  // The thread's first run of unit n in memory and, from there, run i; the same in shared memory, 32 slots apart.
  SLORA_DEVICE int64_t offset_of(int n, int64_t stride) const {
    const Lane lane = this_lane();
    return (first_row() + row_of(n) + lane.g) * stride + (first_col() + col_of(n)) * U::kSize + 16 * lane.q;
  }
  static SLORA_DEVICE int64_t run_offset(int i, int64_t stride) { return i / 2 * 8 * stride + i % 2 * 64; }
  SLORA_DEVICE uint4* slots(int n) const {
    const unsigned thread = thread_index();
    return reinterpret_cast<uint4*>(shared + thread / 32 * (kRing / kWarps) + n % kAhead * U::kBytes) + thread % 32;
  }

  // Starts to read unit n into its slots, as one group.
  SLORA_DEVICE void fetch(int n) const {
    const int64_t stride = s.source_stride * U::kSize;
    const char* from = s.source + offset_of(n, stride);
    uint4* slot = slots(n);
    if (is_plain(n)) {
      SLORA_UNROLL
      for (int i = 0; i < U::kRuns; ++i) copy_ahead(slot + 32 * i, from + run_offset(i, stride));
    } else if (row_of(n) < rows) {
      SLORA_KEEP_ROLLED
      for (int i = 0; i < U::kRuns; ++i, slot += 32) {
        const auto* run = reinterpret_cast<const Bits*>(from + run_offset(i, stride));
        const int count = inside(n, i);
        if (aligned && count >= U::kInRun) {
          copy_ahead(slot, run);
        } else {
          SLORA_UNROLL
          for (int e = 0; e < U::kInRun; ++e)
            if (e < count) reinterpret_cast<Bits*>(slot)[e] = load_once(run + e);
        }
      }
    }
    close_group();
  }

  // Writes unit n, which has arrived, with `scale` times `sum` added if `add`; -0 stays without.
  SLORA_DEVICE void store(int n, bool add, float scale, const float (&sum)[U::kRuns][U::kInRun]) const {
    const int64_t stride = s.target_stride * U::kSize;
    char* to = s.target + offset_of(n, stride);
    uint4* slot = slots(n);
    if (is_plain(n)) {
      uint4 runs[U::kRuns];
      SLORA_UNROLL
      for (int i = 0; i < U::kRuns; ++i) runs[i] = slot[32 * i];
      if (add) {
        SLORA_UNROLL
        for (int i = 0; i < U::kRuns; ++i) runs[i] = added<dtype>(runs[i], scale, sum[i]);
      }
      SLORA_UNROLL
      for (int i = 0; i < U::kRuns; ++i) store_once(reinterpret_cast<uint4*>(to + run_offset(i, stride)), runs[i]);
    } else if (row_of(n) < rows) {
      SLORA_UNROLL
      for (int i = 0; i < U::kRuns; ++i)
        if (add) slot[32 * i] = added<dtype>(slot[32 * i], scale, sum[i]);
      SLORA_KEEP_ROLLED
      for (int i = 0; i < U::kRuns; ++i, slot += 32) {
        auto* run = reinterpret_cast<Bits*>(to + run_offset(i, stride));
        const int count = inside(n, i);
        if (aligned && count >= U::kInRun) {
          store_once(reinterpret_cast<uint4*>(run), *slot);
        } else {
          SLORA_UNROLL
          for (int e = 0; e < U::kInRun; ++e)
            if (e < count) store_once(run + e, reinterpret_cast<const Bits*>(slot)[e]);
        }
      }
    }
  }

  // Stages kCount columns of A from `col` on: `count` times 16 ranks from `first` on, as the pieces have them one after
  // another, and what is to be known of the same ranks of B. `scaled`: B is to be multiplied by the scale.
  template <Dtype part, int kParts, int kCount>
  SLORA_DEVICE void stage(const Piece* pieces, bool scaled, int first, int count, int col) const {
    char* As = shared + kA;
    int chunk = 0;
    SLORA_KEEP_ROLLED
    for (int p = 0; p < s.pieces; ++p) {
      const Piece& piece = pieces[p];
      const int rank = static_cast<int>(piece.rank);
      SLORA_KEEP_ROLLED
      for (int j = 0; j < rank; j += 16, ++chunk) {
        if (chunk < first || chunk >= first + count) continue;
        stage_A<part, kParts, kWarps, kCount>(As, piece, j, first_col(), col, cols);
        As += kParts * kSlab;
        if (thread_index() != 0) continue;
        const int64_t size = piece.B_dtype == Dtype::f32 ? 4 : 2;
        const int64_t row_stride = piece.B_strides[0] * size, rank_stride = piece.B_strides[1] * size;
        const char* B = piece.B + first_row() * row_stride + j * rank_stride;
        const bool together = rank - j >= 16 && rank_stride == size &&
                              (reinterpret_cast<uintptr_t>(B) | static_cast<uintptr_t>(row_stride)) % (4 * size) == 0;
        reinterpret_cast<Chunk*>(As)[-1] = {B,
                                            row_stride,
                                            rank_stride,
                                            rank - j < 16 ? rank - j : 16,
                                            scaled ? static_cast<float>(piece.scale) : 1.0f,
                                            piece.B_dtype,
                                            together};
      }
    }
  }
};

// One tile of a segment. Its warps wait for each other only where A does not fit into shared memory as a whole: then as
// many ranks as do are staged at a time, for every unit anew.
template <Dtype dtype, int kWarps, Dtype part, int kParts>
SLORA_DEVICE void run_tile(const Segment& s, const Piece* pieces, int tile_row, int tile_col, char* shared, int slabs) {
  using U = Unit<dtype>;
  using T = Tile<dtype, kWarps>;
  const T tile(s, shared, tile_row, tile_col);
  // How many times 16 ranks there are, and how many of them are in shared memory at a time.
  const int chunks = static_cast<int>(s.slabs) / kParts, fitting = slabs / kParts;
  const bool whole = chunks <= fitting;
  // One term on tensor cores: its scale waits for the end, so that B in 16 bits stays exact.
  const bool scale_last = dtype != Dtype::f32 && s.pieces == 1;
  const char* As = shared + T::kA;

  SLORA_KEEP_ROLLED
  for (int n = 0; n < T::kAhead; ++n) tile.fetch(n);
  if (whole) {
    tile.template stage<part, kParts, kCudaTileCols>(pieces, !scale_last, 0, chunks, 0);
    __syncthreads();
  }

  uint4 b[kParts];
  const int units = tile.units();
  SLORA_KEEP_ROLLED
  for (int n = 0; n < units; ++n) {
    // Units next to each other have the same B.
    const bool b_stays = n % U::kAcross != 0 && chunks == 1;
    float sum[U::kRuns][U::kInRun] = {};
    const char* A = As;
    SLORA_KEEP_ROLLED
    for (int c = 0, end = 0; c < chunks; ++c, A += kParts * kSlab) {
      if (!whole && c == end) {
        A = As, end += fitting;
        __syncthreads();
        tile.template stage<part, kParts, U::kCols>(pieces, !scale_last, c, fitting, tile.col_of(n));
        __syncthreads();
      }
      const Chunk& chunk = *(reinterpret_cast<const Chunk*>(A + kParts * kSlab) - 1);
      const Lane lane = this_lane();
      if constexpr (dtype == Dtype::f32) {
        float* Bs = reinterpret_cast<float*>(shared + kRing) + lane.warp * 16 * 32;
        if (!b_stays) load_B_to_shared(Bs, chunk, tile.row_of(n), tile.rows);
        multiply_fused(sum, reinterpret_cast<const float*>(A) + tile.col_of(n) + 4 * lane.q, Bs + 4 * lane.g,
                       chunk.ranks);
      } else {
        if (!b_stays) load_B_to_registers<part>(b, chunk, tile.row_of(n), tile.rows);
        multiply_tensor<part, kParts>(sum, A + 32 * tile.col_of(n), b, lane.g, lane.q);
      }
    }
    // Read here: kept from before it would be one register too many.
    const float scale = scale_last ? static_cast<float>(pieces->scale) : 1.0f;
    wait_for_groups<T::kAhead - 1>();
    tile.store(n, chunks > 0, scale, sum);
    tile.fetch(n + T::kAhead);
  }
}

// The last of `count` segments whose first tile is not after `tile`: all threads try one each, and again within the
// stretch that is left, so that as many segments as there are threads take one access.
template <int kWarps>
SLORA_DEVICE int segment_of(const int32_t* first_tile, int count, int tile) {
  constexpr int kThreads = 32 * kWarps;
  int64_t found = 0, step = 1;
  while (step * kThreads < count) step *= kThreads;
  for (; step > 0; step /= kThreads) {
    const int64_t i = found + static_cast<int64_t>(threadIdx.x) * step;
    found += step * (__syncthreads_count(i < count && load_shared_by_blocks(first_tile + i) <= tile) - 1);
  }
  return static_cast<int>(found);
}

// One block per tile; the tiles of a segment follow one another row by row. `slabs` of A fit into shared memory. 16
// warps share an SM: more would leave a thread fewer than 128 registers, which spill.
template <Dtype dtype, int kWarps>
SLORA_KERNEL(32 * kWarps, 16 / kWarps)
merge_kernel(const Segment* segments, const int32_t* first_tile, int count, const Piece* pieces, int slabs) {
  SLORA_SHARED(memory);
  char* shared = reinterpret_cast<char*>(memory);
  const int block = static_cast<int>(blockIdx.x), index = segment_of<kWarps>(first_tile, count, block);
  const Segment& s = segments[index];
  const Piece* first = pieces + s.first_piece;
  const int tile = block - first_tile[index], across = static_cast<int>((s.cols - 1) / kCudaTileCols + 1);
  const int row = tile / across, col = tile % across;
  if constexpr (dtype == Dtype::f32)
    run_tile<dtype, kWarps, Dtype::f32, 2>(s, first, row, col, shared, slabs);
  else if (s.parts != 1)
    run_tile<dtype, kWarps, Dtype::bf16, 3>(s, first, row, col, shared, slabs);
  else if (first->A_dtype == Dtype::bf16)
    run_tile<dtype, kWarps, Dtype::bf16, 1>(s, first, row, col, shared, slabs);
  else
    run_tile<dtype, kWarps, Dtype::f16, 1>(s, first, row, col, shared, slabs);
}

}  // namespace slora
