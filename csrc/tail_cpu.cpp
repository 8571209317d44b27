// The residual tail on the CPU: one parallel region per direction. Mathematics in kernels/residual_tail.py.
//
// A team of threads sweeps the batch, merges what the sweep gave by channel, takes the squeeze-and-excitation, and
// sweeps again, each thread its own units in the reverse order: what it read last is still in its cache. Where no
// statistics of the batch are wanted, the samples are taken in blocks that the caches hold. Results do not depend on
// the number of threads; there are no atomics.
#include <cmath>
#include <memory>

#include "excitation.h"
#include "tail_moments.h"

namespace se {
namespace {

// What the two directions share.
template <class T>
class TailPass {
 protected:
  using A = acc_t<T>;

  TailPass(const TailShape& shape, Extent extent, int64_t block)
      : shape_(shape),
        units_(shape, extent, sizeof(T)),
        block_(ceil_div(block, units_.samples()) * units_.samples()),
        outgrows_cache_(outgrows_cache<T>(shape)),
        sweeps_(tail_sweeps<T>(shape.channels_last)) {}

  bool past_cache(const View<T>& result) const {
    return result.data && outgrows_cache_ && is_resident(result.data);
  }

  // The mask is dense: (N, HW, C / 8) or (N, C, HW / 8), rounded up
  View<uint8_t> bits(const uint8_t* mask, int64_t n, int64_t tile) const {
    const Tiling& tiling = units_.tiling;
    const int64_t HW = shape_.H * shape_.W, c = tiling.first_channel(tile);
    const int64_t pixel = tiling.first_pixel(tile) * (tiling.along_w() ? 1 : tiling.extent.W);
    auto* data = const_cast<uint8_t*>(mask);
    if (!mask) {
      return {nullptr, 0, 0, 0};
    }
    if (shape_.channels_last) {
      const int64_t row = ceil_div(shape_.C, 8);
      return {data + (n * HW + pixel) * row + c / 8, 0, tiling.extent.W * row, row};
    }
    const int64_t row = ceil_div(HW, 8);
    return {data + (n * shape_.C + c) * row + pixel / 8, row, 0, 0};
  }

  template <class F>
  void for_each_block(const F& f) const {
    for (int64_t first = 0; first < shape_.N; first += block_) {
      f(first, std::min(first + block_, shape_.N));
    }
  }

  TailShape shape_;
  Units units_;
  int64_t block_;
  bool outgrows_cache_;
  const TailSweeps<T>& sweeps_;
};

template <class T>
class MomentsPass : TailPass<T> {
  using TailPass<T>::shape_, TailPass<T>::units_;

 public:
  MomentsPass(const TailShape& shape, TailMoments<T> args)
      : TailPass<T>(shape, collapse(shape, args.x), shape.N),
        args_(args),
        moments_(shape, units_, args.x, args.sample_mean, nullptr) {}

  void run() const {
    in_team(shape_, [&](const Team& team) {
      units_.sweep(team, 0, shape_.N, [&](const Unit& unit) { moments_.add(unit); });
      team.wait();
      share_channels(team, shape_.C, [&](int64_t c, int64_t count) {
        moments_.merge(c, count, args_.mean + c, args_.m2 + c);
        for (int64_t n = 0; args_.sample_mean && n < shape_.N; ++n) {
          moments_.sample_mean(n, c, count, args_.sample_mean + n * shape_.C + c);
        }
      });
    });
  }

 private:
  TailMoments<T> args_;
  Moments<T> moments_;
};

template <class T, class W>
class TailForwardPass : TailPass<T> {
  using typename TailPass<T>::A;
  using TailPass<T>::shape_, TailPass<T>::units_, TailPass<T>::sweeps_;

