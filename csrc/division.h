// How a batch is divided: samples into blocks that the caches hold, a sample into tiles, the tiles among a team of
// threads.
#pragma once

#include <ATen/Parallel.h>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <numeric>
#include <optional>

#include "se.h"

namespace se {
namespace {

constexpr int64_t kTileBytes = 128 * 1024;         // of a sample: what threads share out
constexpr int64_t kTileLines = 16;                 // fewer would make the partial sums a traffic of their own
constexpr int64_t kSlabBytes = 256 * 1024;         // of a tile with all of a sample's pixels
constexpr int64_t kSegmentBytes = 2 * 1024;        // of a line in it: less would be too short to be prefetched
constexpr int64_t kCacheBytes = 1024 * 1024;       // of L2 that a thread can count on
constexpr int64_t kStreamBytes = 4 * 1024 * 1024;  // of a result for each thread: more is written past the caches
constexpr int64_t kSerialElements = 32 * 1024;     // of an activation: fewer are not worth a second thread
constexpr int64_t kRowBlock = 4;                   // rows of a product that a thread takes at least
constexpr int64_t kColumnBlock = 16;               // columns of a product that a thread takes at least

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The threads of one parallel region, as one of them sees it. All of them make the same calls in the same order.
struct Team {
  int64_t index, size;

  // Calls f(begin, end) for this thread's part of [0, count), in units of `unit`.
  template <class F>
  void share(int64_t count, int64_t unit, const F& f) const {
    const int64_t units = ceil_div(count, unit);
    const int64_t begin = units * index / size * unit, end = std::min(units * (index + 1) / size * unit, count);
    if (begin < end) {
      f(begin, end);
    }
  }

  // Until every thread has come here.
  void wait() const {
#if defined(_OPENMP)
#pragma omp barrier
#endif
  }
};

// Runs f(team) on every thread of a team. ATen's parallel_for has no barrier: it would take a region for each step.
template <class F>
void in_team(const Shape& shape, const F& f) {
  [[maybe_unused]] const bool alone =
      at::in_parallel_region() || shape.N * shape.C * shape.H * shape.W < kSerialElements;
  at::get_num_threads();  // lets ATen set OpenMP's number of threads, if this is its first use
#if defined(_OPENMP)
#pragma omp parallel if (!alone)
  f(Team{omp_get_thread_num(), omp_get_num_threads()});
#else
  f(Team{0, 1});
#endif
}

// How one sample is divided into tiles, by its shape alone. Channels-last: by pixels, or by channels where pixels are
// few. Contiguous: by channels, and by pixels where a channel is large.
struct Tiling {
  bool channels_last;
  Extent extent;
  int64_t channels, pixels;  // of a tile, along the dimension that pixels are divided in

  Tiling(bool channels_last, Extent extent, int64_t element_size) : channels_last(channels_last), extent(extent) {
    const int64_t elements = kTileBytes / element_size, HW = extent.H * extent.W;
    const int64_t slab = kSlabBytes / element_size / HW;  // channels
    channels = extent.C;
    pixels = length();
    if (slab >= (channels_last ? kSegmentBytes / element_size : 1)) {
      channels = even_step(extent.C, slab, channels_last ? 64 : 1);
    } else if (channels_last) {
      pixels = even_step(length(), std::max(elements / extent.C, kTileLines) / extent.W, 1);
    } else {
      channels = 1;
      // a tile's first pixel is the first bit of a byte
      pixels = even_step(length(), elements * length() / HW, along_w() ? 64 : 8 / std::gcd(extent.W, int64_t(8)));
    }
  }
  // Of the dimension that pixels are divided in: H, which is 1 where a contiguous sample's pixels are one dimension.
  int64_t length() const {
    return along_w() ? extent.W : extent.H;
  }
  bool along_w() const {
    return !channels_last && extent.H == 1;
  }
  int64_t channel_tiles() const {
    return ceil_div(extent.C, channels);
  }
  int64_t pixel_tiles() const {
    return ceil_div(length(), pixels);
  }
  int64_t count() const {
    return channel_tiles() * pixel_tiles();
  }
  int64_t first_channel(int64_t tile) const {
    return tile % channel_tiles() * channels;
  }
  int64_t first_pixel(int64_t tile) const {
    return tile / channel_tiles() * pixels;
  }
  Extent at(int64_t tile) const {
    const int64_t C = std::min(channels, extent.C - first_channel(tile));
    const int64_t size = std::min(pixels, length() - first_pixel(tile));
    return along_w() ? Extent{C, 1, size} : Extent{C, size, extent.W};
  }
  template <class T>
  View<T> view(const Activation<T>& a, int64_t n, int64_t tile) const {
    T* data = a.data + n * a.stride_n + first_channel(tile) * a.stride_c +
              first_pixel(tile) * (along_w() ? a.stride_w : a.stride_h);
    return {data, a.stride_c, a.stride_h, a.stride_w};
  }

 private:
  // About `step`, a multiple of `unit`, so that the tiles are alike, and divide evenly among most numbers of threads.
  static int64_t even_step(int64_t length, int64_t step, int64_t unit) {
    const int64_t least = ceil_div(length, std::max(step, int64_t(1)));
    const int64_t tiles = least > 4 ? ceil_div(least, 4) * 4 : least;
    return ceil_div(ceil_div(length, tiles), unit) * unit;
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

// Samples that are taken together: what the threads' caches hold between two reads, but enough to be worth reading the
// weights for.
template <class T, class W>
int64_t samples_per_block(const Shape& shape, int64_t tensors) {
  const int64_t sample_bytes = tensors * shape.C * shape.H * shape.W * static_cast<int64_t>(sizeof(T));
  const int64_t weight_bytes = 2 * shape.C * shape.R * static_cast<int64_t>(sizeof(W));
  const int64_t bytes = std::max(at::get_num_threads() * kCacheBytes, 2 * weight_bytes);
  const int64_t N = std::max(shape.N, int64_t(1)), most = std::clamp(bytes / sample_bytes, int64_t(1), N);
  return ceil_div(N, ceil_div(N, most));
}

// Whether a result of this size would not be found in the caches by whoever reads it.
template <class T>
bool outgrows_cache(const Shape& shape) {
  return shape.N * shape.C * shape.H * shape.W * static_cast<int64_t>(sizeof(T)) > at::get_num_threads() * kStreamBytes;
}

// Whether the memory of p has a page behind it. A new allocation has none until it is written to: the kernel then hands
// out a cleared page, already in cache, and to write past the caches would only send it twice.
inline bool is_resident(const void* p) {
#if defined(__linux__)
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  unsigned char resident = 1;
  mincore(reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(p) / page * page), page, &resident);
  return resident & 1;
#else
  return true;
#endif
}

}  // namespace
}  // namespace se
