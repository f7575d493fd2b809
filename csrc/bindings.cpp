// Tensors -> plan -> executor: the operators slora::batched_merge_ and slora::batched_merge, and the module slora._C.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include <cstring>
#include <functional>
#include <stdexcept>

#ifdef __linux__
#include <sys/mman.h>
#endif

#ifdef SLORA_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include "merge.h"

namespace slora {
namespace {

using at::Tensor;

Dtype dtype_of(const Tensor& tensor, const char* list, size_t index) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Dtype::f32;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kHalf:
      return Dtype::f16;
    case at::kDouble:
      return Dtype::f64;
    default:
      TORCH_CHECK_VALUE(false, list, "[", index, "] has dtype ", tensor.scalar_type(),
                        "; supported are float32, bfloat16, float16 and float64");
  }
}

// Shapes and devices, which the fake tensors of torch.compile have as well.
void check(at::TensorList weights, at::TensorList lora_As, at::TensorList lora_Bs, at::ArrayRef<double> scales,
           at::IntArrayRef targets, at::OptionalIntArrayRef rows) {
  const size_t count = lora_As.size(), first = rows ? rows->size() : count;
  TORCH_CHECK_VALUE(lora_Bs.size() == count && scales.size() == count && targets.size() == count && first == count,
                    "lora_As, lora_Bs, scales, targets and rows have ", count, ", ", lora_Bs.size(), ", ",
                    scales.size(), ", ", targets.size(), " and ", first, " entries; each term needs one of each");
  for (size_t i = 0; i < weights.size(); ++i) {
    TORCH_CHECK_VALUE(weights[i].dim() == 2, "weights[", i, "] has ", weights[i].dim(), " dimensions; expected [N, K]");
    TORCH_CHECK_VALUE(weights[i].device() == weights[0].device(), "weights[", i, "] is on ", weights[i].device(),
                      ", but weights[0] on ", weights[0].device(),
                      "; merge each device's weights in a call of its own");
    dtype_of(weights[i], "weights", i);
  }
  for (size_t i = 0; i < count; ++i) {
    const Tensor &A = lora_As[i], &B = lora_Bs[i];
    TORCH_CHECK_VALUE(targets[i] >= 0 && targets[i] < static_cast<int64_t>(weights.size()), "targets[", i,
                      "]=", targets[i], " names none of the ", weights.size(), " weights");
    const Tensor& W = weights[targets[i]];
    TORCH_CHECK_VALUE(A.dim() == 2 && B.dim() == 2 && A.size(1) == W.size(1) && A.size(0) == B.size(1), "lora_As[", i,
                      "] has shape ", A.sizes(), " and lora_Bs[", i, "] ", B.sizes(), "; expected [r, ", W.size(1),
                      "] and [rows, r]");
    if (rows) {
      TORCH_CHECK_VALUE((*rows)[i] >= 0 && (*rows)[i] <= W.size(0) && B.size(0) <= W.size(0) - (*rows)[i], "term ", i,
                        " covers ", B.size(0), " rows from row ", (*rows)[i], " on of weights[", targets[i],
                        "], which has ", W.size(0));
    } else {
      TORCH_CHECK_VALUE(B.size(0) == W.size(0), "lora_Bs[", i, "] has ", B.size(0), " rows, weights[", targets[i], "] ",
                        W.size(0), "; a term that covers a part of them needs rows");
    }
    TORCH_CHECK_VALUE(A.device() == W.device() && B.device() == W.device(), "lora_As[", i, "] is on ", A.device(),
                      " and lora_Bs[", i, "] on ", B.device(), ", but their weight on ", W.device());
    dtype_of(A, "lora_As", i);
    dtype_of(B, "lora_Bs", i);
  }
}

// `backup` is empty, or holds a tensor for every weight.
void check_backup(at::TensorList weights, at::TensorList backup) {
  TORCH_CHECK_VALUE(backup.empty() || backup.size() == weights.size(), "backup has ", backup.size(), " entries for ",
                    weights.size(), " weights; give none, or one each");
  for (size_t i = 0; i < backup.size(); ++i)
    TORCH_CHECK_VALUE(backup[i].sizes() == weights[i].sizes() && backup[i].is_contiguous() &&
                          backup[i].scalar_type() == weights[i].scalar_type() &&
                          backup[i].device() == weights[i].device(),
                      "backup[", i, "] cannot hold weights[", i, "]; give a contiguous tensor like it");
}