 public:
  TailForwardPass(const TailShape& shape, TailForward<T, W> args)
      : TailPass<T>(shape, collapse(shape, args.y, args.residual, args.out), samples(shape, args)), args_(args) {
    if (args.norm.batch || (shape.with_se && !args.sample_mean)) {
      moments_.emplace(shape, units_, args.y, shape.with_se, args.norm.batch ? nullptr : args.norm.stats);
    }
    if (args.norm2.batch) {
      moments2_.emplace(shape, units_, args.residual, false, nullptr);
    }
  }

  void run() const {
    in_team(shape_, [&](const Team& team) {
      this->for_each_block([&](int64_t first, int64_t last) {
        if (moments_ || moments2_) {
          units_.sweep(team, first, last, [&](const Unit& unit) {
            for (const auto* moments : {&moments_, &moments2_}) {
              if (*moments) {
                (*moments)->add(unit);
              }
            }
          });
          team.wait();
        }
        if (moments_ || moments2_ || shape_.with_se) {
          share_channels(team, shape_.C, [&](int64_t c, int64_t count) { statistics(first, last, c, count); });
          team.wait();
        }
        if (shape_.with_se) {
          squeeze(team, shape_, args_.se, first, last);
          excite(team, shape_, args_.se, first, last);
        }
        apply(team, first, last);
      });
    });
  }

 private:
  static int64_t samples(const TailShape& shape, const TailForward<T, W>& args) {
    return args.norm.batch || args.norm2.batch || !shape.with_se ? shape.N : samples_per_block<T, W>(shape, 1);
  }

  void statistics(int64_t first, int64_t last, int64_t c, int64_t count) const {
    double mean[kMergeBlock], m2[kMergeBlock];
    if (args_.norm.batch) {
      moments_->merge(c, count, mean, m2);
      fill_rows(args_.norm, c, count, mean, m2);
    }
    if (args_.norm2.batch) {
      moments2_->merge(c, count, mean, m2);
      fill_rows(args_.norm2, c, count, mean, m2);
    }
    const int64_t C = shape_.C;
    const A* stats = args_.norm.stats + c;
    for (int64_t n = first; shape_.with_se && n < last; ++n) {
      const double* sample_mean = args_.sample_mean ? args_.sample_mean + n * C + c : mean;
      if (!args_.sample_mean) {
        moments_->sample_mean(n, c, count, mean);
      }
      A *deviation = args_.deviation + n * C + c, *pooled = args_.se.pooled + n * C + c;
      for (int64_t i = 0; i < count; ++i) {
        deviation[i] = static_cast<A>(sample_mean[i] - stats[i]);
        pooled[i] = stats[kRowScale * C + i] * deviation[i] + stats[kRowShift * C + i];
      }
    }
  }

  void fill_rows(const NormArgs<A>& norm, int64_t c, int64_t count, const double* mean, const double* m2) const {
    const int64_t C = shape_.C;
    const auto values = static_cast<double>(shape_.N * shape_.H * shape_.W);
    A* stats = norm.stats + c;
    for (int64_t i = 0; i < count; ++i) {
      const double invstd = 1 / std::sqrt(m2[i] / values + norm.eps);
      stats[kRowMean * C + i] = static_cast<A>(mean[i]);
      stats[kRowInvstd * C + i] = static_cast<A>(invstd);
      stats[kRowScale * C + i] = static_cast<A>(norm.weight ? invstd * norm.weight[c + i] : invstd);
      stats[kRowShift * C + i] = norm.bias ? norm.bias[c + i] : A(0);
      stats[kRowUnbiasedVar * C + i] = static_cast<A>(m2[i] / (values - 1));
    }
  }

