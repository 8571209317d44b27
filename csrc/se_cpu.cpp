// Squeeze-and-Excitation on the CPU: one parallel region per direction. Mathematics in se.h.
//
// A team of threads takes the batch block by block through pool, products and scale, with a barrier after each step.
// The threads share every step: tiles of samples where an activation is read, rows or columns of a weight matrix in the
// products, so that weights are read once for a whole block. A thread scales the tiles that it pooled, last one first,
// while they are in its cache. Sums are divided by shape alone, so that results do not depend on the number of threads;
// there are no atomics.
#include <ATen/Version.h>

#include <memory>
#include <string>
#include <string_view>

#include "excitation.h"

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
template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();
template const Kernels<c10::BFloat16>& kernels<c10::BFloat16>();
template const Kernels<c10::Half>& kernels<c10::Half>();

namespace {

// What the two directions share: the sweeps over tiles and the sums over a sample's pixels.
template <class T>
class Pass {
 protected:
  using A = acc_t<T>;

  Pass(const Shape& shape, Extent extent, int64_t samples_per_block)
      : shape_(shape),
        tiling_(shape.channels_last, extent, sizeof(T)),
        outgrows_cache_(outgrows_cache<T>(shape)),
        block_(samples_per_block),
        partial_(new double[block_ * tiling_.pixel_tiles() * shape.C]),
        sweeps_(shape.channels_last ? kernels<T>().channels_last : kernels<T>().contiguous) {}

  // f(first, last) for every block of samples [first, last)
  template <class F>
  void for_each_block(const F& f) const {
    for (int64_t first = 0; first < shape_.N; first += block_) {
      f(first, std::min(first + block_, shape_.N));
    }
  }

  // Sums over (h, w) for samples [first, last): sum_tile(n, tile, total) adds a tile's to total, finish(n, c, sum)
  // takes each result.
  template <class SumTile, class Finish>
  void sum_pixels(const Team& team, int64_t first, int64_t last, const SumTile& sum_tile, const Finish& finish) const {
    const int64_t C = shape_.C, P = tiling_.pixel_tiles();
    const auto finish_channels = [&](int64_t n, int64_t begin, int64_t end) {
      double* total = partial_.get() + (n - first) * P * C;
      for (int64_t p = 1; p < P; ++p) {
        for (int64_t c = begin; c < end; ++c) {
          total[c] += total[p * C + c];
        }
      }
      for (int64_t c = begin; c < end; ++c) {
        finish(n, c, total[c]);
      }
    };
    team.share((last - first) * tiling_.count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = first + i / tiling_.count(), tile = i % tiling_.count();
        const int64_t c = tiling_.first_channel(tile), count = tiling_.at(tile).C;
        double* total = partial_.get() + ((n - first) * P + tiling_.first_pixel(tile) / tiling_.pixels) * C + c;
        std::fill_n(total, count, 0.);
        sum_tile(n, tile, total);
        if (P == 1) {
          finish_channels(n, c, c + count);
        }
      }
    });
    if (P > 1) {
      team.wait();
      team.share((last - first) * C, kColumnBlock, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end;) {
          const int64_t n = i / C, row_end = std::min((n + 1) * C, end);
          finish_channels(first + n, i - n * C, row_end - n * C);
          i = row_end;
        }
      });
    }
    team.wait();
  }

  // f(n, tile) for every tile of samples [first, last): a thread begins with what it summed last, which is still in its
  // cache.
  template <class F>
  void map_pixels(const Team& team, int64_t first, int64_t last, const F& f) const {
    team.share((last - first) * tiling_.count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = end - 1; i >= begin; --i) {
        f(first + i / tiling_.count(), i % tiling_.count());
      }
    });
  }

  // Whether to write a tile past the caches.
  bool past_cache(View<T> result) const {
    return outgrows_cache_ && is_resident(result.data);
  }

  Shape shape_;
  Tiling tiling_;
  bool outgrows_cache_;
  int64_t block_;
  std::unique_ptr<double[]> partial_;  // (block, pixel_tiles, C)
  Sweeps<T> sweeps_;
};

