// entropy_gate on the CPU: tensors become views, and torch's threads compute strips of locations. Tested by
// tests/test_entropy_gate.py.
#include "cpu/entropy_gate/work.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "cpu/capability.h"
#include "stable_string.h"

namespace csf::entropy_gate {
namespace {

#define CSF_KERNEL "cpu/entropy_gate/gate_kernel.h"
#include "cpu/foreach_capability.h"

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 64;                      // locations; every strip begins at a multiple of it
constexpr int64_t kGrainElements = 32768;           // fewer are not worth another thread
constexpr int64_t kStreamBytes = int64_t{8} << 20;  // an output this large leaves the caches before it is read

bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Half;
}

void check(const Tensor& features, const Tensor& logits) {
  STD_TORCH_CHECK(features.is_cpu() && logits.is_cpu(), "entropy_gate: features and logits must be on one device");
  STD_TORCH_CHECK(is_floating(features.scalar_type()) && is_floating(logits.scalar_type()),
                  "entropy_gate: features and logits must be fp32, fp64, bf16 or fp16");
  STD_TORCH_CHECK(features.dim() >= 2 && features.dim() == logits.dim(),
                  "entropy_gate: features (B, C, *spatial) and logits (B, M, *spatial) must have as many dimensions");
  for (int64_t axis = 0; axis < features.dim(); ++axis) {
    STD_TORCH_CHECK(axis == 1 || features.size(axis) == logits.size(axis),
                    "entropy_gate: features and logits must agree in batch and space");
  }
  STD_TORCH_CHECK(logits.size(1) >= 2, "entropy_gate: logits must have at least 2 classes");
}

void check_grad(const Tensor& grad, const Tensor& features, int64_t channels) {
  bool fits = grad.is_cpu() && is_floating(grad.scalar_type()) && grad.dim() == features.dim();
  for (int64_t axis = 0; fits && axis < grad.dim(); ++axis) {
    fits = grad.size(axis) == (axis == 1 ? channels : features.size(axis));
  }
  STD_TORCH_CHECK(fits, "entropy_gate: an incoming gradient must have the shape and device of its output");
}

// fp64 if features or logits are, else fp32.
ScalarType accumulation_dtype(const Tensor& features, const Tensor& logits) {
  const bool is_double = features.scalar_type() == ScalarType::Double || logits.scalar_type() == ScalarType::Double;
  return is_double ? ScalarType::Double : ScalarType::Float;
}

Tensor with_dtype(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

MemoryFormat channels_last_format(const Tensor& tensor) {
  return tensor.dim() == 5 ? MemoryFormat::ChannelsLast3d : MemoryFormat::ChannelsLast;
}

// Dense with the channels innermost, and not contiguous as well.
bool is_channels_last(const Tensor& tensor) {
  if ((tensor.dim() != 4 && tensor.dim() != 5) || tensor.is_contiguous()) return false;
  int64_t expected = 1;
  const auto is_next = [&](int64_t axis) {
    const bool result = tensor.size(axis) == 1 || tensor.stride(axis) == expected;
    expected *= tensor.size(axis);
    return result;
  };
  bool result = is_next(1);
  for (int64_t axis = tensor.dim() - 1; axis > 1; --axis) result = is_next(axis) && result;
  return is_next(0) && result;
}

MemoryFormat memory_format(const Tensor& tensor) {
  return is_channels_last(tensor) ? channels_last_format(tensor) : MemoryFormat::Contiguous;
}

// Elements from one location to the next, where that is one number throughout.
std::optional<int64_t> location_stride(const Tensor& tensor) {
  int64_t stride = 1, locations = 1;
  for (int64_t axis = tensor.dim() - 1; axis > 1; --axis) {
    if (tensor.size(axis) == 1) continue;
    if (locations == 1) stride = tensor.stride(axis);
    if (tensor.stride(axis) != stride * locations) return std::nullopt;
    locations *= tensor.size(axis);
  }
  return stride;
}

// The tensor itself where the kernel can walk through it, as through a slice of channels; else a dense copy.
Tensor walkable(const Tensor& tensor, bool channels_last) {
  const auto location = location_stride(tensor);
  const bool channels_adjoin = tensor.size(1) == 1 || tensor.stride(1) == 1;
  if (location && (channels_last ? channels_adjoin : *location == 1)) return tensor;
  return torch::stable::contiguous(tensor, channels_last ? channels_last_format(tensor) : MemoryFormat::Contiguous);
}

Tensor walkable_logits(const Tensor& logits) {
  return location_stride(logits) ? logits : torch::stable::contiguous(logits);
}

View view(const Tensor& tensor, void* data) {
  return {static_cast<char*>(data), tensor.stride(0), tensor.stride(1), *location_stride(tensor)};
}

View input(const Tensor& tensor) {
  return view(tensor, const_cast<void*>(tensor.const_data_ptr()));
}

View output(const Tensor& tensor) {
  return view(tensor, tensor.mutable_data_ptr());
}

Tensor empty(const Tensor& like, int64_t channels, ScalarType dtype, MemoryFormat format) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes[1] = channels;
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device(), std::nullopt, format);
}

