// The CUDA kernel: one thread block per tile of 256 x 128 weights, 64 rows at a time. W is read and written once, the
// next rows while these are worked on; A is staged in shared memory once per tile, B for the rows at hand. A thread
// owns rows g, g + 8, g + 16, g + 24 of its warp's 32 x 32 weights, g = lane / 4, and eight columns: what mma.m16n8k16
// puts there once the columns are dealt out right.
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

constexpr int kThreads = 256, kStep = 64;  // two by four warps of 32 x 32 weights
constexpr int kChunk = 32;                 // ranks of B in shared memory at a time
constexpr int kStrideB = kStep + 4;        // of a rank of B in fp32: fewer threads write to one bank
constexpr int kSlab = 32 * kCudaTileCols;  // bytes of A: one of the 16-bit parts of 16 ranks
// Where B and the slabs of A begin in shared memory, after the next 64 rows of W.
template <Dtype dtype>
struct Shared {
  static constexpr int kB = kStep * kCudaTileCols * (dtype == Dtype::f32 ? 4 : 2);
  static constexpr int kA = kB + kChunk * (dtype == Dtype::f32 ? 4 * kStrideB : 6 * kStep);
};

// Fits a table to blocks that may use `limit` bytes.
inline void fit(CudaTable& table, Dtype dtype, int64_t limit) {
  const int64_t before = dtype == Dtype::f32 ? Shared<Dtype::f32>::kA : Shared<Dtype::bf16>::kA;
  const int64_t fitting = (limit - before) / kSlab;
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
// 16 bytes on their way from global to shared memory, past the registers, until this thread waits for its own.
SLORA_DEVICE void copy_ahead(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(__cvta_generic_to_global(from))
               : "memory");
}
SLORA_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
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

// How far a thread's second run of four fp32 numbers lies after the first: a warp's 16-byte accesses then cover whole
// sectors of 32 bytes in every dtype.
constexpr int kRunGap = 16;
// Where a column of the 128 lies in the staged A: in 16 bits as mma's four tiles of eight have them, whose member q
// gets two neighbours out of each.
template <Dtype dtype>
SLORA_DEVICE unsigned place_of(unsigned col) {
  return dtype == Dtype::f32 ? col : col / 32 * 32 + col % 8 / 2 * 8 + col % 32 / 8 * 2 + col % 2;
}
// Which row lies at a place of the staged B: in fp32 a thread's four rows are neighbours.
template <Dtype dtype>
SLORA_DEVICE unsigned row_at(unsigned place) {
  return dtype == Dtype::f32 ? place / 32 * 32 + place % 4 * 8 + place % 32 / 4 : place;
}
// Where, in words, four of 16 ranks lie in one part: what a lane of mma needs is together, and lanes that access shared
// memory at a time do not share a bank. Four ranks of a column of A are two words; of B, those of the rows r and r + 8
// alternate.
SLORA_DEVICE unsigned word_of_A(unsigned col, unsigned quarter) { return 8 * col + 2 * (quarter ^ (col / 4 % 4)); }
SLORA_DEVICE unsigned word_of_B(unsigned row, unsigned quarter) {
  return 16 * (row / 16 * 8 + row % 8) + 4 * quarter + row / 8 % 2;
}

