// kernels_C::prepare_images: what is accepted, how a batch is shared out, registration. Mathematics in
// kernels/images.py, which checks what users give; here is checked what memory safety rests on.
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string_view>
#include <vector>

#include "arguments.h"
#include "division.h"
#include "images_scratch.h"

namespace se {
namespace {

template <class T>
MakePicture<T> picture_maker() {
#if defined(__x86_64__)
  static const std::string_view chosen = instruction_set();
  return chosen == "AVX512" ? make_picture_avx512<T>()
         : chosen == "AVX2" ? make_picture_avx2<T>()
                            : make_picture_baseline<T>();
#else
  return make_picture_baseline<T>();
#endif
}

// The box of one image of the batch.
struct Box {
  const uint8_t* data;
  int64_t stride, h, w;
};

bool is_whole(float v) {
  return std::trunc(v) == v;
}

// Raises where the image, or the box in it, is not within `pixels`.
Box find_box(const Tensor& pixels, const int64_t* starts, const int32_t* sizes, int64_t images, int64_t which,
             const Edit& edit, int64_t i) {
  TORCH_CHECK_VALUE(which >= 0 && which < images, "index[", i, "] = ", which, " is none of the ", images, " images");
  const int64_t start = starts[which], H = sizes[2 * which], W = sizes[2 * which + 1], bytes = pixels.numel();
  // H * W fits 64 bits, and three times as much may not
  TORCH_CHECK_VALUE(H >= 1 && W >= 1 && start >= 0 && start <= bytes && H * W <= (bytes - start) / 3, "image ", which,
                    ", ", H, " x ", W, " from byte ", start, ", is not within pixels, ", bytes, " bytes");
  const double top = edit.top, left = edit.left, h = edit.height, w = edit.width;
  TORCH_CHECK_VALUE(top >= 0 && left >= 0 && h >= 1 && w >= 1 && top + h <= H && left + w <= W, "edits[", i,
                    "]: its box [", top, ", ", left, ", ", h, ", ", w, "] is not within image ", which, ", ", H, " x ",
                    W);
  TORCH_CHECK_VALUE(is_whole(edit.top) && is_whole(edit.left) && is_whole(edit.height) && is_whole(edit.width),
                    "edits[", i, "]: its box [", top, ", ", left, ", ", h, ", ", w, "] is not of whole numbers");
  TORCH_CHECK_VALUE(edit.tone >= 0 && edit.tone < kTones && is_whole(edit.tone), "edits[", i, "]: its tone ",
                    edit.tone, " is none of ", kTones);
  const uint8_t* const image = pixels.const_data_ptr<uint8_t>() + start;
  return {image + 3 * (static_cast<int64_t>(top) * W + static_cast<int64_t>(left)), 3 * W, static_cast<int64_t>(h),
          static_cast<int64_t>(w)};
}

// A thread's memory, as large as the largest of its pictures needs.
struct Memory {
  std::unique_ptr<char[]> owned;
  char* aligned;

  explicit Memory(int64_t bytes) : owned(new char[bytes + kScratchAlignment]) {
    const auto at = reinterpret_cast<uintptr_t>(owned.get());
    aligned = owned.get() + (kScratchAlignment - at % kScratchAlignment);
  }
};

void prepare_images(const Tensor& pixels, const Tensor& starts, const Tensor& sizes, const Tensor& index,
                    const Tensor& edits, at::ArrayRef<double> mean, at::ArrayRef<double> std, const Tensor& out) {
  TORCH_CHECK_VALUE(starts.dim() == 1 && index.dim() == 1, "starts and index must have one dimension");
  const int64_t n = starts.size(0), B = index.size(0);
  check_tensor("pixels", pixels, {pixels.numel()}, "(bytes)", at::kByte);
  check_tensor("starts", starts, {n}, "(n)", at::kLong);
  check_tensor("sizes", sizes, {n, 2}, "(n, 2)", at::kInt);
  check_tensor("index", index, {B}, "(B)", at::kLong);
  check_tensor("edits", edits, {B, kEditColumns}, "(B, 36)", at::kFloat);
  for (const Tensor* t : {&pixels, &starts, &sizes, &index, &edits}) {
    TORCH_CHECK_VALUE(t->is_contiguous(), "pixels, starts, sizes, index and edits must be contiguous");
  }
  TORCH_CHECK_VALUE(out.dim() == 4, "out must have shape (B, 3, S, S), got ", out.sizes());
  const int64_t S = out.size(2);
  check_shape("out", out, {B, 3, S, S}, "(B, 3, S, S)");
  check_cpu("out", out);
  TORCH_CHECK_VALUE(S >= 1 && S <= kLargestSide, "out must have a side of 1 to ", kLargestSide, ", got ", S);
  TORCH_CHECK_VALUE(out.is_contiguous(at::MemoryFormat::ChannelsLast), "out must be channels-last");
  TORCH_CHECK_VALUE(mean.size() == 3 && std.size() == 3, "mean and std must have three numbers");

  const auto* const edit = reinterpret_cast<const Edit*>(edits.const_data_ptr<float>());
  const auto* const which = index.const_data_ptr<int64_t>();
  std::vector<Box> boxes(B);
  for (int64_t i = 0; i < B; ++i) {
    boxes[i] = find_box(pixels, starts.const_data_ptr<int64_t>(), sizes.const_data_ptr<int32_t>(), n, which[i], edit[i],
                        i);
  }
  float means[3], inv_stds[3];
  for (int c = 0; c < 3; ++c) {
    means[c] = static_cast<float>(mean[c]);
    inv_stds[c] = static_cast<float>(1 / std[c]);
  }
  const auto make_all = [&](auto zero) {
    using T = decltype(zero);
    const MakePicture<T> make = picture_maker<T>();
    T* const data = out.mutable_data_ptr<T>();
    at::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      int64_t bytes = 0;
      for (int64_t i = begin; i < end; ++i) {
        Scratch unused;
        bytes = std::max(bytes, carve(S, boxes[i].h, boxes[i].w, nullptr, unused));
      }
      const Memory memory(bytes);
      for (int64_t i = begin; i < end; ++i) {
        const Box& box = boxes[i];
        make({box.data, box.stride, box.h, box.w, edit + i, S, means, inv_stds, data + i * 3 * S * S, memory.aligned});
      }
    });
  };
  switch (out.scalar_type()) {
    case at::kFloat:
      return make_all(float{});
    case at::kBFloat16:
      return make_all(c10::BFloat16{});
    case at::kHalf:
      return make_all(c10::Half{});
    default:
      TORCH_CHECK_VALUE(false, "out must be float32, bfloat16 or float16, got ", out.scalar_type());
  }
}

TORCH_LIBRARY_FRAGMENT(kernels_C, m) {
  m.def(
      "prepare_images(Tensor pixels, Tensor starts, Tensor sizes, Tensor index, Tensor edits, float[] mean, "
      "float[] std, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(kernels_C, CPU, m) {
  m.impl("prepare_images", prepare_images);
}

}  // namespace
}  // namespace se
