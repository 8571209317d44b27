// The steps of a picture with 32-byte vectors. The processor is asked before it is called.
#if defined(__x86_64__)

#include <algorithm>
#include <cmath>

#include "simd_avx2.h"
#include "images_kernels.h"

namespace se {

template <class T>
MakePicture<T> make_picture_avx2() {
  return make_picture<T>;
}
template MakePicture<float> make_picture_avx2<float>();
template MakePicture<c10::BFloat16> make_picture_avx2<c10::BFloat16>();
template MakePicture<c10::Half> make_picture_avx2<c10::Half>();

}  // namespace se

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
