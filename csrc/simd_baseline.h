// Vectors of 16 bytes, which every x86-64 and aarch64 processor has.
#pragma once

#include <cmath>
#include <cstring>

#include "se.h"

namespace se {
namespace {
constexpr int kVectorBytes = 16;
}
}  // namespace se

#include "simd.h"

namespace se {
namespace {

inline Bits32 widen_bits(Bits16 bits) {
  return __builtin_convertvector(bits, Bits32);
}

inline Bits32 widen_bytes(const uint8_t* p) {
  uint8_t bytes __attribute__((vector_size(4)));
  std::memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(bytes, Bits32);
}

inline Bits16 narrow_bits(Bits32 bits) {
  return __builtin_convertvector(bits, Bits16);
}

inline Vec<float> widen_half(Bits16 bits) {
  Vec<float> v = {};
  for (int i = 0; i < kLanes<float>; ++i) {
    v[i] = c10::Half(bits[i], c10::Half::from_bits());
  }
  return v;
}

inline Bits16 narrow_half(Vec<float> v) {
  Bits16 bits = {};
  for (int i = 0; i < kLanes<float>; ++i) {
    bits[i] = c10::Half(v[i]).x;
  }
  return bits;
}

template <class V>
inline V multiply_add(V a, V b, V c) {
  return a * b + c;
}

template <class V>
inline void stream(void* p, const V& v) {
  std::memcpy(p, &v, sizeof(v));
}
inline void stream_fence() {}

}  // namespace
}  // namespace se
