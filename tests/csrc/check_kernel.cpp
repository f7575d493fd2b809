// The CUDA kernel's own source, run thread by thread on the host (emulate.h), over random calls: with rank up to 32 the
// bits of merge.h's definition, above that within the bound of the tensor cores; no byte outside the weights changes.
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

template <Dtype dtype, bool kTensor>
void launch(const CudaTable& table, const Launch& how, uint64_t seed) {
  const char* base = table.bytes.data();
  for (int64_t b = 0; b < table.tile_count; ++b) {
    std::vector<float4> shared(static_cast<size_t>(how.shared_bytes) / sizeof(float4), float4{NAN, NAN, NAN, NAN});
    emulate::shared_memory = shared.data();
    emulate::blockIdx.x = static_cast<unsigned>(b);
    emulate::Block block(Shape<kTensor>::kThreads, seed + static_cast<uint64_t>(b));
    const bool finished = block.run([&] {
      merge_kernel<dtype, kTensor>(reinterpret_cast<const Segment*>(base + table.segments),
                                   reinterpret_cast<const Piece*>(base + table.pieces),
                                   reinterpret_cast<const Tile*>(base + table.tiles), how.panel);
    });
    CHECK(finished, "seed %llu: a barrier that not all threads reach", static_cast<unsigned long long>(seed));
  }
}

template <Dtype dtype>
void launch(const Plan& plan, int64_t shared_limit, uint64_t seed) {
  const CudaTable table = make_cuda_table(plan, dtype);
  if (table.tile_count == 0) return;
  const Launch how = launch_of(table, shared_limit);
  CHECK(how.shared_bytes <= shared_limit, "%lld bytes of shared memory", static_cast<long long>(how.shared_bytes));
  how.tensor ? launch<dtype, true>(table, how, seed) : launch<dtype, false>(table, how, seed);
}

void compare(uint64_t seed, bool in_place) {
  std::mt19937_64 random(seed);
  Case c = check::random_case(random, {Dtype::f32, Dtype::bf16, Dtype::f16}, seed % 5 == 0 ? 400 : 90,
                              seed % 2 == 0 ? 32 : 100, in_place);
  std::vector<std::vector<double>> before;
  std::vector<std::string> memory;
  for (const Matrix& W : c.weights) {
    before.push_back(check::values(W));
    memory.emplace_back(W.memory.get(), static_cast<size_t>(W.bytes));
  }
  const Plan plan = make_plan(c.plan_weights, c.terms);
  // The second limit leaves room for few ranks of A, which are then staged anew for every panel.
  const int64_t shared_limit = seed % 7 == 0 ? 32 * 1024 : 163 * 1024;
  launch<Dtype::f32>(plan, shared_limit, seed);
  launch<Dtype::bf16>(plan, shared_limit, seed);
  launch<Dtype::f16>(plan, shared_limit, seed);
  for (size_t w = 0; w < c.weights.size(); ++w) {
    const Matrix &W = c.weights[w], &result = in_place ? W : c.results[w];
    for (int64_t i = 0; i < W.rows; ++i) {
      for (int64_t j = 0; j < W.cols; ++j) {
        const check::Expected e = check::expected(c, before[w], static_cast<int64_t>(w), i, j);
        const double old = before[w][static_cast<size_t>(i * W.cols + j)],
                     found = check::get(result.data, result.at(i, j), W.dtype);
        char low[8] = {}, high[8] = {};
        // One fp32 unit of |W| + (R + 2) sum |c B A| each for the reference and for the tensor cores.
        const double slack =
            e.rank > kTensorRank ? std::ldexp(std::fabs(old) + (e.rank + 2.0) * e.magnitude, -22) : 0.0;
        check::set(low, 0, W.dtype, e.touched ? e.value - slack : old);
        check::set(high, 0, W.dtype, e.touched ? e.value + slack : old);
        CHECK(check::get(low, 0, W.dtype) <= found && found <= check::get(high, 0, W.dtype),
              "seed %llu, weight %zu [%lld, %lld], dtype %d, rank %lld: %.9g, not %.9g +- %.3g",
              static_cast<unsigned long long>(seed), w, static_cast<long long>(i), static_cast<long long>(j),
              static_cast<int>(W.dtype), static_cast<long long>(e.rank), found, e.value, slack);
        if (in_place) check::set(c.weights[w].data, W.at(i, j), W.dtype, old);
      }
    }
    CHECK(std::memcmp(W.memory.get(), memory[w].data(), memory[w].size()) == 0, "seed %llu wrote outside weight %zu",
          static_cast<unsigned long long>(seed), w);
  }
}

// A factor that is not a number reaches exactly its row or column, whichever bits say so; an infinite one leaves
// nothing finite there.
void check_what_is_not_finite() {
  for (const bool in_A : {true, false}) {
    for (const int64_t rank : {8, 40}) {
      for (const uint32_t bits : {0x7fc00000u, 0x7fffffffu, 0x7ffff000u, 0x7f800001u, 0xffffffffu, 0x7f800000u}) {
        std::vector<float> W(64, 1.0f), A(static_cast<size_t>(rank * 8), 1.0f), B(static_cast<size_t>(rank * 8), 1.0f);
        (in_A ? A[3 * 8 + 2] : B[static_cast<size_t>(2 * rank + 3)]) = bits_as<float>(bits);
        const Term term = {A.data(), B.data(), {8, 1}, {rank, 1}, rank, 8, 0, 0, 0.5, Dtype::f32, Dtype::f32};
        launch<Dtype::f32>(make_plan({{W.data(), W.data(), 8, 8, 8, 8, Dtype::f32}}, {term}), 163 * 1024, rank);
        for (size_t i = 0; i < 64; ++i) {
          const bool reached = (in_A ? i % 8 : i / 8) == 2;
          const bool right = !reached              ? W[i] == 1.0f + 0.5f * static_cast<float>(rank)
                             : bits == 0x7f800000u ? !std::isfinite(W[i])
                                                   : std::isnan(W[i]);
          CHECK(right, "%s has %08x at rank %lld: W[%zu] = %g", in_A ? "A" : "B", bits, static_cast<long long>(rank), i,
                static_cast<double>(W[i]));
        }
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t cases = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 100;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  check_what_is_not_finite();
  for (uint64_t i = 0; i < cases; ++i) compare(seed + i, i % 3 != 0);
  std::printf("%llu cases\n", static_cast<unsigned long long>(cases));
  return 0;
}
