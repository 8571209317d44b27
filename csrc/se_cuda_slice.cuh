// A block's slice of the tensor that is read twice: x forward, dout backward.
#pragma once

#include <cstdint>
#include <type_traits>

#include "se_cuda_sums.cuh"
#include "se_cuda_team.cuh"
#include "se_cuda_values.cuh"

namespace se_cuda {

template <class T, int V, bool CL, bool ON_CHIP>
struct Slice {
  const Sample<T> from;
  T* const kept;
  const Range range;  // of pixels, or of channels
  const int C, HW;

  // What `range` holds in shared memory, on the chip; starts to copy it there.
  __device__ Slice(const Sample<T>& from, T* kept, Range range, const Shape& shape)
      : from(from), kept(kept), range(range), C(shape.C), HW(int(shape.HW())) {
    if constexpr (ON_CHIP && CL) {
      each([&](int p, int g) { device::copy_async(kept + place(p, g), from.at(g * V, p)); });
    } else if constexpr (ON_CHIP) {
      const T* first = from.data + int64_t(range.first) * HW;
      for (int i = threadIdx.x; i < vectors(); i += kThreads) {
        device::copy_async(kept + i * V, first + i * V);
      }
    }
  }

  __device__ void arrive() const {
    if constexpr (ON_CHIP) {
      device::copies_wait();
      if constexpr (!CL) {
        __syncthreads();  // channels-last, a thread reads only what it has copied itself
      }
    }
  }

  // Channels-last. f(pixel, group) for what this thread takes, in both passes alike.
  template <class F>
  __device__ void each(F f) const {
    for (int begin = 0; begin < C / V; begin += kThreads) {
      const Turn turn(begin, C / V);
      if (turn.active()) {
        for (int p = range.first + turn.lane; p < range.last; p += turn.lanes) {
          f(p, turn.group);
        }
      }
    }
  }
  __device__ int place(int p, int g) const { return (p - range.first) * C + g * V; }

  // Channels-last: V channels of a pixel.
  __device__ Raw<T, V> first_read(int p, int g) const {
    return ON_CHIP ? load<V>(kept + place(p, g)) : load<V>(from.at(g * V, p));
  }
  __device__ Raw<T, V> last_read(int p, int g) const {
    return ON_CHIP ? load<V>(kept + place(p, g)) : load_last<V>(from.at(g * V, p));
  }

  // NCHW: where a channel's pixels from p on are.
  __device__ const T* row(int c, int p) const {
    return ON_CHIP ? kept + (c - range.first) * HW + p : from.at(c, p);
  }
  __device__ int vectors() const { return (range.last - range.first) * HW / V; }
};

// For write_slice: nothing is added, not even zero, which would turn -0 into 0.
struct NoShift {
  __device__ float operator()(int) const { return 0; }
};

template <class Shift>
__device__ inline float affine(float value, float scale, float shift) {
  return std::is_same_v<Shift, NoShift> ? value * scale : value * scale + shift;
}

// out = value * scale(c) + shift(c), over the slice.
template <class T, int V, bool CL, bool ON_CHIP, class Scale, class Shift>
__device__ void write_slice(const Slice<T, V, CL, ON_CHIP>& slice, const Sample<T>& out, Scale scale, Shift shift) {
  const Range range = slice.range;
  if constexpr (CL) {
    for (int begin = 0; begin < slice.C / V; begin += kThreads) {
      const Turn turn(begin, slice.C / V);
      if (!turn.active()) {
        continue;
      }
      float scales[V], shifts[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        scales[v] = scale(turn.group * V + v);
        shifts[v] = shift(turn.group * V + v);
      }
#pragma unroll 4
      for (int p = range.first + turn.lane; p < range.last; p += turn.lanes) {
        float values[V];
        unpack<V, T>(slice.last_read(p, turn.group), values);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          values[v] = affine<Shift>(values[v], scales[v], shifts[v]);
        }
        store_last<V>(out.at(turn.group * V, p), values);
      }
    }
  } else if constexpr (ON_CHIP) {
    // A sample is one run of elements, here and there; a vector may hold the end of a channel and the next one's start
    T* to = out.data + int64_t(range.first) * slice.HW;
    for (int i = threadIdx.x; i < slice.vectors(); i += kThreads) {
      int c = range.first + i * V / slice.HW;
      int p = i * V % slice.HW;
      float values[V];
      unpack<V, T>(load<V>(slice.kept + i * V), values);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        values[v] = affine<Shift>(values[v], scale(c), shift(c));
        if (++p == slice.HW) {
          p = 0;
          ++c;
        }
      }
      store_last<V>(to + i * V, values);
    }
  } else {
    for (int c = range.first + int(threadIdx.x) / kWarp; c < range.last; c += kWarps) {
      const float scale_c = scale(c), shift_c = shift(c);
#pragma unroll 4
      for (int p = int(threadIdx.x) % kWarp * V; p < slice.HW; p += kWarp * V) {
        float values[V];
        unpack<V, T>(load_last<V>(slice.from.at(c, p)), values);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          values[v] = affine<Shift>(values[v], scale_c, shift_c);
        }
        store_last<V>(out.at(c, p), values);
      }
    }
  }
}

}  // namespace se_cuda