#if defined(__linux__) && defined(__x86_64__)

bool is_resident(uintptr_t page) {
  unsigned char state = 0;
  return mincore(reinterpret_cast<void*>(page), 1, &state) == 0 && (state & 1) != 0;
}

// Has the system back an output with memory, if it is fresh. Asking for many pages at once is cheaper than touching
// each, and what a page is zeroed with has left the caches when its values are streamed. False if that is impossible.
bool make_resident(uintptr_t address, int64_t bytes) {
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE of Linux 5.14, which older headers lack
  constexpr int64_t kChunk = int64_t{1} << 20;
  const auto page_bytes = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto page = [&](int64_t offset) { return (address + offset) / page_bytes * page_bytes; };
  if (is_resident(page(bytes / 4)) && is_resident(page(bytes / 2)) && is_resident(page(bytes - 1))) return true;
  std::atomic<bool> populated{true};
  torch::stable::parallel_for(0, (bytes + kChunk - 1) / kChunk, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end && populated; ++chunk) {
      const uintptr_t first = page(chunk * kChunk);
      const uintptr_t behind = page(std::min(bytes, (chunk + 1) * kChunk) - 1) + page_bytes;
      if (madvise(reinterpret_cast<void*>(first), behind - first, kPopulateWrite) != 0) populated = false;
    }
  });
  return populated;
}

#endif

// Whether to write a large output past the caches, which saves reading its memory first.
bool worth_streaming(const Tensor& tensor, bool channels_last) {
#if defined(__linux__) && defined(__x86_64__)
  const auto size = static_cast<int64_t>(tensor.element_size());
  const int64_t bytes = tensor.numel() * size;
  const int64_t run = (channels_last ? tensor.size(1) : tensor.stride(1)) * size;
  const auto address = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  if (bytes < kStreamBytes || run % kAlignment != 0 || address % kAlignment != 0) return false;
  return make_resident(address, bytes);
#else
  return false;
#endif
}

Type type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return Type::float64;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Half: return Type::float16;
    default: return Type::float32;
  }
}

Shape shape(const Tensor& features, const Tensor& logits, bool channels_last) {
  int64_t locations = 1;
  for (int64_t axis = 2; axis < features.dim(); ++axis) locations *= features.size(axis);
  return {type(features),   type(logits), features.size(0), features.size(1),
          logits.size(1), locations,    channels_last};
}

// Calls kernel(work, strip, scratch) for strips that cover all locations of all images.
template <class Work>
void for_each_strip(const Work& work, void (*kernel)(const Work&, Strip, void*)) {
  struct alignas(kAlignment) Line {
    char bytes[kAlignment];
  };
  const Shape& shape = work.shape;
  const int64_t blocks = (shape.locations + kBlock - 1) / kBlock;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (kBlock * (shape.channels + shape.classes)));
  torch::stable::parallel_for(0, shape.images * blocks, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<Line[]> scratch(new Line[scratch_bytes(shape) / sizeof(Line)]);
    while (begin < end) {
      const int64_t image = begin / blocks;
      const int64_t next = std::min({end, (image + 1) * blocks, begin + kStrip / kBlock});
      const int64_t first = (begin - image * blocks) * kBlock;
      kernel(work, {image, first, std::min(shape.locations, first + (next - begin) * kBlock)}, scratch.get());
      begin = next;
    }
  });
}

