// Vectors of 64 bytes: AVX-512, for the rest of the file that includes this.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "se.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,bmi2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,bmi2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#endif

namespace se {
namespace {
constexpr int kVectorBytes = 64;
}
}  // namespace se

#include "simd.h"

namespace se {
namespace {

// Masks of all lanes: the unmasked conversions make gcc 12 warn of an uninitialised operand that they do not use.
inline Bits32 widen_bits(Bits16 bits) {
  return bit_cast<Bits32>(_mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(bits)));
}

inline Bits32 widen_bytes(const uint8_t* p) {
  return bit_cast<Bits32>(_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

inline Bits16 narrow_bits(Bits32 bits) {
  return bit_cast<Bits16>(_mm512_maskz_cvtepi32_epi16(0xffff, bit_cast<__m512i>(bits)));
}

inline Vec<float> widen_half(Bits16 bits) {
  return bit_cast<Vec<float>>(_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(bits)));
}

inline Bits16 narrow_half(Vec<float> v) {
  constexpr int kNearestEven = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return bit_cast<Bits16>(_mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(v), kNearestEven));
}

template <class Mask>
inline Mask first_lanes(int64_t count) {
  return static_cast<Mask>((1u << count) - 1u);
}

inline void load_first(const void* p, int64_t count, Bits16& v) {
  v = bit_cast<Bits16>(_mm256_maskz_loadu_epi16(first_lanes<__mmask16>(count), p));
}
inline void load_first(const void* p, int64_t count, Raw16& v) {
  v = bit_cast<Raw16>(_mm512_maskz_loadu_epi16(first_lanes<__mmask32>(count), p));
}
inline void load_first(const void* p, int64_t count, Vec<float>& v) {
  v = bit_cast<Vec<float>>(_mm512_maskz_loadu_ps(first_lanes<__mmask16>(count), p));
}
inline void load_first(const void* p, int64_t count, Vec<double>& v) {
  v = bit_cast<Vec<double>>(_mm512_maskz_loadu_pd(first_lanes<__mmask8>(count), p));
}
inline void store_first(void* p, int64_t count, const Bits16& v) {
  _mm256_mask_storeu_epi16(p, first_lanes<__mmask16>(count), bit_cast<__m256i>(v));
}
inline void store_first(void* p, int64_t count, const Raw16& v) {
  _mm512_mask_storeu_epi16(p, first_lanes<__mmask32>(count), bit_cast<__m512i>(v));
}
inline void store_first(void* p, int64_t count, const Vec<float>& v) {
  _mm512_mask_storeu_ps(p, first_lanes<__mmask16>(count), bit_cast<__m512>(v));
}
inline void store_first(void* p, int64_t count, const Vec<double>& v) {
  _mm512_mask_storeu_pd(p, first_lanes<__mmask8>(count), bit_cast<__m512d>(v));
}

inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
  return bit_cast<Vec<float>>(_mm512_fmadd_ps(bit_cast<__m512>(a), bit_cast<__m512>(b), bit_cast<__m512>(c)));
}
inline Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
  return bit_cast<Vec<double>>(_mm512_fmadd_pd(bit_cast<__m512d>(a), bit_cast<__m512d>(b), bit_cast<__m512d>(c)));
}

inline Raw16 select_lanes(Raw16 v, uint32_t bits) {
  return bit_cast<Raw16>(_mm512_maskz_mov_epi16(bits, bit_cast<__m512i>(v)));
}
inline Vec<float> select_lanes(Vec<float> v, uint32_t bits) {
  return bit_cast<Vec<float>>(_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), bit_cast<__m512>(v)));
}
inline Vec<double> select_lanes(Vec<double> v, uint32_t bits) {
  return bit_cast<Vec<double>>(_mm512_maskz_mov_pd(static_cast<__mmask8>(bits), bit_cast<__m512d>(v)));
}

inline uint32_t lanes_above(Vec<float> v, Vec<float> bound) {
  return _mm512_cmp_ps_mask(bit_cast<__m512>(v), bit_cast<__m512>(bound), _CMP_NLE_UQ);
}
inline uint32_t lanes_above(Vec<double> v, Vec<double> bound) {
  return _mm512_cmp_pd_mask(bit_cast<__m512d>(v), bit_cast<__m512d>(bound), _CMP_NLE_UQ);
}

inline uint32_t spread_bits(uint32_t x) {
  return _pdep_u32(x, 0x55555555u);
}

inline __m512i round_finite(Vec<float> v) {
  const __m512i bits = bit_cast<__m512i>(v), one = _mm512_set1_epi32(1), last_bit = _mm512_set1_epi32(0x10000);
  const __m512i up = _mm512_maskz_add_epi32(0xffff, bits, _mm512_set1_epi32(0x7fff));
  return _mm512_mask_add_epi32(up, _mm512_test_epi32_mask(bits, last_bit), up, one);
}

inline __m512i nan_where_nan(__m512i rounded, Vec<float> v) {
  const __mmask16 is_nan = _mm512_cmp_ps_mask(bit_cast<__m512>(v), bit_cast<__m512>(v), _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc00000));
}

inline Raw16 narrow_even_odd(Vec<float> even, Vec<float> odd) {
  __m512i low = round_finite(even), high = round_finite(odd);
  if (__builtin_expect(_mm512_cmp_ps_mask(bit_cast<__m512>(even), bit_cast<__m512>(odd), _CMP_UNORD_Q), 0)) {
    low = nan_where_nan(low, even);
    high = nan_where_nan(high, odd);
  }
  return bit_cast<Raw16>(_mm512_mask_mov_epi16(high, 0x55555555u, _mm512_maskz_srli_epi32(0xffff, low, 16)));
}

// The second operand where one is NaN
inline Vec<float> positive_part(Vec<float> v) {
  return bit_cast<Vec<float>>(_mm512_maskz_max_ps(0xffff, _mm512_setzero_ps(), bit_cast<__m512>(v)));
}

inline void stream(void* p, const Bits16& v) {
  _mm256_stream_si256(static_cast<__m256i*>(p), bit_cast<__m256i>(v));
}
template <class V>
inline void stream(void* p, const V& v) {
  _mm512_stream_si512(static_cast<__m512i*>(p), bit_cast<__m512i>(v));
}
inline void stream_fence() {
  _mm_sfence();
}

}  // namespace
}  // namespace se
