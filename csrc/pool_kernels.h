// The sweeps of pool.h, of one instruction set. Included by its file, after simd.h and what that asks for.
//
// Numbers are compared as the integers that their bits are: what a ReLU returns has no sign, and of such numbers the
// bits are in the same order, with NaN above all.
#pragma once

#include "packs.h"
#include "pool.h"

namespace se {
namespace {

template <class T>
struct BitsOf {
  using Lane = std::conditional_t<sizeof(T) == 2, int16_t, std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>;
  typedef Lane V __attribute__((vector_size(kVectorBytes)));
  typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / sizeof(T))));
  static constexpr Lane kMagnitude = static_cast<Lane>(~(uint64_t(1) << (8 * sizeof(T) - 1)));
  static constexpr Lane kInfinity = static_cast<Lane>(std::is_same_v<T, c10::BFloat16> ? 0x7f80
                                                      : std::is_same_v<T, c10::Half>   ? 0x7c00
                                                      : sizeof(T) == 4                 ? 0x7f800000
                                                                                       : 0x7ff0000000000000);
};

// As many as a pack has numbers, in the order of memory.
template <class T>
struct Bits {
  typename BitsOf<T>::V v[Raw<T>::kCount];
};

// c10 has a bit_cast of its own
template <class T>
inline __attribute__((always_inline)) Bits<T> as_bits(const Raw<T>& raw) {
  return se::bit_cast<Bits<T>>(raw);
}
template <class T>
inline __attribute__((always_inline)) Raw<T> as_raw(const Bits<T>& bits) {
  return se::bit_cast<Raw<T>>(bits);
}

template <class T, class F>
inline __attribute__((always_inline)) Bits<T> each_bits(F f) {
  Bits<T> b;
  unrolled<Raw<T>::kCount>([&](auto k) __attribute__((always_inline)) { b.v[k] = f(k); });
  return b;
}

template <class T>
inline __attribute__((always_inline)) Bits<T> all(int64_t value) {
  return each_bits<T>([&](auto) {
    return static_cast<typename BitsOf<T>::Lane>(value) - typename BitsOf<T>::V{};
  });
}

// The coefficients of a chunk of channels, in the order of packs.
template <class T, int kRowCount>
struct Coefficients {
  alignas(kVectorBytes) acc_t<T> row[kRowCount][kPoolChunk + kPackLanes<T>];
  Pack<T> at(int k, int64_t c) const {
    return load_pack<T>(row[k] + c);
  }
};

// relu((y - mean) * scale + shift), rounded to T; 0 where there is no y.
template <bool kWhole, class T>
inline __attribute__((always_inline)) Bits<T> rectified(const T* p, int64_t count, const Pack<T>& mean,
                                                        const Pack<T>& scale, const Pack<T>& shift) {
  if (!p) {
    return Bits<T>{};
  }
  const Pack<T> y = widen<T>(load_raw<kWhole>(p, count));
  const Pack<T> v = each<T>(
      [&](auto i) { return positive_part(multiply_add(y.v[i] - mean.v[i], scale.v[i], shift.v[i])); });
  const auto bits = as_bits<T>(narrow<T>(v));
  return each_bits<T>([&](auto k) { return bits.v[k] & BitsOf<T>::kMagnitude; });
}

// A maximum, and where it was found.
template <class T>
struct Best {
  Bits<T> value, code;
};

// Goes on to a number that follows: a larger one replaces the maximum, and NaN does, also another NaN, as in PyTorch.
template <class T>
inline __attribute__((always_inline)) void take(Best<T>& best, const Bits<T>& value, const Bits<T>& code) {
  unrolled<Raw<T>::kCount>([&](auto k) __attribute__((always_inline)) {
    const auto infinity = BitsOf<T>::kInfinity - typename BitsOf<T>::V{};
    const auto bound = best.value.v[k] > infinity ? infinity : best.value.v[k];
    const auto above = value.v[k] > bound;
    best.value.v[k] = above ? value.v[k] : best.value.v[k];
    best.code.v[k] = above ? code.v[k] : best.code.v[k];
  });
}

template <class T>
inline __attribute__((always_inline)) Bits<T> plus(const Bits<T>& b, int64_t value) {
  return each_bits<T>([&](auto k) { return b.v[k] + static_cast<typename BitsOf<T>::Lane>(value); });
}

template <bool kWhole, class T>
inline __attribute__((always_inline)) void store_code(uint8_t* to, int64_t count, const Bits<T>& code) {
  using Bytes = typename BitsOf<T>::Bytes;
  unrolled<Raw<T>::kCount>([&](auto k) __attribute__((always_inline)) {
    const Bytes bytes = __builtin_convertvector(code.v[k], Bytes);
    const int64_t at = k * Raw<T>::kEach;
    if constexpr (kWhole) {
      std::memcpy(to + at, &bytes, sizeof(bytes));
    } else if (count > at) {
      std::memcpy(to + at, &bytes, smaller(count - at, Raw<T>::kEach));
    }
  });
}

