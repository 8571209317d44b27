// kernels_C::se_cuda_fwd and se_cuda_bwd: what se_cuda.h computes, on torch's tensors.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <tuple>

#include "se_cuda.h"

#ifdef WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

// Tests build this file a second time, over kernels that run on the CPU.
#ifndef SE_CUDA_LIBRARY
#define SE_CUDA_LIBRARY kernels_C
#endif

namespace se_cuda {
namespace {

using at::Tensor;
using std::optional;

// Makes x's device the current one, and names its current stream.
#ifdef WITH_CUDA
struct OnDevice {
  explicit OnDevice(const Tensor& x) : guard(x.device()), stream(c10::cuda::getCurrentCUDAStream().stream()) {}
  c10::cuda::CUDAGuard guard;
  void* stream;
};
#else
struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  void* stream = nullptr;
};
#endif

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return DType::float32;
    case at::kBFloat16:
      return DType::bfloat16;
    case at::kHalf:
      return DType::float16;
    default:
      TORCH_CHECK_VALUE(false, "se: x must be float32, bfloat16 or float16, got ", x.scalar_type());
  }
}

Shape shape_of(const Tensor& x, const Tensor& w1, const Tensor& w2, int64_t act, int64_t gate_fn) {
  TORCH_CHECK_VALUE(x.dim() == 4 && w1.dim() == 2, "se: x must be (N, C, H, W) and w1 (R, C), got ", x.sizes(), " and ",
                    w1.sizes());
  const int64_t C = x.size(1), H = x.size(2), W = x.size(3), R = w1.size(0);
  TORCH_CHECK_VALUE(w1.size(1) == C && w2.sizes() == at::IntArrayRef({C, R}),
                    "se: w1 must be (R, C) and w2 (C, R), got ", w1.sizes(), " and ", w2.sizes());
  TORCH_CHECK_VALUE(std::min({C, H, W, R}) > 0 && std::max({C, H * W, R}) < int64_t(1) << 30,
                    "se: C, H * W and R must be at least 1 and below 2**30, got x ", x.sizes(), " and R = ", R);
  TORCH_CHECK_VALUE(act >= 0 && act <= 2, "se: act must be 0 (relu), 1 (silu) or 2 (gelu), got ", act);
  TORCH_CHECK_VALUE(gate_fn >= 0 && gate_fn <= 1, "se: gate_fn must be 0 (sigmoid) or 1 (hardsigmoid), got ", gate_fn);
  const bool channels_last = C > 1 && x.stride(1) == 1;
  return {x.size(0), int(C), int(H), int(W), int(R), dtype_of(x), Act(act), GateFn(gate_fn), channels_last};
}

View view_of(const Shape& shape, const Tensor& x) {
  const int64_t C = shape.C, HW = shape.HW();
  View view = {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2), x.stride(3), true};
  view.flat = shape.H == 1 || shape.W == 1 || view.h_stride == shape.W * view.w_stride;
  // A dimension of size 1 may have any stride, and is given the one that a dense tensor has.
  if (shape.W == 1) {
    view.w_stride = view.h_stride;
  }
  if (HW == 1) {
    view.w_stride = shape.channels_last ? C : 1;
  }
  if (view.flat) {
    view.h_stride = shape.W * view.w_stride;
  }
  if (C == 1) {
    view.c_stride = shape.channels_last ? 1 : HW;
  }
  if (shape.N == 1) {
    view.n_stride = C * HW;
  }
  return view;
}

void check_tensor(const char* name, const Tensor& t, at::IntArrayRef sizes, at::ScalarType dtype, at::Device device) {
  TORCH_CHECK_VALUE(t.sizes() == sizes && t.scalar_type() == dtype && t.device() == device, "se: ", name, " must be ",
                    dtype, " of shape ", sizes, " on ", device, ", got ", t.scalar_type(), " of shape ", t.sizes(),
                    " on ", t.device());
}

Tensor as_floats(const Tensor& t) { return t.to(at::kFloat).contiguous(); }

Tensor as_floats(const char* name, const optional<Tensor>& bias, int64_t size) {
  if (!bias) {
    return Tensor();
  }
  TORCH_CHECK_VALUE(bias->sizes() == at::IntArrayRef({size}), "se: ", name, " must have shape ", size, ", got ",
                    bias->sizes());
  return as_floats(*bias);
}

const float* floats(const Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }

// The plan, and the global memory that it asks for.
struct Work {
  Plan plan;
  Tensor board, counters;

  Work(const Shape& shape, const Tensor& x, std::initializer_list<View> views) : plan(make_plan(shape, views)) {
    if (!plan.on_chip) {
      board = at::empty({shape.N * plan.team * plan.board}, x.options().dtype(at::kFloat));
      counters = at::zeros({1 + shape.N}, x.options().dtype(at::kInt));
    }
  }
  float* board_data() const { return board.defined() ? board.mutable_data_ptr<float>() : nullptr; }
  int* counters_data() const { return counters.defined() ? counters.mutable_data_ptr<int>() : nullptr; }

