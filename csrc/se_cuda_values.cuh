// Values and functions: accesses of one element or sixteen bytes, activations, gates.
//
// T is the activation's type, V the elements of an access.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda_device.cuh"
#include "se_cuda.h"

namespace se_cuda {

template <class T, int V>
using Raw = std::conditional_t<V == 1, T, uint4>;

template <int V, class T>
__device__ inline Raw<T, V> load(const T* from) {
  return device::load_first(reinterpret_cast<const Raw<T, V>*>(from));
}

template <int V, class T>
__device__ inline Raw<T, V> load_last(const T* from) {
  return device::load_last(reinterpret_cast<const Raw<T, V>*>(from));
}

template <int V, class T>
__device__ inline void unpack(Raw<T, V> raw, float (&values)[V]) {
  alignas(kVectorBytes) T elements[V];
  memcpy(elements, &raw, sizeof(raw));
#pragma unroll
  for (int v = 0; v < V; ++v) {
    values[v] = device::to_float(elements[v]);
  }
}

template <int V, class T>
__device__ inline void multiply(float (&values)[V], Raw<T, V> by) {
  float factors[V];
  unpack<V, T>(by, factors);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    values[v] *= factors[v];
  }
}

template <int V, class T>
__device__ inline void store_last(T* to, const float (&values)[V]) {
  alignas(kVectorBytes) T elements[V];
  if constexpr (V == 1) {
    device::from_float(values[0], elements[0]);
  } else {
#pragma unroll
    for (int v = 0; v < V; v += 2) {
      device::from_pair(values[v], values[v + 1], elements + v);
    }
  }
  Raw<T, V> raw;
  memcpy(&raw, elements, sizeof(raw));
  device::store_last(reinterpret_cast<Raw<T, V>*>(to), raw);
}

// Written so that NaN fails the comparisons and is carried on, as eager carries it.
__device__ inline float activate(float h, Act act) {
  switch (act) {
    case Act::relu:
      return h < 0 ? 0.0f : h;
    case Act::silu:
      return h / (1.0f + expf(-h));
    default:
      return 0.5f * h * (1.0f + erff(h * 0.70710678f));
  }
}

// da * act'(h). Chosen and not multiplied where the slope is 0, so that 0 * inf is 0 as in eager.
__device__ inline float activate_bwd(float da, float h, Act act) {
  switch (act) {
    case Act::relu:
      return h <= 0 ? 0.0f : da;
    case Act::silu: {
      const float sigma = 1.0f / (1.0f + expf(-h));
      return da * sigma * (1.0f + h * (1.0f - sigma));
    }
    default: {
      const float cdf = 0.5f * (1.0f + erff(h * 0.70710678f));
      return da * (cdf + h * 0.39894228f * expf(-0.5f * h * h));
    }
  }
}

__device__ inline float gate(float z, GateFn gate_fn) {
  if (gate_fn == GateFn::sigmoid) {
    return 1.0f / (1.0f + expf(-z));
  }
  const float ramp = z * (1.0f / 6.0f) + 0.5f;
  return ramp < 0 ? 0.0f : ramp > 1 ? 1.0f : ramp;
}

// ds * g'(z), told from s = g(z).
__device__ inline float gate_bwd(float ds, float s, GateFn gate_fn) {
  if (gate_fn == GateFn::sigmoid) {
    return ds * s * (1.0f - s);
  }
  return s > 0 && s < 1 ? ds * (1.0f / 6.0f) : 0.0f;
}

}  // namespace se_cuda