// A column of A or a row of B into shared memory: `count` ranks of `scale` times its numbers, all of them 0 where it
// lies beyond the matrix, and zeros up to a multiple of 16. The quarters `quarter`, `quarter + step`, ... of its ranks
// are this thread's; four neighbours take one access.
//   kParts = 2: fp32, [rank][place]; else 16 bits, [16 ranks][part][word].
template <Dtype part, int kParts, bool kIsA>
SLORA_DEVICE void stage(char* to, unsigned place, const char* from, int64_t index, int64_t rank_stride, Dtype dtype,
                        bool inside, int count, float scale, int quarter, int step) {
  const int size = dtype == Dtype::f32 ? 4 : 2, padded = (count + 15) & ~15;
  const int64_t next = rank_stride * size;
  from += index * size + 4 * quarter * next;
  const bool together = rank_stride == 1 && reinterpret_cast<uintptr_t>(from) % (4 * size) == 0;
  SLORA_KEEP_ROLLED
  for (; 4 * quarter < padded; quarter += step, from += 4 * step * next) {
    const int left = inside ? count - 4 * quarter : 0;
    float x[4];
    if (dtype == Dtype::f32) {
      if (together && left >= 4) {
        const float4 four = load_shared_by_blocks(reinterpret_cast<const float4*>(from));
        x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
      } else {
        SLORA_UNROLL
        for (int i = 0; i < 4; ++i)
          x[i] = i < left ? load_shared_by_blocks(reinterpret_cast<const float*>(from + i * next)) : 0.0f;
      }
    } else {
      uint2 four = {0, 0};
      if (together && left >= 4) {
        four = load_shared_by_blocks(reinterpret_cast<const uint2*>(from));
      } else {
        uint32_t bits[4];
        SLORA_UNROLL
        for (int i = 0; i < 4; ++i)
          bits[i] = i < left ? load_shared_by_blocks(reinterpret_cast<const uint16_t*>(from + i * next)) : 0;
        four.x = bits[0] | bits[1] << 16, four.y = bits[2] | bits[3] << 16;
      }
      x[0] = low_number(four.x, dtype), x[1] = high_number(four.x, dtype);
      x[2] = low_number(four.y, dtype), x[3] = high_number(four.y, dtype);
    }
    SLORA_UNROLL
    for (int i = 0; i < 4; ++i) x[i] *= scale;
    if (kParts == 2) {
      SLORA_UNROLL
      for (int i = 0; i < 4; ++i)
        reinterpret_cast<float*>(to)[(4 * quarter + i) * (kIsA ? kCudaTileCols : kStrideB) + place] = x[i];
      continue;
    }
    constexpr int kPart = 8 * (kIsA ? kCudaTileCols : kStep);
    uint32_t* words = reinterpret_cast<uint32_t*>(to) + (quarter >> 2) * (kParts * kPart) +
                      (kIsA ? word_of_A(place, quarter & 3) : word_of_B(place, quarter & 3));
    SLORA_UNROLL
    for (int p = 0; p < kParts; ++p, words += kPart) {
      const uint32_t low = pair_of(x[0], x[1], part), high = pair_of(x[2], x[3], part);
      if (kIsA)
        *reinterpret_cast<uint2*>(words) = make_uint2(low, high);
      else
        words[0] = low, words[2] = high;
      x[0] -= low_number(low, part), x[1] -= high_number(low, part);
      x[2] -= low_number(high, part), x[3] -= high_number(high, part);
    }
  }
}

SLORA_DEVICE void multiply_fused(float (&sum)[4][8], const float* As, const float* Bs, int count) {
  SLORA_KEEP_ROLLED
  for (int j = 0; j < count; ++j, As += kCudaTileCols, Bs += kStrideB) {
    const float4 b = *reinterpret_cast<const float4*>(Bs);
    const float4 a[2] = {*reinterpret_cast<const float4*>(As), *reinterpret_cast<const float4*>(As + kRunGap)};
    const float rows[4] = {b.x, b.y, b.z, b.w};
    const float cols[8] = {a[0].x, a[0].y, a[0].z, a[0].w, a[1].x, a[1].y, a[1].z, a[1].w};
    SLORA_UNROLL
    for (int i = 0; i < 4; ++i) {
      SLORA_UNROLL
      for (int c = 0; c < 8; ++c) sum[i][c] = fused(rows[i], cols[c], sum[i][c]);
    }
  }
}

