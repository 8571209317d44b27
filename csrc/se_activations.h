// The activation of the squeezed channels and the gate, with their gradients: few elements, so plain loops.
// NaN passes through every branch as it does through PyTorch's.
#pragma once

#include <cmath>

#include "se.h"

namespace se {
namespace {

template <class A>
A logistic(A x) {
  return A(1) / (A(1) + std::exp(-x));
}

template <class A>
void activate(Act act, const A* h, A* a, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    switch (act) {
      case Act::relu:
        a[i] = h[i] < 0 ? A(0) : h[i];
        break;
      case Act::silu:
        a[i] = h[i] * logistic(h[i]);
        break;
      case Act::gelu:
        a[i] = h[i] * A(0.5) * (A(1) + std::erf(h[i] * A(M_SQRT1_2)));
        break;
    }
  }
}

// d *= act'(h)
template <class A>
void activate_grad(Act act, const A* h, A* d, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    switch (act) {
      case Act::relu:
        d[i] = h[i] <= 0 ? A(0) : d[i];
        break;
      case Act::silu: {
        const A s = logistic(h[i]);
        d[i] *= s * (A(1) + h[i] * (A(1) - s));
        break;
      }
      case Act::gelu: {
        const A cdf = A(0.5) * (A(1) + std::erf(h[i] * A(M_SQRT1_2)));
        const A pdf = std::exp(A(-0.5) * h[i] * h[i]) * A(0.5 * M_2_SQRTPI * M_SQRT1_2);
        d[i] *= cdf + h[i] * pdf;
        break;
      }
    }
  }
}

template <class T>
void open_gate(GateFn gate_fn, acc_t<T>* z, int64_t count) {
  using A = acc_t<T>;
  if (gate_fn == GateFn::sigmoid) {
    kernels<T>().sigmoid(z, count);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const A shifted = z[i] + A(3);
    z[i] = (shifted < 0 ? A(0) : shifted > 6 ? A(6) : shifted) / A(6);
  }
}

// ds * gate'(z), told from s = gate(z). Chosen and not multiplied where the slope is 0, as PyTorch does: 0 * inf is
// NaN.
template <class A>
A gate_backward(GateFn gate_fn, A ds, A s) {
  if (gate_fn == GateFn::sigmoid) {
    return ds * s * (A(1) - s);
  }
  return s > 0 && s < 1 ? ds / A(6) : A(0);
}

}  // namespace
}  // namespace se
