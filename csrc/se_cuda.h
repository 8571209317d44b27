// Squeeze-and-Excitation on NVIDIA GPUs: parameters, plans, launchers. Mathematics in se.h, kernels in se_cuda.cuh.
//
// A *team* of thread blocks works on one sample, each block on a slice of it: a run of pixels (channels-last) or of
// channels (NCHW). Forward, a block sums its slice, tells its sums to the team, computes its share of the two small
// products, and scales its slice; backward likewise. There are two kinds of team:
//
//   on the chip   the blocks of one thread-block cluster (or a single block). The slice stays in shared memory between
//                 the two passes, so x is read once forward (2 units of traffic: read x, write out) and dout once
//                 backward (3: read dout, read x, write dx). Sums go through distributed shared memory.
//   in the grid   blocks of a persistent grid, in ticket order, with global counters as barriers. The slice is read
//                 again (3 and 4 units), from L2: a team is only as small as keeps what the resident blocks hold there.
//
// No torch header is needed here: raw pointers, strides in elements, float32 weights.
#pragma once

#include <cstdint>
#include <initializer_list>

#ifdef __CUDACC__
#define SE_HOST_DEVICE __host__ __device__
#else
#define SE_HOST_DEVICE
#endif

namespace se_cuda {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };
enum class Act : int { relu = 0, silu = 1, gelu = 2 };
enum class GateFn : int { sigmoid = 0, hardsigmoid = 1 };

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;
constexpr int kMaxTeam = 16;  // blocks of a cluster on Hopper and Blackwell, beyond the portable 8

// An activation (N, C, H, W): element (n, c, h, w) is n * n_stride + c * c_stride + h * h_stride + w * w_stride
// elements from data. `flat`: the rows follow one another, so that pixel p of HW is at p * w_stride.
struct View {
  void* data;
  int64_t n_stride, c_stride, h_stride, w_stride;
  bool flat;
};

struct Shape {
  int64_t N;
  int C, H, W, R;
  DType dtype;
  Act act;
  GateFn gate_fn;
  bool channels_last;  // whether neighbouring threads take neighbouring channels, or neighbouring pixels

  SE_HOST_DEVICE int64_t HW() const { return int64_t(H) * W; }
  SE_HOST_DEVICE int64_t element_bytes() const { return dtype == DType::float32 ? 4 : 2; }
  SE_HOST_DEVICE int64_t vector() const { return kVectorBytes / element_bytes(); }  // elements of a 16-byte access
};

struct Forward {
  Shape shape;
  View x, out;
  const float *w1, *b1, *w2, *b2;  // (R, C), (R) or null, (C, R), (C) or null
  float *pooled, *hidden, *gate;   // (N, C), (N, R), (N, C)
};

struct Backward {
  Shape shape;
  View dout, x, dx;           // dx.data is null where it is not asked for
  const float *w1, *w2;       // (R, C), (C, R)
  const float *hidden, *gate;  // (N, R), (N, C)
  float *dz, *dhidden;        // (N, C), (N, R)
};

// dw (A, B) = a^T act(b) and db (A) = sum_n a, for a (N, A) and b (N, B); dw or db may be null.
struct WeightGrad {
  int64_t N;
  int A, B;
  bool with_act;
  Act act;
  const float *a, *b;
  float *dw, *db;
};

// What a device offers, for `plan`.
struct Limits {
  int multiprocessors;
  int64_t shared_per_block, shared_per_multiprocessor;  // bytes
  int64_t l2;                                           // bytes
  int cluster;                                          // blocks of the largest cluster; 1 where there are none
};

struct Plan {
  bool on_chip;
  int vector;      // elements that an access takes: 16 bytes' worth, or 1 where a view does not allow that
  int team;        // blocks that share a sample
  int64_t shared;  // bytes of shared memory of a block
  int64_t board;   // floats of global memory through which a block in the grid talks to its team about a sample
};

// The plan for a pass over `views` (those without data are left out), of which the first is read twice. On the chip
// wherever samples lie without a gap, from 16-byte boundaries on, and fit into the shared memory of a cluster. Throws
// std::invalid_argument where the channels are too many for a block's shared memory.
Plan plan(const Shape& shape, const Limits& limits, std::initializer_list<View> views);

// Of the current device. Throws std::runtime_error, as the launchers do, where CUDA reports an error.
Limits device_limits();

// Where !plan.on_chip, `board` has N * plan.team * plan.board floats and `counters` 1 + N ints, all zero.
// `stream` is a cudaStream_t of the current device.
void forward(const Forward& args, const Plan& plan, float* board, int* counters, void* stream);
void backward(const Backward& args, const Plan& plan, float* board, int* counters, void* stream);
void weight_grad(const WeightGrad& args, void* stream);

}  // namespace se_cuda
