// The kernels of se_cuda.h. Read from the bottom: `forward_kernel` and `backward_kernel` say who works on what,
// `forward_sample` and `backward_sample` what is done, the included files how.
//
// T is the activation's type, V the elements of an access (16 bytes' worth, or 1), CL channels-last. A block has
// kThreads threads; `team` is a ChipTeam or a GridTeam. Sums are float32, in an order that depends on the plan alone.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda_device.cuh"
#include "se_cuda.h"
#include "se_cuda_slice.cuh"
#include "se_cuda_sums.cuh"
#include "se_cuda_team.cuh"
#include "se_cuda_values.cuh"

namespace se_cuda {

template <class Op>
struct Args {
  Op op;
  int team;
  int64_t board_floats;  // of one block, in the grid
  float* board;
  int* counters;
};

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
    sum_rows<V>(range, HW, board.sums, [&](int c, int p, auto& values) {
      constexpr int W = std::extent_v<std::remove_reference_t<decltype(values)>>;
      unpack<W, T>(load<W>(x.row(c, p)), values);
    });
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
      unpack<V, T>(load_last<V>(x.at(g * V, p)), values);
      multiply<V, T>(values, dout.first_read(p, g));
    });
  } else {
    sum_rows<V>(range, HW, board.sums, [&](int c, int p, auto& values) {
      constexpr int W = std::extent_v<std::remove_reference_t<decltype(values)>>;
      unpack<W, T>(load_last<W>(x.at(c, p)), values);
      multiply<W, T>(values, load<W>(dout.row(c, p)));
    });
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
