// Loads, stores, loops and sums over the vectors of se_simd.h, for every dtype.
#pragma once

#include "se_simd.h"

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

// Sum of the lanes of a vector of kBytes, half by half: registers only, where a loop over lanes would go through
// memory.
template <class A, int kBytes = kVectorBytes, class V>
inline A reduce(V v) {
  if constexpr (kBytes == sizeof(A)) {
    return bit_cast<A>(v);
  } else {
    typedef A Half __attribute__((vector_size(kBytes / 2)));
    Half low, high;
    std::memcpy(&low, &v, kBytes / 2);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + kBytes / 2, kBytes / 2);
    return reduce<A, kBytes / 2>(low + high);
  }
}

inline int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

template <class A>
inline Vec<A> broadcast(A value) {
  return value - Vec<A>{};  // a sum would not do: -0 + 0 is 0
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
