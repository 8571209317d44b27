// Tensors on their way to the tail's kernels: layout, shape, what is checked of both directions.
#pragma once

#include "arguments.h"
#include "tail.h"

namespace se {
namespace {

// kernels.residual_tail.memory_format: what the outputs and the mask follow. Of one pixel a channel both formats have
// the same order; as channels-last its channels fill vectors.
inline bool is_channels_last(const Tensor& y) {
  return y.size(1) > 1 && y.stride(1) == 1 && (y.size(2) * y.size(3) == 1 || !y.is_contiguous());
}

inline at::MemoryFormat format(bool channels_last) {
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// A tensor that is expanded, or in the other memory format, is brought to this one.
inline Tensor in_layout(const Tensor& t, bool channels_last) {
  return has_unit_stride(t, channels_last) ? t : t.contiguous(format(channels_last));
}

inline TailShape make_shape(const Tensor& y, int64_t R, int64_t act, int64_t se_act, int64_t gate_fn,
                            Shortcut shortcut) {
  TORCH_CHECK_VALUE(y.dim() == 4 && y.numel() > 0, "y must have shape (N, C, H, W) and elements, got ", y.sizes());
  check_dtype("y", y);
  check_cpu("y", y);
  TORCH_CHECK_VALUE(act >= 0 && act <= 2, "act must be 0 (relu), 1 (silu) or 2 (identity), got ", act);
  TORCH_CHECK_VALUE(se_act >= 0 && se_act <= 2, "se_act must be 0 (relu), 1 (silu) or 2 (gelu), got ", se_act);
  TORCH_CHECK_VALUE(gate_fn >= 0 && gate_fn <= 1, "gate_fn must be 0 (sigmoid) or 1 (hardsigmoid), got ", gate_fn);
  TailShape shape;
  static_cast<Shape&>(shape) = {
      y.size(0), y.size(1), y.size(2), y.size(3), R, is_channels_last(y), Act(se_act), GateFn(gate_fn)};
  shape.tail_act = TailAct(act);
  shape.shortcut = shortcut;
  shape.with_se = R > 0;
  return shape;
}

inline int64_t squeezed(const optional<Tensor>& w1, const optional<Tensor>& w2, int64_t C) {
  if (!w1 || !w2) {
    return 0;
  }
  const int64_t R = w1->size(0);
  check_weight("w1", *w1, {R, C}, "(R, C)");
  check_weight("w2", *w2, {C, R}, "(C, R)");
  return R;
}

inline at::DimVector mask_shape(const TailShape& shape) {
  const int64_t HW = shape.H * shape.W;
  return shape.channels_last ? at::DimVector{shape.N, HW, (shape.C + 7) / 8}
                             : at::DimVector{shape.N, shape.C, (HW + 7) / 8};
}

// `name`, which is like y, in this layout; undefined where there is none.
inline Tensor like_y(const char* name, const optional<Tensor>& t, const Tensor& y, bool channels_last) {
  if (!t) {
    return {};
  }
  check_tensor(name, *t, y.sizes(), "(N, C, H, W)", y.scalar_type());
  return in_layout(*t, channels_last);
}

// Of a tensor that is not there, or has no elements, the strides are `like`'s.
template <class T>
Activation<T> activation_or_none(const Tensor& t, const Tensor& like) {
  return t.defined() && t.numel() > 0
             ? activation<T>(t)
             : Activation<T>{nullptr, like.stride(0), like.stride(1), like.stride(2), like.stride(3)};
}

template <class F>
void dispatch_tail(const Tensor& y, const optional<Tensor>& w1, const optional<Tensor>& w2, const F& f) {
  dispatch(y, w1 && w2 ? weight_dtype(y, *w1, *w2) : y.scalar_type(), f);
}

}  // namespace
}  // namespace se
