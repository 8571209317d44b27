// The tail's kernels with 64-byte vectors. The processor is asked before any of them is called.
#if defined(__x86_64__)

#include <algorithm>

#include "simd_avx512.h"
#include "tail_kernels.h"

namespace se {

template <class T>
const TailKernels<T>& tail_kernels_avx512() {
  static constexpr TailKernels<T> table = make_tail_kernels<T>();
  return table;
}
template const TailKernels<float>& tail_kernels_avx512<float>();
template const TailKernels<double>& tail_kernels_avx512<double>();
template const TailKernels<c10::BFloat16>& tail_kernels_avx512<c10::BFloat16>();
template const TailKernels<c10::Half>& tail_kernels_avx512<c10::Half>();

}  // namespace se

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
