// The kernels with 64-byte vectors. The processor is asked before any of them is called.
#if defined(__x86_64__)

#include "simd_avx512.h"
#include "se_kernels.h"

namespace se {

template <class T>
const Kernels<T>& kernels_avx512() {
  static constexpr Kernels<T> table = make_kernels<T>();
  return table;
}
template const Kernels<float>& kernels_avx512<float>();
template const Kernels<double>& kernels_avx512<double>();
template const Kernels<c10::BFloat16>& kernels_avx512<c10::BFloat16>();
template const Kernels<c10::Half>& kernels_avx512<c10::Half>();

}  // namespace se

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
