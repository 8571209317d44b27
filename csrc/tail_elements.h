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

template <class T, TailAct kAct, Shortcut kShortcut>
struct Element {
  using A = acc_t<T>;
  static constexpr bool kNormed = kShortcut == Shortcut::normed;
  static constexpr bool kMasked = kAct == TailAct::relu && kShortcut != Shortcut::none;
  // Whether the backward pass computes v again, and what for it and the sums it has to read
  static constexpr bool kRecomputed = kAct == TailAct::silu || (kAct == TailAct::relu && kShortcut == Shortcut::none);
  static constexpr bool kReadsResidual = kNormed || (kRecomputed && kShortcut == Shortcut::plain);

  static constexpr bool in_apply(int k) {
    return k <= kShift || (kNormed && k <= kScale2);
  }
  static constexpr bool in_sums(int k) {
    return kRecomputed ? in_apply(k) : k == kMean || (kNormed && k == kMean2);
  }
  static constexpr bool in_grads(int k) {
    return k == kShift ? kRecomputed : (k != kMean2 && k != kScale2 && k != kSlope2 && k != kDrift2) || kNormed;
  }

  // k(i) is coefficient i, as a pack
  template <class K>
  static __attribute__((always_inline)) Pack<T> before(Pack<T> y, Pack<T> residual, const K& k) {
    Pack<T> v = centred(y, k(kMean));
    const Pack<T> scale = k(kScale), shift = k(kShift);
    v = each<T>([&](auto i) { return multiply_add(v.v[i], scale.v[i], shift.v[i]); });
    if constexpr (kNormed) {
      const Pack<T> right = centred(residual, k(kMean2)), scale2 = k(kScale2);
      v = each<T>([&](auto i) { return multiply_add(right.v[i], scale2.v[i], v.v[i]); });
    } else if constexpr (kShortcut == Shortcut::plain) {
      v = each<T>([&](auto i) { return v.v[i] + residual.v[i]; });
    }
    return v;
  }

  static __attribute__((always_inline)) Pack<T> activated(Pack<T> v) {
    if constexpr (kAct == TailAct::relu) {
      return each<T>([&](auto i) { return positive_part(v.v[i]); });
    } else if constexpr (kAct == TailAct::silu) {
      return silu<T>(v);
    } else {
      return v;
    }
  }

  // d: the gradient of v
  template <class K>
  static __attribute__((always_inline)) Pack<T> through_act(Raw<T> dout, uint32_t bits, Pack<T> y, Pack<T> residual,
                                                            const K& k) {
    if constexpr (kMasked) {
      return widen<T>(select<T>(dout, bits));
    } else if constexpr (kAct == TailAct::relu) {
      const Pack<T> v = before(y, residual, k), d = widen<T>(dout);
      const Vec<A> bound = broadcast<A>(kRoundsToZero<T>);
      return each<T>([&](auto i) { return v.v[i] <= bound ? Vec<A>{} : d.v[i]; });
    } else if constexpr (kAct == TailAct::silu) {
      const Pack<T> slope = silu_slope<T>(before(y, residual, k)), d = widen<T>(dout);
      return each<T>([&](auto i) { return d.v[i] * slope.v[i]; });
    } else {
      return widen<T>(dout);
    }
  }

  // scale * d + slope * centred + drift
  template <class K>
  static __attribute__((always_inline)) Pack<T> through_norm(Pack<T> d, Pack<T> x, bool through_statistics, const K& k,
                                                             int mean, int scale, int slope, int drift) {
    const Pack<T> factor = k(scale);
    const Pack<T> shift = k(drift);
    if (!through_statistics) {
      return each<T>([&](auto i) { return multiply_add(d.v[i], factor.v[i], shift.v[i]); });
    }
    const Pack<T> from_mean = centred(x, k(mean)), by = k(slope);
    return each<T>([&](auto i) {
      return multiply_add(d.v[i], factor.v[i], multiply_add(from_mean.v[i], by.v[i], shift.v[i]));
    });
  }

  static __attribute__((always_inline)) Pack<T> centred(Pack<T> x, Pack<T> mean) {
    return each<T>([&](auto i) { return x.v[i] - mean.v[i]; });
  }
};

}  // namespace
}  // namespace se
