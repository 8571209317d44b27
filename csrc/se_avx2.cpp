// The kernels with 32-byte vectors. The processor is asked before any of them is called.
#if defined(__x86_64__)

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

#include "se_simd.h"

namespace se {
namespace {

inline Bits32 widen_bits(Bits16 bits) {
  return bit_cast<Bits32>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(bits)));
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

#include "se_kernels.h"

namespace se {

template <class T>
const Kernels<T>& kernels_avx2() {
  static constexpr Kernels<T> table = make_kernels<T>();
  return table;
}
template const Kernels<float>& kernels_avx2<float>();
template const Kernels<double>& kernels_avx2<double>();
template const Kernels<c10::BFloat16>& kernels_avx2<c10::BFloat16>();
template const Kernels<c10::Half>& kernels_avx2<c10::Half>();

}  // namespace se

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
