// kernels_C::pool_*: how the sweeps of pool.h are shared out, what is allocated, registration. Mathematics in
// kernels/norm_pool.py, which checks what users give; here is checked what memory safety rests on.
#include <torch/library.h>

#include <memory>
#include <string_view>
#include <tuple>

#include "arguments.h"
#include "division.h"
#include "pool.h"
#include "tail.h"

namespace se {
namespace {

template <class T>
const PoolSweeps<T>& pool_sweeps() {
#if defined(__x86_64__)
  static const std::string_view chosen = instruction_set();
  return chosen == "AVX512" ? pool_sweeps_avx512<T>()
         : chosen == "AVX2" ? pool_sweeps_avx2<T>()
                            : pool_sweeps_baseline<T>();
#else
  return pool_sweeps_baseline<T>();
#endif
}

Shape make_shape(const Tensor& y) {
  TORCH_CHECK_VALUE(y.dim() == 4 && y.numel() > 0, "y must have shape (N, C, H, W) and elements, got ", y.sizes());
  check_dtype("y", y);
  check_cpu("y", y);
  TORCH_CHECK_VALUE(has_unit_stride(y, true), "y must be channels-last, got strides ", y.strides());
  return {y.size(0), y.size(1), y.size(2), y.size(3), 0, true, Act::relu, GateFn::sigmoid};
}

// Some rows of outputs of one sample, by the shape alone: what a thread takes at least, and what is summed by itself.
struct Parts {
  int64_t rows, step, per_sample, count, grain;

  Parts(const Shape& shape, int64_t element_size) : rows(pooled(shape.H)) {
    const int64_t row = 2 * shape.W * shape.C;  // elements of y
    step = std::clamp(kTileBytes / element_size / row, int64_t(1), rows);
    per_sample = ceil_div(rows, step);
    count = shape.N * per_sample;
    grain = ceil_div(kSerialElements, step * row);
  }
  // f(part, n, first row, last row), the last parts first where `back`: they are what was read last
  template <class F>
  void share(bool back, const F& f) const {
    at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t part = back ? end - 1 - (i - begin) : i, first = part % per_sample * step;
        f(part, part / per_sample, first, std::min(first + step, rows));
      }
    });
  }
};

template <class T>
View<T> sample(const Tensor& t, int64_t n) {
  const Activation<T> a = activation<T>(t);
  return {a.data + n * a.stride_n, a.stride_c, a.stride_h, a.stride_w};
}

template <class T>
PoolBlock<T> make_block(const Shape& shape, const Tensor& y, const Tensor& stats) {
  using A = acc_t<T>;
  PoolBlock<T> block{};
  block.extent = {shape.C, shape.H, shape.W};
  const A* rows = stats.const_data_ptr<A>();
  block.mean = rows + kRowMean * shape.C;
  block.scale = rows + kRowScale * shape.C;
  block.shift = rows + kRowShift * shape.C;
  return block;
}

template <class T>
void enter_sample(PoolBlock<T>& block, const Tensor& y, int64_t n, int64_t first, int64_t last) {
  block.y = sample<const T>(y, n);
  block.first = first;
  block.last = last;
}

// Codes lie as (N, H/2, W/2, C)
template <class T>
void enter_code(PoolBlock<T>& block, const Tensor& code, int64_t n) {
  auto* data = const_cast<uint8_t*>(code.const_data_ptr<uint8_t>());
  block.code = {data + n * code.stride(0), 1, code.stride(1), code.stride(2)};
}

Tensor checked_stats(const Tensor& stats, const Tensor& y) {
  check_tensor("stats", stats, {kRows, y.size(1)}, "(5, C)", acc_dtype(y));
  return stats.contiguous();
}

Tensor checked_code(const Tensor& code, const Shape& shape) {
  check_tensor("code", code, {shape.N, pooled(shape.H), pooled(shape.W), shape.C}, "(N, H/2, W/2, C)", at::kByte);
  return code.contiguous();
}

// A gradient that is expanded, or in the other memory format, is brought to this one.
Tensor checked_dout(const Tensor& dout, const Tensor& y) {
  check_tensor("dout", dout, {y.size(0), y.size(1), pooled(y.size(2)), pooled(y.size(3))}, "(N, C, H/2, W/2)",
               y.scalar_type());
  return has_unit_stride(dout, true) ? dout : dout.contiguous(at::MemoryFormat::ChannelsLast);
}

