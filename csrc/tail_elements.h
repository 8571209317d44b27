// What the tail's sweeps do to one pack, in either layout.
#pragma once

#include "packs.h"
#include "tail.h"

namespace se {
namespace {

template <class T>
inline Pack<T> silu(Pack<T> v) {
  return each<T>([&](auto k) { return v.v[k] / (1 + exponential(-v.v[k])); });
}

template <class T>
inline Pack<T> silu_slope(Pack<T> v) {
  return each<T>([&](auto k) {
    const auto sigma = 1 / (1 + exponential(-v.v[k]));
    return sigma * (1 + v.v[k] * (1 - sigma));
  });
}

// The kinds of tail that have sweeps of their own, with some lines side by side ..
template <Shortcut kShortcut>
struct ReluTail {
  static constexpr TailAct act = TailAct::relu;
  static constexpr Shortcut shortcut = kShortcut;
  static constexpr int kLines = 4;
  static constexpr bool kKnown = true;
  explicit ReluTail(TailAct, Shortcut) {}
};

// .. and all others in one, which looks at every pack what it has to do.
struct AnyTail {
  TailAct act;
  Shortcut shortcut;
  static constexpr int kLines = 1;
  static constexpr bool kKnown = false;
  explicit AnyTail(TailAct act, Shortcut shortcut) : act(act), shortcut(shortcut) {}
};

// Where a pack lies in the tensors of a block.
template <class T>
struct Place {
  const T *y, *residual, *dout;
  T *out, *dy, *dresidual;
};

// In what follows, k[i] is coefficient i of the pack's numbers.
template <class T, class Kind>
class Element : Kind {
  using A = acc_t<T>;
  using Kind::act, Kind::shortcut;

 public:
  // streamed(view, past_cache): whether that result is to be written past the caches, and can be
  template <class F>
  Element(const TailBlock<T>& block, F streamed)
      : Kind(block.act, block.shortcut),
        out_streamed_(streamed(block.out, block.out_past_cache)),
        dy_streamed_(streamed(block.dy, block.dy_past_cache)),
        dresidual_streamed_(streamed(block.dresidual, block.dresidual_past_cache)),
        with_dy_(block.dy.data),
        with_dresidual_(shortcut != Shortcut::none && block.dresidual.data),
        through_(block.through_statistics),
        through2_(block.through_statistics2) {}

  bool normed() const {
    return shortcut == Shortcut::normed;
  }
  bool masked() const {
    return act == TailAct::relu && shortcut != Shortcut::none;
  }
  // Which coefficients each sweep reads
  bool in_apply(int i) const {
    return !Kind::kKnown || i <= kShift || (normed() && i <= kScale2);
  }
  bool in_sums(int i) const {
    return recomputed() ? in_apply(i) : !Kind::kKnown || i == kMean || (normed() && i == kMean2);
  }
  bool in_grads(int i) const {
    const bool second = i == kMean2 || i == kScale2 || i == kSlope2 || i == kDrift2;
    return !Kind::kKnown || (i == kShift ? recomputed() : !second || normed());
  }

  // Writes out; a bit for each number that a ReLU passed
  template <bool kWhole>
  __attribute__((always_inline)) uint32_t apply(const Place<T>& at, int64_t count, const Pack<T>* k) const {
    Pack<T> right{};
    if (shortcut != Shortcut::none) {
      right = widen<T>(load_raw<kWhole>(at.residual, count));
    }
    const Pack<T> v = before(widen<T>(load_raw<kWhole>(at.y, count)), right, k);
    put<kWhole>(at.out, count, narrow<T>(activated(v)), out_streamed_);
    return masked() ? passes<T>(v) : 0;
  }

  // Adds d, d * (y - mean) and, of a normed shortcut, d * (residual - mean2) to `sum`
  template <bool kWhole>
  __attribute__((always_inline)) void add(const Place<T>& at, int64_t count, uint32_t passed, const Pack<T>* k,
                                          Pack<T>* sum) const {
    Pack<T> right{};
    if (reads_residual()) {
      right = widen<T>(load_raw<kWhole>(at.residual, count));
    }
    const Pack<T> x = widen<T>(load_raw<kWhole>(at.y, count));
    const Pack<T> d = through_act(load_raw<kWhole>(at.dout, count), passed, x, right, k);
    const Pack<T> from_mean = centred(x, k[kMean]);
    sum[0] = each<T>([&](auto i) { return sum[0].v[i] + d.v[i]; });
    sum[1] = each<T>([&](auto i) { return multiply_add(d.v[i], from_mean.v[i], sum[1].v[i]); });
    if (normed()) {
      const Pack<T> from_mean2 = centred(right, k[kMean2]);
      sum[2] = each<T>([&](auto i) { return multiply_add(d.v[i], from_mean2.v[i], sum[2].v[i]); });
    }
  }

