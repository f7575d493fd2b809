// 16-bit floating point as integers: the conversions that the executors share, exact or rounded to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

namespace slora {

template <class To, class From>
inline To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

inline float float_of_bf16(uint16_t bits) { return bits_as<float>(static_cast<uint32_t>(bits) << 16); }

inline float float_of_f16(uint16_t bits) {
  // The exponent's bias grows by 112; a subnormal number gets a leading 1, which is subtracted again: both exact.
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fffu) << 13, sign = static_cast<uint32_t>(bits & 0x8000u)
                                                                                 << 16;
  if (magnitude < 0x00800000u)
    return bits_as<float>(bits_as<uint32_t>(bits_as<float>(magnitude + 0x38800000u) - 0x1p-14f) | sign);
  return bits_as<float>((magnitude + (magnitude >= 0x0f800000u ? 0x70000000u : 0x38000000u)) | sign);
}

}  // namespace slora
