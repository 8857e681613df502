// Where the patches of all images lie in the labels. Tested by tests/test_foreground_ratio.py.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "cpu/foreground_ratio/plan.h"

namespace csf::foreground_ratio {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The labels' spatial axes as planes, rows and columns, slowest in memory first; axis -1 where there is none.
struct Axes {
  std::array<int64_t, 3> axis{-1, -1, -1};
  std::array<int64_t, 3> extent{1, 1, 1};
  std::array<int64_t, 3> stride{0, 0, 1};

  Axes(const Tensor& labels, int64_t dims) {
    const int64_t first = labels.dim() - dims;
    std::array<int64_t, 3> order{0, 1, 2};
    std::stable_sort(order.begin(), order.begin() + dims, [&](int64_t a, int64_t b) {
      return labels.stride(first + a) > labels.stride(first + b);
    });
    constexpr int64_t place[4][3] = {{}, {2}, {0, 2}, {0, 1, 2}};
    for (int64_t i = 0; i < dims; ++i) {
      const int64_t target = place[dims][i];
      axis[target] = order[i];
      extent[target] = labels.size(first + order[i]);
      stride[target] = labels.stride(first + order[i]);
    }
  }

  int64_t pixels() const { return extent[0] * extent[1] * extent[2]; }

  template <class T>
  Labels<T> view(const T* data) const {
    return {data, {stride[0], stride[1], stride[2]}};
  }
};

// The patches of all images, their axes in the order of `axes`.
class Patches {
 public:
  Patches(const Tensor& starts, const std::vector<int64_t>& size, int64_t images, const Axes& axes)
      : starts_(torch::stable::contiguous(torch::stable::to(starts, ScalarType::Long))),
        data_(starts_.const_data_ptr<int64_t>()),
        axes_(axes),
        dims_(size.size()),
        images_(images),
        count_(starts.size(-2)),
        image_stride_(starts.dim() == 3 ? count_ * dims_ : 0) {
    for (int64_t i = 0; i < 3; ++i) size_[i] = axes.axis[i] < 0 ? 1 : size[axes.axis[i]];
  }

  const Axes& axes() const { return axes_; }
  int64_t images() const { return images_; }
  int64_t count() const { return count_; }
  bool same_in_all_images() const { return image_stride_ == 0; }
  int64_t size(int64_t axis) const { return std::min(size_[axis], axes_.extent[axis]); }

  // Pixels of a whole patch, also outside the image.
  double area() const { return static_cast<double>(size_[0]) * size_[1] * size_[2]; }

  Patch inside(int64_t image, int64_t index) const {
    const int64_t* start = data_ + image * image_stride_ + index * dims_;
    Patch patch;
    for (int64_t i = 0; i < 3; ++i) {
      const int64_t begin =
          axes_.axis[i] < 0 ? 0 : std::clamp(start[axes_.axis[i]], -size_[i], axes_.extent[i]);
      patch.begin[i] = std::max<int64_t>(begin, 0);
      patch.end[i] = std::min(begin + size_[i], axes_.extent[i]);
    }
    return patch;
  }

 private:
  Tensor starts_;
  const int64_t* data_;
  Axes axes_;
  int64_t size_[3];
  int64_t dims_, images_, count_, image_stride_;
};

}  // namespace csf::foreground_ratio
