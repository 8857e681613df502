// The entropy gate's kernels on a card: one instance for each type of the features, layout, and width of the loads.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include "cuda/entropy_gate_kernel.h"

namespace csf::entropy_gate::cuda {
namespace {

struct CudaBlock {
  __device__ __forceinline__ int thread() const { return threadIdx.x; }
  __device__ __forceinline__ int64_t index() const { return blockIdx.x; }
  __device__ __forceinline__ void wait() const { __syncthreads(); }
  __device__ __forceinline__ void* shared() const {
    extern __shared__ __align__(16) unsigned char bytes[];
    return bytes;
  }
  // The value of the thread whose place in the warp differs by `distance`, a power of two.
  template <class S>
  __device__ __forceinline__ S from_lane(S value, int distance) const {
    return __shfl_xor_sync(0xffffffff, value, distance);
  }
};

template <class Stored, int VECTOR, bool CHANNELS_LAST>
__global__ void __launch_bounds__(kThreads, 4)
    entropy_gate_fwd_kernel(const __grid_constant__ Forward work, const __grid_constant__ Plan plan) {
  forward_thread<Stored, VECTOR, CHANNELS_LAST>(work, plan, CudaBlock{});
}

template <class Stored, int VECTOR, bool CHANNELS_LAST>
__global__ void __launch_bounds__(kThreads, sizeof(Stored) == 8 ? 2 : 3)
    entropy_gate_bwd_kernel(const __grid_constant__ Backward work, const __grid_constant__ Plan plan) {
  backward_thread<Stored, VECTOR, CHANNELS_LAST>(work, plan, CudaBlock{});
}

template <class Stored, int VECTOR, bool CHANNELS_LAST>
auto kernel(const Forward&) {
  return &entropy_gate_fwd_kernel<Stored, VECTOR, CHANNELS_LAST>;
}

template <class Stored, int VECTOR, bool CHANNELS_LAST>
auto kernel(const Backward&) {
  return &entropy_gate_bwd_kernel<Stored, VECTOR, CHANNELS_LAST>;
}

template <class Stored, class Work>
auto kernel_as(const Work& work, const Plan& plan) {
  constexpr int vector = kVectorBytes / sizeof(Stored);
  if (work.shape.channels_last) {
    return plan.vector == 1 ? kernel<Stored, 1, true>(work) : kernel<Stored, vector, true>(work);
  }
  return plan.vector == 1 ? kernel<Stored, 1, false>(work) : kernel<Stored, vector, false>(work);
}

template <class Work>
auto kernel_for(const Work& work, const Plan& plan) {
  switch (work.shape.feature_type) {
    case ScalarType::Double: return kernel_as<double>(work, plan);
    case ScalarType::BFloat16: return kernel_as<BFloat16>(work, plan);
    case ScalarType::Half: return kernel_as<Half>(work, plan);
    default: return kernel_as<float>(work, plan);
  }
}

template <class Work>
void launch_on_current_stream(const Work& work, int32_t device) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  int processors = 1;
  cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    const Plan plan = make_plan(work, processors);
    kernel_for(work, plan)<<<static_cast<unsigned>(plan.blocks), kThreads, plan.shared_bytes,
                             static_cast<cudaStream_t>(stream)>>>(work, plan);
    error = cudaGetLastError();
  }
  STD_TORCH_CHECK(error == cudaSuccess, "entropy_gate: the launch failed: ", cudaGetErrorString(error));
}

}  // namespace

void launch(const Forward& work, int32_t device) {
  launch_on_current_stream(work, device);
}

void launch(const Backward& work, int32_t device) {
  launch_on_current_stream(work, device);
}

}  // namespace csf::entropy_gate::cuda
