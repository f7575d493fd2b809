// What the native checks share: random cases, the reference, and comparing bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/merge.h"
#include "../../csrc/numbers.h"

namespace check {

using slora::Dtype;

#define CHECK(condition, ...)                                              \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fprintf(stderr, "\n");                                          \
      std::exit(1);                                                        \
    }                                                                      \
  } while (0)

// Rounding by comparing neighbours in double, apart from the bit tricks of the executors.
inline uint16_t narrowed(float value, Dtype dtype) {
  const bool bf16 = dtype == Dtype::bf16;
  if (std::isnan(value)) return bf16 ? 0x7fc0 : 0x7e00 | (std::signbit(value) ? 0x8000 : 0);
  const auto widen = [&](uint32_t bits) -> double {
    const uint32_t largest = bf16 ? 0x7f80 : 0x7c00;
    // Infinity counts as the number that would follow the largest one, as in IEEE 754's rounding.
    if (bits == largest) return bf16 ? std::ldexp(1.0, 128) : 65536.0;
    return bf16 ? slora::float_of_bf16(static_cast<uint16_t>(bits)) : slora::float_of_f16(static_cast<uint16_t>(bits));
  };
  const double size = std::fabs(static_cast<double>(value));
  uint32_t low = 0, high = bf16 ? 0x7f80 : 0x7c00;
  if (size >= widen(high)) return static_cast<uint16_t>(high | (std::signbit(value) ? 0x8000 : 0));
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (widen(middle) <= size ? low : high) = middle;
  }
  const double below = size - widen(low), above = widen(high) - size;
  const uint32_t bits = below < above || (below == above && low % 2 == 0) ? low : high;
  return static_cast<uint16_t>(bits | (std::signbit(value) ? 0x8000 : 0));
}

inline double get(const char* data, int64_t index, Dtype dtype) {
  switch (dtype) {
    case Dtype::f32:
      return reinterpret_cast<const float*>(data)[index];
    case Dtype::bf16:
      return slora::float_of_bf16(reinterpret_cast<const uint16_t*>(data)[index]);
    case Dtype::f16:
      return slora::float_of_f16(reinterpret_cast<const uint16_t*>(data)[index]);
    default:
      return reinterpret_cast<const double*>(data)[index];
  }
}

inline void set(char* data, int64_t index, Dtype dtype, double value) {
  if (dtype == Dtype::f64) {
    reinterpret_cast<double*>(data)[index] = value;
  } else if (dtype == Dtype::f32) {
    reinterpret_cast<float*>(data)[index] = static_cast<float>(value);
  } else {
    reinterpret_cast<uint16_t*>(data)[index] = narrowed(static_cast<float>(value), dtype);
  }
}

// A matrix in memory of its own, of exactly the size it needs, so that a sanitizer sees the first byte beyond.
struct Matrix {
  std::unique_ptr<char[]> memory;
  char* data = nullptr;
  int64_t rows = 0, cols = 0, row_stride = 0, col_stride = 1, bytes = 0;
  Dtype dtype = Dtype::f32;

  Matrix(int64_t rows_, int64_t cols_, int64_t row_stride_, int64_t col_stride_, Dtype dtype_, int64_t offset = 0)
      : rows(rows_), cols(cols_), row_stride(row_stride_), col_stride(col_stride_), dtype(dtype_) {
    const int64_t size = slora::bytes_of(dtype);
    const int64_t elements = rows == 0 || cols == 0 ? 0 : (rows - 1) * row_stride + (cols - 1) * col_stride + 1;
    bytes = (elements + offset) * size;
    memory.reset(new char[static_cast<size_t>(bytes)]());
    data = memory.get() + offset * size;
  }
  int64_t at(int64_t row, int64_t col) const { return row * row_stride + col * col_stride; }
  // Normal numbers, or with a `grid` some of its multiples: sums of those often lie half way between two numbers of
  // 16 bits, which others hardly ever do.
  template <class Random>
  void fill(Random& random, double scale, double grid) {
    std::normal_distribution<double> normal(0.0, scale);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j)
        set(data, at(i, j), dtype, grid == 0.0 ? normal(random) : grid * (static_cast<double>(random() % 65) - 32.0));
  }
};

struct Case {
  std::vector<Matrix> weights, results, As, Bs;
  std::vector<slora::Weight> plan_weights;
  std::vector<slora::Term> terms;
};

