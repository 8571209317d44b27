// torch.ops.kernels_cuda_on_cpu: the CUDA kernels and their binding, on CPU tensors.
#define SE_CUDA_LIBRARY kernels_cuda_on_cpu

// torch's headers come first: the stand-in gives words like __device__ a meaning that they should not see
#include "se_cuda_ops.cpp"

#include "se_cuda.cu"

TORCH_LIBRARY_FRAGMENT(kernels_cuda_on_cpu, m) {
  // The GPU that is played, in the order of se_cuda::Limits
  m.def(
      "set_limits(int multiprocessors, int shared_per_block, int shared_per_multiprocessor, int l2, int cluster) -> ()",
        [](int64_t multiprocessors, int64_t shared_per_block, int64_t shared_per_multiprocessor, int64_t l2,
           int64_t cluster) {
          cuda_on_cpu::machine().limits = {int(multiprocessors), shared_per_block, shared_per_multiprocessor, l2,
                                           int(cluster)};
        });
  m.def("set_order(int order) -> ()",
        [](int64_t order) { cuda_on_cpu::machine().order = cuda_on_cpu::Order(order); });
  m.def("launches() -> int", [] { return int64_t(cuda_on_cpu::machine().launches); });
  // Bytes of activations read from and written to global memory since this was last asked
  m.def("traffic() -> (int, int)", [] {
    auto& machine = cuda_on_cpu::machine();
    const std::tuple<int64_t, int64_t> bytes = {machine.bytes_read, machine.bytes_written};
    machine.bytes_read = machine.bytes_written = 0;
    return bytes;
  });
}
