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

// Calls f(c, k) for every channel, with those coefficients that `picks` asks for.
template <class T, class Picks, class F>
inline __attribute__((always_inline)) void for_each_channel(const TailBlock<T>& block, Picks picks, F f) {
  using A = acc_t<T>;
  for (int64_t c = 0; c < block.extent.C; ++c) {
    Pack<T> k[kCoefficients];
    unrolled<kCoefficients>([&](auto i) __attribute__((always_inline)) {
      if (picks(i)) {
        const Vec<A> value = broadcast<A>(block.coefficient[i] ? block.coefficient[i][c] : A(0));
        k[i] = each<T>([&](auto) { return value; });
      }
    });
    f(c, k);
  }
}

// One row of pixels of a channel, in every tensor of a block.
template <class T>
struct Segment {
  Place<T> first;

  Segment(const TailBlock<T>& b, int64_t c, int64_t h)
      : first{start(b.y, c, h),   start(b.residual, c, h), start(b.dout, c, h),
              start(b.out, c, h), start(b.dy, c, h),       start(b.dresidual, c, h)} {}
  Place<T> at(int64_t w) const {
    return {first.y + w, first.residual + w, first.dout + w, first.out + w, first.dy + w, first.dresidual + w};
  }

 private:
  template <class E>
  static E* start(const View<E>& view, int64_t c, int64_t h) {
    return view.data + c * view.stride_c + h * view.stride_h;
  }
};

template <class T, class Kind>
inline Element<T, Kind> element_of_segments(const TailBlock<T>& block) {
  return Element<T, Kind>(block, [](const View<T>& view, bool past_cache) {
    const auto bytes = [](auto v) { return static_cast<int64_t>(v * sizeof(T)); };
    return past_cache && view.data &&
           (reinterpret_cast<uintptr_t>(view.data) | bytes(view.stride_h) | bytes(view.stride_c)) % 64 == 0;
  });
}

template <class T>
inline uint8_t* bits_of(const TailBlock<T>& block, int64_t c) {
  return block.bits.data + c * block.bits.stride_c;
}

template <class T, class Kind>
void apply_contiguous(const TailBlock<T>& block) {
  const Element<T, Kind> element = element_of_segments<T, Kind>(block);
  const auto picks = [&](int i) { return element.in_apply(i); };
  for_each_channel(block, picks, [&](int64_t c, const Pack<T>* k) __attribute__((always_inline)) {
    BitWriter bits(bits_of(block, c));
    for (int64_t h = 0; h < block.extent.H; ++h) {
      const Segment<T> segment(block, c, h);
      for_each_pack<T>(block.extent.W, [&](auto whole, int64_t w, int64_t count) __attribute__((always_inline)) {
        constexpr bool kWhole = decltype(whole)::value;
        const uint32_t passed = element.template apply<kWhole>(segment.at(w), count, k);
        if (element.masked()) {
          bits.put(kWhole ? passed : passed & ((uint32_t(1) << count) - 1), count);
        }
      });
    }
    if (element.masked()) {
      bits.finish();
    }
  });
  element.finish();
}

template <class T, class Kind>
void sums_contiguous(const TailBlock<T>& block) {
  const Element<T, Kind> element = element_of_segments<T, Kind>(block);
  const auto picks = [&](int i) { return element.in_sums(i); };
  for_each_channel(block, picks, [&](int64_t c, const Pack<T>* k) __attribute__((always_inline)) {
    Pack<T> sum[3] = {};
    BitReader bits(bits_of(block, c));
    for_each_pack_of_channel<T>(
        block.extent,
        [&](auto whole, int64_t h, int64_t w, int64_t count) __attribute__((always_inline)) {
          const uint32_t passed = element.masked() ? bits.take(count) : 0;
          element.template add<decltype(whole)::value>(Segment<T>(block, c, h).at(w), count, passed, k, sum);
        },
        [&] {
          flush_sum(sum[0], block.sum[c]);
          flush_sum(sum[1], block.dot[c]);
          if (element.normed()) {
            flush_sum(sum[2], block.dot2[c]);
          }
        });
  });
}

template <class T, class Kind>
void grads_contiguous(const TailBlock<T>& block) {
  const Element<T, Kind> element = element_of_segments<T, Kind>(block);
  const auto picks = [&](int i) { return element.in_grads(i); };
  for_each_channel(block, picks, [&](int64_t c, const Pack<T>* k) __attribute__((always_inline)) {
    BitReader bits(bits_of(block, c));
    for (int64_t h = 0; h < block.extent.H; ++h) {
      const Segment<T> segment(block, c, h);
      for_each_pack<T>(block.extent.W, [&](auto whole, int64_t w, int64_t count) __attribute__((always_inline)) {
        const uint32_t passed = element.masked() ? bits.take(count) : 0;
        element.template grads<decltype(whole)::value>(segment.at(w), count, passed, k);
      });
    }
  });
  element.finish();
}

}  // namespace
}  // namespace se
