// Loads, stores, loops and sums over the vectors of simd.h, for every dtype.
#pragma once

#include <cmath>

#include "simd.h"

namespace se {
namespace {

inline Vec<float> widen_bfloat16(Bits16 bits) {
  return bit_cast<Vec<float>>(widen_bits(bits) << 16);
}

// Rounds to nearest even. The carry out of a NaN's payload could reach its exponent, so NaN is written as such.
inline Bits16 narrow_bfloat16(Vec<float> v) {
  const Bits32 bits = bit_cast<Bits32>(v);
  const Bits32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits32 is_nan = bit_cast<Bits32>(v != v);
  return narrow_bits((rounded & ~is_nan) | (is_nan & 0x7fc0u));
}

template <class T>
inline Vec<float> widen(Bits16 bits) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    return widen_bfloat16(bits);
  } else {
    return widen_half(bits);
  }
}

template <class T>
inline Bits16 narrow(Vec<float> v) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    return narrow_bfloat16(v);
  } else {
    return narrow_half(v);
  }
}

// kWhole: a whole vector; else its first `count` lanes.
template <bool kWhole, class T>
inline Vec<acc_t<T>> load(const T* p, int64_t count) {
  using Raw = std::conditional_t<sizeof(T) == 2, Bits16, Vec<acc_t<T>>>;
  Raw raw;
  if constexpr (kWhole) {
    std::memcpy(&raw, p, sizeof(raw));
  } else {
    load_first(p, count, raw);
  }
  if constexpr (sizeof(T) == 2) {
    return widen<T>(raw);
  } else {
    return raw;
  }
}

template <bool kWhole, class T>
inline void store(T* p, int64_t count, Vec<acc_t<T>> v) {
  const auto put = [&](auto raw) {
    if constexpr (kWhole) {
      std::memcpy(p, &raw, sizeof(raw));
    } else {
      store_first(p, count, raw);
    }
  };
  if constexpr (sizeof(T) == 2) {
    put(narrow<T>(v));
  } else {
    put(v);
  }
}

// Past the caches: spares the read of a line that is about to be overwritten. p is aligned to the vector.
template <class T>
inline void store_past_cache(T* p, Vec<acc_t<T>> v) {
  if constexpr (sizeof(T) == 2) {
    stream(p, narrow<T>(v));
  } else {
    stream(p, v);
  }
}

// Calls step(whole, i, count) for every vector of [0, n): `whole` is a type, so the last, partial one is compiled
// apart.
template <class A, class Step>
inline __attribute__((always_inline)) void for_each_vector(int64_t n, Step step) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) {
    step(std::true_type{}, i, kLanes<A>);
  }
  if (i < n) {
    step(std::false_type{}, i, n - i);
  }
}

inline int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

template <class A>
inline Vec<A> broadcast(A value) {
  return value - Vec<A>{};  // a sum would not do: -0 + 0 is 0
}

// e^x within two units in the last place, infinity where it is above 2^127.5: x = n ln 2 + r, |r| <= ln 2 / 2, and the
// polynomial of Cephes' expf for e^r.
inline Vec<float> exponential(Vec<float> x) {
  x = x < broadcast<float>(-87) ? broadcast<float>(-87) : x;
  x = x > broadcast<float>(89) ? broadcast<float>(89) : x;
  const Vec<float> shift = broadcast<float>(12582912);  // 1.5 * 2^23: a sum with it has no bits for a fraction
  const Vec<float> shifted = multiply_add(x, broadcast<float>(1.44269504f), shift), n = shifted - shift;
  Vec<float> r = multiply_add(n, broadcast<float>(-0.693359375f), x);  // ln 2 in two parts, the first exact times n
  r = multiply_add(n, broadcast<float>(2.12194440e-4f), r);
  Vec<float> p = broadcast<float>(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = multiply_add(p, r, broadcast<float>(c));
  }
  p = multiply_add(p, r * r, r) + 1;
  const Bits32 power = (bit_cast<Bits32>(shifted) + 127u) << 23;  // of two: n is in the low bits
  return p * bit_cast<Vec<float>>(power);
}

inline Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) {
    x[i] = std::exp(x[i]);
  }
  return x;
}

// Sums kCount vectors pairwise.
template <int kCount, class V>
inline __attribute__((always_inline)) V tree_sum(const V* v) {
  if constexpr (kCount == 1) {
    return v[0];
  } else {
    return tree_sum<kCount / 2>(v) + tree_sum<kCount / 2>(v + kCount / 2);
  }
}

}  // namespace
}  // namespace se
