// What a picture is made in: two squares, the taps of the resize, and rows on their way.
#pragma once

#include <algorithm>
#include <cstring>

#include "images.h"

namespace se {
namespace {

constexpr int64_t kLine = kScratchAlignment / static_cast<int64_t>(sizeof(float));
// Zeros around a square: one pixel before each row, two behind, a row above, two below. A row has room for whole
// vectors behind, also in groups of three, of the widest that there are.
constexpr int64_t kBefore = kLine, kBehind = 3 * kLine + 16;
constexpr int64_t kRowsAbove = 1, kRowsBelow = 2;

inline int64_t whole_lines(int64_t floats) {
  return (floats + kLine - 1) / kLine * kLine;
}

// (S, S, 3) floats, row i at at(i).
struct Square {
  float* first;
  int64_t side, stride;  // stride in floats
  float* at(int64_t i) const {
    return first + i * stride;
  }
};

// Along one axis output i is the sum over k < count[i] of weight[i * most + k] * input[first[i] + k]; the weights from
// count[i] to `most` are 0.
struct Taps {
  int64_t most, widest;  // widest: the largest count
  int32_t *first, *count;
  float* weight;
};

struct Scratch {
  Square a, b;
  Taps along_y, along_x;
  float* row;     // up to four rows of the box, or one of a square with its reflections, or the coordinates of one
  float* pixels;  // of as many rows of the box, a vector for each column, and for the taps beyond
  float* window;  // a blur's, 2 S
};

// With room for a vector behind
inline int64_t row_of_box(int64_t w) {
  return whole_lines(3 * w) + kLine;
}

// How many pixels of a box of n an output sees at most.
inline int64_t most_taps(int64_t n, int64_t side) {
  return n <= side ? std::min<int64_t>(n, 3) : std::min<int64_t>(n, 2 * n / side + 3);
}

// Divides the memory at `base` up; returns how many bytes of it there must be.
inline int64_t carve(int64_t side, int64_t h, int64_t w, char* base, Scratch& scratch) {
  int64_t used = 0;
  const auto take = [&](int64_t floats) {
    float* const at = reinterpret_cast<float*>(base) + used;
    used += whole_lines(floats);
    return base ? at : nullptr;
  };
  const int64_t stride = kBefore + whole_lines(3 * side + kBehind);
  for (Square* square : {&scratch.a, &scratch.b}) {
    float* const all = take((side + kRowsAbove + kRowsBelow) * stride);
    *square = {base ? all + kRowsAbove * stride + kBefore : nullptr, side, stride};
  }
  const auto take_taps = [&](int64_t n) {
    const int64_t most = most_taps(n, side);
    auto* const first = reinterpret_cast<int32_t*>(take(side));
    auto* const count = reinterpret_cast<int32_t*>(take(side));
    return Taps{most, 0, first, count, take(side * most)};
  };
  scratch.along_y = take_taps(h);
  scratch.along_x = take_taps(w);
  scratch.row = take(std::max(4 * row_of_box(w), 9 * side) + kBehind);
  scratch.pixels = take((w + scratch.along_x.most) * kLine);
  scratch.window = take(2 * side);
  return used * static_cast<int64_t>(sizeof(float));
}

}  // namespace
}  // namespace se