// As and Bs point at the warp's first column and row.
template <Dtype part, int kParts>
SLORA_DEVICE void multiply_tensor(float (&sum)[4][8], const uint32_t* As, const uint32_t* Bs, unsigned g, unsigned q,
                                  int count) {
  const uint32_t *even = As + word_of_A(g, q), *odd = As + word_of_A(8 + g, q);  // columns 16 apart lie alike
  Bs += word_of_B(g, q);
  SLORA_KEEP_ROLLED
  for (int j = 0; j < count; j += 16) {
    uint4 b[kParts][2];
    SLORA_UNROLL
    for (int p = 0; p < kParts; ++p, Bs += 8 * kStep) {
      SLORA_UNROLL
      for (int m = 0; m < 2; ++m) b[p][m] = *reinterpret_cast<const uint4*>(Bs + 128 * m);
    }
    SLORA_UNROLL
    for (int t = 0; t < 4; ++t) {
      uint2 a[kParts];
      SLORA_UNROLL
      for (int p = 0; p < kParts; ++p)
        a[p] = *reinterpret_cast<const uint2*>((t % 2 ? odd : even) + 8 * (p * kCudaTileCols + t / 2 * 16));
      SLORA_UNROLL
      for (int m = 0; m < 2; ++m) {
        float d[4] = {};
        SLORA_UNROLL
        for (int i = kParts - 1; i >= 0; --i) {
          SLORA_UNROLL
          for (int k = kParts - 1 - i; k >= 0; --k) mma<part>(d, b[i][m], a[k]);
        }
        SLORA_UNROLL
        for (int c = 0; c < 4; ++c) sum[2 * m + c / 2][2 * t + c % 2] += d[c];
      }
    }
    even += kParts * 8 * kCudaTileCols, odd += kParts * 8 * kCudaTileCols;
  }
}

// The eight weights of one row that a thread owns, as they lie in memory: runs of 16 bytes, kRunGap columns apart.
template <Dtype dtype>
struct Eight {
  using Bits = std::conditional_t<dtype == Dtype::f32, uint32_t, uint16_t>;
  static constexpr int kRuns = dtype == Dtype::f32 ? 2 : 1, kInRun = 8 / kRuns;
  alignas(16) uint32_t words[4 * kRuns];

  // Adds `scale` times `sum`; a word holds one number in fp32, else two.
  SLORA_DEVICE void add(float scale, const float (&sum)[8]) {
    SLORA_UNROLL
    for (int i = 0; i < 4 * kRuns; ++i) {
      const float low = fused(scale, sum[i * 2 / kRuns], low_number(words[i], dtype));
      words[i] = dtype == Dtype::f32
                     ? bits_of(low)
                     : pair_of(low, fused(scale, sum[i * 2 / kRuns + 1], high_number(words[i], dtype)), dtype);
    }
  }
  // Between memory and a slot in shared memory; `count` columns are left in the row from the first of these on. The
  // slots of the threads lie side by side.
  SLORA_DEVICE static void fetch(uint4* slot, const char* from, int count, bool aligned) {
    SLORA_UNROLL
    for (int run = 0; run < kRuns; ++run, count -= kRunGap, slot += kThreads, from += 4 * kRunGap) {
      if (aligned && count >= kInRun) {
        copy_ahead(slot, from);
      } else {
        SLORA_UNROLL
        for (int i = 0; i < kInRun; ++i)
          if (i < count) reinterpret_cast<Bits*>(slot)[i] = load_once(reinterpret_cast<const Bits*>(from) + i);
      }
    }
  }
  SLORA_DEVICE explicit Eight(const uint4* slot) {
    SLORA_UNROLL
    for (int run = 0; run < kRuns; ++run) reinterpret_cast<uint4*>(words)[run] = slot[run * kThreads];
  }
  SLORA_DEVICE void store(uint4* slot, char* to, int count, bool aligned) const {
    SLORA_UNROLL
    for (int run = 0; run < kRuns; ++run, count -= kRunGap, slot += kThreads, to += 4 * kRunGap) {
      if (aligned && count >= kInRun) {
        store_once(reinterpret_cast<uint4*>(to), reinterpret_cast<const uint4*>(words)[run]);
      } else {
        *slot = reinterpret_cast<const uint4*>(words)[run];
        SLORA_UNROLL
        for (int i = 0; i < kInRun; ++i)
          if (i < count) store_once(reinterpret_cast<Bits*>(to) + i, reinterpret_cast<const Bits*>(slot)[i]);
      }
    }
  }
};