std::tuple<Tensor, Tensor> pool_fwd(const Tensor& y, const Tensor& stats_in) {
  const at::AutoDispatchBelowAutograd below_autograd;
  const Shape shape = make_shape(y);
  const Tensor stats = checked_stats(stats_in, y);
  const int64_t Ho = pooled(shape.H), Wo = pooled(shape.W);
  const Tensor out = at::empty({shape.N, shape.C, Ho, Wo}, y.options(), at::MemoryFormat::ChannelsLast);
  const Tensor code = at::empty({shape.N, Ho, Wo, shape.C}, y.options().dtype(at::kByte));
  dispatch(y, y.scalar_type(), [&](auto zero, auto) {
    using T = decltype(zero);
    const auto apply = pool_sweeps<T>().apply;
    Parts(shape, sizeof(T)).share(true, [&](int64_t, int64_t n, int64_t first, int64_t last) {
      PoolBlock<T> block = make_block<T>(shape, y, stats);
      enter_sample(block, y, n, first, last);
      enter_code(block, code, n);
      block.out = sample<T>(out, n);
      const std::unique_ptr<char[]> scratch(new char[pool_scratch(block.extent) * sizeof(T)]);
      block.scratch = reinterpret_cast<T*>(scratch.get());
      apply(block);
    });
  });
  return {out, code};
}

// (2, C) float64: of d * (y - mean), of d
Tensor pool_bwd_sums(const Tensor& dout_in, const Tensor& y, const Tensor& code_in, const Tensor& stats_in) {
  const at::AutoDispatchBelowAutograd below_autograd;
  const Shape shape = make_shape(y);
  const Tensor stats = checked_stats(stats_in, y), code = checked_code(code_in, shape);
  const Tensor dout = checked_dout(dout_in, y);
  const Tensor sums = at::zeros({2, shape.C}, y.options().dtype(at::kDouble));
  dispatch(y, y.scalar_type(), [&](auto zero, auto) {
    using T = decltype(zero);
    const auto sweep = pool_sweeps<T>().sums;
    const Parts parts(shape, sizeof(T));
    const std::unique_ptr<double[]> of_parts(new double[parts.count * 2 * shape.C]());
    parts.share(false, [&](int64_t part, int64_t n, int64_t first, int64_t last) {
      PoolBlock<T> block = make_block<T>(shape, y, stats);
      enter_sample(block, y, n, first, last);
      enter_code(block, code, n);
      block.dout = sample<const T>(dout, n);
      block.dot = of_parts.get() + part * 2 * shape.C;
      block.sum = block.dot + shape.C;
      sweep(block);
    });
    auto* total = sums.mutable_data_ptr<double>();
    at::parallel_for(0, 2 * shape.C, kColumnBlock, [&](int64_t begin, int64_t end) {
      for (int64_t part = 0; part < parts.count; ++part) {
        for (int64_t i = begin; i < end; ++i) {
          total[i] += of_parts[part * 2 * shape.C + i];
        }
      }
    });
  });
  return sums;
}

Tensor pool_bwd_grads(const Tensor& dout_in, const Tensor& y, const Tensor& code_in, const Tensor& stats_in,
                      const optional<Tensor>& coefficients_in) {
  const at::AutoDispatchBelowAutograd below_autograd;
  const Shape shape = make_shape(y);
  const Tensor stats = checked_stats(stats_in, y), code = checked_code(code_in, shape);
  const Tensor dout = checked_dout(dout_in, y);
  const Tensor coefficients = as_rows(coefficients_in, acc_dtype(y));
  if (coefficients_in) {
    check_tensor("coefficients", *coefficients_in, {2, shape.C}, "(2, C)", acc_dtype(y));
  }
  const Tensor dy = at::empty(y.sizes(), y.options(), at::MemoryFormat::ChannelsLast);
  dispatch(y, y.scalar_type(), [&](auto zero, auto) {
    using T = decltype(zero);
    const auto grads = pool_sweeps<T>().grads;
    const bool outgrows = outgrows_cache<T>(shape);
    Parts(shape, sizeof(T)).share(true, [&](int64_t, int64_t n, int64_t first, int64_t last) {
      PoolBlock<T> block = make_block<T>(shape, y, stats);
      enter_sample(block, y, n, first, last);
      enter_code(block, code, n);
      block.dout = sample<const T>(dout, n);
      block.dy = sample<T>(dy, n);
      block.slope = read<acc_t<T>>(coefficients);
      block.drift = block.slope ? block.slope + shape.C : nullptr;
      block.dy_past_cache = outgrows && is_resident(block.dy.data + 2 * first * block.dy.stride_h);
      grads(block);
    });
  });
  return dy;
}

TORCH_LIBRARY_FRAGMENT(kernels_C, m) {
  m.def("pool_fwd(Tensor y, Tensor stats) -> (Tensor out, Tensor code)");
  m.def("pool_bwd_sums(Tensor dout, Tensor y, Tensor code, Tensor stats) -> Tensor sums");
  // coefficients (2, C) where the statistics were the batch's: dy is also coefficients[0] * (y - mean) + coefficients[1]
  m.def("pool_bwd_grads(Tensor dout, Tensor y, Tensor code, Tensor stats, Tensor? coefficients) -> Tensor dy");
}

TORCH_LIBRARY_IMPL(kernels_C, CPU, m) {
  m.impl("pool_fwd", pool_fwd);
  m.impl("pool_bwd_sums", pool_bwd_sums);
  m.impl("pool_bwd_grads", pool_bwd_grads);
}

}  // namespace
}  // namespace se
