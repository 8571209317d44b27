// The tail's sweeps over contiguous blocks. A segment is W contiguous pixels of one channel, whose coefficients stay in
// registers.
#pragma once

#include "se_contiguous.h"
#include "tail_elements.h"

namespace se {
namespace {

// A float sum runs over at most this many packs before it is added to a double.
constexpr int64_t kPacksPerSum = 64;

// One channel's bits, from end to end, in pieces that need not end where a byte does.
class BitWriter {
 public:
  explicit BitWriter(uint8_t* to) : to_(to) {}
  // The first `count` of `bits`, at most 32; the others are 0.
  void put(uint32_t bits, int64_t count) {
    pending_ |= uint64_t(bits) << pending_count_;
    pending_count_ += count;
    const int64_t bytes = pending_count_ / 8;
    std::memcpy(to_, &pending_, bytes);
    to_ += bytes;
    pending_ >>= 8 * bytes;
    pending_count_ %= 8;
  }
  void finish() {
    if (pending_count_ > 0) {
      *to_ = static_cast<uint8_t>(pending_);
    }
  }

 private:
  uint8_t* to_;
  uint64_t pending_ = 0;
  int64_t pending_count_ = 0;
};

class BitReader {
 public:
  explicit BitReader(const uint8_t* from) : from_(from) {}
  uint32_t take(int64_t count) {
    uint64_t bits = 0;
    std::memcpy(&bits, from_ + next_ / 8, (next_ % 8 + count + 7) / 8);
    bits >>= next_ % 8;
    next_ += count;
    return static_cast<uint32_t>(bits & ((uint64_t(1) << count) - 1));
  }

