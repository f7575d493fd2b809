// Launching the kernel. No torch headers, so that nvcc takes seconds.
#include <cuda_runtime.h>

#include <stdexcept>

#include "merge_kernel.cuh"

namespace slora {
namespace {

void require(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("batched merge: ") + what + " failed: " + cudaGetErrorString(status));
}

template <int kWarps>
const void* kernel_of(Dtype dtype) {
  return dtype == Dtype::f32    ? reinterpret_cast<const void*>(&merge_kernel<Dtype::f32, kWarps>)
         : dtype == Dtype::bf16 ? reinterpret_cast<const void*>(&merge_kernel<Dtype::bf16, kWarps>)
                                : reinterpret_cast<const void*>(&merge_kernel<Dtype::f16, kWarps>);
}

}  // namespace

int cuda_version() { return CUDART_VERSION; }

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  require(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

void prepare_cuda_merge(CudaTable& table, Dtype dtype) {
  int device = 0, block_limit = 0, sm_limit = 0;
  require(cudaGetDevice(&device), "cudaGetDevice");
  require(cudaDeviceGetAttribute(&block_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          "cudaDeviceGetAttribute");
  require(cudaDeviceGetAttribute(&sm_limit, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
          "cudaDeviceGetAttribute");
  fit(table, dtype, block_limit, sm_limit);
  table.kernel = table.warps == 4 ? kernel_of<4>(dtype) : kernel_of<8>(dtype);
  // The limit itself, always: what this launch needs could be undercut by another thread before the launch.
  require(cudaFuncSetAttribute(table.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, block_limit),
          "cudaFuncSetAttribute");
}

void launch_cuda_merge(const CudaTable& table, const void* device_table, void* stream) {
  const char* base = static_cast<const char*>(device_table);
  const auto* segments = reinterpret_cast<const Segment*>(base + table.segments);
  const auto* first_tile = reinterpret_cast<const int32_t*>(base + table.first_tile);
  const auto* pieces = reinterpret_cast<const Piece*>(base + table.pieces);
  int count = static_cast<int>(table.segment_count), slabs = static_cast<int>(table.slabs);
  void* arguments[] = {&segments, &first_tile, &count, &pieces, &slabs};
  require(cudaLaunchKernel(table.kernel, dim3(static_cast<unsigned>(table.tile_count)),
                           dim3(static_cast<unsigned>(32 * table.warps)), arguments,
                           static_cast<size_t>(table.shared_bytes), static_cast<cudaStream_t>(stream)),
          "the launch");
}

}  // namespace slora
