// A CUDA thread block on the host: every thread is a coroutine of its own, they run in a random order between barriers,
// copies ahead arrive when they are waited for, and mma exchanges operands within a warp. What a missing barrier would
// break differs from run to run.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "../../csrc/numbers.h"

namespace emulate {

struct Index {
  unsigned x;
};

class Block {
 public:
  Block(int threads, uint64_t seed) : random_(seed), fibers_(static_cast<size_t>(threads)) {}

  // Runs `body` once per thread, until all have returned. False where a barrier is not reached by all.
  bool run(const std::function<void()>& body) {
    body_ = &body;
    current = this;
    for (Fiber& fiber : fibers_) prepare(fiber);
    std::vector<size_t> order(fibers_.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    for (;;) {
      std::shuffle(order.begin(), order.end(), random_);
      bool ran = false;
      for (size_t i : order) {
        if (fibers_[i].state != State::ready) continue;
        ran = true;
        running_ = i;
        swapcontext(&scheduler_, &fibers_[i].context);
      }
      if (!ran && !release()) break;
    }
    return std::all_of(fibers_.begin(), fibers_.end(), [](const Fiber& f) { return f.state == State::done; });
  }

  void block_barrier() { wait(State::block); }
  void warp_barrier() { wait(State::warp); }
  unsigned thread() const { return static_cast<unsigned>(running_); }

  // The number of threads for which `condition` holds.
  int count(bool condition) {
    fibers_[running_].condition = condition;
    block_barrier();
    const auto holds = [](const Fiber& f) { return f.condition; };
    const auto result = static_cast<int>(std::count_if(fibers_.begin(), fibers_.end(), holds));
    block_barrier();
    return result;
  }

  void copy_ahead(void* to, const void* from) { fibers_[running_].copies.back().emplace_back(to, from); }
  void close_group() { fibers_[running_].copies.emplace_back(); }
  // All but the last `left` groups that are closed arrive.
  void wait_for_groups(size_t left) {
    auto& groups = fibers_[running_].copies;
    for (; groups.size() > left + 1; groups.erase(groups.begin()))
      for (const auto& [to, from] : groups.front()) std::memcpy(to, from, 16);
  }

  // What each thread of the running thread's warp has put here.
  uint32_t (*exchange())[8] { return fibers_warp_[running_ / 32].values; }

  static Block* current;

 private:
  enum class State { ready, block, warp, done };
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    State state;
    bool condition;
    std::vector<std::vector<std::pair<void*, const void*>>> copies;
  };
  struct Warp {
    uint32_t values[32][8];
  };
  static constexpr size_t kStack = 64 * 1024;

  // Not in the loop of run: the compiler must expect getcontext to return twice.
  __attribute__((noinline)) void prepare(Fiber& fiber) {
    fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler_;
    fiber.state = State::ready;
    fiber.copies.assign(1, {});
    makecontext(&fiber.context, &Block::start, 0);
  }
  static void start() {
    Block& block = *current;
    (*block.body_)();
    block.fibers_[block.running_].state = State::done;
  }
  void wait(State state) {
    fibers_[running_].state = state;
    swapcontext(&fibers_[running_].context, &scheduler_);
  }
  // Opens the barriers that all have reached; false where there is none.
  bool release() {
    bool any = false;
    const auto all = [&](size_t first, size_t last, State state) {
      return std::all_of(fibers_.begin() + static_cast<long>(first), fibers_.begin() + static_cast<long>(last),
                         [&](const Fiber& f) { return f.state == state; });
    };
    const auto open = [&](size_t first, size_t last) {
      for (size_t i = first; i < last; ++i) fibers_[i].state = State::ready;
      any = true;
    };
    if (all(0, fibers_.size(), State::block)) open(0, fibers_.size());
    for (size_t i = 0; i < fibers_.size(); i += 32)
      if (all(i, i + 32, State::warp)) open(i, i + 32);
    return any;
  }

