// The squeeze-and-excitation of pooled samples, and its way back: steps of a team, mathematics in se.h. Each ends when
// every thread has done its part.
#pragma once

#include "division.h"
#include "se_activations.h"

namespace se {
namespace {

template <class T, class W>
const Products<W>& products() {
  if constexpr (std::is_same_v<W, T>) {
    return kernels<T>().narrow_weights;
  } else {
    return kernels<T>().wide_weights;
  }
}

template <class T, class W>
void squeeze(const Team& team, const Shape& shape, const Forward<T, W>& args, int64_t first, int64_t last) {
  const int64_t C = shape.C, R = shape.R;
  team.share(R, kRowBlock, [&](int64_t begin, int64_t end) {
    auto* hidden = args.hidden + first * R + begin;
    products<T, W>().rows_dot(args.w1 + begin * C, end - begin, C, args.b1 ? args.b1 + begin : nullptr,
                              args.pooled + first * C, C, hidden, R, last - first);
    for (int64_t n = 0; n < last - first; ++n) {
      activate(shape.act, hidden + n * R, args.active + (first + n) * R + begin, end - begin);
    }
  });
  team.wait();
}

template <class T, class W>
void excite(const Team& team, const Shape& shape, const Forward<T, W>& args, int64_t first, int64_t last) {
  const int64_t C = shape.C, R = shape.R;
  team.share(C, kRowBlock, [&](int64_t begin, int64_t end) {
    auto* gate = args.gate + first * C + begin;
    products<T, W>().rows_dot(args.w2 + begin * R, end - begin, R, args.b2 ? args.b2 + begin : nullptr,
                              args.active + first * R, R, gate, C, last - first);
    for (int64_t n = 0; n < last - first; ++n) {
      open_gate<T>(shape.gate_fn, gate + n * C, end - begin);
    }
  });
  team.wait();
}

// dz to dh
template <class T, class W>
void through_w2(const Team& team, const Shape& shape, const Backward<T, W>& args, int64_t first, int64_t last) {
  const int64_t C = shape.C, R = shape.R;
  team.share(R, kColumnBlock, [&](int64_t begin, int64_t end) {
    const int64_t offset = first * R + begin;
    products<T, W>().cols_dot(args.w2 + begin, R, C, end - begin, args.dz + first * C, C, args.dh + offset, R,
                              last - first);
    for (int64_t n = 0; n < last - first; ++n) {
      activate_grad(shape.act, args.hidden + offset + n * R, args.dh + offset + n * R, end - begin);
    }
  });
  team.wait();
}

// dh to q
template <class T, class W>
void through_w1(const Team& team, const Shape& shape, const Backward<T, W>& args, int64_t first, int64_t last) {
  const int64_t C = shape.C, R = shape.R;
  const auto pixels = static_cast<acc_t<T>>(shape.H * shape.W);
  team.share(C, kColumnBlock, [&](int64_t begin, int64_t end) {
    auto* q = args.q + first * C + begin;
    products<T, W>().cols_dot(args.w1 + begin, C, R, end - begin, args.dh + first * R, R, q, C, last - first);
    for (int64_t n = 0; n < last - first; ++n) {
      for (int64_t c = 0; c < end - begin; ++c) {
        q[n * C + c] /= pixels;
      }
    }
  });
  team.wait();
}

template <class A, class W>
void sum_samples(const Team& team, int64_t N, const A* rows, int64_t columns, W* sum) {
  if (!sum) {
    return;
  }
  team.share(columns, kColumnBlock, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double total = 0;
      for (int64_t n = 0; n < N; ++n) {
        total += rows[n * columns + i];
      }
      sum[i] = static_cast<W>(static_cast<A>(total));
    }
  });
}

template <class T, class W>
void weight_gradients(const Team& team, const Shape& shape, const Backward<T, W>& args) {
  const int64_t N = shape.N, C = shape.C, R = shape.R;
  if (args.dw1) {
    team.share(R, kRowBlock, [&](int64_t begin, int64_t end) {
      products<T, W>().outer(args.dh + begin, R, args.pooled, C, N, args.dw1 + begin * C, end - begin, C);
    });
  }
  if (args.dw2) {
    team.share(C, kRowBlock, [&](int64_t begin, int64_t end) {
      products<T, W>().outer(args.dz + begin, C, args.active, R, N, args.dw2 + begin * R, end - begin, R);
    });
  }
  sum_samples(team, N, args.dh, R, args.db1);
  sum_samples(team, N, args.dz, C, args.db2);
}

}  // namespace
}  // namespace se
