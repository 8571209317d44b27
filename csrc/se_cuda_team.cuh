// Who takes what, where it lies, and how the blocks of a team talk to each other.
#pragma once

#include <cstdint>

#include "cuda_device.cuh"
#include "se_cuda.h"

namespace se_cuda {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

// A run of pixels, channels or rows.
struct Range {
  int first, last;
};

__host__ __device__ inline int divide_up(int64_t a, int64_t b) { return int((a + b - 1) / b); }

// How many of `total` each of `parts` takes, in whole units.
__host__ __device__ inline int portion(int total, int parts, int unit) {
  return divide_up(divide_up(total, parts), unit) * unit;
}

__device__ inline Range share(int total, int parts, int unit, int index) {
  const int each = portion(total, parts, unit);
  const int first = min(index * each, total);
  return {first, min(first + each, total)};
}

template <class T>
struct Sample {
  T* data;
  int64_t c_stride, h_stride, w_stride;
  int W;
  bool flat;

  __device__ Sample(const View& view, int64_t n, int W)
      : data(static_cast<T*>(view.data) + n * view.n_stride),
        c_stride(view.c_stride),
        h_stride(view.h_stride),
        w_stride(view.w_stride),
        W(W),
        flat(view.flat) {}

  __device__ T* at(int c, int p) const {
    const int64_t pixel = flat ? p * w_stride : (p / W) * h_stride + (p % W) * w_stride;
    return data + c * c_stride + pixel;
  }
};

// Vectors that the blocks of a team tell each other.
struct Board {
  float *sums, *hidden, *gates;  // C, R, C

  __device__ Board(float* at, const Shape& shape) : sums(at), hidden(at + shape.C), gates(hidden + shape.R) {}
};
__host__ __device__ inline int64_t board_floats(const Shape& shape) { return 2 * int64_t(shape.C) + shape.R; }

// A block's shared memory: the slice (on the chip), vectors of its own, the board (on the chip).
template <class T, int V>
struct Shared {
  T* slice;
  float *scratch, *values, *active, *board;  // kThreads * V, C, R, board_floats
  int* ticket;                               // in the grid, in the board's place

  __device__ Shared(int64_t slice_bytes, const Shape& shape)
      : slice(reinterpret_cast<T*>(device::shared_memory())),
        scratch(reinterpret_cast<float*>(device::shared_memory() + slice_bytes)),
        values(scratch + kThreads * V),
        active(values + shape.C),
        board(active + shape.R),
        ticket(reinterpret_cast<int*>(board)) {}
};
inline int64_t shared_bytes(const Shape& shape, int vector, int64_t slice_bytes) {
  const int64_t board = slice_bytes > 0 ? board_floats(shape) : 1;
  return slice_bytes + 4 * (int64_t(kThreads) * vector + shape.C + shape.R + board);
}
// Of a block on the chip: pixels are whole vectors of channels; channels come in runs whose start is 16-byte aligned.
__host__ __device__ inline int64_t slice_bytes(const Shape& shape, int team) {
  const int64_t row = shape.channels_last ? shape.C : shape.HW();
  const int rows =
      shape.channels_last ? portion(int(shape.HW()), team, 1) : portion(shape.C, team, int(shape.vector()));
  return divide_up(row * rows * shape.element_bytes(), kVectorBytes) * int64_t(kVectorBytes);
}

struct ChipTeam {
  static constexpr bool on_chip = true;
  int rank, size;

  __device__ void sync() {
    if (size == 1) {
      __syncthreads();
    } else {
      device::cluster_sync();
    }
  }
  // What the block of that rank has on its board where this one has `mine`.
  __device__ float read(const float* mine, int of) const {
    return size == 1 ? *mine : *device::cluster_peer(mine, of);
  }
};

struct GridTeam {
  static constexpr bool on_chip = false;
  int rank, size;
  int64_t floats;
  int* counter;
  int syncs = 0;

  __device__ void sync() {
    ++syncs;
    __syncthreads();
    if (threadIdx.x == 0) {
      device::signal(counter);
      device::wait_until_at_least(counter, size * syncs);
    }
    __syncthreads();
  }
  __device__ float read(const float* mine, int of) const { return device::load_fresh(mine + (of - rank) * floats); }
};

}  // namespace se_cuda
