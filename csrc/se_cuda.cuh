// The kernels of se_cuda.h. Read from the bottom: `forward_kernel` and `backward_kernel` say who works on what,
// `forward_sample` and `backward_sample` what is done, the functions above them how.
//
// T is the activation's type, V the elements of an access (16 bytes' worth, or 1), CL channels-last. A block has
// kThreads threads; `team` is a ChipTeam or a GridTeam. Sums are float32, in an order that depends on the plan alone.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda_device.cuh"
#include "se_cuda.h"

namespace se_cuda {

template <class Op>
struct Args {
  Op op;
  int team;
  int64_t board_floats;  // of one block, in the grid
  float* board;
  int* counters;
};

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

// ---- values and functions

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

// ---- where things are

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

// ---- sums over a slice

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

// sums[c] = the sum of the terms of channel c, a warp a channel; terms(c, lane) adds up what one lane takes.
template <class F>
__device__ void sum_rows(Range channels, float* sums, F terms) {
  for (int c = channels.first + int(threadIdx.x) / kWarp; c < channels.last; c += kWarps) {
    const float sum = warp_sum(terms(c, int(threadIdx.x) % kWarp));
    if (threadIdx.x % kWarp == 0) {
      sums[c] = sum;
    }
  }
}

// ---- small products

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

// ---- a block's part in one sample

// What both directions do with the tensor that is read twice: x forward, dout backward.
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

