// Vectors of kVectorBytes. The file of an instruction set defines kVectorBytes, includes this, and then defines what
// compilers do not do well by themselves:
//
//   widen_half, narrow_half            float16 to float and back
//   widen_bits, narrow_bits            16-bit integers to 32 and back
//   multiply_add                       a * b + c; the compiler would contract some copies of a loop and not others
//   stream, stream_fence               a store of a whole, aligned vector past the caches
//   load_first, store_first            overloads of what is below, for a part of a vector
//
// All in an unnamed namespace: each instruction set has its own copy, and the linker must not merge them.
#pragma once

#include <cstring>

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

}  // namespace
}  // namespace se
