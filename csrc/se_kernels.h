// The kernels of se.h, for the vectors of se_simd.h. Included once by each instruction set's file.
#pragma once

#include <cmath>

#include "se_simd.h"

namespace se {
namespace {

inline Vec<float> widen_bfloat16(Bits16 bits) {
  return bit_cast<Vec<float>>(widen_bits(bits) << 16);
}

// Rounds to nearest even. The carry out of a NaN's payload could reach its exponent, so NaN is written as such.
inline Bits16 narrow_bfloat16(Vec<float> v) {
  const Bits32 bits = bit_cast<Bits32>(v);
  const Bits32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits32 is_nan = bit_cast<Bits32>(v != v);
  return narrow_bits((rounded & ~is_nan) | (is_nan & 0x7fc0u));
}

template <class T>
inline Vec<float> widen(Bits16 bits) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    return widen_bfloat16(bits);
  } else {
    return widen_half(bits);
  }
}

template <class T>
inline Bits16 narrow(Vec<float> v) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    return narrow_bfloat16(v);
  } else {
    return narrow_half(v);
  }
}

// kWhole: a whole vector; else its first `count` lanes.
template <bool kWhole, class T>
inline Vec<acc_t<T>> load(const T* p, int64_t count) {
  using Raw = std::conditional_t<sizeof(T) == 2, Bits16, Vec<acc_t<T>>>;
  Raw raw;
  if constexpr (kWhole) {
    std::memcpy(&raw, p, sizeof(raw));
  } else {
    load_first(p, count, raw);
  }
  if constexpr (sizeof(T) == 2) {
    return widen<T>(raw);
  } else {
    return raw;
  }
}

template <bool kWhole, class T>
inline void store(T* p, int64_t count, Vec<acc_t<T>> v) {
  const auto put = [&](auto raw) {
    if constexpr (kWhole) {
      std::memcpy(p, &raw, sizeof(raw));
    } else {
      store_first(p, count, raw);
    }
  };
  if constexpr (sizeof(T) == 2) {
    put(narrow<T>(v));
  } else {
    put(v);
  }
}

// Past the caches: spares the read of a line that is about to be overwritten. p is aligned to the vector.
template <class T>
inline void store_past_cache(T* p, Vec<acc_t<T>> v) {
  if constexpr (sizeof(T) == 2) {
    stream(p, narrow<T>(v));
  } else {
    stream(p, v);
  }
}

// Calls step(whole, i, count) for every vector of [0, n): `whole` is a type, so the last, partial one is compiled apart.
template <class A, class Step>
inline __attribute__((always_inline)) void for_each_vector(int64_t n, Step step) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) {
    step(std::true_type{}, i, kLanes<A>);
  }
  if (i < n) {
    step(std::false_type{}, i, n - i);
  }
}

// Sum of the lanes of a vector of kBytes, half by half: registers only, where a loop over lanes would go through memory.
template <class A, int kBytes = kVectorBytes, class V>
inline A reduce(V v) {
  if constexpr (kBytes == sizeof(A)) {
    return bit_cast<A>(v);
  } else {
    typedef A Half __attribute__((vector_size(kBytes / 2)));
    Half low, high;
    std::memcpy(&low, &v, kBytes / 2);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + kBytes / 2, kBytes / 2);
    return reduce<A, kBytes / 2>(low + high);
  }
}

inline int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

template <class A>
inline Vec<A> broadcast(A value) {
  return Vec<A>{} + value;
}

// ---- Channels-last: a line is the C contiguous channels of one pixel. ----

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
  Lines(View<const T> view, int64_t W, int64_t first)
      : p_(view.data + first / W * view.stride_h + first % W * view.stride_w),
        stride_w_(view.stride_w),
        step_h_(view.stride_h - (W - 1) * view.stride_w),
        W_(W),
        left_(W - first % W) {}
  const T* next() {
    const T* line = p_;
    if (--left_ > 0) {
      p_ += stride_w_;
    } else {
      p_ += step_h_;
      left_ = W_;
    }
    return line;
  }

 private:
  const T* p_;
  int64_t stride_w_, step_h_, W_, left_;
};

// Sums kCount vectors pairwise.
template <int kCount, class V>
inline __attribute__((always_inline)) V tree_sum(const V* v) {
  if constexpr (kCount == 1) {
    return v[0];
  } else {
    return tree_sum<kCount / 2>(v) + tree_sum<kCount / 2>(v + kCount / 2);
  }
}

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

