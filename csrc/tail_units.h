// How a tail's batch is divided among a team of threads, by shape alone: units of some samples' tiles.
#pragma once

#include <string_view>

#include "division.h"
#include "tail.h"

namespace se {
namespace {

constexpr int64_t kUnitBytes = 64 * 1024;  // of some samples' tiles: less is not worth sums of its own
constexpr int64_t kMergeBlock = 64;        // channels that a thread merges at a time

template <class T>
const TailSweeps<T>& tail_sweeps(bool channels_last) {
#if defined(__x86_64__)
  static const std::string_view chosen = instruction_set();
  static const TailKernels<T>& table = chosen == "AVX512" ? tail_kernels_avx512<T>()
                                       : chosen == "AVX2" ? tail_kernels_avx2<T>()
                                                          : tail_kernels_baseline<T>();
#else
  static const TailKernels<T>& table = tail_kernels_baseline<T>();
#endif
  return channels_last ? table.channels_last : table.contiguous;
}

// A unit of work: a tile of samples [first, last), which are all or a part of a group.
struct Unit {
  int64_t group, first, last, tile;
};

class Units {
 public:
  Units(const Shape& shape, Extent extent, int64_t element_size)
      : tiling(shape.channels_last, extent, element_size), N_(shape.N) {
    const int64_t tile_bytes = shape.C * shape.H * shape.W * element_size / tiling.count();
    const int64_t most = std::clamp(kUnitBytes / std::max(tile_bytes, int64_t(1)), int64_t(1), N_);
    samples_ = ceil_div(N_, ceil_div(N_, most));
  }
  int64_t groups() const {
    return ceil_div(N_, samples_);
  }
  int64_t samples_of(int64_t group) const {
    return std::min((group + 1) * samples_, N_) - group * samples_;
  }
  int64_t samples() const {
    return samples_;
  }
  int64_t pixels_of(int64_t pixel_tile) const {
    const int64_t left = tiling.length() - pixel_tile * tiling.pixels;
    return std::min(tiling.pixels, left) * (tiling.along_w() ? 1 : tiling.extent.W);
  }
  int64_t pixel_tile(int64_t tile) const {
    return tile / tiling.channel_tiles();
  }
  // f(unit) for this thread's units of samples [first, last); first is the first of a group.
  template <class F>
  void sweep(const Team& team, int64_t first, int64_t last, const F& f) const {
    share(team, first, last, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        f(at(first, last, i));
      }
    });
  }
  template <class F>
  void sweep_back(const Team& team, int64_t first, int64_t last, const F& f) const {
    share(team, first, last, [&](int64_t begin, int64_t end) {
      for (int64_t i = end - 1; i >= begin; --i) {
        f(at(first, last, i));
      }
    });
  }

  Tiling tiling;

 private:
  template <class F>
  void share(const Team& team, int64_t first, int64_t last, const F& f) const {
    team.share(ceil_div(last - first, samples_) * tiling.count(), 1, f);
  }
  Unit at(int64_t first, int64_t last, int64_t i) const {
    const int64_t n = first + i / tiling.count() * samples_;
    return {n / samples_, n, std::min(n + samples_, last), i % tiling.count()};
  }

  int64_t N_, samples_;
};

template <class T>
View<T> view_or_none(const Tiling& tiling, const Activation<T>& a, int64_t n, int64_t tile) {
  return a.data ? tiling.view(a, n, tile) : View<T>{nullptr, 0, 0, 0};
}

// f(c, count) for this thread's channels, kMergeBlock at a time
template <class F>
void share_channels(const Team& team, int64_t C, const F& f) {
  team.share(C, kColumnBlock, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c += kMergeBlock) {
      f(c, std::min(kMergeBlock, end - c));
    }
  });
}

}  // namespace
}  // namespace se