std::tuple<Tensor, Tensor> run_forward(const Tensor& features, const Tensor& logits) {
  check(features, logits);
  const ScalarType accumulation = accumulation_dtype(features, logits);
  if (accumulation == ScalarType::Double && features.scalar_type() != logits.scalar_type()) {
    auto [gated, uncertainty] = run_forward(with_dtype(features, accumulation), with_dtype(logits, accumulation));
    return {with_dtype(gated, features.scalar_type()), uncertainty};
  }
  const bool channels_last = is_channels_last(features);
  const Tensor gated = empty(features, features.size(1), features.scalar_type(), memory_format(features));
  const Tensor uncertainty = empty(features, 1, accumulation, MemoryFormat::Contiguous);
  if (uncertainty.numel() > 0) {
    const Tensor x = walkable(features, channels_last), z = walkable_logits(logits);
    const Forward work{shape(x, z, channels_last), input(x), input(z), output(gated), output(uncertainty),
                       worth_streaming(gated, channels_last)};
    for_each_strip(work, CSF_DISPATCH(forward));
  }
  return {gated, uncertainty};
}

std::tuple<Tensor, Tensor> run_backward(const std::optional<Tensor>& grad_gated,
                                        const std::optional<Tensor>& grad_uncertainty, const Tensor& features,
                                        const Tensor& logits) {
  check(features, logits);
  if (grad_gated) check_grad(*grad_gated, features, features.size(1));
  if (grad_uncertainty) check_grad(*grad_uncertainty, features, 1);
  const ScalarType accumulation = accumulation_dtype(features, logits);
  if (accumulation == ScalarType::Double && features.scalar_type() != logits.scalar_type()) {
    auto [grad_features, grad_logits] = run_backward(
        grad_gated, grad_uncertainty, with_dtype(features, accumulation), with_dtype(logits, accumulation));
    return {with_dtype(grad_features, features.scalar_type()), with_dtype(grad_logits, logits.scalar_type())};
  }
  const bool channels_last = is_channels_last(features);
  Tensor grad_features = empty(features, features.size(1), features.scalar_type(), memory_format(features));
  const Tensor grad_logits = empty(logits, logits.size(1), logits.scalar_type(), memory_format(logits));
  if (!grad_gated) torch::stable::zero_(grad_features);
  if (grad_logits.numel() > 0) {
    const Tensor x = walkable(features, channels_last), z = walkable_logits(logits);
    Backward work{shape(x, z, channels_last), {}, {}, input(x), input(z), output(grad_features), output(grad_logits),
                  worth_streaming(grad_features, channels_last)};
    std::optional<Tensor> gated_grads, uncertainty_grads;
    if (grad_gated) {
      gated_grads = walkable(with_dtype(*grad_gated, features.scalar_type()), channels_last);
      work.grad_gated = input(*gated_grads);
    }
    if (grad_uncertainty) {
      uncertainty_grads = torch::stable::contiguous(with_dtype(*grad_uncertainty, accumulation));
      work.grad_uncertainty = input(*uncertainty_grads);
    }
    for_each_strip(work, CSF_DISPATCH(backward));
  }
  return {grad_features, grad_logits};
}

std::tuple<Tensor, Tensor> entropy_gate_forward(Tensor features, Tensor logits, StringHandle backend) {
  check_runs_on_cpu(backend);
  return run_forward(features, logits);
}

std::tuple<Tensor, Tensor> entropy_gate_backward(std::optional<Tensor> grad_gated,
                                                 std::optional<Tensor> grad_uncertainty, Tensor features,
                                                 Tensor logits, StringHandle backend) {
  check_runs_on_cpu(backend);
  return run_backward(grad_gated, grad_uncertainty, features, logits);
}

}  // namespace
}  // namespace csf::entropy_gate

STABLE_TORCH_LIBRARY_IMPL(contrastseg_fast, CPU, m) {
  m.impl("entropy_gate_forward", TORCH_BOX(&csf::entropy_gate::entropy_gate_forward));
  m.impl("entropy_gate_backward", TORCH_BOX(&csf::entropy_gate::entropy_gate_backward));
}
