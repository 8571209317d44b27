// What the tail's passes over a batch share: how it is divided, and the blocks that its sweeps are given.
//
// A team of threads sweeps the batch, merges what the sweep gave by channel, takes the squeeze-and-excitation, and
// sweeps again, each thread its own units in the reverse order: what it read last is still in its cache. Where no
// statistics of the batch are wanted, the samples are taken in blocks that the caches hold. Results do not depend on
// the number of threads; there are no atomics.
#pragma once

#include "tail_units.h"

namespace se {
namespace {

// What y is multiplied with and added to: statistics (kRows, C) of y and, of a normed shortcut, of the residual, and
// with SE the gate (N, C). Else null. Both directions make the same numbers of it.
template <class A>
struct Affine {
  const A *stats, *stats2, *gate;
};

template <class T>
class TailPass {
 protected:
  using A = acc_t<T>;

  TailPass(const TailShape& shape, Extent extent, int64_t block)
      : shape_(shape),
        units_(shape, extent, sizeof(T)),
        block_(ceil_div(block, units_.samples()) * units_.samples()),
        outgrows_cache_(outgrows_cache<T>(shape)),
        sweeps_(tail_sweeps<T>(shape.channels_last)) {}

  bool past_cache(const View<T>& result) const {
    return result.data && outgrows_cache_ && is_resident(result.data);
  }

  // The mask is dense: (N, HW, C / 8) or (N, C, HW / 8), rounded up
  View<uint8_t> bits(const uint8_t* mask, int64_t n, int64_t tile) const {
    const Tiling& tiling = units_.tiling;
    const int64_t HW = shape_.H * shape_.W, c = tiling.first_channel(tile);
    const int64_t pixel = tiling.first_pixel(tile) * (tiling.along_w() ? 1 : tiling.extent.W);
    auto* data = const_cast<uint8_t*>(mask);
    if (!mask) {
      return {nullptr, 0, 0, 0};
    }
    if (shape_.channels_last) {
      const int64_t row = ceil_div(shape_.C, 8);
      return {data + (n * HW + pixel) * row + c / 8, 0, tiling.extent.W * row, row};
    }
    const int64_t row = ceil_div(HW, 8);
    return {data + (n * shape_.C + c) * row + pixel / 8, row, 0, 0};
  }

  // What is the same for all samples of a unit; per_sample has room for (2, C).
  TailBlock<T> block_of(const Unit& unit, const Affine<A>& affine, A* per_sample) const {
    const int64_t C = shape_.C, c = units_.tiling.first_channel(unit.tile);
    const bool own = affine.gate || affine.stats2;
    TailBlock<T> block{shape_.tail_act, shape_.shortcut, units_.tiling.at(unit.tile)};
    block.coefficient[kMean] = affine.stats + kRowMean * C + c;
    block.coefficient[kScale] = own ? per_sample : affine.stats + kRowScale * C + c;
    block.coefficient[kShift] = own ? per_sample + C : affine.stats + kRowShift * C + c;
    if (affine.stats2) {
      block.coefficient[kMean2] = affine.stats2 + kRowMean * C + c;
      block.coefficient[kScale2] = affine.stats2 + kRowScale * C + c;
    }
    return block;
  }

  // Scale and shift of one sample, with its gate and the residual's shift in them, and where its tensors are.
  template <class Args>
  void enter_sample(const Unit& unit, int64_t n, const Affine<A>& affine, const Args& args, A* per_sample,
                    TailBlock<T>& block) const {
    const Tiling& tiling = units_.tiling;
    const int64_t C = shape_.C, c = tiling.first_channel(unit.tile);
    A *scale = per_sample, *shift = per_sample + C;
    if (affine.gate || affine.stats2) {
      for (int64_t i = 0; i < block.extent.C; ++i) {
        const A s = affine.gate ? affine.gate[n * C + c + i] : A(1);
        scale[i] = affine.stats[kRowScale * C + c + i] * s;
        shift[i] = affine.stats[kRowShift * C + c + i] * s;
      }
    }
    for (int64_t i = 0; affine.stats2 && i < block.extent.C; ++i) {
      shift[i] += affine.stats2[kRowShift * C + c + i];
    }
    block.y = tiling.view(args.y, n, unit.tile);
    block.residual = view_or_none(tiling, args.residual, n, unit.tile);
    block.bits = bits(args.mask, n, unit.tile);
  }

  template <class F>
  void for_each_block(const F& f) const {
    for (int64_t first = 0; first < shape_.N; first += block_) {
      f(first, std::min(first + block_, shape_.N));
    }
  }

  TailShape shape_;
  Units units_;
  int64_t block_;
  bool outgrows_cache_;
  const TailSweeps<T>& sweeps_;
};

}  // namespace
}  // namespace se
