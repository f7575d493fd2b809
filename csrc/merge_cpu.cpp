// The CPU executor: threads take tiles from one queue; a tile's A and B are packed once as the accumulator's type, and
// a block of kRows x kVectors vectors of the delta then stays in registers over the whole rank, so that W is read once
// and written once and no dense delta exists. Blocks follow one another along the rows, as W lies in memory.
//
// The inner loop is written with the compiler's vector extensions and compiled three times, for AVX-512, for AVX2 with
// FMA, and for whatever the build targets; the processor chooses at run time. So one binary runs on any x86-64.
#include <algorithm>
#include <limits>
#include <new>

#include "merge.h"
#include "numbers.h"
#include "vectors.h"

#if defined(__x86_64__)
#define SLORA_X86 1
#endif

namespace slora {
namespace {

constexpr int64_t kRows = 6;
// Packed A of one tile: half of a small L2, which W streams through as well.
constexpr int64_t kPanelBytes = 128 * 1024;
constexpr int64_t kTileRows = 64 * kRows;
constexpr int64_t kWidestBlock = 256;  // bytes
constexpr int64_t kAhead = 2;          // blocks between the one at hand and the one that is fetched into the cache

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

template <class T>
SLORA_INLINE T read_number(const char* data, int64_t index, Dtype dtype) {
  switch (dtype) {
    case Dtype::f32:
      return static_cast<T>(reinterpret_cast<const float*>(data)[index]);
    case Dtype::bf16:
      return static_cast<T>(float_of_bf16(reinterpret_cast<const uint16_t*>(data)[index]));
    case Dtype::f16:
      return static_cast<T>(float_of_f16(reinterpret_cast<const uint16_t*>(data)[index]));
    default:
      return static_cast<T>(reinterpret_cast<const double*>(data)[index]);
  }
}

// ---- the block ----

template <class T, int kLanes, bool kFused>
SLORA_INLINE void add_product(typename Vector<T, kLanes>::type& sum, const typename Vector<T, kLanes>::type& a, T b) {
  if (kFused) {
    sum += a * b;  // contracted to one fused multiply-add; the tests would see it if it were not
  } else {
    for (int lane = 0; lane < kLanes; ++lane)
      sum[lane] = sizeof(T) == 4 ? __builtin_fmaf(a[lane], b, sum[lane]) : __builtin_fma(a[lane], b, sum[lane]);
  }
}

// target[kRows][kVectors * kLanes] = source + B @ A, with A packed [rank][kVectors * kLanes] and B [rank][kRows].
// Strides of source and target in bytes.
template <class T>
using Block = void (*)(const T* A, const T* B, int64_t rank, const char* source, int64_t source_stride, char* target,
                       int64_t target_stride, const char* next);

template <class T, Dtype dtype, int kLanes, int kVectors, bool kFused>
SLORA_INLINE void block(const T* A, const T* B, int64_t rank, const char* source, int64_t source_stride, char* target,
                        int64_t target_stride, const char* next) {
  using V = typename Vector<T, kLanes>::type;
  constexpr int64_t size = dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2, width = size * kLanes;
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row, next += source_stride)
#pragma GCC unroll 8
    for (int64_t i = 0; i < kVectors * width; i += 64) __builtin_prefetch(next + i);
  V sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) sum[row][i] = V{};
  for (int64_t j = 0; j < rank; ++j, A += kVectors * kLanes, B += kRows) {
    V a[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) a[i] = *reinterpret_cast<const V*>(A + i * kLanes);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) add_product<T, kLanes, kFused>(sum[row][i], a[i], B[row]);
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row, source += source_stride, target += target_stride) {
    // Without this the compiler computes all addresses up front and spills them.
    asm("" : "+r"(source), "+r"(target));
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i += 2) {
      V a, b;
      load<dtype, kLanes>(source + i * width, a, b);
      a += sum[row][i];
      b += sum[row][i + 1];
      store<dtype, kLanes>(target + i * width, a, b);
    }
  }
}