// A thread's place: its row is row + g, modulo eight, its columns are within col ... col + 31.
struct Lane {
  unsigned thread, g, q, row, col;
};
SLORA_DEVICE Lane this_lane() {
  const unsigned thread = thread_index();
  return {thread, thread % 32 / 4, thread % 4, thread / 128 * 32, thread / 32 % 4 * 32};
}

// One tile of a segment. Where `resident` says that all of A fits into shared memory, it stays there for all rows, else
// it is staged like B.
template <Dtype dtype, Dtype part, int kParts>
SLORA_DEVICE void run_tile(const Segment& s, const Piece* pieces, int tile_row, int tile_col, char* shared, int slabs) {
  constexpr int64_t size = dtype == Dtype::f32 ? 4 : 2;
  constexpr int kRuns = Eight<dtype>::kRuns;
  const int64_t first_row = static_cast<int64_t>(tile_row) * kCudaTileRows;
  const int64_t first_col = static_cast<int64_t>(tile_col) * kCudaTileCols;
  const int rows = static_cast<int>(s.rows - first_row < kCudaTileRows ? s.rows - first_row : kCudaTileRows);
  const int cols = static_cast<int>(s.cols - first_col < kCudaTileCols ? s.cols - first_col : kCudaTileCols);
  const bool aligned = (reinterpret_cast<uintptr_t>(s.source) | reinterpret_cast<uintptr_t>(s.target) |
                        static_cast<uintptr_t>((s.source_stride | s.target_stride) * size)) %
                           16 ==
                       0;
  // One term on tensor cores: its scale waits for the end, so that B in 16 bits stays exact.
  const auto scale_last = [&] { return dtype != Dtype::f32 && s.pieces == 1; };
  const auto resident = [&] { return s.slabs <= slabs; };
  char *Bs = shared + Shared<dtype>::kB, *As = shared + Shared<dtype>::kA;

  const auto fetch_W = [&](int row) {
    const Lane lane = this_lane();
    const int mine = row + lane.row + lane.g, col = lane.col + static_cast<int>(lane.q) * Eight<dtype>::kInRun;
    const char* source = s.source + ((first_row + mine) * s.source_stride + first_col + col) * size;
    uint4* slot = reinterpret_cast<uint4*>(shared) + lane.thread;
    SLORA_UNROLL
    for (int i = 0; i < 4; ++i, source += 8 * size * s.source_stride, slot += kRuns * kThreads)
      Eight<dtype>::fetch(slot, source, mine + 8 * i < rows ? cols - col : 0, aligned);
  };
  fetch_W(0);
  SLORA_KEEP_ROLLED
  for (int row = 0; row < rows; row += kStep) {
    float sum[4][8] = {};
    char* A = As;
    SLORA_KEEP_ROLLED
    for (int p = 0; p < s.pieces; ++p) {
      const Piece& piece = pieces[p];
      SLORA_KEEP_ROLLED
      for (int j = 0; j < piece.rank; j += kChunk) {
        const int chunk = static_cast<int>(piece.rank - j < kChunk ? piece.rank - j : kChunk);
        __syncthreads();
        if (row == 0 || !resident()) {
          const int c = thread_index() % kCudaTileCols, quarter = thread_index() / kCudaTileCols;
          const int64_t index = j * piece.A_strides[0] + (first_col + c) * piece.A_strides[1];
          stage<part, kParts, true>(A, place_of<dtype>(c), piece.A, index, piece.A_strides[0], piece.A_dtype, c < cols,
                                    chunk, 1.0f, quarter, kThreads / kCudaTileCols);
        }
        const int place = thread_index() / 4, quarter = thread_index() % 4, r = row + row_at<dtype>(place);
        const int64_t index = (first_row + r) * piece.B_strides[0] + j * piece.B_strides[1];
        stage<part, kParts, false>(Bs, place, piece.B, index, piece.B_strides[1], piece.B_dtype, r < rows, chunk,
                                   scale_last() ? 1.0f : static_cast<float>(piece.scale), quarter, 4);
        __syncthreads();
        const Lane lane = this_lane();
        if constexpr (kParts == 2)
          multiply_fused(sum, reinterpret_cast<const float*>(A) + lane.col + lane.q * 4,
                         reinterpret_cast<const float*>(Bs) + lane.row + lane.g * 4, chunk);
        else
          multiply_tensor<part, kParts>(sum, reinterpret_cast<const uint32_t*>(A) + 8 * lane.col,
                                        reinterpret_cast<const uint32_t*>(Bs) + 8 * lane.row, lane.g, lane.q, chunk);
        if (resident()) A += (chunk + 15) / 16 * (kParts * kSlab);
      }
    }

    const Lane lane = this_lane();
    const int mine = row + lane.row + lane.g, col = lane.col + static_cast<int>(lane.q) * Eight<dtype>::kInRun;
    const float scale = scale_last() ? static_cast<float>(pieces->scale) : 1.0f;
    char* target = s.target + ((first_row + mine) * s.target_stride + first_col + col) * size;
    uint4* slot = reinterpret_cast<uint4*>(shared) + lane.thread;
    const int64_t down = 8 * size * s.target_stride, terms = s.pieces;
    wait_for_copies();
    SLORA_UNROLL
    for (int i = 0; i < 4; ++i, target += down, slot += kRuns * kThreads) {
      Eight<dtype> W(slot);
      if (terms > 0) W.add(scale, sum[i]);
      W.store(slot, target, mine + 8 * i < rows ? cols - col : 0, aligned);
    }
    fetch_W(row + kStep);
  }
}