  std::mt19937_64 random_;
  std::vector<Fiber> fibers_;
  Warp fibers_warp_[32];
  ucontext_t scheduler_;
  const std::function<void()>* body_ = nullptr;
  size_t running_ = 0;
};

inline Block* Block::current = nullptr;

inline Index blockIdx{0};
inline void* shared_memory = nullptr;

struct ThreadIndex {
  struct X {
    operator unsigned() const { return Block::current->thread(); }
  } x;
};
inline ThreadIndex threadIdx;

}  // namespace emulate

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

using emulate::blockIdx;
using emulate::threadIdx;
inline void __syncthreads() { emulate::Block::current->block_barrier(); }
inline int __syncthreads_count(bool condition) { return emulate::Block::current->count(condition); }

#define SLORA_DEVICE inline
#define SLORA_KERNEL(threads, blocks) void
#define SLORA_UNROLL
#define SLORA_KEEP_ROLLED
#define SLORA_SHARED(name) float4* name = static_cast<float4*>(emulate::shared_memory)
#define __restrict__

namespace slora {

inline uint32_t bits_of(float x) { return bits_as<uint32_t>(x); }
inline float float_of(uint32_t bits) { return bits_as<float>(bits); }
inline float widened_f16(uint16_t bits) { return float_of_f16(bits); }
uint32_t two_bf16(float low, float high);
uint32_t two_f16(float low, float high);
inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

template <class T>
T load_shared_by_blocks(const T* from) {
  return *from;
}
template <class T>
T load_once(const T* from) {
  return *from;
}
template <class T>
void store_once(T* to, T value) {
  *to = value;
}

inline void copy_ahead(void* to, const void* from) { emulate::Block::current->copy_ahead(to, from); }
inline void close_group() { emulate::Block::current->close_group(); }
template <int left>
void wait_for_groups() {
  emulate::Block::current->wait_for_groups(left);
}
inline void warp_barrier() { emulate::Block::current->warp_barrier(); }
inline unsigned thread_index() { return threadIdx.x; }

// start + the exact products, as tensor cores add: all cut off at 2^-24 of the largest one's power of two, then the sum
// to 24 bits.
inline float cut_sum(float start, const double (&products)[8]) {
  double largest = std::fabs(start), plain = start;
  for (double product : products) largest = std::max(largest, std::fabs(product)), plain += product;
  if (largest == 0.0 || !std::isfinite(plain)) return static_cast<float>(plain);
  const double unit = std::ldexp(1.0, std::ilogb(largest) - 24);
  double sum = std::trunc(start / unit);
  for (double product : products) sum += std::trunc(product / unit);
  sum *= unit;
  const auto rounded = static_cast<float>(sum);
  return std::fabs(static_cast<double>(rounded)) > std::fabs(sum) ? std::nextafter(rounded, 0.0f) : rounded;
}

// PTX ISA, mma.m16n8k16 with .bf16 or .f16: which numbers of which matrix a lane holds.
template <Dtype part>
void mma(float (&d)[4], uint4 b, uint2 a) {
  emulate::Block& block = *emulate::Block::current;
  const unsigned lane = block.thread() % 32, group = lane / 4, member = lane % 4;
  uint32_t (*all)[8] = block.exchange();
  const uint32_t mine[6] = {b.x, b.y, b.z, b.w, a.x, a.y};
  for (int i = 0; i < 6; ++i) all[lane][i] = mine[i];
  block.warp_barrier();
  const auto number = [](uint32_t pair, unsigned k) -> double {
    const auto bits = static_cast<uint16_t>(k % 2 ? pair >> 16 : pair);
    return part == Dtype::bf16 ? float_of_bf16(bits) : float_of_f16(bits);
  };
  float results[4];
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = group + i / 2 * 8, col = 2 * member + i % 2;
    results[i] = d[i];
    for (unsigned half = 0; half < 2; ++half) {
      double products[8];
      for (unsigned k = 0; k < 8; ++k)
        products[k] =
            number(all[row % 8 * 4 + k / 2][row / 8 + 2 * half], k) * number(all[col * 4 + k / 2][4 + half], k);
      results[i] = cut_sum(results[i], products);
    }
  }
  block.warp_barrier();
  for (int i = 0; i < 4; ++i) d[i] = results[i];
}

}  // namespace slora
