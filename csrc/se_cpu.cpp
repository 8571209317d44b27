// Squeeze-and-Excitation on the CPU: how a batch is divided among threads and caches. Mathematics in se.h.
//
// Two schemes, with bitwise equal results:
//
//   by group  one parallel region; a thread takes a few samples through pool, products and scale while they are in
//             its cache.
//   by phase  a region for each step, over as many samples as fit the threads' caches together; within a step the
//             threads share every sample, and the weights are read once for all of them.
//
// The first needs enough samples for the threads, and weights that are small beside a group. Sums are divided by shape
// alone, so that results do not depend on the number of threads; there are no atomics.
#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "se.h"

namespace se {

// PyTorch's own choice, so that ATEN_CPU_CAPABILITY holds here too.
const char* instruction_set() {
#if defined(__x86_64__)
  static const std::string chosen = at::get_cpu_capability();
  return chosen == "AVX512" ? "AVX512" : chosen == "AVX2" ? "AVX2" : "baseline";
#else
  return "baseline";
#endif
}

template <class T>
const Kernels<T>& kernels() {
#if defined(__x86_64__)
  static const std::string_view chosen = instruction_set();
  static const Kernels<T>& table = chosen == "AVX512" ? kernels_avx512<T>()
                                   : chosen == "AVX2" ? kernels_avx2<T>()
                                                      : kernels_baseline<T>();
  return table;
#else
  return kernels_baseline<T>();
#endif
}

namespace {

constexpr int64_t kTileBytes = 64 * 1024;     // of a sample: what threads share out by phase
constexpr int64_t kMinTileLines = 16;         // fewer would make the partial sums of a channel a traffic of their own
constexpr int64_t kCacheBytes = 1024 * 1024;  // of L2 that a thread can count on
constexpr int64_t kWeightShare = 4;           // by group: weights are at most this many times a group's activations
constexpr int64_t kProductGrain = 32 * 1024;  // multiply-adds worth a thread
constexpr int64_t kElementGrain = 16 * 1024;  // simple operations worth a thread
constexpr int64_t kColumnBlock = 16;
constexpr int64_t kStreamBytes = 4 * 1024 * 1024;  // for each thread: results larger than all are written past the caches

// How one sample is divided into tiles: channels-last by lines (h), contiguous by channels.
struct Tiling {
  bool channels_last;
  Extent extent;
  int64_t step, count;