// The plan from `weights` to `results`; std::invalid_argument becomes a ValueError.
Plan plan_of(at::TensorList weights, at::TensorList results, at::TensorList backup, at::TensorList lora_As,
             at::TensorList lora_Bs, at::ArrayRef<double> scales, at::IntArrayRef targets,
             at::OptionalIntArrayRef rows) {
  check(weights, lora_As, lora_Bs, scales, targets, rows);
  check_backup(weights, backup);
  std::vector<Weight> matrices;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor &W = weights[i], &result = results[i];
    TORCH_CHECK_VALUE(W.size(1) <= 1 || W.stride(1) == 1, "weights[", i, "] has column stride ", W.stride(1),
                      "; this operator needs 1, slora.merging.batched_merge_ takes any");
    void* target = result.data_ptr();
    matrices.push_back({target == W.const_data_ptr() ? target : W.const_data_ptr(), target, W.size(0), W.size(1),
                        W.stride(0), result.stride(0), dtype_of(W, "weights", i),
                        backup.empty() ? nullptr : backup[i].data_ptr()});
  }
  std::vector<Term> terms;
  for (size_t i = 0; i < lora_As.size(); ++i) {
    const Tensor &A = lora_As[i], &B = lora_Bs[i];
    terms.push_back({A.const_data_ptr(),
                     B.const_data_ptr(),
                     {A.stride(0), A.stride(1)},
                     {B.stride(0), B.stride(1)},
                     A.size(0),
                     B.size(0),
                     targets[i],
                     rows ? (*rows)[i] : 0,
                     scales[i],
                     dtype_of(A, "lora_As", i),
                     dtype_of(B, "lora_Bs", i)});
  }
  try {
    Plan plan = make_plan(matrices, terms);
    if (weights[0].is_cuda()) refuse_f64(plan);
    return plan;
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
}

// Copies usually go to memory that the system has yet to give: in large pages that takes a fraction of the faults.
void prefer_large_pages(const Tensor& tensor) {
#ifdef __linux__
  constexpr uintptr_t page = 4096, worth = 4 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + tensor.nbytes()) / page * page;
  if (first + worth <= last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a wish
#endif
}

void run_on_cpu(Plan plan, const std::function<void()>& before_writing) {
  CpuMerge merge(std::move(plan), at::get_num_threads(), best_isa());
  before_writing();
  at::parallel_for(0, merge.workers(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) merge.run(worker);
  });
}

#ifdef SLORA_WITH_CUDA
void run_on_cuda(const Plan& plan, at::Device device, const std::function<void()>& before_writing) {
  const c10::cuda::CUDAGuard guard(device);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  TORCH_CHECK(!is_capturing(stream.stream()), "a batched merge cannot be captured in a CUDA graph; merge outside it");
  std::vector<std::pair<CudaTable, Tensor>> launches;
  for (Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
    CudaTable table = make_cuda_table(plan, dtype);
    if (table.tile_count == 0) continue;
    prepare_cuda_merge(table, dtype);
    // Pinned memory of torch's cache is not handed out again before the copy on this stream is done.
    const auto bytes = static_cast<int64_t>(table.bytes.size());
    const Tensor staged = at::empty({bytes}, at::TensorOptions().dtype(at::kByte).pinned_memory(true));
    std::memcpy(staged.data_ptr(), table.bytes.data(), table.bytes.size());
    Tensor uploaded = at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(device));
    uploaded.copy_(staged, /*non_blocking=*/true);
    launches.emplace_back(std::move(table), std::move(uploaded));
  }
  before_writing();
  for (const auto& [table, uploaded] : launches) launch_cuda_merge(table, uploaded.const_data_ptr(), stream.stream());
}
#endif

// `before_writing` is called once everything has succeeded that can fail.
void run(Plan plan, at::Device device, const std::function<void()>& before_writing) {
#ifdef SLORA_WITH_CUDA
  if (device.is_cuda()) return run_on_cuda(plan, device, before_writing);
#endif
  TORCH_CHECK_NOT_IMPLEMENTED(device.is_cpu(), "slora._C was built without code for ", device);
  run_on_cpu(std::move(plan), before_writing);
}

