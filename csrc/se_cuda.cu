// Plans and launches. Nothing here depends on torch.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "se_cuda.cuh"
#include "se_cuda.h"

namespace se_cuda {
namespace {

// Of a multiprocessor's shared memory, taken by the system for each block
constexpr int64_t kReserved = 1024;
// Blocks of the persistent grid on a multiprocessor
constexpr int kResident = 2;
// A slice smaller than this is not worth another block
constexpr int64_t kSmallSlice = 16 << 10;

template <class T, int V, bool CL, bool ON_CHIP, class Op>
void launch(const Op& op, const Plan& plan, float* board, int* counters, void* stream) {
  auto* const kernel = [] {
    if constexpr (std::is_same_v<Op, Forward>) {
      return forward_kernel<T, V, CL, ON_CHIP>;
    } else {
      return backward_kernel<T, V, CL, ON_CHIP>;
    }
  }();
  const Args<Op> args{op, plan.team, plan.board, board, counters};
  int64_t blocks = op.shape.N * plan.team;
  if (blocks > INT32_MAX / 2) {
    throw std::invalid_argument("se: a batch of " + std::to_string(op.shape.N) + " is too large for one call; cut it");
  }
  if constexpr (!ON_CHIP) {
    const int multiprocessors = device_limits().multiprocessors;
    const int resident = device::resident_blocks(kernel, plan.shared, multiprocessors);
    blocks = std::min<int64_t>({blocks, resident, int64_t(kResident) * multiprocessors});
  }
  device::launch(kernel, blocks, ON_CHIP ? plan.team : 1, plan.shared, stream, args);
}

template <class T, class Op>
void launch(const Op& op, const Plan& plan, float* board, int* counters, void* stream) {
  constexpr int kVector = kVectorBytes / sizeof(T);
  const bool vectors = plan.vector > 1;
  if (op.shape.channels_last) {
    (plan.on_chip ? launch<T, kVector, true, true, Op>
     : vectors    ? launch<T, kVector, true, false, Op>
                  : launch<T, 1, true, false, Op>)(op, plan, board, counters, stream);
  } else {
    (plan.on_chip ? launch<T, kVector, false, true, Op>
     : vectors    ? launch<T, kVector, false, false, Op>
                  : launch<T, 1, false, false, Op>)(op, plan, board, counters, stream);
  }
}

template <class Op>
void launch(const Op& op, const Plan& plan, float* board, int* counters, void* stream) {
  switch (op.shape.dtype) {
    case DType::float32:
      return launch<float>(op, plan, board, counters, stream);
    case DType::bfloat16:
      return launch<device::bfloat16>(op, plan, board, counters, stream);
    case DType::float16:
      return launch<device::float16>(op, plan, board, counters, stream);
  }
}

bool whole_vectors(const Shape& shape, const View& view, std::initializer_list<int64_t> counts) {
  return reinterpret_cast<uintptr_t>(view.data) % kVectorBytes == 0 &&
         std::all_of(counts.begin(), counts.end(), [&](int64_t count) { return count % shape.vector() == 0; });
}

// Whether a sample is one run of 16-byte vectors, and in channels-last every pixel is.
bool dense(const Shape& shape, const View& view) {
  const int64_t C = shape.C, HW = shape.HW();
  return view.flat && view.c_stride == (shape.channels_last ? 1 : HW) &&
         view.w_stride == (shape.channels_last ? C : 1) &&
         whole_vectors(shape, view, {view.n_stride, shape.channels_last ? C : C * HW});
}

// Whether every pixel (channels-last) or every channel (NCHW) is a run of 16-byte vectors.
bool aligned(const Shape& shape, const View& view) {
  if (shape.channels_last) {
    return view.c_stride == 1 &&
           whole_vectors(shape, view, {view.n_stride, view.h_stride, view.w_stride, int64_t(shape.C)});
  }
  return view.flat && view.w_stride == 1 && whole_vectors(shape, view, {view.n_stride, view.c_stride, shape.HW()});
}

}  // namespace

Plan plan(const Shape& shape, const Limits& limits, std::initializer_list<View> views) {
  const auto all = [&](auto property) {
    return std::all_of(views.begin(), views.end(),
                       [&](const View& view) { return view.data == nullptr || property(shape, view); });
  };
  const int vector = int(shape.vector());
  const bool on_chip = all(dense);
  const int largest = std::min(limits.cluster, kMaxTeam);
  // Two blocks a multiprocessor, so that one loads or stores while the other waits for its team; else one.
  const int64_t half = limits.shared_per_multiprocessor / 2 - kReserved;
  for (const int64_t room : {std::min(half, limits.shared_per_block), limits.shared_per_block}) {
    for (int team = 1; on_chip && team <= largest; team *= 2) {
      if (shared_bytes(shape, vector, slice_bytes(shape, team)) > room) {
        continue;
      }
      while (team * 2 <= largest && shape.N * team < limits.multiprocessors && slice_bytes(shape, team) > kSmallSlice) {
        team *= 2;
      }
      return {true, vector, team, shared_bytes(shape, vector, slice_bytes(shape, team)), 0};
    }
  }
  const int accesses = all(aligned) ? vector : 1;
  const int64_t shared = shared_bytes(shape, accesses, 0);
  if (shared > limits.shared_per_block) {
    throw std::invalid_argument("se: " + std::to_string(shape.C) + " channels with " + std::to_string(shape.R) +
                                " squeezed ones need " + std::to_string(shared) +
                                " bytes of shared memory, and a block of this GPU has " +
                                std::to_string(limits.shared_per_block) + "; use backend='triton'");
  }
  // Small enough slices for the second read to find the first in L2, of which streams that pass take their part too.
  const int64_t resident = int64_t(kResident) * limits.multiprocessors;
  const int64_t sample = shape.HW() * shape.C * shape.element_bytes();
  int team = 1;
  while (team < kMaxTeam && team * 2 <= resident && (resident * divide_up(sample, team) > limits.l2 / 2 ||
                             (shape.N * team < resident && sample / team > kSmallSlice))) {
    team *= 2;
  }
  return {false, accesses, team, shared, board_floats(shape)};
}

Limits device_limits() {
  return device::limits([](int cluster, int64_t shared) {
    return device::clusters_fit(forward_kernel<float, 4, true, true>, cluster, shared);
  });
}

void forward(const Forward& args, const Plan& plan, float* board, int* counters, void* stream) {
  launch(args, plan, board, counters, stream);
}

void backward(const Backward& args, const Plan& plan, float* board, int* counters, void* stream) {
  launch(args, plan, board, counters, stream);
}

void weight_grad(const WeightGrad& args, void* stream) {
  const int64_t tiles = int64_t(divide_up(args.A, kTile)) * (args.dw ? divide_up(args.B, kTile) : 1);
  device::launch(weight_grad_kernel, tiles, 1, weight_grad_shared_bytes(), stream, args);
}

}  // namespace se_cuda
