// The steps of a picture with 16-byte vectors.
#include <algorithm>
#include <cmath>

#include "simd_baseline.h"
#include "images_kernels.h"

namespace se {

template <class T>
MakePicture<T> make_picture_baseline() {
  return make_picture<T>;
}
template MakePicture<float> make_picture_baseline<float>();
template MakePicture<c10::BFloat16> make_picture_baseline<c10::BFloat16>();
template MakePicture<c10::Half> make_picture_baseline<c10::Half>();

}  // namespace se
