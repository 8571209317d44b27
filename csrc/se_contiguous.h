// The sweeps of se.h over contiguous blocks. A segment is W contiguous pixels of one channel.
#pragma once

#include "vectors.h"

namespace se {
namespace {

// A float sum runs over at most this many vectors before it is added to a double.
constexpr int64_t kVectorsPerBlock = 64;

// total[p] += sum of the product of the views over the segments of kPlanes channels, read side by side.
template <int kPlanes, int kViews, class T>
inline void add_segments(const T* const (&segments)[kViews][kPlanes], int64_t W, double* total) {
  using A = acc_t<T>;
  constexpr int kChains = 2;
  constexpr int64_t kBlock = kVectorsPerBlock * kLanes<A>, kStep = kChains * kLanes<A>;
  const auto add_term = [&](auto whole, int plane, int64_t i, int64_t count, Vec<A> sum)
                            __attribute__((always_inline)) {
                              constexpr bool kWhole = decltype(whole)::value;
                              const Vec<A> v = load<kWhole>(segments[0][plane] + i, count);
                              if constexpr (kViews == 2) {
                                return multiply_add(v, load<kWhole>(segments[1][plane] + i, count), sum);
                              } else {
                                return sum + v;
                              }
                            };
  for (int64_t begin = 0; begin < W; begin += kBlock) {
    const int64_t end = smaller(W, begin + kBlock);
    Vec<A> acc[kPlanes][kChains] = {};
    int64_t i = begin;
    for (; i + kStep <= end; i += kStep) {
      for (int plane = 0; plane < kPlanes; ++plane) {
        for (int chain = 0; chain < kChains; ++chain) {
          const int64_t j = i + chain * kLanes<A>;
          acc[plane][chain] = add_term(std::true_type{}, plane, j, kLanes<A>, acc[plane][chain]);
        }
      }
    }
    for_each_vector<A>(end - i, [&](auto whole, int64_t j, int64_t count) __attribute__((always_inline)) {
      for (int plane = 0; plane < kPlanes; ++plane) {
        acc[plane][0] = add_term(whole, plane, i + j, count, acc[plane][0]);
      }
    });
    for (int plane = 0; plane < kPlanes; ++plane) {
      total[plane] += reduce<A>(tree_sum<kChains>(acc[plane]));
    }
  }
}

template <int kPlanes, int kViews, class T>
inline void reduce_planes(const View<const T> (&views)[kViews], Extent extent, int64_t c, double* total) {
  for (int64_t h = 0; h < extent.H; ++h) {
    const T* segments[kViews][kPlanes];
    for (int v = 0; v < kViews; ++v) {
      for (int plane = 0; plane < kPlanes; ++plane) {
        segments[v][plane] = views[v].data + (c + plane) * views[v].stride_c + h * views[v].stride_h;
      }
    }
    add_segments<kPlanes, kViews>(segments, extent.W, total + c);
  }
}

template <int kViews, class T>
void reduce_contiguous(const View<const T> (&views)[kViews], Extent extent, double* total) {
  constexpr int kPlanes = 4;
  int64_t c = 0;
  for (; c + kPlanes <= extent.C; c += kPlanes) {
    reduce_planes<kPlanes, kViews>(views, extent, c, total);
  }
  for (; c < extent.C; ++c) {
    reduce_planes<1, kViews>(views, extent, c, total);
  }
}

template <class T>
void sum_contiguous(View<const T> x, Extent extent, double* total) {
  reduce_contiguous<1, T>({x}, extent, total);
}

template <class T>
void dot_contiguous(View<const T> dout, View<const T> x, Extent extent, double* total) {
  reduce_contiguous<2, T>({dout, x}, extent, total);
}

// out = f(channel)(x)
template <class T, class F>
inline __attribute__((always_inline)) void map_segments(View<const T> x, View<T> out, Extent extent, bool past_cache,
                                                        F f) {
  using A = acc_t<T>;
  for (int64_t c = 0; c < extent.C; ++c) {
    const auto element = f(c);
    for (int64_t h = 0; h < extent.H; ++h) {
      const T* __restrict__ from = x.data + c * x.stride_c + h * x.stride_h;
      T* __restrict__ to = out.data + c * out.stride_c + h * out.stride_h;
      int64_t w = 0;
      if (past_cache) {
        const auto misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % 64 / sizeof(T));
        const int64_t head = misaligned ? 64 / static_cast<int64_t>(sizeof(T)) - misaligned : 0;
        const int64_t lead = smaller(head, extent.W);
        for_each_vector<A>(lead, [&](auto whole, int64_t i, int64_t count) __attribute__((always_inline)) {
          constexpr bool kWhole = decltype(whole)::value;
          store<kWhole>(to + i, count, element(load<kWhole>(from + i, count)));
        });
        for (w = lead; w + kLanes<A> <= extent.W; w += kLanes<A>) {
          store_past_cache(to + w, element(load<true>(from + w, kLanes<A>)));
        }
      }
      for_each_vector<A>(extent.W - w, [&](auto whole, int64_t i, int64_t count) __attribute__((always_inline)) {
        constexpr bool kWhole = decltype(whole)::value;
        store<kWhole>(to + w + i, count, element(load<kWhole>(from + w + i, count)));
      });
    }
  }
  if (past_cache) {
    stream_fence();
  }
}

template <class T>
void scale_contiguous(View<const T> x, const acc_t<T>* gate, View<T> out, Extent extent, bool past_cache) {
  using A = acc_t<T>;
  map_segments(x, out, extent, past_cache, [&](int64_t c) {
    return [s = broadcast<A>(gate[c])](Vec<A> v) __attribute__((always_inline)) { return v * s; };
  });
}

template <class T>
void grad_contiguous(View<const T> dout, const acc_t<T>* gate, const acc_t<T>* q, View<T> dx, Extent extent,
                     bool past_cache) {
  using A = acc_t<T>;
  map_segments(dout, dx, extent, past_cache, [&](int64_t c) {
    return [s = broadcast<A>(gate[c]), shift = broadcast<A>(q[c])](Vec<A> v)
               __attribute__((always_inline)) { return multiply_add(v, s, shift); };
  });
}

}  // namespace
}  // namespace se
