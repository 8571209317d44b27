// The kernels with 64-byte vectors. The processor is asked before any of them is called.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "se.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#endif

namespace se {
namespace {
constexpr int kVectorBytes = 64;
}
}  // namespace se

#include "se_simd.h"

namespace se {
namespace {

// Masks of all lanes: the unmasked conversions make gcc 12 warn of an uninitialised operand that they do not use.
inline Bits32 widen_bits(Bits16 bits) {
  return bit_cast<Bits32>(_mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(bits)));
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
inline void load_first(const void* p, int64_t count, Vec<float>& v) {
  v = bit_cast<Vec<float>>(_mm512_maskz_loadu_ps(first_lanes<__mmask16>(count), p));
}
inline void load_first(const void* p, int64_t count, Vec<double>& v) {
  v = bit_cast<Vec<double>>(_mm512_maskz_loadu_pd(first_lanes<__mmask8>(count), p));
}
inline void store_first(void* p, int64_t count, const Bits16& v) {
  _mm256_mask_storeu_epi16(p, first_lanes<__mmask16>(count), bit_cast<__m256i>(v));
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

#include "se_kernels.h"

namespace se {

template <class T>
const Kernels<T>& kernels_avx512() {
  static constexpr Kernels<T> table = make_kernels<T>();
  return table;
}
template const Kernels<float>& kernels_avx512<float>();
template const Kernels<double>& kernels_avx512<double>();
template const Kernels<c10::BFloat16>& kernels_avx512<c10::BFloat16>();
template const Kernels<c10::Half>& kernels_avx512<c10::Half>();

}  // namespace se

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
