// Squeeze-and-Excitation on the CPU: mathematics, parameters, kernel interface.
//
// Hu, Shen, Sun: Squeeze-and-Excitation Networks, CVPR 2018. For x (N, C, H, W), w1 (R, C), w2 (C, R):
//
//   p = mean_hw x        h = W1 p + b1        a = act(h)        s = gate(W2 a + b2)        out = x * s
//
// so each sample is read twice: once to pool it, once to scale it. With ds = sum_hw dout * x:
//
//   dz = ds * gate'(s)       dW2 = dz^T a       db2 = sum_n dz
//   dh = (dz W2) * act'(h)   dW1 = dh^T p       db1 = sum_n dh
//   q  = (dh W1) / HW        dx  = dout * s + q
//
// and the backward pass reads dout twice and x once. Whatever is read a second time is read while it is still in cache.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

namespace se {

template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

enum class Act : int64_t { relu = 0, silu = 1, gelu = 2 };
enum class GateFn : int64_t { sigmoid = 0, hardsigmoid = 1 };

// A block of one sample: element (c, h, w) is at data[c * stride_c + h * stride_h + w * stride_w].
// All strides are in elements.
template <class T>
struct View {
  T* data;
  int64_t stride_c, stride_h, stride_w;
};

struct Extent {
  int64_t C, H, W;
};

// The four sweeps over a block, single-threaded. `total`, `gate` and `q` have C elements, `total` is added to.
// The channels-last kernels need stride_c == 1, the contiguous ones stride_w == 1, of every view.
// `past_cache`: the result is too large to be found in the caches by whoever reads it.
template <class T>
struct Sweeps {
  void (*sum)(View<const T> x, Extent extent, double* total);                      // total += sum_hw x
  void (*dot)(View<const T> dout, View<const T> x, Extent extent, double* total);  // total += sum_hw dout * x
  // out = x * gate
  void (*scale)(View<const T> x, const acc_t<T>* gate, View<T> out, Extent extent, bool past_cache);
  // dx = dout * gate + q
  void (*grad)(View<const T> dout, const acc_t<T>* gate, const acc_t<T>* q, View<T> dx, Extent extent, bool past_cache);
};

// Small dense products with weights of type W, single-threaded. Matrices are row-major, ld* is the distance between
// rows. The order of the additions for one result does not depend on how many rows, columns or samples a call covers.
template <class W>
struct Products {
  using A = acc_t<W>;
  // y[n, i] = bias[i] + sum_j m[i, j] x[n, j]     m (rows, cols), x (N, cols), y (N, rows), bias (rows) or null
  void (*rows_dot)(const W* m, int64_t rows, int64_t cols, const A* bias, const A* x, int64_t ldx, A* y, int64_t ldy,
                   int64_t N);
  // y[n, j] = sum_i x[n, i] m[i, j]               m (rows, cols), x (N, rows), y (N, cols)
  void (*cols_dot)(const W* m, int64_t ldm, int64_t rows, int64_t cols, const A* x, int64_t ldx, A* y, int64_t ldy,
                   int64_t N);
  // y[i, j] = sum_n u[n, i] v[n, j]               u (N, rows), v (N, cols), y (rows, cols)
  void (*outer)(const A* u, int64_t ldu, const A* v, int64_t ldv, int64_t N, W* y, int64_t rows, int64_t cols);
};

template <class T>
struct Kernels {
  Sweeps<T> channels_last, contiguous;
  Products<T> narrow_weights;       // of x's type
  Products<acc_t<T>> wide_weights;  // of the arithmetic's type
  void (*sigmoid)(acc_t<T>* z, int64_t count);
};

// One copy of the kernels for each instruction set; `kernels` picks the one that `instruction_set` names.
template <class T>
const Kernels<T>& kernels_baseline();
template <class T>
const Kernels<T>& kernels_avx2();
template <class T>
const Kernels<T>& kernels_avx512();
template <class T>
const Kernels<T>& kernels();
const char* instruction_set();

// Strides of a whole activation tensor (N, C, H, W), in elements.
template <class T>
struct Activation {
  T* data;
  int64_t stride_n, stride_c, stride_h, stride_w;
};

struct Shape {
  int64_t N, C, H, W, R;
  bool channels_last;  // else contiguous: which of Kernels' sweeps fits every activation
  Act act;
  GateFn gate_fn;
};

// Weights are of type W: T or acc_t<T>. Everything but x and out is contiguous.
template <class T, class W>
struct Forward {
  using A = acc_t<T>;
  Activation<const T> x;
  const W* w1;  // (R, C)
  const A* b1;  // (R) or null
  const W* w2;  // (C, R)
  const A* b2;  // (C) or null
  Activation<T> out;
  A *pooled, *hidden;  // (N, C), (N, R) before the activation
  A *active, *gate;    // (N, R) scratch: act(hidden), (N, C)
};

// Everything but dout, x and dx is contiguous. A gradient is null where it is not wanted.
template <class T, class W>
struct Backward {
  using A = acc_t<T>;
  Activation<const T> dout, x;
  const W *w1, *w2;                 // (R, C), (C, R)
  const A *pooled, *hidden, *gate;  // (N, C), (N, R), (N, C)
  A *active, *dz, *dh, *q;          // scratch: (N, R), (N, C), (N, R), (N, C)
  Activation<T> dx;
  W *dw1, *db1, *dw2, *db2;  // (R, C), (R), (C, R), (C)
};

template <class T, class W>
void forward(const Shape& shape, const Forward<T, W>& args);
template <class T, class W>
void backward(const Shape& shape, const Backward<T, W>& args);

}  // namespace se
