// The table of the tail's kernels of one instruction set. Included by its file, after simd.h and what that asks for.
#pragma once

#include "tail_channels_last.h"
#include "tail_contiguous.h"

namespace se {
namespace {

// Of each sweep the nine kinds, by activation and shortcut.
#define SE_TAIL_SWEEP(sweep)                                                                              \
  {                                                                                                       \
    {sweep<T, TailAct::relu, Shortcut::none>, sweep<T, TailAct::relu, Shortcut::plain>,                   \
     sweep<T, TailAct::relu, Shortcut::normed>},                                                          \
        {sweep<T, TailAct::silu, Shortcut::none>, sweep<T, TailAct::silu, Shortcut::plain>,               \
         sweep<T, TailAct::silu, Shortcut::normed>},                                                      \
        {sweep<T, TailAct::identity, Shortcut::none>, sweep<T, TailAct::identity, Shortcut::plain>,       \
         sweep<T, TailAct::identity, Shortcut::normed>},                                                  \
  }

template <class T>
constexpr TailKernels<T> make_tail_kernels() {
  return {
      {pivot_channels_last<T>, moments_channels_last<T>, SE_TAIL_SWEEP(apply_channels_last),
       SE_TAIL_SWEEP(sums_channels_last), SE_TAIL_SWEEP(grads_channels_last)},
      {pivot_contiguous<T>, moments_contiguous<T>, SE_TAIL_SWEEP(apply_contiguous), SE_TAIL_SWEEP(sums_contiguous),
       SE_TAIL_SWEEP(grads_contiguous)},
  };
}

#undef SE_TAIL_SWEEP

}  // namespace
}  // namespace se
