// A CUDA thread block on the host: every thread is a coroutine of its own, they run in a random order between barriers,
// and mma exchanges operands within a warp. What a missing barrier would break differs from run to run.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
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

  // What each thread of the running thread's warp has put here.
  uint32_t (*exchange())[8] { return fibers_warp_[running_ / 32].values; }

  static Block* current;

 private:
  enum class State { ready, block, warp, done };
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    State state;
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
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

using emulate::blockIdx;
using emulate::threadIdx;
inline void __syncthreads() { emulate::Block::current->block_barrier(); }

#define SLORA_DEVICE inline
#define SLORA_KERNEL(threads, blocks) void
#define SLORA_UNROLL
#define SLORA_UNROLL_TWICE
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

// PTX ISA, mma.m16n8k8 with .tf32: which element of which matrix a lane holds.
inline void mma(float& d0, float& d1, float& d2, float& d3, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulate::Block& block = *emulate::Block::current;
  const unsigned lane = block.thread() % 32;
  uint32_t (*all)[8] = block.exchange();
  for (int i = 0; i < 4; ++i) all[lane][i] = a[i];
  all[lane][4] = b0, all[lane][5] = b1;
  block.warp_barrier();
  const unsigned group = lane / 4, member = lane % 4;
  const auto tf32 = [](uint32_t bits) { return static_cast<double>(float_of(bits & 0xffffe000u)); };
  const auto sum = [&](unsigned row, unsigned col, float start) {
    double result = start;
    for (unsigned k = 0; k < 8; ++k) {
      const uint32_t left = all[row % 8 * 4 + k % 4][row / 8 + k / 4 * 2], right = all[col * 4 + k % 4][4 + k / 4];
      result += tf32(left) * tf32(right);
    }
    return static_cast<float>(result);
  };
  const float results[4] = {sum(group, 2 * member, d0), sum(group, 2 * member + 1, d1), sum(group + 8, 2 * member, d2),
                            sum(group + 8, 2 * member + 1, d3)};
  block.warp_barrier();
  d0 = results[0], d1 = results[1], d2 = results[2], d3 = results[3];
}

}  // namespace slora