  void apply(const Team& team, int64_t first, int64_t last) const {
    const Tiling& tiling = units_.tiling;
    const int64_t C = shape_.C;
    const bool normed = shape_.shortcut == Shortcut::normed, own = shape_.with_se || normed;
    const std::unique_ptr<A[]> scratch(own ? new A[2 * C] : nullptr);
    const auto sweep = sweeps_.apply[static_cast<int>(shape_.tail_act)][static_cast<int>(shape_.shortcut)];
    units_.sweep_back(team, first, last, [&](const Unit& unit) {
      const int64_t c = tiling.first_channel(unit.tile);
      const A *stats = args_.norm.stats + c, *stats2 = normed ? args_.norm2.stats + c : nullptr;
      TailBlock<T> block{};
      block.extent = tiling.at(unit.tile);
      block.coefficient[kMean] = stats + kRowMean * C;
      block.coefficient[kScale] = own ? scratch.get() : stats + kRowScale * C;
      block.coefficient[kShift] = own ? scratch.get() + C : stats + kRowShift * C;
      if (normed) {
        block.coefficient[kMean2] = stats2 + kRowMean * C;
        block.coefficient[kScale2] = stats2 + kRowScale * C;
      }
      for (int64_t n = unit.last - 1; n >= unit.first; --n) {
        if (own) {
          gated(stats, stats2, shape_.with_se ? args_.se.gate + n * C + c : nullptr, block.extent.C, C, scratch.get(),
                scratch.get() + C);
        }
        block.y = tiling.view(args_.y, n, unit.tile);
        block.residual = view_or_none(tiling, args_.residual, n, unit.tile);
        block.out = tiling.view(args_.out, n, unit.tile);
        block.bits = this->bits(args_.mask, n, unit.tile);
        block.out_past_cache = this->past_cache(block.out);
        sweep(block);
      }
    });
  }

 public:
  // scale and shift of one sample, with its gate and the residual's shift in them: the backward pass has to make the
  // same numbers.
  static void gated(const A* stats, const A* stats2, const A* gate, int64_t count, int64_t C, A* scale, A* shift) {
    for (int64_t i = 0; i < count; ++i) {
      const A s = gate ? gate[i] : A(1);
      scale[i] = stats[kRowScale * C + i] * s;
      shift[i] = stats[kRowShift * C + i] * s;
    }
    for (int64_t i = 0; stats2 && i < count; ++i) {
      shift[i] += stats2[kRowShift * C + i];
    }
  }

 private:
  TailForward<T, W> args_;
  std::optional<Moments<T>> moments_, moments2_;
};

template <class T, class W>
class TailBackwardPass : TailPass<T> {
  using typename TailPass<T>::A;
  using TailPass<T>::shape_, TailPass<T>::units_, TailPass<T>::sweeps_;

 public:
  TailBackwardPass(const TailShape& shape, TailBackward<T, W> args)
      : TailPass<T>(shape, collapse(shape, args.dout, args.y, args.residual, args.dy, args.dresidual),
                    samples(shape, args)),
        args_(args),
        normed_(shape.shortcut == Shortcut::normed),
        P_(units_.tiling.pixel_tiles()) {
    if (args.sweep_sums) {
      const int64_t rows = shape.with_se ? shape.N : units_.groups();
      sums_.reset(new double[rows * P_ * shape.C]);
      dots_.reset(new double[rows * P_ * shape.C]);
      dots2_.reset(normed_ ? new double[rows * P_ * shape.C] : nullptr);
    }
  }

  void run() const {
    const bool whole = this->block_ >= shape_.N;
    in_team(shape_, [&](const Team& team) {
      this->for_each_block([&](int64_t first, int64_t last) {
        if (args_.sweep_sums) {
          sums(team, first, last);
          share_channels(team, shape_.C, [&](int64_t c, int64_t count) { merge(first, last, c, count); });
          team.wait();
          if (shape_.with_se) {
            through_excitation(team, first, last);
          }
          if (whole) {
            totals(team);
          }
        }
        if (args_.sweep_grads) {
          grads(team, first, last);
        }
      });
      if (args_.sweep_sums) {
        if (!whole) {
          totals(team);
        }
        if (shape_.with_se) {
          weight_gradients(team, shape_, args_.se);
        }
      }
    });
  }

 private:
  static int64_t samples(const TailShape& shape, const TailBackward<T, W>& args) {
    const bool at_once = args.through_statistics || args.through_statistics2 || !shape.with_se || !args.sweep_sums;
    return at_once ? shape.N : samples_per_block<T, W>(shape, 2);
  }

