// kernels_C::se_fwd and kernels_C::se_bwd: what is accepted, what is allocated, registration. Mathematics in se.h.
#include <Python.h>
#include <torch/library.h>

#include <array>
#include <string>
#include <tuple>

#include "arguments.h"

namespace se {
namespace {

Shape check_arguments(const Tensor& x, const Tensor& w1, const Tensor& w2, int64_t act, int64_t gate_fn) {
  TORCH_CHECK_VALUE(x.dim() == 4, "se: x must have shape (N, C, H, W), got ", x.sizes());
  check_dtype("x", x);
  check_cpu("x", x);
  const int64_t C = x.size(1);
  TORCH_CHECK_VALUE(C > 0 && x.size(2) > 0 && x.size(3) > 0, "se: x must have C, H and W of at least 1, got shape ",
                    x.sizes());
  TORCH_CHECK_VALUE(w1.dim() == 2 && w1.size(0) > 0, "se: w1 must have shape (R, C) with R of at least 1, got ",
                    w1.sizes());
  const int64_t R = w1.size(0);
  check_weight("w1", w1, {R, C}, "(R, C)");
  check_weight("w2", w2, {C, R}, "(C, R)");
  TORCH_CHECK_VALUE(act >= 0 && act <= 2, "se: act must be 0 (relu), 1 (silu) or 2 (gelu), got ", act);
  TORCH_CHECK_VALUE(gate_fn >= 0 && gate_fn <= 1, "se: gate_fn must be 0 (sigmoid) or 1 (hardsigmoid), got ", gate_fn);
  return {x.size(0), C, x.size(2), x.size(3), R, true, Act(act), GateFn(gate_fn)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> se_fwd(const Tensor& x, const Tensor& w1, const optional<Tensor>& b1,
                                                  const Tensor& w2, const optional<Tensor>& b2, int64_t act,
                                                  int64_t gate_fn) {
  const at::AutoDispatchBelowAutograd below_autograd;
  Shape shape = check_arguments(x, w1, w2, act, gate_fn);
  if (b1) {
    check_weight("b1", *b1, {shape.R}, "(R,)");
  }
  if (b2) {
    check_weight("b2", *b2, {shape.C}, "(C,)");
  }
  const Tensor out = at::empty_like(x);
  const auto layout = common_layout({x, out});
  if (!layout) {
    // The one hidden copy: of an x in which neither a pixel's channels nor a row's pixels lie side by side.
    const auto [dense, pooled, hidden, gate] = se_fwd(x.contiguous(), w1, b1, w2, b2, act, gate_fn);
    return {out.copy_(dense), pooled, hidden, gate};
  }
  shape.channels_last = *layout;
  const auto dtype = acc_dtype(x);
  const auto acc_options = x.options().dtype(dtype);
  const Tensor pooled = at::empty({shape.N, shape.C}, acc_options);
  const Tensor hidden = at::empty({shape.N, shape.R}, acc_options);
  const Tensor gate = at::empty({shape.N, shape.C}, acc_options);
  if (shape.N == 0) {
    return {out, pooled, hidden, gate};
  }
  const Tensor active = at::empty_like(hidden);
  const auto w_dtype = weight_dtype(x, w1, w2);
  const Tensor w1_rows = as_rows(w1, w_dtype), w2_rows = as_rows(w2, w_dtype);
  const Tensor b1_rows = as_rows(b1, dtype), b2_rows = as_rows(b2, dtype);
  dispatch(x, w_dtype, [&](auto x_zero, auto w_zero) {
    using T = decltype(x_zero);
    using W = decltype(w_zero);
    using A = acc_t<T>;
    Forward<T, W> args;
    args.x = activation<const T>(x);
    args.w1 = read<W>(w1_rows);
    args.b1 = read<A>(b1_rows);
    args.w2 = read<W>(w2_rows);
    args.b2 = read<A>(b2_rows);
    args.out = activation<T>(out);
    args.pooled = write<A>(pooled);
    args.hidden = write<A>(hidden);
    args.active = write<A>(active);
    args.gate = write<A>(gate);
    forward(shape, args);
  });
  return {out, pooled, hidden, gate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> se_bwd(const Tensor& dout_in, const Tensor& x, const Tensor& w1,
                                                          const Tensor& w2, const Tensor& pooled, const Tensor& hidden,
                                                          const Tensor& gate, int64_t act, int64_t gate_fn,
                                                          std::array<bool, 5> output_mask) {
  const at::AutoDispatchBelowAutograd below_autograd;
  Shape shape = check_arguments(x, w1, w2, act, gate_fn);
  const auto dtype = acc_dtype(x);
  check_tensor("dout", dout_in, x.sizes(), "(N, C, H, W)", x.scalar_type());
  check_tensor("pooled", pooled, {shape.N, shape.C}, "(N, C)", dtype);
  check_tensor("hidden", hidden, {shape.N, shape.R}, "(N, R)", dtype);
  check_tensor("gate", gate, {shape.N, shape.C}, "(N, C)", dtype);
  const auto [want_dx, want_dw1, want_db1, want_dw2, want_db2] = output_mask;

  const Tensor dx = want_dx ? at::empty_like(x) : at::empty({0}, x.options());
  const auto layout = want_dx ? common_layout({x, dx}) : common_layout({x});
  if (!layout) {
    // As in the forward pass.
    auto grads = se_bwd(dout_in, x.contiguous(), w1, w2, pooled, hidden, gate, act, gate_fn, output_mask);
    if (want_dx) {
      std::get<0>(grads) = dx.copy_(std::get<0>(grads));
    }
    return grads;
  }
  shape.channels_last = *layout;

  // A dout that is expanded, or in the other memory format, is brought to x's.
  const Tensor dout =
      has_unit_stride(dout_in, shape.channels_last)
          ? dout_in
          : dout_in.contiguous(shape.channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  const auto w_dtype = weight_dtype(x, w1, w2);
  const auto gradient = [&](bool wanted, at::IntArrayRef sizes) {
    return at::empty(wanted ? sizes : at::IntArrayRef{0}, x.options().dtype(w_dtype));
  };
  const Tensor dw1 = gradient(want_dw1, {shape.R, shape.C}), db1 = gradient(want_db1, {shape.R});
  const Tensor dw2 = gradient(want_dw2, {shape.C, shape.R}), db2 = gradient(want_db2, {shape.C});
  const auto scratch = [&](bool wanted, int64_t columns) {
    return wanted ? at::empty({shape.N, columns}, x.options().dtype(dtype)) : Tensor();
  };
  const Tensor active = scratch(want_dw2, shape.R), dz = scratch(true, shape.C);
  const Tensor dh = scratch(want_dx || want_dw1 || want_db1, shape.R), q = scratch(want_dx, shape.C);
  const Tensor w1_rows = as_rows(w1, w_dtype), w2_rows = as_rows(w2, w_dtype);
  const Tensor pooled_rows = pooled.contiguous(), hidden_rows = hidden.contiguous(), gate_rows = gate.contiguous();
  dispatch(x, w_dtype, [&](auto x_zero, auto w_zero) {
    using T = decltype(x_zero);
    using W = decltype(w_zero);
    using A = acc_t<T>;
    Backward<T, W> args;
    args.dout = activation<const T>(dout);
    args.x = activation<const T>(x);
    args.w1 = read<W>(w1_rows);
    args.w2 = read<W>(w2_rows);
    args.pooled = read<A>(pooled_rows);
    args.hidden = read<A>(hidden_rows);
    args.gate = read<A>(gate_rows);
    args.active = write<A>(active);
    args.dz = write<A>(dz);
    args.dh = write<A>(dh);
    args.q = write<A>(q);
    args.dx = want_dx ? activation<T>(dx) : Activation<T>{nullptr, x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
    args.dw1 = want_dw1 ? write<W>(dw1) : nullptr;
    args.db1 = want_db1 ? write<W>(db1) : nullptr;
    args.dw2 = want_dw2 ? write<W>(dw2) : nullptr;
    args.db2 = want_db2 ? write<W>(db2) : nullptr;
    backward(shape, args);
  });
  const auto w1_dtype = w1.scalar_type(), w2_dtype = w2.scalar_type();
  return {dx, dw1.to(w1_dtype), db1.to(w1_dtype), dw2.to(w2_dtype), db2.to(w2_dtype)};
}

TORCH_LIBRARY(kernels_C, m) {
  m.def(
      "se_fwd(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, int act, int gate_fn)"
      " -> (Tensor out, Tensor pooled, Tensor hidden, Tensor gate)");
  m.def(
      "se_bwd(Tensor dout, Tensor x, Tensor w1, Tensor w2, Tensor pooled, Tensor hidden, Tensor gate,"
      " int act, int gate_fn, bool[5] output_mask)"
      " -> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2)");
  m.def("instruction_set() -> str", [] { return std::string(instruction_set()); });
}

TORCH_LIBRARY_IMPL(kernels_C, CPU, m) {
  m.impl("se_fwd", se_fwd);
  m.impl("se_bwd", se_bwd);
}

}  // namespace
}  // namespace se

// Importing kernels._C loads the library, which registers the operators; the module itself is empty.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
