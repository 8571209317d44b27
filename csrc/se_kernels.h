// The table of kernels of one instruction set. Included by its file, after simd.h and what that asks for.
#pragma once

#include "se_channels_last.h"
#include "se_contiguous.h"
#include "se_products.h"

namespace se {
namespace {

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
