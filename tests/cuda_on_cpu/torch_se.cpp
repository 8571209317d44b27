// torch.ops.kernels_cuda_on_cpu: the CUDA kernels and their binding, on CPU tensors.
#define SE_CUDA_LIBRARY kernels_cuda_on_cpu

// torch's headers come first: the stand-in gives words like __device__ a meaning that they should not see
#include "se_cuda_ops.cpp"

#include "se_cuda.cu"

TORCH_LIBRARY_FRAGMENT(kernels_cuda_on_cpu, m) {
  // The GPU that is played, in the order of se_cuda::Limits
  m.def("set_limits(int multiprocessors, int shared_per_block, int shared_per_multiprocessor, int l2, int cluster) -> ()",
        [](int64_t multiprocessors, int64_t shared_per_block, int64_t shared_per_multiprocessor, int64_t l2,
           int64_t cluster) {
          cuda_on_cpu::machine().limits = {int(multiprocessors), shared_per_block, shared_per_multiprocessor, l2,
                                           int(cluster)};
        });
  m.def("set_order(int order) -> ()",
        [](int64_t order) { cuda_on_cpu::machine().order = cuda_on_cpu::Order(order); });
  m.def("launches() -> int", [] { return int64_t(cuda_on_cpu::machine().launches); });
  // (on_chip, vector, team, shared) for a dense, aligned tensor on the machine that is played
  m.def("plan(int N, int C, int H, int W, int R, bool half, bool channels_last) -> int[]",
        [](int64_t N, int64_t C, int64_t H, int64_t W, int64_t R, bool half, bool channels_last) {
          using namespace se_cuda;
          const Shape shape = {N, int(C), int(H), int(W), int(R), half ? DType::bfloat16 : DType::float32, Act::relu,
                               GateFn::sigmoid, channels_last};
          View view = {nullptr, C * H * W, 1, W * C, C, true};
          if (!channels_last) {
            view = {nullptr, C * H * W, H * W, W, 1, true};
          }
          alignas(16) static char somewhere[16];
          view.data = somewhere;
          const Plan plan = se_cuda::plan(shape, device_limits(), {view});
          return std::vector<int64_t>{plan.on_chip, plan.vector, plan.team, plan.shared};
        });
}
