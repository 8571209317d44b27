// What the kernels use of a GPU beyond plain CUDA C++, each behind a name, so that tests can run them on the CPU:
// without nvcc, a stand-in of the same names is included instead.
#pragma once

#include <cstdint>

#ifndef __CUDACC__
#include "cuda_on_cpu.h"
#else

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "se_cuda.h"

namespace device {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(float16 value) { return __half2float(value); }

__device__ inline void from_float(float value, float& to) { to = value; }
__device__ inline void from_float(float value, bfloat16& to) { to = __float2bfloat16_rn(value); }
__device__ inline void from_float(float value, float16& to) { to = __float2half_rn(value); }

// Two at once: one instruction.
__device__ inline void from_pair(float first, float second, float* to) {
  to[0] = first;
  to[1] = second;
}
__device__ inline void from_pair(float first, float second, bfloat16* to) {
  *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(first, second);
}
__device__ inline void from_pair(float first, float second, float16* to) {
  *reinterpret_cast<__half2*>(to) = __floats2half2_rn(first, second);
}

// The block's dynamic shared memory, 16-byte aligned.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ uint4 dynamic_shared_memory[];
  return reinterpret_cast<unsigned char*>(dynamic_shared_memory);
}

// 16 bytes from global to shared memory, without a detour through registers. What a thread has copied is there for that
// thread after `copies_wait`, for the block's others after a barrier that follows.
__device__ inline void copy_async(void* shared, const void* global) {
  const unsigned address = __cvta_generic_to_shared(shared);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
__device__ inline void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ inline float shuffle_xor(float value, int lanes) { return __shfl_xor_sync(0xffffffffu, value, lanes); }

// Sixteen bytes or one element. What is read for the last time, or written and not read again, should push nothing out
// of L2.
template <class V>
__device__ inline V load_first(const V* from) {
  return *from;
}
template <class V>
__device__ inline V load_last(const V* from) {
  return __ldcs(from);
}
template <class V>
__device__ inline void store_last(V* to, V value) {
  __stcs(to, value);
}

// What another block of this grid has just written: L1 may hold what was there before.
__device__ inline float load_fresh(const float* from) { return __ldcg(from); }

__device__ inline int take_ticket(int* counter) { return atomicAdd(counter, 1); }

// Makes what the block's threads wrote before a barrier visible to whoever sees the counter.
__device__ inline void signal(int* counter) {
  __threadfence();
  atomicAdd(counter, 1);
}
__device__ inline void wait_until_at_least(int* counter, int value) {
  int seen;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  } while (seen < value);
}

#if __CUDA_ARCH__ >= 900
__device__ inline int cluster_rank() { return cooperative_groups::this_cluster().block_rank(); }
__device__ inline void cluster_sync() { cooperative_groups::this_cluster().sync(); }
// Where the block of that rank keeps what this block keeps at `mine`, in shared memory.
__device__ inline const float* cluster_peer(const float* mine, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(const_cast<float*>(mine), rank);
}
#else
// Before Hopper a block is its own cluster.
__device__ inline int cluster_rank() { return 0; }
__device__ inline void cluster_sync() { __syncthreads(); }
__device__ inline const float* cluster_peer(const float* mine, int) { return mine; }
#endif

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("se: ") + what + ": " + cudaGetErrorString(status));
  }
}

inline int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

template <class Args>
cudaLaunchConfig_t configuration(void (*kernel)(Args), int64_t blocks, int cluster, int64_t shared, void* stream,
                                 cudaLaunchAttribute& in_clusters) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), "shared memory");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(se_cuda::kThreads);
  config.dynamicSmemBytes = size_t(shared);
  config.stream = static_cast<cudaStream_t>(stream);
  if (cluster > 1) {
    if (cluster > 8) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "clusters above 8");
    }
    in_clusters.id = cudaLaunchAttributeClusterDimension;
    in_clusters.val.clusterDim.x = unsigned(cluster);
    in_clusters.val.clusterDim.y = in_clusters.val.clusterDim.z = 1;
    config.attrs = &in_clusters;
    config.numAttrs = 1;
  }
  return config;
}

template <class Args>
void launch(void (*kernel)(Args), int64_t blocks, int cluster, int64_t shared, void* stream, const Args& args) {
  cudaLaunchAttribute in_clusters = {};
  const auto config = configuration(kernel, blocks, cluster, shared, stream, in_clusters);
  check(cudaLaunchKernelEx(&config, kernel, args), "launch");
}

// How many blocks of this kernel the device runs at once.
template <class Args>
int resident_blocks(void (*kernel)(Args), int64_t shared, int multiprocessors) {
  int blocks = 0;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), "shared memory");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, se_cuda::kThreads, size_t(shared)), "occupancy");
  return blocks * multiprocessors;
}

// Whether clusters of this size, each block with this much shared memory, ever run on the device.
template <class Args>
bool clusters_fit(void (*kernel)(Args), int cluster, int64_t shared) {
  cudaLaunchAttribute in_clusters = {};
  const auto config = configuration(kernel, cluster, cluster, shared, nullptr, in_clusters);
  int clusters = 0;
  const cudaError_t status = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (status != cudaSuccess) {
    cudaGetLastError();  // not an error of ours: the answer is no
    return false;
  }
  return clusters > 0;
}

// Limits of the current device, asked for once; clusters_of(blocks, shared) is whether such clusters fit.
template <class F>
se_cuda::Limits limits(F clusters_of) {
  static std::mutex mutex;
  static std::map<int, se_cuda::Limits> known;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) {
    return found->second;
  }
  se_cuda::Limits limits = {attribute(cudaDevAttrMultiProcessorCount, device),
                            attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                            attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
                            attribute(cudaDevAttrL2CacheSize, device), 1};
  if (attribute(cudaDevAttrClusterLaunch, device)) {
    limits.cluster = clusters_of(se_cuda::kMaxTeam, limits.shared_per_block) ? se_cuda::kMaxTeam : 8;
  }
  return known[device] = limits;
}

}  // namespace device

#endif
