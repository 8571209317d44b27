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
#include <ATen/Version.h>

#include <string>
#include <string_view>

#include "se_activations.h"
#include "se_division.h"

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
      : shape_(shape),
        args_(args),
        tiling_(shape.channels_last, collapse(shape, args_.x, args_.out), sizeof(T)),
        past_cache_(goes_past_cache(shape, args.out.data)) {}

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
    const int64_t groups = (shape_.N + group - 1) / group;
    parallel(groups, group * shape_.C * shape_.H * shape_.W, kElementGrain, [&](int64_t begin, int64_t end) {
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
                   past_cache_);
  }

  const Sweeps<T>& sweeps() const {
    return shape_.channels_last ? kernels<T>().channels_last : kernels<T>().contiguous;
  }

  Shape shape_;
  Forward<T, W> args_;
  Tiling tiling_;
  bool past_cache_;
};

template <class T, class W>
class BackwardPass {
 public:
  BackwardPass(const Shape& shape, const Backward<T, W>& args)
      : shape_(shape),
        args_(args),
        tiling_(shape.channels_last, collapse(shape, args_.dout, args_.x, args_.dx), sizeof(T)),
        past_cache_(goes_past_cache(shape, args.dx.data)) {}

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
    const int64_t groups = (shape_.N + group - 1) / group;
    parallel(groups, group * shape_.C * shape_.H * shape_.W, kElementGrain, [&](int64_t begin, int64_t end) {
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
      args_.dz[i] = gate_backward(shape_.gate_fn, static_cast<A>(total), args_.gate[i]);
    };
  }

  // dh, columns [begin, end)
  void through_w2(int64_t first, int64_t last, int64_t begin, int64_t end) const {
    const int64_t C = shape_.C, R = shape_.R, offset = first * R + begin;
    products<T, W>().cols_dot(args_.w2 + begin, R, C, end - begin, args_.dz + first * C, C, args_.dh + offset, R,
                              last - first);
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
                  tiling_.view(args_.dx, n, tile), tiling_.at(tile), past_cache_);
  }

  const Sweeps<T>& sweeps() const {
    return shape_.channels_last ? kernels<T>().channels_last : kernels<T>().contiguous;
  }

  Shape shape_;
  Backward<T, W> args_;
  Tiling tiling_;
  bool past_cache_;
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
