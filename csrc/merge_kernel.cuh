// The CUDA kernel: one thread block per tile of 256 x 128 weights, 32 or 64 rows at a time.
//
// Read and written once: W, 16 bytes at a time, straight from and to registers. A is staged in shared memory once per
// tile and B for the rows at hand, both as fp32. A thread owns rows g, g + 8, g + 16, g + 24 of its warp's 32 x 32
// part, with g = lane / 4, and eight columns, neighbours or two runs of four: the layout of the accumulators of
// mma.m16n8k8 once the columns are dealt out right, so both ways to multiply share everything else.
//
//   rank <= 32   fused multiply-adds in the order merge.h states: the bits of the CPU path.
//   rank > 32    arithmetic would be the limit: tensor cores, TF32 with fp32 accumulators. 16-bit factors are exact in
//                TF32. An fp32 factor x is split into hi + lo, both TF32, |x - hi - lo| <= 2^-24 |x|, and
//                hi hi + hi lo + lo hi is summed: each product is off by at most 3 * 2^-24 of itself. How the hardware
//                rounds the R / 8 accumulations of eight products is not documented; that they stay within the bound
//                of R fused multiply-adds is assumed and unverified until tests/merging/test_batched_cuda.py has run on
//                a GPU. NaN gives NaN; A or B that is infinite, or above the largest TF32 number, gives NaN here
//                where the other way may give infinity.
//
// This file is also compiled for the host by a test that runs blocks of threads in turn, so everything that only a GPU
// has stands behind the few functions at the top.
#pragma once

#include "merge.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SLORA_DEVICE __device__ __forceinline__
#define SLORA_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define SLORA_UNROLL _Pragma("unroll")
#define SLORA_UNROLL_TWICE _Pragma("unroll 2")
#define SLORA_KEEP_ROLLED _Pragma("unroll 1")
#define SLORA_SHARED(name) extern __shared__ float4 name[]
#endif