// A call with up to three weights of at most `most_rows` columns, and that many rows beyond `more_rows`, their terms on
// ragged slices, strided factors; in place or not.
inline Case random_case(std::mt19937_64& random, const std::vector<Dtype>& dtypes, int64_t most_rows, int64_t most_rank,
                        bool in_place, int64_t more_rows = 0) {
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); };
  const std::vector<Dtype> factors = {Dtype::f32, Dtype::bf16, Dtype::f16};
  Case c;
  const int64_t count = 1 + below(3);
  const bool ties = below(3) == 0;
  for (int64_t w = 0; w < count; ++w) {
    const Dtype dtype = dtypes[static_cast<size_t>(below(static_cast<int64_t>(dtypes.size())))];
    const int64_t rows = below(8) == 0 ? 0 : more_rows + 1 + below(more_rows > 0 ? 500 : most_rows);
    const int64_t cols = below(8) == 0 ? 0 : 1 + below(more_rows > 0 ? 40 : most_rows);
    const int64_t aligned = (cols + 7) / 8 * 8;
    const int64_t stride = below(2) == 0 ? aligned : cols + below(9);
    c.weights.emplace_back(rows, cols, stride, 1, dtype, below(2) == 0 ? 0 : below(5));
    c.weights.back().fill(random, 0.1, ties ? 0.25 : 0.0);
    if (!in_place) c.results.emplace_back(rows, cols, below(2) == 0 ? aligned : cols, 1, dtype);
    const Matrix& W = c.weights.back();
    const Matrix& target = in_place ? W : c.results.back();
    c.plan_weights.push_back({W.data, target.data, rows, cols, W.row_stride, target.row_stride, dtype});
    for (int64_t t = below(4); t > 0; --t) {
      const int64_t rank = 1 + (below(3) == 0 ? below(most_rank) : below(9)),
                    first = below(2) == 0 ? 0 : below(rows + 1);
      const int64_t n = first == 0 ? rows : below(rows - first + 1);
      const bool transposed_A = below(4) == 0, transposed_B = below(4) == 0;
      c.As.emplace_back(rank, cols, transposed_A ? 1 : cols + below(4), transposed_A ? rank : 1,
                        factors[static_cast<size_t>(below(3))]);
      c.Bs.emplace_back(n, rank, transposed_B ? 1 : rank + below(4), transposed_B ? n : 1,
                        factors[static_cast<size_t>(below(3))]);
      c.As.back().fill(random, 1.0, ties ? 0x1p-5 : 0.0);
      c.Bs.back().fill(random, 0.1, ties ? 0x1p-5 : 0.0);
      const Matrix &A = c.As.back(), &B = c.Bs.back();
      const double scales[] = {1.0, 0.3, -2.0, 1e-3, 0.0};
      c.terms.push_back({A.data,
                         B.data,
                         {A.row_stride, A.col_stride},
                         {B.row_stride, B.col_stride},
                         rank,
                         n,
                         w,
                         first,
                         scales[below(5)],
                         A.dtype,
                         B.dtype});
    }
  }
  return c;
}

// Element (row, col) of weight w by merge.h's definition: the sum in fp32 (or fp64), before the last rounding; and for
// tensor cores the sum in fp64, the rank and the sum of magnitudes.
struct Expected {
  double value, exact, magnitude;
  int64_t rank;
  bool touched;
};

inline Expected expected(const Case& c, const std::vector<double>& base, int64_t w, int64_t row, int64_t col) {
  const Matrix& W = c.weights[static_cast<size_t>(w)];
  const bool wide = W.dtype == Dtype::f64;
  float sum = 0.0f;
  const double old = base[static_cast<size_t>(row * W.cols + col)];
  Expected e{0.0, old, 0.0, 0, false};
  double wide_sum = 0.0;
  for (const slora::Term& t : c.terms) {
    if (t.weight != w || t.scale == 0.0 || row < t.first_row || row >= t.first_row + t.rows) continue;
    e.touched = true;
    e.rank += t.rank;
    for (int64_t j = 0; j < t.rank; ++j) {
      const double A = get(static_cast<const char*>(t.A), j * t.A_strides[0] + col * t.A_strides[1], t.A_dtype);
      const double B =
          get(static_cast<const char*>(t.B), (row - t.first_row) * t.B_strides[0] + j * t.B_strides[1], t.B_dtype);
      const double product = static_cast<double>(static_cast<float>(t.scale)) * B * A;
      e.exact += product;
      e.magnitude += std::fabs(product);
      if (wide) {
        wide_sum = std::fma(t.scale * B, A, wide_sum);
      } else {
        sum = std::fma(static_cast<float>(t.scale) * static_cast<float>(B), static_cast<float>(A), sum);
      }
    }
  }
  e.value = wide ? old + wide_sum : static_cast<double>(static_cast<float>(old) + sum);
  return e;
}

inline std::vector<double> values(const Matrix& m) {
  std::vector<double> result;
  for (int64_t i = 0; i < m.rows; ++i)
    for (int64_t j = 0; j < m.cols; ++j) result.push_back(get(m.data, m.at(i, j), m.dtype));
  return result;
}

}  // namespace check
