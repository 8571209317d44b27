// BatchNorm -> ReLU -> max pool of 3x3, stride 2, padding 1 on the CPU: kernel interface.
//
// Mathematics: kernels/norm_pool.py. Channels-last alone. Three sweeps, each over rows of outputs: `apply` makes them and
// their codes, `sums` adds up what the norm's parameters get, and `grads` writes the two rows of y's gradient that an
// output's window has its middle and its last row in.
#pragma once

#include "se.h"

namespace se {

constexpr int64_t kNoMaximum = 9;      // the code of an output that is 0
constexpr int64_t kPoolChunk = 1024;   // channels that a sweep takes at a time
constexpr int64_t kScratchSlack = 64;  // above the numbers of a vector

// Rows [first, last) of the outputs of one sample. All strides are in elements; stride_c is 1.
template <class T>
struct PoolBlock {
  using A = acc_t<T>;
  Extent extent;  // of y
  int64_t first, last;
  View<const T> y, dout;
  View<T> out, dy;
  View<uint8_t> code;
  const A *mean, *scale, *shift;  // (C)
  // (C), of y - mean and of 1 in dy, where the statistics were the batch's, else null
  const A *slope, *drift;
  bool dy_past_cache;
  double *dot, *sum;  // (C), added to: of d * (y - mean), of d
  T* scratch;         // of `apply`: pool_scratch
};

inline int64_t pooled(int64_t size) {
  return (size + 1) / 2;
}
inline int64_t pool_scratch(Extent extent) {
  return 2 * pooled(extent.W) * ((extent.C < kPoolChunk ? extent.C : kPoolChunk) + kScratchSlack);
}

template <class T>
struct PoolSweeps {
  void (*apply)(const PoolBlock<T>& block);
  void (*sums)(const PoolBlock<T>& block);
  void (*grads)(const PoolBlock<T>& block);
};

// As `kernels` of se.h
template <class T>
const PoolSweeps<T>& pool_sweeps_baseline();
template <class T>
const PoolSweeps<T>& pool_sweeps_avx2();
template <class T>
const PoolSweeps<T>& pool_sweeps_avx512();

}  // namespace se