  Tiling(bool channels_last, Extent extent, int64_t element_size) : channels_last(channels_last), extent(extent) {
    const int64_t row = element_size * (channels_last ? extent.W * extent.C : extent.H * extent.W);
    const int64_t least = channels_last ? kMinTileLines / extent.W : 0;
    step = std::max({kTileBytes / row, least, int64_t(1)});
    count = (rows() + step - 1) / step;
  }
  int64_t rows() const {
    return channels_last ? extent.H : extent.C;
  }
  Extent at(int64_t tile) const {
    const int64_t size = std::min(step, rows() - tile * step);
    return channels_last ? Extent{extent.C, size, extent.W} : Extent{size, extent.H, extent.W};
  }
  int64_t first_channel(int64_t tile) const {
    return channels_last ? 0 : tile * step;
  }
  // Partial sums of one channel.
  int64_t partials() const {
    return channels_last ? count : 1;
  }
  template <class T>
  View<T> view(const Activation<T>& a, int64_t n, int64_t tile) const {
    T* data = a.data + n * a.stride_n + tile * step * (channels_last ? a.stride_h : a.stride_c);
    return {data, a.stride_c, a.stride_h, a.stride_w};
  }
};

// Makes H and W one dimension where every activation allows it: H for channels-last, W for contiguous.
template <class... Activations>
Extent collapse(const Shape& shape, Activations&... activations) {
  const auto flat_stride = [&](const auto& a) -> std::optional<int64_t> {
    if (shape.W == 1) {
      return a.stride_h;
    }
    if (shape.H == 1 || a.stride_h == shape.W * a.stride_w) {
      return a.stride_w;
    }
    return std::nullopt;
  };
  const auto fits = [&](const auto& a) {
    const auto stride = flat_stride(a);
    return stride && (shape.channels_last || *stride == 1);
  };
  if (!(fits(activations) && ...)) {
    return {shape.C, shape.H, shape.W};
  }
  ((activations.stride_h = activations.stride_w = *flat_stride(activations)), ...);
  const int64_t HW = shape.H * shape.W;
  return shape.channels_last ? Extent{shape.C, HW, 1} : Extent{shape.C, 1, HW};
}

// Samples that one thread takes together, enough to be worth reading the weights for; zero where the work is better
// divided by phase.
int64_t group_size(const Shape& shape, int64_t sample_bytes, int64_t weight_bytes) {
  const int64_t threads = at::get_num_threads();
  const int64_t share = std::max(int64_t(1), (shape.N + threads - 1) / threads);
  int64_t group = std::clamp(std::max(kCacheBytes, 2 * weight_bytes) / sample_bytes, int64_t(1), share);
  if (group > 4) {
    group -= group % 4;  // the products' groups
  }
  const int64_t turns = ((shape.N + group - 1) / group + threads - 1) / threads;
  const bool balanced = 5 * shape.N >= 4 * turns * group * threads;
  return balanced && weight_bytes <= kWeightShare * group * sample_bytes ? group : 0;
}

template <class T>
bool goes_past_cache(const Shape& shape) {
  return shape.N * shape.C * shape.H * shape.W * int64_t(sizeof(T)) > at::get_num_threads() * kStreamBytes;
}

template <class F>
void parallel(int64_t count, int64_t cost_each, int64_t grain, const F& f) {
  at::parallel_for(0, count, std::max(int64_t(1), grain / std::max(int64_t(1), cost_each)), f);
}

// Runs f(n, tile) for every tile of samples [first, last), last tile first if `reverse`: what was touched last is in cache.
template <class F>
void for_each_tile(const Tiling& tiling, int64_t first, int64_t last, bool reverse, const F& f) {
  at::parallel_for(0, (last - first) * tiling.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t item = reverse ? begin + end - 1 - i : i;
      f(first + item / tiling.count, item % tiling.count);
    }
  });
}

// sums[n, c] for samples [first, last): sum_tile(n, tile, total) adds a tile's sums to total, finish takes each result.
template <class SumTile, class Finish>
void sum_by_phase(const Tiling& tiling, int64_t first, int64_t last, const SumTile& sum_tile, const Finish& finish) {
  const int64_t C = tiling.extent.C, P = tiling.partials();
  std::vector<double> partial((last - first) * P * C, 0.);
  for_each_tile(tiling, first, last, false, [&](int64_t n, int64_t tile) {
    double* total = partial.data() + (n - first) * P * C;
    sum_tile(n, tile, total + (tiling.channels_last ? tile * C : tiling.first_channel(tile)));
  });
  parallel((last - first) * C, P, kElementGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / C, c = i % C;
      double total = 0;
      for (int64_t p = 0; p < P; ++p) {
        total += partial[(n * P + p) * C + c];
      }
      finish(first + n, c, total);
    }
  });
}

template <class SumTile, class Finish>
void sum_sample(const Tiling& tiling, int64_t n, std::vector<double>& total, const SumTile& sum_tile,
                const Finish& finish) {
  std::fill(total.begin(), total.end(), 0.);
  for (int64_t tile = 0; tile < tiling.count; ++tile) {
    sum_tile(n, tile, total.data() + tiling.first_channel(tile));
  }
  for (int64_t c = 0; c < tiling.extent.C; ++c) {
    finish(n, c, total[c]);
  }
}

template <class A>
A logistic(A x) {
  return A(1) / (A(1) + std::exp(-x));
}

// NaN passes through every branch below as it does through PyTorch's.
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

template <class A>
A gate_grad(GateFn gate_fn, A s) {
  if (gate_fn == GateFn::sigmoid) {
    return s * (A(1) - s);
  }
  return s > 0 && s < 1 ? A(1) / A(6) : A(0);
}

template <class T, class W>
const Products<W>& products() {
  if constexpr (std::is_same_v<W, T>) {
    return kernels<T>().narrow_weights;
  } else {
    return kernels<T>().wide_weights;
  }
}

