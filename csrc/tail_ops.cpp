// kernels_C::tail_*: what is allocated, registration. Mathematics in kernels/residual_tail.py, which checks what users
// give; here is checked what memory safety rests on.
#include <torch/library.h>

#include <array>
#include <tuple>

#include "tail_arguments.h"

namespace se {
namespace {

// A BatchNorm as the caller gives it.
struct NormTensors {
  optional<Tensor> weight, bias, mean, var, stats;
  double eps;
};

// The statistics (ROWS, C): given, or made of the running ones, or left to be filled.
Tensor statistics(const NormTensors& norm, const Tensor& y) {
  const auto options = y.options().dtype(acc_dtype(y));
  const int64_t C = y.size(1);
  if (norm.stats) {
    check_tensor("stats", *norm.stats, {kRows, C}, "(5, C)", acc_dtype(y));
    return norm.stats->clone(at::MemoryFormat::Contiguous);
  }
  const Tensor stats = at::empty({kRows, C}, options);
  if (!norm.mean || !norm.var) {
    return stats;
  }
  for (const auto& [name, t] : {std::pair("mean", norm.mean), {"var", norm.var}, {"weight", norm.weight},
                                {"bias", norm.bias}}) {
    if (t) {
      check_weight(name, *t, {C}, "(C,)");
    }
  }
  const Tensor mean = as_rows(norm.mean, acc_dtype(y)), var = as_rows(norm.var, acc_dtype(y));
  const Tensor weight = as_rows(norm.weight, acc_dtype(y)), bias = as_rows(norm.bias, acc_dtype(y));
  AT_DISPATCH_FLOATING_TYPES(stats.scalar_type(), "statistics", [&] {
    auto* rows = stats.mutable_data_ptr<scalar_t>();
    const auto *means = read<scalar_t>(mean), *vars = read<scalar_t>(var);
    const auto *weights = read<scalar_t>(weight), *biases = read<scalar_t>(bias);
    for (int64_t c = 0; c < C; ++c) {
      const double invstd = 1 / std::sqrt(vars[c] + norm.eps);
      rows[kRowMean * C + c] = means[c];
      rows[kRowInvstd * C + c] = static_cast<scalar_t>(invstd);
      rows[kRowScale * C + c] = static_cast<scalar_t>(weights ? invstd * weights[c] : invstd);
      rows[kRowShift * C + c] = biases ? biases[c] : 0;
      rows[kRowUnbiasedVar * C + c] = vars[c];
    }
  });
  return stats;
}

template <class A>
NormArgs<A> norm_args(const NormTensors& norm, const Tensor& stats, const Tensor& weight, const Tensor& bias) {
  const bool batch = !norm.stats && (!norm.mean || !norm.var);
  return {write<A>(stats), batch, read<A>(weight), read<A>(bias), norm.eps};
}

std::tuple<Tensor, Tensor, Tensor> tail_moments_op(const Tensor& x_in, bool by_sample) {
  const at::AutoDispatchBelowAutograd below_autograd;
  TailShape shape = make_shape(x_in, 0, 0, 0, 0, Shortcut::none);
  const Tensor x = in_layout(x_in, shape.channels_last);
  const auto options = x.options().dtype(at::kDouble);
  const Tensor mean = at::empty({shape.C}, options), m2 = at::empty({shape.C}, options);
  const Tensor sample_mean = by_sample ? at::empty({shape.N, shape.C}, options) : at::empty({0}, options);
  dispatch(x, x.scalar_type(), [&](auto zero, auto) {
    using T = decltype(zero);
    TailMoments<T> args;
    args.x = activation<const T>(x);
    args.mean = write<double>(mean);
    args.m2 = write<double>(m2);
    args.sample_mean = by_sample ? write<double>(sample_mean) : nullptr;
    tail_moments(shape, args);
  });
  return {mean, m2, sample_mean};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> tail_fwd(
    const Tensor& y_in, const optional<Tensor>& residual_in, const optional<Tensor>& weight,
    const optional<Tensor>& bias, const optional<Tensor>& w1, const optional<Tensor>& b1, const optional<Tensor>& w2,
    const optional<Tensor>& b2, const optional<Tensor>& weight2, const optional<Tensor>& bias2,
    const optional<Tensor>& mean, const optional<Tensor>& var, const optional<Tensor>& mean2,
    const optional<Tensor>& var2, const optional<Tensor>& stats_in, const optional<Tensor>& stats2_in,
    const optional<Tensor>& sample_mean_in, double eps, double eps2, bool residual_norm, int64_t act, int64_t se_act,
    int64_t gate_fn) {
  const at::AutoDispatchBelowAutograd below_autograd;
  const auto shortcut = !residual_in ? Shortcut::none : residual_norm ? Shortcut::normed : Shortcut::plain;
  const int64_t R = squeezed(w1, w2, y_in.size(1));
  const TailShape shape = make_shape(y_in, R, act, se_act, gate_fn, shortcut);
  const auto dtype = acc_dtype(y_in);
  const auto options = y_in.options().dtype(dtype);
  const Tensor y = in_layout(y_in, shape.channels_last);
  const Tensor residual = like_y("residual", residual_in, y, shape.channels_last);
  const Tensor out = at::empty_like(y, y.options(), format(shape.channels_last));
  const bool masked = shape.tail_act == TailAct::relu && shortcut != Shortcut::none;
  const Tensor mask = at::empty(masked ? mask_shape(shape) : at::DimVector{0}, y.options().dtype(at::kByte));
  const NormTensors norm{weight, bias, mean, var, stats_in, eps}, norm2{weight2, bias2, mean2, var2, stats2_in, eps2};
  const Tensor stats = statistics(norm, y);
  const Tensor stats2 = shortcut == Shortcut::normed ? statistics(norm2, y) : at::empty({0}, options);
  const Tensor norm_weight = as_rows(weight, dtype), norm_bias = as_rows(bias, dtype);
  const Tensor norm2_weight = as_rows(weight2, dtype), norm2_bias = as_rows(bias2, dtype);
  const auto with_se = [&](int64_t columns) {
    return R > 0 ? at::empty({shape.N, columns}, options) : at::empty({0}, options);
  };
  const Tensor deviation = with_se(shape.C), pooled = with_se(shape.C), hidden = with_se(R), gate = with_se(shape.C);
  const Tensor active = R > 0 ? at::empty_like(hidden) : Tensor();
  if (sample_mean_in) {
    check_tensor("sample_mean", *sample_mean_in, {shape.N, shape.C}, "(N, C)", at::kDouble);
  }
  const Tensor sample_mean = as_rows(sample_mean_in, at::kDouble);
  dispatch_tail(y, w1, w2, [&](auto y_zero, auto w_zero) {
    using T = decltype(y_zero);
    using W = decltype(w_zero);
    using A = acc_t<T>;
    constexpr auto kWeightType = c10::CppTypeToScalarType<W>::value;
    const Tensor w1_rows = as_rows(w1, kWeightType), w2_rows = as_rows(w2, kWeightType);
    const Tensor b1_rows = as_rows(b1, dtype), b2_rows = as_rows(b2, dtype);
    TailForward<T, W> args{};
    args.se.w1 = read<W>(w1_rows);
    args.se.b1 = read<A>(b1_rows);
    args.se.w2 = read<W>(w2_rows);
    args.se.b2 = read<A>(b2_rows);
    args.se.pooled = write<A>(pooled);
    args.se.hidden = write<A>(hidden);
    args.se.active = write<A>(active);
    args.se.gate = write<A>(gate);
    args.y = activation<const T>(y);
    args.residual = activation_or_none<const T>(residual, y);
    args.norm = norm_args<A>(norm, stats, norm_weight, norm_bias);
    if (shortcut == Shortcut::normed) {
      args.norm2 = norm_args<A>(norm2, stats2, norm2_weight, norm2_bias);
    }
    args.sample_mean = read<double>(sample_mean);
    args.out = activation<T>(out);
    args.mask = write<uint8_t>(mask);
    args.deviation = write<A>(deviation);
    tail_forward(shape, args);
  });
  return {out, mask, stats, stats2, deviation, pooled, hidden, gate};
}

constexpr int kGradients = 10;
enum Gradient { kDy, kDresidual, kDweight, kDbias, kDw1, kDb1, kDw2, kDb2, kDweight2, kDbias2 };
using OutputMask = std::array<bool, kGradients>;
using Gradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct Saved {
  Tensor y;
  optional<Tensor> residual, w1, w2;
  Tensor mask, stats, stats2, deviation, pooled, hidden, gate;
};

struct How {
  bool with_residual, training, training2;
  int64_t act, se_act, gate_fn;
};

enum class Sweep { sums, grads, both };

// The saved tensors, checked and contiguous.
Saved checked(const Saved& saved, const TailShape& shape, bool masked) {
  const int64_t N = shape.N, C = shape.C, R = shape.R;
  const auto dtype = acc_dtype(saved.y);
  Saved s = saved;
  s.y = in_layout(saved.y, shape.channels_last);
  if (saved.residual) {
    s.residual = like_y("residual", saved.residual, s.y, shape.channels_last);
  }
  TORCH_CHECK_VALUE(s.residual || !(shape.shortcut == Shortcut::normed ||
                                    (shape.shortcut == Shortcut::plain && shape.tail_act == TailAct::silu)),
                    "the residual was not saved");
  if (masked) {
    check_tensor("mask", saved.mask, mask_shape(shape), "as kernels.residual_tail.mask_shape has it", at::kByte);
  }
  check_tensor("stats", saved.stats, {kRows, C}, "(5, C)", dtype);
  if (shape.shortcut == Shortcut::normed) {
    check_tensor("stats2", saved.stats2, {kRows, C}, "(5, C)", dtype);
  }
  if (shape.with_se) {
    check_tensor("deviation", saved.deviation, {N, C}, "(N, C)", dtype);
    check_tensor("pooled", saved.pooled, {N, C}, "(N, C)", dtype);
    check_tensor("hidden", saved.hidden, {N, R}, "(N, R)", dtype);
    check_tensor("gate", saved.gate, {N, C}, "(N, C)", dtype);
  }
  for (Tensor* t : {&s.mask, &s.stats, &s.stats2, &s.deviation, &s.pooled, &s.hidden, &s.gate}) {
    *t = t->contiguous();
  }
  return s;
}

// `q` and `shares` are made by the sums and read by the grads. In place of dy the sums alone give q.
Gradients sweep_back(const Tensor& dout_in, const Saved& given, const How& how, const OutputMask& wanted, Sweep sweep,
                     Tensor q, Tensor shares) {
  const auto shortcut = !how.with_residual           ? Shortcut::none
                        : given.stats2.numel() > 0 ? Shortcut::normed
                                                     : Shortcut::plain;
  const int64_t R = squeezed(given.w1, given.w2, given.y.size(1));
  const TailShape shape = make_shape(given.y, R, how.act, how.se_act, how.gate_fn, shortcut);
  const bool normed = shortcut == Shortcut::normed;
  const bool masked = shape.tail_act == TailAct::relu && shortcut != Shortcut::none;
  const Saved saved = checked(given, shape, masked);
  const Tensor& y = saved.y;
  const Tensor dout = like_y("dout", dout_in, y, shape.channels_last);
  const int64_t N = shape.N, C = shape.C;

  const bool grads = sweep != Sweep::sums, sums = sweep != Sweep::grads;
  const bool through = how.training && wanted[kDy], through2 = how.training2 && wanted[kDresidual] && normed;
  const bool with_q = shape.with_se && (wanted[kDy] || wanted[kDweight] || wanted[kDbias]);
  const auto dtype = acc_dtype(y), w_dtype = shape.with_se ? weight_dtype(y, *saved.w1, *saved.w2) : y.scalar_type();
  const auto options = y.options().dtype(dtype), w_options = y.options().dtype(w_dtype);
  // What is not made is empty, and its pointer null
  const auto make = [](bool needed, at::IntArrayRef sizes, const at::TensorOptions& of) {
    return at::empty(needed ? sizes : at::IntArrayRef{0}, of);
  };
  const auto activation_gradient = [&](Gradient gradient) {
    return grads && wanted[gradient] ? at::empty_like(y, y.options(), format(shape.channels_last))
                                     : at::empty({0}, y.options());
  };
  const Tensor dy = activation_gradient(kDy), dresidual = activation_gradient(kDresidual);
  const Tensor dweight = make(sums && wanted[kDweight], {C}, options);
  const Tensor dbias = make(sums && wanted[kDbias], {C}, options);
  const Tensor dw1 = make(sums && wanted[kDw1], {R, C}, w_options), db1 = make(sums && wanted[kDb1], {R}, w_options);
  const Tensor dw2 = make(sums && wanted[kDw2], {C, R}, w_options), db2 = make(sums && wanted[kDb2], {C}, w_options);
  const Tensor dweight2 = make(sums && wanted[kDweight2], {C}, options);
  const Tensor dbias2 = make(sums && wanted[kDbias2], {C}, options);
  if (sums) {
    q = make(with_q, {N, C}, options);
    shares = make(through || through2, {4, C}, options);
  } else {
    check_tensor("shares", shares, {4, C}, "(4, C)", dtype);
    if (with_q) {
      check_tensor("q", q, {N, C}, "(N, C)", dtype);
    }
  }
  const bool with_se = sums && shape.with_se, with_dh = with_se && (with_q || wanted[kDw1] || wanted[kDb1]);
  const bool any_parameter = std::any_of(wanted.begin() + kDweight, wanted.end(), [](bool w) { return w; });
  const Tensor active = make(with_se && wanted[kDw2], {N, R}, options), dz = make(with_se, {N, C}, options);
  const Tensor dh = make(with_dh, {N, R}, options);
  dispatch_tail(y, saved.w1, saved.w2, [&](auto y_zero, auto w_zero) {
    using T = decltype(y_zero);
    using W = decltype(w_zero);
    using A = acc_t<T>;
    const Tensor w1_rows = as_rows(saved.w1, w_dtype), w2_rows = as_rows(saved.w2, w_dtype);
    TailBackward<T, W> args{};
    args.se.w1 = read<W>(w1_rows);
    args.se.w2 = read<W>(w2_rows);
    args.se.pooled = read<A>(saved.pooled);
    args.se.hidden = read<A>(saved.hidden);
    args.se.gate = read<A>(saved.gate);
    args.se.active = write<A>(active);
    args.se.dz = write<A>(dz);
    args.se.dh = write<A>(dh);
    args.se.q = with_q ? write<A>(q) : nullptr;
    args.se.dw1 = write<W>(dw1);
    args.se.db1 = write<W>(db1);
    args.se.dw2 = write<W>(dw2);
    args.se.db2 = write<W>(db2);
    args.dout = activation<const T>(dout);
    args.y = activation<const T>(y);
    args.residual = activation_or_none<const T>(saved.residual.value_or(Tensor()), y);
    args.mask = masked ? read<uint8_t>(saved.mask) : nullptr;
    args.stats = read<A>(saved.stats);
    args.stats2 = normed ? read<A>(saved.stats2) : nullptr;
    args.deviation = read<A>(saved.deviation);
    args.through_statistics = through;
    args.through_statistics2 = through2;
    args.dy = activation_or_none<T>(dy, y);
    args.dresidual = activation_or_none<T>(dresidual, y);
    args.dweight = write<A>(dweight);
    args.dbias = write<A>(dbias);
    args.dweight2 = write<A>(dweight2);
    args.dbias2 = write<A>(dbias2);
    args.shares = write<A>(shares);
    args.sweep_sums = sums && (any_parameter || through || through2 || with_q);
    args.sweep_grads = grads && (wanted[kDy] || wanted[kDresidual]);
    tail_backward(shape, args);
  });
  const auto as_weight = [](const Tensor& t, const optional<Tensor>& w) { return w ? t.to(w->scalar_type()) : t; };
  return {sweep == Sweep::sums ? q : dy,
          dresidual,
          dweight,
          dbias,
          as_weight(dw1, saved.w1),
          as_weight(db1, saved.w1),
          as_weight(dw2, saved.w2),
          as_weight(db2, saved.w2),
          dweight2,
          dbias2};
}

// `shared`: nothing, or the q and shares of tail_bwd_grads
template <Sweep kSweep, class... Shared>
auto tail_bwd(const Tensor& dout, const Tensor& y, const optional<Tensor>& residual, const optional<Tensor>& w1,
              const optional<Tensor>& w2, const Tensor& mask, const Tensor& stats, const Tensor& stats2,
              const Tensor& deviation, const Tensor& pooled, const Tensor& hidden, const Tensor& gate,
              bool with_residual, bool training, bool training2, int64_t act, int64_t se_act, int64_t gate_fn,
              OutputMask output_mask, const Shared&... shared) {
  const at::AutoDispatchBelowAutograd below_autograd;
  const Saved saved{y, residual, w1, w2, mask, stats, stats2, deviation, pooled, hidden, gate};
  const How how{with_residual, training, training2, act, se_act, gate_fn};
  if constexpr (kSweep == Sweep::grads) {
    const Gradients gradients = sweep_back(dout, saved, how, output_mask, kSweep, shared...);
    return std::tuple(std::get<kDy>(gradients), std::get<kDresidual>(gradients));
  } else {
    return sweep_back(dout, saved, how, output_mask, kSweep, Tensor(), Tensor());
  }
}

#define SE_TAIL_SAVED                                                                                              \
  "Tensor dout, Tensor y, Tensor? residual, Tensor? w1, Tensor? w2, Tensor mask, Tensor stats, Tensor stats2,"    \
  " Tensor deviation, Tensor pooled, Tensor hidden, Tensor gate, bool with_residual, bool training,"              \
  " bool training2, int act, int se_act, int gate_fn, bool[10] output_mask"

TORCH_LIBRARY_FRAGMENT(kernels_C, m) {
  // float64; sample_mean is empty unless by_sample
  m.def("tail_moments(Tensor x, bool by_sample) -> (Tensor mean, Tensor m2, Tensor sample_mean)");
  // mean and var, or stats, where the statistics are not this batch's own; sample_mean (N, C) where it is known
  m.def(
      "tail_fwd(Tensor y, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? w1, Tensor? b1, Tensor? w2,"
      " Tensor? b2, Tensor? weight2, Tensor? bias2, Tensor? mean, Tensor? var, Tensor? mean2, Tensor? var2,"
      " Tensor? stats, Tensor? stats2, Tensor? sample_mean, float eps, float eps2, bool residual_norm, int act,"
      " int se_act, int gate_fn) -> (Tensor out, Tensor mask, Tensor stats, Tensor stats2, Tensor deviation,"
      " Tensor pooled, Tensor hidden, Tensor gate)");
  m.def("tail_bwd(" SE_TAIL_SAVED
        ") -> (Tensor dy, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dw1, Tensor db1, Tensor dw2,"
        " Tensor db2, Tensor dweight2, Tensor dbias2)");
  // tail_bwd in two, for what has to be added up over ranks in between: shares are (4, C), dweight, dbias, dweight2 and
  // dbias2 over the number of values that the statistics were taken of. q is empty where there is no SE.
  m.def("tail_bwd_sums(" SE_TAIL_SAVED
        ") -> (Tensor q, Tensor none, Tensor dweight, Tensor dbias, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2,"
        " Tensor dweight2, Tensor dbias2)");
  m.def("tail_bwd_grads(" SE_TAIL_SAVED ", Tensor q, Tensor shares) -> (Tensor dy, Tensor dresidual)");
}

TORCH_LIBRARY_IMPL(kernels_C, CPU, m) {
  m.impl("tail_moments", tail_moments_op);
  m.impl("tail_fwd", tail_fwd);
  m.impl("tail_bwd", tail_bwd<Sweep::both>);
  m.impl("tail_bwd_sums", tail_bwd<Sweep::sums>);
  m.impl("tail_bwd_grads", tail_bwd<Sweep::grads, Tensor, Tensor>);
}

}  // namespace
}  // namespace se
