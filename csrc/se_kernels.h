// The table of kernels of one instruction set. Included by its file, once se_simd.h and what that asks for are there.
#pragma once

#include <cmath>

#include "se_channels_last.h"
#include "se_contiguous.h"
#include "se_products.h"

namespace se {
namespace {

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

inline void sigmoid(float* z, int64_t count) {
  for_each_vector<float>(count, [&](auto whole, int64_t i, int64_t left) {
    constexpr bool kWhole = decltype(whole)::value;
    store<kWhole>(z + i, left, 1 / (1 + exponential(-load<kWhole>(z + i, left))));
  });
}

inline void sigmoid(double* z, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    z[i] = 1 / (1 + std::exp(-z[i]));
  }
}

template <class W>
constexpr Products<W> make_products() {
  return {rows_dot<W>, cols_dot<W>, outer<W>};
}

template <class T>
constexpr Kernels<T> make_kernels() {
  return {
      {sum_channels_last<T>, dot_channels_last<T>, scale_channels_last<T>, grad_channels_last<T>},
      {sum_contiguous<T>, dot_contiguous<T>, scale_contiguous<T>, grad_contiguous<T>},
      make_products<T>(),
      make_products<acc_t<T>>(),
      sigmoid,
  };
}

}  // namespace
}  // namespace se
