// The table of the tail's kernels of one instruction set. Included by its file, after simd.h and what that asks for.
#pragma once

#include "tail_channels_last.h"
#include "tail_contiguous.h"

namespace se {
namespace {

// Processors of this architecture almost always have a better instruction set than this one.
#if defined(__x86_64__)
constexpr bool kLastResort = kVectorBytes == 16;
#else
constexpr bool kLastResort = false;
#endif

template <class Kind>
struct Tag {
  using type = Kind;
};

// sweep_of(tag) is the sweep of a kind. What networks are trained with has sweeps of its own; to make one of every
// activation, shortcut, type and instruction set would cost its user minutes and gigabytes for what is rarely called.
template <class T, class F>
constexpr TailSweep<T> make_tail_sweep(F sweep_of) {
  const auto any = sweep_of(Tag<AnyTail>{});
  if constexpr (std::is_same_v<T, double> || kLastResort) {
    return {{any, any, any}, any};
  } else {
    return {{sweep_of(Tag<ReluTail<Shortcut::none>>{}), sweep_of(Tag<ReluTail<Shortcut::plain>>{}),
             sweep_of(Tag<ReluTail<Shortcut::normed>>{})},
            any};
  }
}

template <class T>
constexpr TailKernels<T> make_tail_kernels() {
  return {
      {pivot_channels_last<T>, moments_channels_last<T>,
       make_tail_sweep<T>([](auto tag) { return apply_channels_last<T, typename decltype(tag)::type>; }),
       make_tail_sweep<T>([](auto tag) { return sums_channels_last<T, typename decltype(tag)::type>; }),
       make_tail_sweep<T>([](auto tag) { return grads_channels_last<T, typename decltype(tag)::type>; })},
      {pivot_contiguous<T>, moments_contiguous<T>,
       make_tail_sweep<T>([](auto tag) { return apply_contiguous<T, typename decltype(tag)::type>; }),
       make_tail_sweep<T>([](auto tag) { return sums_contiguous<T, typename decltype(tag)::type>; }),
       make_tail_sweep<T>([](auto tag) { return grads_contiguous<T, typename decltype(tag)::type>; })},
  };
}

}  // namespace
}  // namespace se