// kNoMaximum where there is no window
template <bool kWhole, class T>
inline __attribute__((always_inline)) Bits<T> load_code(const uint8_t* from, int64_t count) {
  using Bytes = typename BitsOf<T>::Bytes;
  if (!from) {
    return all<T>(kNoMaximum);
  }
  return each_bits<T>([&](auto k) {
    Bytes bytes{};
    const int64_t at = k * Raw<T>::kEach;
    if constexpr (kWhole) {
      std::memcpy(&bytes, from + at, sizeof(bytes));
    } else if (count > at) {
      std::memcpy(&bytes, from + at, smaller(count - at, Raw<T>::kEach));
    }
    return __builtin_convertvector(bytes, typename BitsOf<T>::V);
  });
}

// The numbers whose code is `position`, 0 in place of the others.
template <class T>
inline __attribute__((always_inline)) Bits<T> chosen(const Bits<T>& value, const Bits<T>& code, int64_t position) {
  return each_bits<T>([&](auto k) {
    using V = typename BitsOf<T>::V;
    return code.v[k] == static_cast<typename BitsOf<T>::Lane>(position) ? value.v[k] : V{};
  });
}

template <class T>
inline __attribute__((always_inline)) Pack<T> numbers(const Bits<T>& bits) {
  return widen<T>(as_raw<T>(bits));
}

template <class T>
inline T* pixel_of(T* row, int64_t stride_w, int64_t w, int64_t W) {
  return row && w >= 0 && w < W ? row + w * stride_w : nullptr;
}

// Calls f(c0, C) for every chunk of channels.
template <class F>
inline __attribute__((always_inline)) void for_each_pool_chunk(int64_t channels, F f) {
  for (int64_t c0 = 0; c0 < channels; c0 += kPoolChunk) {
    f(c0, smaller(channels - c0, kPoolChunk));
  }
}

// The windows of a row of outputs, from left to right: the maximum of one of their rows. Each pixel is read once.
template <bool kWhole, class T>
struct WindowRow {
  const T* row;
  int64_t stride_w, W;
  Pack<T> mean, scale, shift;
  Bits<T> left{};

  __attribute__((always_inline)) Best<T> next(int64_t wo, int64_t count) {
    Best<T> best{left, Bits<T>{}};
    take(best, at(2 * wo, count), all<T>(1));
    left = at(2 * wo + 1, count);
    take(best, left, all<T>(2));
    return best;
  }

 private:
  __attribute__((always_inline)) Bits<T> at(int64_t w, int64_t count) const {
    return rectified<kWhole>(pixel_of(row, stride_w, w, W), count, mean, scale, shift);
  }
};

template <class T>
inline const T* channels_of(const View<const T>& view, int64_t h, int64_t H, int64_t c) {
  return h >= 0 && h < H ? view.data + h * view.stride_h + c : nullptr;
}

template <class T>
void pool_apply(const PoolBlock<T>& block) {
  const int64_t H = block.extent.H, W = block.extent.W, Wo = pooled(W);
  for_each_pool_chunk(block.extent.C, [&](int64_t c0, int64_t C) {
    Coefficients<T, 3> coefficients;
    pack_row<T>(block.mean + c0, C, coefficients.row[0]);
    pack_row<T>(block.scale + c0, C, coefficients.row[1]);
    pack_row<T>(block.shift + c0, C, coefficients.row[2]);
    for (int64_t ho = block.first; ho < block.last; ++ho) {
      for_each_pack<T>(C, [&](auto whole, int64_t c, int64_t count) __attribute__((always_inline)) {
        constexpr bool kWhole = decltype(whole)::value;
        const auto walk = [&](int64_t h) __attribute__((always_inline)) {
          return WindowRow<kWhole, T>{channels_of(block.y, h, H, c0 + c), block.y.stride_w,      W,
                                      coefficients.at(0, c),              coefficients.at(1, c), coefficients.at(2, c)};
        };
        auto top = walk(2 * ho - 1), middle = walk(2 * ho), bottom = walk(2 * ho + 1);
        // the last row of a window is the first of the one below it
        T* kept = block.scratch + 2 * Wo * c;
        T* out = block.out.data + ho * block.out.stride_h + c0 + c;
        uint8_t* code = block.code.data + ho * block.code.stride_h + c0 + c;
        for (int64_t wo = 0; wo < Wo; ++wo, kept += 2 * kPackLanes<T>) {
          Best<T> best;
          if (ho == block.first) {
            best = top.next(wo, count);
          } else {
            best.value = as_bits<T>(load_raw<true>(kept, 0));
            best.code = as_bits<T>(load_raw<true>(kept + kPackLanes<T>, 0));
          }
          const Best<T> second = middle.next(wo, count), third = bottom.next(wo, count);
          store_raw<true>(kept, 0, as_raw<T>(third.value));
          store_raw<true>(kept + kPackLanes<T>, 0, as_raw<T>(third.code));
          take(best, second.value, plus<T>(second.code, 3));
          take(best, third.value, plus<T>(third.code, 6));
          store_raw<kWhole>(out + wo * block.out.stride_w, count, as_raw<T>(best.value));
          store_code<kWhole, T>(code + wo * block.code.stride_w, count, each_bits<T>([&](auto k) {
                                  return best.value.v[k] > 0 ? best.code.v[k] : all<T>(kNoMaximum).v[k];
                                }));
        }
      });
    }
  });
}