// The last of `count` segments whose first tile is not after `tile`: all threads try one each, and again within the
// stretch that is left, so that up to 256 segments take one access.
SLORA_DEVICE int segment_of(const int32_t* first_tile, int count, int tile) {
  int64_t found = 0, step = 1;
  while ((count - 1) / step >= kThreads) step *= kThreads;
  for (; step > 0; step /= kThreads) {
    const int64_t i = found + static_cast<int64_t>(threadIdx.x) * step;
    found += step * (__syncthreads_count(i < count && load_shared_by_blocks(first_tile + i) <= tile) - 1);
  }
  return static_cast<int>(found);
}

// One block per tile; the tiles of a segment follow one another row by row. `slabs` of A fit into shared memory.
template <Dtype dtype>
SLORA_KERNEL(kThreads, 2)
merge_kernel(const Segment* segments, const int32_t* first_tile, int count, const Piece* pieces, int slabs) {
  SLORA_SHARED(memory);
  char* shared = reinterpret_cast<char*>(memory);
  const int block = static_cast<int>(blockIdx.x), index = segment_of(first_tile, count, block);
  const Segment& s = segments[index];
  const Piece* first = pieces + s.first_piece;
  const int tile = block - first_tile[index], across = static_cast<int>((s.cols - 1) / kCudaTileCols + 1);
  const int row = tile / across, col = tile % across;
  if constexpr (dtype == Dtype::f32)
    run_tile<dtype, Dtype::f32, 2>(s, first, row, col, shared, slabs);
  else if (s.parts != 1)
    run_tile<dtype, Dtype::bf16, 3>(s, first, row, col, shared, slabs);
  else if (first->A_dtype == Dtype::bf16)
    run_tile<dtype, Dtype::bf16, 1>(s, first, row, col, shared, slabs);
  else
    run_tile<dtype, Dtype::f16, 1>(s, first, row, col, shared, slabs);
}

}  // namespace slora
