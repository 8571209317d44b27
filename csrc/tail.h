// The residual tail on the CPU: BatchNorm -> SE -> + residual -> activation. Parameters and kernel interface.
//
// Mathematics: kernels/residual_tail.py. Forward: the sweep `moments` for the statistics of the batch and the squeeze,
// then `apply`. Backward: the sweep `sums` for every reduction, then `grads`. y - mean is formed before it is used.
#pragma once

#include "se.h"

namespace se {

enum class TailAct : int64_t { relu = 0, silu = 1, identity = 2 };
enum class Shortcut : int64_t { none = 0, plain = 1, normed = 2 };  // the residual, with or without a BatchNorm

// Coefficients by channel: before the activation stands
//   v = (y - mean) * scale + shift [+ residual, or + (residual - mean2) * scale2],
// where scale and shift have the gate of the sample in them, and shift the residual's too. With d the gradient of v,
//   dy = scale * d + slope * (y - mean) + drift,  dresidual = d, or scale2 * d + slope2 * (residual - mean2) + drift2.
enum Coefficient { kMean, kScale, kShift, kMean2, kScale2, kSlope, kDrift, kSlope2, kDrift2, kCoefficients };

// A block of one sample, for every sweep. All strides are in elements; a view's data is null where it is not there.
template <class T>
struct TailBlock {
  using A = acc_t<T>;
  TailAct act;
  Shortcut shortcut;
  Extent extent;
  View<const T> y, residual, dout;
  View<T> out, dy, dresidual;
  // One bit an element, whether a ReLU passed: of a pixel's channels, or of a channel's pixels; in bytes
  View<uint8_t> bits;
  const A* coefficient[kCoefficients];  // (C) each
  // Whether dy and dresidual depend on y and the residual through the batch's statistics: else the terms in slope are
  // not there. A drift that is null is 0.
  bool through_statistics, through_statistics2;
  bool out_past_cache, dy_past_cache, dresidual_past_cache;  // as `past_cache` of Sweeps
  // (C) each, added to: sum_hw d, sum_hw d * (y - mean), sum_hw d * (residual - mean2)
  double *sum, *dot, *dot2;
};

// One sweep over a block: made for a ReLU and a shortcut, or for any activation and shortcut.
template <class T>
struct TailSweep {
  void (*relu[3])(const TailBlock<T>& block);  // by Shortcut
  void (*any)(const TailBlock<T>& block);

  void operator()(const TailBlock<T>& block) const {
    (block.act == TailAct::relu ? relu[static_cast<int>(block.shortcut)] : any)(block);
  }
};

template <class T>
struct TailSweeps {
  // A value near the block's mean, finite
  void (*pivot)(View<const T> x, Extent extent, acc_t<T>* pivot);
  // sum += sum_hw (x - pivot), square += sum_hw (x - pivot)^2
  void (*moments)(View<const T> x, Extent extent, const acc_t<T>* pivot, double* sum, double* square);
  TailSweep<T> apply, sums, grads;
};

template <class T>
struct TailKernels {
  TailSweeps<T> channels_last, contiguous;
};

// As `kernels` of se.h
template <class T>
const TailKernels<T>& tail_kernels_baseline();
template <class T>
const TailKernels<T>& tail_kernels_avx2();
template <class T>
const TailKernels<T>& tail_kernels_avx512();

// The rows of the statistics, as kernels/statistics.py has them
enum Row { kRowMean, kRowInvstd, kRowScale, kRowShift, kRowUnbiasedVar, kRows };

// A BatchNorm. Everything is contiguous.
template <class A>
struct NormArgs {
  A* stats;               // (kRows, C); to be filled where `batch`
  bool batch;             // whether the statistics are those of this batch
  const A *weight, *bias;  // (C) or null: of `batch`
  double eps;
};

struct TailShape : Shape {
  TailAct tail_act;
  Shortcut shortcut;
  bool with_se;
};

template <class T, class W>
struct TailForward {
  using A = acc_t<T>;
  Forward<T, W> se;  // all but x and out
  Activation<const T> y, residual;
  NormArgs<A> norm, norm2;
  const double* sample_mean;  // (N, C): where the caller knows it, else null
  Activation<T> out;
  uint8_t* mask;  // or null
  A* deviation;   // (N, C) with SE
};

// The statistics of one process's part of a batch.
template <class T>
struct TailMoments {
  Activation<const T> x;
  double *mean, *m2;    // (C): m2 is the sum of squared distances from the mean
  double* sample_mean;  // (N, C) or null
};

// A gradient is null where it is not wanted.
template <class T, class W>
struct TailBackward {
  using A = acc_t<T>;
  Backward<T, W> se;  // all but dout, x and dx; with scratch
  Activation<const T> dout, y, residual;
  const uint8_t* mask;
  const A *stats, *stats2, *deviation;  // (kRows, C), (kRows, C) or null, (N, C) with SE
  bool through_statistics, through_statistics2;
  Activation<T> dy, dresidual;
  A *dweight, *dbias, *dweight2, *dbias2;  // (C)
  // (4, C): dweight, dbias, dweight2 and dbias2 over the number of values that the statistics were taken of. Made by
  // the sums of this batch, or given where only `grads` is to be swept.
  A* shares;
  bool sweep_sums, sweep_grads;
};

template <class T>
void tail_moments(const TailShape& shape, const TailMoments<T>& args);
template <class T, class W>
void tail_forward(const TailShape& shape, const TailForward<T, W>& args);
template <class T, class W>
void tail_backward(const TailShape& shape, const TailBackward<T, W>& args);

}  // namespace se
