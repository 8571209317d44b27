// The residual tail's backward pass on the CPU: one parallel region. Mathematics in kernels/residual_tail.py.
#include <memory>

#include "excitation.h"
#include "tail_pass.h"

namespace se {
namespace {

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
        affine_{args.stats, args.stats2, shape.with_se ? args.se.gate : nullptr},
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

  void sums(const Team& team, int64_t first, int64_t last) const {
    if (args_.se.dw2) {
      const int64_t R = shape_.R;
      team.share((last - first) * R, kColumnBlock, [&](int64_t begin, int64_t end) {
        activate(shape_.act, args_.se.hidden + first * R + begin, args_.se.active + first * R + begin, end - begin);
      });
    }
    const std::unique_ptr<A[]> per_sample(new A[2 * shape_.C]);
    units_.sweep(team, first, last, [&](const Unit& unit) {
      TailBlock<T> block = this->block_of(unit, affine_, per_sample.get());
      const int64_t c = units_.tiling.first_channel(unit.tile);
      for (int64_t n = unit.first; n < unit.last; ++n) {
        this->enter_sample(unit, n, affine_, args_, per_sample.get(), block);
        block.dout = units_.tiling.view(args_.dout, n, unit.tile);
        const int64_t at = row(unit, n) + c;
        block.sum = sums_.get() + at;
        block.dot = dots_.get() + at;
        block.dot2 = normed_ ? dots2_.get() + at : nullptr;
        for (double* total : {block.sum, block.dot, block.dot2}) {
          if (total && (shape_.with_se || n == unit.first)) {
            std::fill_n(total, block.extent.C, 0.);
          }
        }
        sweeps_.sums(block);
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
    units_.sweep_back(team, first, last, [&](const Unit& unit) {
      const int64_t c = tiling.first_channel(unit.tile);
      TailBlock<T> block = this->block_of(unit, affine_, per_sample);
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
        this->enter_sample(unit, n, affine_, args_, per_sample, block);
        block.dout = tiling.view(args_.dout, n, unit.tile);
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
        sweeps_.grads(block);
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
  Affine<A> affine_;
  int64_t P_;
  std::unique_ptr<double[]> sums_, dots_, dots2_;  // (N with SE, or groups; P; C)
};

}  // namespace

template <class T, class W>
void tail_backward(const TailShape& shape, const TailBackward<T, W>& args) {
  TailBackwardPass<T, W>(shape, args).run();
}

template void tail_backward(const TailShape&, const TailBackward<float, float>&);
template void tail_backward(const TailShape&, const TailBackward<double, double>&);
template void tail_backward(const TailShape&, const TailBackward<c10::BFloat16, c10::BFloat16>&);
template void tail_backward(const TailShape&, const TailBackward<c10::BFloat16, float>&);
template void tail_backward(const TailShape&, const TailBackward<c10::Half, c10::Half>&);
template void tail_backward(const TailShape&, const TailBackward<c10::Half, float>&);

}  // namespace se
