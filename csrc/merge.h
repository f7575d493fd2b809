// The plan of a batched merge: what the CPU and the CUDA executor both run. No torch in here.
//
//   W[n, k] += delta[n, k],   delta = sum over the terms t that cover row n, in the order given, and over
//                             j = 0 .. rank_t - 1, of   (scale_t * B_t[n - first_t, j]) * A_t[j, k]
//
// All of it in fp32 (fp64 for fp64 weights): scale * B is rounded once, every product is added by a fused
// multiply-add to a running sum that starts at 0, the sum is added to W, and the result is rounded to nearest even. A
// GPU sums 16-bit weights otherwise, see merge_kernel.cuh.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace slora {

enum class Dtype : int32_t { f32, bf16, f16, f64 };

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

// A weight [rows, cols] with unit column stride; strides count elements. In place: target == source. Where `backup` is
// set, the old weight is written there, rows next to each other, in the same pass (on the CPU).
struct Weight {
  const void* source;
  void* target;
  int64_t rows, cols;
  int64_t source_stride, target_stride;
  Dtype dtype;
  void* backup = nullptr;
};

// A is [rank, cols], B is [rows, rank], both with any strides; they change rows first_row .. first_row + rows - 1.
struct Term {
  const void* A;
  const void* B;
  int64_t A_strides[2], B_strides[2];
  int64_t rank, rows;
  int64_t weight, first_row;
  double scale;
  Dtype A_dtype, B_dtype;
};

// One term as one segment sees it: B points at the segment's first row.
struct Piece {
  const char* A;
  const char* B;
  int64_t A_strides[2], B_strides[2];
  int64_t rank;
  double scale;
  Dtype A_dtype, B_dtype;
};

// Consecutive rows of one weight to which the same terms apply.
struct Segment {
  const char* source;
  char* target;
  int64_t rows, cols;
  int64_t source_stride, target_stride;
  int64_t first_piece, pieces;
  int64_t rank;   // of all pieces together
  int64_t slabs;  // each rank rounded up to 16s, times parts
  Dtype dtype;
  int32_t parts;  // numbers of 16 bits that a GPU makes of one of A, see merge_kernel.cuh
  char* backup;   // rows of `cols`, or nullptr
};

struct Plan {
  std::vector<Segment> segments;
  std::vector<Piece> pieces;
};

// Checks everything and throws std::invalid_argument, naming the index, before anything is written. Rows without a
// term are left out of a merge in place unless they are backed up; out of place they are copied. A scale of 0 drops its
// term.
Plan make_plan(const std::vector<Weight>& weights, const std::vector<Term>& terms);

// ---- CPU ----

// Instructions the executor can use; `best_isa` asks the processor. All give the same bits.
enum class Isa { portable, avx2, avx512 };
Isa best_isa();
const char* name_of(Isa isa);

// A merge on the CPU, ready to run: everything that can fail has happened once the constructor returns.
class CpuMerge {
 public:
  CpuMerge(Plan plan, int64_t threads, Isa isa);
  int64_t workers() const { return workers_; }  // 0 where there is nothing to do
  // Called once with each worker number, from any threads; workers share the tiles. Allocates nothing, never throws.
  void run(int64_t worker) noexcept;

 private:
  struct Tile {
    int64_t segment, row, rows, col, cols;
  };
  Plan plan_;
  Isa isa_;
  int64_t workers_, scratch_per_worker_;
  std::vector<Tile> tiles_;
  std::vector<std::unique_ptr<char[]>> scratch_;  // of each worker, so that a sanitizer tells them apart
  std::unique_ptr<std::atomic<int64_t>> next_;    // tile
};

// ---- CUDA ----

constexpr int kCudaTileCols = 128;
constexpr int cuda_tile_rows(Dtype dtype) { return dtype == Dtype::f32 ? 256 : 512; }

// A launch. `bytes`, for device memory: the segments of one dtype, how many tiles lie before each, and the pieces, from
// these offsets on. `slabs`, of A in shared memory: the most of a segment, and once prepared at most what fits. `warps`
// of a thread block.
struct CudaTable {
  std::vector<char> bytes;
  int64_t segments, first_tile, pieces;
  int64_t segment_count, tile_count, slabs, warps, shared_bytes;
  const void* kernel;
};
CudaTable make_cuda_table(const Plan& plan, Dtype dtype);

// Throws std::invalid_argument where the plan has fp64, for which there is no kernel.
void refuse_f64(const Plan& plan);

// The rest is in merge_cuda.cu, which exists only where there is nvcc.
int cuda_version();

// Whether `stream` records a graph, which would replay a merge from a table that is gone by then.
bool is_capturing(void* stream);

// Loads the kernel on the current device and allows it its shared memory: for every table of a call before the first is
// launched. Both functions throw std::runtime_error with CUDA's message.
void prepare_cuda_merge(CudaTable& table, Dtype dtype);

// Launches on `stream`; `device_table` holds table.bytes once the stream gets there.
void launch_cuda_merge(const CudaTable& table, const void* device_table, void* stream);

}  // namespace slora
