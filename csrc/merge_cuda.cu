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

template <bool kTensor>
const void* kernel_of(Dtype dtype) {
  if (dtype == Dtype::f32) return reinterpret_cast<const void*>(&merge_kernel<Dtype::f32, kTensor>);
  if (dtype == Dtype::bf16) return reinterpret_cast<const void*>(&merge_kernel<Dtype::bf16, kTensor>);
  if (dtype == Dtype::f16) return reinterpret_cast<const void*>(&merge_kernel<Dtype::f16, kTensor>);
  throw std::invalid_argument("batched merge: float64 weights have no CUDA kernel");
}

}  // namespace

int cuda_version() { return CUDART_VERSION; }

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  require(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

CudaLaunch prepare_cuda_merge(const CudaTable& table, Dtype dtype) {
  int device = 0, limit = 0;
  require(cudaGetDevice(&device), "cudaGetDevice");
  require(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  const Launch launch = launch_of(table, limit);
  const void* kernel = launch.tensor ? kernel_of<true>(dtype) : kernel_of<false>(dtype);
  // The limit itself, always: what this launch needs could be undercut by another thread before the launch.
  require(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit), "cudaFuncSetAttribute");
  return {kernel, launch.panel, launch.tensor ? Shape<true>::kThreads : Shape<false>::kThreads, launch.shared_bytes};
}

void launch_cuda_merge(const CudaLaunch& launch, const CudaTable& table, const void* device_table, void* stream) {
  const char* base = static_cast<const char*>(device_table);
  const auto* segments = reinterpret_cast<const Segment*>(base + table.segments);
  const auto* pieces = reinterpret_cast<const Piece*>(base + table.pieces);
  const auto* tiles = reinterpret_cast<const Tile*>(base + table.tiles);
  int panel = launch.panel;
  void* arguments[] = {&segments, &pieces, &tiles, &panel};
  require(cudaLaunchKernel(launch.kernel, dim3(static_cast<unsigned>(table.tile_count)),
                           dim3(static_cast<unsigned>(launch.threads)), arguments,
                           static_cast<size_t>(launch.shared_bytes), static_cast<cudaStream_t>(stream)),
          "the launch");
}

}  // namespace slora
