// The small products of se.h: several rows and samples at a time, so that what is loaded is used several times.
#pragma once

#include "vectors.h"

namespace se {
namespace {

// Long sums are taken in blocks of this many rows or vectors: the error then grows with the length of a block and the
// number of blocks, not with their product.
constexpr int64_t kRowsPerBlock = 64;
constexpr int64_t kVectorsPerSum = 256;
// Columns whose sums stay in L1.
constexpr int64_t kColumnChunk = 512;

template <int kRows, int kSamples, class W, class A>
inline void rows_dot_tile(const W* m, int64_t cols, const A* bias, const A* x, int64_t ldx, A* y, int64_t ldy) {
  constexpr int64_t kBlock = kVectorsPerSum * kLanes<A>;
  for (int64_t begin = 0; begin < cols; begin += kBlock) {
    Vec<A> acc[kRows][kSamples];
    for (int i = 0; i < kRows; ++i) {
      for (int n = 0; n < kSamples; ++n) {
        acc[i][n] = Vec<A>{};
      }
    }
    for_each_vector<A>(smaller(cols - begin, kBlock),
                       [&](auto whole, int64_t k, int64_t count) __attribute__((always_inline)) {
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
    for (int n = 0; n < kSamples; ++n) {
      for (int i = 0; i < kRows; ++i) {
        const A before = begin > 0 ? y[n * ldy + i] : bias ? bias[i] : A(0);
        y[n * ldy + i] = before + reduce<A>(acc[i][n]);
      }
    }
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

// Rows outside, so that the weights are read from end to end, once.
template <class W>
void rows_dot(const W* m, int64_t rows, int64_t cols, const acc_t<W>* bias, const acc_t<W>* x, int64_t ldx, acc_t<W>* y,
              int64_t ldy, int64_t N) {
  for_each_group_of_four(rows, [&](auto group, int64_t i) {
    for_each_group_of_four(N, [&](auto samples, int64_t n) {
      rows_dot_tile<decltype(group)::value, decltype(samples)::value>(
          m + i * cols, cols, bias ? bias + i : nullptr, x + n * ldx, ldx, y + n * ldy + i, ldy);
    });
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

// The sums of a chunk of columns stay in L1, so that long rows are read from end to end: a tile in registers would take
// a few numbers from every row, each from another page.
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

// y[n, j] for kVectors vectors of j, summed in registers in the order of cols_dot_chunk.
template <int kSamples, int kVectors, class W, class A>
inline void cols_dot_tile(const W* m, int64_t ldm, int64_t rows, const A* x, int64_t ldx, A* y, int64_t ldy) {
  for (int64_t begin = 0; begin < rows; begin += kRowsPerBlock) {
    const int64_t end = smaller(begin + kRowsPerBlock, rows);
    Vec<A> acc[kVectors][kSamples];
    for (int k = 0; k < kVectors; ++k) {
      for (int n = 0; n < kSamples; ++n) {
        acc[k][n] = Vec<A>{};
      }
    }
    for (int64_t i = begin; i < end; ++i) {
      for (int k = 0; k < kVectors; ++k) {
        const Vec<A> weights = load<true>(m + i * ldm + k * kLanes<A>, kLanes<A>);
        for (int n = 0; n < kSamples; ++n) {
          acc[k][n] = multiply_add(weights, broadcast<A>(x[n * ldx + i]), acc[k][n]);
        }
      }
    }
    for (int k = 0; k < kVectors; ++k) {
      for (int n = 0; n < kSamples; ++n) {
        A* to = y + n * ldy + k * kLanes<A>;
        store<true>(to, kLanes<A>, begin == 0 ? acc[k][n] : load<true>(to, kLanes<A>) + acc[k][n]);
      }
    }
  }
}

template <class W>
void cols_dot(const W* m, int64_t ldm, int64_t rows, int64_t cols, const acc_t<W>* x, int64_t ldx, acc_t<W>* y,
              int64_t ldy, int64_t N) {
  using A = acc_t<W>;
  constexpr int kVectors = kVectorBytes == 64 ? 4 : 2;  // as many sums as there are registers for
  constexpr int64_t kTile = kVectors * kLanes<A>;
  for_each_group_of_four(N, [&](auto samples, int64_t n) {
    constexpr int kSamples = decltype(samples)::value;
    int64_t j = 0;
    for (; ldm <= kColumnChunk && j + kTile <= cols; j += kTile) {
      cols_dot_tile<kSamples, kVectors>(m + j, ldm, rows, x + n * ldx, ldx, y + n * ldy + j, ldy);
    }
    for (; j < cols; j += kColumnChunk) {
      cols_dot_chunk<kSamples>(m + j, ldm, rows, smaller(cols - j, kColumnChunk), x + n * ldx, ldx, y + n * ldy + j,
                               ldy);
    }
  });
}

// y[i, j] for kRows rows i and kVectors vectors of j.
template <int kRows, int kVectors, bool kWhole, class A, class W>
inline void outer_tile(const A* u, int64_t ldu, const A* v, int64_t ldv, int64_t N, W* y, int64_t ldy, int64_t count) {
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

}  // namespace
}  // namespace se
