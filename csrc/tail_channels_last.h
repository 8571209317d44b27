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

// One pixel's channels of a chunk, in every tensor of a block.
template <class T>
struct Line {
  Place<T> first;
  uint8_t* bits;

  Place<T> at(int64_t c) const {
    return {first.y + c, first.residual + c, first.dout + c, first.out + c, first.dy + c, first.dresidual + c};
  }
};

template <class T>
class TailLines {
 public:
  TailLines() = default;
  TailLines(const TailBlock<T>& b, int64_t c0, int64_t first)
      : c0_(c0),
        y_(b.y, b.extent.W, first),
        residual_(b.residual, b.extent.W, first),
        dout_(b.dout, b.extent.W, first),
        out_(b.out, b.extent.W, first),
        dy_(b.dy, b.extent.W, first),
        dresidual_(b.dresidual, b.extent.W, first),
        bits_(b.bits, b.extent.W, first) {}
  __attribute__((always_inline)) Line<T> next() {
    return {{y_.next() + c0_, residual_.next() + c0_, dout_.next() + c0_, out_.next() + c0_, dy_.next() + c0_,
             dresidual_.next() + c0_},
            bits_.next() + c0_ / 8};
  }

 private:
  int64_t c0_;
  Lines<const T> y_, residual_, dout_;
  Lines<T> out_, dy_, dresidual_;
  Lines<uint8_t> bits_;
};

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
template <class T, class Picks, class F>
inline __attribute__((always_inline)) void for_each_chunk(const TailBlock<T>& block, Picks picks, F f) {
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

template <class T, class Picks>
inline __attribute__((always_inline)) void load_coefficients(const Rows<T, kCoefficients>& rows, int64_t c, Picks picks,
                                                             Pack<T> (&k)[kCoefficients]) {
  unrolled<kCoefficients>([&](auto i) __attribute__((always_inline)) {
    if (picks(i)) {
      k[i] = load_pack<T>(rows.row[i] + c);
    }
  });
}

// Calls f(l) for each of kLines lines: side by side where packs are whole. The last, partial one is not worth the code.
template <bool kWhole, int kLines, class F>
inline __attribute__((always_inline)) void for_each_line(F f) {
  if constexpr (kWhole) {
    unrolled<kLines>(f);
  } else {
    for (int l = 0; l < kLines; ++l) {
      f(l);
    }
  }
}

// Calls f(whole, line, c, count, k) for every pack of every line of a block.
template <class T, class Kind, class Picks, class F>
inline __attribute__((always_inline)) void for_each_pack_of_lines(const TailBlock<T>& block, Picks picks, F f) {
  const int64_t count = block.extent.H * block.extent.W;
  for_each_chunk(block, picks, [&](const auto& rows, int64_t c0, int64_t C) __attribute__((always_inline)) {
    TailLines<T> walk(block, c0, 0);
    const auto take = [&](auto lines) __attribute__((always_inline)) {
      constexpr int kLines = decltype(lines)::value;
      Line<T> line[kLines];
      for (int l = 0; l < kLines; ++l) {
        line[l] = walk.next();
      }
      for_each_pack<T>(C, [&](auto whole, int64_t c, int64_t left) __attribute__((always_inline)) {
        Pack<T> k[kCoefficients];
        load_coefficients(rows, c, picks, k);
        for_each_line<decltype(whole)::value, kLines>(
            [&](auto l) __attribute__((always_inline)) { f(whole, line[l], c, left, k); });
      });
    };
    int64_t i = 0;
    if constexpr (Kind::kLines > 1) {
      for (; i + Kind::kLines <= count; i += Kind::kLines) {
        take(std::integral_constant<int, Kind::kLines>{});
      }
    }
    for (; i < count; ++i) {
      take(std::integral_constant<int, 1>{});
    }
  });
}

template <class T, class Kind>
inline Element<T, Kind> element_of_lines(const TailBlock<T>& block) {
  const int64_t C = block.extent.C;
  return Element<T, Kind>(block, [C](const View<T>& view, bool past_cache) {
    const auto bytes = [](auto v) { return static_cast<int64_t>(v * sizeof(T)); };
    return past_cache && view.data &&
           (reinterpret_cast<uintptr_t>(view.data) | bytes(view.stride_h) | bytes(view.stride_w) | bytes(C)) % 64 == 0;
  });
}

template <class T, class Kind>
void apply_channels_last(const TailBlock<T>& block) {
  const Element<T, Kind> element = element_of_lines<T, Kind>(block);
  for_each_pack_of_lines<T, Kind>(
      block, [&](int i) { return element.in_apply(i); },
      [&](auto whole, const Line<T>& line, int64_t c, int64_t count, const Pack<T>* k) __attribute__((always_inline)) {
        constexpr bool kWhole = decltype(whole)::value;
        const uint32_t passed = element.template apply<kWhole>(line.at(c), count, k);
        if (element.masked()) {
          write_bits<kWhole, T>(line.bits + c / 8, count, passed);
        }
      });
  element.finish();
}

template <class T, class Kind>
void sums_channels_last(const TailBlock<T>& block) {
  const Element<T, Kind> element = element_of_lines<T, Kind>(block);
  const auto picks = [&](int i) { return element.in_sums(i); };
  double* const totals[3] = {block.sum, block.dot, block.dot2};
  const int sums = element.normed() ? 3 : 2;
  for_each_chunk(block, picks, [&](const auto& rows, int64_t c0, int64_t C) __attribute__((always_inline)) {
    Rows<T, 3> acc;
    // As `add_block`: a group's lines lie apart
    const auto add_groups = [&](auto lines, int64_t first, int64_t groups) __attribute__((always_inline)) {
      constexpr int kLines = decltype(lines)::value;
      TailLines<T> walks[kLines];
      for (int l = 0; l < kLines; ++l) {
        walks[l] = TailLines<T>(block, c0, first + l * groups);
      }
      for (int64_t group = 0; group < groups; ++group) {
        Line<T> line[kLines];
        for (int l = 0; l < kLines; ++l) {
          line[l] = walks[l].next();
        }
        for_each_pack<T>(C, [&](auto whole, int64_t c, int64_t left) __attribute__((always_inline)) {
          constexpr bool kWhole = decltype(whole)::value;
          Pack<T> k[kCoefficients], sum[3] = {};
          load_coefficients(rows, c, picks, k);
          unrolled<3>([&](auto s) __attribute__((always_inline)) {
            if (s < sums) {
              sum[s] = load_pack<T>(acc.row[s] + c);
            }
          });
          for_each_line<kWhole, kLines>([&](auto l) __attribute__((always_inline)) {
            const uint32_t passed = element.masked() ? read_bits<kWhole, T>(line[l].bits + c / 8, left) : 0;
            element.template add<kWhole>(line[l].at(c), left, passed, k, sum);
          });
          unrolled<3>([&](auto s) __attribute__((always_inline)) {
            if (s < sums) {
              store_pack<T>(acc.row[s] + c, sum[s]);
            }
          });
        });
      }
    };
    const int64_t count = block.extent.H * block.extent.W;
    for (int64_t done = 0; done < count;) {
      for (int s = 0; s < sums; ++s) {
        pack_row<T>(nullptr, C, acc.row[s]);
      }
      const int64_t groups = smaller((count - done) / Kind::kLines, kGroupsPerBlock);
      if (groups > 0) {
        add_groups(std::integral_constant<int, Kind::kLines>{}, done, groups);
        done += Kind::kLines * groups;
      } else {
        add_groups(std::integral_constant<int, 1>{}, done, count - done);
        done = count;
      }
      for (int s = 0; s < sums; ++s) {
        add_row<T>(acc.row[s], C, totals[s] + c0);
      }
    }
  });
}

template <class T, class Kind>
void grads_channels_last(const TailBlock<T>& block) {
  const Element<T, Kind> element = element_of_lines<T, Kind>(block);
  for_each_pack_of_lines<T, Kind>(
      block, [&](int i) { return element.in_grads(i); },
      [&](auto whole, const Line<T>& line, int64_t c, int64_t count, const Pack<T>* k) __attribute__((always_inline)) {
        constexpr bool kWhole = decltype(whole)::value;
        const uint32_t passed = element.masked() ? read_bits<kWhole, T>(line.bits + c / 8, count) : 0;
        element.template grads<kWhole>(line.at(c), count, passed, k);
      });
  element.finish();
}

}  // namespace
}  // namespace se