// Adds lines [begin, begin + kGroup * groups) up into acc. A group's lines are `groups` apart: read at that distance they
// lie on different pages, and the processor prefetches each page on its own.
template <int kGroup, int kViews, class T>
inline void add_block(const View<const T> (&views)[kViews], int64_t W, int64_t c0, int64_t C, int64_t begin,
                      int64_t groups, acc_t<T>* acc) {
  Lines<T> walks[kViews][kGroup];
  for (int v = 0; v < kViews; ++v) {
    for (int g = 0; g < kGroup; ++g) {
      walks[v][g] = Lines<T>(views[v], W, begin + g * groups);
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
  const bool aligned = (reinterpret_cast<uintptr_t>(out.data) | bytes(out.stride_h) | bytes(out.stride_w) |
                        bytes(extent.C)) % 64 == 0;
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

// ---- Contiguous: a segment is W contiguous pixels of one channel. ----

// A float sum runs over at most this many vectors before it is added to a double.
constexpr int64_t kVectorsPerBlock = 64;

// total[p] += sum of the product of the views over the segments of kPlanes channels, read side by side.
template <int kPlanes, int kViews, class T>
inline void add_segments(const T* const (&segments)[kViews][kPlanes], int64_t W, double* total) {
  using A = acc_t<T>;
  constexpr int kChains = 2;
  constexpr int64_t kBlock = kVectorsPerBlock * kLanes<A>, kStep = kChains * kLanes<A>;
  const auto add_term = [&](auto whole, int plane, int64_t i, int64_t count, Vec<A> sum) __attribute__((always_inline)) {
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
    return [s = broadcast<A>(gate[c]), shift = broadcast<A>(q[c])](Vec<A> v) __attribute__((always_inline)) {
      return multiply_add(v, s, shift);
    };
  });
}

// ---- Products: several rows and samples at a time, so that what is loaded is used several times. ----

// As above, long sums are taken in blocks: an error then grows with the number of blocks and the length of one, not
// with their product.
constexpr int64_t kRowsPerBlock = 64;
constexpr int64_t kColumnChunk = 512;

template <int kRows, int kSamples, class W, class A>
inline void rows_dot_tile(const W* m, int64_t cols, const A* bias, const A* x, int64_t ldx, A* y, int64_t ldy) {
  constexpr int64_t kBlock = kVectorsPerBlock * kLanes<A>;
  Vec<A> total[kRows][kSamples] = {};
  for (int64_t begin = 0; begin < cols; begin += kBlock) {
    Vec<A> acc[kRows][kSamples] = {};
    for_each_vector<A>(smaller(cols - begin, kBlock), [&](auto whole, int64_t k, int64_t count)
                                                          __attribute__((always_inline)) {
      constexpr bool kWhole = decltype(whole)::value;
      const int64_t j = begin + k;
      Vec<A> weights[kRows];
      for (int i = 0; i < kRows; ++i) {
        weights[i] = load<kWhole>(m + i * cols + j, count);
      }
      for (int n = 0; n < kSamples; ++n) {
        const Vec<A> v = load<kWhole>(x + n * ldx + j, count);
        for (int i = 0; i < kRows; ++i) {
          acc[i][n] = multiply_add(weights[i], v, acc[i][n]);
        }
      }
    });
    for (int i = 0; i < kRows; ++i) {
      for (int n = 0; n < kSamples; ++n) {
        total[i][n] += acc[i][n];
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int n = 0; n < kSamples; ++n) {
      y[n * ldy + i] = reduce<A>(total[i][n]) + (bias ? bias[i] : A(0));
    }
  }
}

template <int kSamples, class W, class A>
void rows_dot_samples(const W* m, int64_t rows, int64_t cols, const A* bias, const A* x, int64_t ldx, A* y,
                      int64_t ldy) {
  constexpr int kRows = 4;
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) {
    rows_dot_tile<kRows, kSamples>(m + i * cols, cols, bias ? bias + i : nullptr, x, ldx, y + i, ldy);
  }
  for (; i < rows; ++i) {
    rows_dot_tile<1, kSamples>(m + i * cols, cols, bias ? bias + i : nullptr, x, ldx, y + i, ldy);
  }
}

// Calls f(size, n) for n = 0, 4, .. and a last, smaller group; `size` is a type.
template <class F>
inline void for_each_group_of_four(int64_t N, F f) {
  int64_t n = 0;
  for (; n + 4 <= N; n += 4) {
    f(std::integral_constant<int, 4>{}, n);
  }
  switch (N - n) {
    case 3:
      return f(std::integral_constant<int, 3>{}, n);
    case 2:
      return f(std::integral_constant<int, 2>{}, n);
    case 1:
      return f(std::integral_constant<int, 1>{}, n);
  }
}

template <class W>
void rows_dot(const W* m, int64_t rows, int64_t cols, const acc_t<W>* bias, const acc_t<W>* x, int64_t ldx,
              acc_t<W>* y, int64_t ldy, int64_t N) {
  for_each_group_of_four(N, [&](auto samples, int64_t n) {
    rows_dot_samples<decltype(samples)::value>(m, rows, cols, bias, x + n * ldx, ldx, y + n * ldy, ldy);
  });
}

// acc[n, j] (+)= sum over kRows rows i of x[n, i] m[i, j]
template <int kSamples, int kRows, class W, class A>
inline void cols_dot_rows(const W* m, int64_t ldm, int64_t cols, bool first, const A* x, int64_t ldx,
                          A (*__restrict__ acc)[kColumnChunk]) {
  Vec<A> factors[kSamples][kRows];
  for (int n = 0; n < kSamples; ++n) {
    for (int i = 0; i < kRows; ++i) {
      factors[n][i] = broadcast<A>(x[n * ldx + i]);
    }
  }
  for_each_vector<A>(cols, [&](auto whole, int64_t j, int64_t count) __attribute__((always_inline)) {
    constexpr bool kWhole = decltype(whole)::value;
    Vec<A> weights[kRows];
    for (int i = 0; i < kRows; ++i) {
      weights[i] = load<kWhole>(m + i * ldm + j, count);
    }
    for (int n = 0; n < kSamples; ++n) {
      Vec<A> sum = {};
      if (!first) {
        sum = load<true>(acc[n] + j, count);
      }
      for (int i = 0; i < kRows; ++i) {
        sum = multiply_add(weights[i], factors[n][i], sum);
      }
      store<true>(acc[n] + j, count, sum);
    }
  });
}

// The sums of a chunk of columns stay in L1, so that the rows of m are read from end to end: a tile in registers would
// take a few numbers from every row, each from another page.
template <int kSamples, class W, class A>
void cols_dot_chunk(const W* m, int64_t ldm, int64_t rows, int64_t cols, const A* x, int64_t ldx, A* y, int64_t ldy) {
  constexpr int kRows = 4;
  alignas(kVectorBytes) A acc[kSamples][kColumnChunk];
  for (int64_t begin = 0; begin < rows; begin += kRowsPerBlock) {
    const int64_t end = smaller(begin + kRowsPerBlock, rows);
    int64_t i = begin;
    for (; i + kRows <= end; i += kRows) {
      cols_dot_rows<kSamples, kRows>(m + i * ldm, ldm, cols, i == begin, x + i, ldx, acc);
    }
    for (; i < end; ++i) {
      cols_dot_rows<kSamples, 1>(m + i * ldm, ldm, cols, i == begin, x + i, ldx, acc);
    }
    for (int n = 0; n < kSamples; ++n) {
      for (int64_t j = 0; j < cols; ++j) {
        y[n * ldy + j] = begin == 0 ? acc[n][j] : y[n * ldy + j] + acc[n][j];
      }
    }
  }
}

template <class W>
void cols_dot(const W* m, int64_t ldm, int64_t rows, int64_t cols, const acc_t<W>* x, int64_t ldx, acc_t<W>* y,
              int64_t ldy, int64_t N) {
  for_each_group_of_four(N, [&](auto samples, int64_t n) {
    for (int64_t j = 0; j < cols; j += kColumnChunk) {
      cols_dot_chunk<decltype(samples)::value>(m + j, ldm, rows, smaller(cols - j, kColumnChunk), x + n * ldx, ldx,
                                               y + n * ldy + j, ldy);
    }
  });
}

// y[i, j] for kRows rows i and kVectors vectors of j.
template <int kRows, int kVectors, bool kWhole, class A, class W>
inline void outer_tile(const A* u, int64_t ldu, const A* v, int64_t ldv, int64_t N, W* y, int64_t ldy,
                       int64_t count) {
  Vec<A> acc[kRows][kVectors] = {};
  for (int64_t n = 0; n < N; ++n) {
    for (int k = 0; k < kVectors; ++k) {
      const Vec<A> right = load<kWhole>(v + n * ldv + k * kLanes<A>, count);
      for (int i = 0; i < kRows; ++i) {
        acc[i][k] = multiply_add(right, broadcast<A>(u[n * ldu + i]), acc[i][k]);
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int k = 0; k < kVectors; ++k) {
      store<kWhole>(y + i * ldy + k * kLanes<A>, count, acc[i][k]);
    }
  }
}

template <class W>
void outer(const acc_t<W>* u, int64_t ldu, const acc_t<W>* v, int64_t ldv, int64_t N, W* y, int64_t rows,
           int64_t cols) {
  using A = acc_t<W>;
  constexpr int kVectors = 4;
  for_each_group_of_four(rows, [&](auto group, int64_t i) {
    constexpr int kRows = decltype(group)::value;
    W* to = y + i * cols;
    int64_t j = 0;
    for (; j + kVectors * kLanes<A> <= cols; j += kVectors * kLanes<A>) {
      outer_tile<kRows, kVectors, true>(u + i, ldu, v + j, ldv, N, to + j, cols, kLanes<A>);
    }
    for_each_vector<A>(cols - j, [&](auto whole, int64_t k, int64_t count) {
      outer_tile<kRows, 1, decltype(whole)::value>(u + i, ldu, v + j + k, ldv, N, to + j + k, cols, count);
    });
  });
}

template <class A>
void sigmoid(A* z, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    z[i] = A(1) / (A(1) + std::exp(-z[i]));
  }
}

template <class W>
constexpr Products<W> make_products() {
  return {rows_dot<W>, cols_dot<W>, outer<W>};
}

template <class T>
constexpr Kernels<T> make_kernels() {
  return {
      {sum_channels_last<T>, dot_channels_last<T>, scale_channels_last<T>, grad_channels_last<T>},
      {sum_contiguous<T>, dot_contiguous<T>, scale_contiguous<T>, grad_contiguous<T>},
      make_products<T>(),
      make_products<acc_t<T>>(),
      sigmoid<acc_t<T>>,
  };
}

}  // namespace
}  // namespace se
