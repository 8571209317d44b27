// The kernels with the 16-byte vectors that every x86-64 and aarch64 processor has.
#include "simd_baseline.h"
#include "se_kernels.h"

namespace se {

template <class T>
const Kernels<T>& kernels_baseline() {
  static constexpr Kernels<T> table = make_kernels<T>();
  return table;
}
template const Kernels<float>& kernels_baseline<float>();
template const Kernels<double>& kernels_baseline<double>();
template const Kernels<c10::BFloat16>& kernels_baseline<c10::BFloat16>();
template const Kernels<c10::Half>& kernels_baseline<c10::Half>();

}  // namespace se
