// What a block adds up: its slice, over the pixels, and the two small products.
#pragma once

#include <type_traits>

#include "se_cuda_team.cuh"

namespace se_cuda {

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    value += device::shuffle_xor(value, lanes);
  }
  return value;
}

// How the threads of a block divide (groups of channels) x (pixels): a thread keeps to one group, `lanes` threads share
// it. Groups beyond the number of threads are taken in further turns.
struct Turn {
  int begin, count, lanes, lane, group;

  __device__ Turn(int begin, int groups) : begin(begin) {
    count = min(groups - begin, kThreads);
    lanes = kThreads / count;
    lane = int(threadIdx.x) / count;
    group = begin + int(threadIdx.x) % count;
  }
  __device__ bool active() const { return lane < lanes; }
};

// sums[c] = the sum over the pixels of terms(pixel, group); terms(p, g, values) fills V values of channels g * V on.
template <int V, class F>
__device__ void sum_pixels(Range pixels, int C, float* scratch, float* sums, F terms) {
  for (int begin = 0; begin < C / V; begin += kThreads) {
    const Turn turn(begin, C / V);
    float total[V] = {};
    if (turn.active()) {
#pragma unroll 4
      for (int p = pixels.first + turn.lane; p < pixels.last; p += turn.lanes) {
        float values[V];
        terms(p, turn.group, values);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          total[v] += values[v];
        }
      }
    }
    if (begin > 0) {
      __syncthreads();  // the scratch is still being read
    }
    if (turn.active()) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        scratch[threadIdx.x * V + v] = total[v];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < turn.count * V; i += kThreads) {
      float sum = 0;
      for (int lane = 0; lane < turn.lanes; ++lane) {
        sum += scratch[lane * turn.count * V + i];
      }
      sums[begin * V + i] = sum;
    }
  }
}

// NCHW: sums[c] = the sum over the pixels of terms(c, pixel), a warp a channel; terms(c, p, values) fills as many values
// as the array has, of pixels p on: V where the rows are whole vectors, else 1.
template <int V, class F>
__device__ void sum_rows(Range channels, int HW, float* sums, F terms) {
  const auto sum = [&](auto width) {
    constexpr int W = decltype(width)::value;
    const int lane = int(threadIdx.x) % kWarp;
    for (int c = channels.first + int(threadIdx.x) / kWarp; c < channels.last; c += kWarps) {
      float total = 0;
#pragma unroll 4
      for (int p = lane * W; p < HW; p += kWarp * W) {
        float values[W];
        terms(c, p, values);
#pragma unroll
        for (int v = 0; v < W; ++v) {
          total += values[v];
        }
      }
      total = warp_sum(total);
      if (lane == 0) {
        sums[c] = total;
      }
    }
  };
  if (HW % V == 0) {
    sum(std::integral_constant<int, V>());
  } else {
    sum(std::integral_constant<int, 1>());
  }
}

// emit(row, matrix[row, :] . vector) for the rows of a range, LANES threads a row. matrix is row-major, `columns` wide.
template <int LANES, class F>
__device__ void row_dots(const float* matrix, Range rows, int columns, const float* vector, F emit) {
  constexpr int kRows = kThreads / LANES;
  const int lane = int(threadIdx.x) % LANES;
  for (int begin = rows.first; begin < rows.last; begin += kRows) {
    const int row = begin + int(threadIdx.x) / LANES;
    float sum = 0;
    if (row < rows.last) {
#pragma unroll 4
      for (int column = lane; column < columns; column += LANES) {
        sum += matrix[int64_t(row) * columns + column] * vector[column];
      }
    }
#pragma unroll
    for (int lanes = LANES / 2; lanes > 0; lanes /= 2) {
      sum += device::shuffle_xor(sum, lanes);
    }
    if (lane == 0 && row < rows.last) {
      emit(row, sum);
    }
  }
}

// emit(column, sum over the rows of a range of vector[row] * matrix[row, column]), for the columns of another.
template <class F>
__device__ void column_dots(const float* matrix, Range rows, Range columns, int width, const float* vector,
                            float* scratch, F emit) {
  for (int begin = 0; begin < columns.last - columns.first; begin += kThreads) {
    const Turn turn(begin, columns.last - columns.first);
    const int column = columns.first + turn.group;
    float sum = 0;
    if (turn.active()) {
#pragma unroll 4
      for (int row = rows.first + turn.lane; row < rows.last; row += turn.lanes) {
        sum += vector[row] * matrix[int64_t(row) * width + column];
      }
    }
    if (begin > 0) {
      __syncthreads();  // the scratch is still being read
    }
    scratch[threadIdx.x] = sum;
    __syncthreads();
    if (turn.lane == 0) {
      float total = 0;
      for (int lane = 0; lane < turn.lanes; ++lane) {
        total += scratch[lane * turn.count + threadIdx.x];
      }
      emit(column, total);
    }
  }
}

}  // namespace se_cuda
