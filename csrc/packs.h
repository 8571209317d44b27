// Packs: the numbers that a step of the tail's sweeps takes, at least eight, so that their signs fill bytes.
//
// Of a 16-bit type a pack is one vector, which widens to two. bfloat16 widens to its even and its odd numbers, at one
// instruction for each; what is combined with them has to lie in the same order (`spread`).
#pragma once

#include "vectors.h"

namespace se {
namespace {

template <class T>
constexpr int kPackVectors = sizeof(T) == 2               ? 2
                             : kLanes<acc_t<T>> >= 8 ? 1
                                                          : static_cast<int>(8 / kLanes<acc_t<T>>);
template <class T>
constexpr int64_t kPackLanes = kPackVectors<T>* kLanes<acc_t<T>>;
template <class T>
constexpr bool kEvenOdd = std::is_same_v<T, c10::BFloat16>;

template <class T>
struct Pack {
  Vec<acc_t<T>> v[kPackVectors<T>];
};

// As it lies in memory.
template <class T>
struct Raw {
  using V = std::conditional_t<sizeof(T) == 2, Raw16, Vec<acc_t<T>>>;
  static constexpr int kCount = sizeof(T) == 2 ? 1 : kPackVectors<T>;
  static constexpr int64_t kEach = kPackLanes<T> / kCount;  // lanes
  V v[kCount];
};

// f(0), f(1), .. f(kCount - 1), where each index is a type: vectors in an array that is indexed by a variable would not
// be kept in registers.
template <class F, int... kIndex>
inline __attribute__((always_inline)) void unrolled(F f, std::integer_sequence<int, kIndex...>) {
  (f(std::integral_constant<int, kIndex>{}), ...);
}
template <int kCount, class F>
inline __attribute__((always_inline)) void unrolled(F f) {
  unrolled(f, std::make_integer_sequence<int, kCount>());
}

template <class T, class F, int... kIndex>
inline __attribute__((always_inline)) Pack<T> each(F f, std::integer_sequence<int, kIndex...>) {
  return {{f(std::integral_constant<int, kIndex>{})...}};
}
template <class T, class F>
inline __attribute__((always_inline)) Pack<T> each(F f) {
  return each<T>(f, std::make_integer_sequence<int, kPackVectors<T>>());
}

template <class V, size_t... kIndex>
inline V evens(V a, V b, std::index_sequence<kIndex...>) {
  return __builtin_shufflevector(a, b, (2 * kIndex)...);
}
template <class V, size_t... kIndex>
inline V odds(V a, V b, std::index_sequence<kIndex...>) {
  return __builtin_shufflevector(a, b, (2 * kIndex + 1)...);
}
// Lanes kFirst, kFirst + 1, .. of a, each followed by its like of b
template <size_t kFirst, class V, size_t... kIndex>
inline V zip(V a, V b, std::index_sequence<kIndex...>) {
  return __builtin_shufflevector(a, b, (kFirst + kIndex / 2 + kIndex % 2 * sizeof...(kIndex))...);
}

// From the order of memory to that of packs, and back.
template <class T>
inline Pack<T> spread(Pack<T> p) {
  if constexpr (kEvenOdd<T>) {
    constexpr auto kIndices = std::make_index_sequence<kLanes<float>>();
    return {{evens(p.v[0], p.v[1], kIndices), odds(p.v[0], p.v[1], kIndices)}};
  } else {
    return p;
  }
}
template <class T>
inline Pack<T> gather(Pack<T> p) {
  if constexpr (kEvenOdd<T>) {
    constexpr auto kIndices = std::make_index_sequence<kLanes<float>>();
    return {{zip<0>(p.v[0], p.v[1], kIndices), zip<kLanes<float> / 2>(p.v[0], p.v[1], kIndices)}};
  } else {
    return p;
  }
}

// A vector at any address
template <class V>
using Unaligned __attribute__((aligned(1), may_alias)) = V;

// kWhole: a whole pack; else its first `count` numbers, the others being 0.
template <bool kWhole, class T>
inline __attribute__((always_inline)) Raw<T> load_raw(const T* p, int64_t count) {
  using V = typename Raw<T>::V;
  Raw<T> raw;
  unrolled<Raw<T>::kCount>([&](auto k) __attribute__((always_inline)) {
    const T* from = p + k * Raw<T>::kEach;
    if constexpr (kWhole) {
      raw.v[k] = *reinterpret_cast<const Unaligned<V>*>(from);
    } else {
      const int64_t left = count - k * Raw<T>::kEach;
      load_first(from, left < 0 ? 0 : smaller(left, Raw<T>::kEach), raw.v[k]);
    }
  });
  return raw;
}

template <bool kWhole, class T>
inline __attribute__((always_inline)) void store_raw(T* p, int64_t count, Raw<T> raw) {
  using V = typename Raw<T>::V;
  unrolled<Raw<T>::kCount>([&](auto k) __attribute__((always_inline)) {
    T* to = p + k * Raw<T>::kEach;
    if constexpr (kWhole) {
      *reinterpret_cast<Unaligned<V>*>(to) = raw.v[k];
    } else {
      const int64_t left = count - k * Raw<T>::kEach;
      store_first(to, left < 0 ? 0 : smaller(left, Raw<T>::kEach), raw.v[k]);
    }
  });
}

// p is aligned to the vector.
template <class T>
inline __attribute__((always_inline)) void stream_raw(T* p, Raw<T> raw) {
  unrolled<Raw<T>::kCount>(
      [&](auto k) __attribute__((always_inline)) { stream(p + k * Raw<T>::kEach, raw.v[k]); });
}

// The numbers whose bit is set, 0 in place of the others.
template <class T>
inline __attribute__((always_inline)) Raw<T> select(Raw<T> raw, uint32_t bits) {
  unrolled<Raw<T>::kCount>([&](auto k) __attribute__((always_inline)) {
    raw.v[k] = select_lanes(raw.v[k], bits >> (k * Raw<T>::kEach));
  });
  return raw;
}

template <class T>
inline __attribute__((always_inline)) Pack<T> widen(Raw<T> raw) {
  if constexpr (kEvenOdd<T>) {
    const auto bits = bit_cast<Bits32>(raw.v[0]);
    return {{bit_cast<Vec<float>>(bits << 16), bit_cast<Vec<float>>(bits & 0xffff0000u)}};
  } else if constexpr (sizeof(T) == 2) {
    Bits16 half[2];
    std::memcpy(half, &raw, sizeof(half));
    return {{widen_half(half[0]), widen_half(half[1])}};
  } else {
    return each<T>([&](auto k) { return raw.v[k]; });
  }
}

template <class T>
inline __attribute__((always_inline)) Raw<T> narrow(Pack<T> p) {
  Raw<T> raw;
  if constexpr (kEvenOdd<T>) {
    raw.v[0] = narrow_even_odd(p.v[0], p.v[1]);
  } else if constexpr (sizeof(T) == 2) {
    const Bits16 half[2] = {narrow_half(p.v[0]), narrow_half(p.v[1])};
    std::memcpy(&raw, half, sizeof(raw));
  } else {
    unrolled<kPackVectors<T>>([&](auto k) { raw.v[k] = p.v[k]; });
  }
  return raw;
}

// The largest number that rounds to a T that is not above 0.
template <class T>
constexpr acc_t<T> kRoundsToZero = std::is_same_v<T, c10::BFloat16> ? 0x1p-134
                                   : std::is_same_v<T, c10::Half>   ? 0x1p-25
                                                                    : 0;

// A bit for each number, in the order of memory, that is above 0 or NaN once it is rounded to T: where PyTorch passes
// the gradient of a ReLU.
template <class T>
inline uint32_t passes(Pack<T> p) {
  const auto bound = broadcast<acc_t<T>>(kRoundsToZero<T>);
  if constexpr (kEvenOdd<T>) {
    return spread_bits(lanes_above(p.v[0], bound)) | spread_bits(lanes_above(p.v[1], bound)) << 1;
  } else {
    uint32_t bits = 0;
    unrolled<kPackVectors<T>>([&](auto k) { bits |= lanes_above(p.v[k], bound) << (k * kLanes<acc_t<T>>); });
    return bits;
  }
}

// Calls step(whole, i, count) for every pack of [0, n), as for_each_vector does.
template <class T, class Step>
inline __attribute__((always_inline)) void for_each_pack(int64_t n, Step step) {
  int64_t i = 0;
  for (; i + kPackLanes<T> <= n; i += kPackLanes<T>) {
    step(std::true_type{}, i, kPackLanes<T>);
  }
  if (i < n) {
    step(std::false_type{}, i, n - i);
  }
}

// Wide numbers, in the order of packs: an aligned array with room for whole packs.
template <class T>
inline __attribute__((always_inline)) Pack<T> load_pack(const acc_t<T>* p) {
  using V = Vec<acc_t<T>>;
  return each<T>([&](auto k) { return *reinterpret_cast<const Unaligned<V>*>(p + k * kLanes<acc_t<T>>); });
}
template <class T>
inline __attribute__((always_inline)) void store_pack(acc_t<T>* p, Pack<T> pack) {
  using V = Vec<acc_t<T>>;
  unrolled<kPackVectors<T>>([&](auto k) __attribute__((always_inline)) {
    *reinterpret_cast<Unaligned<V>*>(p + k * kLanes<acc_t<T>>) = pack.v[k];
  });
}

// n wide numbers, zeros where `from` is null, from the order of memory into that of packs.
template <class T>
inline void pack_row(const acc_t<T>* from, int64_t n, acc_t<T>* to) {
  using A = acc_t<T>;
  if (!from) {
    std::memset(to, 0, (n + kPackLanes<T> - 1) / kPackLanes<T> * kPackLanes<T> * sizeof(A));
    return;
  }
  for_each_pack<T>(n, [&](auto whole, int64_t i, int64_t count) __attribute__((always_inline)) {
    Pack<T> p;
    for (int k = 0; k < kPackVectors<T>; ++k) {
      const int64_t at = k * kLanes<A>, left = count - at;
      if (decltype(whole)::value || left >= kLanes<A>) {
        p.v[k] = load<true>(from + i + at, kLanes<A>);
      } else {
        p.v[k] = left > 0 ? load<false>(from + i + at, left) : Vec<A>{};
      }
    }
    store_pack<T>(to + i, spread<T>(p));
  });
}

// total += row, which is in the order of packs
template <class T>
inline void add_row(const acc_t<T>* row, int64_t n, double* __restrict__ total) {
  using A = acc_t<T>;
  for_each_pack<T>(n, [&](auto, int64_t i, int64_t count) __attribute__((always_inline)) {
    alignas(kVectorBytes) A values[kPackLanes<T>];
    store_pack<T>(values, gather<T>(load_pack<T>(row + i)));
    for (int64_t k = 0; k < count; ++k) {
      total[i + k] += values[k];
    }
  });
}

}  // namespace
}  // namespace se
