// The pool's sweeps with 64-byte vectors. The processor is asked before any of them is called.
#if defined(__x86_64__)

#include <algorithm>

#include "simd_avx512.h"
#include "pool_kernels.h"

namespace se {

template <class T>
const PoolSweeps<T>& pool_sweeps_avx512() {
  static constexpr PoolSweeps<T> table = make_pool_sweeps<T>();
  return table;
}
template const PoolSweeps<float>& pool_sweeps_avx512<float>();
template const PoolSweeps<double>& pool_sweeps_avx512<double>();
template const PoolSweeps<c10::BFloat16>& pool_sweeps_avx512<c10::BFloat16>();
template const PoolSweeps<c10::Half>& pool_sweeps_avx512<c10::Half>();

}  // namespace se

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
