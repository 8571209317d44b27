// Vectors of kVectorBytes. The file of an instruction set defines kVectorBytes, includes this, and then defines what
// compilers do not do well by themselves:
//
//   widen_half, narrow_half            float16 to float and back
//   widen_bits, narrow_bits            16-bit integers to 32 and back
//   widen_bytes                        bytes, of an address, to 32-bit integers
//   multiply_add                       a * b + c; the compiler would contract some copies of a loop and not others
//   stream, stream_fence               a store of a whole, aligned vector past the caches
//   load_first, store_first            overloads of what is below, for a part of a vector
//   select_lanes, lanes_above, spread_bits, narrow_even_odd
//                                      overloads of what is below, where the processor has masks
//   positive_part                      overload of what is below, where one instruction does it
//
// All in an unnamed namespace: each instruction set has its own copy, and the linker must not merge them.
#pragma once

#include <cstring>
#include <utility>

#include "se.h"

namespace se {
namespace {

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vec = typename VectorOf<A>::type;
template <class A>
constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(A));

typedef uint16_t Bits16 __attribute__((vector_size(kVectorBytes / 2)));  // as many lanes as Vec<float>
typedef uint32_t Bits32 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Raw16 __attribute__((vector_size(kVectorBytes)));  // twice as many

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// The first `count` lanes; the others are zero.
template <class V>
inline void load_first(const void* p, int64_t count, V& v) {
  v = V{};
  for (int64_t i = 0; i < count; ++i) {
    auto lane = v[i];
    std::memcpy(&lane, static_cast<const char*>(p) + i * sizeof(lane), sizeof(lane));
    v[i] = lane;
  }
}

template <class V>
inline void store_first(void* p, int64_t count, const V& v) {
  for (int64_t i = 0; i < count; ++i) {
    auto lane = v[i];
    std::memcpy(static_cast<char*>(p) + i * sizeof(lane), &lane, sizeof(lane));
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

// 1, 2, 4, .. by lane
template <class Lane, size_t... kIndex>
inline auto lane_bits(std::index_sequence<kIndex...>) {
  typedef Lane Lanes __attribute__((vector_size(kVectorBytes)));
  return Lanes{static_cast<Lane>(uint64_t(1) << kIndex)...};
}
template <class V>
inline auto lane_bits() {
  using Mask = decltype(V{} < V{});
  using Lane = std::remove_reference_t<decltype(Mask{}[0])>;
  return lane_bits<Lane>(std::make_index_sequence<kVectorBytes / sizeof(Lane)>());
}

// The lanes whose bit is set, 0 in the others: whatever they hold, also NaN.
template <class V>
inline V select_lanes(V v, uint32_t bits) {
  const auto positions = lane_bits<V>();
  using Mask = std::remove_const_t<decltype(positions)>;
  using Lane = std::remove_reference_t<decltype(Mask{}[0])>;
  return bit_cast<V>(bit_cast<Mask>(v) & ((positions & static_cast<Lane>(bits)) != 0));
}

// A bit for each lane that is above its bound, or NaN.
template <class V>
inline uint32_t lanes_above(V v, V bound) {
  const auto positions = lane_bits<V>();
  using Lane = std::remove_cv_t<std::remove_reference_t<decltype(positions[0])>>;
  return static_cast<uint32_t>(reduce<Lane>(~(v <= bound) & positions));
}

// A zero before each bit: abcd to 0a0b0c0d
template <class Bits>
inline uint32_t spread_bits(Bits x) {
  x = (x | x << 8) & 0x00ff00ffu;
  x = (x | x << 4) & 0x0f0f0f0fu;
  x = (x | x << 2) & 0x33333333u;
  return (x | x << 1) & 0x55555555u;
}

// To bfloat16 in the upper half of each lane, to nearest even. The carry out of a NaN's payload could reach its
// exponent, so NaN is written as such.
template <class V>
inline Bits32 round_bfloat16(V v) {
  const Bits32 bits = bit_cast<Bits32>(v), is_nan = bit_cast<Bits32>(v != v);
  return ((bits + 0x7fffu + ((bits >> 16) & 1u)) & ~is_nan) | (is_nan & 0x7fc00000u);
}

// Both to bfloat16, at the even and the odd places.
template <class V>
inline Raw16 narrow_even_odd(V even, V odd) {
  return bit_cast<Raw16>((round_bfloat16(even) >> 16) | (round_bfloat16(odd) & 0xffff0000u));
}

// NaN stays NaN
template <class V>
inline V positive_part(V v) {
  return v < 0 ? V{} : v;
}

}  // namespace
}  // namespace se
