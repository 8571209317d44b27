// The residual tail's forward pass on the CPU, and the statistics of a batch alone: one parallel region each.
// Mathematics in kernels/residual_tail.py.
#include <cmath>
#include <memory>

#include "excitation.h"
#include "tail_moments.h"
#include "tail_pass.h"

namespace se {
namespace {

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
    const bool normed = shape_.shortcut == Shortcut::normed;
    const Affine<A> affine{args_.norm.stats, normed ? args_.norm2.stats : nullptr,
                           shape_.with_se ? args_.se.gate : nullptr};
    const std::unique_ptr<A[]> per_sample(new A[2 * shape_.C]);
    units_.sweep_back(team, first, last, [&](const Unit& unit) {
      TailBlock<T> block = this->block_of(unit, affine, per_sample.get());
      for (int64_t n = unit.last - 1; n >= unit.first; --n) {
        this->enter_sample(unit, n, affine, args_, per_sample.get(), block);
        block.out = units_.tiling.view(args_.out, n, unit.tile);
        block.out_past_cache = this->past_cache(block.out);
        sweeps_.apply(block);
      }
    });
  }

  TailForward<T, W> args_;
  std::optional<Moments<T>> moments_, moments2_;
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

}  // namespace se
