// How a batch is divided among threads and caches: tiles of a sample, groups and blocks of samples.
#pragma once

#include <ATen/Parallel.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <optional>
#include <vector>

#include "se.h"

namespace se {
namespace {

constexpr int64_t kTileBytes = 64 * 1024;          // of a sample: what threads share out by phase
constexpr int64_t kMinTileLines = 16;              // fewer would make the partial sums a traffic of their own
constexpr int64_t kCacheBytes = 1024 * 1024;       // of L2 that a thread can count on
constexpr int64_t kStreamBytes = 4 * 1024 * 1024;  // of a result for each thread: more is written past the caches
constexpr int64_t kWeightShare = 4;           // by group: weights are at most this many times a group's activations
constexpr int64_t kProductGrain = 32 * 1024;  // multiply-adds worth a thread
constexpr int64_t kElementGrain = 16 * 1024;  // simple operations worth a thread
constexpr int64_t kColumnBlock = 16;          // columns of a product that a thread takes at least

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

// Whether the memory of p has a page behind it. A new allocation has none until it is written to: the kernel then hands
// out a cleared page, already in cache.
inline bool is_resident(const void* p) {
#if defined(__linux__)
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  unsigned char resident = 1;
  mincore(reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(p) / page * page), page, &resident);
  return resident & 1;
#else
  return true;
#endif
}

// Whether to write a result past the caches: it is so large that its reader would not find it there, and it is not being
// brought there anyway. The page in the middle tells: those at the ends hold the allocator's own notes.
template <class T>
bool goes_past_cache(const Shape& shape, const T* result) {
  const int64_t elements = shape.N * shape.C * shape.H * shape.W;
  return result && elements * int64_t(sizeof(T)) > at::get_num_threads() * kStreamBytes &&
         is_resident(result + elements / 2);
}

template <class F>
void parallel(int64_t count, int64_t cost_each, int64_t grain, const F& f) {
  at::parallel_for(0, count, std::max(int64_t(1), grain / std::max(int64_t(1), cost_each)), f);
}

// Runs f(n, tile) for every tile of samples [first, last). In reverse a thread begins with what it touched last, which
// is still in its cache.
template <class F>
void for_each_tile(const Tiling& tiling, int64_t first, int64_t last, bool reverse, const F& f) {
  at::parallel_for(0, (last - first) * tiling.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t item = reverse ? begin + end - 1 - i : i;
      f(first + item / tiling.count, item % tiling.count);
    }
  });
}

// Sums over (h, w) for samples [first, last): sum_tile(n, tile, total) adds a tile's to total, finish(n, c, sum) takes
// each result.
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

}  // namespace
}  // namespace se
