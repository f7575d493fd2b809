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
  typedef uint32_t loose_bits __attribute__((vector_size(4 * kLanes), aligned(1), may_alias));
};

// fp16 numbers, one in the lower half of each lane, widened.
template <int kLanes>
SLORA_INLINE typename Vector<float, kLanes>::type widened_f16(const typename Vector<float, kLanes>::bits& half) {
  using V = typename Vector<float, kLanes>::type;
  using Bits = typename Vector<float, kLanes>::bits;
  const Bits magnitude = (half & 0x7fffu) << 13;
  const Bits subnormal = (Bits)((V)(magnitude + 0x38800000u) - 0x1p-14f);
  const Bits normal = magnitude + (magnitude >= 0x0f800000u ? Bits{} + 0x70000000u : Bits{} + 0x38000000u);
  return (V)((magnitude < 0x00800000u ? subnormal : normal) | ((half & 0x8000u) << 16));
}

// Rounded to fp16, in the lower half of each lane.
template <int kLanes>
SLORA_INLINE typename Vector<float, kLanes>::bits narrowed_f16(const typename Vector<float, kLanes>::type& value) {
  using V = typename Vector<float, kLanes>::type;
  using Bits = typename Vector<float, kLanes>::bits;
  // Normal results: drop 13 bits and lower the bias by 112. Subnormal ones: adding 0.5 lets the adder round.
  const Bits bits = (Bits)value, magnitude = bits & 0x7fffffffu;
  const Bits normal = (magnitude + (0xfffu - 0x38000000u + ((magnitude >> 13) & 1u))) >> 13;
  const Bits subnormal = (Bits)((V)magnitude + 0.5f) - 0x3f000000u;
  Bits half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? Bits{} + 0x7c00u : half;
  half = value == value ? half : Bits{} + 0x7e00u;
  return half | ((bits >> 16) & 0x8000u);
}

// Rounded to bf16, in the upper half of each lane; what is left in the lower half does not count.
template <int kLanes>
SLORA_INLINE typename Vector<float, kLanes>::bits narrowed_bf16(const typename Vector<float, kLanes>::type& value) {
  using Bits = typename Vector<float, kLanes>::bits;
  const Bits bits = (Bits)value;
  const Bits rounded = bits + ((bits & 0x10000u) != 0 ? Bits{} + 0x8000u : Bits{} + 0x7fffu);
  return value == value ? rounded : Bits{} + 0x7fc00000u;
}

// Two registers of numbers from 2 * kLanes neighbours in memory. fp32: one after the other. 16 bits: `a` gets those at
// even places and `b` those at odd ones, which costs a shift and a mask where an order kept would cost shuffles.
template <Dtype dtype, int kLanes>
SLORA_INLINE void load(const char* from, typename Vector<float, kLanes>::type& a,
                       typename Vector<float, kLanes>::type& b) {
  using V = Vector<float, kLanes>;
  if (dtype == Dtype::f32) {
    a = *reinterpret_cast<const typename V::loose*>(from);
    b = *reinterpret_cast<const typename V::loose*>(from + 4 * kLanes);
    return;
  }
  const typename V::bits pairs = *reinterpret_cast<const typename V::loose_bits*>(from);
  if (dtype == Dtype::bf16) {
    a = (typename V::type)(pairs << 16);
    b = (typename V::type)(pairs & 0xffff0000u);
  } else {
    a = widened_f16<kLanes>(pairs & 0xffffu);
    b = widened_f16<kLanes>(pairs >> 16);
  }
}

// The reverse, rounded to nearest even.
template <Dtype dtype, int kLanes>
SLORA_INLINE void store(char* to, const typename Vector<float, kLanes>::type& a,
                        const typename Vector<float, kLanes>::type& b) {
  using V = Vector<float, kLanes>;
  if (dtype == Dtype::f32) {
    *reinterpret_cast<typename V::loose*>(to) = a;
    *reinterpret_cast<typename V::loose*>(to + 4 * kLanes) = b;
    return;
  }
  typename V::bits pairs;
  if (dtype == Dtype::bf16) {
    pairs = (narrowed_bf16<kLanes>(a) >> 16) | (narrowed_bf16<kLanes>(b) & 0xffff0000u);
  } else {
    pairs = narrowed_f16<kLanes>(a) | (narrowed_f16<kLanes>(b) << 16);
  }
  *reinterpret_cast<typename V::loose_bits*>(to) = pairs;
}

template <Dtype, int kLanes>
SLORA_INLINE void load(const char* from, typename Vector<double, kLanes>::type& a,
                       typename Vector<double, kLanes>::type& b) {
  a = *reinterpret_cast<const typename Vector<double, kLanes>::loose*>(from);
  b = *reinterpret_cast<const typename Vector<double, kLanes>::loose*>(from + 8 * kLanes);
}

template <Dtype, int kLanes>
SLORA_INLINE void store(char* to, const typename Vector<double, kLanes>::type& a,
                        const typename Vector<double, kLanes>::type& b) {
  *reinterpret_cast<typename Vector<double, kLanes>::loose*>(to) = a;
  *reinterpret_cast<typename Vector<double, kLanes>::loose*>(to + 8 * kLanes) = b;
}

}  // namespace slora
