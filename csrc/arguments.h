// Tensors on their way to the kernels: layouts, dtypes, pointers.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <initializer_list>
#include <optional>

#include "se.h"

namespace se {
namespace {

using at::Tensor;
using std::optional;

inline at::ScalarType acc_dtype(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline bool has_unit_stride(const Tensor& t, bool channels_last) {
  const int64_t dim = channels_last ? 1 : 3;
  return t.size(dim) == 1 || t.stride(dim) == 1;
}

// Which sweeps can go over all of `tensors`: channels-last, contiguous, or none.
inline optional<bool> common_layout(std::initializer_list<Tensor> tensors) {
  const auto all = [&](bool channels_last) {
    return std::all_of(tensors.begin(), tensors.end(),
                       [&](const Tensor& t) { return has_unit_stride(t, channels_last); });
  };
  if (all(true) && tensors.begin()->size(1) > 1) {
    return true;
  }
  return all(false) ? optional(false) : std::nullopt;
}

template <class T>
Activation<T> activation(const Tensor& x) {
  T* data;
  if constexpr (std::is_const_v<T>) {
    data = x.const_data_ptr<std::remove_const_t<T>>();
  } else {
    data = x.mutable_data_ptr<T>();
  }
  return {data, x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

// Null for a tensor that is not there.
template <class A>
const A* read(const Tensor& t) {
  return t.defined() ? t.const_data_ptr<A>() : nullptr;
}

template <class A>
A* write(const Tensor& t) {
  return t.defined() ? t.mutable_data_ptr<A>() : nullptr;
}

inline void check_shape(const char* name, const Tensor& t, at::IntArrayRef shape, const char* meaning) {
  TORCH_CHECK_VALUE(t.sizes() == shape, name, " must have shape ", meaning, " = ", shape, ", got ", t.sizes());
}

inline void check_dtype(const char* name, const Tensor& t) {
  const auto dtype = t.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
                    name, " must be float32, bfloat16, float16 or float64, got ", dtype);
}

inline void check_cpu(const char* name, const Tensor& t) {
  TORCH_CHECK_VALUE(t.device().is_cpu(), name, " must be on the CPU, got ", t.device());
}

inline void check_weight(const char* name, const Tensor& t, at::IntArrayRef shape, const char* meaning) {
  check_shape(name, t, shape, meaning);
  check_dtype(name, t);
  check_cpu(name, t);
}

inline void check_tensor(const char* name, const Tensor& t, at::IntArrayRef shape, const char* meaning,
                         at::ScalarType dtype) {
  check_shape(name, t, shape, meaning);
  TORCH_CHECK_VALUE(t.scalar_type() == dtype, name, " must be ", dtype, ", got ", t.scalar_type());
  check_cpu(name, t);
}

// Calls f(T, W) with x's type and the weights'.
template <class F>
inline void dispatch(const Tensor& x, at::ScalarType weight_dtype, const F& f) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "se", [&] {
    if (weight_dtype == x.scalar_type()) {
      f(scalar_t{}, scalar_t{});
    } else {
      f(scalar_t{}, acc_t<scalar_t>{});
    }
  });
}

// The kernels take weights of x's dtype or of the arithmetic's; anything else is widened, here.
inline at::ScalarType weight_dtype(const Tensor& x, const Tensor& w1, const Tensor& w2) {
  const bool as_x = w1.scalar_type() == x.scalar_type() && w2.scalar_type() == x.scalar_type();
  return as_x ? x.scalar_type() : acc_dtype(x);
}

inline Tensor as_rows(const optional<Tensor>& t, at::ScalarType dtype) {
  return t ? t->to(dtype).contiguous() : Tensor();
}

}  // namespace
}  // namespace se