template <class T, class W>
class ForwardPass : Pass<T> {
  using typename Pass<T>::A;
  using Pass<T>::shape_, Pass<T>::tiling_, Pass<T>::sweeps_;

 public:
  ForwardPass(const Shape& shape, Forward<T, W> args)
      : Pass<T>(shape, collapse(shape, args.x, args.out), samples_per_block<T, W>(shape, 1)), args_(args) {}

  void run() const {
    in_team(shape_, [&](const Team& team) {
      this->for_each_block([&](int64_t first, int64_t last) {
        pool(team, first, last);
        squeeze(team, shape_, args_, first, last);
        excite(team, shape_, args_, first, last);
        scale(team, first, last);
      });
    });
  }

 private:
  void pool(const Team& team, int64_t first, int64_t last) const {
    const auto pixels = static_cast<double>(shape_.H * shape_.W);
    this->sum_pixels(
        team, first, last,
        [&](int64_t n, int64_t tile, double* total) {
          sweeps_.sum(tiling_.view(args_.x, n, tile), tiling_.at(tile), total);
        },
        [&](int64_t n, int64_t c, double total) {
          args_.pooled[n * shape_.C + c] = static_cast<A>(total / pixels);
        });
  }

  void scale(const Team& team, int64_t first, int64_t last) const {
    this->map_pixels(team, first, last, [&](int64_t n, int64_t tile) {
      const A* gate = args_.gate + n * shape_.C + tiling_.first_channel(tile);
      const View<T> out = tiling_.view(args_.out, n, tile);
      sweeps_.scale(tiling_.view(args_.x, n, tile), gate, out, tiling_.at(tile), this->past_cache(out));
    });
  }

  Forward<T, W> args_;
};

template <class T, class W>
class BackwardPass : Pass<T> {
  using typename Pass<T>::A;
  using Pass<T>::shape_, Pass<T>::tiling_, Pass<T>::sweeps_;

 public:
  BackwardPass(const Shape& shape, Backward<T, W> args)
      : Pass<T>(shape, collapse(shape, args.dout, args.x, args.dx), samples_per_block<T, W>(shape, 2)), args_(args) {}

  void run() const {
    in_team(shape_, [&](const Team& team) {
      this->for_each_block([&](int64_t first, int64_t last) {
        gate_gradient(team, first, last);
        if (args_.dh) {
          through_w2(team, shape_, args_, first, last);
        }
        if (args_.dx.data) {
          through_w1(team, shape_, args_, first, last);
          input_gradient(team, first, last);
        }
      });
      weight_gradients(team, shape_, args_);
    });
  }

 private:
  // dz, and a on the way
  void gate_gradient(const Team& team, int64_t first, int64_t last) const {
    if (args_.dw2) {
      team.share((last - first) * shape_.R, kColumnBlock, [&](int64_t begin, int64_t end) {
        const int64_t offset = first * shape_.R + begin;
        activate(shape_.act, args_.hidden + offset, args_.active + offset, end - begin);
      });
    }
    this->sum_pixels(
        team, first, last,
        [&](int64_t n, int64_t tile, double* total) {
          sweeps_.dot(tiling_.view(args_.dout, n, tile), tiling_.view(args_.x, n, tile), tiling_.at(tile), total);
        },
        [&](int64_t n, int64_t c, double total) {
          const int64_t i = n * shape_.C + c;
          args_.dz[i] = gate_backward(shape_.gate_fn, static_cast<A>(total), args_.gate[i]);
        });
  }

  void input_gradient(const Team& team, int64_t first, int64_t last) const {
    this->map_pixels(team, first, last, [&](int64_t n, int64_t tile) {
      const int64_t offset = n * shape_.C + tiling_.first_channel(tile);
      const View<T> dx = tiling_.view(args_.dx, n, tile);
      sweeps_.grad(tiling_.view(args_.dout, n, tile), args_.gate + offset, args_.q + offset, dx, tiling_.at(tile),
                   this->past_cache(dx));
    });
  }

  Backward<T, W> args_;
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