 private:
  static Plan make_plan(const Shape& shape, std::initializer_list<View> views) {
    try {
      return se_cuda::plan(shape, device_limits(), views);
    } catch (const std::invalid_argument& error) {
      TORCH_CHECK_VALUE(false, error.what());
    }
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> se_cuda_fwd(const Tensor& x, const Tensor& w1, const optional<Tensor>& b1,
                                                       const Tensor& w2, const optional<Tensor>& b2, int64_t act,
                                                       int64_t gate_fn) {
  const at::AutoDispatchBelowAutograd below_autograd;
  const Shape shape = shape_of(x, w1, w2, act, gate_fn);
  const OnDevice on(x);
  const auto options = x.options().dtype(at::kFloat);
  const Tensor out = at::empty_like(x);
  const Tensor pooled = at::empty({shape.N, shape.C}, options), hidden = at::empty({shape.N, shape.R}, options);
  const Tensor gate = at::empty({shape.N, shape.C}, options);
  if (shape.N > 0) {
    const Tensor w1_floats = as_floats(w1), b1_floats = as_floats("b1", b1, shape.R);
    const Tensor w2_floats = as_floats(w2), b2_floats = as_floats("b2", b2, shape.C);
    const View x_view = view_of(shape, x), out_view = view_of(shape, out);
    const Work work(shape, x, {x_view, out_view});
    const Forward args = {shape,
                          x_view,
                          out_view,
                          floats(w1_floats),
                          floats(b1_floats),
                          floats(w2_floats),
                          floats(b2_floats),
                          pooled.mutable_data_ptr<float>(),
                          hidden.mutable_data_ptr<float>(),
                          gate.mutable_data_ptr<float>()};
    forward(args, work.plan, work.board_data(), work.counters_data(), on.stream);
  }
  return {out, pooled, hidden, gate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> se_cuda_bwd(const Tensor& dout, const Tensor& x, const Tensor& w1,
                                                               const Tensor& w2, const Tensor& pooled,
                                                               const Tensor& hidden, const Tensor& gate, int64_t act,
                                                               int64_t gate_fn, std::array<bool, 5> output_mask) {
  const at::AutoDispatchBelowAutograd below_autograd;
  const Shape shape = shape_of(x, w1, w2, act, gate_fn);
  const auto [N, C, R] = std::tuple(shape.N, shape.C, shape.R);
  check_tensor("dout", dout, x.sizes(), x.scalar_type(), x.device());
  check_tensor("pooled", pooled, {N, C}, at::kFloat, x.device());
  check_tensor("hidden", hidden, {N, R}, at::kFloat, x.device());
  check_tensor("gate", gate, {N, C}, at::kFloat, x.device());
  const auto [with_dx, with_dw1, with_db1, with_dw2, with_db2] = output_mask;
  const OnDevice on(x);
  const auto options = x.options().dtype(at::kFloat);
  const Tensor dx = with_dx ? at::empty_like(x) : at::empty({0}, x.options());
  const auto gradient = [&](bool wanted, at::IntArrayRef sizes) {
    return at::zeros(wanted && N == 0 ? sizes : at::IntArrayRef{0}, options);
  };
  Tensor dw1 = gradient(with_dw1, {R, C}), db1 = gradient(with_db1, {R});
  Tensor dw2 = gradient(with_dw2, {C, R}), db2 = gradient(with_db2, {C});
  if (N > 0) {
    const Tensor w1_floats = as_floats(w1), w2_floats = as_floats(w2);
    const Tensor pooled_rows = pooled.contiguous(), hidden_rows = hidden.contiguous(), gate_rows = gate.contiguous();
    const Tensor dz = at::empty({N, C}, options), dhidden = at::empty({N, R}, options);
    const View dout_view = view_of(shape, dout), x_view = view_of(shape, x);
    const View dx_view = with_dx ? view_of(shape, dx) : View{};
    const Work work(shape, x, {dout_view, x_view, dx_view});
    const Backward args = {shape,
                           dout_view,
                           x_view,
                           dx_view,
                           floats(w1_floats),
                           floats(w2_floats),
                           floats(hidden_rows),
                           floats(gate_rows),
                           dz.mutable_data_ptr<float>(),
                           dhidden.mutable_data_ptr<float>()};
    backward(args, work.plan, work.board_data(), work.counters_data(), on.stream);

    const auto weight_grads = [&](const Tensor& a, const Tensor& b, bool with_act, bool with_dw, bool with_db,
                                  Tensor& dw, Tensor& db) {
      if (!with_dw && !with_db) {
        return;
      }
      const int64_t A = a.size(1), B = b.size(1);
      dw = at::empty(with_dw ? at::IntArrayRef{A, B} : at::IntArrayRef{0}, options);
      db = at::empty(with_db ? at::IntArrayRef{A} : at::IntArrayRef{0}, options);
      weight_grad({N, int(A), int(B), with_act, shape.act, floats(a), floats(b),
                   with_dw ? dw.mutable_data_ptr<float>() : nullptr, with_db ? db.mutable_data_ptr<float>() : nullptr},
                  on.stream);
    };
    weight_grads(dz, hidden_rows, true, with_dw2, with_db2, dw2, db2);
    weight_grads(dhidden, pooled_rows, false, with_dw1, with_db1, dw1, db1);
  }
  const auto w1_dtype = w1.scalar_type(), w2_dtype = w2.scalar_type();
  return {dx, dw1.to(w1_dtype), db1.to(w1_dtype), dw2.to(w2_dtype), db2.to(w2_dtype)};
}

TORCH_LIBRARY_FRAGMENT(SE_CUDA_LIBRARY, m) {
  m.def(
      "se_cuda_fwd(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, int act, int gate_fn)"
      " -> (Tensor out, Tensor pooled, Tensor hidden, Tensor gate)",
      se_cuda_fwd);
  m.def(
      "se_cuda_bwd(Tensor dout, Tensor x, Tensor w1, Tensor w2, Tensor pooled, Tensor hidden, Tensor gate,"
      " int act, int gate_fn, bool[5] output_mask)"
      " -> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2)",
      se_cuda_bwd);
}

}  // namespace
}  // namespace se_cuda