  // Channels-last. do(pixel, group) for what this thread takes, in both passes alike.
  template <class F>
  __device__ void each(F act) const {
    for (int begin = 0; begin < C / V; begin += kThreads) {
      const Turn turn(begin, C / V);
      if (turn.active()) {
        for (int p = range.first + turn.lane; p < range.last; p += turn.lanes) {
          act(p, turn.group);
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

// NCHW: one lane's part of sum_p term(p) over a channel's pixels, W of them at a time.
template <int W, class F>
__device__ float lane_sum(int HW, int lane, F term) {
  float sum = 0;
#pragma unroll 4
  for (int p = lane * W; p < HW; p += kWarp * W) {
    sum += term(p);
  }
  return sum;
}

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

template <class T, int V, bool CL, class Team>
__device__ void forward_sample(const Forward& op, int64_t n, Team& team, const Shared<T, V>& shared, Board board) {
  const Shape& shape = op.shape;
  const int C = shape.C, R = shape.R, HW = int(shape.HW());
  const int unit = CL ? 1 : int(shape.vector());
  const Range channels = share(C, team.size, unit, team.rank);
  const Range hidden_rows = share(R, team.size, 1, team.rank);
  const Range range = CL ? share(HW, team.size, 1, team.rank) : channels;
  const Slice<T, V, CL, Team::on_chip> x(Sample<T>(op.x, n, shape.W), shared.slice, range, shape);

  x.arrive();
  if constexpr (CL) {
    sum_pixels<V>(range, C, shared.scratch, board.sums,
                  [&](int p, int g, float(&values)[V]) { unpack<V, T>(x.first_read(p, g), values); });
  } else {
    const auto sum_with = [&](auto width) {
      constexpr int W = decltype(width)::value;
      sum_rows(range, board.sums, [&](int c, int lane) {
        return lane_sum<W>(HW, lane, [&](int p) {
          float values[W];
          unpack<W, T>(load<W>(x.row(c, p)), values);
          float sum = 0;
#pragma unroll
          for (int v = 0; v < W; ++v) {
            sum += values[v];
          }
          return sum;
        });
      });
    };
    if (HW % V == 0) {
      sum_with(std::integral_constant<int, V>());
    } else {
      sum_with(std::integral_constant<int, 1>());
    }
  }
  team.sync();

  float* pooled = shared.values;
  const float inv_hw = 1.0f / float(HW);
  const int each = portion(C, team.size, unit);
  for (int c = threadIdx.x; c < C; c += kThreads) {
    float sum = 0;
    if constexpr (CL) {
      for (int rank = 0; rank < team.size; ++rank) {
        sum += team.read(board.sums + c, rank);
      }
    } else {
      sum = team.read(board.sums + c, c / each);
    }
    pooled[c] = sum * inv_hw;
    if (c >= channels.first && c < channels.last) {
      op.pooled[n * C + c] = sum * inv_hw;
    }
  }
  __syncthreads();

  row_dots<kWarp>(op.w1, hidden_rows, C, pooled, [&](int r, float sum) {
    const float hidden = op.b1 ? sum + op.b1[r] : sum;
    board.hidden[r] = hidden;
    op.hidden[n * R + r] = hidden;
  });
  team.sync();

  for (int r = threadIdx.x; r < R; r += kThreads) {
    shared.active[r] = activate(team.read(board.hidden + r, r / portion(R, team.size, 1)), shape.act);
  }
  __syncthreads();

  // NCHW, a block needs the gates of its own channels and no others
  float* gates = shared.values;
  row_dots<8>(op.w2, channels, R, shared.active, [&](int c, float sum) {
    const float s = gate(op.b2 ? sum + op.b2[c] : sum, shape.gate_fn);
    (CL ? board.gates : gates)[c] = s;
    op.gate[n * C + c] = s;
  });
  if constexpr (CL) {
    team.sync();
    for (int c = threadIdx.x; c < C; c += kThreads) {
      gates[c] = team.read(board.gates + c, c / each);
    }
  }
  __syncthreads();

  write_slice(x, Sample<T>(op.out, n, shape.W), [&](int c) { return gates[c]; }, NoShift());
}

template <class T, int V, bool CL, class Team>
__device__ void backward_sample(const Backward& op, int64_t n, Team& team, const Shared<T, V>& shared, Board board) {
  const Shape& shape = op.shape;
  const int C = shape.C, R = shape.R, HW = int(shape.HW());
  const int unit = CL ? 1 : int(shape.vector());
  const Range channels = share(C, team.size, unit, team.rank);
  const Range range = CL ? share(HW, team.size, 1, team.rank) : channels;
  const Sample<T> x(op.x, n, shape.W);
  const Slice<T, V, CL, Team::on_chip> dout(Sample<T>(op.dout, n, shape.W), shared.slice, range, shape);
  const float* gates = op.gate + n * C;

  dout.arrive();
  if constexpr (CL) {
    sum_pixels<V>(range, C, shared.scratch, board.sums, [&](int p, int g, float(&values)[V]) {
      float factors[V];
      unpack<V, T>(load_last<V>(x.at(g * V, p)), factors);
      unpack<V, T>(dout.first_read(p, g), values);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        values[v] *= factors[v];
      }
    });
  } else {
    const auto sum_with = [&](auto width) {
      constexpr int W = decltype(width)::value;
      sum_rows(range, board.sums, [&](int c, int lane) {
        return lane_sum<W>(HW, lane, [&](int p) {
          float values[W], factors[W];
          unpack<W, T>(load_last<W>(x.at(c, p)), factors);
          unpack<W, T>(load<W>(dout.row(c, p)), values);
          float sum = 0;
#pragma unroll
          for (int v = 0; v < W; ++v) {
            sum += values[v] * factors[v];
          }
          return sum;
        });
      });
    };
    if (HW % V == 0) {
      sum_with(std::integral_constant<int, V>());
    } else {
      sum_with(std::integral_constant<int, 1>());
    }
  }
  if constexpr (CL) {
    team.sync();
  } else {
    __syncthreads();
  }

  float* dz = shared.values;
  for (int c = channels.first + int(threadIdx.x); c < channels.last; c += kThreads) {
    float ds = 0;
    if constexpr (CL) {
      for (int rank = 0; rank < team.size; ++rank) {
        ds += team.read(board.sums + c, rank);
      }
    } else {
      ds = board.sums[c];
    }
    dz[c] = gate_bwd(ds, gates[c], shape.gate_fn);
    op.dz[n * C + c] = dz[c];
  }
  __syncthreads();

  column_dots(op.w2, channels, {0, R}, R, dz, shared.scratch, [&](int r, float sum) { board.hidden[r] = sum; });
  team.sync();

  float* dhidden = shared.active;
  for (int r = threadIdx.x; r < R; r += kThreads) {
    float da = 0;
    for (int rank = 0; rank < team.size; ++rank) {
      da += team.read(board.hidden + r, rank);
    }
    dhidden[r] = activate_bwd(da, op.hidden[n * R + r], shape.act);
    if (team.rank == 0) {
      op.dhidden[n * R + r] = dhidden[r];
    }
  }
  if (op.dx.data == nullptr) {
    return;
  }
  __syncthreads();

  float* q = shared.values;
  const float inv_hw = 1.0f / float(HW);
  column_dots(op.w1, {0, R}, channels, C, dhidden, shared.scratch,
              [&](int c, float sum) { (CL ? board.gates : q)[c] = sum * inv_hw; });
  if constexpr (CL) {
    team.sync();
    const int each = portion(C, team.size, unit);
    for (int c = threadIdx.x; c < C; c += kThreads) {
      q[c] = team.read(board.gates + c, c / each);
    }
  }
  __syncthreads();

  write_slice(dout, Sample<T>(op.dx, n, shape.W), [&](int c) { return gates[c]; }, [&](int c) { return q[c]; });
}

// ---- kernels

// Calls sample(n, team, shared, board) for the block's part of every sample that it has a part in.
template <class T, int V, bool ON_CHIP, class Op, class F>
__device__ void for_each_sample(const Args<Op>& args, F sample) {
  const Shape& shape = args.op.shape;
  if constexpr (ON_CHIP) {
    const Shared<T, V> shared(slice_bytes(shape, args.team), shape);
    ChipTeam team{device::cluster_rank(), args.team};
    sample(int64_t(blockIdx.x) / args.team, team, shared, Board(shared.board, shape));
    if (team.size > 1) {
      device::cluster_sync();  // a block that has left takes its board along
    }
  } else {
    // Tickets are taken in the order of the samples by blocks that run, so that whoever a block waits for runs as well
    const Shared<T, V> shared(0, shape);
    for (;;) {
      if (threadIdx.x == 0) {
        *shared.ticket = device::take_ticket(args.counters);
      }
      __syncthreads();
      const int ticket = *shared.ticket;
      if (ticket >= shape.N * args.team) {
        return;
      }
      const int64_t n = ticket / args.team;
      GridTeam team{ticket % args.team, args.team, args.board_floats, args.counters + 1 + n};
      sample(n, team, shared, Board(args.board + ticket * args.board_floats, shape));
    }
  }
}

template <class T, int V, bool CL, bool ON_CHIP>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(const __grid_constant__ Args<Forward> args) {
  for_each_sample<T, V, ON_CHIP>(args, [&](int64_t n, auto& team, const Shared<T, V>& shared, Board board) {
    forward_sample<T, V, CL>(args.op, n, team, shared, board);
  });
}

template <class T, int V, bool CL, bool ON_CHIP>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(const __grid_constant__ Args<Backward> args) {
  for_each_sample<T, V, ON_CHIP>(args, [&](int64_t n, auto& team, const Shared<T, V>& shared, Board board) {
    backward_sample<T, V, CL>(args.op, n, team, shared, board);
  });
}

// A block makes kTile x kTile elements of dw, each thread kTile / kWarps of a column.
constexpr int kTile = 32;
__host__ __device__ inline int64_t weight_grad_shared_bytes() { return 4 * 2 * kTile * kTile; }

__global__ void __launch_bounds__(kThreads) weight_grad_kernel(const __grid_constant__ WeightGrad op) {
  float* tile_a = reinterpret_cast<float*>(device::shared_memory());  // (kTile samples, kTile of A)
  float* tile_b = tile_a + kTile * kTile;
  const int tiles_b = op.dw ? divide_up(op.B, kTile) : 1;
  const int first_a = int(blockIdx.x) / tiles_b * kTile, first_b = int(blockIdx.x) % tiles_b * kTile;
  const int column = int(threadIdx.x) % kTile, row = int(threadIdx.x) / kTile;
  constexpr int kRows = kTile / kWarps;
  float dw[kRows] = {}, db = 0;
  for (int64_t begin = 0; begin < op.N; begin += kTile) {
    for (int i = row; i < kTile; i += kWarps) {
      const int64_t n = begin + i;
      const bool in_a = n < op.N && first_a + column < op.A, in_b = op.dw && n < op.N && first_b + column < op.B;
      const float b = in_b ? op.b[n * op.B + first_b + column] : 0.0f;
      tile_a[i * kTile + column] = in_a ? op.a[n * op.A + first_a + column] : 0.0f;
      tile_b[i * kTile + column] = op.with_act && in_b ? activate(b, op.act) : b;
    }
    __syncthreads();
    for (int i = 0; i < kTile; ++i) {
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        dw[k] += tile_a[i * kTile + row * kRows + k] * tile_b[i * kTile + column];
      }
      db += tile_a[i * kTile + column];
    }
    __syncthreads();
  }
  if (op.dw && first_b + column < op.B) {
    for (int k = 0; k < kRows; ++k) {
      const int a = first_a + row * kRows + k;
      if (a < op.A) {
        op.dw[int64_t(a) * op.B + first_b + column] = dw[k];
      }
    }
  }
  if (op.db && first_b == 0 && row == 0 && first_a + column < op.A) {
    op.db[first_a + column] = db;
  }
}

}  // namespace se_cuda
