// Registers of several numbers in the compiler's vector extensions, and how weights get into and out of them.
#pragma once

#include "merge.h"
#include "numbers.h"

// Always inlined, so that a function compiled for an instruction set has its loops compiled for that as well.
#define SLORA_INLINE inline __attribute__((always_inline))

// The calling convention of vectors depends on the instruction set; nothing here is called.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace slora {

// kLanes numbers of type T in one register.
template <class T, int kLanes>
struct Vector {
  typedef T type __attribute__((vector_size(sizeof(T) * kLanes)));
  typedef T loose __attribute__((vector_size(sizeof(T) * kLanes), aligned(1), may_alias));
  typedef uint32_t bits __attribute__((vector_size(4 * kLanes)));
  typedef uint16_t half __attribute__((vector_size(2 * kLanes)));
  typedef uint16_t loose_half __attribute__((vector_size(2 * kLanes), aligned(1), may_alias));
};

template <Dtype dtype, int kLanes>
SLORA_INLINE void load(const char* from, typename Vector<float, kLanes>::type& value) {
  using V = Vector<float, kLanes>;
  if (dtype == Dtype::f32) {
    value = *reinterpret_cast<const typename V::loose*>(from);
    return;
  }
  const auto wide = __builtin_convertvector(
      static_cast<typename V::half>(*reinterpret_cast<const typename V::loose_half*>(from)), typename V::bits);
  if (dtype == Dtype::bf16) {
    value = (typename V::type)(wide << 16);
    return;
  }
  using Bits = typename V::bits;
  const Bits magnitude = (wide & 0x7fffu) << 13;
  const Bits subnormal = (Bits)((typename V::type)(magnitude + 0x38800000u) - 0x1p-14f);
  const Bits normal = magnitude + (magnitude >= 0x0f800000u ? Bits{} + 0x70000000u : Bits{} + 0x38000000u);
  value = (typename V::type)((magnitude < 0x00800000u ? subnormal : normal) | ((wide & 0x8000u) << 16));
}

template <Dtype dtype, int kLanes>
SLORA_INLINE void store(char* to, const typename Vector<float, kLanes>::type& value) {
  using V = Vector<float, kLanes>;
  if (dtype == Dtype::f32) {
    *reinterpret_cast<typename V::loose*>(to) = value;
    return;
  }
  using Bits = typename V::bits;
  const Bits bits = (Bits)value, quiet = Bits{} + 0x7fc0u;
  Bits half;
  if (dtype == Dtype::bf16) {
    const Bits rounded = (bits + ((bits >> 16) & 1u) + 0x7fffu) >> 16;
    half = value == value ? rounded : quiet;
  } else {
    // Normal results: drop 13 bits and lower the bias by 112. Subnormal ones: adding 0.5 lets the adder round.
    const Bits magnitude = bits & 0x7fffffffu;
    const Bits normal = (magnitude + (0xfffu - 0x38000000u + ((magnitude >> 13) & 1u))) >> 13;
    const Bits subnormal = (Bits)((typename V::type)magnitude + 0.5f) - 0x3f000000u;
    half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? Bits{} + 0x7c00u : half;
    half = value == value ? half : quiet;
    half |= (bits >> 16) & 0x8000u;
  }
  *reinterpret_cast<typename V::loose_half*>(to) = __builtin_convertvector(half, typename V::half);
}

template <Dtype, int kLanes>
SLORA_INLINE void load(const char* from, typename Vector<double, kLanes>::type& value) {
  value = *reinterpret_cast<const typename Vector<double, kLanes>::loose*>(from);
}

template <Dtype, int kLanes>
SLORA_INLINE void store(char* to, const typename Vector<double, kLanes>::type& value) {
  *reinterpret_cast<typename Vector<double, kLanes>::loose*>(to) = value;
}

}  // namespace slora