namespace slora {

// Four or eight warps, each with 32 x 32 weights at a time: four side by side. Smaller blocks leave fewer registers
// unused, larger ones share a large panel of A.
template <bool kTensor>
struct Shape {
  static constexpr int kThreads = kTensor ? 256 : 128, kStep = kThreads / 4;  // threads, and rows at a time
  static constexpr int kStrideB = kStep + 8;
};
constexpr int kChunk = 32;  // ranks of B in shared memory at a time
// Strides in shared memory; 8 modulo 32, so that the four ranks a warp reads at a time fall into different banks.
constexpr int kStrideA = kCudaTileCols + 8;
constexpr int kTensorRank = 32;
// Blocks per multiprocessor that the registers must leave room for: what fits without spills.
template <Dtype dtype, bool kTensor>
constexpr int kBlocks = kTensor               ? 2
                        : dtype == Dtype::f32 ? 4
                                              : 5;

// How a table is launched: which kernel, and how much shared memory a block gets, at most `limit` bytes.
struct Launch {
  bool tensor;
  int panel;
  int64_t shared_bytes;
};

inline Launch launch_of(const CudaTable& table, int64_t limit) {
  const bool tensor = table.rank > kTensorRank;
  const int64_t B = kChunk * (tensor ? Shape<true>::kStrideB : Shape<false>::kStrideB);
  const int64_t fitting = (limit / 4 - B) / kStrideA / 8 * 8;
  const int64_t panel = table.padded_rank < fitting ? table.padded_rank : fitting;
  return {tensor, static_cast<int>(panel), 4 * (panel * kStrideA + B)};
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
template <class T>
SLORA_DEVICE void store_once(T* to, T value) {
  __stcs(to, value);
}

// d += a @ b for one 16 x 8 tile and eight ranks; the lower 13 bits of a and b are ignored.
SLORA_DEVICE void mma(float& d0, float& d1, float& d2, float& d3, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// Nearest TF32 number (ties away from zero), as bits whose lower 13 are zero. The carry out of a NaN's bits would make
// it 0, hence `quiet` where factors are staged: that NaN stays one.
SLORA_DEVICE float quiet(float x) { return x == x ? x : float_of(0x7fc00000u); }
SLORA_DEVICE uint32_t tf32(float x) { return (bits_of(x) + 0x1000u) & 0xffffe000u; }
SLORA_DEVICE uint32_t tf32_rest(float x, uint32_t high) { return tf32(x - float_of(high)); }

// Ranks of a term in shared memory.
SLORA_DEVICE int padded(int rank) { return (rank + 7) / 8 * 8; }

SLORA_DEVICE float read_factor(const char* data, int64_t index, Dtype dtype) {
  if (dtype == Dtype::f32) return load_shared_by_blocks(reinterpret_cast<const float*>(data) + index);
  const uint16_t bits = load_shared_by_blocks(reinterpret_cast<const uint16_t*>(data) + index);
  return dtype == Dtype::bf16 ? float_of(static_cast<uint32_t>(bits) << 16) : widened_f16(bits);
}

// Which row lies at a place in a rank of the staged B: a thread's four rows are neighbours.
SLORA_DEVICE int row_at(int place) { return place / 32 * 32 + place % 4 * 8 + place % 32 / 4; }
// The first column of the 32 of its warp that member q = lane % 4 owns, and how far its second run of four fp32 numbers
// lies behind the first: a warp's 16-byte accesses then cover whole sectors of 32 bytes in every dtype.
constexpr int kRunGap = 16;
template <Dtype dtype>
SLORA_DEVICE int first_column(int q) {
  return q * (dtype == Dtype::f32 ? 4 : 8);
}
// Where a column of the 128 lies in a rank of the staged A: the eight of a thread together, its even ones first.
template <Dtype dtype>
SLORA_DEVICE int place_of(int col) {
  if (dtype != Dtype::f32) return col / 8 * 8 + col % 2 * 4 + col % 8 / 2;
  return col / 32 * 32 + col % 16 / 4 * 8 + col % 2 * 4 + col % 32 / 16 * 2 + col % 4 / 2;
}

// `count` ranks of A from `first` on, zeros beyond column `cols` and up to a multiple of eight ranks.
template <Dtype dtype, bool kTensor>
SLORA_DEVICE void stage_A(float* As, const Piece& piece, int first, int count, int64_t first_col, int cols,
                          int thread) {
  constexpr int kThreads = Shape<kTensor>::kThreads;
  const int c = thread % kCudaTileCols;
  const int64_t column = (first_col + c) * piece.A_strides[1];
  As += place_of<dtype>(c);
  SLORA_UNROLL_TWICE
  for (int k = thread / kCudaTileCols; k < padded(count); k += kThreads / kCudaTileCols) {
    const float a =
        c < cols && k < count ? read_factor(piece.A, (first + k) * piece.A_strides[0] + column, piece.A_dtype) : 0.0f;
    As[k * kStrideA] = kTensor ? quiet(a) : a;
  }
}

// `count` ranks of scale * B from `first` on for the rows at hand, zeros beyond `rows` and up to a multiple of eight
// ranks.
template <bool kTensor>
SLORA_DEVICE void stage_B(float* Bs, const Piece& piece, float scale, int first, int count, int64_t first_row, int rows,
                          int thread) {
  const int r = row_at(thread / 4);
  const int64_t row = (first_row + r) * piece.B_strides[0];
  Bs += thread / 4;
  SLORA_UNROLL_TWICE
  for (int j = thread % 4; j < padded(count); j += 4) {
    const float b = r < rows && j < count
                        ? scale * read_factor(piece.B, row + (first + j) * piece.B_strides[1], piece.B_dtype)
                        : 0.0f;
    Bs[j * Shape<kTensor>::kStrideB] = kTensor ? quiet(b) : b;
  }
}

template <int kStrideB>
SLORA_DEVICE void multiply_fused(float (&sum)[4][8], const float* As, const float* Bs, int count) {
  SLORA_KEEP_ROLLED
  for (int j = 0; j < count; ++j) {
    const float4 b = *reinterpret_cast<const float4*>(Bs + j * kStrideB);
    const float4 even = *reinterpret_cast<const float4*>(As + j * kStrideA);
    const float4 odd = *reinterpret_cast<const float4*>(As + j * kStrideA + 4);
    const float rows[4] = {b.x, b.y, b.z, b.w};
    const float cols[8] = {even.x, odd.x, even.y, odd.y, even.z, odd.z, even.w, odd.w};
    SLORA_UNROLL
    for (int i = 0; i < 4; ++i) {
      SLORA_UNROLL
      for (int c = 0; c < 8; ++c) sum[i][c] = fused(rows[i], cols[c], sum[i][c]);
    }
  }
}

template <int kStrideB>
SLORA_DEVICE void multiply_tensor(float (&sum)[4][8], const float* As, const float* Bs, int count, bool split_A,
                                  bool split_B) {
  SLORA_KEEP_ROLLED
  for (int j = 0; j < count; j += 8) {
    const float4 b[2] = {*reinterpret_cast<const float4*>(Bs + j * kStrideB),
                         *reinterpret_cast<const float4*>(Bs + (j + 4) * kStrideB)};
    const float4 a[2] = {*reinterpret_cast<const float4*>(As + j * kStrideA),
                         *reinterpret_cast<const float4*>(As + (j + 4) * kStrideA)};
    const float rows[2][4] = {{b[0].x, b[0].y, b[1].x, b[1].y}, {b[0].z, b[0].w, b[1].z, b[1].w}};
    const float cols[4][2] = {{a[0].x, a[1].x}, {a[0].y, a[1].y}, {a[0].z, a[1].z}, {a[0].w, a[1].w}};
    uint32_t row_high[2][4], row_low[2][4];
    SLORA_UNROLL
    for (int m = 0; m < 2; ++m) {
      SLORA_UNROLL
      for (int i = 0; i < 4; ++i) {
        row_high[m][i] = tf32(rows[m][i]);
        row_low[m][i] = tf32_rest(rows[m][i], row_high[m][i]);
      }
    }
    SLORA_UNROLL
    for (int t = 0; t < 4; ++t) {
      const uint32_t high[2] = {tf32(cols[t][0]), tf32(cols[t][1])};
      const uint32_t low[2] = {tf32_rest(cols[t][0], high[0]), tf32_rest(cols[t][1], high[1])};
      SLORA_UNROLL
      for (int m = 0; m < 2; ++m) {
        float &d0 = sum[2 * m][2 * t], &d1 = sum[2 * m][2 * t + 1];
        float &d2 = sum[2 * m + 1][2 * t], &d3 = sum[2 * m + 1][2 * t + 1];
        if (split_B) mma(d0, d1, d2, d3, row_low[m], high[0], high[1]);
        if (split_A) mma(d0, d1, d2, d3, row_high[m], low[0], low[1]);
        mma(d0, d1, d2, d3, row_high[m], high[0], high[1]);
      }
    }
  }
}

// The eight weights of one row that a thread owns, as they lie in memory: runs of 16 bytes, kRunGap columns apart.
template <Dtype dtype>
struct Eight {
  static constexpr int kWords = dtype == Dtype::f32 ? 8 : 4, kRuns = kWords / 4, kInRun = 8 / kRuns;
  uint32_t words[kWords];

  SLORA_DEVICE float get(int i) const {
    if (dtype == Dtype::f32) return float_of(words[i]);
    const uint32_t word = words[i / 2];
    if (dtype == Dtype::bf16) return float_of(i % 2 ? word & 0xffff0000u : word << 16);
    return widened_f16(static_cast<uint16_t>(i % 2 ? word >> 16 : word));
  }
  SLORA_DEVICE void set(int i, float low, float high) {  // numbers i and i + 1
    if (dtype == Dtype::f32) {
      words[i] = bits_of(low);
      words[i + 1] = bits_of(high);
    } else {
      words[i / 2] = dtype == Dtype::bf16 ? two_bf16(low, high) : two_f16(low, high);
    }
  }
  // `count` columns are left in the row from the first of these on.
  SLORA_DEVICE void load(const char* from, int count, bool aligned) {
    SLORA_UNROLL
    for (int run = 0; run < kRuns; ++run, count -= kRunGap) {
      uint32_t* to = words + 4 * run;
      if (aligned && count >= kInRun) {
        const uint4 four = load_once(reinterpret_cast<const uint4*>(from + 4 * kRunGap * run));
        to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
        continue;
      }
      SLORA_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (dtype == Dtype::f32) {
          const auto* numbers = reinterpret_cast<const uint32_t*>(from) + kRunGap * run;
          to[i] = i < count ? load_once(numbers + i) : 0;
        } else {
          const auto* numbers = reinterpret_cast<const uint16_t*>(from);
          const uint32_t low = 2 * i < count ? load_once(numbers + 2 * i) : 0;
          const uint32_t high = 2 * i + 1 < count ? load_once(numbers + 2 * i + 1) : 0;
          to[i] = low | high << 16;
        }
      }
    }
  }
  SLORA_DEVICE void store(char* to, int count, bool aligned) const {
    SLORA_UNROLL
    for (int run = 0; run < kRuns; ++run, count -= kRunGap) {
      const uint32_t* from = words + 4 * run;
      if (aligned && count >= kInRun) {
        store_once(reinterpret_cast<uint4*>(to + 4 * kRunGap * run), make_uint4(from[0], from[1], from[2], from[3]));
        continue;
      }
      SLORA_UNROLL
      for (int i = 0; i < kInRun; ++i) {
        if (i >= count) break;
        if (dtype == Dtype::f32) {
          store_once(reinterpret_cast<uint32_t*>(to) + kRunGap * run + i, from[i % 4]);
        } else {
          const auto half = static_cast<uint16_t>(i % 2 ? from[i / 2] >> 16 : from[i / 2]);
          store_once(reinterpret_cast<uint16_t*>(to) + i, half);
        }
      }
    }
  }
};

// One block per tile. `panel` ranks of A fit into shared memory; a multiple of eight. Without a rank above 32 in the
// whole call the kernel without tensor cores runs, whose fewer registers leave room for more blocks.
template <Dtype dtype, bool kTensor>
SLORA_KERNEL(Shape<kTensor>::kThreads, (kBlocks<dtype, kTensor>))
merge_kernel(const Segment* __restrict__ segments, const Piece* __restrict__ pieces, const Tile* __restrict__ tiles,
             int panel) {
  constexpr int64_t size = dtype == Dtype::f32 ? 4 : 2;
  constexpr int kStep = Shape<kTensor>::kStep, kStrideB = Shape<kTensor>::kStrideB;
  SLORA_SHARED(shared);
  float* As = reinterpret_cast<float*>(shared);
  float* Bs = As + panel * kStrideA;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, g = thread % 32 / 4, q = thread % 4;
  const int part_row = warp / 4 * 32, part_col = warp % 4 * 32;

  const Tile& tile = tiles[blockIdx.x];
  const Segment& s = segments[tile.segment];
  const int64_t first_row = static_cast<int64_t>(tile.row) * kCudaTileRows;
  const int64_t first_col = static_cast<int64_t>(tile.col) * kCudaTileCols;
  const int rows = static_cast<int>(s.rows - first_row < kCudaTileRows ? s.rows - first_row : kCudaTileRows);
  const int cols = static_cast<int>(s.cols - first_col < kCudaTileCols ? s.cols - first_col : kCudaTileCols);
  const int col = part_col + first_column<dtype>(q);
  const bool aligned = (reinterpret_cast<uintptr_t>(s.source) | reinterpret_cast<uintptr_t>(s.target) |
                        static_cast<uintptr_t>((s.source_stride | s.target_stride) * size)) %
                           16 ==
                       0;
  const bool tensor = kTensor && s.rank > kTensorRank;
  // One term: its scale waits for the end, so that B in 16 bits stays exact on tensor cores.
  const bool scale_last = tensor && s.pieces == 1;
  // A that fits into the panel as a whole stays there for all rows of the tile.
  const bool resident = s.padded_rank <= panel;

  SLORA_KEEP_ROLLED
  for (int row = 0; row < rows; row += kStep) {
    Eight<dtype> W[4];
    const int mine = row + part_row + g;
    const char* source = s.source + ((first_row + mine) * s.source_stride + first_col + col) * size;
    SLORA_UNROLL
    for (int i = 0; i < 4; ++i, source += 8 * size * s.source_stride)
      W[i].load(source, mine + 8 * i < rows ? cols - col : 0, aligned);

    float sum[4][8] = {};
    float* A = As;
    for (int p = 0; p < s.pieces; ++p) {
      const Piece& piece = pieces[s.first_piece + p];
      const int rank = static_cast<int>(piece.rank);
      const float scale = scale_last ? 1.0f : static_cast<float>(piece.scale);
      for (int first = 0; first < rank; first += panel) {
        const int ranks = rank - first < panel ? rank - first : panel;
        for (int j = 0; j < ranks; j += kChunk) {
          const int chunk = ranks - j < kChunk ? ranks - j : kChunk;
          __syncthreads();
          if (j == 0 && (row == 0 || !resident))
            stage_A<dtype, kTensor>(A, piece, first, ranks, first_col, cols, thread);
          stage_B<kTensor>(Bs, piece, scale, first + j, chunk, first_row + row, rows - row, thread);
          __syncthreads();
          if (tensor) {
            multiply_tensor<kStrideB>(sum, A + (j + q) * kStrideA + part_col + g * 4,
                                      Bs + q * kStrideB + part_row + g * 4, chunk, piece.A_dtype == Dtype::f32,
                                      !scale_last || piece.B_dtype == Dtype::f32);
          } else {
            multiply_fused<kStrideB>(sum, A + j * kStrideA + part_col + q * 8, Bs + part_row + g * 4, chunk);
          }
        }
      }
      if (resident) A += padded(rank) * kStrideA;
    }

    if (s.pieces > 0) {
      const float scale = scale_last ? static_cast<float>(pieces[s.first_piece].scale) : 1.0f;
      SLORA_UNROLL
      for (int i = 0; i < 4; ++i) {
        SLORA_UNROLL
        for (int c = 0; c < 8; c += 2)
          W[i].set(c, fused(scale, sum[i][c], W[i].get(c)), fused(scale, sum[i][c + 1], W[i].get(c + 1)));
      }
    }
    char* target = s.target + ((first_row + mine) * s.target_stride + first_col + col) * size;
    SLORA_UNROLL
    for (int i = 0; i < 4; ++i, target += 8 * size * s.target_stride)
      W[i].store(target, mine + 8 * i < rows ? cols - col : 0, aligned);
  }
}

}  // namespace slora