template <class T, class W>
class ForwardPass {
 public:
  ForwardPass(const Shape& shape, const Forward<T, W>& args)
      : shape_(shape), args_(args), tiling_(shape.channels_last, collapse(shape, args_.x, args_.out), sizeof(T)) {}

  void run() const {
    const int64_t sample_bytes = shape_.C * shape_.H * shape_.W * sizeof(T);
    const int64_t weight_bytes = 2 * shape_.C * shape_.R * sizeof(W);
    if (const int64_t group = group_size(shape_, sample_bytes, weight_bytes)) {
      by_group(group);
    } else {
      by_phase(std::max(int64_t(1), at::get_num_threads() * kCacheBytes / sample_bytes));
    }
  }

 private:
  using A = acc_t<T>;

  void by_group(int64_t group) const {
    at::parallel_for(0, (shape_.N + group - 1) / group, 1, [&](int64_t begin, int64_t end) {
      std::vector<double> total(shape_.C);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * group, last = std::min(first + group, shape_.N);
        for (int64_t n = first; n < last; ++n) {
          sum_sample(tiling_, n, total, pool_tile(), store_mean());
        }
        squeeze(first, last, 0, shape_.R);
        excite(first, last, 0, shape_.C);
        for (int64_t n = last - 1; n >= first; --n) {
          for (int64_t tile = tiling_.count - 1; tile >= 0; --tile) {
            scale(n, tile);
          }
        }
      }
    });
  }

  void by_phase(int64_t block) const {
    for (int64_t first = 0; first < shape_.N; first += block) {
      const int64_t last = std::min(first + block, shape_.N), N = last - first;
      sum_by_phase(tiling_, first, last, pool_tile(), store_mean());
      parallel(shape_.R, N * shape_.C, kProductGrain,
               [&](int64_t begin, int64_t end) { squeeze(first, last, begin, end); });
      parallel(shape_.C, N * shape_.R, kProductGrain,
               [&](int64_t begin, int64_t end) { excite(first, last, begin, end); });
      for_each_tile(tiling_, first, last, true, [&](int64_t n, int64_t tile) { scale(n, tile); });
    }
  }

  auto pool_tile() const {
    return [this](int64_t n, int64_t tile, double* total) {
      sweeps().sum(tiling_.view(args_.x, n, tile), tiling_.at(tile), total);
    };
  }

  auto store_mean() const {
    return [this, HW = static_cast<double>(shape_.H * shape_.W)](int64_t n, int64_t c, double total) {
      args_.pooled[n * shape_.C + c] = static_cast<A>(total / HW);
    };
  }

  // hidden and active, columns [begin, end)
  void squeeze(int64_t first, int64_t last, int64_t begin, int64_t end) const {
    const int64_t C = shape_.C, R = shape_.R;
    A* hidden = args_.hidden + first * R + begin;
    products<T, W>().rows_dot(args_.w1 + begin * C, end - begin, C, args_.b1 ? args_.b1 + begin : nullptr,
                                   args_.pooled + first * C, C, hidden, R, last - first);
    for (int64_t n = 0; n < last - first; ++n) {
      activate(shape_.act, hidden + n * R, args_.active + (first + n) * R + begin, end - begin);
    }
  }

  // gate, columns [begin, end)
  void excite(int64_t first, int64_t last, int64_t begin, int64_t end) const {
    const int64_t C = shape_.C, R = shape_.R;
    A* gate = args_.gate + first * C + begin;
    products<T, W>().rows_dot(args_.w2 + begin * R, end - begin, R, args_.b2 ? args_.b2 + begin : nullptr,
                                   args_.active + first * R, R, gate, C, last - first);
    for (int64_t n = 0; n < last - first; ++n) {
      open_gate<T>(shape_.gate_fn, gate + n * C, end - begin);
    }
  }

  void scale(int64_t n, int64_t tile) const {
    const A* gate = args_.gate + n * shape_.C + tiling_.first_channel(tile);
    sweeps().scale(tiling_.view(args_.x, n, tile), gate, tiling_.view(args_.out, n, tile), tiling_.at(tile),
                   goes_past_cache<T>(shape_));
  }

  const Sweeps<T>& sweeps() const {
    return shape_.channels_last ? kernels<T>().channels_last : kernels<T>().contiguous;
  }

  Shape shape_;
  Forward<T, W> args_;
  Tiling tiling_;
};

