// The tail's kernels with 16-byte vectors.
#include <algorithm>

#include "simd_baseline.h"
#include "tail_kernels.h"

namespace se {

template <class T>
const TailKernels<T>& tail_kernels_baseline() {
  static constexpr TailKernels<T> table = make_tail_kernels<T>();
  return table;
}
template const TailKernels<float>& tail_kernels_baseline<float>();
template const TailKernels<double>& tail_kernels_baseline<double>();
template const TailKernels<c10::BFloat16>& tail_kernels_baseline<c10::BFloat16>();
template const TailKernels<c10::Half>& tail_kernels_baseline<c10::Half>();

}  // namespace se
