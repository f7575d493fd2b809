// The CUDA kernel's own source, run thread by thread on the host (emulate.h), over random calls: fp32 weights get the
// bits of merge.h's definition, those in 16 bits a sum within the bound of the tensor cores (merge_kernel.cuh) of that
// in fp64; no byte outside the weights changes.
//
//   check_kernel <cases> <seed>
#include <string>

#include "check.h"
#include "emulate.h"

namespace slora {
uint32_t two_bf16(float low, float high) {
  return check::narrowed(low, Dtype::bf16) | static_cast<uint32_t>(check::narrowed(high, Dtype::bf16)) << 16;
}
uint32_t two_f16(float low, float high) {
  return check::narrowed(low, Dtype::f16) | static_cast<uint32_t>(check::narrowed(high, Dtype::f16)) << 16;
}
}  // namespace slora

#include "../../csrc/merge_kernel.cuh"

namespace {

using namespace slora;
using check::Case;
using check::Matrix;

template <Dtype dtype>
void launch(const Plan& plan, int64_t block_limit, int64_t sm_limit, uint64_t seed) {
  CudaTable table = make_cuda_table(plan, dtype);
  fit(table, dtype, block_limit, sm_limit);
  const auto kernel = table.warps == 4 ? &merge_kernel<dtype, 4> : &merge_kernel<dtype, 8>;
  CHECK(table.shared_bytes <= block_limit, "%lld bytes of shared memory", static_cast<long long>(table.shared_bytes));
  const char* base = table.bytes.data();
  for (int64_t b = 0; b < table.tile_count; ++b) {
    std::vector<float4> shared(static_cast<size_t>(table.shared_bytes) / sizeof(float4), float4{NAN, NAN, NAN, NAN});
    emulate::shared_memory = shared.data();
    emulate::blockIdx.x = static_cast<unsigned>(b);
    emulate::Block block(static_cast<int>(32 * table.warps), seed + static_cast<uint64_t>(b));
    const bool finished = block.run([&] {
      kernel(reinterpret_cast<const Segment*>(base + table.segments),
             reinterpret_cast<const int32_t*>(base + table.first_tile), static_cast<int>(table.segment_count),
             reinterpret_cast<const Piece*>(base + table.pieces), static_cast<int>(table.slabs));
    });
    CHECK(finished, "seed %llu: a barrier that not all threads reach", static_cast<unsigned long long>(seed));
  }
}

void compare(uint64_t seed, bool in_place) {
  std::mt19937_64 random(seed);
  Case c = check::random_case(random, {Dtype::f32, Dtype::bf16, Dtype::f16}, seed % 5 == 0 ? 400 : 90,
                              seed % 2 == 0 ? 32 : 100, in_place);
  // Weights that the sum almost cancels show its last bits, which rounding to 16 bits else hides.
  for (size_t w = 0; seed % 4 == 0 && w < c.weights.size(); ++w) {
    Matrix& W = c.weights[w];
    const std::vector<double> zeros(static_cast<size_t>(W.rows * W.cols));
    for (int64_t i = 0; i < W.rows; ++i)
      for (int64_t j = 0; j < W.cols; ++j)
        check::set(W.data, W.at(i, j), W.dtype, -check::expected(c, zeros, static_cast<int64_t>(w), i, j).exact);
  }
  std::vector<std::vector<double>> before;
  std::vector<std::string> memory;
  for (const Matrix& W : c.weights) {
    before.push_back(check::values(W));
    memory.emplace_back(W.memory.get(), static_cast<size_t>(W.bytes));
  }
  const Plan plan = make_plan(c.plan_weights, c.terms);
  // The smaller limit leaves room for few ranks of A, which are then staged anew for every unit. An SM that does not
  // hold four blocks gets larger ones.
  const int64_t block_limit = seed % 7 == 0 ? 64 * 1024 : 163 * 1024, sm_limit = seed / 2 % 2 == 0 ? 228 * 1024 : 0;
  launch<Dtype::f32>(plan, block_limit, sm_limit, seed);
  launch<Dtype::bf16>(plan, block_limit, sm_limit, seed);
  launch<Dtype::f16>(plan, block_limit, sm_limit, seed);
  for (size_t w = 0; w < c.weights.size(); ++w) {
    const Matrix &W = c.weights[w], &result = in_place ? W : c.results[w];
    for (int64_t i = 0; i < W.rows; ++i) {
      for (int64_t j = 0; j < W.cols; ++j) {
        const check::Expected e = check::expected(c, before[w], static_cast<int64_t>(w), i, j);
        const double old = before[w][static_cast<size_t>(i * W.cols + j)],
                     found = check::get(result.data, result.at(i, j), W.dtype);
        char low[8] = {}, high[8] = {};
        const bool tensor = W.dtype != Dtype::f32 && e.touched;
        const double slack = tensor ? std::ldexp(std::fabs(old) + (e.rank + 10.0) * e.magnitude, -24) : 0.0,
                     middle = tensor      ? e.exact
                              : e.touched ? e.value
                                          : old;
        check::set(low, 0, W.dtype, middle - slack);
        check::set(high, 0, W.dtype, middle + slack);
        CHECK(check::get(low, 0, W.dtype) <= found && found <= check::get(high, 0, W.dtype),
              "seed %llu, weight %zu [%lld, %lld], dtype %d, rank %lld: %.9g, not %.9g +- %.3g",
              static_cast<unsigned long long>(seed), w, static_cast<long long>(i), static_cast<long long>(j),
              static_cast<int>(W.dtype), static_cast<long long>(e.rank), found, middle, slack);
        if (in_place) check::set(c.weights[w].data, W.at(i, j), W.dtype, old);
      }
    }
    CHECK(std::memcmp(W.memory.get(), memory[w].data(), memory[w].size()) == 0, "seed %llu wrote outside weight %zu",
          static_cast<unsigned long long>(seed), w);
  }
}

// A factor that is not a number reaches exactly its row or column, whichever bits say so; an infinite one leaves
// nothing finite there.
template <Dtype dtype>
void check_what_is_not_finite(bool in_A, int64_t rank, uint32_t bits) {
  Matrix W(8, 8, 8, 1, dtype), A(rank, 8, 8, 1, Dtype::f32), B(8, rank, rank, 1, Dtype::f32);
  for (Matrix* m : {&W, &A, &B})
    for (int64_t i = 0; i < m->rows * m->cols; ++i) check::set(m->data, i, m->dtype, 1.0);
  reinterpret_cast<uint32_t*>(in_A ? A.data : B.data)[in_A ? 3 * 8 + 2 : 2 * rank + 3] = bits;
  const Term term = {A.data, B.data, {8, 1}, {rank, 1}, rank, 8, 0, 0, 0.5, Dtype::f32, Dtype::f32};
  launch<dtype>(make_plan({{W.data, W.data, 8, 8, 8, 8, dtype}}, {term}), 163 * 1024, 228 * 1024, bits);
  for (int64_t i = 0; i < 64; ++i) {
    const double found = check::get(W.data, i, dtype);
    const bool reached = (in_A ? i % 8 : i / 8) == 2;
    const bool right = !reached              ? found == 1.0 + 0.5 * static_cast<double>(rank)
                       : bits == 0x7f800000u ? !std::isfinite(found)
                                             : std::isnan(found);
    CHECK(right, "%s has %08x at rank %lld: W[%lld] = %g", in_A ? "A" : "B", bits, static_cast<long long>(rank),
          static_cast<long long>(i), found);
  }
}

void check_that_each_of_many_weights_gets_its_own_term() {
  const int64_t count = 300;
  std::vector<float> W(static_cast<size_t>(count)), A(W.size());
  const float one = 1.0f;
  std::vector<Weight> weights;
  std::vector<Term> terms;
  for (int64_t i = 0; i < count; ++i) {
    A[i] = static_cast<float>(i);
    weights.push_back({&W[i], &W[i], 1, 1, 1, 1, Dtype::f32});
    terms.push_back({&A[i], &one, {1, 1}, {1, 1}, 1, 1, i, 0, 1.0, Dtype::f32, Dtype::f32});
  }
  launch<Dtype::f32>(make_plan(weights, terms), 163 * 1024, 228 * 1024, 0);
  for (size_t i = 0; i < W.size(); ++i) CHECK(W[i] == A[i], "weight %zu got the term %g", i, static_cast<double>(W[i]));
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t cases = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 100;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  for (const bool in_A : {true, false})
    for (const int64_t rank : {8, 40})
      for (const uint32_t bits : {0x7fc00000u, 0x7fffffffu, 0x7ffff000u, 0x7f800001u, 0xffffffffu, 0x7f800000u}) {
        check_what_is_not_finite<Dtype::f32>(in_A, rank, bits);
        check_what_is_not_finite<Dtype::bf16>(in_A, rank, bits);
      }
  check_that_each_of_many_weights_gets_its_own_term();
  for (uint64_t i = 0; i < cases; ++i) compare(seed + i, i % 3 != 0);
  std::printf("%llu cases\n", static_cast<unsigned long long>(cases));
  return 0;
}