// A float sum runs over at most so many windows before it is added to a double.
constexpr int64_t kSummedWindows = 128;

template <class T>
void pool_sums(const PoolBlock<T>& block) {
  const int64_t H = block.extent.H, W = block.extent.W, Wo = pooled(W);
  for_each_pool_chunk(block.extent.C, [&](int64_t c0, int64_t C) {
    Coefficients<T, 1> coefficients;
    Coefficients<T, 2> acc;
    pack_row<T>(block.mean + c0, C, coefficients.row[0]);
    for (int64_t ho = block.first; ho < block.last; ++ho) {
      for (int64_t begin = 0; begin < Wo; begin += kSummedWindows) {
        const int64_t end = smaller(begin + kSummedWindows, Wo);
        for_each_pack<T>(C, [&](auto whole, int64_t c, int64_t count) __attribute__((always_inline)) {
          constexpr bool kWhole = decltype(whole)::value;
          const Pack<T> mean = coefficients.at(0, c);
          const T* rows[3];
          for (int64_t k = 0; k < 3; ++k) {  // no code points outside: any pixel does for what is there
            const int64_t h = 2 * ho - 1 + k;
            rows[k] = channels_of(block.y, h < 0 || h >= H ? 2 * ho : h, H, c0 + c);
          }
          Pack<T> dot{}, sum{};
          for (int64_t wo = begin; wo < end; ++wo) {
            const T* dout = block.dout.data + ho * block.dout.stride_h + wo * block.dout.stride_w + c0 + c;
            const uint8_t* from = block.code.data + ho * block.code.stride_h + wo * block.code.stride_w + c0 + c;
            const Bits<T> code = load_code<kWhole, T>(from, count);
            Bits<T> y{};
            unrolled<9>([&](auto position) __attribute__((always_inline)) {
              const int64_t w = 2 * wo - 1 + position % 3;
              const T* p = rows[position / 3] + (w < 0 || w >= W ? 2 * wo : w) * block.y.stride_w;
              const auto value = as_bits<T>(load_raw<kWhole>(p, count));
              y = each_bits<T>([&](auto k) {
                return code.v[k] == static_cast<typename BitsOf<T>::Lane>(position()) ? value.v[k] : y.v[k];
              });
            });
            const auto given = as_bits<T>(load_raw<kWhole>(dout, count));
            const Pack<T> d = numbers<T>(each_bits<T>([&](auto k) {
              return code.v[k] == static_cast<typename BitsOf<T>::Lane>(kNoMaximum) ? typename BitsOf<T>::V{}
                                                                                    : given.v[k];
            }));
            const Pack<T> x = numbers<T>(y);
            dot = each<T>([&](auto i) { return multiply_add(d.v[i], x.v[i] - mean.v[i], dot.v[i]); });
            sum = each<T>([&](auto i) { return sum.v[i] + d.v[i]; });
          }
          store_pack<T>(acc.row[0] + c, dot);
          store_pack<T>(acc.row[1] + c, sum);
        });
        add_row<T>(acc.row[0], C, block.dot + c0);
        add_row<T>(acc.row[1], C, block.sum + c0);
      }
    }
  });
}

// The windows of two rows of outputs, a column at a time.
template <bool kWhole, class T>
struct WindowColumns {
  struct Window {
    Bits<T> dout, code;
  };
  struct Row {
    const T* dout;  // null where there is none
    const uint8_t* code;
  };
  Row rows[2];
  int64_t dout_stride, code_stride, Wo;

  __attribute__((always_inline)) Window at(int row, int64_t wo, int64_t count) const {
    const T* dout = pixel_of(rows[row].dout, dout_stride, wo, Wo);
    return {dout ? as_bits<T>(load_raw<kWhole>(dout, count)) : Bits<T>{},
            load_code<kWhole, T>(dout ? rows[row].code + wo * code_stride : nullptr, count)};
  }
};

