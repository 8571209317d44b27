// The tail's sweeps over channels-last blocks. A line is the C contiguous channels of one pixel; some lines are taken
// side by side, so that coefficients and sums are loaded once for all of them.
#pragma once

#include "se_channels_last.h"
#include "tail_elements.h"

namespace se {
namespace {

// Rows of wide numbers for a chunk of channels, in the order of packs.
template <class T, int kRowCount>
struct Rows {
  alignas(kVectorBytes) acc_t<T> row[kRowCount][kChannelChunk + kPackLanes<T>];
};

template <class T>
void pivot_channels_last(View<const T> x, Extent extent, acc_t<T>* pivot) {
  using A = acc_t<T>;
  constexpr int kMost = 8;
  const bool several = extent.H * extent.W >= kMost;
  for (int64_t c0 = 0; c0 < extent.C; c0 += kChannelChunk) {
    const int64_t C = smaller(extent.C - c0, kChannelChunk);
    const View<const T> views[1] = {x};
    if (several) {
      add_block<kMost, 1>(views, extent.W, c0, C, 0, 1, pivot + c0);
    } else {
      add_block<1, 1>(views, extent.W, c0, C, 0, 1, pivot + c0);
    }
  }
  for (int64_t c = 0; c < extent.C; ++c) {
    const A mean = several ? pivot[c] / kMost : pivot[c];
    pivot[c] = mean - mean == 0 ? mean : 0;
  }
}

template <int kLines, class T>
inline void add_moments(const T* const (&lines)[kLines], int64_t C, Rows<T, 3>& rows) {
  for_each_pack<T>(C, [&](auto whole, int64_t c, int64_t count) __attribute__((always_inline)) {
    constexpr bool kWhole = decltype(whole)::value;
    const Pack<T> pivot = load_pack<T>(rows.row[0] + c);
    Pack<T> sum = load_pack<T>(rows.row[1] + c), square = load_pack<T>(rows.row[2] + c);
    unrolled<kLines>([&](auto l) __attribute__((always_inline)) {
      const Pack<T> x = widen<T>(load_raw<kWhole>(lines[l] + c, count));
      const Pack<T> d = each<T>([&](auto k) { return x.v[k] - pivot.v[k]; });
      sum = each<T>([&](auto k) { return sum.v[k] + d.v[k]; });
      square = each<T>([&](auto k) { return multiply_add(d.v[k], d.v[k], square.v[k]); });
    });
    store_pack<T>(rows.row[1] + c, sum);
    store_pack<T>(rows.row[2] + c, square);
  });
}

template <int kLines, class T>
inline void add_moments_block(View<const T> x, int64_t W, int64_t c0, int64_t C, int64_t begin, int64_t groups,
                              Rows<T, 3>& rows) {
  Lines<const T> walks[kLines];
  for (int l = 0; l < kLines; ++l) {
    walks[l] = Lines<const T>(x, W, begin + l * groups);
  }
  for (int64_t group = 0; group < groups; ++group) {
    const T* lines[kLines];
    for (int l = 0; l < kLines; ++l) {
      lines[l] = walks[l].next() + c0;
    }
    add_moments<kLines>(lines, C, rows);
  }
}

template <class T>
void moments_channels_last(View<const T> x, Extent extent, const acc_t<T>* pivot, double* sum, double* square) {
  constexpr int kLines = 8;
  Rows<T, 3> rows;
  for (int64_t c0 = 0; c0 < extent.C; c0 += kChannelChunk) {
    const int64_t C = smaller(extent.C - c0, kChannelChunk), count = extent.H * extent.W;
    pack_row<T>(pivot + c0, C, rows.row[0]);
    for (int64_t done = 0; done < count;) {
      pack_row<T>(nullptr, C, rows.row[1]);
      pack_row<T>(nullptr, C, rows.row[2]);
      const int64_t groups = smaller((count - done) / kLines, kGroupsPerBlock);
      if (groups > 0) {
        add_moments_block<kLines>(x, extent.W, c0, C, done, groups, rows);
        done += groups * kLines;
      } else {
        add_moments_block<1>(x, extent.W, c0, C, done, count - done, rows);
        done = count;
      }
      add_row<T>(rows.row[1], C, sum + c0);
      add_row<T>(rows.row[2], C, square + c0);
    }
  }
}

// The lines of a block, walked side by side.
template <class T>
struct TailLines {
  Lines<const T> y, residual, dout;
  Lines<T> out, dy, dresidual;
  Lines<uint8_t> bits;