 private:
  const uint8_t* from_;
  int64_t next_ = 0;
};

template <class T>
void pivot_contiguous(View<const T> x, Extent extent, acc_t<T>* pivot) {
  using A = acc_t<T>;
  const int64_t count = smaller(extent.W, kLanes<A>);
  for (int64_t c = 0; c < extent.C; ++c) {
    const A mean = reduce<A>(load<false>(x.data + c * x.stride_c, count)) / static_cast<A>(count);
    pivot[c] = mean - mean == 0 ? mean : 0;
  }
}

// Calls step(whole, h, w, count) for every pack of a channel's segments, and flush() at least every kPacksPerSum packs.
template <class T, class Step, class Flush>
inline __attribute__((always_inline)) void for_each_pack_of_channel(Extent extent, Step step, Flush flush) {
  constexpr int64_t kBlock = kPacksPerSum * kPackLanes<T>;
  int64_t since = 0;
  for (int64_t h = 0; h < extent.H; ++h) {
    for (int64_t begin = 0; begin < extent.W; begin += kBlock) {
      const int64_t width = smaller(extent.W - begin, kBlock);
      if (since + width > kBlock) {
        flush();
        since = 0;
      }
      since += width;
      for_each_pack<T>(width, [&](auto whole, int64_t w, int64_t count) __attribute__((always_inline)) {
        step(whole, h, begin + w, count);
      });
    }
  }
  flush();
}

// The numbers past `count` are 0.
template <bool kWhole, class T>
inline Pack<T> first_of(Pack<T> p, int64_t count) {
  if constexpr (!kWhole) {
    const Pack<T> in_order = gather<T>(p);
    alignas(kVectorBytes) acc_t<T> values[kPackLanes<T>];
    store_pack<T>(values, in_order);
    std::fill(values + count, values + kPackLanes<T>, acc_t<T>(0));
    return spread<T>(load_pack<T>(values));
  }
  return p;
}

template <class T>
inline void flush_sum(Pack<T>& sum, double& total) {
  using A = acc_t<T>;
  total += reduce<A>(tree_sum<kPackVectors<T>>(sum.v));
  sum = Pack<T>{};
}

template <class T>
void moments_contiguous(View<const T> x, Extent extent, const acc_t<T>* pivot, double* sum, double* square) {
  using A = acc_t<T>;
  for (int64_t c = 0; c < extent.C; ++c) {
    const Vec<A> center = broadcast<A>(pivot[c]);
    Pack<T> first{}, second{};
    for_each_pack_of_channel<T>(
        extent,
        [&](auto whole, int64_t h, int64_t w, int64_t count) __attribute__((always_inline)) {
          constexpr bool kWhole = decltype(whole)::value;
          const T* from = x.data + c * x.stride_c + h * x.stride_h + w;
          const Pack<T> values = widen<T>(load_raw<kWhole>(from, count));
          const Pack<T> d = first_of<kWhole, T>(each<T>([&](auto k) { return values.v[k] - center; }), count);
          first = each<T>([&](auto k) { return first.v[k] + d.v[k]; });
          second = each<T>([&](auto k) { return multiply_add(d.v[k], d.v[k], second.v[k]); });
        },
        [&] {
          flush_sum(first, sum[c]);
          flush_sum(second, square[c]);
        });
  }
}

template <class T, class F>
inline __attribute__((always_inline)) void for_each_channel(const TailBlock<T>& block, bool (*picks)(int), F f) {
  using A = acc_t<T>;
  for (int64_t c = 0; c < block.extent.C; ++c) {
    Pack<T> k[kCoefficients];
    for (int i = 0; i < kCoefficients; ++i) {
      if (picks(i)) {
        const Vec<A> value = broadcast<A>(block.coefficient[i] ? block.coefficient[i][c] : A(0));
        k[i] = each<T>([&](auto) { return value; });
      }
    }
    f(c, k);
  }
}

template <class T>
inline T* segment(const View<T>& view, int64_t c, int64_t h) {
  return view.data + c * view.stride_c + h * view.stride_h;
}

template <class T>
inline bool can_stream_segments(const View<T>& view, bool past_cache) {
  const auto bytes = [](auto v) { return static_cast<int64_t>(v * sizeof(T)); };
  return past_cache && view.data &&
         (reinterpret_cast<uintptr_t>(view.data) | bytes(view.stride_h) | bytes(view.stride_c)) % 64 == 0;
}

template <bool kWhole, class T>
inline void put_segment(T* to, int64_t count, Raw<T> raw, bool streamed) {
  if (kWhole && streamed) {
    stream_raw(to, raw);
  } else {
    store_raw<kWhole>(to, count, raw);
  }
}

template <class T, TailAct kAct, Shortcut kShortcut>
void apply_contiguous(const TailBlock<T>& block) {
  using E = Element<T, kAct, kShortcut>;
  const bool streamed = can_stream_segments(block.out, block.out_past_cache);
  const bool masked = E::kMasked && block.bits.data;
  for_each_channel(block, [](int k) { return E::in_apply(k); }, [&](int64_t c, const Pack<T>* k) {
    BitWriter bits(masked ? block.bits.data + c * block.bits.stride_c : nullptr);
    for (int64_t h = 0; h < block.extent.H; ++h) {
      const T* y = segment(block.y, c, h);
      const T* residual = segment(block.residual, c, h);
      T* out = segment(block.out, c, h);
      for_each_pack<T>(block.extent.W, [&](auto whole, int64_t w, int64_t count) __attribute__((always_inline)) {
        constexpr bool kWhole = decltype(whole)::value;
        Pack<T> right{};
        if constexpr (kShortcut != Shortcut::none) {
          right = widen<T>(load_raw<kWhole>(residual + w, count));
        }
        const Pack<T> left = widen<T>(load_raw<kWhole>(y + w, count));
        const Pack<T> v = E::before(left, right, [&](int i) __attribute__((always_inline)) { return k[i]; });
        put_segment<kWhole>(out + w, count, narrow<T>(E::activated(v)), streamed);
        if constexpr (E::kMasked) {
          if (masked) {
            const uint32_t passed = passes<T>(v);
            bits.put(kWhole ? passed : passed & ((uint32_t(1) << count) - 1), count);
          }
        }
      });
    }
    if (masked) {
      bits.finish();
    }
  });
  if (streamed) {
    stream_fence();
  }
}

template <class T, TailAct kAct, Shortcut kShortcut>
void sums_contiguous(const TailBlock<T>& block) {
  using E = Element<T, kAct, kShortcut>;
  for_each_channel(block, [](int k) { return E::in_sums(k); }, [&](int64_t c, const Pack<T>* k) {
    Pack<T> sum{}, dot{}, dot2{};
    BitReader bits(E::kMasked ? block.bits.data + c * block.bits.stride_c : nullptr);
    for_each_pack_of_channel<T>(
        block.extent,
        [&](auto whole, int64_t h, int64_t w, int64_t count) __attribute__((always_inline)) {
          constexpr bool kWhole = decltype(whole)::value;
          Pack<T> right{};
          if constexpr (E::kReadsResidual) {
            right = widen<T>(load_raw<kWhole>(segment(block.residual, c, h) + w, count));
          }
          const Pack<T> x = widen<T>(load_raw<kWhole>(segment(block.y, c, h) + w, count));
          const uint32_t passed = E::kMasked ? bits.take(count) : 0;
          const Pack<T> d = E::through_act(load_raw<kWhole>(segment(block.dout, c, h) + w, count), passed, x, right,
                                           [&](int i) __attribute__((always_inline)) { return k[i]; });
          const Pack<T> from_mean = E::centred(x, k[kMean]);
          sum = each<T>([&](auto i) { return sum.v[i] + d.v[i]; });
          dot = each<T>([&](auto i) { return multiply_add(d.v[i], from_mean.v[i], dot.v[i]); });
          if constexpr (E::kNormed) {
            const Pack<T> from_mean2 = E::centred(right, k[kMean2]);
            dot2 = each<T>([&](auto i) { return multiply_add(d.v[i], from_mean2.v[i], dot2.v[i]); });
          }
        },
        [&] {
          flush_sum(sum, block.sum[c]);
          flush_sum(dot, block.dot[c]);
          if constexpr (E::kNormed) {
            flush_sum(dot2, block.dot2[c]);
          }
        });
  });
}

template <class T, TailAct kAct, Shortcut kShortcut>
void grads_contiguous(const TailBlock<T>& block) {
  using E = Element<T, kAct, kShortcut>;
  const bool with_dy = block.dy.data, with_dresidual = kShortcut != Shortcut::none && block.dresidual.data;
  const bool dy_streamed = can_stream_segments(block.dy, block.dy_past_cache);
  const bool dresidual_streamed = can_stream_segments(block.dresidual, block.dresidual_past_cache);
  const bool through = block.through_statistics, through2 = block.through_statistics2;
  for_each_channel(block, [](int k) { return E::in_grads(k); }, [&](int64_t c, const Pack<T>* coefficients) {
    const auto k = [&](int i) __attribute__((always_inline)) { return coefficients[i]; };
    BitReader bits(E::kMasked ? block.bits.data + c * block.bits.stride_c : nullptr);
    for (int64_t h = 0; h < block.extent.H; ++h) {
      const T* y = segment(block.y, c, h);
      const T* residual = segment(block.residual, c, h);
      const T* dout = segment(block.dout, c, h);
      T* dy = segment(block.dy, c, h);
      T* dresidual = segment(block.dresidual, c, h);
      for_each_pack<T>(block.extent.W, [&](auto whole, int64_t w, int64_t count) __attribute__((always_inline)) {
        constexpr bool kWhole = decltype(whole)::value;
        Pack<T> x{}, right{};
        if (E::kRecomputed || through) {
          x = widen<T>(load_raw<kWhole>(y + w, count));
        }
        if constexpr (E::kReadsResidual) {
          right = widen<T>(load_raw<kWhole>(residual + w, count));
        }
        const uint32_t passed = E::kMasked ? bits.take(count) : 0;
        const Pack<T> d = E::through_act(load_raw<kWhole>(dout + w, count), passed, x, right, k);
        if (with_dy) {
          const Pack<T> v = E::through_norm(d, x, through, k, kMean, kScale, kSlope, kDrift);
          put_segment<kWhole>(dy + w, count, narrow<T>(v), dy_streamed);
        }
        if (with_dresidual) {
          Pack<T> v = d;
          if constexpr (E::kNormed) {
            v = E::through_norm(d, right, through2, k, kMean2, kScale2, kSlope2, kDrift2);
          }
          put_segment<kWhole>(dresidual + w, count, narrow<T>(v), dresidual_streamed);
        }
      });
    }
  });
  if (dy_streamed || dresidual_streamed) {
    stream_fence();
  }
}

}  // namespace
}  // namespace se