template <class T>
void pool_grads(const PoolBlock<T>& block) {
  const int64_t H = block.extent.H, W = block.extent.W, Ho = pooled(H), Wo = pooled(W);
  const bool through = block.slope;
  constexpr bool kLineAtOnce = sizeof(Raw<T>) >= 64;
  const auto bytes = [](int64_t v) { return v * static_cast<int64_t>(sizeof(T)); };
  const bool streamed = kLineAtOnce && block.dy_past_cache &&
                        (reinterpret_cast<uintptr_t>(block.dy.data) | bytes(block.dy.stride_h) |
                         bytes(block.dy.stride_w) | bytes(block.extent.C)) % 64 == 0;
  for_each_pool_chunk(block.extent.C, [&](int64_t c0, int64_t C) {
    Coefficients<T, 4> coefficients;
    pack_row<T>(block.mean + c0, C, coefficients.row[0]);
    pack_row<T>(block.scale + c0, C, coefficients.row[1]);
    pack_row<T>(through ? block.slope + c0 : nullptr, C, coefficients.row[2]);
    pack_row<T>(through ? block.drift + c0 : nullptr, C, coefficients.row[3]);
    for (int64_t ho = block.first; ho < block.last; ++ho) {
      for_each_pack<T>(C, [&](auto whole, int64_t c, int64_t count) __attribute__((always_inline)) {
        constexpr bool kWhole = decltype(whole)::value;
        using Columns = WindowColumns<kWhole, T>;
        const Pack<T> mean = coefficients.at(0, c), scale = coefficients.at(1, c);
        const Pack<T> slope = coefficients.at(2, c), drift = coefficients.at(3, c);
        const auto row = [&](int64_t h) __attribute__((always_inline)) {
          return typename Columns::Row{channels_of(block.dout, h, Ho, c0 + c),
                                       block.code.data + h * block.code.stride_h + c0 + c};
        };
        const Columns columns{{row(ho), row(ho + 1)}, block.dout.stride_w, block.code.stride_w, Wo};
        const int64_t y_row = 2 * ho * block.y.stride_h + c0 + c, dy_row = 2 * ho * block.dy.stride_h + c0 + c;
        const bool two_rows = 2 * ho + 1 < H;

        const auto put = [&](int64_t below, int64_t w, const Pack<T>& d) __attribute__((always_inline)) {
          Pack<T> v;
          if (through) {
            const T* from = block.y.data + y_row + below * block.y.stride_h + w * block.y.stride_w;
            const Pack<T> y = widen<T>(load_raw<kWhole>(from, count));
            v = each<T>([&](auto i) {
              const auto drifted = multiply_add(y.v[i] - mean.v[i], slope.v[i], drift.v[i]);
              return multiply_add(d.v[i], scale.v[i], drifted);
            });
          } else {
            v = each<T>([&](auto i) { return d.v[i] * scale.v[i]; });
          }
          T* to = block.dy.data + dy_row + below * block.dy.stride_h + w * block.dy.stride_w;
          if (kWhole && streamed) {
            stream_raw(to, narrow<T>(v));
          } else {
            store_raw<kWhole>(to, count, narrow<T>(v));
          }
        };
        const auto sum = [](const Pack<T>& a, const Pack<T>& b) __attribute__((always_inline)) {
          return each<T>([&](auto i) { return a.v[i] + b.v[i]; });
        };

        auto here = columns.at(0, 0, count), below = columns.at(1, 0, count);
        for (int64_t wo = 0; wo < Wo; ++wo) {
          const auto right = columns.at(0, wo + 1, count), across = columns.at(1, wo + 1, count);
          const auto d = [&](const auto& window, int64_t position) __attribute__((always_inline)) {
            return numbers<T>(chosen<T>(window.dout, window.code, position));
          };
          const bool two_columns = 2 * wo + 1 < W;
          put(0, 2 * wo, d(here, 4));
          if (two_columns) {
            put(0, 2 * wo + 1, sum(d(here, 5), d(right, 3)));
          }
          if (two_rows) {
            put(1, 2 * wo, sum(d(here, 7), d(below, 1)));
          }
          if (two_rows && two_columns) {
            put(1, 2 * wo + 1, sum(sum(d(here, 8), d(right, 6)), sum(d(below, 2), d(across, 0))));
          }
          here = right;
          below = across;
        }
      });
    }
  });
  if (streamed) {
    stream_fence();
  }
}

template <class T>
constexpr PoolSweeps<T> make_pool_sweeps() {
  return {pool_apply<T>, pool_sums<T>, pool_grads<T>};
}

}  // namespace
}  // namespace se
