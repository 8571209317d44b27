// The pool's sweeps with 16-byte vectors.
#include <algorithm>

#include "simd_baseline.h"
#include "pool_kernels.h"

namespace se {

template <class T>
const PoolSweeps<T>& pool_sweeps_baseline() {
  static constexpr PoolSweeps<T> table = make_pool_sweeps<T>();
  return table;
}
template const PoolSweeps<float>& pool_sweeps_baseline<float>();
template const PoolSweeps<double>& pool_sweeps_baseline<double>();
template const PoolSweeps<c10::BFloat16>& pool_sweeps_baseline<c10::BFloat16>();
template const PoolSweeps<c10::Half>& pool_sweeps_baseline<c10::Half>();

}  // namespace se