  // Writes dy and dresidual
  template <bool kWhole>
  __attribute__((always_inline)) void grads(const Place<T>& at, int64_t count, uint32_t passed,
                                            const Pack<T>* k) const {
    Pack<T> x{}, right{};
    if (recomputed() || through_) {
      x = widen<T>(load_raw<kWhole>(at.y, count));
    }
    if (reads_residual()) {
      right = widen<T>(load_raw<kWhole>(at.residual, count));
    }
    const Pack<T> d = through_act(load_raw<kWhole>(at.dout, count), passed, x, right, k);
    if (with_dy_) {
      const Pack<T> v = through_norm(d, x, through_, k[kMean], k[kScale], k[kSlope], k[kDrift]);
      put<kWhole>(at.dy, count, narrow<T>(v), dy_streamed_);
    }
    if (with_dresidual_) {
      Pack<T> v = d;
      if (normed()) {
        v = through_norm(d, right, through2_, k[kMean2], k[kScale2], k[kSlope2], k[kDrift2]);
      }
      put<kWhole>(at.dresidual, count, narrow<T>(v), dresidual_streamed_);
    }
  }

  void finish() const {
    if (out_streamed_ || dy_streamed_ || dresidual_streamed_) {
      stream_fence();
    }
  }

 private:
  // Whether the backward pass computes v again, and what for it and the sums it has to read
  bool recomputed() const {
    return act == TailAct::silu || (act == TailAct::relu && shortcut == Shortcut::none);
  }
  bool reads_residual() const {
    return normed() || (recomputed() && shortcut == Shortcut::plain);
  }

  __attribute__((always_inline)) Pack<T> before(Pack<T> y, Pack<T> residual, const Pack<T>* k) const {
    Pack<T> v = centred(y, k[kMean]);
    v = each<T>([&](auto i) { return multiply_add(v.v[i], k[kScale].v[i], k[kShift].v[i]); });
    if (normed()) {
      const Pack<T> right = centred(residual, k[kMean2]);
      v = each<T>([&](auto i) { return multiply_add(right.v[i], k[kScale2].v[i], v.v[i]); });
    } else if (shortcut == Shortcut::plain) {
      v = each<T>([&](auto i) { return v.v[i] + residual.v[i]; });
    }
    return v;
  }

  __attribute__((always_inline)) Pack<T> activated(Pack<T> v) const {
    if (act == TailAct::relu) {
      return each<T>([&](auto i) { return positive_part(v.v[i]); });
    }
    return act == TailAct::silu ? silu<T>(v) : v;
  }

  // d: the gradient of v
  __attribute__((always_inline)) Pack<T> through_act(Raw<T> dout, uint32_t passed, Pack<T> y, Pack<T> residual,
                                                     const Pack<T>* k) const {
    if (masked()) {
      return widen<T>(select<T>(dout, passed));
    }
    const Pack<T> d = widen<T>(dout);
    if (act == TailAct::identity) {
      return d;
    }
    const Pack<T> v = before(y, residual, k);
    if (act == TailAct::silu) {
      const Pack<T> slope = silu_slope<T>(v);
      return each<T>([&](auto i) { return d.v[i] * slope.v[i]; });
    }
    const Vec<A> bound = broadcast<A>(kRoundsToZero<T>);
    return each<T>([&](auto i) { return v.v[i] <= bound ? Vec<A>{} : d.v[i]; });
  }

  // scale * d + slope * (x - mean) + drift
  static __attribute__((always_inline)) Pack<T> through_norm(Pack<T> d, Pack<T> x, bool through_statistics,
                                                             const Pack<T>& mean, const Pack<T>& scale,
                                                             const Pack<T>& slope, const Pack<T>& drift) {
    if (!through_statistics) {
      return each<T>([&](auto i) { return multiply_add(d.v[i], scale.v[i], drift.v[i]); });
    }
    const Pack<T> from_mean = centred(x, mean);
    return each<T>([&](auto i) {
      return multiply_add(d.v[i], scale.v[i], multiply_add(from_mean.v[i], slope.v[i], drift.v[i]));
    });
  }

  static __attribute__((always_inline)) Pack<T> centred(Pack<T> x, const Pack<T>& mean) {
    return each<T>([&](auto i) { return x.v[i] - mean.v[i]; });
  }

  template <bool kWhole>
  static __attribute__((always_inline)) void put(T* to, int64_t count, Raw<T> raw, bool streamed) {
    if (kWhole && streamed) {
      stream_raw(to, raw);
    } else {
      store_raw<kWhole>(to, count, raw);
    }
  }

  bool out_streamed_, dy_streamed_, dresidual_streamed_, with_dy_, with_dresidual_, through_, through2_;
};

}  // namespace
}  // namespace se