template <class T, class W>
class BackwardPass {
 public:
  BackwardPass(const Shape& shape, const Backward<T, W>& args)
      : shape_(shape),
        args_(args),
        tiling_(shape.channels_last, collapse(shape, args_.dout, args_.x, args_.dx), sizeof(T)) {}

  void run() const {
    const int64_t sample_bytes = 2 * shape_.C * shape_.H * shape_.W * sizeof(T);
    const int64_t weight_bytes = 2 * shape_.C * shape_.R * sizeof(W);
    if (const int64_t group = group_size(shape_, sample_bytes, weight_bytes)) {
      by_group(group);
    } else {
      by_phase(std::max(int64_t(1), at::get_num_threads() * kCacheBytes / sample_bytes));
    }
    weight_gradients();
  }

 private:
  using A = acc_t<T>;

  void by_group(int64_t group) const {
    at::parallel_for(0, (shape_.N + group - 1) / group, 1, [&](int64_t begin, int64_t end) {
      std::vector<double> total(shape_.C);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * group, last = std::min(first + group, shape_.N);
        for (int64_t n = first; n < last; ++n) {
          sum_sample(tiling_, n, total, dot_tile(), store_dz());
        }
        if (args_.dh) {
          through_w2(first, last, 0, shape_.R);
        }
        if (!args_.dx.data) {
          continue;
        }
        through_w1(first, last, 0, shape_.C);
        for (int64_t n = last - 1; n >= first; --n) {
          for (int64_t tile = tiling_.count - 1; tile >= 0; --tile) {
            grad(n, tile);
          }
        }
      }
    });
  }

  void by_phase(int64_t block) const {
    for (int64_t first = 0; first < shape_.N; first += block) {
      const int64_t last = std::min(first + block, shape_.N), N = last - first;
      sum_by_phase(tiling_, first, last, dot_tile(), store_dz());
      if (args_.dh) {
        by_column_block(shape_.R, N * shape_.C,
                        [&](int64_t begin, int64_t end) { through_w2(first, last, begin, end); });
      }
      if (!args_.dx.data) {
        continue;
      }
      by_column_block(shape_.C, N * shape_.R, [&](int64_t begin, int64_t end) { through_w1(first, last, begin, end); });
      for_each_tile(tiling_, first, last, true, [&](int64_t n, int64_t tile) { grad(n, tile); });
    }
  }

  // Rows of dw1 and dw2 in one region: a row of dw1 costs as much as `rows_each` of dw2.
  void weight_gradients() const {
    const int64_t N = shape_.N, C = shape_.C, R = shape_.R;
    if (args_.dw2) {
      activate(shape_.act, args_.hidden, args_.active, N * R);
    }
    const int64_t rows_each = std::max(int64_t(1), C / R);
    const int64_t of_dw1 = args_.dw1 ? R : 0, of_dw2 = args_.dw2 ? (C + rows_each - 1) / rows_each : 0;
    parallel(of_dw1 + of_dw2, N * C, kProductGrain, [&](int64_t begin, int64_t end) {
      if (begin < of_dw1) {
        const int64_t rows = std::min(end, of_dw1) - begin;
        products<T, W>().outer(args_.dh + begin, R, args_.pooled, C, N, args_.dw1 + begin * C, rows, C);
      }
      if (end > of_dw1) {
        const int64_t first = std::max(begin - of_dw1, int64_t(0)) * rows_each;
        const int64_t last = std::min((end - of_dw1) * rows_each, C);
        products<T, W>().outer(args_.dz + first, C, args_.active, R, N, args_.dw2 + first * R, last - first, R);
      }
    });
    sum_samples(args_.dh, R, args_.db1);
    sum_samples(args_.dz, C, args_.db2);
  }

  void sum_samples(const A* rows, int64_t columns, W* sum) const {
    for (int64_t i = 0; sum && i < columns; ++i) {
      double total = 0;
      for (int64_t n = 0; n < shape_.N; ++n) {
        total += rows[n * columns + i];
      }
      sum[i] = static_cast<W>(static_cast<A>(total));
    }
  }

  template <class F>
  static void by_column_block(int64_t columns, int64_t cost_each, const F& f) {
    parallel((columns + kColumnBlock - 1) / kColumnBlock, kColumnBlock * cost_each, kProductGrain,
             [&](int64_t begin, int64_t end) { f(begin * kColumnBlock, std::min(end * kColumnBlock, columns)); });
  }

  auto dot_tile() const {
    return [this](int64_t n, int64_t tile, double* total) {
      sweeps().dot(tiling_.view(args_.dout, n, tile), tiling_.view(args_.x, n, tile), tiling_.at(tile), total);
    };
  }

  auto store_dz() const {
    return [this](int64_t n, int64_t c, double total) {
      const int64_t i = n * shape_.C + c;
      args_.dz[i] = static_cast<A>(total) * gate_grad(shape_.gate_fn, args_.gate[i]);
    };
  }

  // dh, columns [begin, end)
  void through_w2(int64_t first, int64_t last, int64_t begin, int64_t end) const {
    const int64_t C = shape_.C, R = shape_.R, offset = first * R + begin;
    products<T, W>().cols_dot(args_.w2 + begin, R, C, end - begin, args_.dz + first * C, C,
                                   args_.dh + offset, R, last - first);
    for (int64_t n = 0; n < last - first; ++n) {
      activate_grad(shape_.act, args_.hidden + offset + n * R, args_.dh + offset + n * R, end - begin);
    }
  }

  // q, columns [begin, end)
  void through_w1(int64_t first, int64_t last, int64_t begin, int64_t end) const {
    const int64_t C = shape_.C, R = shape_.R;
    A* q = args_.q + first * C + begin;
    products<T, W>().cols_dot(args_.w1 + begin, C, R, end - begin, args_.dh + first * R, R, q, C, last - first);
    const A pixels = static_cast<A>(shape_.H * shape_.W);
    for (int64_t n = 0; n < last - first; ++n) {
      for (int64_t c = 0; c < end - begin; ++c) {
        q[n * C + c] /= pixels;
      }
    }
  }

  void grad(int64_t n, int64_t tile) const {
    const int64_t offset = n * shape_.C + tiling_.first_channel(tile);
    sweeps().grad(tiling_.view(args_.dout, n, tile), args_.gate + offset, args_.q + offset,
                  tiling_.view(args_.dx, n, tile), tiling_.at(tile), goes_past_cache<T>(shape_));
  }

  const Sweeps<T>& sweeps() const {
    return shape_.channels_last ? kernels<T>().channels_last : kernels<T>().contiguous;
  }

  Shape shape_;
  Backward<T, W> args_;
  Tiling tiling_;
};

}  // namespace

template <class T, class W>
void forward(const Shape& shape, const Forward<T, W>& args) {
  ForwardPass<T, W>(shape, args).run();
}

template <class T, class W>
void backward(const Shape& shape, const Backward<T, W>& args) {
  BackwardPass<T, W>(shape, args).run();
}

template void forward(const Shape&, const Forward<float, float>&);
template void forward(const Shape&, const Forward<double, double>&);
template void forward(const Shape&, const Forward<c10::BFloat16, c10::BFloat16>&);
template void forward(const Shape&, const Forward<c10::BFloat16, float>&);
template void forward(const Shape&, const Forward<c10::Half, c10::Half>&);
template void forward(const Shape&, const Forward<c10::Half, float>&);
template void backward(const Shape&, const Backward<float, float>&);
template void backward(const Shape&, const Backward<double, double>&);
template void backward(const Shape&, const Backward<c10::BFloat16, c10::BFloat16>&);
template void backward(const Shape&, const Backward<c10::BFloat16, float>&);
template void backward(const Shape&, const Backward<c10::Half, c10::Half>&);
template void backward(const Shape&, const Backward<c10::Half, float>&);

}  // namespace se