  TailLines(const TailBlock<T>& b, int64_t first = 0)
      : y(b.y, b.extent.W, first),
        residual(b.residual, b.extent.W, first),
        dout(b.dout, b.extent.W, first),
        out(b.out, b.extent.W, first),
        dy(b.dy, b.extent.W, first),
        dresidual(b.dresidual, b.extent.W, first),
        bits(b.bits, b.extent.W, first) {}
};

template <int kLines, class P, class Walk>
inline __attribute__((always_inline)) void take(Walk& walk, int64_t offset, P (&lines)[kLines]) {
  for (int l = 0; l < kLines; ++l) {
    lines[l] = walk.next() + offset;
  }
}

// The bits of a pack, whose first is at a byte of its own; those past the last are 0.
template <bool kWhole, class T>
inline void write_bits(uint8_t* to, int64_t count, uint32_t bits) {
  if constexpr (kWhole) {
    std::memcpy(to, &bits, kPackLanes<T> / 8);
  } else {
    bits &= (uint32_t(1) << count) - 1;
    std::memcpy(to, &bits, (count + 7) / 8);
  }
}
template <bool kWhole, class T>
inline uint32_t read_bits(const uint8_t* from, int64_t count) {
  uint32_t bits = 0;
  std::memcpy(&bits, from, kWhole ? kPackLanes<T> / 8 : (count + 7) / 8);
  return bits;
}

// Calls f(rows, c0, C) for every chunk of channels, with those coefficients that `picks` asks for.
template <class T, class F>
inline __attribute__((always_inline)) void for_each_chunk(const TailBlock<T>& block, bool (*picks)(int), F f) {
  Rows<T, kCoefficients> rows;
  for (int64_t c0 = 0; c0 < block.extent.C; c0 += kChannelChunk) {
    const int64_t C = smaller(block.extent.C - c0, kChannelChunk);
    for (int k = 0; k < kCoefficients; ++k) {
      if (picks(k)) {
        pack_row<T>(block.coefficient[k] ? block.coefficient[k] + c0 : nullptr, C, rows.row[k]);
      }
    }
    f(rows, c0, C);
  }
}

// Calls f(lines) for groups of kLines lines, and then of one; `lines` is a type.
template <int kLines, class F>
inline __attribute__((always_inline)) void for_each_lines(int64_t count, F f) {
  int64_t i = 0;
  for (; i + kLines <= count; i += kLines) {
    f(std::integral_constant<int, kLines>{});
  }
  for (; i < count; ++i) {
    f(std::integral_constant<int, 1>{});
  }
}

template <class T>
inline bool can_stream(const View<T>& view, int64_t C, bool past_cache) {
  const auto bytes = [](auto v) { return static_cast<int64_t>(v * sizeof(T)); };
  return past_cache && view.data &&
         (reinterpret_cast<uintptr_t>(view.data) | bytes(view.stride_h) | bytes(view.stride_w) |
          bytes(C)) % 64 == 0;
}

template <bool kWhole, class T>
inline void put(T* to, int64_t count, Raw<T> raw, bool streamed) {
  if (kWhole && streamed) {
    stream_raw(to, raw);
  } else {
    store_raw<kWhole>(to, count, raw);
  }
}

template <class T, TailAct kAct, Shortcut kShortcut>
void apply_channels_last(const TailBlock<T>& block) {
  using E = Element<T, kAct, kShortcut>;
  constexpr bool kWithResidual = kShortcut != Shortcut::none;
  const bool streamed = can_stream(block.out, block.extent.C, block.out_past_cache);
  const bool masked = E::kMasked && block.bits.data;
  for_each_chunk(block, [](int k) { return E::in_apply(k); }, [&](const auto& rows, int64_t c0, int64_t C) {
    TailLines<T> walk(block);
    for_each_lines<4>(block.extent.H * block.extent.W, [&](auto lines) {
      constexpr int kLines = decltype(lines)::value;
      const T *y[kLines], *residual[kLines];
      T* out[kLines];
      uint8_t* bits[kLines];
      take(walk.y, c0, y);
      take(walk.residual, c0, residual);
      take(walk.out, c0, out);
      take(walk.bits, c0 / 8, bits);
      for_each_pack<T>(C, [&](auto whole, int64_t c, int64_t count) __attribute__((always_inline)) {
        constexpr bool kWhole = decltype(whole)::value;
        Pack<T> k[kCoefficients];
        unrolled<kCoefficients>([&](auto i) __attribute__((always_inline)) {
          if constexpr (E::in_apply(i)) {
            k[i] = load_pack<T>(rows.row[i] + c);
          }
        });
        unrolled<kLines>([&](auto l) __attribute__((always_inline)) {
          Pack<T> right{};
          if constexpr (kWithResidual) {
            right = widen<T>(load_raw<kWhole>(residual[l] + c, count));
          }
          const Pack<T> left = widen<T>(load_raw<kWhole>(y[l] + c, count));
          const Pack<T> v = E::before(left, right, [&](int i) __attribute__((always_inline)) { return k[i]; });
          put<kWhole>(out[l] + c, count, narrow<T>(E::activated(v)), streamed);
          if constexpr (E::kMasked) {
            if (masked) {
              write_bits<kWhole, T>(bits[l] + c / 8, count, passes<T>(v));
            }
          }
        });
      });
    });
  });
  if (streamed) {
    stream_fence();
  }
}

template <class T, TailAct kAct, Shortcut kShortcut>
void sums_channels_last(const TailBlock<T>& block) {
  using E = Element<T, kAct, kShortcut>;
  constexpr int kSums = E::kNormed ? 3 : 2, kMost = 4;
  double* const totals[3] = {block.sum, block.dot, block.dot2};
  for_each_chunk(block, [](int k) { return E::in_sums(k); }, [&](const auto& rows, int64_t c0, int64_t C) {
    Rows<T, kSums> acc;
    const int64_t count = block.extent.H * block.extent.W;
    for (int64_t done = 0; done < count;) {
      for (int s = 0; s < kSums; ++s) {
        pack_row<T>(nullptr, C, acc.row[s]);
      }
      const auto add_lines = [&](auto lines, int64_t groups) {
        constexpr int kLines = decltype(lines)::value;
        Lines<const T> y_walk[kLines], residual_walk[kLines], dout_walk[kLines];
        Lines<uint8_t> bits_walk[kLines];
        for (int l = 0; l < kLines; ++l) {
          const int64_t first = done + l * groups;
          y_walk[l] = Lines<const T>(block.y, block.extent.W, first);
          residual_walk[l] = Lines<const T>(block.residual, block.extent.W, first);
          dout_walk[l] = Lines<const T>(block.dout, block.extent.W, first);
          bits_walk[l] = Lines<uint8_t>(block.bits, block.extent.W, first);
        }
        for (int64_t group = 0; group < groups; ++group) {
          const T *y[kLines], *residual[kLines], *dout[kLines];
          const uint8_t* bits[kLines];
          for (int l = 0; l < kLines; ++l) {
            y[l] = y_walk[l].next() + c0;
            residual[l] = residual_walk[l].next() + c0;
            dout[l] = dout_walk[l].next() + c0;
            bits[l] = bits_walk[l].next() + c0 / 8;
          }
          for_each_pack<T>(C, [&](auto whole, int64_t c, int64_t left) __attribute__((always_inline)) {
            constexpr bool kWhole = decltype(whole)::value;
            Pack<T> k[kCoefficients], sum[kSums];
            unrolled<kCoefficients>([&](auto i) __attribute__((always_inline)) {
              if constexpr (E::in_sums(i)) {
                k[i] = load_pack<T>(rows.row[i] + c);
              }
            });
            unrolled<kSums>([&](auto s) __attribute__((always_inline)) { sum[s] = load_pack<T>(acc.row[s] + c); });
            unrolled<kLines>([&](auto l) __attribute__((always_inline)) {
              Pack<T> right{};
              if constexpr (E::kReadsResidual) {
                right = widen<T>(load_raw<kWhole>(residual[l] + c, left));
              }
              const Pack<T> x = widen<T>(load_raw<kWhole>(y[l] + c, left));
              const uint32_t passed = E::kMasked ? read_bits<kWhole, T>(bits[l] + c / 8, left) : 0;
              const Pack<T> d = E::through_act(load_raw<kWhole>(dout[l] + c, left), passed, x, right,
                                               [&](int i) __attribute__((always_inline)) { return k[i]; });
              const Pack<T> from_mean = E::centred(x, k[kMean]);
              sum[0] = each<T>([&](auto i) { return sum[0].v[i] + d.v[i]; });
              sum[1] = each<T>([&](auto i) { return multiply_add(d.v[i], from_mean.v[i], sum[1].v[i]); });
              if constexpr (E::kNormed) {
                const Pack<T> from_mean2 = E::centred(right, k[kMean2]);
                sum[2] = each<T>([&](auto i) { return multiply_add(d.v[i], from_mean2.v[i], sum[2].v[i]); });
              }
            });
            unrolled<kSums>([&](auto s) __attribute__((always_inline)) { store_pack<T>(acc.row[s] + c, sum[s]); });
          });
        }
        done += kLines * groups;
      };
      const int64_t groups = smaller((count - done) / kMost, kGroupsPerBlock);
      if (groups > 0) {
        add_lines(std::integral_constant<int, kMost>{}, groups);
      } else {
        add_lines(std::integral_constant<int, 1>{}, count - done);
      }
      for (int s = 0; s < kSums; ++s) {
        add_row<T>(acc.row[s], C, totals[s] + c0);
      }
    }
  });
}

template <class T, TailAct kAct, Shortcut kShortcut>
void grads_channels_last(const TailBlock<T>& block) {
  using E = Element<T, kAct, kShortcut>;
  const bool with_dy = block.dy.data, with_dresidual = kShortcut != Shortcut::none && block.dresidual.data;
  const bool dy_streamed = can_stream(block.dy, block.extent.C, block.dy_past_cache);
  const bool dresidual_streamed = can_stream(block.dresidual, block.extent.C, block.dresidual_past_cache);
  const bool through = block.through_statistics, through2 = block.through_statistics2;
  for_each_chunk(block, [](int k) { return E::in_grads(k); }, [&](const auto& rows, int64_t c0, int64_t C) {
    TailLines<T> walk(block);
    for_each_lines<4>(block.extent.H * block.extent.W, [&](auto lines) {
      constexpr int kLines = decltype(lines)::value;
      const T *y[kLines], *residual[kLines], *dout[kLines];
      T *dy[kLines], *dresidual[kLines];
      uint8_t* bits[kLines];
      take(walk.y, c0, y);
      take(walk.residual, c0, residual);
      take(walk.dout, c0, dout);
      take(walk.dy, c0, dy);
      take(walk.dresidual, c0, dresidual);
      take(walk.bits, c0 / 8, bits);
      for_each_pack<T>(C, [&](auto whole, int64_t c, int64_t count) __attribute__((always_inline)) {
        constexpr bool kWhole = decltype(whole)::value;
        Pack<T> held[kCoefficients];
        unrolled<kCoefficients>([&](auto i) __attribute__((always_inline)) {
          if constexpr (E::in_grads(i)) {
            held[i] = load_pack<T>(rows.row[i] + c);
          }
        });
        const auto k = [&](int i) __attribute__((always_inline)) { return held[i]; };
        unrolled<kLines>([&](auto l) __attribute__((always_inline)) {
          Pack<T> x{}, right{};
          if (E::kRecomputed || through) {
            x = widen<T>(load_raw<kWhole>(y[l] + c, count));
          }
          if constexpr (E::kReadsResidual) {
            right = widen<T>(load_raw<kWhole>(residual[l] + c, count));
          }
          const uint32_t passed = E::kMasked ? read_bits<kWhole, T>(bits[l] + c / 8, count) : 0;
          const Pack<T> d = E::through_act(load_raw<kWhole>(dout[l] + c, count), passed, x, right, k);
          if (with_dy) {
            const Pack<T> v = E::through_norm(d, x, through, k, kMean, kScale, kSlope, kDrift);
            put<kWhole>(dy[l] + c, count, narrow<T>(v), dy_streamed);
          }
          if (with_dresidual) {
            Pack<T> v = d;
            if constexpr (E::kNormed) {
              v = E::through_norm(d, right, through2, k, kMean2, kScale2, kSlope2, kDrift2);
            }
            put<kWhole>(dresidual[l] + c, count, narrow<T>(v), dresidual_streamed);
          }
        });
      });
    });
  });
  if (dy_streamed || dresidual_streamed) {
    stream_fence();
  }
}

}  // namespace
}  // namespace se
