// The plan and the CPU executor over random calls, on every instruction set of this processor, compared bit for bit
// with merge.h's definition; no byte outside the weights changes. Built with sanitizers by tests/csrc/test_native.py.
//
//   check_cpu <cases> <seed>
#include <stdexcept>
#include <string>
#include <thread>

#include "check.h"

namespace {

using namespace slora;
using check::Case;
using check::Matrix;

void run(const Case& c, Isa isa, int64_t threads) {
  CpuMerge merge(make_plan(c.plan_weights, c.terms), threads, isa);
  std::vector<std::thread> others;
  for (int64_t worker = 1; worker < merge.workers(); ++worker) others.emplace_back([&, worker] { merge.run(worker); });
  if (merge.workers() > 0) merge.run(0);
  for (std::thread& other : others) other.join();
}

void compare(uint64_t seed, Isa isa, bool in_place) {
  std::mt19937_64 random(seed);
  // Two in ten calls have more rows than a tile, so that several threads share a weight.
  const bool tall = seed % 10 < 2;
  Case c = check::random_case(random, {Dtype::f32, Dtype::bf16, Dtype::f16, Dtype::f64}, 200, tall ? 20 : 300, in_place,
                              tall ? 400 : 0);
  std::vector<std::vector<double>> before;
  std::vector<std::string> memory;
  std::vector<Matrix> backup;
  for (size_t w = 0; seed % 3 == 0 && w < c.weights.size(); ++w) {
    const Matrix& W = c.weights[w];
    backup.emplace_back(W.rows, W.cols, W.cols, 1, W.dtype);
    c.plan_weights[w].backup = backup.back().data;
  }
  for (const Matrix& W : c.weights) {
    before.push_back(check::values(W));
    memory.emplace_back(W.memory.get(), static_cast<size_t>(W.bytes));
  }
  run(c, isa, 1 + static_cast<int64_t>(seed % 4));
  for (size_t w = 0; w < backup.size(); ++w)
    CHECK(check::values(backup[w]) == before[w], "seed %llu, %s: the backup of weight %zu is wrong",
          static_cast<unsigned long long>(seed), name_of(isa), w);
  for (size_t w = 0; w < c.weights.size(); ++w) {
    const Matrix &W = c.weights[w], &result = in_place ? W : c.results[w];
    for (int64_t i = 0; i < W.rows; ++i) {
      for (int64_t j = 0; j < W.cols; ++j) {
        const check::Expected e = check::expected(c, before[w], static_cast<int64_t>(w), i, j);
        char want[8] = {};
        check::set(want, 0, W.dtype, e.touched ? e.value : before[w][static_cast<size_t>(i * W.cols + j)]);
        const auto size = static_cast<size_t>(bytes_of(W.dtype));
        const char* found = result.data + static_cast<size_t>(result.at(i, j)) * size;
        CHECK(std::memcmp(found, want, size) == 0, "seed %llu, %s, weight %zu [%lld, %lld], dtype %d: %.17g, not %.17g",
              static_cast<unsigned long long>(seed), name_of(isa), w, static_cast<long long>(i),
              static_cast<long long>(j), static_cast<int>(W.dtype), check::get(found, 0, W.dtype), e.value);
        // What lies between the elements is compared below: put the old element back.
        if (in_place)
          check::set(c.weights[w].data, W.at(i, j), W.dtype, before[w][static_cast<size_t>(i * W.cols + j)]);
      }
    }
    CHECK(std::memcmp(W.memory.get(), memory[w].data(), memory[w].size()) == 0, "seed %llu wrote outside weight %zu",
          static_cast<unsigned long long>(seed), w);
  }
}

template <class Change>
void refused(const char* message, Change change) {
  float W[24] = {}, A[8] = {}, B[12] = {};
  std::vector<Weight> weights = {{W, W, 6, 4, 4, 4, Dtype::f32}};
  std::vector<Term> terms = {{A, B, {4, 1}, {2, 1}, 2, 6, 0, 0, 1.0, Dtype::f32, Dtype::f32}};
  make_plan(weights, terms);
  change(weights, terms);
  try {
    make_plan(weights, terms);
  } catch (const std::invalid_argument& error) {
    CHECK(std::string(error.what()).find(message) != std::string::npos, "'%s' does not say '%s'", error.what(),
          message);
    return;
  }
  CHECK(false, "not refused: %s", message);
}

void check_refusals() {
  using W = std::vector<Weight>;
  using T = std::vector<Term>;
  constexpr int64_t huge = INT64_MAX;
  refused("which has 6", [](W&, T& t) { t[0].first_row = 1; });
  refused("which has 6", [](W&, T& t) { t[0].first_row = huge; });
  refused("which has 6", [](W&, T& t) { t[0].first_row = -1; });
  refused("which has 6", [](W&, T& t) { t[0].rows = huge; });
  refused("belongs to weights[1]", [](W&, T& t) { t[0].weight = 1; });
  refused("belongs to weights[-1]", [](W&, T& t) { t[0].weight = -1; });
  refused("not finite", [](W&, T& t) { t[0].scale = NAN; });
  refused("not finite", [](W&, T& t) { t[0].scale = 1e39; });
  refused("negative size", [](W&, T& t) { t[0].rank = -1; });
  refused("negative stride", [](W&, T& t) { t[0].A_strides[0] = -4; });
  refused("more than 2^31", [](W&, T& t) { t[0].rank = huge; });
  refused("negative size", [](W& w, T&) { w[0].rows = -6; });
  refused("rows share memory", [](W& w, T&) { w[0].source_stride = w[0].target_stride = 3; });
  refused("larger than the address space", [](W& w, T&) { w[0].source_stride = w[0].target_stride = huge / 8; });
  refused("weights[0] and weights[1] share memory", [](W& w, T&) { w.push_back(w[0]); });
  refused("share memory", [](W& w, T&) {
    w.push_back(w[0]);
    w[1].source = w[1].target = static_cast<float*>(w[0].target) + 2;
    w[1].cols = 3, w[0].cols = 3;
  });
  refused("weights[0] and backup[0] share memory",
          [](W& w, T&) { w[0].backup = static_cast<float*>(w[0].target) + 23; });
  refused("weights[0] and lora_As[0] share memory", [](W& w, T& t) { t[0].A = static_cast<float*>(w[0].target) + 23; });
  refused("weights[0] and lora_Bs[0] share memory", [](W& w, T& t) { t[0].B = static_cast<float*>(w[0].target) - 11; });
}

void check_that_windows_which_do_not_meet_are_no_overlap() {
  float data[48] = {};
  const std::vector<Weight> weights = {{data, data, 6, 2, 8, 8, Dtype::f32},
                                       {data + 2, data + 2, 6, 1, 8, 8, Dtype::f32}};
  CHECK(make_plan(weights, {}).segments.empty(), "a weight without a term has a segment");
  // B [6, 2] and A [3, 1] in columns 3 to 4 and 5 of the same rows.
  const Term term = {data + 5, data + 3, {8, 1}, {8, 1}, 2, 6, 1, 0, 1.0, Dtype::f32, Dtype::f32};
  CHECK(make_plan(weights, {term}).segments.size() == 1, "windows of one buffer are taken for an overlap");
}

void check_that_cuda_refuses_what_it_has_no_kernel_for() {
  double W[24] = {}, A[8] = {}, B[12] = {};
  const std::vector<Weight> wide = {{W, W, 6, 4, 4, 4, Dtype::f64}}, narrow = {{W, W, 6, 4, 4, 4, Dtype::f32}};
  Term term = {A, B, {4, 1}, {2, 1}, 2, 6, 0, 0, 1.0, Dtype::f32, Dtype::f32};
  refuse_f64(make_plan(narrow, {term}));
  const auto refuses = [](const Plan& plan) {
    try {
      refuse_f64(plan);
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  CHECK(refuses(make_plan(wide, {term})), "a float64 weight");
  term.B_dtype = Dtype::f64;
  CHECK(refuses(make_plan(narrow, {term})), "a float64 factor");
}

void check_sizes_beyond_32_bits() {
  // Never dereferenced: the arithmetic alone.
  char* far = reinterpret_cast<char*>(uintptr_t{1} << 44);
  const int64_t rows = 3'000'000'000, cols = 1024;
  const std::vector<Weight> weights = {{far, far, rows, cols, cols, cols, Dtype::bf16}};
  float A[4] = {}, B[4] = {};
  const Term term = {A, B, {0, 0}, {0, 0}, 4, 1'000'000'000, 0, 2'000'000'000, 1.0, Dtype::f32, Dtype::f32};
  const Plan plan = make_plan(weights, {term});
  CHECK(plan.segments.size() == 1 && plan.segments[0].rows == 1'000'000'000, "%zu segments", plan.segments.size());
  CHECK(plan.segments[0].target == far + 2'000'000'000 * cols * 2, "wrong address");
  const CudaTable table = make_cuda_table(plan, Dtype::bf16);
  CHECK(table.tile_count == 1953125 * 8, "%lld tiles", static_cast<long long>(table.tile_count));
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t cases = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 100;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  check_refusals();
  check_that_windows_which_do_not_meet_are_no_overlap();
  check_that_cuda_refuses_what_it_has_no_kernel_for();
  check_sizes_beyond_32_bits();
  std::vector<Isa> isas = {Isa::portable};
  if (best_isa() != Isa::portable) isas.push_back(Isa::avx2);
  if (best_isa() == Isa::avx512) isas.push_back(Isa::avx512);
  for (uint64_t i = 0; i < cases; ++i)
    for (Isa isa : isas) compare(seed + i, isa, i % 2 == 0);
  std::printf("%llu cases on %zu instruction sets, the best is %s\n", static_cast<unsigned long long>(cases),
              isas.size(), name_of(best_isa()));
  return 0;
}