  int64_t row(const Unit& unit, int64_t n) const {
    return ((shape_.with_se ? n : unit.group) * P_ + units_.pixel_tile(unit.tile)) * shape_.C;
  }

  // What is the same for all samples of a unit; per_sample has room for scale, shift and drift
  TailBlock<T> block_of(const Unit& unit, A* per_sample) const {
    const int64_t C = shape_.C, c = units_.tiling.first_channel(unit.tile);
    TailBlock<T> block{};
    block.extent = units_.tiling.at(unit.tile);
    const bool own = shape_.with_se || normed_;
    block.coefficient[kMean] = args_.stats + kRowMean * C + c;
    block.coefficient[kScale] = own ? per_sample : args_.stats + kRowScale * C + c;
    block.coefficient[kShift] = own ? per_sample + C : args_.stats + kRowShift * C + c;
    if (normed_) {
      block.coefficient[kMean2] = args_.stats2 + kRowMean * C + c;
      block.coefficient[kScale2] = args_.stats2 + kRowScale * C + c;
    }
    return block;
  }

  void enter_sample(const Unit& unit, int64_t n, A* per_sample, TailBlock<T>& block) const {
    const int64_t C = shape_.C, c = units_.tiling.first_channel(unit.tile);
    if (shape_.with_se || normed_) {
      TailForwardPass<T, W>::gated(args_.stats + c, normed_ ? args_.stats2 + c : nullptr,
                                   shape_.with_se ? args_.se.gate + n * C + c : nullptr, block.extent.C, C, per_sample,
                                   per_sample + C);
    }
    block.y = units_.tiling.view(args_.y, n, unit.tile);
    block.residual = view_or_none(units_.tiling, args_.residual, n, unit.tile);
    block.dout = units_.tiling.view(args_.dout, n, unit.tile);
    block.bits = this->bits(args_.mask, n, unit.tile);
  }

  void sums(const Team& team, int64_t first, int64_t last) const {
    if (args_.se.dw2) {
      const int64_t R = shape_.R;
      team.share((last - first) * R, kColumnBlock, [&](int64_t begin, int64_t end) {
        activate(shape_.act, args_.se.hidden + first * R + begin, args_.se.active + first * R + begin, end - begin);
      });
    }
    const std::unique_ptr<A[]> per_sample(new A[2 * shape_.C]);
    const auto sweep = sweeps_.sums[static_cast<int>(shape_.tail_act)][static_cast<int>(shape_.shortcut)];
    units_.sweep(team, first, last, [&](const Unit& unit) {
      TailBlock<T> block = block_of(unit, per_sample.get());
      const int64_t c = units_.tiling.first_channel(unit.tile);
      for (int64_t n = unit.first; n < unit.last; ++n) {
        enter_sample(unit, n, per_sample.get(), block);
        const int64_t at = row(unit, n) + c;
        block.sum = sums_.get() + at;
        block.dot = dots_.get() + at;
        block.dot2 = normed_ ? dots2_.get() + at : nullptr;
        for (double* total : {block.sum, block.dot, block.dot2}) {
          if (total && (shape_.with_se || n == unit.first)) {
            std::fill_n(total, block.extent.C, 0.);
          }
        }
        sweep(block);
      }
    });
    team.wait();
  }

  // The tiles' sums into those of the samples, or groups, in the rows of the first tile; with SE, dz.
  void merge(int64_t first, int64_t last, int64_t c, int64_t count) const {
    const int64_t C = shape_.C, begin = shape_.with_se ? first : first / units_.samples();
    const int64_t end = shape_.with_se ? last : ceil_div(last, units_.samples());
    for (int64_t r = begin; r < end; ++r) {
      double *sum = sums_.get() + r * P_ * C + c, *dot = dots_.get() + r * P_ * C + c;
      double* dot2 = normed_ ? dots2_.get() + r * P_ * C + c : nullptr;
      for (double* total : {sum, dot, dot2}) {
        for (int64_t p = 1; total && p < P_; ++p) {
          for (int64_t i = 0; i < count; ++i) {
            total[i] += total[p * C + i];
          }
        }
      }
      if (shape_.with_se) {
        const A *scale = args_.stats + kRowScale * C + c, *shift = args_.stats + kRowShift * C + c;
        for (int64_t i = 0; i < count; ++i) {
          const A ds = static_cast<A>(scale[i] * dot[i] + shift[i] * sum[i]);
          args_.se.dz[r * C + c + i] = gate_backward(shape_.gate_fn, ds, args_.se.gate[r * C + c + i]);
        }
      }
    }
  }

