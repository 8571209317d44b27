// Antialiased resize and warp of a picture, of one instruction set. Included by images_kernels.h.
#pragma once

#include "images_scratch.h"
#include "vectors.h"

namespace se {
namespace {

// A pixel, and what lies behind it
typedef float Quad __attribute__((vector_size(16)));
constexpr int64_t kQuad = 4, kQuads = kLanes<float> / kQuad;

inline Quad load_quad(const float* p) {
  Quad quad;
  std::memcpy(&quad, p, sizeof(quad));
  return quad;
}
inline void store_quad(float* p, Quad quad) {
  std::memcpy(p, &quad, sizeof(quad));
}

inline Vec<float> load_vector(const float* p) {
  return load<true>(p, kLanes<float>);
}
inline void store_vector(float* p, Vec<float> v) {
  store<true>(p, kLanes<float>, v);
}

typedef int32_t IntLanes __attribute__((vector_size(kVectorBytes)));

template <bool kWhole>
inline Vec<float> load_bytes(const uint8_t* p, int64_t count) {
  uint8_t first[kLanes<float>] = {};
  if constexpr (!kWhole) {
    std::memcpy(first, p, count);
    p = first;
  }
  // as signed numbers, for which there is an instruction
  return __builtin_convertvector(bit_cast<IntLanes>(widen_bytes(p)), Vec<float>);
}

// The weights of an output are those of a triangle over the pixels of the box, and sum to `total`.
inline void find_taps(int64_t n, int64_t side, double total, Taps& taps) {
  taps.widest = 0;
  const double scale = static_cast<double>(n) / side, reach = std::max(1.0, scale);
  for (int64_t i = 0; i < side; ++i) {
    const double centre = (i + 0.5) * scale;
    const auto first = static_cast<int64_t>(std::max(0.0, centre - reach + 0.5));
    const auto last = std::min(std::min(static_cast<int64_t>(centre + reach + 0.5), n), first + taps.most);
    float* const weight = taps.weight + i * taps.most;
    double sum = 0;
    for (int64_t k = 0; k < taps.most; ++k) {
      const double distance = std::abs(first + k + 0.5 - centre) / reach;
      weight[k] = first + k < last && distance < 1 ? static_cast<float>(1 - distance) : 0;
      sum += weight[k];
    }
    for (int64_t k = 0; k < taps.most; ++k) {
      weight[k] = static_cast<float>(weight[k] * (total / sum));
    }
    taps.first[i] = static_cast<int32_t>(first);
    taps.count[i] = static_cast<int32_t>(last - first);
    taps.widest = std::max(taps.widest, last - first);
  }
}

// to[j] = sum over k of weight[k] * from[k * stride + j], of n bytes a row.
inline void mix_bytes(const uint8_t* from, int64_t stride, int64_t count, const float* weight, int64_t n, float* to) {
  constexpr int kAtOnce = 4;
  constexpr int64_t L = kLanes<float>;
  int64_t j = 0;
  for (; j + kAtOnce * L <= n; j += kAtOnce * L) {
    Vec<float> sum[kAtOnce] = {};
    for (int64_t k = 0; k < count; ++k) {
      const auto w = broadcast(weight[k]);
      const uint8_t* row = from + k * stride + j;
#pragma GCC unroll 4
      for (int v = 0; v < kAtOnce; ++v) {
        sum[v] = multiply_add(load_bytes<true>(row + v * L, L), w, sum[v]);
      }
    }
    for (int v = 0; v < kAtOnce; ++v) {
      store_vector(to + j + v * L, sum[v]);
    }
  }
  for (; j < n; j += L) {
    Vec<float> sum{};
    for (int64_t k = 0; k < count; ++k) {
      sum = multiply_add(load_bytes<false>(from + k * stride + j, std::min(L, n - j)), broadcast(weight[k]), sum);
    }
    store_vector(to + j, sum);
  }
}

// One behind the other
inline Vec<float> joined(const Quad* quads) {
  Vec<float> v;
  if constexpr (kQuads == 1) {
    v = bit_cast<Vec<float>>(quads[0]);
  } else if constexpr (kQuads == 2) {
    v = bit_cast<Vec<float>>(__builtin_shufflevector(quads[0], quads[1], 0, 1, 2, 3, 4, 5, 6, 7));
  } else {
    const auto low = __builtin_shufflevector(quads[0], quads[1], 0, 1, 2, 3, 4, 5, 6, 7);
    const auto high = __builtin_shufflevector(quads[2], quads[3], 0, 1, 2, 3, 4, 5, 6, 7);
    v = bit_cast<Vec<float>>(
        __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  }
  return v;
}

// kQuads rows of a square, of as many rows of pixels, which lie quad by quad: the first pixel of every row, the second
// of every row, ..
inline void mix_pixels(const float* pixels, const Taps& taps, int64_t side, float* const* out) {
  const int64_t count = taps.widest;
  const float* weight = taps.weight;
  for (int64_t x = 0; x < side; ++x, weight += taps.most) {
    const float* const from = pixels + taps.first[x] * kLanes<float>;
    Vec<float> sum{};
    for (int64_t k = 0; k < count; ++k) {
      sum = multiply_add(load_vector(from + k * kLanes<float>), broadcast(weight[k]), sum);
    }
    Quad quads[kQuads];
    std::memcpy(quads, &sum, sizeof(quads));
    for (int64_t r = 0; r < kQuads; ++r) {
      store_quad(out[r] + 3 * x, quads[r]);
    }
  }
}

// The box as a square in [0, 1].
inline void resize(const uint8_t* box, int64_t stride, int64_t h, int64_t w, const Scratch& scratch) {
  const Square& to = scratch.a;
  Taps along_x = scratch.along_x, along_y = scratch.along_y;
  find_taps(h, to.side, 1 / 255.0, along_y);
  find_taps(w, to.side, 1, along_x);
  // of no weight, and finite: what is taken behind the last pixel
  std::memset(scratch.pixels + w * kLanes<float>, 0, along_x.most * kLanes<float> * sizeof(float));
  const int64_t row_stride = row_of_box(w);
  for (int64_t i = 0; i < to.side; i += kQuads) {
    float* out[kQuads];
    for (int64_t r = 0; r < kQuads; ++r) {
      const int64_t row = std::min(i + r, to.side - 1);
      out[r] = to.at(row);
      mix_bytes(box + along_y.first[row] * stride, stride, along_y.count[row], along_y.weight + row * along_y.most,
                3 * w, scratch.row + r * row_stride);
    }
    for (int64_t x = 0; x < w; ++x) {
      Quad quads[kQuads];
      for (int64_t r = 0; r < kQuads; ++r) {
        quads[r] = load_quad(scratch.row + r * row_stride + 3 * x);
      }
      store_vector(scratch.pixels + x * kLanes<float>, joined(quads));
    }
    mix_pixels(scratch.pixels, along_x, to.side, out);
  }
}

// Zeros on both sides of every row; behind it went the quad of its last pixel.
inline void clear_beside(const Square& square) {
  std::memset(square.at(0) - kBefore, 0, kBefore * sizeof(float));
  for (int64_t i = 0; i < square.side; ++i) {
    std::memset(square.at(i) + 3 * square.side, 0, (square.stride - 3 * square.side) * sizeof(float));
  }
}

inline void clear_around(const Square& square) {
  const int64_t row = square.stride * sizeof(float);
  clear_beside(square);
  std::memset(square.at(-kRowsAbove) - kBefore, 0, kRowsAbove * row);
  std::memset(square.at(square.side) - kBefore, 0, kRowsBelow * row);
}

// warp: in fractions of the side. What is outside, or not a number, is brought to the zeros around the square.
inline void warp(const Square& from, const float* warp, float* row, const Square& to) {
  clear_around(from);
  const int64_t side = to.side;
  const auto coordinates = [&](const float* of, int64_t i, float* at) {
    // in pixels, from the first one's centre
    const double start = (of[0] * 0.5 + of[1] * (i + 0.5)) + static_cast<double>(of[2]) * side - 0.5;
    const auto step = broadcast(of[0]), offset = broadcast(static_cast<float>(start));
    const auto low = broadcast(-1.0f), high = broadcast(static_cast<float>(side));
    Vec<float> x{};
    for (int64_t lane = 0; lane < kLanes<float>; ++lane) {
      x[lane] = static_cast<float>(lane);
    }
    for (int64_t j = 0; j < side; j += kLanes<float>, x += static_cast<float>(kLanes<float>)) {
      Vec<float> v = multiply_add(step, x, offset);
      v = v > low ? v : low;
      store_vector(at + j, v < high ? v : high);
    }
  };
  const int64_t room = whole_lines(side);
  float *const xs = row, *const ys = row + room;
  auto* const offsets = reinterpret_cast<int32_t*>(row + 2 * room);
  for (int64_t i = 0; i < side; ++i) {
    coordinates(warp, i, xs);
    coordinates(warp + 3, i, ys);
    for (int64_t j = 0; j < side; j += kLanes<float>) {
      const Vec<float> x = load_vector(xs + j), y = load_vector(ys + j);
      const IntLanes left = __builtin_convertvector(x + 1, IntLanes) - 1;
      const IntLanes top = __builtin_convertvector(y + 1, IntLanes) - 1;
      store_vector(xs + j, x - __builtin_convertvector(left, Vec<float>));
      store_vector(ys + j, y - __builtin_convertvector(top, Vec<float>));
      const IntLanes offset = top * static_cast<int32_t>(from.stride) + left * 3;
      std::memcpy(offsets + j, &offset, sizeof(offset));
    }
    float* const out = to.at(i);
    for (int64_t j = 0; j < side; ++j) {
      const float *const above = from.first + offsets[j], *const below = above + from.stride;
      const Quad upper = load_quad(above) + xs[j] * (load_quad(above + 3) - load_quad(above));
      const Quad lower = load_quad(below) + xs[j] * (load_quad(below + 3) - load_quad(below));
      store_quad(out + 3 * j, upper + ys[j] * (lower - upper));
    }
  }
}

}  // namespace
}  // namespace se
