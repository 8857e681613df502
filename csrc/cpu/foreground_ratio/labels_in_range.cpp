// labels_in_range on the CPU: whether all labels are classes, in one read. Tested by tests/test_foreground_ratio.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <optional>
#include <vector>

#include "cpu/capability.h"
#include "cpu/foreground_ratio/labels.h"

namespace csf::foreground_ratio {
namespace {

#define CSF_KERNEL "cpu/foreground_ratio/range_kernel.h"
#include "cpu/foreach_capability.h"

// Whether the tensor's elements lie side by side, in whatever order of the axes.
bool is_dense(const Tensor& tensor) {
  std::vector<std::array<int64_t, 2>> axes;  // stride, size
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) != 1) axes.push_back({tensor.stride(i), tensor.size(i)});
  }
  std::sort(axes.begin(), axes.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : axes) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

template <class T>
bool all_in_range(const Tensor& labels, int64_t highest, bool integral, int64_t ignore_index) {
  const auto check = CSF_DISPATCH(in_range<T>);
  std::atomic<bool> right{true};
  torch::stable::parallel_for(0, labels.numel(), 1 << 15, [&](int64_t begin, int64_t end) {
    if (!check(data_of<T>(labels) + begin, end - begin, highest, integral, ignore_index)) right = false;
  });
  return right;
}

Tensor labels_in_range(Tensor labels, int64_t highest, bool integral, std::optional<int64_t> ignore_index) {
  if (!is_dense(labels)) labels = torch::stable::contiguous(labels);
  labels = torch::stable::to(labels, readable(labels.scalar_type()));
  const int64_t ignored = ignore_index.value_or(0);  // 0 is always in range
  const bool right = dispatch(labels.scalar_type(), [&](auto label) {
    return all_in_range<decltype(label)>(labels, highest, integral, ignored);
  });
  Tensor result = torch::stable::new_empty(labels, {}, ScalarType::Bool);
  *result.mutable_data_ptr<bool>() = right;
  return result;
}

}  // namespace
}  // namespace csf::foreground_ratio

STABLE_TORCH_LIBRARY_IMPL(contrastseg_fast, CPU, m) {
  m.impl("labels_in_range", TORCH_BOX(&csf::foreground_ratio::labels_in_range));
}
