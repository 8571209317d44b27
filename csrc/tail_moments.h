// Mean and variance by channel, and means by sample, from sums about a pivot of each unit.
#pragma once

#include <memory>

#include "tail_units.h"

namespace se {
namespace {

// The moments of one tensor's units, and what follows from them.
template <class T>
class Moments {
  using A = acc_t<T>;

 public:
  // by_sample: sample means are wanted. `given` are pivots for all, or null.
  Moments(const Shape& shape, const Units& units, Activation<const T> x, bool by_sample, const A* given)
      : shape_(shape),
        units_(units),
        x_(x),
        by_sample_(by_sample),
        given_(given),
        P_(units.tiling.pixel_tiles()),
        pivots_(given ? nullptr : new A[units.groups() * P_ * shape.C]),
        squares_(new double[units.groups() * P_ * shape.C]),
        sums_(new double[(by_sample ? shape.N : units.groups()) * P_ * shape.C]),
        sweeps_(tail_sweeps<T>(shape.channels_last)) {}

  void add(const Unit& unit) const {
    const Extent extent = units_.tiling.at(unit.tile);
    const int64_t p = units_.pixel_tile(unit.tile), c = units_.tiling.first_channel(unit.tile);
    double* square = squares_.get() + (unit.group * P_ + p) * shape_.C + c;
    std::fill_n(square, extent.C, 0.);
    const A* pivot = pivot_of(unit.group, p) + c;
    if (!given_) {
      sweeps_.pivot(units_.tiling.view(x_, unit.first, unit.tile), extent, pivots_.get() + (pivot - pivots_.get()));
    }
    for (int64_t n = unit.first; n < unit.last; ++n) {
      double* sum = sum_row(unit.group, n, p) + c;
      if (by_sample_ || n == unit.first) {
        std::fill_n(sum, extent.C, 0.);
      }
      sweeps_.moments(units_.tiling.view(x_, n, unit.tile), extent, pivot, sum, square);
    }
  }

  // Of the whole batch, for `count` channels, at most kMergeBlock: by Chan's rule, in double
  void merge(int64_t c, int64_t count, double* mean, double* m2) const {
    const auto total = static_cast<double>(shape_.N * shape_.H * shape_.W);
    std::fill_n(mean, count, 0.);
    std::fill_n(m2, count, 0.);
    for_each_part(c, count, [&](const A* pivot, const double* sum, const double*, double values) {
      for (int64_t i = 0; i < count; ++i) {
        mean[i] += pivot[i] * values + sum[i];
      }
    });
    for (int64_t i = 0; i < count; ++i) {
      mean[i] /= total;
    }
    for_each_part(c, count, [&](const A* pivot, const double* sum, const double* square, double values) {
      for (int64_t i = 0; i < count; ++i) {
        const double from_pivot = sum[i] / values, between = pivot[i] + from_pivot - mean[i];
        m2[i] += (square[i] - sum[i] * from_pivot) + values * between * between;
      }
    });
    for (int64_t i = 0; i < count; ++i) {
      m2[i] = m2[i] < 0 ? 0 : m2[i];  // by rounding, where all values are alike
    }
  }

  void sample_mean(int64_t n, int64_t c, int64_t count, double* mean) const {
    std::fill_n(mean, count, 0.);
    const int64_t group = n / units_.samples();
    for (int64_t p = 0; p < P_; ++p) {
      const A* pivot = pivot_of(group, p) + c;
      const double* sum = sum_row(group, n, p) + c;
      const auto pixels = static_cast<double>(units_.pixels_of(p));
      for (int64_t i = 0; i < count; ++i) {
        mean[i] += pivot[i] * pixels + sum[i];
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      mean[i] /= static_cast<double>(shape_.H * shape_.W);
    }
  }

 private:
  const A* pivot_of(int64_t group, int64_t p) const {
    return given_ ? given_ : pivots_.get() + (group * P_ + p) * shape_.C;
  }
  double* sum_row(int64_t group, int64_t n, int64_t p) const {
    return sums_.get() + ((by_sample_ ? n : group) * P_ + p) * shape_.C;
  }

  // f(pivot, sum, square, number of values) for every group and tile of pixels
  template <class F>
  void for_each_part(int64_t c, int64_t count, const F& f) const {
    double added[kMergeBlock];
    for (int64_t group = 0; group < units_.groups(); ++group) {
      const int64_t samples = units_.samples_of(group), n = group * units_.samples();
      for (int64_t p = 0; p < P_; ++p) {
        const double* sum = sum_row(group, n, p) + c;
        if (by_sample_ && samples > 1) {
          std::copy_n(sum, count, added);
          for (int64_t other = 1; other < samples; ++other) {
            const double* row = sum_row(group, n + other, p) + c;
            for (int64_t i = 0; i < count; ++i) {
              added[i] += row[i];
            }
          }
          sum = added;
        }
        f(pivot_of(group, p) + c, sum, squares_.get() + (group * P_ + p) * shape_.C + c,
          static_cast<double>(samples * units_.pixels_of(p)));
      }
    }
  }

  Shape shape_;
  const Units& units_;
  Activation<const T> x_;
  bool by_sample_;
  const A* given_;
  int64_t P_;
  std::unique_ptr<A[]> pivots_;                // (groups, P, C)
  std::unique_ptr<double[]> squares_, sums_;  // (groups, P, C), (N or groups, P, C)
  const TailSweeps<T>& sweeps_;
};

}  // namespace
}  // namespace se
