// Vectors of 32 bytes: AVX2, for the rest of the file that includes this.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "se.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace se {
namespace {
constexpr int kVectorBytes = 32;
}
}  // namespace se

#include "simd.h"

namespace se {
namespace {

inline Bits32 widen_bits(Bits16 bits) {
  return bit_cast<Bits32>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(bits)));
}

inline Bits32 widen_bytes(const uint8_t* p) {
  return bit_cast<Bits32>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

inline Bits16 narrow_bits(Bits32 bits) {
  const __m256i packed = _mm256_packus_epi32(bit_cast<__m256i>(bits), bit_cast<__m256i>(bits));
  return bit_cast<Bits16>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000)));
}

inline Vec<float> widen_half(Bits16 bits) {
  return bit_cast<Vec<float>>(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
}

inline Bits16 narrow_half(Vec<float> v) {
  constexpr int kNearestEven = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return bit_cast<Bits16>(_mm256_cvtps_ph(bit_cast<__m256>(v), kNearestEven));
}

inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
  return bit_cast<Vec<float>>(_mm256_fmadd_ps(bit_cast<__m256>(a), bit_cast<__m256>(b), bit_cast<__m256>(c)));
}
inline Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
  return bit_cast<Vec<double>>(_mm256_fmadd_pd(bit_cast<__m256d>(a), bit_cast<__m256d>(b), bit_cast<__m256d>(c)));
}

inline uint32_t lanes_above(Vec<float> v, Vec<float> bound) {
  return _mm256_movemask_ps(_mm256_cmp_ps(bit_cast<__m256>(v), bit_cast<__m256>(bound), _CMP_NLE_UQ));
}
inline uint32_t lanes_above(Vec<double> v, Vec<double> bound) {
  return _mm256_movemask_pd(_mm256_cmp_pd(bit_cast<__m256d>(v), bit_cast<__m256d>(bound), _CMP_NLE_UQ));
}

// The second operand where one is NaN
inline Vec<float> positive_part(Vec<float> v) {
  return bit_cast<Vec<float>>(_mm256_max_ps(_mm256_setzero_ps(), bit_cast<__m256>(v)));
}

inline void stream(void* p, const Bits16& v) {
  _mm_stream_si128(static_cast<__m128i*>(p), bit_cast<__m128i>(v));
}
template <class V>
inline void stream(void* p, const V& v) {
  _mm256_stream_si256(static_cast<__m256i*>(p), bit_cast<__m256i>(v));
}
inline void stream_fence() {
  _mm_sfence();
}

}  // namespace
}  // namespace se