#define SLORA_BLOCK(name, attributes, type, dtype, lanes, vectors, fused)                                      \
  attributes void name(const type* A, const type* B, int64_t rank, const char* source, int64_t source_stride,  \
                       char* target, int64_t target_stride, const char* next) {                                \
    block<type, dtype, lanes, vectors, fused>(A, B, rank, source, source_stride, target, target_stride, next); \
  }
#define SLORA_BLOCKS(name, attributes, lanes, vectors, fused)                     \
  SLORA_BLOCK(name##_f32, attributes, float, Dtype::f32, lanes, vectors, fused)   \
  SLORA_BLOCK(name##_bf16, attributes, float, Dtype::bf16, lanes, vectors, fused) \
  SLORA_BLOCK(name##_f16, attributes, float, Dtype::f16, lanes, vectors, fused)   \
  SLORA_BLOCK(name##_f64, attributes, double, Dtype::f64, lanes / 2, vectors, fused)

#if defined(__FP_FAST_FMAF) && defined(__FP_FAST_FMA)
SLORA_BLOCKS(portable, , 4, 2, true)
#else
SLORA_BLOCKS(portable, , 4, 2, false)
#endif
#ifdef SLORA_X86
SLORA_BLOCKS(avx2, __attribute__((target("avx2,fma"))), 8, 2, true)
SLORA_BLOCKS(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), 16, 4, true)
#endif

// What one instruction set offers: `width` is that of a block in bytes of the accumulator's type, `lanes` the fp32
// numbers of a register.
struct Code {
  Block<float> f32, bf16, f16;
  Block<double> f64;
  int64_t width, lanes;

  Block<float> of(Dtype dtype, float) const { return dtype == Dtype::f32 ? f32 : dtype == Dtype::bf16 ? bf16 : f16; }
  Block<double> of(Dtype, double) const { return f64; }
};

Code code_of(Isa isa) {
#ifdef SLORA_X86
  if (isa == Isa::avx512) return {avx512_f32, avx512_bf16, avx512_f16, avx512_f64, 256, 16};
  if (isa == Isa::avx2) return {avx2_f32, avx2_bf16, avx2_f16, avx2_f64, 64, 8};
#endif
  return {portable_f32, portable_bf16, portable_f16, portable_f64, 32, 4};
}

// ---- the tile ----

// One rank of A, in strips of `width` columns that lie `step` apart. A strip is padded with zeros, and in groups of
// 2 * lanes columns the even ones precede the odd ones where `lanes` is not 0: what load() makes of 16-bit weights.
template <class T>
SLORA_INLINE void pack_row(const char* A, int64_t stride, Dtype dtype, int64_t cols, int64_t width, int64_t lanes,
                           int64_t step, T* strip) {
  for (int64_t col = 0; col < cols; col += width, strip += step) {
    const int64_t count = std::min(width, cols - col);
    if (lanes == 0) {
      for (int64_t i = 0; i < count; ++i) strip[i] = read_number<T>(A, (col + i) * stride, dtype);
      for (int64_t i = count; i < width; ++i) strip[i] = 0;
      continue;
    }
    for (int64_t i = 0; i < width; i += 2 * lanes) {
      const int64_t even = std::clamp<int64_t>((count - i + 1) / 2, 0, lanes);
      const int64_t odd = std::clamp<int64_t>((count - i) / 2, 0, lanes);
      T *evens = strip + i, *odds = evens + lanes;
      for (int64_t j = 0; j < even; ++j) evens[j] = read_number<T>(A, (col + i + 2 * j) * stride, dtype);
      for (int64_t j = 0; j < odd; ++j) odds[j] = read_number<T>(A, (col + i + 2 * j + 1) * stride, dtype);
      for (int64_t j = even; j < lanes; ++j) evens[j] = 0;
      for (int64_t j = odd; j < lanes; ++j) odds[j] = 0;
    }
  }
}

// A as [strip][rank][width].
template <class T>
void pack_A(const Plan& plan, const Segment& s, int64_t col, int64_t cols, const Code& code, T* panel) {
  const int64_t width = code.width / static_cast<int64_t>(sizeof(T)), lanes = bytes_of(s.dtype) == 2 ? code.lanes : 0;
  for (int64_t p = s.first_piece; p < s.first_piece + s.pieces; ++p) {
    const Piece& piece = plan.pieces[p];
    const int64_t stride = piece.A_strides[1], step = s.rank * width;
    for (int64_t j = 0; j < piece.rank; ++j, panel += width) {
      const char* A = piece.A + (j * piece.A_strides[0] + col * stride) * bytes_of(piece.A_dtype);
      // Constants make the loop one conversion per element, which the compiler vectorises.
      if (piece.A_dtype == Dtype::f32 && stride == 1) {
        pack_row<T>(A, 1, Dtype::f32, cols, width, lanes, step, panel);
      } else if (piece.A_dtype == Dtype::bf16 && stride == 1) {
        pack_row<T>(A, 1, Dtype::bf16, cols, width, lanes, step, panel);
      } else {
        pack_row<T>(A, stride, piece.A_dtype, cols, width, lanes, step, panel);
      }
    }
  }
}

template <class T>
void pack_column(const char* B, int64_t stride, Dtype dtype, int64_t rank, T scale, T* packed) {
  for (int64_t j = 0; j < rank; ++j) packed[j * kRows] = scale * read_number<T>(B, j * stride, dtype);
}

// scale * B as [group][rank][kRows], zeros beyond the last row.
template <class T>
void pack_B(const Plan& plan, const Segment& s, int64_t row, int64_t rows, T* packed) {
  for (int64_t p = s.first_piece; p < s.first_piece + s.pieces; ++p) {
    const Piece& piece = plan.pieces[p];
    const T scale = static_cast<T>(piece.scale);
    for (int64_t i = 0; i < round_up(rows, kRows); ++i) {
      T* to = packed + i / kRows * kRows * s.rank + i % kRows;
      const char* B = piece.B + (row + i) * piece.B_strides[0] * bytes_of(piece.B_dtype);
      if (i >= rows) {
        for (int64_t j = 0; j < piece.rank; ++j) to[j * kRows] = 0;
      } else if (piece.B_dtype == Dtype::f32) {
        pack_column<T>(B, piece.B_strides[1], Dtype::f32, piece.rank, scale, to);
      } else if (piece.B_dtype == Dtype::bf16) {
        pack_column<T>(B, piece.B_strides[1], Dtype::bf16, piece.rank, scale, to);
      } else {
        pack_column<T>(B, piece.B_strides[1], piece.B_dtype, piece.rank, scale, to);
      }
    }
    packed += piece.rank * kRows;
  }
}

// Rows and columns of the source as they are, to where rows are `stride` apart.
void copy_rows(const Segment& s, char* to, int64_t stride, int64_t first, int64_t rows, int64_t col, int64_t cols) {
  const int64_t size = bytes_of(s.dtype);
  for (int64_t row = first; row < first + rows; ++row)
    std::memcpy(to + (row * stride + col) * size, s.source + (row * s.source_stride + col) * size,
                static_cast<size_t>(cols * size));
}

// The rows `first .. first + rows - 1` and columns `col .. col + cols - 1` of segment s.
template <class T>
void run_tile(const Plan& plan, const Segment& s, int64_t first, int64_t rows, int64_t col, int64_t cols,
              const Code& code, char* scratch) {
  const Block<T> block = code.of(s.dtype, T());
  const int64_t size = bytes_of(s.dtype), width = code.width / static_cast<int64_t>(sizeof(T));
  const int64_t source_stride = s.source_stride * size, target_stride = s.target_stride * size;
  T* panel = reinterpret_cast<T*>(scratch);
  T* packed = panel + s.rank * round_up(cols, width);
  pack_A<T>(plan, s, col, cols, code, panel);
  pack_B<T>(plan, s, first, rows, packed);
  // A block at an edge of the matrix runs on a copy that is large enough.
  alignas(64) char edge[kRows * kWidestBlock] = {};
  for (int64_t row = 0; row < rows; row += kRows) {
    const T* B = packed + row * s.rank;
    const int64_t count = std::min(kRows, rows - row);
    const char* source = s.source + (first + row) * source_stride + col * size;
    char* target = s.target + (first + row) * target_stride + col * size;
    // The rows come into the cache here, from which the blocks then read them.
    if (s.backup != nullptr) copy_rows(s, s.backup, s.cols, first + row, count, col, cols);
    for (int64_t i = 0; i < cols; i += width, source += width * size, target += width * size) {
      const T* A = panel + i * s.rank;
      if (count == kRows && cols - i >= width) {
        // At the end of these rows the blocks ahead are the first of the next ones.
        const int64_t ahead = i + kAhead * width < cols ? 0 : kRows * source_stride - cols / width * width * size;
        const char* next = source + kAhead * width * size + ahead;
        block(A, B, s.rank, source, source_stride, target, target_stride, next);
        continue;
      }
      const auto bytes = static_cast<size_t>(std::min(width, cols - i) * size);
      for (int64_t r = 0; r < count; ++r) std::memcpy(edge + r * kWidestBlock, source + r * source_stride, bytes);
      block(A, B, s.rank, edge, kWidestBlock, edge, kWidestBlock, edge);
      for (int64_t r = 0; r < count; ++r) std::memcpy(target + r * target_stride, edge + r * kWidestBlock, bytes);
    }
  }
}

int64_t accumulator_bytes(const Segment& s) { return s.dtype == Dtype::f64 ? 8 : 4; }

}  // namespace

Isa best_isa() {
#ifdef SLORA_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

const char* name_of(Isa isa) { return isa == Isa::avx512 ? "AVX-512" : isa == Isa::avx2 ? "AVX2 and FMA" : "portable"; }

CpuMerge::CpuMerge(Plan plan, int64_t threads, Isa isa)
    : plan_(std::move(plan)), isa_(isa), scratch_per_worker_(0), next_(std::make_unique<std::atomic<int64_t>>(0)) {
  const Code code = code_of(isa);
  for (size_t i = 0; i < plan_.segments.size(); ++i) {
    const Segment& s = plan_.segments[i];
    const int64_t size = accumulator_bytes(s), width = code.width / size;
    const int64_t fitting = s.rank == 0 ? s.cols : kPanelBytes / (s.rank * size) / width * width;
    const int64_t wide = std::min(std::max(fitting, width), round_up(s.cols, width));
    const int64_t numbers = s.rank * (wide + std::min(kTileRows, round_up(s.rows, kRows)));
    scratch_per_worker_ = std::max(scratch_per_worker_, round_up(numbers * size, 64));
    for (int64_t row = 0; row < s.rows; row += kTileRows)
      for (int64_t col = 0; col < s.cols; col += wide)
        tiles_.push_back(
            {static_cast<int64_t>(i), row, std::min(kTileRows, s.rows - row), col, std::min(wide, s.cols - col)});
  }
  workers_ = std::min<int64_t>(std::max<int64_t>(threads, 1), static_cast<int64_t>(tiles_.size()));
  for (int64_t worker = 0; worker < workers_; ++worker)
    scratch_.emplace_back(new char[static_cast<size_t>(scratch_per_worker_ + 64)]);
}

void CpuMerge::run(int64_t worker) noexcept {
  const Code code = code_of(isa_);
  char* scratch = scratch_[static_cast<size_t>(worker)].get();
  scratch += (64 - reinterpret_cast<uintptr_t>(scratch) % 64) % 64;
  const auto count = static_cast<int64_t>(tiles_.size());
  for (int64_t i = next_->fetch_add(1); i < count; i = next_->fetch_add(1)) {
    const auto& [segment, row, rows, col, cols] = tiles_[i];
    const Segment& s = plan_.segments[segment];
    if (s.rank == 0) {
      if (s.backup != nullptr) copy_rows(s, s.backup, s.cols, row, rows, col, cols);
      if (s.source != s.target) copy_rows(s, s.target, s.target_stride, row, rows, col, cols);
    } else if (s.dtype == Dtype::f64) {
      run_tile<double>(plan_, s, row, rows, col, cols, code, scratch);
    } else {
      run_tile<float>(plan_, s, row, rows, col, cols, code, scratch);
    }
  }
}

}  // namespace slora
