// The sweeps of se.h over channels-last blocks. A line is the C contiguous channels of one pixel.
#pragma once

#include "vectors.h"

namespace se {
namespace {

// A float sum runs over at most kGroup * kGroupsPerBlock lines before it is added to a double: the error does not grow
// with HW.
constexpr int64_t kGroupsPerBlock = 16;
// Channels whose sums fit beside the lines in L1.
constexpr int64_t kChannelChunk = 1024;

// Walks the lines of an extent in order of (h, w).
template <class T>
class Lines {
 public:
  Lines() = default;
  Lines(View<T> view, int64_t W, int64_t first)
      : p_(view.data + first / W * view.stride_h + first % W * view.stride_w),
        stride_w_(view.stride_w),
        step_h_(view.stride_h - (W - 1) * view.stride_w),
        W_(W),
        left_(W - first % W) {}
  T* next() {
    T* line = p_;
    if (--left_ > 0) {
      p_ += stride_w_;
    } else {
      p_ += step_h_;
      left_ = W_;
    }
    return line;
  }

 private:
  T* p_;
  int64_t stride_w_, step_h_, W_, left_;
};

// One group of kGroup lines of kViews tensors, multiplied element by element, added to acc.
template <int kGroup, int kViews, class T>
inline void add_group(const T* const (&lines)[kViews][kGroup], int64_t C, bool first, acc_t<T>* __restrict__ acc) {
  using A = acc_t<T>;
  for_each_vector<A>(C, [&](auto whole, int64_t c, int64_t count) __attribute__((always_inline)) {
    constexpr bool kWhole = decltype(whole)::value;
    Vec<A> terms[kGroup];
    for (int g = 0; g < kGroup; ++g) {
      terms[g] = load<kWhole>(lines[0][g] + c, count);
      if constexpr (kViews == 2) {
        terms[g] *= load<kWhole>(lines[1][g] + c, count);
      }
    }
    Vec<A> sum = tree_sum<kGroup>(terms);
    if (!first) {
      sum += load<kWhole>(acc + c, count);
    }
    store<kWhole>(acc + c, count, sum);
  });
}

// Adds lines [begin, begin + kGroup * groups) up into acc. A group's lines are `groups` apart: read at that distance
// they lie on different pages, and the processor prefetches each page on its own.
template <int kGroup, int kViews, class T>
inline void add_block(const View<const T> (&views)[kViews], int64_t W, int64_t c0, int64_t C, int64_t begin,
                      int64_t groups, acc_t<T>* acc) {
  Lines<const T> walks[kViews][kGroup];
  for (int v = 0; v < kViews; ++v) {
    for (int g = 0; g < kGroup; ++g) {
      walks[v][g] = Lines<const T>(views[v], W, begin + g * groups);
    }
  }
  for (int64_t group = 0; group < groups; ++group) {
    const T* lines[kViews][kGroup];
    for (int v = 0; v < kViews; ++v) {
      for (int g = 0; g < kGroup; ++g) {
        lines[v][g] = walks[v][g].next() + c0;
      }
    }
    add_group<kGroup, kViews>(lines, C, group == 0, acc);
  }
}

// total[c] += sum over (h, w) of the product of the views.
template <int kGroup, int kViews, class T>
void reduce_lines(const View<const T> (&views)[kViews], Extent extent, double* total) {
  for (int64_t c0 = 0; c0 < extent.C; c0 += kChannelChunk) {
    const int64_t C = smaller(extent.C - c0, kChannelChunk);
    const int64_t count = extent.H * extent.W;
    int64_t done = 0;
    while (done < count) {
      acc_t<T> acc[kChannelChunk];
      const int64_t whole_groups = (count - done) / kGroup;
      if (whole_groups > 0) {
        const int64_t groups = smaller(whole_groups, kGroupsPerBlock);
        add_block<kGroup, kViews>(views, extent.W, c0, C, done, groups, acc);
        done += groups * kGroup;
      } else {
        add_block<1, kViews>(views, extent.W, c0, C, done, count - done, acc);
        done = count;
      }
      for (int64_t c = 0; c < C; ++c) {
        total[c0 + c] += acc[c];
      }
    }
  }
}

template <class T>
void sum_channels_last(View<const T> x, Extent extent, double* total) {
  reduce_lines<8, 1, T>({x}, extent, total);
}

template <class T>
void dot_channels_last(View<const T> dout, View<const T> x, Extent extent, double* total) {
  reduce_lines<4, 2, T>({dout, x}, extent, total);
}

// to[c] = f(whole, c, count) for every line of `to`.
template <class T, class F>
inline __attribute__((always_inline)) void map_lines(View<T> out, Extent extent, bool past_cache, F f) {
  using A = acc_t<T>;
  const auto bytes = [](auto v) { return static_cast<int64_t>(v * sizeof(T)); };
  const bool aligned =
      (reinterpret_cast<uintptr_t>(out.data) | bytes(out.stride_h) | bytes(out.stride_w) | bytes(extent.C)) % 64 == 0;
  for (int64_t h = 0; h < extent.H; ++h) {
    for (int64_t w = 0; w < extent.W; ++w) {
      T* __restrict__ to = out.data + h * out.stride_h + w * out.stride_w;
      const auto line = f(h, w);
      if (past_cache && aligned) {
        for (int64_t c = 0; c < extent.C; c += kLanes<A>) {
          store_past_cache(to + c, line(std::true_type{}, c, kLanes<A>));
        }
      } else {
        for_each_vector<A>(extent.C, [&](auto whole, int64_t c, int64_t count) __attribute__((always_inline)) {
          store<decltype(whole)::value>(to + c, count, line(whole, c, count));
        });
      }
    }
  }
  if (past_cache && aligned) {
    stream_fence();
  }
}

template <class T>
void scale_channels_last(View<const T> x, const acc_t<T>* __restrict__ gate, View<T> out, Extent extent,
                         bool past_cache) {
  map_lines(out, extent, past_cache, [&](int64_t h, int64_t w) __attribute__((always_inline)) {
    const T* __restrict__ from = x.data + h * x.stride_h + w * x.stride_w;
    return [=](auto whole, int64_t c, int64_t count) __attribute__((always_inline)) {
      constexpr bool kWhole = decltype(whole)::value;
      return load<kWhole>(from + c, count) * load<kWhole>(gate + c, count);
    };
  });
}

template <class T>
void grad_channels_last(View<const T> dout, const acc_t<T>* __restrict__ gate, const acc_t<T>* __restrict__ q,
                        View<T> dx, Extent extent, bool past_cache) {
  map_lines(dx, extent, past_cache, [&](int64_t h, int64_t w) __attribute__((always_inline)) {
    const T* __restrict__ from = dout.data + h * dout.stride_h + w * dout.stride_w;
    return [=](auto whole, int64_t c, int64_t count) __attribute__((always_inline)) {
      constexpr bool kWhole = decltype(whole)::value;
      return multiply_add(load<kWhole>(from + c, count), load<kWhole>(gate + c, count), load<kWhole>(q + c, count));
    };
  });
}

}  // namespace
}  // namespace se
