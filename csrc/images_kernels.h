// The steps of a picture, of one instruction set. Included by its file, after simd.h and what that asks for.
//
// A square's numbers are taken by vectors as they lie, R, G, B, R, ..: three vectors that follow one another have the
// same channels at their lanes as the next three.
#pragma once

#include "images_resize.h"

namespace se {
namespace {

constexpr int64_t kGroup = 3 * kLanes<float>;

// Numbers of a channel, at the lanes of three vectors.
struct Pattern {
  Vec<float> v[3];
};

template <class F>
inline Pattern pattern(F of_channel) {
  Pattern p;
  for (int k = 0; k < 3; ++k) {
    for (int64_t lane = 0; lane < kLanes<float>; ++lane) {
      p.v[k][lane] = of_channel((k * kLanes<float> + lane) % 3);
    }
  }
  return p;
}

// 0 for NaN
inline Vec<float> clamp(Vec<float> v, float high) {
  v = v > 0 ? v : Vec<float>{};
  const auto most = broadcast(high);
  return v < most ? v : most;
}

// Of a square with zeros beside it.
inline void mean_pixel(const Square& x, double* mean) {
  double total[kGroup] = {};
  for (int64_t i = 0; i < x.side; ++i) {
    const float* const row = x.at(i);
    Vec<float> sum[3] = {};
    for (int64_t j = 0; j < 3 * x.side; j += kGroup) {
      for (int k = 0; k < 3; ++k) {
        sum[k] += load_vector(row + j + k * kLanes<float>);
      }
    }
    for (int64_t lane = 0; lane < kGroup; ++lane) {
      total[lane] += sum[lane / kLanes<float>][lane % kLanes<float>];
    }
  }
  for (int c = 0; c < 3; ++c) {
    mean[c] = 0;
    for (int64_t lane = c; lane < kGroup; lane += 3) {
      mean[c] += total[lane];
    }
    mean[c] /= static_cast<double>(x.side) * x.side;
  }
}

inline bool is_identity(const float* m, int64_t columns, int64_t step) {
  for (int64_t i = 0; i < columns; ++i) {
    if (m[i] != (i % step == 0 ? 1 : 0)) {
      return false;
    }
  }
  return true;
}

inline bool changes_color(const Edit& edit) {
  return !is_identity(edit.color, 9, 4) || !std::all_of(edit.pivot, edit.pivot + 9, [](float p) { return p == 0; });
}

// A channel of the result is a sum over the five numbers around its own, those of another pixel times 0.
inline void change_color(const Square& from, const Edit& edit, const Square& to) {
  double mean[3], shift[3] = {};
  clear_beside(from);
  mean_pixel(from, mean);
  for (int64_t i = 0; i < 9; ++i) {
    shift[i / 3] += edit.pivot[i] * mean[i % 3];
  }
  Pattern coefficients[5];
  for (int64_t offset = -2; offset <= 2; ++offset) {
    coefficients[offset + 2] = pattern([&](int64_t c) {
      return c + offset >= 0 && c + offset < 3 ? edit.color[3 * c + c + offset] : 0.0f;
    });
  }
  const Pattern shifts = pattern([&](int64_t c) { return static_cast<float>(shift[c]); });
  for (int64_t i = 0; i < from.side; ++i) {
    const float* const x = from.at(i);
    float* const y = to.at(i);
    for (int64_t j = 0; j < 3 * from.side; j += kGroup) {
      for (int k = 0; k < 3; ++k) {
        const int64_t at = j + k * kLanes<float>;
        Vec<float> sum = shifts.v[k];
        for (int64_t o = 0; o < 5; ++o) {
          sum = multiply_add(coefficients[o].v[k], load_vector(x + at + o - 2), sum);
        }
        store_vector(y + at, clamp(sum, 1));
      }
    }
  }
}

// What a tone makes of each of 256 values in a channel of `pixels` pixels, of which `counts` have each value.
inline void tone_table(Tone tone, float level, const int32_t* counts, int64_t pixels, float* table) {
  int64_t low = 0, high = 255;
  while (low < high && counts[low] == 0) {
    ++low;
  }
  while (high > low && counts[high] == 0) {
    --high;
  }
  const int kept = level >= 8 ? 8 : level >= 0 ? static_cast<int>(level) : 0;
  const float span = static_cast<float>(high - low) * static_cast<float>(1 / 255.0);  // rounded as torchvision's is
  const int64_t step = (pixels - counts[high]) / 255;
  int64_t below = 0;
  for (int64_t q = 0; q < 256; ++q) {
    int64_t value = q;
    if (tone == Tone::posterize) {
      value = q & (0xff00 >> kept);
    } else if (tone == Tone::solarize) {
      value = static_cast<float>(q) >= level ? 255 - q : q;
    } else if (tone == Tone::autocontrast && low < high) {
      value = std::clamp<int64_t>(static_cast<int64_t>(static_cast<float>(q - low) / span), 0, 255);
    } else if (tone == Tone::equalize && step > 0) {
      value = std::min<int64_t>(255, (below + step / 2) / step);
    }
    below += counts[q];
    table[q] = static_cast<float>(value) / 255;
  }
}

inline void change_tone(const Square& from, Tone tone, float level, const Square& to) {
  const auto shift = broadcast(12582912.0f);  // 1.5 * 2^23: the low bits of a sum with it are a whole number
  int32_t counts[3][256] = {};
  for (int64_t i = 0; i < from.side; ++i) {
    const float* const x = from.at(i);
    float* const q = to.at(i);
    for (int64_t j = 0; j < 3 * from.side; j += kLanes<float>) {
      const Bits32 bits = bit_cast<Bits32>(clamp(255 * load_vector(x + j), 255) + shift) & 0xffu;
      store_vector(q + j, bit_cast<Vec<float>>(bits));
    }
    uint32_t value[3];
    for (int64_t j = 0; j < 3 * from.side; j += 3) {
      std::memcpy(value, q + j, sizeof(value));
      ++counts[0][value[0]], ++counts[1][value[1]], ++counts[2][value[2]];
    }
  }
  float table[3][256];
  for (int c = 0; c < 3; ++c) {
    tone_table(tone, level, counts[c], from.side * from.side, table[c]);
  }
  for (int64_t i = 0; i < from.side; ++i) {
    float* const q = to.at(i);
    uint32_t value[3];
    for (int64_t j = 0; j < 3 * from.side; j += 3) {
      std::memcpy(value, q + j, sizeof(value));
      for (int c = 0; c < 3; ++c) {
        q[j + c] = table[c][value[c]];
      }
    }
  }
}

// `column` is a row of scratch, of the sums of three numbers one above the other.
inline void sharpen(const Square& from, float factor, float* column, const Square& to) {
  const int64_t side = from.side, n = 3 * side;
  const auto share = broadcast(1 / 13.0f), blended = broadcast(1 - factor);
  column += kLine;
  for (int64_t i = 0; i < side; ++i) {
    const float* const x = from.at(i);
    float* const y = to.at(i);
    for (int64_t j = 0; j < n; j += kLanes<float>) {
      store_vector(y + j, clamp(load_vector(x + j), 1));
    }
    if (i == 0 || i == side - 1) {
      continue;
    }
    for (int64_t j = 0; j < n; j += kLanes<float>) {
      const Vec<float> above = load_vector(from.at(i - 1) + j), below = load_vector(from.at(i + 1) + j);
      store_vector(column + j, above + load_vector(x + j) + below);
    }
    float border[6];
    std::memcpy(border, y, 3 * sizeof(float));
    std::memcpy(border + 3, y + n - 3, 3 * sizeof(float));
    for (int64_t j = 0; j < n; j += kLanes<float>) {
      const Vec<float> v = load_vector(x + j);
      const Vec<float> around = load_vector(column + j - 3) + load_vector(column + j) + load_vector(column + j + 3);
      store_vector(y + j, clamp(multiply_add(multiply_add(around + 4 * v, share, -v), blended, v), 1));
    }
    std::memcpy(y, border, 3 * sizeof(float));
    std::memcpy(y + n - 3, border + 3, 3 * sizeof(float));
  }
}

// to[j] = sum over k of weight[k] * at(k)[j]; there is room for kBehind numbers behind all of them.
template <class At>
inline void mix_rows(At at, int64_t count, const float* weight, int64_t n, float* to) {
  constexpr int kAtOnce = 4;
  static_assert(kAtOnce * kLanes<float> <= kBehind);
  for (int64_t j = 0; j < n; j += kAtOnce * kLanes<float>) {
    Vec<float> sum[kAtOnce] = {};
    for (int64_t k = 0; k < count; ++k) {
      const float* const row = at(k) + j;
      const auto w = broadcast(weight[k]);
      for (int v = 0; v < kAtOnce; ++v) {
        sum[v] = multiply_add(load_vector(row + v * kLanes<float>), w, sum[v]);
      }
    }
    for (int v = 0; v < kAtOnce; ++v) {
      store_vector(to + j + v * kLanes<float>, sum[v]);
    }
  }
}

inline int64_t reflected(int64_t i, int64_t side) {
  return i < 0 ? -i : i < side ? i : 2 * (side - 1) - i;
}

// x, with `between` for what is blurred along y only.
inline void blur(const Square& x, float sigma, const Scratch& scratch, const Square& between) {
  const int64_t side = x.side, n = 3 * side;
  const float reach = 3 * sigma;
  const int64_t radius = reach < side - 1 ? static_cast<int64_t>(std::ceil(reach)) : side - 1, count = 2 * radius + 1;
  double total = 0;
  const auto bell = [&](int64_t k) {
    const double distance = (k - radius) / static_cast<double>(sigma);
    return std::exp(-distance * distance / 2);
  };
  for (int64_t k = 0; k < count; ++k) {
    total += bell(k);
  }
  for (int64_t k = 0; k < count; ++k) {
    scratch.window[k] = static_cast<float>(bell(k) / total);
  }
  for (int64_t i = 0; i < side; ++i) {
    mix_rows([&](int64_t k) { return x.at(reflected(i + k - radius, side)); }, count, scratch.window, n, between.at(i));
  }
  float* const wide = scratch.row;  // a row with its reflections
  for (int64_t i = 0; i < side; ++i) {
    const float* const row = between.at(i);
    std::memcpy(wide + 3 * radius, row, n * sizeof(float));
    for (int64_t j = 1; j <= radius; ++j) {
      std::memcpy(wide + 3 * (radius - j), row + 3 * j, 3 * sizeof(float));
      std::memcpy(wide + 3 * (radius + side - 1 + j), row + 3 * (side - 1 - j), 3 * sizeof(float));
    }
    mix_rows([&](int64_t k) { return wide + 3 * k; }, count, scratch.window, n, x.at(i));
  }
}

template <class T>
void finish(const Square& x, const Picture<T>& picture) {
  const Pattern mean = pattern([&](int64_t c) { return picture.mean[c]; });
  const Pattern inv_std = pattern([&](int64_t c) { return picture.inv_std[c]; });
  const int64_t n = 3 * x.side;
  for (int64_t i = 0; i < x.side; ++i) {
    const float* const row = x.at(i);
    T* const out = picture.out + i * n;
    const auto normalised = [&](int64_t j, int k) __attribute__((always_inline)) {
      return (load_vector(row + j) - mean.v[k]) * inv_std.v[k];
    };
    int64_t j = 0;
    for (; j + kGroup <= n; j += kGroup) {
      for (int k = 0; k < 3; ++k) {
        const int64_t at = j + k * kLanes<float>;
        store<true>(out + at, kLanes<float>, normalised(at, k));
      }
    }
    for (int k = 0; j < n; ++k, j += kLanes<float>) {
      if (n - j >= kLanes<float>) {
        store<true>(out + j, kLanes<float>, normalised(j, k));
      } else {
        store<false>(out + j, n - j, normalised(j, k));
      }
    }
  }
  const float *const erased = picture.edit->erased, side = static_cast<float>(x.side);
  const auto within = [&](float v) { return static_cast<int64_t>(std::ceil(v > 0 ? std::min(v, side) : 0.0f)); };
  const int64_t left = within(erased[1]), right = within(erased[1] + erased[3]);
  for (int64_t i = within(erased[0]); i < within(erased[0] + erased[2]); ++i) {
    std::fill(picture.out + 3 * (i * x.side + left), picture.out + 3 * (i * x.side + std::max(left, right)), T(0));
  }
}

template <class T>
void make_picture(const Picture<T>& picture) {
  const Edit& edit = *picture.edit;
  Scratch scratch;
  carve(picture.side, picture.h, picture.w, picture.scratch, scratch);
  Square x = scratch.a, other = scratch.b;
  resize(picture.box, picture.stride, picture.h, picture.w, scratch);
  if (!is_identity(edit.warp, 6, 4)) {
    warp(x, edit.warp, scratch.row, other);
    std::swap(x, other);
  }
  if (changes_color(edit)) {
    change_color(x, edit, other);
    std::swap(x, other);
  }
  if (edit.tone != 0) {
    change_tone(x, static_cast<Tone>(edit.tone), edit.level, other);
    std::swap(x, other);
  }
  if (edit.sharpness != 1 && picture.side > 2) {
    sharpen(x, edit.sharpness, scratch.row, other);
    std::swap(x, other);
  }
  if (edit.sigma > 0) {
    blur(x, edit.sigma, scratch, other);
  }
  finish(x, picture);
}

}  // namespace
}  // namespace se
