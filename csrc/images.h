// From decoded images to an augmented batch on the CPU: kernel interface. Mathematics: kernels/images.py.
//
// One thread makes one picture at a time, step by step, in two buffers that its L2 holds.
#pragma once

#include "se.h"

namespace se {

// A row of kernels.images.EDIT.
struct Edit {
  float top, left, height, width;  // the box, checked: whole numbers inside the image
  float warp[6];
  float color[9], pivot[9];
  float tone, level;  // tone is one of Tone, checked
  float sharpness, sigma;
  float erased[4];
};
constexpr int64_t kEditColumns = 36;
static_assert(sizeof(Edit) == kEditColumns * sizeof(float));

enum class Tone : int64_t { nothing = 0, posterize = 1, solarize = 2, autocontrast = 3, equalize = 4 };
constexpr int64_t kTones = 5;
constexpr int64_t kLargestSide = 1 << 14;  // within a picture offsets have 32 bits

// Of one image of a batch. Pixels are RGB, three neighbours in memory; strides are in bytes, or in T.
template <class T>
struct Picture {
  const uint8_t* box;  // what is shown of the image
  int64_t stride, h, w;
  const Edit* edit;
  int64_t side;                 // S
  const float *mean, *inv_std;  // (3)
  T* out;                       // (S, S, 3)
  char* scratch;                // as `carve` divides it, aligned to kScratchAlignment
};

constexpr int64_t kScratchAlignment = 64;

template <class T>
using MakePicture = void (*)(const Picture<T>& picture);

// As `kernels` of se.h
template <class T>
MakePicture<T> make_picture_baseline();
template <class T>
MakePicture<T> make_picture_avx2();
template <class T>
MakePicture<T> make_picture_avx512();

}  // namespace se