  void through_excitation(const Team& team, int64_t first, int64_t last) const {
    if (args_.se.dh) {
      through_w2(team, shape_, args_.se, first, last);
    }
    if (args_.se.q) {
      through_w1(team, shape_, args_.se, first, last);
    }
  }

  // The gradients of the norms' weights and biases.
  void totals(const Team& team) const {
    const int64_t C = shape_.C, HW = shape_.H * shape_.W, rows = shape_.with_se ? shape_.N : units_.groups();
    const auto values = static_cast<double>(shape_.N * HW);
    const auto write = [&](A* gradient, int share, int64_t c, double total) {
      if (gradient) {
        gradient[c] = static_cast<A>(total);
      }
      if (args_.shares) {
        args_.shares[share * C + c] = static_cast<A>(total / values);
      }
    };
    share_channels(team, C, [&](int64_t begin, int64_t count) {
      double dweight[kMergeBlock] = {}, dbias[kMergeBlock] = {};
      double dweight2[kMergeBlock] = {}, dbias2[kMergeBlock] = {};
      for (int64_t r = 0; r < rows; ++r) {
        const double *sum = sums_.get() + r * P_ * C + begin, *dot = dots_.get() + r * P_ * C + begin;
        if (shape_.with_se) {
          const A *s = args_.se.gate + r * C + begin, *deviation = args_.deviation + r * C + begin;
          const A* q = args_.se.q ? args_.se.q + r * C + begin : nullptr;
          for (int64_t i = 0; i < count; ++i) {
            const double from_pool = q ? static_cast<double>(HW) * q[i] : 0;
            dbias[i] += s[i] * sum[i] + from_pool;
            dweight[i] += s[i] * dot[i] + from_pool * deviation[i];
          }
        } else {
          for (int64_t i = 0; i < count; ++i) {
            dbias[i] += sum[i];
            dweight[i] += dot[i];
          }
        }
        for (int64_t i = 0; normed_ && i < count; ++i) {
          dbias2[i] += sum[i];
          dweight2[i] += dots2_[r * P_ * C + begin + i];
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t c = begin + i;
        write(args_.dweight, 0, c, dweight[i] * args_.stats[kRowInvstd * C + c]);
        write(args_.dbias, 1, c, dbias[i]);
        if (normed_) {
          write(args_.dweight2, 2, c, dweight2[i] * args_.stats2[kRowInvstd * C + c]);
          write(args_.dbias2, 3, c, dbias2[i]);
        }
      }
    });
    team.wait();
  }

  void grads(const Team& team, int64_t first, int64_t last) const {
    const Tiling& tiling = units_.tiling;
    const int64_t C = shape_.C;
    const std::unique_ptr<A[]> scratch(new A[7 * C]);
    A *per_sample = scratch.get(), *sample_drift = per_sample + 2 * C, *slope = sample_drift + C, *drift = slope + C;
    A *slope2 = drift + C, *drift2 = slope2 + C;
    if (args_.through_statistics) {
      through_statistics(args_.stats, 0, slope, drift);
    }
    if (args_.through_statistics2) {
      through_statistics(args_.stats2, 2, slope2, drift2);
    }
    const bool with_q = shape_.with_se && args_.dy.data;
    const auto sweep = sweeps_.grads[static_cast<int>(shape_.tail_act)][static_cast<int>(shape_.shortcut)];
    units_.sweep_back(team, first, last, [&](const Unit& unit) {
      const int64_t c = tiling.first_channel(unit.tile);
      TailBlock<T> block = block_of(unit, per_sample);
      block.through_statistics = args_.through_statistics && args_.dy.data;
      block.through_statistics2 = args_.through_statistics2 && args_.dresidual.data;
      if (block.through_statistics) {
        block.coefficient[kSlope] = slope + c;
        block.coefficient[kDrift] = drift + c;
      }
      if (block.through_statistics2) {
        block.coefficient[kSlope2] = slope2 + c;
        block.coefficient[kDrift2] = drift2 + c;
      }
      for (int64_t n = unit.last - 1; n >= unit.first; --n) {
        enter_sample(unit, n, per_sample, block);
        if (with_q) {
          const A *q = args_.se.q + n * C + c, *scale = args_.stats + kRowScale * C + c;
          for (int64_t i = 0; i < block.extent.C; ++i) {
            sample_drift[i] = scale[i] * q[i] + (args_.through_statistics ? drift[c + i] : A(0));
          }
          block.coefficient[kDrift] = sample_drift;
        }
        block.dy = view_or_none(tiling, args_.dy, n, unit.tile);
        block.dresidual = view_or_none(tiling, args_.dresidual, n, unit.tile);
        block.dy_past_cache = this->past_cache(block.dy);
        block.dresidual_past_cache = this->past_cache(block.dresidual);
        sweep(block);
      }
    });
  }

  void through_statistics(const A* stats, int share, A* slope, A* drift) const {
    const int64_t C = shape_.C;
    const A *dweight = args_.shares + share * C, *dbias = dweight + C;
    for (int64_t c = 0; c < C; ++c) {
      const A scale = stats[kRowScale * C + c];
      slope[c] = -scale * stats[kRowInvstd * C + c] * dweight[c];
      drift[c] = -scale * dbias[c];
    }
  }

  TailBackward<T, W> args_;
  bool normed_;
  int64_t P_;
  std::unique_ptr<double[]> sums_, dots_, dots2_;  // (N with SE, or groups; P; C)
};

}  // namespace

template <class T>
void tail_moments(const TailShape& shape, const TailMoments<T>& args) {
  MomentsPass<T>(shape, args).run();
}

template <class T, class W>
void tail_forward(const TailShape& shape, const TailForward<T, W>& args) {
  TailForwardPass<T, W>(shape, args).run();
}

template <class T, class W>
void tail_backward(const TailShape& shape, const TailBackward<T, W>& args) {
  TailBackwardPass<T, W>(shape, args).run();
}

template void tail_moments(const TailShape&, const TailMoments<float>&);
template void tail_moments(const TailShape&, const TailMoments<double>&);
template void tail_moments(const TailShape&, const TailMoments<c10::BFloat16>&);
template void tail_moments(const TailShape&, const TailMoments<c10::Half>&);
template void tail_forward(const TailShape&, const TailForward<float, float>&);
template void tail_forward(const TailShape&, const TailForward<double, double>&);
template void tail_forward(const TailShape&, const TailForward<c10::BFloat16, c10::BFloat16>&);
template void tail_forward(const TailShape&, const TailForward<c10::BFloat16, float>&);
template void tail_forward(const TailShape&, const TailForward<c10::Half, c10::Half>&);
template void tail_forward(const TailShape&, const TailForward<c10::Half, float>&);
template void tail_backward(const TailShape&, const TailBackward<float, float>&);
template void tail_backward(const TailShape&, const TailBackward<double, double>&);
template void tail_backward(const TailShape&, const TailBackward<c10::BFloat16, c10::BFloat16>&);
template void tail_backward(const TailShape&, const TailBackward<c10::BFloat16, float>&);
template void tail_backward(const TailShape&, const TailBackward<c10::Half, c10::Half>&);
template void tail_backward(const TailShape&, const TailBackward<c10::Half, float>&);

}  // namespace se