void merge_in_place(at::TensorList weights, at::TensorList lora_As, at::TensorList lora_Bs, at::ArrayRef<double> scales,
                    at::IntArrayRef targets, at::OptionalIntArrayRef rows, at::TensorList backup) {
  if (weights.empty()) return;
  for (size_t i = 0; i < weights.size(); ++i) {
    TORCH_CHECK(!weights[i].is_inference(), "weights[", i, "] is an inference tensor; clone it outside inference mode");
    TORCH_CHECK(!(weights[i].requires_grad() && c10::GradMode::is_enabled()), "weights[", i,
                "] requires grad; merge under torch.no_grad()");
  }
  const at::Device device = weights[0].device();
  // The CPU keeps the old weights in the same pass. Elsewhere the copy is one call of its own on the same stream.
  const at::TensorList in_the_pass = device.is_cpu() ? backup : at::TensorList();
  if (!device.is_cpu()) check_backup(weights, backup);
  for (const Tensor& copy : in_the_pass) prefer_large_pages(copy);
  run(plan_of(weights, weights, in_the_pass, lora_As, lora_Bs, scales, targets, rows), device, [&] {
    if (!device.is_cpu() && !backup.empty()) at::_foreach_copy_(backup, weights);
    // Whoever sees an exception knows by the version whether a weight, and its copy, was written.
    for (const Tensor& weight : weights) weight.unsafeGetTensorImpl()->bump_version();
  });
}

std::vector<Tensor> empty_results(at::TensorList weights) {
  std::vector<Tensor> results;
  for (const Tensor& weight : weights) results.push_back(at::empty(weight.sizes(), weight.options()));
  return results;
}

std::vector<Tensor> merge_out_of_place(at::TensorList weights, at::TensorList lora_As, at::TensorList lora_Bs,
                                       at::ArrayRef<double> scales, at::IntArrayRef targets,
                                       at::OptionalIntArrayRef rows) {
  if (weights.empty()) return {};
  check(weights, lora_As, lora_Bs, scales, targets, rows);
  std::vector<Tensor> results = empty_results(weights);
  run(plan_of(weights, results, {}, lora_As, lora_Bs, scales, targets, rows), weights[0].device(), [] {});
  return results;
}

void fake_in_place(at::TensorList weights, at::TensorList lora_As, at::TensorList lora_Bs, at::ArrayRef<double> scales,
                   at::IntArrayRef targets, at::OptionalIntArrayRef rows, at::TensorList backup) {
  check(weights, lora_As, lora_Bs, scales, targets, rows);
  check_backup(weights, backup);
}

std::vector<Tensor> fake_out_of_place(at::TensorList weights, at::TensorList lora_As, at::TensorList lora_Bs,
                                      at::ArrayRef<double> scales, at::IntArrayRef targets,
                                      at::OptionalIntArrayRef rows) {
  check(weights, lora_As, lora_Bs, scales, targets, rows);
  return empty_results(weights);
}

pybind11::dict info() {
  pybind11::dict result;
#if defined(__clang__)
  result["compiler"] = std::string("clang ") + __clang_version__;
#else
  result["compiler"] = std::string("gcc ") + __VERSION__;
#endif
  result["torch"] = TORCH_VERSION;
  result["cpu"] = name_of(best_isa());
#ifdef SLORA_WITH_CUDA
  result["cuda"] = std::to_string(cuda_version() / 1000) + "." + std::to_string(cuda_version() % 1000 / 10);
  result["architectures"] = SLORA_ARCHITECTURES;
#else
  result["cuda"] = pybind11::none();
  result["architectures"] = "";
#endif
  return result;
}

}  // namespace

// Without `rows` every term covers all rows of its weight. `backup`, where not empty, receives the old weights.
#define SLORA_ARGUMENTS "Tensor[] lora_As, Tensor[] lora_Bs, float[] scales, int[] targets, int[]? rows"

// slora.ops opens this namespace, too, hence a fragment.
TORCH_LIBRARY_FRAGMENT(slora, m) {
  m.def("batched_merge_(Tensor(a!)[] weights, " SLORA_ARGUMENTS ", Tensor(b!)[] backup) -> ()",
        {at::Tag::pt2_compliant_tag});
  m.def("batched_merge(Tensor[] weights, " SLORA_ARGUMENTS ") -> Tensor[]", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(slora, CPU, m) {
  m.impl("batched_merge_", merge_in_place);
  m.impl("batched_merge", merge_out_of_place);
}

#ifdef SLORA_WITH_CUDA
TORCH_LIBRARY_IMPL(slora, CUDA, m) {
  m.impl("batched_merge_", merge_in_place);
  m.impl("batched_merge", merge_out_of_place);
}
#endif

TORCH_LIBRARY_IMPL(slora, Meta, m) {
  m.impl("batched_merge_", fake_in_place);
  m.impl("batched_merge", fake_out_of_place);
}

}  // namespace slora

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The batched merge in C++ and CUDA; importing it registers torch.ops.slora.batched_merge_.";
  m.def("info", &slora::info, "Compiler, torch, CUDA and architectures of this build, and what the CPU path runs on.");
}
